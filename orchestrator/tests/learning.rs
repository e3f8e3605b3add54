//! Ways of learning that reach beyond the learner: what an actor draws for them, what a checkpoint holds of them.

mod support;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::{freewheel, run_config, stderr, tiny_model};

const DIGIT: &str = "[[reward.component]]\nname = \"digit\"\nkind = \"verifier\"\nverifier = \"regex\"\npattern = \"[0-9]\"\n";

fn run(config: &str, sets: &[&str]) {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> = ["run", config].into_iter().chain(sets).collect();
    let output = freewheel(&args);
    assert!(output.status.success(), "{}", stderr(&output));
}

fn lines(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn newest_checkpoint(folder: &Path) -> PathBuf {
    let checkpoints = folder.join("checkpoints");
    checkpoints.join(std::fs::read_to_string(checkpoints.join("LATEST")).unwrap().trim())
}

#[test]
fn remax_compares_with_a_greedy_rollout_that_is_accounted_for_and_not_trained_on() {
    let dir = tempfile::tempdir().unwrap();
    let config = run_config(dir.path(), &tiny_model(dir.path()), DIGIT);
    run(
        &config,
        &[
            "learner.objective=reinforce",
            "learner.advantage=remax",
            "learner.steps=6",
            "run.name=remax",
            "prompts.curriculum.selection=uniform",
        ],
    );
    let folder = dir.path().join("runs/remax");
    let lines = lines(&folder);
    assert_eq!(lines.len(), 6);
    for line in &lines {
        assert_eq!(line["accounting/imbalance"], 0, "{line}");
        assert_eq!(line["mismatch/same_version_abs_max"].as_f64(), Some(0.0), "{line}");
        // Two groups of four an update, and a fifth rollout for each group that was trained on.
        let count = |key: &str| line[key].as_u64().unwrap_or_else(|| panic!("no {key} in {line}"));
        assert_eq!(count("accounting/trained"), 8 * count("step"));
        assert!(count("accounting/dropped_baseline") >= 2 * count("step"), "{line}");
    }
    let folder = folder.to_str().unwrap();
    for command in [&["replay", folder][..], &["audit", "verify", folder]] {
        let output = freewheel(command);
        assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    }
    let greedy =
        freewheel(&["run", &config, "--set", "learner.advantage=remax", "--set", "actor.temperature=0"]);
    assert_eq!(greedy.status.code(), Some(78));
    assert!(stderr(&greedy).contains("actor.temperature"), "{}", stderr(&greedy));
}

#[test]
fn a_checkpoint_holds_the_adapter_and_the_base_with_it_is_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let config = run_config(dir.path(), &model, DIGIT);
    let targets = "learner.lora_targets=[\"attention\",\"expert\",\"router\"]";
    run(&config, &["learner.lora_rank=2", targets, "learner.learning_rate=0.05", "run.name=adapters"]);
    let checkpoint = newest_checkpoint(&dir.path().join("runs/adapters"));
    let adapter = checkpoint.join("adapter");
    let text = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let written: Value = serde_json::from_str(&text).unwrap();
    let parameters: Vec<&str> =
        written["target_parameters"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(parameters.iter().any(|name| name.ends_with("feed_forward.experts.down_proj")), "{parameters:?}");
    assert_eq!(written["base_model_name_or_path"].as_str(), Some(model.as_str()));
    let merged = dir.path().join("merged");
    let (from, out) = (adapter.to_str().unwrap(), merged.to_str().unwrap());
    let output = freewheel(&["convert", "--model", &model, "--adapter", from, "--out", out]);
    assert!(output.status.success(), "{}", stderr(&output));
    let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    assert!(weights(&merged) == weights(&checkpoint), "the base with the adapter is the checkpoint");
    assert!(weights(&merged) != weights(Path::new(&model)), "something was learnt");
}
