//! A run of separate processes over a private Redis server, two of which are killed.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::{command, run_config, tiny_model};

const STEPS: u64 = 24;

fn lines(folder: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Processes that were started as `role`, in order.
fn started(folder: &Path, role: &str) -> Vec<i32> {
    let log = std::fs::read_to_string(folder.join("freewheel.log")).unwrap_or_default();
    let pid = |line: &str| {
        let (_, rest) = line.split_once(&format!("started role=\"{role}\" pid="))?;
        rest.trim().parse().ok()
    };
    log.lines().filter_map(pid).collect()
}

#[test]
fn an_actor_and_the_learner_are_killed_and_the_run_ends_well() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let model = tiny_model(dir.path());
    let reward = "[[reward.component]]\nname = \"digit\"\nkind = \"verifier\"\nverifier = \"regex\"\npattern = \"[0-9]\"\n";
    let queue = "[queue]\nbackend = \"redis\"\nlease_s = 2.0\nlearner_lease_s = 2.0\n";
    let config = run_config(dir.path(), &model, &format!("{reward}{queue}"));
    let folder = dir.path().join("runs").join("killed");
    let sets = [
        "run.name=killed".to_owned(),
        "queue.url=managed".to_owned(),
        "actor.processes=2".to_owned(),
        "learner.max_staleness=2".to_owned(),
        "prompts.count=2000".to_owned(),
        "eval.every=0".to_owned(),
        format!("learner.steps={STEPS}"),
    ];
    let mut args = vec!["run", &config];
    args.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
    let errors = std::fs::File::create(dir.path().join("stderr")).expect("a file");
    let mut run =
        command(&args).stdout(std::process::Stdio::null()).stderr(errors).spawn().expect("it starts");
    let said = || std::fs::read_to_string(dir.path().join("stderr")).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(180);
    let mut victims = vec![("learner", 9), ("actor-0", 3)];
    let status = loop {
        if let Some(status) = run.try_wait().expect("a child") {
            break status;
        }
        assert!(Instant::now() < deadline, "the run does not end: {}", said());
        if let Some(&(role, steps)) = victims.last()
            && lines(&folder).len() >= steps
            && let Some(&pid) = started(&folder, role).last()
        {
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("the role runs");
            victims.pop();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success(), "{status}: {}", said());
    assert!(victims.is_empty(), "it ended before {victims:?} could be killed");
    for role in ["actor-0", "learner"] {
        assert_eq!(started(&folder, role).len(), 2, "{role} was started once and once again");
    }
    let lines = lines(&folder);
    assert_eq!(lines.len() as u64, STEPS, "one line a step, also for those made again");
    for line in &lines {
        assert_eq!(line["accounting/imbalance"], 0, "{line}");
        assert_eq!(line["mismatch/same_version_abs_max"].as_f64().unwrap_or(0.0), 0.0, "{line}");
    }
}
