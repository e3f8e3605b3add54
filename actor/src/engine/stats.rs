//! Counters of an engine. Times are for people and metrics; no decision rests on them.

/// What an engine did since it was made, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Steps run.
    pub steps: u64,
    /// Tokens drawn.
    pub tokens: u64,
    /// Rows computed: prompts, drawn tokens, and what had to be computed again.
    pub rows: u64,
    /// Prompts prefilled to their end.
    pub prompts: u64,
    /// Prompt tokens whose keys and values an earlier sequence had left.
    pub prefix_tokens: u64,
    /// Tokens guessed.
    pub drafted: u64,
    /// Guessed tokens that were drawn.
    pub draft_hits: u64,
    /// Samples that gave their pages away and were computed again later.
    pub preemptions: u64,
    /// Weight swaps.
    pub swaps: u64,
    /// Seconds the last swap kept the engine from stepping.
    pub swap_pause_s: f64,
    /// The longest such pause.
    pub swap_pause_s_max: f64,
    /// Seconds spent in steps.
    pub step_s: f64,
    /// Seconds spent in steps, weighted with the share of slots that held a sample.
    pub slot_s: f64,
    /// Samples in the batch.
    pub live: usize,
    /// Samples submitted and not in the batch.
    pub waiting: usize,
    /// Slots: the most samples the batch can hold.
    pub slots: usize,
    /// KV pages that sequences use.
    pub pages_used: usize,
    /// KV pages kept for sequences to come.
    pub pages_cached: usize,
    /// KV pages in all.
    pub pages: usize,
}

impl EngineStats {
    pub(crate) fn record_step(&mut self, live: usize, seconds: f64) {
        self.steps += 1;
        self.step_s += seconds;
        self.slot_s += seconds * live as f64 / self.slots as f64;
    }

    pub(crate) fn record_swap(&mut self, seconds: f64) {
        self.swaps += 1;
        self.swap_pause_s = seconds;
        self.swap_pause_s_max = self.swap_pause_s_max.max(seconds);
    }
}
