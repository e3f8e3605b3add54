//! Runs whose rollouts come from quantised weights.

mod support;

use std::path::Path;

use serde_json::Value;
use support::{freewheel, run_config, stderr, tiny_model};

fn lines(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Weights of the run's last checkpoint.
fn weights(folder: &Path) -> Vec<u8> {
    let checkpoints = folder.join("checkpoints");
    let latest = std::fs::read_to_string(checkpoints.join("LATEST")).unwrap();
    std::fs::read(checkpoints.join(latest.trim()).join("model.safetensors")).unwrap()
}

#[test]
fn sampler_and_learner_agree_to_the_bit_on_quantised_weights() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let digit = "[[reward.component]]\nname = \"digit\"\nkind = \"verifier\"\nverifier = \"regex\"\npattern = \"[0-9]\"\n";
    let config = run_config(dir.path(), &model, digit);
    let mut ends = Vec::new();
    for quantise in ["none", "int8", "int4"] {
        let sets = [format!("run.name={quantise}"), format!("model.quantise={quantise}")];
        let [name, set] = &sets;
        let fixed = "prompts.curriculum.selection=uniform";
        let args = ["run", &config, "--set", name, "--set", set, "--set", "learner.steps=8"];
        let on_policy = ["--set", "learner.max_staleness=0", "--set", fixed, "--set", "eval.every=0"];
        let output = freewheel(&[&args[..], &on_policy].concat());
        assert!(output.status.success(), "{quantise}: {}", stderr(&output));
        let folder = dir.path().join("runs").join(quantise);
        let lines = lines(&folder);
        assert_eq!(lines.len(), 8, "{quantise}");
        for line in &lines {
            assert_eq!(line["mismatch/same_version_abs_max"].as_f64(), Some(0.0), "{quantise}: {line}");
        }
        ends.push(weights(&folder));
    }
    assert!(
        ends[0] != ends[1] && ends[1] != ends[2] && ends[0] != ends[2],
        "quantising changes what is sampled"
    );

    let bad =
        freewheel(&["run", &config, "--set", "model.quantise=int8", "--set", "model.quantise_group=48"]);
    assert_eq!(bad.status.code(), Some(78));
    assert!(
        stderr(&bad).contains("model.quantise_group: is 48, must be a multiple of 32"),
        "{}",
        stderr(&bad)
    );
}
