//! Random sequences of operations: nothing is lost or counted twice, and Redis does what the model does.

use std::collections::BTreeMap;
use std::time::Duration;

use freewheel_queue::{DeliveryBody, QueueCounts, QueueError};
use freewheel_types::*;
use proptest::prelude::*;

use super::bench::*;

/// One thing a role may do. Numbers pick among what there is.
#[derive(Clone, Debug)]
pub enum Op {
    Issue { task: u64, group_size: u32 },
    LeaseTasks { actor: u8, max: usize },
    ExtendTask { actor: u8, lease: usize },
    Put { task: usize, index: u32, scored: bool, big: bool },
    FinishTask { lease: usize },
    Abandon { actor: u8, lease: usize },
    LeaseRollouts { worker: u8, max: usize },
    Forward { lease: usize, reward: f32 },
    Acquire { floor: u64 },
    Fetch { old: bool, max: usize },
    Ack { old: bool, delivery: usize, count: usize },
    Pass { s: u64 },
}

pub fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        3 => (0u64..6, 1u32..4).prop_map(|(task, group_size)| Op::Issue { task: task * 700, group_size }),
        4 => (0u8..3, 1usize..4).prop_map(|(actor, max)| Op::LeaseTasks { actor, max }),
        1 => (0u8..3, any::<usize>()).prop_map(|(actor, lease)| Op::ExtendTask { actor, lease }),
        8 => (any::<usize>(), 0u32..4, any::<bool>(), prop::bool::weighted(0.1))
            .prop_map(|(task, index, scored, big)| Op::Put { task, index, scored, big }),
        3 => any::<usize>().prop_map(|lease| Op::FinishTask { lease }),
        1 => (0u8..3, any::<usize>()).prop_map(|(actor, lease)| Op::Abandon { actor, lease }),
        4 => (0u8..2, 1usize..4).prop_map(|(worker, max)| Op::LeaseRollouts { worker, max }),
        4 => (any::<usize>(), -1f32..1.0).prop_map(|(lease, reward)| Op::Forward { lease, reward }),
        1 => (0u64..9).prop_map(|floor| Op::Acquire { floor }),
        4 => (prop::bool::weighted(0.1), 1usize..5).prop_map(|(old, max)| Op::Fetch { old, max }),
        3 => (prop::bool::weighted(0.1), any::<usize>(), 1usize..4)
            .prop_map(|(old, delivery, count)| Op::Ack { old, delivery, count }),
        // Tens, so that a slow machine cannot turn "just before" into "just after".
        2 => (1u64..7).prop_map(|tens| Op::Pass { s: tens * 10 }),
    ];
    prop::collection::vec(op, 1..60)
}

/// A backend with what its roles hold.
pub struct Player<'a> {
    bench: &'a Bench,
    tasks: BTreeMap<u64, Task>,
    task_leases: Vec<(Task, String)>,
    rollout_leases: Vec<(Rollout, String)>,
    epochs: Vec<u64>,
    deliveries: Vec<(RolloutId, String)>,
}

/// What one operation showed, without the backend's own ids.
pub type Seen = (String, QueueCounts);

impl<'a> Player<'a> {
    pub fn new(bench: &'a Bench) -> Self {
        let (tasks, task_leases, rollout_leases) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { bench, tasks, task_leases, rollout_leases, epochs: Vec::new(), deliveries: Vec::new() }
    }

    /// Does `op` and gives what could be seen of it.
    pub async fn play(&mut self, op: &Op) -> Seen {
        let seen = self.act(op).await;
        let counts = self.bench.counts().await;
        let mut delivered = 0;
        for task in self.tasks.values() {
            delivered +=
                self.bench.queue.delivered(task).await.unwrap().into_iter().filter(|seen| *seen).count();
        }
        assert_eq!(counts.delivered, delivered as u64, "after {op:?}");
        assert_eq!(counts.issued, self.tasks.values().map(|task| u64::from(task.group_size)).sum::<u64>());
        (seen, counts)
    }

    async fn act(&mut self, op: &Op) -> String {
        let queue = &self.bench.queue;
        match op {
            Op::Issue { task: id, group_size } => {
                let task = self.tasks.entry(*id).or_insert_with(|| task(*id, *group_size));
                show(queue.issue(task).await)
            }
            Op::LeaseTasks { actor: name, max } => {
                let leased = queue.lease_tasks(&actor(&name.to_string()), *max, NOW).await.unwrap();
                let seen = leased.iter().map(|l| (l.task.id.0, l.deliveries)).collect::<Vec<_>>();
                self.task_leases.extend(leased.into_iter().map(|l| (l.task, l.lease)));
                format!("{seen:?}")
            }
            Op::ExtendTask { actor: name, lease } => match pick(&self.task_leases, *lease) {
                Some((task, lease)) => {
                    show(queue.extend_task(&actor(&name.to_string()), task.id, lease).await)
                }
                None => String::new(),
            },
            Op::Put { task, index, scored: directly, big } => {
                let tasks: Vec<&Task> = self.tasks.values().collect();
                let Some(task) = pick(&tasks, *task) else { return String::new() };
                let mut rollout = rollout(task, index % task.group_size);
                if *big {
                    rollout.text = "x".repeat(60_000);
                }
                match directly {
                    true => show(queue.put_scored(&scored(rollout, 0.5)).await),
                    false => show(queue.put_rollout(&rollout).await),
                }
            }
            Op::FinishTask { lease } => match pick(&self.task_leases, *lease) {
                Some((task, lease)) => show(queue.finish_task(&actor("0"), task.id, lease).await),
                None => String::new(),
            },
            Op::Abandon { actor: name, lease } => match pick(&self.task_leases, *lease) {
                Some((task, lease)) => {
                    show(queue.abandon_task(&actor(&name.to_string()), task, lease, "cannot run").await)
                }
                None => String::new(),
            },
            Op::LeaseRollouts { worker, max } => {
                let leased = queue.lease_rollouts(&worker.to_string(), *max, NOW).await.unwrap();
                let seen = leased.iter().map(|l| l.rollout.id.to_string()).collect::<Vec<_>>();
                self.rollout_leases.extend(leased.into_iter().map(|l| (l.rollout, l.lease)));
                format!("{seen:?}")
            }
            Op::Forward { lease, reward } => match pick(&self.rollout_leases, *lease) {
                Some((rollout, lease)) => {
                    show(queue.forward_scored("0", lease, &scored(rollout.clone(), *reward)).await)
                }
                None => String::new(),
            },
            Op::Acquire { floor } => {
                let epoch = queue.acquire_learner("learner", *floor).await.unwrap();
                self.epochs.extend(epoch);
                format!("{epoch:?}")
            }
            Op::Fetch { old, max } => {
                let got = match queue.fetch_scored(self.epoch(*old), *max, NOW).await {
                    Ok(got) => got,
                    Err(error) => return show::<()>(Err(error)),
                };
                let bodies: Vec<(RolloutId, String)> = got.iter().map(|d| body(&d.body)).collect();
                self.deliveries.extend(bodies.iter().zip(got).map(|((rollout, _), d)| (*rollout, d.id)));
                format!("{bodies:?}")
            }
            Op::Ack { old, delivery, count } => {
                let from = delivery % self.deliveries.len().max(1);
                let ids: Vec<String> =
                    self.deliveries.iter().skip(from).take(*count).map(|(_, id)| id.clone()).collect();
                show(queue.ack_scored(self.epoch(*old), &ids).await)
            }
            Op::Pass { s } => {
                self.bench.pass(Duration::from_secs(*s)).await;
                String::new()
            }
        }
    }

    fn epoch(&self, old: bool) -> u64 {
        self.epochs.iter().rev().nth(usize::from(old)).copied().unwrap_or(0)
    }
}

fn pick<T>(list: &[T], n: usize) -> Option<&T> {
    list.get(n.checked_rem(list.len())?)
}

fn show<T: std::fmt::Debug>(result: Result<T, QueueError>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(QueueError::Fenced { epoch, .. }) => format!("fenced {epoch}"),
        Err(error @ QueueError::Config(_)) => error.to_string(),
        Err(error) => panic!("{error}"),
    }
}

fn body(body: &DeliveryBody) -> (RolloutId, String) {
    match body {
        DeliveryBody::Scored(scored) => (scored.rollout.id, format!("{:?}", scored.reward.verdict)),
        DeliveryBody::Bad { rollout, error } => (rollout.expect("an id"), error.to_string()),
        DeliveryBody::Abandoned { rollout, reason, .. } => (*rollout, format!("abandoned: {reason}")),
    }
}
