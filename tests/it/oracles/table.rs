//! All models once, and `docs/architectures.md`: its rows name every architecture, its figures are measured here.

use std::path::PathBuf;

use freewheel_model::{ARCHITECTURES, CLASSIFIERS, ENCODERS};
use serde_json::json;

use super::golden::{Measured, Oracle, oracles};
use super::{scorers, writers};

/// The table lies between these lines.
const BEGIN: &str = "<!-- measured: begin -->";
const END: &str = "<!-- measured: end -->";

fn docs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/architectures.md")
}

/// Models that are among the fixtures alone.
const OWN: [(&str, &str); 2] =
    [("mistral", "MistralForCausalLM"), ("bert_classifier", "BertForSequenceClassification")];

/// The models of the index, and those that are among the fixtures alone.
fn all() -> Vec<Oracle> {
    let mut all = oracles();
    for (name, architecture) in OWN {
        if all.iter().all(|oracle| oracle.name() != name) {
            let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/models").join(name);
            let entry = json!({"name": name, "architecture": architecture, "dtype": "float32"});
            all.push(Oracle::read(dir, entry));
        }
    }
    all
}

/// Writes the table with `FREEWHEEL_TABLE=1`.
#[test]
fn every_model_is_within_tolerance() {
    let mut table = String::from(
        "| golden model | architecture | logits or scores | log-probs | gradients |\n|---|---|---|---|---|\n",
    );
    for oracle in all() {
        let measured = if oracle.scores() { scorers::measure(&oracle) } else { writers::measure(&oracle) };
        let row = row(&oracle, measured);
        print!("{row}");
        table += &row;
    }
    if std::env::var_os("FREEWHEEL_TABLE").is_some() {
        let text = std::fs::read_to_string(docs()).expect("docs/architectures.md");
        std::fs::write(docs(), with_table(&text, &table)).expect("docs/architectures.md can be written");
    }
}

fn row(oracle: &Oracle, measured: Measured) -> String {
    let logprobs = measured.logprobs.map_or("–".into(), |error| format!("{error:.1e}"));
    format!(
        "| `{}` | `{}` | {:.1e} | {logprobs} | {:.1e} |\n",
        oracle.name(),
        oracle.architecture(),
        measured.logits,
        measured.gradients
    )
}

fn with_table(text: &str, table: &str) -> String {
    let (before, rest) = text.split_once(BEGIN).expect("the docs mark where the table begins");
    let (_, after) = rest.split_once(END).expect("the docs mark where the table ends");
    format!("{before}{BEGIN}\n{table}{END}{after}")
}

#[test]
fn the_docs_list_every_architecture() {
    let text = std::fs::read_to_string(docs()).expect("docs/architectures.md");
    let rows = ARCHITECTURES.iter().chain(CLASSIFIERS).map(|row| row.name).chain(ENCODERS);
    let missing: Vec<&str> = rows.filter(|name| !text.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/architectures.md says nothing of {missing:?}");
    let missing: Vec<&str> = ARCHITECTURES
        .iter()
        .map(|row| row.model_type)
        .filter(|kind| !text.contains(&format!("| `{kind}` |")))
        .collect();
    assert!(missing.is_empty(), "docs/architectures.md has no row for the model types {missing:?}");
    assert!(with_table(&text, "").contains("## "), "the table has its place");
}
