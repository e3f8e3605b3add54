//! The binary, a model and a config for tests that start it.

use std::path::Path;
use std::process::{Command, Output};

/// The binary with these arguments and nothing set around it.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freewheel"));
    for variable in ["FREEWHEEL_QUEUE_URL", "FREEWHEEL_RUN_DIR", "FREEWHEEL_LOG"] {
        command.env_remove(variable);
    }
    command.args(args);
    command
}

/// Runs it to its end.
pub fn freewheel(args: &[&str]) -> Output {
    command(args).output().expect("the binary runs")
}

/// What it said.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes a file and gives its path.
pub fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A tiny model made on the spot.
pub fn tiny_model(dir: &Path) -> String {
    tiny_model_with(dir, "model", &[])
}

/// The same by another name, and made as `more` says.
pub fn tiny_model_with(dir: &Path, name: &str, more: &[&str]) -> String {
    let out = dir.join(name);
    let out = out.to_str().unwrap();
    let args = [
        "init-model",
        "llama4_text",
        "--out",
        out,
        "--set",
        "hidden_size=32",
        "--set",
        "num_hidden_layers=2",
        "--set",
        "num_attention_heads=2",
        "--set",
        "num_key_value_heads=1",
        "--set",
        "head_dim=16",
        "--set",
        "intermediate_size=16",
        "--set",
        "intermediate_size_mlp=32",
        "--set",
        "num_local_experts=4",
        "--set",
        "max_position_embeddings=64",
    ];
    let made = freewheel(&[&args[..], more].concat());
    assert!(made.status.success(), "{}", stderr(&made));
    out.to_owned()
}

pub fn run_config(dir: &Path, model: &str, more: &str) -> String {
    let runs = dir.join("runs");
    write(
        dir,
        "run.toml",
        &format!(
            "[run]\ndir = {runs:?}\n[model]\npath = {model:?}\n[prompts]\ngenerator = \"arithmetic\"\nlevels = [1]\n\
             count = 50\ngroup_size = 4\n[actor]\nmax_new_tokens = 12\n[learner]\nsteps = 3\ngroups_per_step = 2\n\
             learning_rate = 1e-3\ncheckpoint_every = 2\n[eval]\nevery = 2\ncount = 8\n{more}"
        ),
    )
}
