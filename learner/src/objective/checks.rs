//! What holds for every objective: the list at the end of section 1 of the formula sheet, held against all rows of the table.

use freewheel_types::CounterRng;

use super::*;
use crate::advantage::Advantage;

const LENGTHS: [usize; 4] = [5, 1, 7, 3];

/// Four sequences with masked tokens, ratios around 1 and both signs of advantage; `spread` 0 gives w = 1 everywhere.
fn batch(spread: f64) -> Vec<SequenceInput> {
    let rng = CounterRng::new(11, 5);
    let mut draw = 0;
    let mut normal = |scale: f64| {
        draw += 1;
        scale * rng.normal(draw)
    };
    let mut batch: Vec<SequenceInput> = LENGTHS
        .iter()
        .zip([0.9, -0.6, -1.1, 0.4])
        .zip(1..)
        .map(|((&len, advantage), id)| {
            let behaviour: Vec<f64> = (0..len).map(|_| -1.5 - normal(0.4).abs()).collect();
            let near = |base: &[f64], normal: &mut dyn FnMut(f64) -> f64| {
                base.iter().map(|x| x + normal(spread)).collect()
            };
            let proximal: Vec<f64> = near(&behaviour, &mut normal);
            SequenceInput {
                id,
                policy_logprobs: near(&proximal, &mut normal),
                ref_logprobs: Some(near(&behaviour, &mut normal)),
                entropies: Some((0..len).map(|t| 0.5 + 0.1 * t as f64).collect()),
                proximal_logprobs: Some(proximal),
                behaviour_logprobs: behaviour,
                advantages: vec![advantage; len],
                loss_mask: (0..len).map(|t| t % 4 != 2).collect(),
                group_tokens: 0,
            }
        })
        .collect();
    for pair in batch.chunks_mut(2) {
        let tokens = pair.iter().map(SequenceInput::live_tokens).sum();
        pair.iter_mut().for_each(|sequence| sequence.group_tokens = tokens);
    }
    batch
}

fn totals(batch: &[SequenceInput]) -> BatchTotals {
    BatchTotals {
        tokens: batch.iter().map(SequenceInput::live_tokens).sum(),
        sequences: batch.len() as u64,
        prompts: batch.len() as u64 / 2,
        length_max: 16,
    }
}

/// Loss and gradients of `batch` under `config`, thresholds measured on `batch` itself.
fn run(config: &ObjectiveConfig, batch: &[SequenceInput]) -> (f64, Vec<Vec<f64>>) {
    let loss = Loss::new(config).unwrap();
    let stats = loss.batch_stats(batch);
    let parts: Vec<SequenceLoss> = batch.iter().map(|s| loss.sequence(s, &totals(batch), &stats)).collect();
    (parts.iter().map(|p| p.loss).sum(), parts.into_iter().map(|p| p.d_logprobs_f64).collect())
}

fn configs() -> impl Iterator<Item = ObjectiveConfig> {
    RECIPES.iter().map(|recipe| ObjectiveConfig { objective: recipe.objective, ..Default::default() })
}

/// Objectives whose loss differentiates to their gradient; in the others the weight is a stop-gradient, so the difference
/// quotient is taken with the weights held.
fn stop_gradient(objective: Objective) -> bool {
    use Objective::{Aipo, Cispo, Dppo, DppoSymmetric, ReinforceUnbiased, Topr, Vespo};
    matches!(objective, Aipo | Cispo | Dppo | DppoSymmetric | ReinforceUnbiased | Topr | Vespo)
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let kl = ObjectiveConfig { kl_coef: 0.3, ..Default::default() };
    let variants = [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3].into_iter().flat_map(|kl_estimator| {
        [true, false].map(|weighted| ObjectiveConfig {
            objective: Objective::Grpo,
            kl_estimator,
            kl_importance_weighted: Some(weighted),
            ..kl.clone()
        })
    });
    let grpo = ObjectiveConfig { objective: Objective::Grpo, ..Default::default() };
    let stages = [
        ObjectiveConfig { anchor_coef: 0.3, ..grpo.clone() },
        ObjectiveConfig {
            covariance_control: CovarianceControl::Kl,
            covariance_fraction: Some(0.3),
            covariance_kl_coef: Some(0.7),
            ..grpo.clone()
        },
        ObjectiveConfig {
            covariance_control: CovarianceControl::Clip,
            covariance_fraction: Some(0.3),
            covariance_low: Some(0.0),
            ..grpo.clone()
        },
        ObjectiveConfig { correction: Some(Correction::Tis), correction_normalise: true, ..grpo },
    ];
    for config in configs().filter(|c| !stop_gradient(c.objective)).chain(variants).chain(stages) {
        let batch = batch(0.25);
        let loss = Loss::new(&config).unwrap();
        let (totals, mut stats) = (totals(&batch), loss.batch_stats(&batch));
        // The token at the limit itself must not cross it while it is moved.
        stats.m2po_limit = stats.m2po_limit.map(|limit| limit * 1.001);
        for sequence in &batch {
            let analytic = loss.sequence(sequence, &totals, &stats).d_logprobs_f64;
            for (t, &expected) in analytic.iter().enumerate() {
                // Proximal log-probs are constants here, so that only the policy moves.
                let at = |h: f64| {
                    let mut moved = sequence.clone();
                    moved.policy_logprobs[t] += h;
                    loss.sequence(&moved, &totals, &stats).loss
                };
                let h = 1e-6;
                let numeric = (at(h) - at(-h)) / (2.0 * h);
                let error = (numeric - expected).abs();
                assert!(
                    error <= 1e-7 * expected.abs().max(1.0),
                    "{config:?}: token {t}: {numeric} vs {expected}"
                );
            }
        }
    }
}

#[test]
fn stop_gradient_objectives_descend_weight_times_advantage() {
    let batch = batch(0.25);
    for config in configs().filter(|c| stop_gradient(c.objective)) {
        let loss = Loss::new(&config).unwrap();
        for sequence in &batch {
            let out = loss.sequence(sequence, &totals(&batch), &BatchStats::default());
            // loss = Σ gradient · log π at the current point, by definition of the form.
            let product: f64 =
                out.d_logprobs_f64.iter().zip(&sequence.policy_logprobs).map(|(g, x)| g * x).sum();
            assert!((product - out.loss).abs() <= 1e-12, "{config:?}");
        }
    }
}

/// Weights by hand for the stop-gradient forms, since no difference quotient sees them.
#[test]
fn stop_gradient_weights_by_hand() {
    let sequence = |advantage: f64| SequenceInput {
        policy_logprobs: vec![-1.0, -2.0],
        behaviour_logprobs: vec![-3.0, -1.5],
        advantages: vec![advantage; 2],
        loss_mask: vec![true; 2],
        ..Default::default()
    };
    let totals = BatchTotals { tokens: 1, sequences: 1, prompts: 1, length_max: 2 };
    let gradient = |objective, advantage: f64| {
        let config = ObjectiveConfig {
            objective,
            loss_aggregation: Some(LossAggregation::TokenMean),
            ..Default::default()
        };
        Loss::new(&config)
            .unwrap()
            .sequence(&sequence(advantage), &totals, &BatchStats::default())
            .d_logprobs_f64
    };
    let close = |got: Vec<f64>, want: [f64; 2]| {
        got.iter().zip(want).for_each(|(a, b)| assert!((a - b).abs() <= 1e-12, "{got:?}, expected {want:?}"));
    };
    let (w0, w1) = (2f64.exp(), (-0.5f64).exp());
    close(gradient(Objective::Aipo, 0.5), [-4.0 * 0.5, -w1 * 0.5]);
    close(gradient(Objective::Cispo, -0.5), [5.0 * 0.5, w1 * 0.5]);
    // π − μ = 0.32 and −0.09: the first token has left the region upwards.
    close(gradient(Objective::Dppo, 1.0), [0.0, -w1]);
    close(gradient(Objective::Dppo, -1.0), [w0, w1]);
    // The symmetric region of ±0.1 holds the first back whatever the sign, and not the second.
    close(gradient(Objective::DppoSymmetric, 1.0), [0.0, -w1]);
    close(gradient(Objective::DppoSymmetric, -1.0), [0.0, w1]);
    close(gradient(Objective::ReinforceUnbiased, 1.0), [-1.5f64.exp(); 2]);
    // Π w = e^1.5, above the cap of 1.
    close(gradient(Objective::Topr, -2.0), [2.0, 2.0]);
    close(gradient(Objective::Topr, 2.0), [-2.0, -2.0]);
    let w = 1.5f64.exp();
    let phi = |k: f64, lambda: f64| w.powf(k) * (lambda * (1.0 - w)).exp();
    close(gradient(Objective::Vespo, 1.0), [-phi(2.0, 3.0); 2]);
    close(gradient(Objective::Vespo, -1.0), [phi(3.0, 2.0); 2]);
}

#[test]
fn on_policy_every_objective_is_plain_policy_gradient() {
    let batch = batch(0.0);
    for config in configs().filter(|c| !matches!(c.objective, Objective::Oapl | Objective::MirrorDescent)) {
        let reinforce = ObjectiveConfig {
            objective: Objective::Reinforce,
            loss_aggregation: Some(config.aggregation()),
            ..Default::default()
        };
        // A product over the sequence carries the whole sequence's weight to every token: sequence-sum aggregation.
        let product = config.objective == Objective::Rloo;
        let aggregation =
            if product { Some(LossAggregation::SeqMeanTokenSum) } else { reinforce.loss_aggregation };
        let (_, expected) = run(&ObjectiveConfig { loss_aggregation: aggregation, ..reinforce }, &batch);
        let (_, got) = run(&config, &batch);
        for (a, b) in got.iter().flatten().zip(expected.iter().flatten()) {
            assert!((a - b).abs() <= 1e-12, "{:?}: {a} vs {b}", config.objective);
        }
    }
}

#[test]
fn masked_tokens_change_nothing_even_if_they_are_nan() {
    let clean = batch(0.25);
    let mut dirty = clean.clone();
    for sequence in &mut dirty {
        for t in (0..sequence.loss_mask.len()).filter(|&t| !sequence.loss_mask[t]) {
            let fields =
                [&mut sequence.policy_logprobs, &mut sequence.behaviour_logprobs, &mut sequence.advantages];
            let optional =
                [&mut sequence.proximal_logprobs, &mut sequence.ref_logprobs, &mut sequence.entropies];
            fields.into_iter().chain(optional.into_iter().flatten()).for_each(|field| field[t] = f64::NAN);
        }
    }
    for config in configs() {
        let config = ObjectiveConfig {
            kl_coef: 0.1,
            entropy_coef: 0.01,
            top_entropy: Some(0.9),
            opsm_delta: Some(1.0),
            ..config
        };
        let (a, b) = (run(&config, &clean), run(&config, &dirty));
        assert!(a.0.is_finite());
        assert_eq!(a, b, "{:?}", config.objective);
    }
}

#[test]
fn a_token_without_a_finite_behaviour_logprob_does_not_count() {
    let mut batch = batch(0.25);
    batch[0].behaviour_logprobs[0] = f64::NEG_INFINITY;
    let mut masked = batch.clone();
    masked[0].loss_mask[0] = false;
    assert_eq!(totals(&batch), totals(&masked));
    for config in configs() {
        assert_eq!(run(&config, &batch), run(&config, &masked), "{:?}", config.objective);
    }
}

#[test]
fn a_nan_in_a_live_token_shows_in_the_loss() {
    for config in configs() {
        let mut batch = batch(0.1);
        batch[3].policy_logprobs[0] = f64::NAN;
        assert!(run(&config, &batch).0.is_nan(), "{:?} hides a broken forward pass", config.objective);
    }
}

#[test]
fn a_token_that_the_policy_cannot_draw_any_more_has_no_gradient() {
    for config in configs() {
        let mut batch = batch(0.1);
        batch[0].policy_logprobs[0] = f64::NEG_INFINITY;
        let (loss, gradients) = run(&config, &batch);
        assert!(
            loss.is_finite() && gradients.iter().flatten().all(|g| g.is_finite()),
            "{:?}",
            config.objective
        );
        assert_eq!(gradients[0][0], 0.0);
    }
}

#[test]
fn a_sequence_gives_the_same_bits_in_any_micro_batch() {
    // Alone, or after others: a sequence's part depends on its input and on constants of the batch only.
    for config in configs() {
        let (loss, batch) = (Loss::new(&config).unwrap(), batch(0.25));
        let (totals, stats) = (totals(&batch), loss.batch_stats(&batch));
        let whole: Vec<SequenceLoss> = batch.iter().map(|s| loss.sequence(s, &totals, &stats)).collect();
        let fresh = Loss::new(&config).unwrap();
        for (sequence, expected) in batch.iter().zip(&whole).rev() {
            assert_eq!(&fresh.sequence(sequence, &totals, &stats), expected);
        }
        let mut merged = Diagnostics::default();
        whole.iter().for_each(|part| merged.merge(&part.diagnostics));
        assert_eq!(merged.tokens, totals.tokens);
        assert_eq!(merged.sequences, totals.sequences);
    }
}

#[test]
fn k3_is_never_negative_and_k3_plus_descends_k2() {
    for i in -400..=400 {
        let d = f64::from(i) * 0.1;
        let (k3, _) = KlEstimator::K3.evaluate(-1.0 + d, -1.0);
        assert!(k3 >= 0.0, "d = {d}: {k3}");
        let plus = KlEstimator::K3Plus.evaluate(-1.0 + d, -1.0);
        assert_eq!(plus, (k3, KlEstimator::K2.evaluate(-1.0 + d, -1.0).1));
    }
}

#[test]
fn the_token_form_of_gspo_equals_the_sequence_form() {
    let batch = batch(0.02);
    let config = ObjectiveConfig {
        objective: Objective::Gspo,
        clip_low: Some(0.5),
        clip_high: Some(0.5),
        ..Default::default()
    };
    let (loss, gradients) = run(&config, &batch);
    let mut expected = 0.0;
    for (sequence, gradient) in batch.iter().zip(&gradients) {
        let live: Vec<usize> = (0..sequence.loss_mask.len()).filter(|&t| sequence.loss_mask[t]).collect();
        let n = live.len() as f64;
        let mean =
            live.iter().map(|&t| sequence.policy_logprobs[t] - sequence.behaviour_logprobs[t]).sum::<f64>()
                / n;
        let gain = mean.exp() * sequence.advantages[0];
        expected -= gain / 4.0;
        for &t in &live {
            assert!((gradient[t] + gain / n / 4.0).abs() <= 1e-12);
        }
    }
    assert!((loss - expected).abs() <= 1e-12);
}

#[test]
fn rejected_tokens_do_not_shrink_the_denominator() {
    let batch = batch(0.5);
    let plain = ObjectiveConfig {
        objective: Objective::Dapo,
        ratio: Some(RatioAnchor::Proximal),
        ..Default::default()
    };
    let masked = ObjectiveConfig {
        correction: Some(Correction::Mis),
        correction_low: Some(0.9),
        correction_high: Some(1.1),
        ..plain.clone()
    };
    let ((_, all), (_, kept)) = (run(&plain, &batch), run(&masked, &batch));
    let mut dropped = 0;
    for (sequence, (all, kept)) in batch.iter().zip(all.iter().zip(&kept)) {
        for t in (0..all.len()).filter(|&t| sequence.loss_mask[t]) {
            let rho =
                (sequence.proximal_logprobs.as_ref().unwrap()[t] - sequence.behaviour_logprobs[t]).exp();
            let factor = if (0.9..=1.1).contains(&rho) { rho } else { 0.0 };
            dropped += usize::from(factor == 0.0);
            assert!((kept[t] - factor * all[t]).abs() <= 1e-12, "a kept token weighs ρ, no more");
        }
    }
    assert!(dropped > 3, "the band must bite for this to mean anything");
}

#[test]
fn normalised_weights_have_mean_one() {
    let batch = batch(0.5);
    for correction in [Correction::Tis, Correction::Mis, Correction::SeqTis] {
        // Reinforce with an advantage of 1 and a token sum: the gradient is minus the weight.
        let config = ObjectiveConfig {
            objective: Objective::Reinforce,
            correction: Some(correction),
            correction_normalise: true,
            loss_aggregation: Some(LossAggregation::SeqMeanTokenSum),
            ..Default::default()
        };
        let ones: Vec<SequenceInput> = batch
            .iter()
            .map(|s| SequenceInput { advantages: vec![1.0; s.advantages.len()], ..s.clone() })
            .collect();
        let (_, gradients) = run(&config, &ones);
        let weights: Vec<f64> = match correction {
            Correction::SeqTis => gradients.iter().map(|g| -4.0 * g[0]).collect(),
            _ => ones
                .iter()
                .zip(&gradients)
                .flat_map(|(s, g)| (0..g.len()).filter(|&t| s.loss_mask[t]).map(|t| -4.0 * g[t]))
                .collect(),
        };
        let mean = weights.iter().sum::<f64>() / weights.len() as f64;
        assert!((mean - 1.0).abs() <= 1e-12, "{correction:?}: mean weight {mean}");
    }
}

#[test]
fn clip_cov_takes_the_gradient_of_its_picks_and_leaves_the_rest() {
    let batch = batch(0.25);
    let plain = ObjectiveConfig { objective: Objective::Grpo, ..Default::default() };
    let held = ObjectiveConfig {
        covariance_control: CovarianceControl::Clip,
        covariance_fraction: Some(0.25),
        covariance_low: Some(0.0),
        ..plain.clone()
    };
    let ((_, all), (_, kept)) = (run(&plain, &batch), run(&held, &batch));
    let changed: Vec<(f64, f64)> =
        all.concat().into_iter().zip(kept.concat()).filter(|(a, b)| a != b).collect();
    assert!(!changed.is_empty() && changed.len() <= 3, "{changed:?}");
    assert!(changed.iter().all(|(_, kept)| *kept == 0.0));
}

#[test]
fn aggregations_by_hand() {
    let totals = BatchTotals { tokens: 10, sequences: 4, prompts: 2, length_max: 8 };
    let weights = [
        (LossAggregation::TokenMean, 0.1),
        (LossAggregation::SeqMeanTokenMean, 1.0 / 12.0),
        (LossAggregation::SeqMeanTokenSum, 0.25),
        (LossAggregation::FixedLength, 1.0 / 32.0),
        (LossAggregation::PromptMean, 0.1),
    ];
    for (aggregation, weight) in weights {
        assert_eq!(aggregation.weight(&totals, 3, 5), weight, "{aggregation:?}");
    }
}

#[test]
fn diagnostics_by_hand() {
    let sequence = SequenceInput {
        policy_logprobs: vec![-1.0, -2.0, f64::NAN],
        behaviour_logprobs: vec![-1.5, -2.0, -1.0],
        ref_logprobs: Some(vec![-1.0, -2.0, -1.0]),
        entropies: Some(vec![0.5, 1.5, 9.0]),
        advantages: vec![1.0; 3],
        loss_mask: vec![true, true, false],
        ..Default::default()
    };
    let config = ObjectiveConfig { objective: Objective::Dapo, ..Default::default() };
    let totals = BatchTotals { tokens: 2, sequences: 1, prompts: 1, length_max: 3 };
    let out = Loss::new(&config).unwrap().sequence(&sequence, &totals, &BatchStats::default());
    let d = out.diagnostics;
    assert_eq!((d.tokens, d.clipped_high, d.clipped_low), (2, 1, 0));
    assert_eq!(
        (d.clip_fraction(), d.logprob_abs_max, d.entropy(), d.kl_ref()),
        (0.5, 0.5, Some(1.0), Some(0.0))
    );
    assert!((d.mismatch_kl() - (0.5f64.exp() - 1.5) / 2.0).abs() <= 1e-12);
    let mut two = d;
    two.merge(&Diagnostics { sequences: 1, weight_sum: 1.0, weight_square_sum: 1.0, ..Default::default() });
    let w = 0.5f64.exp();
    assert!((two.ess() - (w + 1.0).powi(2) / (2.0 * (w * w + 1.0))).abs() <= 1e-12);
}

#[test]
fn every_advantage_is_somebodys_default_or_named() {
    // A table row that points at a wrong default would train the wrong thing in silence.
    let default = |objective| ObjectiveConfig { objective, ..Default::default() }.advantage_config().kind;
    assert_eq!(default(Objective::Grpo), Advantage::Grpo);
    assert_eq!(default(Objective::DrGrpo), Advantage::DrGrpo);
    assert_eq!(default(Objective::Rloo), Advantage::Rloo);
    assert_eq!(default(Objective::Oapl), Advantage::SoftValue);
    let shift = |objective| ObjectiveConfig { objective, ..Default::default() }.advantage_config().shift;
    assert_eq!((shift(Objective::AsymmetricReinforce), shift(Objective::Reinforce)), (-0.1, 0.0));
}
