//! The command line as a person meets it: help, exit codes, messages.

use std::path::Path;
use std::process::{Command, Output};

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

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_config_shows_all_its_problems_at_once_and_exits_78() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(
        dir.path(),
        "bad.toml",
        "[model]\npath = \"m\"\n[prompts]\ngenerator = \"arithmetik\"\ngroup_sice = 4\nnum_generations = 8\n\
         [learner]\nsteps = -1\nlearning_rate = \"fast\"\n[queue]\nbackend = \"redis\"\nurl = \"localhost\"\n",
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
        "bad.toml:12:1: queue.url: is \"localhost\", which is no address of a Redis server",
    ] {
        assert!(text.contains(part), "{part:?} missing in\n{text}");
    }
}
