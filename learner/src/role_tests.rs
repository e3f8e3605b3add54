//! The whole role around the bigram model: tasks, weights, outcomes and accounting over the in-memory queue.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use freewheel_kernels::Threads;
use freewheel_model::{ModelSpec, OutputHead, Params, TensorNames, delta};
use freewheel_queue::memory::{MemoryQueue, MemoryStore};
use freewheel_queue::{PolicyStore, PutOutcome, QueueConfig, RolloutQueue, RunControl};
use freewheel_types::{
    ActorId, CounterRng, Digest, DropReason, GroupFate, PolicyVersion, Prompt, PromptBody, PromptId, RunId,
    ScoredRollout, Task, TaskId, Verdict, VersionSpan, WeightsDtype,
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::LearnerError;
use crate::config::LearnerConfig;
use crate::core::LearnerParts;
use crate::disk::SystemDisk;
use crate::metrics::MemoryMetrics;
use crate::objective::{LossAggregation, Objective};
use crate::policy::Policy;
use crate::role::{LearnerEnd, LearnerSummary, Outside, run_with};
use crate::testing::{self, Bigram, VOCAB};

const GROUP: u32 = 6;

struct Run {
    queue: Arc<MemoryQueue>,
    store: Arc<MemoryStore>,
    metrics: Arc<MemoryMetrics>,
    config: LearnerConfig,
    dir: tempfile::TempDir,
}

impl Run {
    fn new(config: LearnerConfig) -> Self {
        let settings = QueueConfig { learner_lease_s: 1.0, ..Default::default() };
        let queue = MemoryQueue::new("test".parse::<RunId>().unwrap(), &settings);
        let store = MemoryStore::with_queue(&settings, queue.clone());
        Self { queue, store, metrics: Arc::default(), config, dir: tempfile::tempdir().unwrap() }
    }

    fn outside(&self) -> Outside {
        let spec = ModelSpec {
            names: TensorNames::LLAMA,
            vocab_size: VOCAB,
            hidden: 1,
            layers: Vec::new(),
            norm_eps: 1e-6,
            norm_offset: 0.0,
            sandwich_norms: false,
            embedding_scale: 1.0,
            tied_embeddings: true,
            head: OutputHead::LanguageModel,
            max_positions: 32,
            architecture: "bigram".into(),
            vision: None,
        };
        Outside {
            queue: self.queue.clone(),
            store: self.store.clone(),
            holder: "learner".into(),
            lease: Duration::from_secs(1),
            metrics: self.metrics.clone(),
            time_limit: None,
            spec,
            tokenizer: Digest::of(b"tokenizer"),
            images: Arc::new(testing::TextOnly),
            keep_last: 2,
            keyframe_every: 5,
            run_dir: self.dir.path().to_owned(),
            disk: Arc::new(SystemDisk),
        }
    }

    async fn learner(&self, shutdown: CancellationToken) -> Result<LearnerSummary, LearnerError> {
        let (config, dir, metrics) = (self.config.clone(), self.dir.path().to_owned(), self.metrics.clone());
        let build = move || {
            let parts = testing::parts(&config, &dir, Arc::new(SystemDisk));
            let params = initial();
            let policy = Policy::new(
                Box::new(Bigram::new(&params)),
                params,
                config.optimizer_settings(),
                Threads::single(),
            );
            LearnerParts { group_size: GROUP, policy, metrics, ..parts }
        };
        run_with(Box::new(build), self.outside(), shutdown).await
    }

    fn column(&self, key: &str) -> Vec<f64> {
        let value = |line: &serde_json::Map<String, Value>| line.get(key).and_then(Value::as_f64);
        self.metrics
            .lines()
            .iter()
            .map(|line| value(line).unwrap_or_else(|| panic!("{key} in {line:?}")))
            .collect()
    }
}

fn initial() -> Params {
    testing::params(WeightsDtype::Bf16)
}

/// Prompt pool and actor in one: keeps the staleness budget, samples with the newest weights that a task allows.
async fn pool_and_actor(queue: Arc<MemoryQueue>, store: Arc<MemoryStore>, budget: u64) -> BTreeSet<TaskId> {
    pool_and_bad_judge(queue, store, budget, 0..0).await
}

/// The same; rewards in the tasks `bad` are so large that no gradient through them is finite.
async fn pool_and_bad_judge(
    queue: Arc<MemoryQueue>,
    store: Arc<MemoryStore>,
    budget: u64,
    bad: Range<u64>,
) -> BTreeSet<TaskId> {
    let actor = ActorId("actor-0".into());
    let (mut issued, mut ended) = (0, BTreeSet::new());
    let (mut params, mut have) = (initial(), None);
    while queue.control().await.unwrap() != RunControl::Finished {
        for outcome in queue.outcomes(64, Duration::ZERO).await.unwrap_or_default() {
            ended.insert(outcome.task);
        }
        while issued - (ended.len() as u64) < budget {
            let min_version = queue.progress().await.unwrap();
            queue.issue(&task(issued, min_version)).await.unwrap();
            issued += 1;
        }
        for payload in store.fetch(have).await.unwrap() {
            delta::apply_frame(&mut params, have, &payload).unwrap();
            have = Some(payload.manifest.version);
        }
        for leased in queue.lease_tasks(&actor, 2, Duration::from_millis(1)).await.unwrap_or_default() {
            while have < Some(leased.task.min_version) {
                store.wait_newer(have, Duration::from_millis(20)).await.unwrap();
                for payload in store.fetch(have).await.unwrap() {
                    delta::apply_frame(&mut params, have, &payload).unwrap();
                    have = Some(payload.manifest.version);
                }
            }
            let table = Bigram::new(&params);
            for index in 0..leased.task.group_size {
                let mut scored = sample(&table, &leased.task, index, have.unwrap());
                if bad.contains(&leased.task.id.0) {
                    let reward = if index == 0 { f32::MAX } else { f32::MIN };
                    scored.reward.verdict = Verdict::Scored { reward, correct: None, gated_by: None };
                }
                assert_ne!(queue.put_scored(&scored).await.unwrap(), PutOutcome::Busy);
            }
            queue.finish_task(&actor, leased.task.id, &leased.lease).await.unwrap();
        }
    }
    ended
}

fn task(id: u64, min_version: PolicyVersion) -> Task {
    let text = format!("prompt {}", id % 5);
    let prompt = Prompt {
        id: PromptId::of(text.as_bytes()),
        name: None,
        body: PromptBody::Text(text),
        answer: None,
        tags: vec![],
        verifier: None,
        meta: None,
    };
    Task { id: TaskId(id), prompt, group_size: GROUP, seed: 3, min_version }
}

/// Two tokens from the table; the reward is the share of fives.
fn sample(table: &Bigram, task: &Task, index: u32, version: PolicyVersion) -> ScoredRollout {
    let mut scored = testing::scored(task.id.0, index, version, 0.0);
    let rng = CounterRng::new(task.seed, task.id.rollout(index).0);
    let rollout = &mut scored.rollout;
    (rollout.group_size, rollout.prompt) = (GROUP, task.prompt.clone());
    let mut last = rollout.prompt_ids[0];
    (rollout.output_ids, rollout.behaviour_logprobs) = (Vec::new(), Vec::new());
    for t in 0..2 {
        let row = table.row(last);
        let mut left = rng.uniform(t);
        let drawn = row.iter().position(|log_p| {
            left -= log_p.exp();
            left < 0.0
        });
        last = drawn.unwrap_or(VOCAB - 1) as u32;
        rollout.output_ids.push(last);
        rollout.behaviour_logprobs.push(row[last as usize] as f32);
    }
    rollout.versions = vec![VersionSpan { version, tokens: 2 }];
    let fives = rollout.output_ids.iter().filter(|&&id| id == 5).count() as f32;
    scored.reward.verdict =
        Verdict::Scored { reward: fives / 2.0, correct: Some(fives == 2.0), gated_by: None };
    scored
}

fn config(steps: u64, max_staleness: u64) -> LearnerConfig {
    let mut config = testing::config(steps);
    (config.groups_per_step, config.learning_rate, config.max_staleness) = (4, 0.15, max_staleness);
    (config.window, config.checkpoint_every) = (1, 10);
    config
}

async fn whole_run(max_staleness: u64) -> (Run, LearnerSummary, BTreeSet<TaskId>) {
    let run = Run::new(config(30, max_staleness));
    let budget = (max_staleness + 1) * 4;
    let actor = tokio::spawn(pool_and_actor(run.queue.clone(), run.store.clone(), budget));
    let summary = tokio::time::timeout(Duration::from_secs(60), run.learner(CancellationToken::new()))
        .await
        .unwrap()
        .unwrap();
    (run, summary, actor.await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_synchronous_loop_learns_and_every_token_agrees_to_the_bit() {
    let (run, summary, _) = whole_run(0).await;
    assert_eq!((summary.end, summary.version.step), (LearnerEnd::StepsDone, 30));
    assert_eq!(run.store.latest().await.unwrap(), Some(summary.version));
    assert_eq!(run.metrics.lines().len(), 30);
    assert_eq!(run.column("staleness/max"), [0.0; 30]);
    assert_eq!(run.column("mismatch/same_version_abs_max"), [0.0; 30]);
    assert_eq!(
        run.column("mismatch/logprob_abs_max"),
        [0.0; 30],
        "all tokens are of the version being trained"
    );
    assert!(run.column("mismatch/same_version_tokens").iter().all(|&n| n > 0.0));
    let rewards = run.column("reward/mean");
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&rewards[..5]), mean(&rewards[25..]));
    assert!(last >= first + 0.2, "reward went from {first} to {last}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_asynchronous_loop_keeps_the_bound_and_every_rollout_is_somewhere() {
    let (run, summary, ended) = whole_run(3).await;
    assert!(run.column("staleness/max").iter().all(|&s| s <= 3.0));
    assert!(run.column("staleness/max").iter().any(|&s| s > 0.0), "it was not asynchronous at all");
    assert_eq!(run.column("accounting/imbalance"), [0.0; 30]);
    assert_eq!(run.column("mismatch/same_version_abs_max"), [0.0; 30]);
    assert_eq!(summary.accounting.unwrap().imbalance(), 0);
    let ledger = summary.ledger;
    assert_eq!(ledger.received, ledger.trained + ledger.dropped.total() + ledger.held());
    assert!(ended.len() as u64 >= 29 * 4, "the pool was told of {} groups", ended.len());
    assert_eq!(run.queue.control().await.unwrap(), RunControl::Finished);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_that_stops_and_comes_back_goes_on_where_it_was() {
    let run = Run::new(config(12, 1));
    let actor = tokio::spawn(pool_and_actor(run.queue.clone(), run.store.clone(), 8));
    let shutdown = CancellationToken::new();
    let watch = async {
        while run.metrics.lines().len() < 5 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        shutdown.cancel();
    };
    let (first, ()) = tokio::join!(run.learner(shutdown.clone()), watch);
    let first = first.unwrap();
    assert_eq!(first.end, LearnerEnd::Shutdown);
    assert!((5..12).contains(&first.version.step), "{first:?}");
    let second = run.learner(CancellationToken::new()).await.unwrap();
    assert_eq!((second.end, second.version.step), (LearnerEnd::StepsDone, 12));
    assert!(second.version.epoch > first.version.epoch);
    assert_eq!(second.recovery.checkpoint_step, Some(first.version.step));
    let steps = run.column("step");
    assert_eq!(steps, (1..=12).map(f64::from).collect::<Vec<_>>(), "each step once");
    assert_eq!(run.column("accounting/imbalance"), [0.0; 12]);
    actor.await.unwrap();
    replays_to_the_same_weights(run.dir.path(), &run.config, &second);
}

/// A loss that takes rewards as they are.
fn regression(steps: u64) -> LearnerConfig {
    let mut config = config(steps, 0);
    (config.groups_per_step, config.learning_rate, config.checkpoint_every) = (1, 0.01, 1);
    config.loss.objective = Objective::Oapl;
    config.loss.loss_aggregation = Some(LossAggregation::SeqMeanTokenSum);
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_is_not_finite_is_skipped_and_the_run_goes_on() {
    let run = Run::new(regression(8));
    let actor = tokio::spawn(pool_and_bad_judge(run.queue.clone(), run.store.clone(), 1, 4..6));
    let ended = tokio::time::timeout(Duration::from_secs(60), run.learner(CancellationToken::new()));
    let summary = ended.await.unwrap().unwrap();
    assert_eq!((summary.end, summary.version.step), (LearnerEnd::StepsDone, 8));
    assert_eq!(run.store.latest().await.unwrap(), Some(summary.version));
    let skipped = run.metrics.lines().iter().filter(|line| line["train/applied"] == false).count();
    assert_eq!(skipped, 2);
    assert_eq!(summary.accounting.unwrap().imbalance(), 0);
    actor.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_three_of_them_the_run_goes_back_once_and_ends_the_second_time() {
    let run = Run::new(regression(40));
    let actor = pool_and_bad_judge(run.queue.clone(), run.store.clone(), 1, 4..1000);
    let error = tokio::select! {
        ended = run.learner(CancellationToken::new()) => ended.unwrap_err(),
        _ = actor => panic!("the run did not end by itself"),
    };
    assert!(matches!(error, LearnerError::Diverged { count: 3, .. }), "{error}");
    let back = run.metrics.lines().iter().filter(|line| line.contains_key("train/rolled_back_to")).count();
    let skipped = run.metrics.lines().iter().filter(|line| line["train/applied"] == false).count();
    assert_eq!((back, skipped), (1, 3 + 1 + 3), "three, the way back, three more");
}

fn replays_to_the_same_weights(dir: &Path, config: &LearnerConfig, summary: &LearnerSummary) {
    let parts = || {
        let params = initial();
        let policy = Policy::new(
            Box::new(Bigram::new(&params)),
            params,
            config.optimizer_settings(),
            Threads::single(),
        );
        LearnerParts { group_size: GROUP, policy, ..testing::parts(config, dir, Arc::new(SystemDisk)) }
    };
    let replayed = crate::core::Learner::repeat_run(parts(), None).unwrap();
    assert_eq!((replayed.from_step, replayed.steps, &replayed.weights), (0, 12, &summary.weights));
    let replayed = crate::core::Learner::repeat_run(parts(), Some(3)).unwrap();
    assert_eq!(replayed.step, 3);
    // Another learning rate gives other weights, and the journal knows.
    let mut other = parts();
    other.config.learning_rate *= 1.5;
    let error = crate::core::Learner::repeat_run(other, None).unwrap_err();
    assert!(matches!(error, LearnerError::ReplayMismatch { step: 1, .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_learner_waits_and_a_fenced_one_ends() {
    let run = Run::new(config(1000, 1));
    let stop = CancellationToken::new();
    let first = run.learner(stop.clone());
    let usurper = async {
        while run.store.latest().await.unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(run.queue.acquire_learner("other", 0).await.unwrap(), None, "the lease is held");
        // The checkpoint folder is the authority: whoever claims there wins.
        let folder = crate::core::checkpoint_dir(run.dir.path());
        crate::checkpoint::Checkpoints::open(Arc::new(SystemDisk), &folder, 2).unwrap().claim(99).unwrap();
        pool_and_actor(run.queue.clone(), run.store.clone(), 8).await;
    };
    let ended = tokio::select! {
        ended = first => ended,
        () = usurper => panic!("the run ended although its learner was fenced"),
    };
    assert!(matches!(ended.unwrap_err(), LearnerError::Fenced { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_that_cannot_be_used_is_counted_and_its_group_goes_on() {
    let run = Run::new({
        let mut config = config(1, 0);
        config.groups_per_step = 1;
        config
    });
    let feed = async {
        while run.store.latest().await.unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let version = run.store.latest().await.unwrap().unwrap();
        let table = Bigram::new(&initial());
        let task = task(0, version);
        run.queue.issue(&task).await.unwrap();
        for index in 0..GROUP {
            let mut scored = sample(&table, &task, index, version);
            scored.reward.verdict = Verdict::Scored { reward: index as f32, correct: None, gated_by: None };
            match index {
                1 => scored.rollout.output_ids[0] = VOCAB as u32,
                2 => scored.rollout.versions[0].version.step = 44,
                _ => {}
            }
            run.queue.put_scored(&scored).await.unwrap();
        }
    };
    let (summary, ()) = tokio::join!(run.learner(CancellationToken::new()), feed);
    let ledger = summary.unwrap().ledger;
    assert_eq!((ledger.trained, ledger.dropped.get(DropReason::Invalid), ledger.held()), (4, 2, 0));
    let reasons: Vec<String> = run.queue.dead_letters().iter().map(|letter| letter.reason.clone()).collect();
    assert!(reasons[0].contains("token id is 8") && reasons[1].contains("never published"), "{reasons:?}");
    let told = run.queue.outcomes(8, Duration::ZERO).await.unwrap();
    assert_eq!(told[0].fate, GroupFate::Trained { step: 1 });
    assert_eq!(told[0].dropped.len(), 2);
}
