//! Evaluation during a run: an engine of its own that follows the policy store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use freewheel_actor::{CpuBackend, CpuLoader, Engine, PolicyLoader as _};
use freewheel_model::Tokenizer;
use freewheel_queue::{PolicyStore, QueueError};
use freewheel_reward::RewardStack;
use freewheel_types::PolicyVersion;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::evaluation::{EvalReport, EvalSet, evaluate};
use crate::folder::{RunMetrics, StepLine};

/// What the evaluator works with.
pub struct EvalDeps {
    /// Where weights come from.
    pub store: Arc<dyn PolicyStore>,
    /// Makes weights of payloads.
    pub loader: CpuLoader,
    /// Bounds of the engine.
    pub engine: freewheel_actor::EngineConfig,
    /// Text for the engine.
    pub codec: Arc<Tokenizer>,
    /// What is asked.
    pub set: EvalSet,
    /// Who judges.
    pub stack: Arc<RewardStack>,
    /// Where results go.
    pub metrics: Arc<RunMetrics>,
    /// Every this many steps; 0: only start and end.
    pub every: u64,
    /// Steps already evaluated (a resumed run).
    pub evaluated: Option<u64>,
}

/// Evaluates the first weights it sees, then whenever `every` steps have passed, and the last weights once `done`. Returns
/// the last report.
///
/// # Errors
/// If the model and the prompts do not fit; an unreachable store is waited for.
pub async fn follow(deps: EvalDeps, done: CancellationToken) -> anyhow::Result<Option<EvalReport>> {
    let EvalDeps { store, mut loader, engine: config, codec, set, stack, metrics, every, evaluated } = deps;
    let set = Arc::new(set);
    let mut engine: Option<Engine<CpuBackend>> = None;
    let mut pulled: Option<PolicyVersion> = None;
    let mut next_step = evaluated.map_or(0, |step| step + every.max(1));
    let mut last: Option<EvalReport> = None;
    loop {
        let over = done.is_cancelled();
        let Some(version) = newest(&*store, pulled, &done).await else {
            if over {
                return Ok(last);
            } else {
                continue;
            };
        };
        let seen = last.as_ref().map(|report| report.version);
        let due = if every == 0 { last.is_none() && evaluated.is_none() } else { version.step >= next_step };
        let at_end = over && seen != Some(version);
        if !(due || at_end) {
            if over {
                return Ok(last);
            }
            // Nothing due: wait for a newer one without pulling every version.
            tokio::select! {
                () = done.cancelled() => {}
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
            continue;
        }
        if !pull(&*store, &mut loader, &mut pulled).await? {
            continue;
        }
        let (set_, stack_, codec_) = (set.clone(), stack.clone(), codec.clone());
        let held = engine.take();
        let began = Instant::now();
        // The engine computes: not on an async thread.
        let (report, held, back) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            let version = pulled.context("a pulled version")?;
            let mut held = held;
            let spare =
                held.as_mut().and_then(|engine| engine.take_retired().pop()).and_then(Arc::into_inner);
            let weights = loader.pack(version, spare)?;
            let mut engine = match held {
                Some(mut engine) => {
                    engine.swap(weights);
                    engine
                }
                None => Engine::new(loader.backend(weights), codec_, config)?,
            };
            let report = evaluate(&mut engine, &stack_, &set_)?;
            Ok((report, engine, loader))
        })
        .await
        .context("the evaluation thread ended")??;
        (engine, loader) = (Some(held), back);
        metrics.eval(report.version.step, &line(&report, began.elapsed()));
        next_step = (report.version.step / every.max(1) + 1) * every.max(1);
        last = Some(report);
    }
}

/// One line of `eval.jsonl`.
fn line(report: &EvalReport, took: Duration) -> StepLine {
    let mut line = StepLine::new();
    line.insert("step".into(), json!(report.version.step));
    line.insert("version".into(), json!(report.version.to_string()));
    line.insert("time/eval_s".into(), json!(took.as_secs_f64()));
    line.extend(report.metrics());
    line
}

/// The newest version, waiting a little for one newer than `than`; whatever there is once `done`.
async fn newest(
    store: &dyn PolicyStore,
    than: Option<PolicyVersion>,
    done: &CancellationToken,
) -> Option<PolicyVersion> {
    if !done.is_cancelled() {
        let waited = tokio::select! {
            waited = store.wait_newer(than, Duration::from_millis(500)) => waited,
            () = done.cancelled() => Ok(None),
        };
        match waited {
            Ok(Some(version)) => return Some(version),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "evaluation waits for the policy store");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
    store.latest().await.ok().flatten()
}

/// Brings the loader up to date. `false`: try again.
async fn pull(
    store: &dyn PolicyStore,
    loader: &mut CpuLoader,
    pulled: &mut Option<PolicyVersion>,
) -> anyhow::Result<bool> {
    let payloads = match store.fetch(*pulled).await {
        Ok(payloads) => payloads,
        Err(QueueError::Config(what)) => anyhow::bail!(what),
        Err(error) => {
            tracing::warn!(%error, "evaluation cannot fetch weights");
            tokio::time::sleep(Duration::from_millis(200)).await;
            return Ok(false);
        }
    };
    for payload in &payloads {
        loader.apply(payload)?;
        *pulled = Some(payload.manifest.version);
    }
    Ok(pulled.is_some())
}
