//! DPO, IPO, KTO, their relatives and Bradley–Terry against golden values of TRL.

mod oracle;

use freewheel_learner::preference::loss::{Preference, PreferenceLoss, Summed, bradley_terry};
use oracle::{Oracle, max_diff};
use serde_json::Value;

struct Rows {
    logp: Vec<f64>,
    logp_ref: Vec<f64>,
    mask: Vec<f64>,
    columns: usize,
}

impl Rows {
    /// Tokens of row `i`: the log-prob in column t belongs to position t + 1.
    fn tokens(&self, i: usize) -> impl Iterator<Item = usize> {
        (0..self.columns).filter(move |t| self.mask[i * (self.columns + 1) + t + 1] == 1.0)
    }

    fn summed(&self, i: usize) -> Summed {
        let sum = |values: &[f64]| self.tokens(i).map(|t| values[i * self.columns + t]).sum();
        Summed { policy: sum(&self.logp), reference: sum(&self.logp_ref), tokens: self.tokens(i).count() }
    }

    fn spread(&self, i: usize, slope: f64, grad: &mut [f64]) {
        self.tokens(i).for_each(|t| grad[i * self.columns + t] = slope);
    }
}

fn settings(config: &Value) -> Preference {
    let number = |key: &str, default: f64| config[key].as_f64().unwrap_or(default);
    Preference {
        loss: match config["loss_type"].as_str().unwrap() {
            "sigmoid" => PreferenceLoss::Dpo,
            "ipo" => PreferenceLoss::Ipo,
            "hinge" => PreferenceLoss::Hinge,
            "robust" => PreferenceLoss::Robust,
            "sigmoid_norm" => PreferenceLoss::DpoNorm,
            "kto" => PreferenceLoss::Kto,
            "apo_zero_unpaired" => PreferenceLoss::ApoZeroUnpaired,
            other => panic!("{other} is not known"),
        },
        beta: number("beta", 0.1),
        label_smoothing: number("label_smoothing", 0.0),
        desirable_weight: number("desirable_weight", 1.0),
        undesirable_weight: number("undesirable_weight", 1.0),
    }
}

#[test]
fn losses_and_gradients_are_trls() {
    let oracle = Oracle::open("rl/preference");
    let pairs = oracle.cases["pairs"].as_u64().unwrap() as usize;
    let (shape, logp) = oracle.tensor("logp");
    let rows = Rows {
        logp,
        logp_ref: oracle.values("logp_ref"),
        mask: oracle.values("completion_mask"),
        columns: shape[1],
    };
    let scores = oracle.values("bt/scores");
    let mut held = Vec::new();
    for case in oracle.cases["cases"].as_array().unwrap() {
        let (name, config) = (case["name"].as_str().unwrap(), &case["config"]);
        let share = 1.0 / pairs as f64;
        let (mut loss, mut grad) = (0.0, vec![0.0; rows.logp.len()]);
        match case["family"].as_str().unwrap() {
            "dpo" => {
                for i in 0..pairs {
                    let term = settings(config).pair(&rows.summed(i), &rows.summed(pairs + i));
                    loss += share * term.loss;
                    rows.spread(i, share * term.d_chosen, &mut grad);
                    rows.spread(pairs + i, share * term.d_rejected, &mut grad);
                }
            }
            "kto" => {
                let (kl, kl_ref) = (oracle.values("kto/kl_logp"), oracle.values("kto/kl_logp_ref"));
                let gap = kl.iter().zip(&kl_ref).zip(0..).map(|((a, b), at)| {
                    let (i, t) = (at / rows.columns, at % rows.columns);
                    if rows.tokens(i).any(|token| token == t) { a - b } else { 0.0 }
                });
                let divergence = (gap.sum::<f64>() / (2 * pairs) as f64).max(0.0);
                if config["loss_type"] == "kto" {
                    assert!(
                        (divergence - case["kl"].as_f64().unwrap()).abs() <= 1e-9,
                        "{name}: {divergence}"
                    );
                }
                for (i, label) in oracle.values("kto/label").into_iter().enumerate() {
                    let (term, slope) = settings(config).single(&rows.summed(i), label == 1.0, divergence);
                    loss += share / 2.0 * term;
                    rows.spread(i, share / 2.0 * slope, &mut grad);
                }
            }
            _ => {
                grad.truncate(2 * pairs);
                let centre = config["center_rewards_coefficient"].as_f64().unwrap_or(0.0);
                let margins = oracle.values("bt/margin");
                for i in 0..pairs {
                    let margin = if config["margin"] == true { margins[i] } else { 0.0 };
                    let (term, slope) = bradley_terry(scores[i], scores[pairs + i], margin);
                    let sum = scores[i] + scores[pairs + i];
                    loss += share * (term + centre * sum * sum);
                    grad[i] = share * (slope + 2.0 * centre * sum);
                    grad[pairs + i] = share * (-slope + 2.0 * centre * sum);
                }
            }
        }
        let expected = case["loss"].as_f64().unwrap();
        assert!((loss - expected).abs() <= 1e-9, "{name}: loss {loss}, TRL {expected}");
        let diff = max_diff(&grad, &oracle.values(case["grad"].as_str().unwrap()));
        assert!(diff <= 1e-8, "{name}: gradient off by {diff}");
        held.push(name);
    }
    assert_eq!(held.len(), 12, "{held:?}");
}
