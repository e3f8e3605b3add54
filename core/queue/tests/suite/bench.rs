//! A backend with its time in our hands, and things to send through it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use freewheel_queue::clock::ManualClock;
use freewheel_queue::memory::{MemoryQueue, MemoryStore};
use freewheel_queue::redis::managed::ManagedServer;
use freewheel_queue::redis::{RedisQueue, RedisStore};
use freewheel_queue::{DeadLetter, PolicyStore, QueueConfig, QueueCounts, QueueSecret, RolloutQueue};
use freewheel_types::*;

pub const NOW: Duration = Duration::ZERO;
pub const LEASE: Duration = Duration::from_secs(60);
pub const SAID: Duration = Duration::from_secs(10);

/// One backend, empty.
pub struct Bench {
    pub queue: Arc<dyn RolloutQueue>,
    pub store: Arc<dyn PolicyStore>,
    inner: Inner,
}

enum Inner {
    Memory { queue: Arc<MemoryQueue>, clock: Arc<ManualClock> },
    Redis(RedisBench),
}

/// The Redis half of a bench.
pub struct RedisBench {
    pub queue: Arc<RedisQueue>,
    pub run: RunId,
    pub url: QueueSecret,
    pub config: QueueConfig,
    pub raw: redis::aio::MultiplexedConnection,
    _server: Arc<Server>,
}

/// A server in a folder of its own.
pub struct Server {
    pub process: ManagedServer,
    _dir: tempfile::TempDir,
}

pub fn config() -> QueueConfig {
    QueueConfig { lease_s: LEASE.as_secs_f64(), learner_lease_s: 60.0, ..Default::default() }
}

impl Server {
    pub fn start() -> Option<Arc<Self>> {
        if !ManagedServer::available() {
            println!("skipped: no redis-server or valkey-server on the PATH");
            return None;
        }
        let dir = tempfile::tempdir().expect("a temporary folder");
        let process = ManagedServer::start(dir.path()).expect("the server starts");
        Some(Arc::new(Self { process, _dir: dir }))
    }

    /// One server for all tests that do not harm it, ended with the last of them.
    fn shared() -> Option<Arc<Self>> {
        static SERVER: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let mut slot = SERVER.lock().unwrap_or_else(|poison| poison.into_inner());
        slot.upgrade().or_else(|| {
            let server = Self::start()?;
            *slot = Arc::downgrade(&server);
            Some(server)
        })
    }
}

impl Bench {
    pub fn memory(config: &QueueConfig) -> Self {
        let clock = Arc::new(ManualClock::default());
        let queue = MemoryQueue::with_clock("suite".parse().expect("a name"), config, clock.clone());
        let store = MemoryStore::with_queue(config, queue.clone());
        Self { queue: queue.clone(), store, inner: Inner::Memory { queue, clock } }
    }

    pub async fn redis(config: &QueueConfig) -> Option<Self> {
        Some(Self::on(Server::shared()?, config).await)
    }

    /// A bench on a server of its own.
    pub async fn on(server: Arc<Server>, config: &QueueConfig) -> Self {
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let run: RunId = format!("run-{}", RUNS.fetch_add(1, Ordering::Relaxed)).parse().expect("a name");
        let url = server.process.url();
        let queue = RedisQueue::connect(&url, &run, config).await.expect("a connection");
        let store = RedisStore::connect(&url, &run, config).await.expect("a connection");
        let client = redis::Client::open(url.0.as_str()).expect("a url");
        let raw = client.get_multiplexed_async_connection().await.expect("a connection");
        let inner =
            RedisBench { queue: queue.clone(), run, url, config: config.clone(), raw, _server: server };
        Self { queue, store, inner: Inner::Redis(inner) }
    }

    /// The Redis half, for tests of that backend only.
    pub fn into_redis(self) -> RedisBench {
        match self.inner {
            Inner::Redis(redis) => redis,
            Inner::Memory { .. } => panic!("not a Redis bench"),
        }
    }

    /// Lets `time` pass for every lease.
    pub async fn pass(&self, time: Duration) {
        match &self.inner {
            Inner::Memory { clock, .. } => clock.advance(time),
            Inner::Redis(redis) => redis.age(time).await,
        }
    }

    pub async fn dead_letters(&self) -> Vec<DeadLetter> {
        match &self.inner {
            Inner::Memory { queue, .. } => queue.dead_letters(),
            Inner::Redis(redis) => {
                let mut letters = redis.queue.dead_letters(1000).await.expect("dead letters");
                letters.reverse();
                letters
            }
        }
    }

    /// The counters, after a check that nothing is lost or counted twice.
    pub async fn counts(&self) -> QueueCounts {
        let counts = self.queue.counts().await.expect("counts");
        assert_eq!(counts.delivered, counts.rollouts + counts.scored + counts.acked, "{counts:?}");
        counts
    }
}

impl RedisBench {
    pub fn key(&self, name: &str) -> String {
        format!("fw:{{{}}}:{name}", self.run)
    }

    pub async fn ask<T: redis::FromRedisValue>(&self, args: &[&str]) -> T {
        let mut command = redis::cmd(args[0]);
        command.arg(&args[1..]);
        command.query_async(&mut self.raw.clone()).await.expect(args[0])
    }

    /// Makes every pending entry and the learner's lease older, as if time had passed.
    async fn age(&self, time: Duration) {
        for (stream, group) in [("tasks", "actors"), ("rollouts", "reward"), ("scored", "learner")] {
            let key = self.key(stream);
            let pending: Vec<(String, String, u64, u64)> =
                self.ask(&["XPENDING", &key, group, "-", "+", "10000"]).await;
            for (id, owner, idle, _) in pending {
                let idle = (idle + time.as_millis() as u64).to_string();
                let _: redis::Value =
                    self.ask(&["XCLAIM", &key, group, &owner, "0", &id, "IDLE", &idle, "JUSTID"]).await;
            }
        }
        let lease = self.key("lease");
        let left: i64 = self.ask(&["PTTL", &lease]).await;
        let left = (left - time.as_millis() as i64).to_string();
        let _: i64 = self.ask(&["PEXPIRE", &lease, &left]).await;
    }
}

pub fn actor(name: &str) -> ActorId {
    ActorId(name.into())
}

pub fn task(id: u64, group_size: u32) -> Task {
    let text = format!("prompt {id}");
    Task {
        id: TaskId(id),
        prompt: Prompt {
            id: PromptId::of(text.as_bytes()),
            name: None,
            body: PromptBody::Text(text),
            answer: Some("\"4\"".into()),
            tags: vec!["math".into()],
            verifier: None,
            meta: None,
        },
        group_size,
        seed: 7,
        min_version: PolicyVersion::new(1, 0),
    }
}

pub fn rollout(task: &Task, index: u32) -> Rollout {
    let tokens = 3 + index % 4;
    Rollout {
        id: task.id.rollout(index),
        group_size: task.group_size,
        prompt: task.prompt.clone(),
        prompt_ids: vec![1, 2, 3],
        output_ids: (0..tokens).collect(),
        behaviour_logprobs: (0..tokens).map(|t| -0.5 - t as f32).collect(),
        versions: vec![VersionSpan { version: PolicyVersion::new(1, 0), tokens }],
        experts: ExpertTrace::default(),
        text: "four".into(),
        finish_reason: FinishReason::Stop,
        sampling: SamplingParams::default(),
        actor: actor("a"),
        generation_s: 0.25,
    }
}

pub fn scored(rollout: Rollout, reward: f32) -> ScoredRollout {
    let reward = RewardRecord {
        verdict: Verdict::Scored { reward, correct: Some(true), gated_by: None },
        components: Vec::new(),
        costs: vec![],
        tier: None,
        reward_version: "v".into(),
        latency_ms: 1.0,
    };
    ScoredRollout { rollout, reward }
}

pub fn outcome(task: &Task) -> GroupOutcome {
    GroupOutcome {
        task: task.id,
        prompt: task.prompt.id,
        version: PolicyVersion::new(1, 3),
        sampled_by: PolicyVersion::new(1, 0),
        scored: task.group_size,
        correct: 1,
        reward_mean: Some(0.1),
        graded: vec![],
        fate: GroupFate::Trained { step: 4 },
        dropped: vec![(task.id.rollout(0), DropReason::Stale)],
        given_up: None,
    }
}

/// Weights of two chunks; a key frame unless there is a base.
pub fn weights(version: PolicyVersion, base: Option<PolicyVersion>, bytes: usize) -> WeightsPayload {
    let chunks: Vec<Vec<u8>> = [bytes, 5]
        .into_iter()
        .map(|len| (0..len).map(|i| (i as u64 * 31 + version.step * 7 + version.epoch) as u8).collect())
        .collect();
    let manifest = Manifest {
        version,
        base,
        dtype: WeightsDtype::F32,
        tensors: vec![TensorEntry { name: "w".into(), shape: vec![2, 2] }],
        chunks: chunks.iter().map(|c| ChunkDigest { len: c.len() as u64, digest: Digest::of(c) }).collect(),
        arena_digest: Digest::of(b"arena"),
        tokenizer_digest: Digest::of(b"tokenizer"),
        density: 0.1,
    };
    WeightsPayload { manifest, chunks }
}
