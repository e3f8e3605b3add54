//! One function a role: config and links in, the role's crate does the rest. Used by a run in one process and by the role
//! commands alike.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use freewheel_actor::{ActorDeps, ActorMetrics};
use freewheel_learner::dual::DualConfig;
use freewheel_learner::{LearnerConfig, LearnerDeps, LearnerSummary};
use freewheel_model::LoadedModel;
use freewheel_queue::{PolicyStore, RolloutQueue};
use freewheel_reward::{CombineMode, ComponentConfig, RewardConfig, RewardDeps, RewardSummary};
use freewheel_types::{ActorId, Prompt, TaskId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Loaded, RunConfig, pool_params};
use crate::folder::RunMetrics;
use crate::prompts::{PoolDeps, PoolLog, PoolMetrics, PoolRecord};

/// Name of the pool's log in a run's folder.
pub const POOL_LOG: &str = "pool.log";

/// What every role is connected to.
#[derive(Clone)]
pub struct Links {
    /// Rollout streams.
    pub queue: Arc<dyn RolloutQueue>,
    /// Weights.
    pub store: Arc<dyn PolicyStore>,
}

/// Runs one actor.
///
/// # Errors
/// As the role.
pub async fn actor(
    loaded: &Loaded,
    model: &LoadedModel,
    links: Links,
    name: String,
    threads: usize,
    metrics: watch::Sender<ActorMetrics>,
    shutdown: CancellationToken,
) -> anyhow::Result<ActorMetrics> {
    let config = loaded.config.actor.clone();
    let deps = ActorDeps {
        actor: ActorId(name.clone()),
        queue: links.queue,
        store: links.store,
        loader: crate::policy::loader(model, crate::policy::threads(threads)),
        codec: model.tokenizer.clone(),
        eos_ids: model.generation.eos_ids.clone(),
        greedy_last: loaded.config.learner.loss.needs_greedy(),
        lease: Duration::from_secs_f64(loaded.config.queue.lease_s),
        metrics,
    };
    freewheel_actor::run(config, deps, shutdown).await.with_context(|| format!("actor {name}"))
}

/// Runs one reward worker.
///
/// # Errors
/// As the role.
pub async fn reward(
    loaded: &Loaded,
    links: Links,
    name: String,
    shutdown: CancellationToken,
) -> anyhow::Result<RewardSummary> {
    let deps = RewardDeps { queue: links.queue, worker: name };
    freewheel_reward::run(loaded.config.reward.clone(), deps, shutdown).await.context("reward worker")
}

/// Runs the prompt pool.
///
/// # Errors
/// As the role.
pub async fn prompts(
    loaded: &Loaded,
    prompts: Vec<Prompt>,
    links: Links,
    run_dir: &Path,
    metrics: watch::Sender<PoolMetrics>,
    shutdown: CancellationToken,
) -> anyhow::Result<PoolMetrics> {
    let deps = PoolDeps { queue: links.queue, log: run_dir.join(POOL_LOG), metrics: Some(metrics) };
    crate::prompts::run(prompts, pool_params(&loaded.config), deps, shutdown).await.context("prompt pool")
}

/// Every task that earlier lives of a run issued, with its group size.
///
/// # Errors
/// If the pool's log is damaged.
pub fn issued_before(run_dir: &Path) -> anyhow::Result<Vec<(TaskId, u32)>> {
    let path = run_dir.join(POOL_LOG);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let (_, records) = PoolLog::open(&path)?;
    let issued = records.iter().filter_map(|record| match record {
        PoolRecord::Issued { task, group_size, .. } => Some((*task, *group_size)),
        PoolRecord::Ended(_) => None,
    });
    Ok(issued.collect())
}

/// What the learner keeps under limits, as `[reward.combine.lagrangian]` says.
pub fn duals(reward: &RewardConfig) -> DualConfig {
    if reward.combine.mode != CombineMode::Lagrangian {
        return DualConfig::default();
    }
    let l = &reward.combine.lagrangian;
    let limits = l.costs.iter().map(|cost| (cost.name.clone(), cost.limit)).collect();
    DualConfig { lr: l.lr, init: l.init, max: l.max, ema: l.ema, min_samples: l.min_samples, limits }
}

/// `[learner]`, with the weights of the reward's components where it has none of its own.
pub fn learner_config(config: &RunConfig) -> LearnerConfig {
    let mut learner = config.learner.clone();
    if learner.loss.component_weights.is_empty() {
        let weight = |component: &ComponentConfig| component.weight.map_or(1.0, f64::from);
        learner.loss.component_weights = config.reward.component.iter().map(weight).collect();
    }
    learner
}

/// Runs the learner.
///
/// # Errors
/// As the role.
pub async fn learner(
    loaded: &Loaded,
    model: LoadedModel,
    links: Links,
    run_dir: &Path,
    threads: usize,
    metrics: Arc<RunMetrics>,
    shutdown: CancellationToken,
) -> anyhow::Result<LearnerSummary> {
    let config = &loaded.config;
    let mut learner = learner_config(config);
    learner.threads = threads;
    let deps = LearnerDeps {
        queue: links.queue,
        store: links.store,
        model,
        run_dir: run_dir.to_owned(),
        holder: format!("learner-{}", std::process::id()),
        lease: Duration::from_secs_f64(config.queue.learner_lease_s),
        group_size: config.prompts.group_size,
        max_new_tokens: config.actor.max_new_tokens as u64,
        duals: duals(&config.reward),
        curriculum: None,
        metrics,
        time_limit: config.run.time_limit_min.map(|minutes| Duration::from_secs_f64(minutes * 60.0)),
    };
    freewheel_learner::run(learner, deps, shutdown).await.context("learner")
}
