//! Waiting between tries: 50 ms doubling to 2 s, with jitter so that many actors do not knock at once.

use std::time::Duration;

use freewheel_types::CounterRng;
use tokio_util::sync::CancellationToken;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

/// One series of tries.
pub(super) struct Backoff {
    rng: CounterRng,
    tries: u64,
}

impl Backoff {
    /// A series whose jitter is keyed by who waits.
    pub(super) fn new(who: &str) -> Self {
        let key = who
            .bytes()
            .fold(0xCBF2_9CE4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
        Self { rng: CounterRng::new(key, 0), tries: 0 }
    }

    /// It worked: the next wait is short again.
    pub(super) fn reset(&mut self) {
        self.tries = 0;
    }

    /// The next wait: half to all of the current step.
    fn next(&mut self) -> Duration {
        let step = FIRST.saturating_mul(1 << self.tries.min(10)).min(LONGEST);
        let jitter = self.rng.uniform(self.tries);
        self.tries += 1;
        step.mul_f64(0.5 + 0.5 * jitter)
    }

    /// Waits; `false` if `stop` came first.
    pub(super) async fn wait(&mut self, stop: &CancellationToken) -> bool {
        let pause = self.next();
        tokio::select! {
            () = stop.cancelled() => false,
            () = tokio::time::sleep(pause) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_start_again() {
        let mut backoff = Backoff::new("actor-0");
        let waits: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(waits[0] <= FIRST && waits[0] >= FIRST / 2);
        assert!(waits[7..].iter().all(|wait| (LONGEST / 2..=LONGEST).contains(wait)), "{waits:?}");
        backoff.reset();
        assert!(backoff.next() <= FIRST);
        assert_ne!(Backoff::new("actor-1").next(), Backoff::new("actor-0").next());
    }
}
