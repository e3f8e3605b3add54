//! The numbers of the golden models from the command line: `logprobs` and `generate`, by the index of
//! `tests/fixtures/models/` or `$FREEWHEEL_ORACLES/models/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::SafeTensors;
use serde_json::{Value, json};

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Every model of the index that writes text: its folder and `golden.json`.
fn writers() -> Vec<(PathBuf, Value)> {
    let fixtures = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let models = std::env::var_os("FREEWHEEL_ORACLES").map_or_else(fixtures, PathBuf::from).join("models");
    let index = read(&models.join("index.json"));
    let rows = index.as_array().unwrap().iter();
    let writers =
        rows.filter(|row| !row["architecture"].as_str().unwrap().ends_with("ForSequenceClassification"));
    let dirs = writers.map(|row| models.join(row["name"].as_str().unwrap())).filter(|dir| dir.is_dir());
    let found: Vec<_> = dirs.map(|dir| (dir.clone(), read(&dir.join("golden.json")))).collect();
    assert!(found.len() >= 4, "only {} models in {}", found.len(), models.display());
    found
}

/// Runs a command over lines of JSON and reads the lines that come out.
fn run(args: &[&str], lines: &[Value]) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let input = dir.path().join("input.jsonl");
    std::fs::write(&input, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_freewheel"));
    let output = command.args(args).arg("--input").arg(input).output().expect("the binary runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let out = String::from_utf8(output.stdout).unwrap();
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn check(found: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        assert!((found - wanted).abs() <= 2e-4, "{what}: {found} at {i}, golden {wanted}");
    }
}

#[test]
fn logprobs_gives_the_golden_numbers() {
    for (dir, golden) in writers() {
        if read(&dir.join("config.json")).get("vision_config").is_some() {
            continue; // Its golden batch shows images by their pixels.
        }
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let f32s = |name: &str| -> Vec<f32> {
            tensors
                .tensor(name)
                .unwrap()
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect()
        };
        let ids: Vec<i64> = tensors
            .tensor("input_ids")
            .unwrap()
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect();
        let lengths: Vec<usize> =
            golden["lengths"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        let width = ids.len() / lengths.len();
        let lines: Vec<Value> = lengths
            .iter()
            .enumerate()
            .map(|(row, length)| json!({"id": row, "input_ids": ids[row * width..][..*length]}))
            .collect();
        let model = dir.to_str().unwrap();
        let rows = run(&["logprobs", "--model", model, "--dtype", "f32", "--logits"], &lines);
        let (logprobs, logits) = (f32s("logprobs"), f32s("logits"));
        let mut first = 0;
        for (row, (line, length)) in rows.iter().zip(&lengths).enumerate() {
            assert_eq!(line["id"], row);
            let wanted = &logprobs[row * (width - 1)..][..length - 1];
            check(&floats(&line["logprobs"]), wanted, &format!("{model}: log-probs of row {row}"));
            let found: Vec<f32> = line["logits"].as_array().unwrap().iter().flat_map(floats).collect();
            check(&found, &logits[first..first + found.len()], &format!("{model}: logits of row {row}"));
            first += found.len();
        }
        assert_eq!(first, logits.len(), "{model}");
    }
}

/// Golden greedy cases without images.
fn greedy(golden: &Value) -> Vec<&Value> {
    let shows = |case: &&Value| case["pixel_values_rows"].as_array().is_none_or(Vec::is_empty);
    golden["greedy"].as_array().unwrap().iter().filter(shows).collect()
}

#[test]
fn generate_gives_the_golden_continuations() {
    for (dir, golden) in writers() {
        let cases = greedy(&golden);
        assert!(!cases.is_empty(), "{}", dir.display());
        let lines: Vec<Value> = cases.iter().map(|case| json!({"input_ids": case["prompt_ids"]})).collect();
        let count = cases[0]["output_ids"].as_array().unwrap().len().to_string();
        let model = dir.to_str().unwrap();
        let found = run(
            &[
                "generate",
                "--model",
                model,
                "--dtype",
                "f32",
                "--greedy",
                "--ignore-eos",
                "--max-new-tokens",
                &count,
            ],
            &lines,
        );
        for (found, case) in found.iter().zip(&cases) {
            assert_eq!(found["output_ids"], case["output_ids"], "{model}");
            check(&floats(&found["logprobs"]), &floats(&case["logprobs"]), model);
        }
        assert_eq!(found.len(), cases.len(), "{model}");
    }
}

#[test]
fn every_end_of_sequence_id_of_the_generation_config_ends_a_completion() {
    let (dir, golden) = writers().remove(0);
    let case = greedy(&golden)[0];
    let output: Vec<u64> =
        case["output_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join("generation_config.json");
    let mut config = read(&path);
    for ends in [
        vec![output[7], output[3]],
        vec![output[3], output[7]],
        vec![output[7]],
        vec![output[5], output[9], output[2]],
    ] {
        config["eos_token_id"] = json!(ends);
        std::fs::write(&path, config.to_string()).unwrap();
        let at = output.iter().position(|id| ends.contains(id)).unwrap();
        let model = copy.path().to_str().unwrap();
        let args = ["generate", "--model", model, "--dtype", "f32", "--greedy", "--max-new-tokens", "24"];
        let found = run(&args, &[json!({"input_ids": case["prompt_ids"]})]);
        assert_eq!(found[0]["output_ids"], json!(output[..=at]), "ends at {ends:?}");
        assert_eq!(found[0]["finish_reason"], "stop");
    }
}
