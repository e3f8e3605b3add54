//! What the objectives read: one sequence's tokens, reduced to those that count.
//!
//! A token counts ("is live") if the loss mask keeps it and its behaviour log-prob is finite. Everything downstream sees live
//! tokens only, so a masked token cannot change anything, whatever its numbers are. A token that the policy can no longer
//! draw (log-prob −∞: top-p moved on) has no gradient and is left out too, but stays in the batch's totals.

use super::config::RatioAnchor;

/// Log-ratios are clamped to ± this before `exp` (as verl does); beyond it the ratio is constant and has no gradient.
pub const LOG_RATIO_LIMIT: f64 = 20.0;

/// One completion as the learner hands it in. All per-token fields are `[T]`, nats, T = completion tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceInput {
    /// Names the sequence within its batch, for picks over the whole batch.
    pub id: u64,
    /// Log-probs under the weights being trained; what is differentiated.
    pub policy_logprobs: Vec<f64>,
    /// Log-probs under the distribution each token was drawn from.
    pub behaviour_logprobs: Vec<f64>,
    /// Log-probs under the learner frozen before this batch's first update. `None`: those of the policy, gradient stopped
    /// (exact when a batch gets one optimiser step).
    pub proximal_logprobs: Option<Vec<f64>>,
    /// Log-probs under the frozen reference; needed when [`Loss::needs_reference`](super::Loss::needs_reference).
    pub ref_logprobs: Option<Vec<f64>>,
    /// Entropies of the policy at each token; for the metric, the bonus and the top-entropy filter.
    pub entropies: Option<Vec<f64>>,
    /// Credit of each token.
    pub advantages: Vec<f64>,
    /// True on tokens that the policy sampled and that are to be trained on.
    pub loss_mask: Vec<bool>,
    /// Live tokens of all sequences of its prompt group, its own included; for `loss_aggregation = "prompt_mean"`.
    pub group_tokens: u64,
}

impl SequenceInput {
    /// Live tokens: what a sequence adds to [`BatchTotals::tokens`](super::BatchTotals) and to its group's tokens.
    pub fn live_tokens(&self) -> u64 {
        live_tokens(&self.loss_mask, &self.behaviour_logprobs)
    }
}

/// Live tokens of a sequence of which only mask and behaviour log-probs are known yet.
pub fn live_tokens<T: Copy + Into<f64>>(loss_mask: &[bool], behaviour_logprobs: &[T]) -> u64 {
    let live = |(&mask, &logprob): (&bool, &T)| mask && logprob.into().is_finite();
    loss_mask.iter().zip(behaviour_logprobs).filter(|&pair| live(pair)).count() as u64
}

/// f32 values as f64.
pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// A live token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token {
    /// Its place in the sequence.
    pub index: usize,
    /// Policy log-prob.
    pub policy: f64,
    /// Behaviour log-prob.
    pub behaviour: f64,
    /// Proximal log-prob, a constant.
    pub proximal: f64,
    /// Reference log-prob.
    pub reference: Option<f64>,
    /// Policy entropy.
    pub entropy: Option<f64>,
    /// Credit.
    pub advantage: f64,
    /// Policy over anchor, logarithm, clamped.
    pub log_ratio: f64,
    /// `exp(log_ratio)`.
    pub ratio: f64,
    /// d ratio / d policy log-prob: the ratio, or 0 where the logarithm was clamped.
    pub slope: f64,
}

/// The live tokens of one sequence; T of them from here on.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// As [`SequenceInput::id`].
    pub id: u64,
    /// Live tokens in order.
    pub tokens: Vec<Token>,
}

impl Sequence {
    /// Takes the live tokens of `input`; ratios are policy over `anchor`.
    ///
    /// # Panics
    /// If the per-token fields differ in length: a bug of the caller.
    pub fn new(input: &SequenceInput, anchor: RatioAnchor) -> Self {
        let len = input.policy_logprobs.len();
        let optional = [&input.proximal_logprobs, &input.ref_logprobs, &input.entropies];
        assert!(
            input.behaviour_logprobs.len() == len
                && input.advantages.len() == len
                && input.loss_mask.len() == len
                && optional.iter().all(|field| field.as_ref().is_none_or(|values| values.len() == len)),
            "per-token fields of one sequence have one length"
        );
        let drawable = |t: usize| input.policy_logprobs[t] != f64::NEG_INFINITY;
        let live = |&t: &usize| input.loss_mask[t] && input.behaviour_logprobs[t].is_finite() && drawable(t);
        Self { id: input.id, tokens: (0..len).filter(live).map(|t| token(input, anchor, t)).collect() }
    }

    /// T, as a float.
    pub fn len_f64(&self) -> f64 {
        self.tokens.len() as f64
    }

    /// Mean advantage; sequence-level objectives have one advantage for all tokens.
    pub fn advantage(&self) -> f64 {
        match self.tokens.as_slice() {
            [] => 0.0,
            // Not the mean where all are alike: rounding must not turn 0.1 into 0.1 + 1 ulp.
            [first, rest @ ..] if rest.iter().all(|t| t.advantage == first.advantage) => first.advantage,
            tokens => tokens.iter().map(|t| t.advantage).sum::<f64>() / self.len_f64(),
        }
    }

    /// Sum of the log-ratios.
    pub fn log_ratio_sum(&self) -> f64 {
        self.tokens.iter().map(|t| t.log_ratio).sum()
    }

    /// Sum over tokens of proximal minus behaviour log-probs, each clamped.
    pub fn log_rho_sum(&self) -> f64 {
        self.tokens.iter().map(Token::log_rho).sum()
    }
}

impl Token {
    /// Proximal over behaviour, logarithm, clamped: how far trainer and sampler were apart before any update.
    pub fn log_rho(&self) -> f64 {
        clamp_log(self.proximal - self.behaviour)
    }

    /// Policy over behaviour, logarithm, clamped: both gaps at once.
    pub fn log_w(&self) -> f64 {
        clamp_log(self.policy - self.behaviour)
    }
}

/// Clamps a log-ratio; NaN stays NaN, so that a broken forward pass shows in the loss.
pub fn clamp_log(log_ratio: f64) -> f64 {
    log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
}

fn token(input: &SequenceInput, anchor: RatioAnchor, t: usize) -> Token {
    let policy = input.policy_logprobs[t];
    let behaviour = input.behaviour_logprobs[t];
    let proximal = input.proximal_logprobs.as_ref().map_or(policy, |values| values[t]);
    let raw = policy
        - match anchor {
            RatioAnchor::Behaviour => behaviour,
            RatioAnchor::Proximal => proximal,
        };
    let log_ratio = clamp_log(raw);
    let ratio = log_ratio.exp();
    Token {
        index: t,
        policy,
        behaviour,
        proximal,
        reference: input.ref_logprobs.as_ref().map(|values| values[t]),
        entropy: input.entropies.as_ref().map(|values| values[t]),
        advantage: input.advantages[t],
        log_ratio,
        ratio,
        slope: if raw.abs() > LOG_RATIO_LIMIT { 0.0 } else { ratio },
    }
}
