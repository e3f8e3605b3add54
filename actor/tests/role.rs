//! The role over the in-memory queue, with a policy small enough to check by hand.

mod fake;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fake::{CONTEXT, EOS, FakeBackend, FakeWeights, Letters, reference, request};
use freewheel_actor::{
    ActorConfig, ActorDeps, ActorError, ActorMetrics, PolicyLoader, PromptCodec, Request, StopSpec,
    TextDecoder, run,
};
use freewheel_model::vision::EncodedPrompt;
use freewheel_queue::clock::ManualClock;
use freewheel_queue::memory::{MemoryQueue, MemoryStore};
use freewheel_queue::{PolicyStore, PutOutcome, QueueConfig, RolloutQueue, RunControl};
use freewheel_types::{
    ActorId, ChunkDigest, Digest, Manifest, PolicyVersion, Prompt, PromptBody, PromptId, Rollout, RolloutId,
    Task, TaskId, WeightsDtype, WeightsPayload,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Weights on the wire are one byte, the step; a byte above 200 is damage that only the loader notices.
struct FakeLoader;

impl PolicyLoader for FakeLoader {
    type Backend = FakeBackend;

    fn apply(&mut self, payload: &WeightsPayload) -> Result<(), ActorError> {
        let version = payload.manifest.version;
        let good = u64::from(payload.chunks[0][0]) == version.step;
        good.then_some(()).ok_or(ActorError::BadWeights { version, what: "planted".to_owned() })
    }

    fn pack(
        &mut self,
        version: PolicyVersion,
        _: Option<FakeWeights>,
    ) -> Result<Arc<FakeWeights>, ActorError> {
        Ok(Arc::new(FakeWeights(version)))
    }

    fn backend(&mut self, weights: Arc<FakeWeights>) -> FakeBackend {
        let mut backend = FakeBackend::new(0);
        freewheel_actor::Backend::swap(&mut backend, weights);
        backend
    }
}

struct FakeCodec;

impl TextDecoder for FakeCodec {
    fn decode(&self, ids: &[u32]) -> String {
        Letters.decode(ids)
    }
}

impl PromptCodec for FakeCodec {
    fn encode_prompt(&self, prompt: &PromptBody) -> Result<EncodedPrompt, ActorError> {
        let PromptBody::Text(text) = prompt else { panic!("these tests ask in plain text") };
        let ids = text.bytes().map(|b| u32::from(b - b'a') + 1).collect();
        Ok(EncodedPrompt { ids, tiles: Vec::new() })
    }
}

fn version(step: u64) -> PolicyVersion {
    PolicyVersion::new(1, step)
}

fn payload(step: u64, byte: u8, base: Option<u64>) -> WeightsPayload {
    let chunk = vec![byte];
    let manifest = Manifest {
        version: version(step),
        base: base.map(version),
        dtype: WeightsDtype::F32,
        tensors: vec![],
        chunks: vec![ChunkDigest { len: 1, digest: Digest::of(&chunk) }],
        arena_digest: Digest::of(&[]),
        tokenizer_digest: Digest::of(&[]),
        density: 1.0,
    };
    WeightsPayload { manifest, chunks: vec![chunk] }
}

fn task(id: u64, text: &str, group_size: u32, min_step: u64) -> Task {
    let prompt = Prompt {
        id: PromptId::of(text.as_bytes()),
        name: None,
        body: PromptBody::Text(text.to_owned()),
        answer: None,
        tags: vec![],
        verifier: None,
        meta: None,
    };
    Task { id: TaskId(id), prompt, group_size, seed: 9, min_version: version(min_step) }
}

/// The request the role should make of a task.
fn as_request(task: &Task) -> Request {
    let ids = FakeCodec.encode_prompt(&task.prompt.body).unwrap().ids;
    Request {
        stop: StopSpec { ids: [EOS].into(), strings: [].into() },
        ..request(task.id.0, &ids, task.group_size, MAX_NEW)
    }
}

const MAX_NEW: usize = 12;

struct Run {
    queue: Arc<MemoryQueue>,
    store: Arc<MemoryStore>,
    clock: Arc<ManualClock>,
    shutdown: CancellationToken,
    metrics: watch::Receiver<ActorMetrics>,
    actor: Option<JoinHandle<Result<ActorMetrics, ActorError>>>,
    greedy_last: bool,
}

impl Run {
    /// A queue with `tasks` issued; the actor begins with [`begin`](Self::begin).
    async fn new(config: QueueConfig, tasks: &[Task]) -> Self {
        let clock = Arc::new(ManualClock::default());
        let queue = MemoryQueue::with_clock("test".parse().unwrap(), &config, clock.clone());
        for task in tasks {
            queue.issue(task).await.unwrap();
        }
        let (_, metrics) = watch::channel(ActorMetrics::default());
        let store = MemoryStore::new(&config);
        let shutdown = CancellationToken::new();
        Self { queue, store, clock, shutdown, metrics, actor: None, greedy_last: false }
    }

    async fn publish(&self, payload: WeightsPayload) {
        self.store.publish(1, &payload).await.unwrap();
    }

    fn begin(&mut self) {
        let config = ActorConfig {
            max_live: 4,
            kv_bytes: 4000,
            max_new_tokens: MAX_NEW,
            drain_s: 3600.0,
            ..ActorConfig::default()
        };
        let (sender, receiver) = watch::channel(ActorMetrics::default());
        self.metrics = receiver;
        let deps = ActorDeps {
            actor: ActorId("actor-0".to_owned()),
            queue: self.queue.clone(),
            store: self.store.clone(),
            loader: FakeLoader,
            codec: Arc::new(FakeCodec),
            eos_ids: vec![EOS],
            greedy_last: self.greedy_last,
            lease: Duration::from_secs(60),
            metrics: sender,
        };
        self.actor = Some(tokio::spawn(run(config, deps, self.shutdown.clone())));
    }

    /// Takes `n` rollouts as a reward worker would.
    async fn collect(&self, n: usize) -> BTreeMap<RolloutId, Rollout> {
        let mut rollouts = BTreeMap::new();
        let until = tokio::time::Instant::now() + Duration::from_secs(20);
        while rollouts.len() < n {
            assert!(tokio::time::Instant::now() < until, "{} of {n} rollouts came", rollouts.len());
            for leased in self.queue.lease_rollouts("judge", 64, Duration::from_millis(50)).await.unwrap() {
                assert!(rollouts.insert(leased.rollout.id, leased.rollout).is_none(), "a rollout came twice");
            }
        }
        rollouts
    }

    async fn until(&self, what: &str, mut ready: impl FnMut(&ActorMetrics) -> bool) {
        let mut metrics = self.metrics.clone();
        let wait = metrics.wait_for(|metrics| ready(metrics));
        tokio::time::timeout(Duration::from_secs(20), wait).await.expect(what).expect(what);
    }

    async fn end(mut self) -> ActorMetrics {
        self.queue.set_control(RunControl::Finished).await.unwrap();
        let actor = self.actor.take().unwrap();
        tokio::time::timeout(Duration::from_secs(10), actor).await.expect("the actor ends").unwrap().unwrap()
    }
}

fn assert_drawn_by(rollout: &Rollout, task: &Task, step: u64) {
    let expected = reference(&as_request(task), rollout.id, version(step));
    assert_eq!(rollout.output_ids, expected.output_ids, "{}", rollout.id);
    assert_eq!(rollout.behaviour_logprobs, expected.logprobs);
    assert_eq!(rollout.experts.ids, expected.experts);
    assert_eq!(rollout.finish_reason, expected.finish_reason);
    assert_eq!(
        (rollout.version_oldest(), rollout.version_newest()),
        (Some(version(step)), Some(version(step)))
    );
    assert_eq!((rollout.group_size, &rollout.prompt), (task.group_size, &task.prompt));
    assert_eq!(rollout.text, Letters.decode(&rollout.output_ids));
    rollout.validate(fake::VOCAB as u32).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_in_rollouts_out() {
    let tasks: Vec<Task> = (0..6).map(|i| task(i, &"abcdefgh"[i as usize % 3..], 3, 0)).collect();
    let mut run = Run::new(QueueConfig::default(), &tasks).await;
    run.begin();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(run.queue.counts().await.unwrap().delivered, 0, "nothing is drawn before there are weights");
    run.publish(payload(0, 0, None)).await;
    for (id, rollout) in run.collect(18).await {
        assert_drawn_by(&rollout, &tasks[id.task().0 as usize], 0);
    }
    run.until("all tasks end", |metrics| metrics.tasks == 0 && metrics.rollouts == 18).await;
    assert_eq!(run.queue.counts().await.unwrap().tasks, 0);
    while run.store.actors().await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(run.store.actors().await.unwrap(), [(ActorId("actor-0".to_owned()), version(0))]);
    let last = run.end().await;
    assert_eq!((last.rollouts, last.version, last.kv_pages_used), (18, Some(version(0)), 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_sample_of_a_group_may_be_a_greedy_one() {
    let tasks = [task(0, "abc", 4, 0)];
    let mut run = Run::new(QueueConfig::default(), &tasks).await;
    run.greedy_last = true;
    run.begin();
    run.publish(payload(0, 0, None)).await;
    let rollouts = run.collect(4).await;
    for (id, rollout) in &rollouts {
        let greedy = id.index() == 3;
        assert_eq!(rollout.sampling.is_greedy(), greedy);
        let drawn = Request { sampling: rollout.sampling, ..as_request(&tasks[0]) };
        let expected = reference(&drawn, *id, version(0));
        assert_eq!(
            (&rollout.output_ids, &rollout.behaviour_logprobs),
            (&expected.output_ids, &expected.logprobs)
        );
    }
    run.until("the task ends", |metrics| metrics.tasks == 0 && metrics.rollouts == 4).await;
    run.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_waits_for_the_weights_it_asks_for_and_bad_ones_are_not_served() {
    let tasks = [task(0, "abc", 2, 0), task(1, "abcd", 2, 3)];
    let mut run = Run::new(QueueConfig::default(), &tasks).await;
    run.publish(payload(0, 0, None)).await;
    run.begin();
    for rollout in run.collect(2).await.values() {
        assert_drawn_by(rollout, &tasks[0], 0);
    }
    run.publish(payload(1, 222, Some(0))).await;
    run.until("the damaged version is noticed", |metrics| metrics.bad_weights > 0).await;
    assert_eq!(run.metrics.borrow().version, Some(version(0)));
    assert_eq!(run.queue.counts().await.unwrap().delivered, 2);
    // A good delta on what could not be applied leads nowhere; a key frame does.
    let before = run.metrics.borrow().bad_weights;
    run.publish(payload(2, 2, Some(1))).await;
    run.until("the delta is tried", |metrics| metrics.bad_weights > before + 1).await;
    assert_eq!(run.metrics.borrow().version, Some(version(0)));
    run.publish(payload(3, 3, None)).await;
    for rollout in run.collect(2).await.values() {
        assert_drawn_by(rollout, &tasks[1], 3);
    }
    assert_eq!(run.end().await.version, Some(version(3)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_actor_left_is_redone_and_no_more() {
    let tasks = [task(0, "abcdef", 5, 0)];
    let mut run = Run::new(QueueConfig::default(), &tasks).await;
    run.publish(payload(0, 0, None)).await;
    let dead = ActorId("dead".to_owned());
    assert_eq!(run.queue.lease_tasks(&dead, 1, Duration::ZERO).await.unwrap().len(), 1);
    // A whole run elsewhere says what the dead actor would have delivered; it delivered samples 1 and 3.
    let mut other = Run::new(QueueConfig::default(), &tasks).await;
    other.publish(payload(0, 0, None)).await;
    other.begin();
    let all = other.collect(5).await;
    other.end().await;
    for k in [1, 3] {
        assert_eq!(run.queue.put_rollout(&all[&TaskId(0).rollout(k)]).await.unwrap(), PutOutcome::Accepted);
    }
    run.clock.advance(Duration::from_secs(61));
    run.begin();
    for (id, rollout) in run.collect(5).await {
        assert_eq!(rollout.output_ids, all[&id].output_ids, "a redo draws the same");
    }
    run.until("the task ends", |metrics| metrics.rollouts == 3 && metrics.tasks == 0).await;
    assert_eq!(run.queue.counts().await.unwrap().tasks, 0);
    let tokens: usize = [0, 2, 4].iter().map(|&k| all[&TaskId(0).rollout(k)].len()).sum();
    let last = run.end().await;
    assert_eq!((last.rollouts, last.duplicates, last.tokens), (3, 0, tokens as u64));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_makes_it_wait_and_loses_nothing() {
    let tasks: Vec<Task> = (0..5).map(|i| task(i, "abc", 3, 0)).collect();
    let mut run = Run::new(QueueConfig { max_len: 2, ..QueueConfig::default() }, &tasks).await;
    run.publish(payload(0, 0, None)).await;
    run.begin();
    run.until("the queue is full", |metrics| metrics.busy > 0).await;
    assert!(run.queue.counts().await.unwrap().rollouts <= 2);
    let mut seen = BTreeMap::new();
    while seen.len() < 15 {
        for leased in run.queue.lease_rollouts("judge", 2, Duration::from_millis(20)).await.unwrap() {
            let reward = freewheel_types::RewardRecord::unscored("test", "");
            let scored = freewheel_types::ScoredRollout { rollout: leased.rollout.clone(), reward };
            run.queue.forward_scored("judge", &leased.lease, &scored).await.unwrap();
            seen.insert(leased.rollout.id, leased.rollout);
        }
    }
    for (id, rollout) in &seen {
        assert_drawn_by(rollout, &tasks[id.task().0 as usize], 0);
    }
    assert_eq!(run.end().await.rollouts, 15);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_cannot_run_is_put_aside_and_the_rest_goes_on() {
    let tasks = [task(0, &"a".repeat(CONTEXT), 2, 0), task(1, "abc", 2, 0)];
    let mut run = Run::new(QueueConfig::default(), &tasks).await;
    run.publish(payload(0, 0, None)).await;
    run.begin();
    for rollout in run.collect(2).await.values() {
        assert_drawn_by(rollout, &tasks[1], 0);
    }
    let letters = run.queue.dead_letters();
    assert_eq!(letters.len(), 1);
    assert!(letters[0].reason.contains("the model's context is 64 tokens"), "{}", letters[0].reason);
    // At once, not when its lease has run out several times.
    while run.queue.counts().await.unwrap().tasks > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let counts = run.queue.counts().await.unwrap();
    assert_eq!((counts.abandoned, counts.scored), (2, 2), "{counts:?}");
    assert_eq!(run.end().await.refused, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_finishes_what_has_begun_and_takes_nothing_more() {
    let tasks: Vec<Task> = (0..2000).map(|i| task(i, "abc", 4, 0)).collect();
    let mut run = Run::new(QueueConfig::default(), &tasks).await;
    run.publish(payload(0, 0, None)).await;
    run.begin();
    while run.queue.counts().await.unwrap().delivered == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    run.shutdown.cancel();
    let actor = run.actor.take().unwrap();
    let last = tokio::time::timeout(Duration::from_secs(120), actor)
        .await
        .expect("it ends before drain_s")
        .unwrap()
        .unwrap();
    let counts = run.queue.counts().await.unwrap();
    assert_eq!(counts.delivered, last.rollouts);
    assert_eq!(counts.delivered % 4, 0, "whole groups");
    assert_eq!(counts.tasks, 2000 - counts.delivered / 4);
    assert!(last.rollouts < 8000, "it stopped early");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_cannot_be_made_is_an_error_with_its_cure() {
    let mut run = Run::new(QueueConfig::default(), &[]).await;
    run.publish(payload(0, 0, None)).await;
    let (sender, _metrics) = watch::channel(ActorMetrics::default());
    let deps = ActorDeps {
        actor: ActorId("actor-0".to_owned()),
        queue: run.queue.clone(),
        store: run.store.clone(),
        loader: FakeLoader,
        codec: Arc::new(FakeCodec),
        eos_ids: vec![],
        greedy_last: false,
        lease: Duration::from_secs(60),
        metrics: sender,
    };
    let config = ActorConfig { kv_bytes: 150, ..ActorConfig::default() };
    let error = freewheel_actor::run(config, deps, run.shutdown.clone()).await.unwrap_err();
    assert_eq!(error.to_string(), "actor.kv_bytes is 150; this model needs at least 200 (two pages)");
    run.actor = None;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_dies_ends_the_role_at_once_with_an_error() {
    let mut run = Run::new(QueueConfig::default(), &[task(0, "abc", 2, 0)]).await;
    run.publish(payload(fake::BROKEN, fake::BROKEN as u8, None)).await;
    run.begin();
    let actor = run.actor.take().unwrap();
    let ended =
        tokio::time::timeout(Duration::from_secs(120), actor).await.expect("no waiting for drain_s").unwrap();
    assert_eq!(ended.unwrap_err().to_string(), "the engine thread of this actor ended unexpectedly");
    assert_eq!(run.queue.counts().await.unwrap().tasks, 1, "the task is left to others");
}
