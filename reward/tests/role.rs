//! The reward role against the in-memory queue.

#[expect(dead_code, reason = "other test files use the rest")]
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use freewheel_queue::memory::MemoryQueue;
use freewheel_queue::{DeliveryBody, PutOutcome, QueueConfig, RolloutQueue, RunControl};
use freewheel_reward::{
    ComponentConfig, ComponentKind, RemoteConfig, RewardConfig, RewardDeps, VerifierKind, run,
};
use freewheel_types::{
    ActorId, ExpertTrace, FinishReason, PolicyVersion, Prompt, PromptBody, PromptId, Rollout, SamplingParams,
    Task, TaskId, VersionSpan,
};
use tokio_util::sync::CancellationToken;

const GROUP: u32 = 4;

fn prompt(answer: Option<&str>) -> Prompt {
    Prompt {
        id: PromptId::of(b"one"),
        name: None,
        body: PromptBody::Text("3+4=?".into()),
        answer: answer.map(str::to_owned),
        tags: Vec::new(),
        verifier: Some("number".into()),
        meta: None,
    }
}

fn rollout(task: u64, index: u32, prompt: Prompt, text: &str) -> Rollout {
    Rollout {
        id: TaskId(task).rollout(index),
        group_size: GROUP,
        prompt,
        prompt_ids: vec![1, 2],
        output_ids: vec![3],
        behaviour_logprobs: vec![-0.5],
        versions: vec![VersionSpan { version: PolicyVersion::new(1, 0), tokens: 1 }],
        experts: ExpertTrace::default(),
        text: text.into(),
        finish_reason: FinishReason::Stop,
        sampling: SamplingParams::default(),
        actor: ActorId("actor-0".into()),
        generation_s: 0.1,
    }
}

async fn offer(queue: &MemoryQueue, task: u64, answer: Option<&str>, texts: [&str; 4]) {
    let prompt = prompt(answer);
    let id = TaskId(task);
    let task = Task {
        id,
        prompt: prompt.clone(),
        group_size: GROUP,
        seed: 0,
        min_version: PolicyVersion::default(),
    };
    queue.issue(&task).await.unwrap();
    for (i, text) in texts.into_iter().enumerate() {
        let put = queue.put_rollout(&rollout(id.0, i as u32, prompt.clone(), text)).await.unwrap();
        assert_eq!(put, PutOutcome::Accepted);
    }
}

#[tokio::test]
async fn every_rollout_comes_out_scored_or_unscored_and_the_role_ends_with_the_run() {
    let queue = MemoryQueue::new("t".parse().unwrap(), &QueueConfig::default());
    let component =
        ComponentConfig { name: "answer".into(), verifier: VerifierKind::Auto, ..Default::default() };
    let config = RewardConfig { component: vec![component], workers: 2, ..Default::default() };
    let deps = RewardDeps { queue: queue.clone(), worker: "reward-0".into() };
    let role = tokio::spawn(run(config, deps, CancellationToken::new()));

    offer(&queue, 0, Some("7"), ["7", "8", "so 7", ""]).await;
    offer(&queue, 1, None, ["7", "7", "7", "7"]).await;

    let epoch = queue.acquire_learner("l", 0).await.unwrap().unwrap();
    let mut rewards = vec![];
    while rewards.len() < 8 {
        for delivery in queue.fetch_scored(epoch, 8, Duration::from_secs(5)).await.unwrap() {
            let DeliveryBody::Scored(scored) = delivery.body else { panic!("expected a scored rollout") };
            rewards.push((scored.rollout.id, scored.reward.reward()));
        }
    }
    rewards.sort_by_key(|(id, _)| *id);
    let values: Vec<_> = rewards.iter().map(|(_, reward)| *reward).collect();
    assert_eq!(values, [Some(1.0), Some(0.0), Some(1.0), Some(0.0), None, None, None, None]);

    queue.set_control(RunControl::Finished).await.unwrap();
    let summary = tokio::time::timeout(Duration::from_secs(5), role).await.expect("ends with the run");
    let summary = summary.unwrap().unwrap();
    assert_eq!((summary.scored, summary.unscored), (4, 4));
    assert_eq!(queue.counts().await.unwrap().rollouts, 0);
}

#[tokio::test]
async fn rollouts_wait_for_a_server_that_has_been_away_for_long() {
    // Five failures open the breaker; the trial after it finds the server back.
    let server = support::server(|asked, _, _, stream| match asked {
        0..5 => support::answer(stream, "500 Oh", "{}"),
        _ => support::answer(stream, "200 OK", support::FINE),
    });
    let remote = RemoteConfig {
        urls: vec![server.url.clone()],
        model: "rm".into(),
        retries: 0,
        pause_after_s: 0.0,
        startup_check: false,
        ..RemoteConfig::default()
    };
    let component = ComponentConfig {
        name: "help".into(),
        kind: ComponentKind::Remote,
        remote: Some(remote),
        ..Default::default()
    };
    let queue = MemoryQueue::new("t".parse().unwrap(), &QueueConfig::default());
    let config = RewardConfig { component: vec![component], workers: 1, ..Default::default() };
    let deps = RewardDeps { queue: queue.clone(), worker: "reward-0".into() };
    let role = tokio::spawn(run(config, deps, CancellationToken::new()));
    for task in 0..3 {
        let texts = ["a", "b", "c", "d"].map(|letter| format!("{letter}{task}"));
        offer(&queue, task, None, texts.each_ref().map(String::as_str)).await;
    }
    let epoch = queue.acquire_learner("l", 0).await.unwrap().unwrap();
    let mut came = 0;
    while came < 12 {
        came += queue.fetch_scored(epoch, 12, Duration::from_secs(5)).await.unwrap().len();
    }
    queue.set_control(RunControl::Finished).await.unwrap();
    let summary = role.await.unwrap().unwrap();
    assert_eq!((summary.scored, summary.unscored), (7, 5));
    assert_eq!(server.asked.load(Ordering::SeqCst), 12, "each was asked about once");
}

#[tokio::test]
async fn shutdown_ends_an_idle_role() {
    let queue = MemoryQueue::new("t".parse().unwrap(), &QueueConfig::default());
    let shutdown = CancellationToken::new();
    let deps = RewardDeps { queue: queue as Arc<dyn RolloutQueue>, worker: "reward-0".into() };
    let role = tokio::spawn(run(RewardConfig::default(), deps, shutdown.clone()));
    tokio::time::sleep(Duration::from_millis(50)).await;
    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(5), role).await.expect("ends").unwrap().unwrap();
}

#[tokio::test]
async fn a_configuration_that_cannot_work_is_refused_before_any_lease() {
    let queue = MemoryQueue::new("t".parse().unwrap(), &QueueConfig::default());
    let config = RewardConfig { component: Vec::new(), deadline_ms: 0, ..Default::default() };
    let deps = RewardDeps { queue, worker: "reward-0".into() };
    let error = run(config, deps, CancellationToken::new()).await.unwrap_err().to_string();
    assert!(error.contains("reward.component") && error.contains("reward.deadline_ms"), "{error}");
}
