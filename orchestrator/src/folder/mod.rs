//! A run's folder: what is written where.
//!
//! ```text
//! config.toml      resolved, no passwords     metrics.jsonl  a line a learner step    eval.jsonl   a line an evaluation
//! run.json         who runs it, how to reach  rollouts/      samples, rotated         freewheel.log
//! audit.jsonl      chained reward records
//! journal/ checkpoints/  the learner's        events.out.tfevents.*  TensorBoard      report.html  at the end
//! ```

pub mod audit;
mod samples;
mod tensorboard;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

pub use samples::SampleLog;
pub use tensorboard::EventWriter;
pub use writer::{RunMetrics, StepLine};

use crate::cli::fail::Explain as _;
use crate::config::{Loaded, reference};

/// Names of the files.
pub mod names {
    /// Resolved config.
    pub const CONFIG: &str = "config.toml";
    /// One line a learner step.
    pub const METRICS: &str = "metrics.jsonl";
    /// One line an evaluation.
    pub const EVAL: &str = "eval.jsonl";
    /// Log of the run.
    pub const LOG: &str = "freewheel.log";
    /// Who runs it.
    pub const RUN: &str = "run.json";
    /// Asks the run to stop: written by `freewheel stop`.
    pub const CONTROL: &str = "control";
    /// Samples.
    pub const ROLLOUTS: &str = "rollouts";
    /// Chained records of what was judged and decided.
    pub const AUDIT: &str = "audit.jsonl";
    /// Alarms that were raised.
    pub const ALARMS: &str = "alarms.jsonl";
    /// Checkpoints.
    pub const CHECKPOINTS: &str = "checkpoints";
}

/// `run.json`: the process that runs a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunFile {
    /// The run.
    pub run: String,
    /// Process of the orchestrator.
    pub pid: u32,
    /// Where that process stands: running, finished, stopped, failed.
    pub state: RunState,
    /// Backend of the queue.
    pub backend: String,
    /// Address of the queue for roles that join, without a password; `None` for the memory backend.
    pub queue_url: Option<String>,
    /// Updates the run is to make.
    pub steps: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// Where a run stands, as its own process last wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// At work.
    Running,
    /// All updates made.
    Finished,
    /// Ended early because it was told to; `--resume` goes on.
    Stopped,
    /// Ended with an error.
    Failed,
}

/// A run's folder that belongs to this process.
#[derive(Clone, Debug)]
pub struct RunFolder {
    path: PathBuf,
}

/// What to do when the folder is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfExists {
    /// Refuse.
    Refuse,
    /// Go on where the run ended.
    Resume,
    /// Delete it and begin anew.
    Replace,
}

impl RunFolder {
    /// Makes the folder, or takes over an existing one as `if_exists` says.
    ///
    /// # Errors
    /// If a run is there and may not be touched, or one is still at work in it.
    pub fn create(loaded: &Loaded, if_exists: IfExists) -> anyhow::Result<Self> {
        let path = loaded.run_dir();
        let folder = Self { path };
        let begun = folder.file(names::RUN).exists() || folder.file(names::METRICS).exists();
        if let Some(pid) = folder.alive() {
            return Err(anyhow::anyhow!("{} is in use by process {pid}", folder.path.display()))
                .input_hint(format!("`freewheel stop {}` ends that run", folder.path.display()));
        }
        match (begun, if_exists) {
            (true, IfExists::Refuse) => {
                return Err(anyhow::anyhow!("{} already holds a run", folder.path.display())).input_hint(
                    "--resume goes on with it, --force deletes it, --set run.name=NAME starts another",
                );
            }
            (false, IfExists::Resume) => {
                return Err(anyhow::anyhow!("{} holds no run to resume", folder.path.display()))
                    .input_hint("start it without --resume");
            }
            (true, IfExists::Replace) => fs::remove_dir_all(&folder.path)
                .with_context(|| format!("{} cannot be deleted", folder.path.display()))?,
            _ => {}
        }
        fs::create_dir_all(folder.file(names::ROLLOUTS))
            .with_context(|| format!("{} cannot be made", folder.path.display()))
            .input()?;
        let _ = fs::remove_file(folder.file(names::CONTROL));
        folder.write(names::CONFIG, &reference::resolved(&loaded.config))?;
        Ok(folder)
    }

    /// An existing run's folder, given by path or by name below `runs/`.
    ///
    /// # Errors
    /// If there is no run there.
    pub fn open(run: &Path) -> anyhow::Result<Self> {
        let candidates = [run.to_owned(), Path::new("runs").join(run)];
        let found = candidates
            .into_iter()
            .find(|path| path.join(names::RUN).exists() || path.join(names::METRICS).exists());
        match found {
            Some(path) => Ok(Self { path }),
            None => Err(anyhow::anyhow!(
                "{} is no run's folder (there is neither run.json nor metrics.jsonl)",
                run.display()
            ))
            .input_hint("give a path such as runs/quickstart, or a name below runs/"),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a small file whole: a reader sees the old or the new one.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let (path, tmp) = (self.file(name), self.file(&format!("{name}.tmp")));
        fs::write(&tmp, text)
            .and_then(|()| fs::rename(&tmp, &path))
            .with_context(|| format!("{} cannot be written", path.display()))
    }

    /// Writes `run.json`.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write_run(&self, run: &RunFile) -> anyhow::Result<()> {
        self.write(names::RUN, &(serde_json::to_string_pretty(run)? + "\n"))
    }

    /// Reads `run.json`.
    pub fn read_run(&self) -> Option<RunFile> {
        serde_json::from_str(&fs::read_to_string(self.file(names::RUN)).ok()?).ok()
    }

    /// The process at work in this folder, if there is one.
    pub fn alive(&self) -> Option<u32> {
        let run = self.read_run()?;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(run.pid).ok()?);
        let there = nix::sys::signal::kill(pid, None).is_ok();
        (run.state == RunState::Running && there && run.pid != std::process::id()).then_some(run.pid)
    }

    /// The last line of a JSONL file in it.
    pub fn last_line(&self, name: &str) -> Option<serde_json::Map<String, serde_json::Value>> {
        let text = fs::read_to_string(self.file(name)).ok()?;
        text.lines().rev().find_map(|line| serde_json::from_str(line).ok())
    }
}
