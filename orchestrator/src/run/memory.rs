//! A run in one process: every role a task, engines and learner on threads of their own.

use std::sync::Arc;

use anyhow::Context as _;
use freewheel_actor::ActorMetrics;
use freewheel_learner::LearnerEnd;
use freewheel_queue::memory::{MemoryQueue, MemoryStore};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::roles::{self, Links};
use super::stats::{ActorStat, PoolStat, extras};
use super::{Ended, Prepared, cores, follow_wishes, start_eval};
use crate::folder::{RunFolder, RunMetrics, RunState, SampleLog, names};
use crate::prompts::PoolMetrics;
use crate::signals::Signals;

/// Runs all roles until the learner is done.
///
/// # Errors
/// If any role fails; the others are ended first.
pub async fn run(prepared: &Prepared, folder: &RunFolder, signals: &Signals) -> anyhow::Result<Ended> {
    let config = &prepared.loaded.config;
    let queue = MemoryQueue::new(prepared.loaded.run_id(), &config.queue);
    // What an earlier life of the run asked for and got: read before any role writes there again.
    let received =
        freewheel_learner::received(folder.path()).context("the learner's journal cannot be read")?;
    queue.restore(roles::issued_before(folder.path())?, |rollout| received.contains(rollout.0));
    let store = MemoryStore::with_queue(&config.queue, queue.clone());
    let links = Links { queue, store };
    let shutdown = CancellationToken::new();
    // However this function ends, the roles do too.
    let _end = shutdown.clone().drop_guard();
    let (actor_threads, learner_threads) = cores::share(&prepared.loaded);

    let mut others: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let mut actor_views = Vec::new();
    for index in 0..config.actor.processes {
        let (sender, view) = watch::channel(ActorMetrics::default());
        actor_views.push(view);
        let (loaded, model) = (prepared.loaded.clone(), prepared.model.clone());
        let (links, shutdown) = (links.clone(), shutdown.clone());
        others.spawn(async move {
            let name = format!("actor-{index}");
            roles::actor(&loaded, &model, links, name, actor_threads, sender, shutdown).await.map(drop)
        });
    }
    let (loaded, to_reward, end) = (prepared.loaded.clone(), links.clone(), shutdown.clone());
    others.spawn(async move { roles::reward(&loaded, to_reward, "reward-0".into(), end).await.map(drop) });
    let (pool_sender, pool_view) = watch::channel(None);
    let (loaded, to_pool, end) = (prepared.loaded.clone(), links.clone(), shutdown.clone());
    let (prompts, dir) = (prepared.prompts.clone(), folder.path().to_owned());
    let pool_metrics = forwarded(pool_sender);
    others.spawn(async move {
        roles::prompts(&loaded, prompts, to_pool, &dir, pool_metrics, end).await.map(drop)
    });

    let source = move || {
        let actors = actor_views.iter().map(|view| ActorStat::from(*view.borrow())).collect();
        (actors, pool_view.borrow().map(PoolStat::from))
    };
    let metrics = Arc::new(
        RunMetrics::new(folder.path(), config.log.tensorboard, extras(source))
            .context("metrics cannot be written")?
            .with_samples(SampleLog::new(folder.path(), &config.log))
            .with_alarms(&config.alarms),
    );
    let done = CancellationToken::new();
    let eval = start_eval(prepared, &links, folder, &metrics, done.clone());
    let quick = shutdown.child_token();
    let wishes = follow_wishes(links.clone(), folder.file(names::CONTROL), signals.clone(), quick.clone());
    let (loaded, model, to_learner) = (prepared.loaded.clone(), prepared.model.clone(), links.clone());
    let dir = folder.path().to_owned();
    let mut learner = tokio::spawn(async move {
        roles::learner(&loaded, model, to_learner, &dir, learner_threads, metrics, quick).await
    });

    // A role that fails ends the run; one that merely ends does so because the run is over.
    let mut failed = None;
    let learned = loop {
        tokio::select! {
            learned = &mut learner => break learned.context("the learner ended without a word")?,
            Some(other) = others.join_next(), if failed.is_none() => {
                if let Err(error) = other.context("a role ended without a word").and_then(|result| result) {
                    failed = Some(error);
                    shutdown.cancel();
                }
            }
        }
    };
    done.cancel();
    let quick_end = failed.is_some() || signals.quick.is_cancelled() || learned.is_err();
    let eval = match eval {
        Some(task) if quick_end => {
            task.abort();
            None
        }
        Some(task) => task.await.context("the evaluation ended without a word")??,
        None => None,
    };
    wishes.abort();
    shutdown.cancel();
    while let Some(other) = others.join_next().await {
        if let (None, Err(error)) =
            (&failed, other.context("a role ended without a word").and_then(|result| result))
        {
            failed = Some(error);
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let state = match learned?.end {
        LearnerEnd::StepsDone => RunState::Finished,
        LearnerEnd::TimeLimit => RunState::Finished,
        LearnerEnd::Drained | LearnerEnd::Shutdown => RunState::Stopped,
    };
    Ok(Ended { state, eval })
}

/// A sender whose values arrive wrapped in `Some`, so that "nothing yet" can be told from a first value.
fn forwarded(target: watch::Sender<Option<PoolMetrics>>) -> watch::Sender<PoolMetrics> {
    let (sender, mut receiver) = watch::channel(PoolMetrics::default());
    tokio::spawn(async move {
        while receiver.changed().await.is_ok() {
            target.send_replace(Some(*receiver.borrow_and_update()));
        }
    });
    sender
}
