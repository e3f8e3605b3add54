//! A run as processes: every role re-executes this binary, talks through Redis, and is started again if it dies.
//!
//! The prompt pool, reward worker, actors and learner are children; this process watches them, evaluates, and shows progress. The
//! learner ends the run (control flag `Finished`); everybody else sees that and ends.

use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use freewheel_queue::redis::managed::ManagedServer;
use freewheel_queue::redis::{RedisQueue, RedisStore};
use freewheel_queue::{QueueConfig, QueueError, QueueSecret, RunControl};
use freewheel_types::RunId;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::roles::Links;
use super::stats::{extras, from_files};
use super::{Ended, Prepared, follow_wishes, start_eval};
use crate::cli::fail::{Explain as _, Failure};
use crate::config::Loaded;
use crate::folder::{RunFile, RunFolder, RunMetrics, RunState, SampleLog, names};
use crate::signals::Signals;

/// Lives of one role before the run gives up on it, if they were all short.
const SHORT_LIVES_MAX: u32 = 6;
/// A life at least this long was not short.
const LONG_LIFE: Duration = Duration::from_secs(60);
const BACKOFF_MAX: Duration = Duration::from_secs(15);
/// How long a role may take to end after it was told to.
const PATIENCE: Duration = Duration::from_secs(30);

/// Connects to the streams and the policy store of a run.
///
/// # Errors
/// If no server answers, as bad input with a cure.
pub async fn connect(url: &QueueSecret, run: &RunId, config: &QueueConfig) -> anyhow::Result<Links> {
    let cure = "is the server running? `redis-cli -u URL ping` answers PONG; queue.url = \"managed\" starts a private \
                server, queue.backend = \"memory\" needs none";
    let connected = async {
        let queue = RedisQueue::connect(url, run, config).await?;
        let store = RedisStore::connect(url, run, config).await?;
        Ok::<_, QueueError>(Links { queue, store })
    };
    connected.await.input_hint(cure)
}

/// Runs all roles until the learner is done.
///
/// # Errors
/// If there is no server, or a role cannot be kept alive.
pub async fn run(
    prepared: &Prepared,
    folder: &RunFolder,
    signals: &Signals,
    run_file: &mut RunFile,
) -> anyhow::Result<Ended> {
    let config = &prepared.loaded.config;
    let managed = match config.queue.url.0.as_str() {
        "managed" => {
            let dir = folder.path().join("redis");
            let memory = (config.queue.max_bytes * 2 + (1 << 30)).max(4 << 30);
            let started =
                tokio::task::spawn_blocking(move || ManagedServer::start_with_memory(&dir, memory)).await?;
            Some(started.input()?)
        }
        _ => None,
    };
    let url = managed.as_ref().map_or_else(|| config.queue.url.clone(), ManagedServer::url);
    run_file.queue_url = Some(url.to_string());
    folder.write_run(run_file)?;
    let links = connect(&url, &prepared.loaded.run_id(), &config.queue).await?;
    // A resumed run: what the last one was told is over.
    links.queue.set_control(RunControl::Run).await.context("the run's control flag cannot be set")?;

    let done = CancellationToken::new();
    let metrics = RunMetrics::new(folder.path(), false, extras(|| (Vec::new(), None)));
    let metrics = Arc::new(metrics.context("metrics cannot be written")?);
    let eval = start_eval(prepared, &links, folder, &metrics, done.clone());
    let quick = CancellationToken::new();
    let wishes = follow_wishes(links.clone(), folder.file(names::CONTROL), signals.clone(), quick.clone());
    let result = watch_roles(prepared, folder, &links, &url, &quick).await;
    done.cancel();
    let eval = match eval {
        Some(task) if result.is_err() || quick.is_cancelled() => {
            task.abort();
            None
        }
        Some(task) => task.await.context("the evaluation ended without a word")??,
        None => None,
    };
    wishes.abort();
    drop(managed);
    let state = result?;
    Ok(Ended { state, eval })
}

/// Starts every role and keeps it alive until the run is over.
async fn watch_roles(
    prepared: &Prepared,
    folder: &RunFolder,
    links: &Links,
    url: &QueueSecret,
    quick: &CancellationToken,
) -> anyhow::Result<RunState> {
    let mut roles: JoinSet<anyhow::Result<String>> = JoinSet::new();
    let over = CancellationToken::new();
    let _end = over.clone().drop_guard();
    let actors = (0..prepared.loaded.config.actor.processes).map(|index| ("actor", format!("actor-{index}")));
    let others = [("prompts", "prompts"), ("reward", "reward-0"), ("learner", "learner")];
    for (role, name) in others.map(|(role, name)| (role, name.to_owned())).into_iter().chain(actors) {
        let supervised = Supervised {
            role,
            name,
            loaded: prepared.loaded.clone(),
            url: url.clone(),
            log: folder.file(names::LOG),
            links: links.clone(),
        };
        roles.spawn(supervised.keep_alive(over.clone()));
    }
    let mut learner_done = false;
    let mut failed = None;
    while !roles.is_empty() {
        tokio::select! {
            () = quick.cancelled(), if !over.is_cancelled() => over.cancel(),
            Some(ended) = roles.join_next() => match ended.context("a supervisor ended without a word")? {
                Ok(name) => learner_done |= name == "learner",
                Err(error) => {
                    failed = failed.or(Some(error));
                    over.cancel();
                }
            },
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let steps = prepared.loaded.config.learner.steps;
    let made = folder.last_line(names::METRICS).and_then(|line| line.get("step")?.as_u64()).unwrap_or(0);
    let limited = prepared.loaded.config.run.time_limit_min.is_some();
    Ok(if learner_done && !quick.is_cancelled() && (made >= steps || limited) {
        RunState::Finished
    } else {
        RunState::Stopped
    })
}

/// One role and what is needed to start it.
struct Supervised {
    role: &'static str,
    name: String,
    loaded: Loaded,
    url: QueueSecret,
    log: std::path::PathBuf,
    links: Links,
}

impl Supervised {
    /// Starts the role again whenever it dies, until the run is over; gives up if it keeps dying young.
    async fn keep_alive(self, over: CancellationToken) -> anyhow::Result<String> {
        let mut short_lives = 0;
        loop {
            let born = Instant::now();
            let mut child = self.start()?;
            tracing::info!(role = self.name, pid = child.id(), "started");
            let status = tokio::select! {
                status = child.wait() => status,
                () = over.cancelled() => {
                    end(&mut child).await;
                    return Ok(self.name);
                }
            };
            let status = status.with_context(|| format!("{} cannot be waited for", self.name))?;
            if self.run_is_over().await && (status.success() || self.role != "learner") {
                return Ok(self.name);
            }
            if status.code() == Some(i32::from(Failure::INPUT)) {
                anyhow::bail!("{} refused its inputs; {} says why", self.name, self.log.display());
            }
            short_lives = if born.elapsed() >= LONG_LIFE { 0 } else { short_lives + 1 };
            if short_lives >= SHORT_LIVES_MAX {
                let error =
                    anyhow::anyhow!("{} died {short_lives} times in a row ({})", self.name, describe(status));
                return Err(error).hint(format!("{} says why", self.log.display()));
            }
            let pause = Duration::from_millis(250).saturating_mul(1 << short_lives).min(BACKOFF_MAX);
            tracing::warn!(role = self.name, status = describe(status), ?pause, "died, starting it again");
            tokio::select! {
                () = over.cancelled() => return Ok(self.name),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn run_is_over(&self) -> bool {
        matches!(self.links.queue.control().await, Ok(RunControl::Finished) | Err(QueueError::Stopping))
    }

    fn start(&self) -> anyhow::Result<Child> {
        let binary = std::env::current_exe().context("this program's own path is not known")?;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("{} cannot be opened", self.log.display()))?;
        let mut command = Command::new(binary);
        command.arg(self.role).arg(&self.loaded.path);
        // The queue's address, which may be of a server started here, comes below.
        let address = |flag: &String| flag.split('=').next().is_some_and(|key| key.trim() == "queue.url");
        for flag in self.loaded.overrides.iter().filter(|flag| !address(flag)) {
            command.arg("--set").arg(flag);
        }
        command
            .arg("--set")
            .arg(format!("run.name={}", self.loaded.run_id()))
            .args(["--name", &self.name])
            .args(["--parent", &std::process::id().to_string()])
            // By the environment, so that no password shows in a list of processes.
            .env("FREEWHEEL_QUEUE_URL", &self.url.0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C at the terminal is for this process; it tells the roles.
            .process_group(0)
            .kill_on_drop(true);
        command.spawn().with_context(|| format!("{} cannot be started", self.name))
    }
}

/// SIGTERM, then patience, then SIGKILL.
async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(PATIENCE, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

fn describe(status: ExitStatus) -> String {
    status.to_string()
}

/// The metrics of the learner process: what other processes say comes from their files.
///
/// # Errors
/// If the disk refuses.
pub fn learner_metrics(loaded: &Loaded) -> anyhow::Result<Arc<RunMetrics>> {
    let dir = loaded.run_dir();
    let source = dir.clone();
    let log = &loaded.config.log;
    let metrics = RunMetrics::new(&dir, log.tensorboard, extras(move || from_files(&source)))
        .context("metrics cannot be written")?;
    Ok(Arc::new(metrics.with_samples(SampleLog::new(&dir, log)).with_alarms(&loaded.config.alarms)))
}
