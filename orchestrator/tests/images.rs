//! Prompts with images, from the command line: generated from, scored, and trained on to the end.

use std::path::Path;
use std::process::{Command, Output};

use freewheel::prompts::{Shape, ShapesGenerator, ShapesItem, Split};
use serde_json::{Value, json};

fn freewheel(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_freewheel"))
        .args(args)
        .env_remove("FREEWHEEL_QUEUE_URL")
        .env_remove("FREEWHEEL_RUN_DIR")
        .env_remove("FREEWHEEL_LOG")
        .output()
        .expect("the binary runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// JSON lines of a command that succeeds.
fn rows(args: &[&str]) -> Vec<Value> {
    let output = freewheel(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> String {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A tiny model that reads images, made on the spot; with `arch = "llama4_text"` one that does not.
fn tiny_model(dir: &Path, arch: &str) -> String {
    let out = dir.join(arch).to_str().unwrap().to_owned();
    let mut args = vec!["init-model", arch, "--out", &out];
    let mut settings = vec![
        "hidden_size=32",
        "num_hidden_layers=2",
        "num_attention_heads=2",
        "num_key_value_heads=1",
        "head_dim=16",
        "intermediate_size=16",
        "intermediate_size_mlp=32",
        "num_local_experts=4",
        "max_position_embeddings=64",
    ];
    if arch == "llama4" {
        settings.extend([
            "vision_config.hidden_size=16",
            "vision_config.intermediate_size=64",
            "vision_config.num_hidden_layers=1",
            "vision_config.num_attention_heads=2",
        ]);
    }
    settings.iter().for_each(|setting| args.extend(["--set", setting]));
    let made = freewheel(&args);
    assert!(made.status.success(), "{}", stderr(&made));
    out
}

/// Writes `count` pictures and a prompt file that names them; returns the file.
fn prompt_file(dir: &Path, count: usize) -> String {
    let mut lines = String::new();
    for (index, prompt) in ShapesGenerator::new(1, &[2], Split::Train).prompts(count).iter().enumerate() {
        let path = format!("{index}.png");
        write(dir, &path, prompt.images()[0].bytes());
        let content = json!([{"type": "image", "path": path}, {"type": "text", "text": prompt.question()}]);
        let answer: Value = serde_json::from_str(prompt.answer.as_deref().unwrap()).unwrap();
        let line = json!({"messages": [{"role": "user", "content": content}], "answer": answer});
        lines.push_str(&format!("{line}\n"));
    }
    write(dir, "shapes.jsonl", lines)
}

fn run_config(dir: &Path, model: &str, prompts: &str) -> String {
    let text = format!(
        "[run]\ndir = {:?}\n[model]\npath = {model:?}\n[prompts]\nfile = {prompts:?}\ngroup_size = 4\n\
         curriculum.selection = \"uniform\"\n[actor]\nmax_new_tokens = 12\n[learner]\nsteps = 3\ngroups_per_step = 2\n\
         learning_rate = 1e-3\ncheckpoint_every = 2\n[eval]\nevery = 0\n\
         [[reward.component]]\nname = \"digit\"\nkind = \"verifier\"\nverifier = \"regex\"\npattern = \"[0-9]\"\n",
        dir.join("runs")
    );
    write(dir, "run.toml", text)
}

#[test]
fn a_prompt_file_with_images_trains_to_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path(), "llama4");
    let prompts = prompt_file(dir.path(), 12);
    let config = run_config(dir.path(), &model, &prompts);
    for (name, frozen) in [("trained", "false"), ("frozen", "true")] {
        let (name_set, freeze) = (format!("run.name={name}"), format!("learner.freeze_vision={frozen}"));
        let output = freewheel(&[
            "run",
            &config,
            "--set",
            &name_set,
            "--set",
            &freeze,
            "--set",
            "learner.weight_decay=0.1",
        ]);
        assert!(output.status.success(), "{}", stderr(&output));
        let run = dir.path().join("runs").join(name);
        let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3);
        let same_version = |line: &Value| line["mismatch/same_version_tokens"].as_u64().unwrap();
        assert!(lines.iter().map(same_version).sum::<u64>() > 0, "some tokens are of the version trained");
        for line in &lines {
            assert_eq!(line["accounting/imbalance"], 0, "{line}");
            assert_eq!(line["mismatch/same_version_abs_max"], 0.0, "{line}");
        }
        // The image encoder moved with the rest, or did not if it was frozen.
        let checkpoints =
            std::fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path());
        let newest = checkpoints.max().expect("a checkpoint");
        let (before, after) = (load(Path::new(&model)), load(&newest));
        for (part, moves) in [("vision_model.", frozen == "false"), ("multi_modal_projector.", true)] {
            assert_eq!(values(&before, part) != values(&after, part), moves, "{name}: {part}");
        }
    }
}

fn load(dir: &Path) -> freewheel_model::LoadedModel {
    freewheel_model::load(dir, None).unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
}

fn values(model: &freewheel_model::LoadedModel, part: &str) -> Vec<f32> {
    let tensors = model.params.layout.tensors.iter().filter(|tensor| tensor.name.starts_with(part));
    tensors.flat_map(|tensor| model.params.range_f32(tensor.range())).collect()
}

#[test]
fn generation_sees_the_image_and_nothing_else_of_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path(), "llama4");
    for (name, count) in [("one.png", 1), ("many.png", 9)] {
        write(dir.path(), name, ShapesItem::new(&vec![Shape::Square; count], Shape::Square).png());
    }
    let line = |image: &str| {
        let content = json!([{"type": "image", "path": image}, {"type": "text", "text": "How many?"}]);
        json!({"messages": [{"role": "user", "content": content}]}).to_string()
    };
    let generate = |images: &[&str]| {
        let lines: Vec<String> = images.iter().map(|image| line(image)).collect();
        let input = write(dir.path(), "in.jsonl", lines.join("\n"));
        rows(&[
            "generate",
            "--model",
            &model,
            "--input",
            &input,
            "--greedy",
            "--max-new-tokens",
            "4",
            "--ignore-eos",
        ])
    };
    let (alone, both) = (generate(&["one.png"]), generate(&["many.png", "one.png"]));
    assert_eq!(alone[0]["logprobs"], both[1]["logprobs"], "the same bits alone and among others");
    assert_eq!(both[0]["input_ids"], both[1]["input_ids"]);
    assert_ne!(both[0]["logprobs"], both[1]["logprobs"], "the image matters");

    // The log-probs command gives the logits that the first token was drawn from.
    let input = write(dir.path(), "in.jsonl", line("one.png"));
    let scored = &rows(&["logprobs", "--model", &model, "--input", &input, "--logits"])[0];
    assert_eq!(scored["input_ids"], alone[0]["input_ids"]);
    let last: Vec<f64> =
        serde_json::from_value(scored["logits"].as_array().unwrap().last().unwrap().clone()).unwrap();
    let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
    assert_eq!(alone[0]["output_ids"][0], best);
    let ids = &rows(&["tokenize", "--model", &model, "--input", &input])[0]["input_ids"];
    assert_eq!(ids, &alone[0]["input_ids"]);
}

#[test]
fn wrong_images_and_models_are_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let (model, text_model) = (tiny_model(dir.path(), "llama4"), tiny_model(dir.path(), "llama4_text"));
    let refused = |config: &str, part: &str| {
        let output = freewheel(&["run", config]);
        assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
        assert!(stderr(&output).contains(part), "{part:?} missing in {}", stderr(&output));
    };
    let good = prompt_file(dir.path(), 4);
    refused(&run_config(dir.path(), &text_model, &good), "the model reads text only");
    let text = std::fs::read_to_string(&good).unwrap();
    let bad = write(dir.path(), "bad.jsonl", text.replace("1.png", "nowhere.png"));
    refused(
        &run_config(dir.path(), &model, &bad),
        "bad.jsonl:2: `messages[0]`: image nowhere.png: cannot be read",
    );
    write(dir.path(), "1.png", "GIF89a");
    refused(&run_config(dir.path(), &model, &good), "not a PNG file; convert the image to PNG");
}
