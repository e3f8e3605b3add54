//! A run in one process that is interrupted and goes on.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::{command, freewheel, run_config, stderr, tiny_model};

const STEPS: u64 = 60;

/// On-policy, with the order of prompts fixed and every batch full, weights are a function of the config alone. (A batch that
/// closes early leaves groups under way, which the old or the new weights may draw.)
fn flags(name: &str) -> Vec<String> {
    let sets = [
        format!("run.name={name}"),
        format!("learner.steps={STEPS}"),
        "learner.max_staleness=0".into(),
        "learner.refill_max=0".into(),
        // Slow enough that groups go on to differ.
        "learner.learning_rate=1e-4".into(),
        "learner.checkpoint_every=7".into(),
        "prompts.curriculum.selection=uniform".into(),
        "prompts.count=2000".into(),
        "eval.every=0".into(),
    ];
    sets.into_iter().flat_map(|set| ["--set".to_owned(), set]).collect()
}

fn run(config: &str, name: &str, more: &[&str]) -> std::process::Output {
    let flags = flags(name);
    let mut args = vec!["run", config];
    args.extend(flags.iter().map(String::as_str));
    args.extend(more);
    freewheel(&args)
}

/// Starts a run, waits until `steps` are made, and sends `signal`.
fn interrupt(
    config: &str,
    folder: &Path,
    name: &str,
    more: &[&str],
    steps: usize,
    signal: Signal,
) -> Option<i32> {
    let flags = flags(name);
    let mut args = vec!["run", config];
    args.extend(flags.iter().map(String::as_str));
    args.extend(more);
    let mut child = command(&args)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("the binary runs");
    let deadline = Instant::now() + Duration::from_secs(120);
    while lines(folder).len() < steps {
        assert!(Instant::now() < deadline, "{steps} steps were never made");
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
    child.wait().unwrap().code()
}

fn lines(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn weights(folder: &Path) -> Vec<u8> {
    let checkpoints = folder.join("checkpoints");
    let latest = std::fs::read_to_string(checkpoints.join("LATEST")).unwrap();
    assert!(latest.starts_with(&format!("step-{STEPS}-")), "{latest}");
    std::fs::read(checkpoints.join(latest.trim()).join("model.safetensors")).unwrap()
}

fn check_lines(name: &str, lines: &[Value]) {
    for line in lines {
        assert_eq!(line["accounting/imbalance"], 0, "{name}: {line}");
        assert_eq!(line["queue/duplicates"], 0, "{name}: a delivered sample was redone: {line}");
    }
    assert_eq!(lines.last().unwrap()["step"], STEPS);
}

#[test]
fn interrupted_runs_redo_nothing_and_end_with_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model(dir.path());
    let config = run_config(
        dir.path(),
        &model,
        "[[reward.component]]\nname = \"digit\"\nkind = \"verifier\"\nverifier = \"regex\"\npattern = \"[0-9]\"\n",
    );
    let whole = run(&config, "whole", &[]);
    assert!(whole.status.success(), "{}", stderr(&whole));
    let folder = |name: &str| dir.path().join("runs").join(name);

    assert_eq!(interrupt(&config, &folder("drained"), "drained", &[], 10, Signal::SIGINT), Some(130));
    assert_eq!(interrupt(&config, &folder("killed"), "killed", &[], 10, Signal::SIGKILL), None);
    let before = lines(&folder("killed")).len();
    assert_eq!(
        interrupt(&config, &folder("killed"), "killed", &["--resume"], before + 12, Signal::SIGKILL),
        None
    );

    // Groups held by the learner and groups under way when it is killed.
    let stale = ["--set", "learner.max_staleness=3"];
    assert_eq!(interrupt(&config, &folder("stale"), "stale", &stale, 10, Signal::SIGKILL), None);
    let resumed = run(&config, "stale", &[&stale[..], &["--resume"]].concat());
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    check_lines("stale", &lines(&folder("stale")));

    for name in ["drained", "killed"] {
        let resumed = run(&config, name, &["--resume"]);
        assert!(resumed.status.success(), "{name}: {}", stderr(&resumed));
        check_lines(name, &lines(&folder(name)));
        assert!(weights(&folder(name)) == weights(&folder("whole")), "{name}: other weights");
    }
}
