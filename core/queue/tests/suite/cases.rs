//! What both backends must do: streams, leases, counters, fencing.

use std::time::Duration;

use freewheel_queue::{Delivery, DeliveryBody, PutOutcome, QueueConfig, QueueError, RunControl};
use freewheel_types::*;

use super::bench::*;

/// Name of a reward worker.
const W: &str = "reward-0";

pub async fn a_group_goes_all_the_way(bench: &Bench) {
    let (queue, task, a) = (&bench.queue, task(5, 2), actor("a"));
    queue.issue(&task).await.unwrap();
    let leased = queue.lease_tasks(&a, 4, NOW).await.unwrap();
    assert_eq!((leased.len(), &leased[0].task, leased[0].deliveries), (1, &task, 1));
    assert_eq!(queue.delivered(&task).await.unwrap(), [false, false]);
    for k in [1, 0] {
        assert_eq!(queue.put_rollout(&rollout(&task, k)).await.unwrap(), PutOutcome::Accepted);
        assert_eq!(queue.put_rollout(&rollout(&task, k)).await.unwrap(), PutOutcome::Duplicate);
    }
    assert_eq!(queue.delivered(&task).await.unwrap(), [true, true]);
    queue.finish_task(&a, task.id, &leased[0].lease).await.unwrap();
    queue.finish_task(&a, task.id, &leased[0].lease).await.unwrap();
    let counts = bench.counts().await;
    assert_eq!((counts.issued, counts.delivered, counts.rollouts, counts.tasks), (2, 2, 2, 0));
    assert!(counts.bytes > 0);

    let rollouts = queue.lease_rollouts(W, 9, NOW).await.unwrap();
    assert_eq!(rollouts.iter().map(|l| l.rollout.id.index()).collect::<Vec<_>>(), [1, 0], "in stream order");
    assert!(queue.lease_rollouts("reward-1", 9, NOW).await.unwrap().is_empty(), "leased ones are taken");
    for leased in &rollouts {
        queue.forward_scored(W, &leased.lease, &scored(leased.rollout.clone(), 0.5)).await.unwrap();
    }
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
    let DeliveryBody::Scored(first) = &got[0].body else { panic!("{got:?}") };
    assert_eq!(**first, scored(rollout(&task, 1), 0.5), "what was put is what arrives");
    assert_eq!(bench.counts().await.scored, 2, "fetched is not acknowledged");
    assert!(queue.fetch_scored(epoch, 9, NOW).await.unwrap().is_empty(), "handed out once in an epoch");
    let ids: Vec<String> = got.iter().map(|d| d.id.clone()).collect();
    queue.ack_scored(epoch, &ids).await.unwrap();
    queue.ack_scored(epoch, &ids).await.unwrap();
    let counts = bench.counts().await;
    assert_eq!((counts.scored, counts.acked, counts.bytes), (0, 2, 0));

    queue.report(epoch, &outcome(&task)).await.unwrap();
    assert_eq!(queue.outcomes(9, NOW).await.unwrap(), [outcome(&task)]);
    assert!(queue.outcomes(9, NOW).await.unwrap().is_empty());
}

pub async fn a_task_is_issued_once(bench: &Bench) {
    let (queue, a) = (&bench.queue, actor("a"));
    let task = task(70_000, 2);
    queue.issue(&task).await.unwrap();
    queue.issue(&task).await.unwrap();
    let counts = bench.counts().await;
    assert_eq!((counts.issued, counts.tasks), (2, 1));
    let leased = queue.lease_tasks(&a, 9, NOW).await.unwrap();
    assert_eq!(leased.len(), 1);
    let refused = queue.finish_task(&a, task.id, &leased[0].lease).await.unwrap_err();
    assert!(refused.to_string().contains("sample 0 of 2 was never accepted"), "{refused}");
    for k in 0..2 {
        queue.put_scored(&scored(rollout(&task, k), 1.0)).await.unwrap();
    }
    queue.finish_task(&a, TaskId(1), &leased[0].lease).await.unwrap();
    assert_eq!(bench.counts().await.tasks, 1, "the lease of another task ends nothing");
    queue.finish_task(&a, task.id, &leased[0].lease).await.unwrap();
    queue.issue(&task).await.unwrap();
    let counts = bench.counts().await;
    assert_eq!((counts.issued, counts.tasks, counts.scored), (2, 0, 2), "nothing is left to do for it");
}

pub async fn a_full_queue_says_busy(bench: &Bench) {
    let (queue, task) = (&bench.queue, task(1, 8));
    let mut stored = 0;
    for k in 0..8 {
        match queue.put_scored(&scored(rollout(&task, k), 1.0)).await.unwrap() {
            PutOutcome::Accepted => stored += 1,
            PutOutcome::Busy => break,
            PutOutcome::Duplicate => panic!("sample {k} is new"),
        }
    }
    assert_eq!(stored, 3, "max_len");
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let got = queue.fetch_scored(epoch, 1, NOW).await.unwrap();
    queue.ack_scored(epoch, &[got[0].id.clone()]).await.unwrap();
    assert_eq!(queue.put_scored(&scored(rollout(&task, 3), 1.0)).await.unwrap(), PutOutcome::Accepted);
    let mut big = rollout(&task, 4);
    big.text = "x".repeat(70_000);
    assert_eq!(queue.put_rollout(&big).await.unwrap(), PutOutcome::Busy, "max_bytes");
    assert_eq!(
        queue.put_rollout(&rollout(&task, 4)).await.unwrap(),
        PutOutcome::Accepted,
        "busy stores nothing"
    );
    bench.counts().await;
}

pub fn small() -> QueueConfig {
    QueueConfig { max_len: 3, max_bytes: 65_536, ..config() }
}

pub async fn a_dead_actors_task_is_taken_over(bench: &Bench) {
    let (queue, task, a, b) = (&bench.queue, task(9, 3), actor("a"), actor("b"));
    queue.issue(&task).await.unwrap();
    let first = queue.lease_tasks(&a, 1, NOW).await.unwrap().remove(0);
    queue.put_rollout(&rollout(&task, 1)).await.unwrap();
    bench.pass(LEASE - SAID).await;
    assert!(queue.extend_task(&a, task.id, &first.lease).await.unwrap());
    assert!(!queue.extend_task(&b, task.id, &first.lease).await.unwrap());
    bench.pass(LEASE - SAID).await;
    assert!(queue.lease_tasks(&b, 1, NOW).await.unwrap().is_empty(), "the lease was renewed");
    bench.pass(SAID * 2).await;
    let second = queue.lease_tasks(&b, 1, NOW).await.unwrap().remove(0);
    assert_eq!((second.task.id, second.deliveries), (task.id, 2));
    assert!(!queue.extend_task(&a, task.id, &first.lease).await.unwrap(), "somebody else owns it");
    assert!(!queue.extend_task(&a, task.id, "rubbish").await.unwrap());
    assert_eq!(queue.delivered(&task).await.unwrap(), [false, true, false]);
    for k in [0, 2] {
        assert_eq!(queue.put_rollout(&rollout(&task, k)).await.unwrap(), PutOutcome::Accepted);
    }
    assert_eq!(queue.put_rollout(&rollout(&task, 2)).await.unwrap(), PutOutcome::Duplicate, "the late one");
    queue.finish_task(&b, task.id, &second.lease).await.unwrap();
    assert_eq!(bench.counts().await.delivered, 3);
}

fn abandoned(got: &[Delivery]) -> Vec<(u32, PromptId, u32, String)> {
    let parts = |delivery: &Delivery| match &delivery.body {
        DeliveryBody::Abandoned { rollout, prompt, group_size, reason } => {
            (rollout.index(), *prompt, *group_size, reason.clone())
        }
        _ => panic!("{delivery:?}"),
    };
    got.iter().map(parts).collect()
}

pub async fn a_task_that_cannot_run_ends_at_once(bench: &Bench) {
    let (queue, a, b, task, other) = (&bench.queue, actor("a"), actor("b"), task(9, 3), task(10, 1));
    queue.issue(&task).await.unwrap();
    queue.issue(&other).await.unwrap();
    let leased = queue.lease_tasks(&a, 2, NOW).await.unwrap();
    let lease = &leased[0].lease;
    queue.put_scored(&scored(rollout(&task, 1), 1.0)).await.unwrap();
    queue.abandon_task(&b, &task, lease, "not b's to say").await.unwrap();
    queue.abandon_task(&a, &other, lease, "the lease of another task").await.unwrap();
    queue.abandon_task(&a, &task, "rubbish", "no lease").await.unwrap();
    assert_eq!(bench.counts().await.tasks, 2);
    let long = format!("the prompt is too long{}", " by far".repeat(1000));
    queue.abandon_task(&a, &task, lease, &long).await.unwrap();
    queue.abandon_task(&a, &task, lease, "again").await.unwrap();
    let counts = bench.counts().await;
    assert_eq!((counts.tasks, counts.abandoned, counts.delivered, counts.scored), (1, 2, 3, 3));
    assert_eq!(queue.put_rollout(&rollout(&task, 0)).await.unwrap(), PutOutcome::Duplicate, "too late");
    queue.issue(&task).await.unwrap();
    assert_eq!(bench.counts().await.tasks, 1, "it has ended");
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
    let abandoned = abandoned(&got[1..]);
    assert_eq!(abandoned.iter().map(|(k, ..)| *k).collect::<Vec<_>>(), [0, 2]);
    for (_, prompt, group_size, reason) in abandoned {
        assert_eq!((prompt, group_size), (task.prompt.id, 3));
        assert!(reason.starts_with("the prompt is too long") && reason.len() == 400, "{reason}");
    }
    assert_eq!(bench.dead_letters().await.len(), 1);
}

pub async fn a_task_nobody_survives_is_abandoned(bench: &Bench) {
    let (queue, task) = (&bench.queue, task(9, 3));
    queue.issue(&task).await.unwrap();
    queue.put_scored(&scored(rollout(&task, 1), 1.0)).await.unwrap();
    for delivery in 1..=3 {
        let leased = queue.lease_tasks(&actor(&format!("a{delivery}")), 1, NOW).await.unwrap();
        assert_eq!(leased[0].deliveries, delivery);
        bench.pass(LEASE).await;
    }
    assert!(queue.lease_tasks(&actor("a4"), 1, NOW).await.unwrap().is_empty());
    let counts = bench.counts().await;
    assert_eq!((counts.tasks, counts.abandoned, counts.delivered, counts.scored), (0, 2, 3, 3));
    assert_eq!(queue.put_rollout(&rollout(&task, 0)).await.unwrap(), PutOutcome::Duplicate, "too late");
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
    let abandoned = abandoned(&got[1..]);
    let why = "handed out more than 3 times";
    assert_eq!(abandoned, [(0, task.prompt.id, 3, why.into()), (2, task.prompt.id, 3, why.into())]);
    let letters = bench.dead_letters().await;
    assert_eq!(letters.len(), 1);
    assert!(letters[0].reason.contains("more than 3 times"), "{letters:?}");
}

pub async fn forwarding_happens_once(bench: &Bench) {
    let (queue, task) = (&bench.queue, task(2, 2));
    for k in 0..2 {
        queue.put_rollout(&rollout(&task, k)).await.unwrap();
    }
    let first = queue.lease_rollouts(W, 1, NOW).await.unwrap().remove(0);
    bench.pass(LEASE).await;
    let again = queue.lease_rollouts("reward-1", 1, NOW).await.unwrap().remove(0);
    assert_eq!(first.rollout, again.rollout, "a dead worker's rollout comes first");
    let wrong = queue.forward_scored(W, &first.lease, &scored(rollout(&task, 1), 0.0)).await.unwrap_err();
    assert!(wrong.to_string().contains("not a lease of rollout 2.1"), "{wrong}");
    let full = bench.counts().await.bytes;
    queue.forward_scored("reward-1", &again.lease, &scored(again.rollout.clone(), 0.5)).await.unwrap();
    let once = bench.counts().await;
    queue.forward_scored(W, &first.lease, &scored(first.rollout, 0.9)).await.unwrap();
    assert_eq!(bench.counts().await, once, "the late one changes nothing");
    assert_eq!((once.rollouts, once.scored), (1, 1));
    assert!(once.bytes > full, "a reward record was added: {} of {full}", once.bytes);
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
    queue.ack_scored(epoch, &[got[0].id.clone()]).await.unwrap();
    let one = codec::encode_rollout(&rollout(&task, 1)).unwrap().len() as u64;
    assert_eq!(bench.counts().await.bytes, one, "only the unscored one is left");
}

pub async fn a_rollout_nobody_can_score_is_unscored(bench: &Bench) {
    let (queue, task) = (&bench.queue, task(2, 1));
    queue.put_rollout(&rollout(&task, 0)).await.unwrap();
    for _ in 0..3 {
        assert_eq!(queue.lease_rollouts(W, 1, NOW).await.unwrap().len(), 1);
        bench.pass(LEASE).await;
    }
    assert!(queue.lease_rollouts(W, 1, NOW).await.unwrap().is_empty());
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
    let DeliveryBody::Scored(scored) = &got[0].body else { panic!("{got:?}") };
    assert_eq!(scored.rollout, rollout(&task, 0));
    assert_eq!(scored.reward.reward(), None, "unscored is never zero");
}

pub async fn a_new_learner_gets_what_the_old_one_left(bench: &Bench) {
    let (queue, task) = (&bench.queue, task(3, 6));
    let old = queue.acquire_learner("one", 41).await.unwrap().unwrap();
    assert_eq!(old, 42, "above the floor");
    assert_eq!(queue.acquire_learner("two", 0).await.unwrap(), None, "one at a time");
    for k in 0..5 {
        queue.put_scored(&scored(rollout(&task, k), 1.0)).await.unwrap();
    }
    let got = queue.fetch_scored(old, 3, NOW).await.unwrap();
    queue.ack_scored(old, &[got[1].id.clone()]).await.unwrap();
    bench.pass(Duration::from_secs(40)).await;
    queue.renew_learner("one", old).await.unwrap();
    bench.pass(Duration::from_secs(40)).await;
    assert_eq!(queue.acquire_learner("two", 0).await.unwrap(), None, "renewed");
    bench.pass(Duration::from_secs(60)).await;
    queue.renew_learner("one", old).await.expect("late, but nobody else came");
    bench.pass(Duration::from_secs(61)).await;
    let new = queue.acquire_learner("two", 0).await.unwrap().unwrap();
    assert_eq!(new, 43);

    let mut order = Vec::new();
    while let Some(delivery) = queue.fetch_scored(new, 1, NOW).await.unwrap().pop() {
        let DeliveryBody::Scored(scored) = delivery.body else { panic!("{delivery:?}") };
        order.push(scored.rollout.id.index());
    }
    assert_eq!(order, [0, 2, 3, 4], "left behind first, then new, each once");
    let fenced = |result: Result<(), QueueError>| match result {
        Err(QueueError::Fenced { epoch, .. }) => assert_eq!(epoch, old),
        other => panic!("{other:?}"),
    };
    fenced(queue.renew_learner("one", old).await);
    fenced(queue.fetch_scored(old, 1, NOW).await.map(drop));
    fenced(queue.ack_scored(old, &[got[0].id.clone()]).await);
    fenced(queue.ack_scored(old, &[]).await);
    fenced(queue.report(old, &outcome(&task)).await);
    fenced(queue.set_progress(old, PolicyVersion::new(old, 9)).await);
    fenced(bench.store.publish(old, &weights(PolicyVersion::new(old, 9), None, 10)).await);
    assert_eq!(bench.counts().await.acked, 1, "a fenced learner changes nothing");
    assert!(queue.outcomes(9, NOW).await.unwrap().is_empty());
    queue.set_progress(new, PolicyVersion::new(new, 2)).await.unwrap();
    assert_eq!(queue.progress().await.unwrap(), PolicyVersion::new(new, 2));
}

pub async fn waiting_ends_when_something_comes_or_the_run_ends(bench: &Bench) {
    let (queue, a) = (bench.queue.clone(), actor("a"));
    assert_eq!(queue.progress().await.unwrap(), PolicyVersion::default());
    assert_eq!(queue.control().await.unwrap(), RunControl::Run);
    let long = Duration::from_secs(30);
    let later = async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        queue.issue(&task(1, 1)).await.unwrap();
    };
    let begun = std::time::Instant::now();
    let (leased, ()) = tokio::join!(queue.lease_tasks(&a, 1, long), later);
    assert_eq!(leased.unwrap().len(), 1);
    let short = queue.lease_rollouts(W, 1, Duration::from_millis(30)).await.unwrap();
    assert!(short.is_empty(), "time was up");

    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    queue.set_control(RunControl::Drain).await.unwrap();
    assert_eq!(queue.control().await.unwrap(), RunControl::Drain);
    let end = async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        queue.set_control(RunControl::Finished).await.unwrap();
    };
    let (tasks, rollouts, scored, outcomes, version, ()) = tokio::join!(
        queue.lease_tasks(&a, 1, long),
        queue.lease_rollouts(W, 1, long),
        queue.fetch_scored(epoch, 1, long),
        queue.outcomes(1, long),
        bench.store.wait_newer(None, long),
        end
    );
    assert!(matches!(tasks, Err(QueueError::Stopping)), "{tasks:?}");
    assert!(matches!(rollouts, Err(QueueError::Stopping)), "{rollouts:?}");
    assert!(matches!(scored, Err(QueueError::Stopping)), "{scored:?}");
    assert!(matches!(outcomes, Err(QueueError::Stopping)), "{outcomes:?}");
    assert!(matches!(version, Err(QueueError::Stopping)), "{version:?}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    queue.put_rollout(&rollout(&task(1, 1), 0)).await.unwrap();
    assert_eq!(queue.lease_rollouts(W, 1, long).await.unwrap().len(), 1, "what is there still comes");
}

pub async fn a_bad_payload_is_a_delivery_not_an_error(bench: &Bench) {
    let (queue, task) = (&bench.queue, task(4, 3));
    for (k, reward) in [(0, 1.0), (1, f32::NAN), (2, 0.0)] {
        queue.put_scored(&scored(rollout(&task, k), reward)).await.unwrap();
    }
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
    assert_eq!(got.len(), 3);
    let DeliveryBody::Bad { rollout, error } = &got[1].body else { panic!("{:?}", got[1]) };
    assert_eq!(*rollout, Some(task.id.rollout(1)));
    assert!(error.to_string().contains("reward"), "{error}");
    let ids: Vec<String> = got.into_iter().map(|delivery| delivery.id).collect();
    queue.ack_scored(epoch, &ids).await.unwrap();
    let counts = bench.counts().await;
    assert_eq!((counts.acked, counts.bytes), (3, 0));
    queue.dead_letter("scored", Some(task.id.rollout(1)), "a reward of NaN").await.unwrap();
    let letters = bench.dead_letters().await;
    assert_eq!(
        (letters[0].rollout, letters[0].reason.as_str()),
        (Some(task.id.rollout(1)), "a reward of NaN")
    );
}

pub async fn weights_come_as_the_shortest_chain(bench: &Bench) {
    let (queue, store) = (&bench.queue, &bench.store);
    let v = |step| PolicyVersion::new(1, step);
    assert_eq!((store.latest().await.unwrap(), store.fetch(None).await.unwrap().len()), (None, 0));
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let key = weights(v(0), None, 9 << 20);
    store.publish(epoch, &key).await.unwrap();
    assert_eq!(
        store.fetch(None).await.unwrap(),
        std::slice::from_ref(&key),
        "larger than one string of the server"
    );
    let first = weights(v(1), Some(v(0)), 100);
    let second = weights(v(2), Some(v(1)), 0);
    for payload in [&first, &second] {
        store.publish(epoch, payload).await.unwrap();
    }
    assert_eq!(store.latest().await.unwrap(), Some(v(2)));
    assert_eq!(store.fetch(None).await.unwrap(), [key, first, second.clone()]);
    assert_eq!(store.fetch(Some(v(1))).await.unwrap(), std::slice::from_ref(&second));
    assert!(store.fetch(Some(v(2))).await.unwrap().is_empty());
    assert_eq!(store.wait_newer(Some(v(1)), NOW).await.unwrap(), Some(v(2)));
    assert_eq!(store.wait_newer(Some(v(2)), NOW).await.unwrap(), None);

    store.publish(epoch, &second).await.expect("the very same again is no harm");
    let other = weights(v(2), None, 50);
    for stale in [&other, &weights(v(1), None, 50)] {
        let refused = store.publish(epoch, stale).await.unwrap_err();
        assert!(matches!(refused, QueueError::StaleVersion { .. }), "{refused}");
    }
    assert_eq!(store.fetch(Some(v(1))).await.unwrap(), [second], "a refused one touches nothing");
    let future = store.publish(epoch, &weights(PolicyVersion::new(9, 0), None, 5)).await.unwrap_err();
    assert!(matches!(future, QueueError::BadWeights { .. }), "{future}");
}

pub async fn weights_nobody_needs_are_collected(bench: &Bench) {
    let (queue, store) = (&bench.queue, &bench.store);
    let v = |step| PolicyVersion::new(1, step);
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    store.heartbeat(&actor("b"), v(1)).await.unwrap();
    store.heartbeat(&actor("a"), v(0)).await.unwrap();
    store.heartbeat(&actor("a"), v(1)).await.unwrap();
    assert_eq!(store.actors().await.unwrap(), [(actor("a"), v(1)), (actor("b"), v(1))]);
    for step in 0..8 {
        let base = (step % 4 != 0).then(|| v(step - 1));
        store.publish(epoch, &weights(v(step), base, 40)).await.unwrap();
    }
    let steps =
        |payloads: Vec<WeightsPayload>| payloads.iter().map(|p| p.manifest.version.step).collect::<Vec<_>>();
    assert_eq!(steps(store.fetch(None).await.unwrap()), [4, 5, 6, 7]);
    assert_eq!(steps(store.fetch(Some(v(2))).await.unwrap()), [4, 5, 6, 7]);
    assert_eq!(steps(store.fetch(Some(v(5))).await.unwrap()), [6, 7]);
}
