//! The command line as a person meets it: help, exit codes, messages.

mod support;

use std::path::Path;

use support::{freewheel, run_config, stderr, tiny_model, write};

#[test]
fn a_config_shows_all_its_problems_at_once_and_exits_78() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(
        dir.path(),
        "bad.toml",
        "[model]\npath = \"m\"\n[prompts]\ngenerator = \"arithmetik\"\ngroup_sice = 4\nnum_generations = 8\n\
         [learner]\nsteps = -1\nlearning_rate = \"fast\"\n[queue]\nbackend = \"redis\"\nurl = \"localhost\"\n\
         [reward]\nmin_valid = 2\n",
    );
    let output = freewheel(&["config", "check", &path]);
    assert_eq!(output.status.code(), Some(78));
    let text = stderr(&output);
    for part in [
        "bad.toml:4:1: prompts.generator: is \"arithmetik\", expected one of \"arithmetic\"",
        "bad.toml:5:1: prompts.group_sice: there is no such key\n  hint: did you mean `prompts.group_size`?",
        "bad.toml:6:1: prompts.num_generations: there is no such key\n  hint: `num_generations` is called `prompts.group_size` here",
        "bad.toml:8:1: learner.steps: is -1, must be at least 1",
        "bad.toml:9:1: learner.learning_rate: is the string \"fast\", expected a number",
        "bad.toml:14:1: reward.min_valid: there is no such key\n  hint: `min_valid` belongs to another section: `learner.min_valid`",
        "bad.toml:12:1: queue.url: is \"localhost\", which is no address of a Redis server",
    ] {
        assert!(text.contains(part), "{part:?} missing in\n{text}");
    }
}

/// Exit code 78 before any work, and a message that holds every part.
fn refused(args: &[&str], parts: &[&str]) {
    let output = freewheel(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(78), "{args:?}: {text}");
    for part in parts {
        assert!(text.contains(part), "{args:?}: {part:?} missing in\n{text}");
    }
}

#[test]
fn wrong_inputs_are_refused_with_their_place_and_a_cure() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let run = |config: &str, more: &[&str], parts: &[&str]| {
        let mut args = vec!["run", config];
        args.extend(more);
        refused(&args, parts);
    };
    let good = run_config(dir.path(), &model, "");
    let missing = dir.path().join("nothing");
    let set = format!("model.path={:?}", missing.to_str().unwrap());
    run(&good, &["--set", &set], &["nothing", "no such model", "hint: "]);
    run(
        &good,
        &["--set", "actor.max_new_tokens=900"],
        &["actor.max_new_tokens is 900", "context is 64", "hint: at most"],
    );
    let prompts =
        write(dir.path(), "bad.jsonl", "{\"prompt\": \"1+1=?\", \"answer\": 2}\n{\"prompt\": 7}\nnot json\n");
    let set = format!("prompts.file={prompts:?}");
    let config = write(
        dir.path(),
        "file.toml",
        &format!(
            "[model]\npath = {model:?}\n[prompts]\ngroup_size = 4\n[run]\ndir = {:?}\n",
            dir.path().join("runs")
        ),
    );
    run(&config, &["--set", &set], &["bad.jsonl:2: ", "bad.jsonl:3: "]);
    run(
        &good,
        &["--set", "queue.backend=redis", "--set", "queue.url=\"redis://127.0.0.1:1/0\""],
        &["127.0.0.1:1", "not reachable", "hint: "],
    );
    assert!(!dir.path().join("runs/run/metrics.jsonl").exists(), "work had begun");
}

#[test]
fn damaged_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let config = run_config(dir.path(), &model, "");
    let weights = Path::new(&model).join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    refused(&["run", &config], &["model.safetensors"]);
    std::fs::write(&weights, &bytes).unwrap();
    let config_path = Path::new(&model).join("config.json");
    let text = std::fs::read_to_string(&config_path).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vocab = json["vocab_size"].as_u64().unwrap();
    let other = text.replace(&format!("\"vocab_size\": {vocab}"), "\"vocab_size\": 100");
    assert_ne!(text, other);
    std::fs::write(&config_path, other).unwrap();
    let output = freewheel(&["run", &config]);
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
}

#[test]
fn a_run_trains_reports_and_refuses_to_be_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let config = run_config(
        dir.path(),
        &model,
        "[[reward.component]]\nname = \"digit\"\nkind = \"verifier\"\nverifier = \"regex\"\npattern = \"[0-9]\"\n",
    );
    // A model of random weights is never right; a digit somewhere is within its reach.
    let output = freewheel(&[
        "run",
        &config,
        "--set",
        "learner.steps=2",
        "--set",
        "prompts.curriculum.selection=uniform",
    ]);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
    assert!(output.status.success(), "{text}");
    let run = dir.path().join("runs/run");
    let lines: Vec<serde_json::Value> = std::fs::read_to_string(run.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for line in &lines {
        assert_eq!(line["accounting/imbalance"], 0, "{line}");
        assert_eq!(line["mismatch/same_version_abs_max"], 0.0, "{line}");
        assert!(line["staleness/max"].as_u64().unwrap() <= 4, "{line}");
    }
    for file in ["config.toml", "eval.jsonl", "report.html", "freewheel.log", "run.json"] {
        assert!(run.join(file).exists(), "{file} is missing\n{text}");
    }
    assert!(std::fs::read_dir(run.join("rollouts")).unwrap().count() >= 1);
    refused(&["run", &config], &["already holds a run", "--resume"]);
    replays_or_says_where_not(&run);
    let status = freewheel(&["status", run.to_str().unwrap(), "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((&status["state"], &status["metrics"]["step"]), (&"finished".into(), &2.into()));
}

/// The updates of a run of two steps come out the same again, and another learning rate shows at the first.
fn replays_or_says_where_not(run: &Path) {
    let folder = run.to_str().unwrap();
    let replay = |more: &[&str]| {
        let output = freewheel(&[&["replay", folder, "--json"], more].concat());
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (output.status.code(), value, stderr(&output))
    };
    let (code, value, text) = replay(&[]);
    assert_eq!(
        (code, &value["same"], &value["from_step"], &value["step"]),
        (Some(0), &true.into(), &0.into(), &2.into()),
        "{text}"
    );
    let (code, first, text) = replay(&["--step", "1", "--threads", "1"]);
    assert_eq!((code, &first["steps"], &first["step"]), (Some(0), &1.into(), &1.into()), "{text}");
    assert_ne!(first["weights"], value["weights"]);
    refused(&["replay", folder, "--step", "9"], &["has no step 9, its journal ends at 2"]);
    let config = run.join("config.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let other = text.replacen("learning_rate = 0.001", "learning_rate = 0.002", 1);
    assert_ne!(text, other, "{text}");
    std::fs::write(&config, other).unwrap();
    let (code, value, message) = replay(&[]);
    assert_eq!((code, &value["same"], &value["step"]), (Some(1), &false.into(), &1.into()), "{message}");
    assert!(message.contains("step 1: replay gives weights"), "{message}");
    std::fs::write(&config, text).unwrap();
}

#[test]
fn generation_is_the_same_whatever_else_is_in_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let rows = |args: &[&str]| -> Vec<serde_json::Value> {
        let mut all = vec!["generate", "--model", &model, "--max-new-tokens", "8", "--seed", "3"];
        all.extend(args);
        let output = freewheel(&all);
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let alone = rows(&["--prompt", "17+25=?"]);
    let many = rows(&["--prompt", "17+25=?", "--prompt", "a much longer prompt 1+1", "--samples", "3"]);
    assert_eq!((alone.len(), many.len()), (1, 6));
    assert_eq!(
        (&alone[0]["output_ids"], &alone[0]["logprobs"]),
        (&many[0]["output_ids"], &many[0]["logprobs"])
    );
    assert_ne!(many[0]["output_ids"], many[1]["output_ids"], "two samples of one prompt");
}

#[test]
fn bench_prefill_says_what_a_token_costs_by_length() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let output =
        freewheel(&["bench", "prefill", "--model", &model, "--length", "48", "--rows", "16", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let row = &result["rows"][0];
    assert_eq!((result["what"].as_str(), row["length"].as_u64()), (Some("prefill"), Some(48)));
    let (cost, speed) = (row["us_per_token"].as_f64().unwrap(), row["tokens_per_s"].as_f64().unwrap());
    assert!((cost * speed / 1e6 - 1.0).abs() <= 1e-9 && cost > 0.0, "{row}");
    refused(&["bench", "prefill", "--model", &model, "--length", "65"], &["--length [65]", "1 to 64 tokens"]);
}

#[test]
fn benches_give_what_they_count_by() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let row = |what: &[&str]| {
        let args = [&["bench"], what, &["--model", &model, "--threads", "1", "--json"]].concat();
        let output = freewheel(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(result["machine"]["peak_flops_per_s"].as_f64() > Some(0.0), "{result}");
        (result["rows"][0].clone(), result["machine"].clone())
    };
    let number =
        |row: &serde_json::Value, key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));

    let svg = dir.path().join("roofline.svg");
    let plot = ["decode", "--batch=2", "--length=8", "--rounds=1", "--svg", svg.to_str().unwrap()];
    let (decode, machine) = row(&plot);
    let step_s = number(&decode, "batch") / number(&decode, "tokens_per_s");
    let read_s = number(&decode, "bytes_per_step") / number(&machine, "read_bytes_per_s");
    let product_s = number(&decode, "flops_per_step") / number(&machine, "gemm_flops_per_s");
    let over = step_s / read_s.max(product_s);
    assert!((over / number(&decode, "over_roofline") - 1.0).abs() <= 1e-9, "{decode}");
    assert!(std::fs::read_to_string(&svg).unwrap().contains("B = 2"), "the plot has the row");

    let (train, _) = row(&["train", "--batch=2", "--length=16", "--rounds=1"]);
    let parts = ["forward_s", "backward_s", "optimizer_s", "pack_s"].map(|key| number(&train, key));
    let whole = number(&train, "step_s");
    assert!(parts.iter().all(|part| *part > 0.0 && *part < 4.0 * whole), "{train}");
    assert!(number(&train, "memory_peak_bytes") > 1e6, "{train}");

    let (gemm, _) = row(&["gemm", "--rows=3"]);
    let flops = 2.0 * number(&gemm, "m") * number(&gemm, "n") * number(&gemm, "k");
    let seconds = number(&gemm, "us") / 1e6;
    assert!((flops / seconds / number(&gemm, "flops_per_s") - 1.0).abs() <= 1e-9, "{gemm}");

    refused(&["bench", "gemm", "--model", &model, "--rows", "0"], &["--rows [0]", "1 to 65536"]);
    refused(&["bench", "train", "--model", &model, "--length", "65"], &["--length 65", "2 to 64"]);
    refused(&["bench", "decode", "--model", &model, "--batch", "0"], &["--batch [0]", "1 to 4096"]);
}
