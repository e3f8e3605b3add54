//! Models by name, against a small hub on this machine.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::json;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_for_this_test";

/// A hub with one gated model, `org/tiny`: the files of a folder.
struct Hub {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn serve(folder: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (folder, log) = (folder.clone(), log.clone());
                std::thread::spawn(move || answer(stream, &folder, &log));
            }
        });
        Self { url, asked }
    }

    /// File names asked for since the last call, each once.
    fn downloads(&self) -> Vec<String> {
        let mut files: Vec<String> = std::mem::take(&mut *self.asked.lock().unwrap())
            .iter()
            .filter_map(|path| path.split_once("/resolve/").map(|(_, file)| file.to_owned()))
            .collect();
        files.sort();
        files.dedup();
        files
    }
}

fn answer(stream: TcpStream, folder: &Path, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let Some(path) = lines.first().and_then(|line| line.split(' ').nth(1)) else { return };
    log.lock().unwrap().push(path.to_owned());
    let header = |name: &str| {
        lines.iter().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    };
    let (status, extra, body) = if header("authorization") != Some(format!("Bearer {TOKEN}")) {
        ("401 Unauthorized", String::new(), Vec::new())
    } else if path == "/api/models/org/tiny/revision/main" {
        let names = std::fs::read_dir(folder)
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name().into_string().unwrap());
        let siblings: Vec<_> = names.map(|name| json!({"rfilename": name})).collect();
        ("200 OK", String::new(), json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes())
    } else if let Some(file) = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")) {
        let bytes = std::fs::read(folder.join(file)).unwrap();
        let range = header("range").unwrap();
        let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let from: usize = from.parse().unwrap();
        let to = to.parse().map_or(bytes.len(), |to: usize| to + 1);
        let extra = format!(
            "Content-Range: bytes {from}-{}/{}\r\nETag: \"{file}-tag\"\r\nX-Repo-Commit: {COMMIT}\r\n",
            to - 1,
            bytes.len()
        );
        ("206 Partial Content", extra, bytes[from..to].to_vec())
    } else {
        ("404 Not Found", String::new(), Vec::new())
    };
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n", body.len());
    let mut stream = stream;
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

fn freewheel(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freewheel"));
    for variable in
        ["HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY"]
    {
        command.env_remove(variable);
    }
    command
        .env("NO_PROXY", "127.0.0.1")
        .args(args)
        .envs(environment.iter().copied())
        .output()
        .expect("the binary runs")
}

/// A model whose weights are one indexed shard.
fn sharded_model(dir: &Path) -> PathBuf {
    let out = dir.join("model");
    let sizes = ["hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "num_key_value_heads=1"];
    let sizes = sizes.iter().chain(&["intermediate_size=32", "max_position_embeddings=64"]);
    let mut args = vec!["init-model", "llama", "--out", out.to_str().unwrap()];
    sizes.for_each(|size| args.extend(["--set", size]));
    let made = freewheel(&args, &[]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let shard = "model-00001-of-00001.safetensors";
    std::fs::rename(out.join("model.safetensors"), out.join(shard)).unwrap();
    let weights = std::fs::read(out.join(shard)).unwrap();
    let length = u64::from_le_bytes(*weights.first_chunk().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&weights[8..8 + length]).unwrap();
    let map: serde_json::Map<_, _> = header
        .keys()
        .filter(|name| *name != "__metadata__")
        .map(|name| (name.clone(), json!(shard)))
        .collect();
    let index = json!({"metadata": {}, "weight_map": map});
    std::fs::write(out.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::write(out.join("README.md"), "not needed").unwrap();
    out
}

const ASK: [&str; 8] =
    ["generate", "--model", "org/tiny", "--prompt", "ab", "--greedy", "--max-new-tokens", "4"];

#[test]
fn a_name_is_downloaded_once_and_then_found_without_a_network() {
    let dir = tempfile::tempdir().unwrap();
    let model = sharded_model(dir.path());
    let local: Vec<&str> =
        ASK.iter().map(|arg| if *arg == "org/tiny" { model.to_str().unwrap() } else { arg }).collect();
    let expected = freewheel(&local, &[]);
    assert!(expected.status.success(), "{}", String::from_utf8_lossy(&expected.stderr));

    let hub = Hub::serve(model.clone());
    let home = dir.path().join("home");
    let home = home.to_str().unwrap();
    let base = [("HF_ENDPOINT", hub.url.as_str()), ("HF_HOME", home)];
    let refused = freewheel(&ASK, &base);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{text}");
    assert!(text.contains("org/tiny cannot be downloaded") && text.contains("set HF_TOKEN"), "{text}");

    let with_token = [base[0], base[1], ("HF_TOKEN", TOKEN)];
    let got = freewheel(&ASK, &with_token);
    assert!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
    assert_eq!(got.stdout, expected.stdout);
    let files = hub.downloads();
    assert!(files.iter().any(|file| file.ends_with("00001-of-00001.safetensors")), "{files:?}");
    assert!(!files.iter().any(|file| file.ends_with("README.md")), "{files:?}");

    let again = freewheel(&ASK, &with_token);
    assert_eq!((again.status.code(), hub.downloads()), (Some(0), vec![]), "nothing is fetched twice");
    for without in [("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:9")] {
        let offline = freewheel(&ASK, &[("HF_HOME", home), without]);
        assert!(offline.status.success(), "{}", String::from_utf8_lossy(&offline.stderr));
        assert_eq!(offline.stdout, expected.stdout);
    }
}

#[test]
fn what_cannot_be_had_is_refused_with_a_cure() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::serve(dir.path().to_owned());
    let home = dir.path().join("home");
    let refusal = |name: &str, environment: &[(&str, &str)]| {
        let mut environment = environment.to_vec();
        environment.extend([("HF_HOME", home.to_str().unwrap()), ("HF_TOKEN", TOKEN)]);
        let output = freewheel(&["tokenize", "--model", name, "--text", "a"], &environment);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{text}");
        text
    };
    let text = refusal("org/tiny", &[("HF_ENDPOINT", "http://127.0.0.1:9")]);
    assert!(
        text.contains("http://127.0.0.1:9 cannot be reached") && text.contains("hf download org/tiny"),
        "{text}"
    );
    let text = refusal("org/tiny", &[("HF_HUB_OFFLINE", "1")]);
    assert!(text.contains("HF_HUB_OFFLINE is set"), "{text}");
    let text = refusal("org/other", &[("HF_ENDPOINT", &hub.url)]);
    assert!(text.contains("there is no such model or revision"), "{text}");
    let text = refusal("org/tiny", &[("HF_ENDPOINT", &hub.url)]);
    assert!(text.contains("org/tiny has no config.json"), "an empty repository: {text}");
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    let text = refusal("org/tiny", &[("HF_ENDPOINT", &hub.url)]);
    assert!(text.contains("pickles"), "{text}");
}
