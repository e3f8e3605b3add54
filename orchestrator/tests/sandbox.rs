//! The code sandbox with the real binary as its helper: what runs, how it ends, and that nothing gets out.

use std::path::PathBuf;

use freewheel_reward::sandbox::{ESCAPES, Finished, Job, Outcome, Sandbox, SandboxConfig, attempt_escapes};

fn sandbox() -> Sandbox {
    Sandbox::with_helper(SandboxConfig::default(), PathBuf::from(env!("CARGO_BIN_EXE_freewheel")))
}

fn job(program: &str, inputs: &[&str]) -> Job {
    let mut command = SandboxConfig::default().command;
    command.push("main.py".into());
    Job {
        command,
        files: vec![("main.py".into(), program.into())],
        inputs: inputs.iter().map(|input| (*input).to_owned()).collect(),
    }
}

fn one(program: &str, input: &str) -> Finished {
    sandbox().run(&job(program, &[input])).expect("the sandbox works").remove(0)
}

#[test]
fn nothing_gets_out() {
    let attempts = attempt_escapes(&sandbox()).expect("the sandbox works on this machine");
    assert!(ESCAPES.len() >= 40 && attempts.len() >= ESCAPES.len(), "{} programs", attempts.len());
    let out: Vec<_> = attempts.iter().filter(|attempt| attempt.escaped).collect();
    assert!(out.is_empty(), "{out:#?}");
    // A program that never came to try proves nothing: it must have run, been held, or been stopped by a limit.
    for attempt in &attempts {
        let broken = ["SyntaxError", "NameError", "ImportError", "IndentationError"];
        let text = format!("{}{}", attempt.finished.stdout, attempt.finished.stderr);
        assert!(!broken.iter().any(|word| text.contains(word)), "{}: {text}", attempt.name);
    }
}

#[test]
fn programs_run_and_see_only_their_own_input() {
    let program = "import sys, math, json, os\nprint(sum(map(int, sys.stdin.read().split())), os.getuid(), len(os.environ) < 20)";
    let runs = sandbox().run(&job(program, &["1 2", "3 4", "x", "5"])).unwrap();
    assert_eq!(runs.len(), 3, "it is not started again after it failed");
    assert_eq!(runs[0].stdout, "3 1000 True\n");
    assert_eq!(runs[1].stdout, "7 1000 True\n");
    assert_eq!(runs[2].outcome, Outcome::Exit(1));
    assert!(runs[2].stderr.contains("ValueError"), "{}", runs[2].stderr);
}

#[test]
fn what_a_program_leaves_behind_or_uses_up_does_not_reach_the_next_run() {
    // Ends well, with as many children as it may have, a full disk and its input unread.
    let program = "import os, sys, time
if os.path.exists('/box/second'):
    print(sys.stdin.read())
    sys.exit(0)
open('/box/second', 'w')
for folder in ['/box', '/tmp']:
    try:
        with open(folder + '/full', 'wb') as f:
            while True: f.write(b'x' * 65536)
    except OSError: pass
try:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
except OSError: pass
os._exit(0)";
    let runs = sandbox().run(&job(program, &["one", "two"])).expect("the sandbox goes on");
    assert_eq!((runs.len(), runs[1].stdout.as_str()), (2, "two\n"), "{runs:?}");
}

#[test]
fn every_way_to_end_has_its_name() {
    let cases = [
        ("import sys; sys.exit(7)", Outcome::Exit(7)),
        ("import os; os.kill(os.getpid(), 6)", Outcome::Signal(6)),
        ("b = bytearray(1 << 30)", Outcome::Memory),
        ("while True: print('y' * 1000)", Outcome::Output),
    ];
    for (program, expected) in cases {
        let finished = one(program, "");
        assert_eq!(finished.outcome, expected, "{program}: {finished:?}");
    }
    let quick = SandboxConfig { cpu_s: 1, wall_s: 2, ..SandboxConfig::default() };
    let quick = Sandbox::with_helper(quick, PathBuf::from(env!("CARGO_BIN_EXE_freewheel")));
    let asleep = quick.run(&job("import time; time.sleep(60)", &[""])).unwrap().remove(0);
    assert_eq!(asleep.outcome, Outcome::Wall, "{asleep:?}");
    assert!((2000..3000).contains(&asleep.wall_ms), "{asleep:?}");
    let long = SandboxConfig { cpu_s: 1, wall_s: 30, ..SandboxConfig::default() };
    let long = Sandbox::with_helper(long, PathBuf::from(env!("CARGO_BIN_EXE_freewheel")));
    let busy = long.run(&job("while True: pass", &[""])).unwrap().remove(0);
    assert_eq!(busy.outcome, Outcome::Cpu, "{busy:?}");
}

#[test]
fn other_programs_than_python_run_too() {
    let command = vec!["/bin/sh".into(), "-c".into(), "read x; echo got $x; cat main.txt".into()];
    let files = vec![("main.txt".to_owned(), "text".to_owned())];
    let runs = sandbox().run(&Job { command, files, inputs: vec!["this\n".into()] }).unwrap();
    assert_eq!((runs[0].stdout.as_str(), &runs[0].outcome), ("got this\ntext", &Outcome::Exit(0)));
}

#[test]
fn a_sandbox_that_cannot_work_says_so_and_gives_no_outcome() {
    let error = Sandbox::with_helper(SandboxConfig::default(), "/bin/true".into()).probe().unwrap_err();
    assert!(error.to_string().contains("no report"), "{error}");
    let missing = Job {
        command: vec!["/usr/bin/no-such-program".into()],
        inputs: vec![String::new()],
        ..Job::default()
    };
    let error = sandbox().run(&missing).unwrap_err().to_string();
    assert!(error.contains("no-such-program"), "{error}");
    let outside = Job { files: vec![("../x".into(), String::new())], ..job("", &[""]) };
    assert!(sandbox().run(&outside).unwrap_err().to_string().contains("no plain file name"));
}
