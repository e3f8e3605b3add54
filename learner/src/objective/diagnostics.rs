//! What a step reports about its objective: sums that add up over sequences and micro-batches.

use super::sequence::{Sequence, clamp_log};
use super::{Clip, Term};

/// Sums over live tokens and sequences. Add up with [`Diagnostics::merge`]; read with the methods.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Diagnostics {
    /// Live tokens.
    pub tokens: u64,
    /// Sequences with a live token.
    pub sequences: u64,
    /// Tokens clipped from below (ratio too small, negative advantage).
    pub clipped_low: u64,
    /// Tokens clipped from above (ratio too large).
    pub clipped_high: u64,
    /// Tokens that a correction dropped.
    pub rejected: u64,
    /// Tokens with |log ρ| above 1e-6.
    pub mismatched: u64,
    /// Sum of ratios policy / anchor.
    pub ratio_sum: f64,
    /// Largest ratio.
    pub ratio_max: f64,
    /// Sum of ρ − log ρ − 1, ρ = proximal / behaviour.
    pub mismatch_kl_sum: f64,
    /// Largest |log ρ|, not clamped.
    pub logprob_abs_max: f64,
    /// Sum of k3 against the reference.
    pub kl_ref_sum: f64,
    /// Tokens that had a reference log-prob.
    pub kl_ref_tokens: u64,
    /// Sum of entropies.
    pub entropy_sum: f64,
    /// Tokens that had an entropy.
    pub entropy_tokens: u64,
    /// Sum over sequences of the weight Π policy / behaviour (logarithm clamped).
    pub weight_sum: f64,
    /// Sum of its squares.
    pub weight_square_sum: f64,
}

impl Diagnostics {
    pub(super) fn of(sequence: &Sequence, terms: &[Term], factors: &[f64]) -> Self {
        let mut sums = Self::default();
        if sequence.tokens.is_empty() {
            return sums;
        }
        sums.sequences = 1;
        let mut log_weight = 0.0;
        for ((token, term), factor) in sequence.tokens.iter().zip(terms).zip(factors) {
            sums.tokens += 1;
            sums.clipped_low += u64::from(term.clip == Clip::Low);
            sums.clipped_high += u64::from(term.clip == Clip::High);
            sums.rejected += u64::from(*factor == 0.0);
            sums.ratio_sum += token.ratio;
            sums.ratio_max = sums.ratio_max.max(token.ratio);
            let log_rho = token.log_rho();
            sums.mismatch_kl_sum += log_rho.exp_m1() - log_rho;
            sums.mismatched += u64::from((token.proximal - token.behaviour).abs() > 1e-6);
            sums.logprob_abs_max = sums.logprob_abs_max.max((token.proximal - token.behaviour).abs());
            if let Some(reference) = token.reference {
                let d = clamp_log(reference - token.policy);
                sums.kl_ref_sum += d.exp_m1() - d;
                sums.kl_ref_tokens += 1;
            }
            if let Some(entropy) = token.entropy {
                sums.entropy_sum += entropy;
                sums.entropy_tokens += 1;
            }
            log_weight += token.policy - token.behaviour;
        }
        let weight = clamp_log(log_weight).exp();
        sums.weight_sum = weight;
        sums.weight_square_sum = weight * weight;
        sums
    }

    /// Adds another part of the batch.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.sequences += other.sequences;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.rejected += other.rejected;
        self.mismatched += other.mismatched;
        self.ratio_sum += other.ratio_sum;
        self.ratio_max = self.ratio_max.max(other.ratio_max);
        self.mismatch_kl_sum += other.mismatch_kl_sum;
        self.logprob_abs_max = self.logprob_abs_max.max(other.logprob_abs_max);
        self.kl_ref_sum += other.kl_ref_sum;
        self.kl_ref_tokens += other.kl_ref_tokens;
        self.entropy_sum += other.entropy_sum;
        self.entropy_tokens += other.entropy_tokens;
        self.weight_sum += other.weight_sum;
        self.weight_square_sum += other.weight_square_sum;
    }

    /// `train/clip_fraction`: clipped tokens over all.
    pub fn clip_fraction(&self) -> f64 {
        share(self.clipped_low as f64 + self.clipped_high as f64, self.tokens).unwrap_or(0.0)
    }

    /// `train/clip_low`: tokens clipped from below, where failures become too unlikely, over all.
    pub fn clip_low_fraction(&self) -> f64 {
        share(self.clipped_low as f64, self.tokens).unwrap_or(0.0)
    }

    /// `mismatch/fraction`: tokens on which sampler and learner differ by more than 1e-6, over all.
    pub fn mismatch_fraction(&self) -> f64 {
        share(self.mismatched as f64, self.tokens).unwrap_or(0.0)
    }

    /// `train/rejected`: tokens that a correction dropped, over all.
    pub fn rejected_fraction(&self) -> f64 {
        share(self.rejected as f64, self.tokens).unwrap_or(0.0)
    }

    /// Mean ratio; 1 with no tokens.
    pub fn ratio_mean(&self) -> f64 {
        share(self.ratio_sum, self.tokens).unwrap_or(1.0)
    }

    /// `mismatch/kl`: mean of ρ − log ρ − 1.
    pub fn mismatch_kl(&self) -> f64 {
        share(self.mismatch_kl_sum, self.tokens).unwrap_or(0.0)
    }

    /// `train/kl_ref`: mean k3 against the reference, if there is one.
    pub fn kl_ref(&self) -> Option<f64> {
        share(self.kl_ref_sum, self.kl_ref_tokens)
    }

    /// `train/entropy`: mean entropy, if known.
    pub fn entropy(&self) -> Option<f64> {
        share(self.entropy_sum, self.entropy_tokens)
    }

    /// `train/ess`: effective sample size of the sequence weights over the number of sequences, in (0, 1]:
    /// (Σ W)² / (n Σ W²).
    pub fn ess(&self) -> f64 {
        match self.sequences {
            0 => 1.0,
            n => self.weight_sum * self.weight_sum / (n as f64 * self.weight_square_sum),
        }
    }
}

fn share(sum: f64, count: u64) -> Option<f64> {
    (count > 0).then(|| sum / count as f64)
}
