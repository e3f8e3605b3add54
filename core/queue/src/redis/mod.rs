//! The Redis backend: streams, scripts, digested weight pieces. Needs Redis 7.0+ or Valkey 7.2+.
//!
//! The server is a relay that may lose anything. Each step is one script, so it happens whole or not at all and
//! may be repeated; what a crash leaves half done is a lease that runs out. No call blocks in the server: waiting
//! is polling every 5 to 20 ms, which also notices the end of the run.
//!
//! Refuses: to go on silently after the server lost its data ([`QueueError::DataLost`]), writes of a fenced
//! learner, weights that do not match their digests.

mod cursors;
mod entries;
mod inspect;
mod keys;
mod link;
pub mod managed;
mod queue;
mod scripts;
mod store;

use std::time::Duration;

pub use inspect::{ServerReport, inspect};
pub use queue::RedisQueue;
pub use store::RedisStore;
use tokio::time::Instant;

use crate::QueueError;

/// First and longest pause between two looks at the server.
const POLL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(20));

/// How long a first connection is tried: a wrong address should be found out while somebody is looking.
const CONNECT: Duration = Duration::from_secs(3);

/// The pauses of a waiting call.
struct Poll {
    deadline: Instant,
    pause: Duration,
    looks: u64,
}

impl Poll {
    fn new(wait: Duration) -> Self {
        Self { deadline: Instant::now() + wait, pause: POLL.0, looks: 0 }
    }

    /// Whether the call has just begun.
    fn first(&self) -> bool {
        self.looks == 0
    }

    /// Sleeps until the next look. `false`: time is up. Fails as soon as the run has `finished`.
    async fn again(&mut self, finished: bool) -> Result<bool, QueueError> {
        self.looks += 1;
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        if finished {
            return Err(QueueError::Stopping);
        }
        tokio::time::sleep(left.min(self.pause)).await;
        self.pause = (self.pause * 2).min(POLL.1);
        Ok(true)
    }
}

/// 128 random bits in hex: names nobody else uses. Never part of a numeric result.
fn random_name() -> String {
    use std::hash::{BuildHasher, RandomState};
    format!("{:016x}{:016x}", RandomState::new().hash_one(0), RandomState::new().hash_one(1))
}
