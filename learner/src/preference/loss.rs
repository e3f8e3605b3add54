//! Losses on preferences, in f64, with their derivatives.
//!
//! β is `beta`, σ the logistic function, ρ = Σ (log π − log π_ref) over a completion's tokens.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceLoss {
    /// −log σ(β(ρ⁺ − ρ⁻)) (Rafailov et al., arXiv 2305.18290); with `label_smoothing` ε, (1−ε) of it and ε of the reverse.
    #[default]
    Dpo,
    /// (ρ⁺/T⁺ − ρ⁻/T⁻ − 1/(2β))² with the completions' lengths T (Azar et al., arXiv 2310.12036, as TRL averages it).
    Ipo,
    /// max(0, 1 − β(ρ⁺ − ρ⁻)) (Zhao et al., arXiv 2305.10425).
    Hinge,
    /// DPO without the bias of wrong labels, of which there is a share of `label_smoothing` (Chowdhury et al., arXiv 2403.00409).
    Robust,
    /// −log σ(β(ρ⁺/T⁺ − ρ⁻/T⁻)): DPO per token.
    DpoNorm,
    /// Completions on their own: weight · (1 − σ(β(ρ − z))) where wanted, weight · (1 − σ(β(z − ρ))) where not, z being the mean
    /// divergence from the reference on mismatched completions (Ethayarajh et al., arXiv 2402.01306).
    Kto,
    /// KTO with z = 0 (APO-zero of D'Oosterlinck et al., arXiv 2408.06266, unpaired as in TRL).
    ApoZeroUnpaired,
}

impl PreferenceLoss {
    /// Whether completions come in pairs; if not, each one has a label.
    pub fn is_paired(self) -> bool {
        !matches!(self, Self::Kto | Self::ApoZeroUnpaired)
    }
}

/// Settings of the losses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preference {
    /// Which loss.
    pub loss: PreferenceLoss,
    /// How far the policy may go from the reference: less is further. Above 0.
    pub beta: f64,
    /// Share of labels taken for wrong, in [0, 0.5).
    pub label_smoothing: f64,
    /// Weight of wanted completions in KTO.
    pub desirable_weight: f64,
    /// Weight of unwanted completions in KTO.
    pub undesirable_weight: f64,
}

/// A completion: its log-probs summed, nats, and its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summed {
    /// Under the policy.
    pub policy: f64,
    /// Under the reference.
    pub reference: f64,
    /// Tokens, at least 1.
    pub tokens: usize,
}

impl Summed {
    /// ρ
    pub fn log_ratio(&self) -> f64 {
        self.policy - self.reference
    }

    fn per_token(&self) -> f64 {
        self.log_ratio() / self.tokens as f64
    }
}

/// Loss of a pair and its derivatives by the policy's summed log-probs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairTerm {
    /// Loss.
    pub loss: f64,
    /// By that of the chosen completion.
    pub d_chosen: f64,
    /// By that of the rejected completion.
    pub d_rejected: f64,
}

impl Preference {
    /// Loss of one pair.
    ///
    /// # Panics
    /// If the loss is not of pairs.
    pub fn pair(&self, chosen: &Summed, rejected: &Summed) -> PairTerm {
        let (beta, smoothing) = (self.beta, self.label_smoothing);
        let margin = beta * (chosen.log_ratio() - rejected.log_ratio());
        let sums =
            |loss: f64, slope: f64| PairTerm { loss, d_chosen: beta * slope, d_rejected: -beta * slope };
        let means = |loss: f64, slope: f64| PairTerm {
            loss,
            d_chosen: slope / chosen.tokens as f64,
            d_rejected: -slope / rejected.tokens as f64,
        };
        match self.loss {
            PreferenceLoss::Dpo => {
                let loss = -(1.0 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin);
                sums(loss, smoothing * sigmoid(margin) - (1.0 - smoothing) * sigmoid(-margin))
            }
            PreferenceLoss::Robust => {
                let share = 1.0 - 2.0 * smoothing;
                let loss =
                    (smoothing * log_sigmoid(-margin) - (1.0 - smoothing) * log_sigmoid(margin)) / share;
                sums(loss, (-smoothing * sigmoid(margin) - (1.0 - smoothing) * sigmoid(-margin)) / share)
            }
            PreferenceLoss::Hinge => sums((1.0 - margin).max(0.0), if margin < 1.0 { -1.0 } else { 0.0 }),
            PreferenceLoss::Ipo => {
                let off = chosen.per_token() - rejected.per_token() - 1.0 / (2.0 * beta);
                means(off * off, 2.0 * off)
            }
            PreferenceLoss::DpoNorm => {
                let margin = beta * (chosen.per_token() - rejected.per_token());
                means(-log_sigmoid(margin), -beta * sigmoid(-margin))
            }
            PreferenceLoss::Kto | PreferenceLoss::ApoZeroUnpaired => panic!("{:?} has no pairs", self.loss),
        }
    }

    /// Loss of one completion and its derivative by the policy's summed log-probs; `divergence` is z, at least 0.
    ///
    /// # Panics
    /// If the loss is of pairs.
    pub fn single(&self, completion: &Summed, desirable: bool, divergence: f64) -> (f64, f64) {
        let z = match self.loss {
            PreferenceLoss::Kto => divergence,
            PreferenceLoss::ApoZeroUnpaired => 0.0,
            _ => panic!("{:?} is of pairs", self.loss),
        };
        let (weight, sign) =
            if desirable { (self.desirable_weight, 1.0) } else { (self.undesirable_weight, -1.0) };
        let good = sigmoid(sign * self.beta * (completion.log_ratio() - z));
        (weight * (1.0 - good), -weight * sign * self.beta * good * (1.0 - good))
    }
}

/// −log σ(chosen − rejected − margin) and its derivative by the chosen score (by the rejected one it is the negative)
/// (Bradley and Terry 1952).
pub fn bradley_terry(chosen: f64, rejected: f64, margin: f64) -> (f64, f64) {
    let difference = chosen - rejected - margin;
    (-log_sigmoid(difference), -sigmoid(-difference))
}

/// σ(x)
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// log σ(x), without overflow.
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIRED: [PreferenceLoss; 5] = [
        PreferenceLoss::Dpo,
        PreferenceLoss::Ipo,
        PreferenceLoss::Hinge,
        PreferenceLoss::Robust,
        PreferenceLoss::DpoNorm,
    ];

    fn settings(loss: PreferenceLoss) -> Preference {
        Preference { loss, beta: 0.3, label_smoothing: 0.1, desirable_weight: 1.3, undesirable_weight: 0.8 }
    }

    #[test]
    fn derivatives_are_those_of_the_losses() {
        let h = 1e-5;
        for (c, r) in [(-3.0, -5.0), (-9.0, -2.0), (0.5, 0.4)] {
            let at = |policy, tokens| Summed { policy, reference: -4.0, tokens };
            for loss in PAIRED {
                let of = |c, r| settings(loss).pair(&at(c, 3), &at(r, 7));
                let term = of(c, r);
                for (got, up, down) in [
                    (term.d_chosen, of(c + h, r).loss, of(c - h, r).loss),
                    (term.d_rejected, of(c, r + h).loss, of(c, r - h).loss),
                ] {
                    let want = (up - down) / (2.0 * h);
                    assert!((got - want).abs() <= 1e-7, "{loss:?}: {got}, not {want}");
                }
            }
            for (loss, desirable) in [PreferenceLoss::Kto, PreferenceLoss::ApoZeroUnpaired]
                .into_iter()
                .flat_map(|loss| [(loss, true), (loss, false)])
            {
                let of = |c| settings(loss).single(&at(c, 3), desirable, 0.7);
                let want = (of(c + h).0 - of(c - h).0) / (2.0 * h);
                assert!((of(c).1 - want).abs() <= 1e-7, "{loss:?}: {}, not {want}", of(c).1);
            }
            let want = (bradley_terry(c + h, r, 0.2).0 - bradley_terry(c - h, r, 0.2).0) / (2.0 * h);
            assert!((bradley_terry(c, r, 0.2).1 - want).abs() <= 1e-7);
        }
    }

    #[test]
    fn far_apart_scores_give_finite_losses() {
        for x in [-1e4, 1e4] {
            let (loss, slope) = bradley_terry(x, 0.0, 0.0);
            assert!(loss.is_finite() && slope.is_finite(), "{x}: {loss}, {slope}");
        }
        assert!((log_sigmoid(-1e4) + 1e4).abs() <= 1e-9);
    }
}
