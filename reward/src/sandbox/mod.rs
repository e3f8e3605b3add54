//! Runs code that nobody vouches for.
//!
//! ```text
//! Sandbox::run ─plan─► helper: new user, pid, net, ipc, uts, cgroup namespaces
//!    ▲ report            └► init (pid 1 in them): own mount namespace, empty root with read-only system folders and a small
//!    └──────────────────────  tmpfs, pivot_root, rlimits, a second user namespace without rights, Landlock, seccomp
//!                               └► the program, once per input; init reads its output, watches the clock, reports
//! ```
//!
//! The helper is this very binary, started as `freewheel sandbox-exec`. The program never holds the pipe the report goes through, so it
//! cannot forge one. When init ends, the kernel kills everything in its pid namespace. Every layer must hold: a kernel that
//! lacks one is refused at the start, unless the configuration says otherwise. A failure of the sandbox itself is an error, never an
//! outcome: what it means for a reward is *unscored*.

mod config;
mod confine;
mod corpus;
mod init;
mod outer;
mod root;
mod syscalls;

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use config::SandboxConfig;
pub use corpus::{Attempt, ESCAPES, Escape, attempt_escapes};

/// First argument that makes the binary the helper.
pub const HELPER_ARG: &str = "sandbox-exec";
/// Time beyond the program's own that the sandbox may take to start and end.
const GRACE: Duration = Duration::from_secs(5);
/// Longest report.
const REPORT_BYTES_MAX: u64 = 64 << 20;

/// What to run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Files in its working folder, by plain name.
    pub files: Vec<(String, String)>,
    /// What it reads on standard input; it is started once for each, and not any more after one that did not exit with 0.
    pub inputs: Vec<String>,
}

/// How one start of the program ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Exit code; 0 is success.
    Exit(i32),
    /// Its processor time was used up.
    Cpu,
    /// Its time was used up.
    Wall,
    /// It ran out of memory.
    Memory,
    /// It wrote more than it may.
    Output,
    /// It was killed by this signal.
    Signal(i32),
}

/// One start of the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// How it ended.
    pub outcome: Outcome,
    /// What it wrote, as text.
    pub stdout: String,
    /// What it complained.
    pub stderr: String,
    /// Milliseconds.
    pub wall_ms: u64,
}

/// What the helper is told, on its standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Plan {
    job: Job,
    config: SandboxConfig,
}

/// What it answers, on its standard output.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Report {
    Done(Vec<Finished>),
    Failed(String),
}

/// The sandbox did not work; says why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sandbox: {0}")]
pub struct SandboxError(pub String);

/// Runs jobs, each in a sandbox of its own. Shared between threads.
#[derive(Clone, Debug)]
pub struct Sandbox {
    config: SandboxConfig,
    helper: PathBuf,
}

impl Sandbox {
    /// A sandbox whose helper is this process's own binary.
    ///
    /// # Errors
    /// If the binary cannot be found.
    pub fn new(config: SandboxConfig) -> Result<Self, SandboxError> {
        let helper =
            std::env::current_exe().map_err(|e| SandboxError(format!("where is this binary? {e}")))?;
        Ok(Self::with_helper(config, helper))
    }

    /// A sandbox with this `freewheel` binary as its helper.
    pub fn with_helper(config: SandboxConfig, helper: PathBuf) -> Self {
        Self { config, helper }
    }

    /// The settings.
    pub fn config(&self) -> &SandboxConfig {
        &self.config
    }

    /// Whether this machine can enforce the sandbox: runs a program that does nothing.
    ///
    /// # Errors
    /// What is missing.
    pub fn probe(&self) -> Result<(), SandboxError> {
        let job = Job { command: vec!["/bin/true".into()], inputs: vec![String::new()], ..Job::default() };
        match self.run(&job)?.as_slice() {
            [Finished { outcome: Outcome::Exit(0), .. }] => Ok(()),
            other => Err(SandboxError(format!("/bin/true did not run in it: {other:?}"))),
        }
    }

    /// Runs the job; one result an input, fewer if it was not started any more.
    ///
    /// # Errors
    /// If the sandbox itself failed. Nothing is then known of the program.
    pub fn run(&self, job: &Job) -> Result<Vec<Finished>, SandboxError> {
        let failed = |what: &'static str| move |e: std::io::Error| SandboxError(format!("{what}: {e}"));
        let plan = Plan { job: job.clone(), config: self.config.clone() };
        let plan =
            serde_json::to_vec(&plan).map_err(|e| SandboxError(format!("cannot write the plan: {e}")))?;
        let mut helper = Command::new(&self.helper)
            .arg(HELPER_ARG)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed("cannot start the helper"))?;
        let mut stdin = helper.stdin.take().expect("piped");
        let mut stdout = helper.stdout.take().expect("piped");
        // A helper that died early closes the pipe; its report says more than the error here.
        let _ = stdin.write_all(&plan);
        drop(stdin);
        let runs = u32::try_from(job.inputs.len()).unwrap_or(u32::MAX);
        let limit = self.config.wall().saturating_mul(runs) + GRACE;
        let (sender, report) = std::sync::mpsc::sync_channel(1);
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = (&mut stdout).take(REPORT_BYTES_MAX).read_to_end(&mut bytes);
            let _ = sender.send(read.map(|_| bytes));
        });
        let bytes = report.recv_timeout(limit);
        end(&mut helper);
        let _ = reader.join();
        let bytes = bytes
            .map_err(|_| SandboxError(format!("no report within {} s", limit.as_secs())))?
            .map_err(failed("cannot read the report"))?;
        match serde_json::from_slice(&bytes) {
            Ok(Report::Done(finished)) => Ok(finished),
            Ok(Report::Failed(why)) => Err(SandboxError(why)),
            Err(_) => Err(SandboxError("the helper gave no report; is it a freewheel binary?".into())),
        }
    }
}

/// Waits a moment for a helper that has reported, then kills it; its namespaces end with it.
fn end(helper: &mut Child) {
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        match helper.try_wait() {
            Ok(Some(_)) | Err(_) => return,
            Ok(None) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    let _ = helper.kill();
    let _ = helper.wait();
}

/// The helper's `main`: call it first of all, on a process without threads. `None` if this process is not the helper.
pub fn helper_main() -> Option<std::process::ExitCode> {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_none_or(|arg| arg != HELPER_ARG) {
        return None;
    }
    let inner = args.next().is_some_and(|arg| arg == outer::INIT_ARG);
    let result = if inner { init::main() } else { outer::main() };
    if let Err(why) = result {
        report(&Report::Failed(why));
    }
    Some(std::process::ExitCode::SUCCESS)
}

fn report(report: &Report) {
    let mut out = std::io::stdout();
    let bytes = serde_json::to_vec(report).unwrap_or_default();
    let _ = out.write_all(&bytes).and_then(|()| out.flush());
}
