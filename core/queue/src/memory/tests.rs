//! Who is woken, and when; what the queue holds is the suite's business.

use std::pin::pin;
use std::task::{Context, Waker};

use freewheel_types::{Prompt, PromptBody, PromptId};

use super::*;

const LONG: Duration = Duration::from_secs(30);

fn task(id: u64) -> Task {
    let prompt = Prompt {
        id: PromptId([1; 16]),
        name: None,
        body: PromptBody::Text("1+1=?".into()),
        answer: None,
        tags: Vec::new(),
        verifier: None,
        meta: None,
    };
    Task { id: TaskId(id), prompt, group_size: 2, seed: 0, min_version: PolicyVersion::default() }
}

fn queue(config: QueueConfig) -> Arc<MemoryQueue> {
    MemoryQueue::new("wake".parse().unwrap(), &config)
}

fn actor(name: &str) -> ActorId {
    ActorId(name.into())
}

#[tokio::test]
async fn a_lease_that_runs_out_wakes_whoever_waits_when_it_does() {
    let lease = Duration::from_millis(150);
    let queue = queue(QueueConfig { lease_s: lease.as_secs_f64(), ..Default::default() });
    queue.issue(&task(1)).await.unwrap();
    let begun = std::time::Instant::now();
    assert_eq!(queue.lease_tasks(&actor("a"), 1, LONG).await.unwrap().len(), 1);
    let taken_over = queue.lease_tasks(&actor("b"), 1, LONG).await.unwrap();
    let took = begun.elapsed();
    assert_eq!((taken_over.len(), taken_over[0].deliveries), (1, 2));
    assert!(took >= lease && took < lease * 10, "{took:?}");
}

#[tokio::test]
async fn what_a_dropped_call_was_woken_for_goes_to_the_next() {
    let queue = queue(QueueConfig::default());
    let a = actor("a");
    {
        let mut dropped = pin!(queue.lease_tasks(&a, 1, LONG));
        assert!(dropped.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        queue.issue(&task(1)).await.unwrap();
    }
    assert_eq!(queue.lease_tasks(&a, 1, Duration::ZERO).await.unwrap().len(), 1);
}

#[tokio::test]
async fn many_waiters_share_what_comes() {
    let queue = queue(QueueConfig::default());
    let waiters: Vec<_> = (0..8)
        .map(|i| {
            let queue = queue.clone();
            tokio::spawn(async move { queue.lease_tasks(&actor(&format!("a{i}")), 1, LONG).await.unwrap() })
        })
        .collect();
    tokio::task::yield_now().await;
    for id in 0..8 {
        queue.issue(&task(id)).await.unwrap();
    }
    let mut ids = Vec::new();
    for waiter in waiters {
        let leased = tokio::time::timeout(Duration::from_secs(5), waiter).await.expect("woken").unwrap();
        ids.extend(leased.iter().map(|leased| leased.task.id.0));
    }
    ids.sort_unstable();
    assert_eq!(ids, (0..8).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_new_learner_wakes_the_old_one_out_of_its_fetch() {
    let queue = queue(QueueConfig { learner_lease_s: 0.001, ..Default::default() });
    let old = queue.acquire_learner("old", 0).await.unwrap().unwrap();
    let waiting = tokio::spawn({
        let queue = queue.clone();
        async move { queue.fetch_scored(old, 1, LONG).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    queue.acquire_learner("new", 0).await.unwrap().unwrap();
    let refused = tokio::time::timeout(Duration::from_secs(5), waiting).await.expect("woken").unwrap();
    assert!(matches!(refused, Err(QueueError::Fenced { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_restored_queue_asks_only_for_what_is_missing() {
    let queue = queue(QueueConfig::default());
    let (whole, half) = (task(0), task(1));
    let received = [whole.id.rollout(0), whole.id.rollout(1), half.id.rollout(1)];
    queue.restore([(whole.id, 2), (half.id, 2)], |rollout| received.contains(&rollout));
    let counts = queue.counts().await.unwrap();
    assert_eq!((counts.issued, counts.delivered, counts.acked, counts.tasks), (4, 3, 3, 0));
    queue.issue(&whole).await.unwrap();
    queue.issue(&half).await.unwrap();
    let leased = queue.lease_tasks(&actor("a"), 9, Duration::ZERO).await.unwrap();
    assert_eq!(leased.iter().map(|leased| leased.task.id).collect::<Vec<_>>(), [half.id]);
    assert_eq!(queue.delivered(&half).await.unwrap(), [false, true]);
    assert_eq!(queue.counts().await.unwrap().issued, 4, "issued again is not issued twice");
}
