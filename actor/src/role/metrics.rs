//! What an actor says about itself.

use freewheel_types::PolicyVersion;

/// Counters since the actor began and gauges of now. Rates come from two of them: see
/// [`tokens_per_s`](Self::tokens_per_s) and [`bubble`](Self::bubble).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ActorMetrics {
    /// Seconds since the first weights were served.
    pub wall_s: f64,
    /// Version in use; `None` before the first weights.
    pub version: Option<PolicyVersion>,
    /// Tokens drawn.
    pub tokens: u64,
    /// Rows computed, prompts and recomputed ones included.
    pub rows: u64,
    /// Rollouts delivered.
    pub rollouts: u64,
    /// Rollouts the queue had already.
    pub duplicates: u64,
    /// Tasks that can never run, ended at once.
    pub refused: u64,
    /// Times the queue was too full to take a rollout.
    pub busy: u64,
    /// Published weights that failed a check and were not served.
    pub bad_weights: u64,
    /// Seconds of token slots used, as a share of all slots.
    pub slot_s: f64,
    /// Seconds the last weight swap kept the engine from stepping: `weights/apply_pause_s`.
    pub apply_pause_s: f64,
    /// The longest such pause.
    pub apply_pause_s_max: f64,
    /// Samples that gave their pages away and were computed again.
    pub preemptions: u64,
    /// Prompt tokens whose keys and values an earlier sequence had left.
    pub prefix_tokens: u64,
    /// Tokens guessed.
    pub drafted: u64,
    /// Guessed tokens that were drawn.
    pub draft_hits: u64,
    /// Samples being decoded.
    pub live: usize,
    /// Samples waiting for a slot.
    pub waiting: usize,
    /// Tasks in hand.
    pub tasks: usize,
    /// KV pages in use.
    pub kv_pages_used: usize,
    /// KV pages in all.
    pub kv_pages: usize,
}

impl ActorMetrics {
    /// Tokens drawn a second since `earlier` (all zero for since the beginning); `None` if no time has passed.
    pub fn tokens_per_s(&self, earlier: &Self) -> Option<f64> {
        let seconds = self.wall_s - earlier.wall_s;
        (seconds > 0.0).then(|| (self.tokens - earlier.tokens) as f64 / seconds)
    }

    /// Share of token slots unused since `earlier`: `bubble/actor`; `None` if no time has passed.
    pub fn bubble(&self, earlier: &Self) -> Option<f64> {
        let seconds = self.wall_s - earlier.wall_s;
        (seconds > 0.0).then(|| (1.0 - (self.slot_s - earlier.slot_s) / seconds).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_differences() {
        let a = ActorMetrics { wall_s: 2.0, tokens: 100, slot_s: 1.0, ..Default::default() };
        let b = ActorMetrics { wall_s: 6.0, tokens: 300, slot_s: 4.0, ..Default::default() };
        assert_eq!((b.tokens_per_s(&a), b.bubble(&a)), (Some(50.0), Some(0.25)));
        assert_eq!(b.tokens_per_s(&b), None);
    }
}
