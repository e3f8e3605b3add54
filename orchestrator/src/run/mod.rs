//! A whole run: roles wired together, in one process or one each.
//!
//! ```text
//! prepare  ─► folder ─► memory: every role a task here        ─┐
//!             │         redis:  every role a process, watched ─┴► end: report, summary
//!             └► progress, evaluation, signals: the same for both
//! ```
//!
//! The learner decides when a run is over; everybody else ends after it.

pub mod cores;
mod end;
pub mod evals;
mod memory;
pub mod prepare;
pub mod progress;
pub mod redis;
pub mod roles;
pub mod stats;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freewheel_model::LoadedModel;
use freewheel_queue::{Backend, RunControl};
use freewheel_reward::RewardStack;
use freewheel_types::Prompt;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cli::fail::Failure;
use crate::config::Loaded;
use crate::evaluation::{EvalReport, EvalSet};
use crate::folder::{IfExists, RunFile, RunFolder, RunMetrics, RunState, names};
use crate::signals::Signals;
pub use end::{latest_checkpoint, raised};
use evals::EvalDeps;
use roles::Links;

/// How often the control file is looked at.
const CONTROL_POLL: Duration = Duration::from_millis(300);

/// Everything a run works with.
pub struct Prepared {
    /// Config.
    pub loaded: Loaded,
    /// Policy at the start.
    pub model: LoadedModel,
    /// What it trains on.
    pub prompts: Vec<Prompt>,
    /// What it is judged on.
    pub eval: Option<EvalSet>,
    /// Who judges.
    pub stack: Arc<RewardStack>,
}

impl Prepared {
    /// Reads and checks all inputs.
    ///
    /// # Errors
    /// The first input that is unusable; exit code 78.
    pub fn new(mut loaded: Loaded) -> anyhow::Result<Self> {
        let prompts = prepare::training_prompts(&loaded)?;
        let held_out = prepare::held_out_prompts(&loaded)?;
        let model = prepare::model(&loaded)?;
        if let Some(pinned) = crate::hub::pinned(&loaded.config.model.path, &model.source) {
            loaded.overrides.push(format!("model.path={pinned}"));
            loaded.config.model.path = pinned;
        }
        prepare::check_lengths(&loaded, &model, &prompts)?;
        prepare::check_lengths(&loaded, &model, &held_out)?;
        let eval = prepare::eval_set(&loaded, &model, held_out)?;
        let stack = prepare::reward_stack(&loaded)?;
        Ok(Self { loaded, model, prompts, eval, stack })
    }
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Finished or stopped.
    pub state: RunState,
    /// The last evaluation.
    pub eval: Option<EvalReport>,
}

/// Runs the whole job on this machine.
///
/// # Errors
/// Bad inputs (78), a failure of the work (1), an interrupt (130).
pub async fn run(loaded: Loaded, if_exists: IfExists, json: bool) -> anyhow::Result<()> {
    let began = Instant::now();
    let prepared = Prepared::new(loaded)?;
    let folder = RunFolder::create(&prepared.loaded, if_exists)?;
    crate::logging::to_file(&folder.file(names::LOG), &prepared.loaded.config.log.level)?;
    let signals = Signals::listen()?;
    let steps = prepared.loaded.config.learner.steps;
    let mut run_file = RunFile {
        run: prepared.loaded.run_id().to_string(),
        pid: std::process::id(),
        state: RunState::Running,
        backend: match prepared.loaded.config.queue.backend {
            Backend::Memory => "memory".into(),
            Backend::Redis => "redis".into(),
        },
        queue_url: None,
        steps,
        error: None,
    };
    folder.write_run(&run_file)?;
    end::greet(&prepared, &folder);
    let alarms_before = end::raised(&folder).len();
    let shown = CancellationToken::new();
    let progress = tokio::spawn(progress::follow(folder.path().to_owned(), steps, shown.clone()));
    let result = match prepared.loaded.config.queue.backend {
        Backend::Memory => memory::run(&prepared, &folder, &signals).await,
        Backend::Redis => redis::run(&prepared, &folder, &signals, &mut run_file).await,
    };
    shown.cancel();
    let _ = progress.await;
    (run_file.state, run_file.error) = match &result {
        Ok(ended) => (ended.state, None),
        Err(error) => (RunState::Failed, Some(format!("{error:#}"))),
    };
    folder.write_run(&run_file)?;
    let report = end::report(&folder);
    let ended = result?;
    end::summary(&folder, &ended, began.elapsed(), report.as_deref(), json)?;
    end::alarms(&folder, alarms_before)?;
    if signals.drain.is_cancelled() {
        return Err(Failure::interrupted(format!(
            "interrupted; `freewheel run {} --resume` goes on",
            prepared.loaded.path.display()
        )));
    }
    Ok(())
}

/// Passes on what the user wants to the run: signals and the control file become control flags.
fn follow_wishes(
    links: Links,
    control_file: PathBuf,
    signals: Signals,
    quick: CancellationToken,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut draining = false;
        loop {
            tokio::select! {
                () = signals.quick.cancelled() => {
                    quick.cancel();
                    return;
                }
                () = tokio::time::sleep(CONTROL_POLL) => {}
            }
            let asked = std::fs::read_to_string(&control_file).unwrap_or_default();
            if asked.trim() == "now" {
                quick.cancel();
                return;
            }
            if draining || !(signals.drain.is_cancelled() || asked.trim() == "drain") {
                continue;
            }
            match links.queue.set_control(RunControl::Drain).await {
                Ok(()) => {
                    tracing::info!("draining: the learner finishes its step and writes a checkpoint");
                    draining = true;
                }
                Err(error) => tracing::warn!(%error, "cannot tell the run to drain, trying again"),
            }
        }
    })
}

/// Starts the evaluation beside a run, if the run has one.
fn start_eval(
    prepared: &Prepared,
    links: &Links,
    folder: &RunFolder,
    metrics: &Arc<RunMetrics>,
    done: CancellationToken,
) -> Option<JoinHandle<anyhow::Result<Option<EvalReport>>>> {
    let set = prepared.eval.clone()?;
    let (threads, _) = cores::share(&prepared.loaded);
    let last = folder.last_line(names::EVAL).and_then(|line| line.get("step")?.as_u64());
    let deps = EvalDeps {
        store: links.store.clone(),
        loader: crate::policy::loader(&prepared.model, crate::policy::threads(threads)),
        engine: prepared.loaded.config.actor.engine(),
        codec: prepared.model.tokenizer.clone(),
        set,
        stack: prepared.stack.clone(),
        metrics: metrics.clone(),
        every: prepared.loaded.config.eval.every,
        evaluated: last,
    };
    Some(tokio::spawn(evals::follow(deps, done)))
}
