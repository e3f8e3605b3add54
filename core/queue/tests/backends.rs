//! Both backends keep the same promises: every case of `suite` runs against each.

mod suite;

use freewheel_queue::QueueConfig;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use suite::bench::{Bench, config};
use suite::random::{Player, ops};

macro_rules! both {
    ($($case:ident with $config:expr;)*) => {
        mod memory {
            $(#[tokio::test]
            async fn $case() {
                super::suite::cases::$case(&super::Bench::memory(&$config)).await;
            })*
        }
        mod redis {
            $(#[tokio::test]
            async fn $case() {
                if let Some(bench) = super::Bench::redis(&$config).await {
                    super::suite::cases::$case(&bench).await;
                }
            })*
        }
    };
}

both! {
    a_group_goes_all_the_way with super::config();
    a_task_is_issued_once with super::config();
    a_full_queue_says_busy with super::suite::cases::small();
    a_dead_actors_task_is_taken_over with super::config();
    a_task_nobody_survives_is_abandoned with super::config();
    a_task_that_cannot_run_ends_at_once with super::config();
    forwarding_happens_once with super::config();
    a_rollout_nobody_can_score_is_unscored with super::config();
    a_new_learner_gets_what_the_old_one_left with super::config();
    waiting_ends_when_something_comes_or_the_run_ends with super::config();
    a_bad_payload_is_a_delivery_not_an_error with super::config();
    weights_come_as_the_shortest_chain with super::config();
    weights_nobody_needs_are_collected with super::config();
}

/// Small caps, so that they are met.
fn tight() -> QueueConfig {
    QueueConfig { max_len: 6, max_bytes: 150_000, ..config() }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn nothing_is_lost_in_memory(ops in ops()) {
        let bench = Bench::memory(&tight());
        block_on(async {
            let mut player = Player::new(&bench);
            for op in &ops {
                player.play(op).await;
            }
        });
    }
}

#[test]
fn redis_does_what_the_model_does() {
    let config = ProptestConfig { cases: 100, failure_persistence: None, ..Default::default() };
    // Holds the server for all cases.
    let Some(_held) = block_on(Bench::redis(&tight())) else { return };
    let played = TestRunner::new(config).run(&ops(), |ops| {
        block_on(async {
            let (model, redis) = (Bench::memory(&tight()), Bench::redis(&tight()).await.expect("a server"));
            let (mut expected, mut got) = (Player::new(&model), Player::new(&redis));
            for (i, op) in ops.iter().enumerate() {
                prop_assert_eq!(got.play(op).await, expected.play(op).await, "operation {}: {:?}", i, op);
            }
            Ok(())
        })
    });
    played.unwrap_or_else(|failure| panic!("{failure}"));
}
