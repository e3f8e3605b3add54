//! What an update does with a batch, whatever the objective.

use std::collections::BTreeMap;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{ParamLayout, Params};
use freewheel_types::{FinishReason, PolicyVersion, TaskId, Verdict, WeightsDtype};

use crate::assembly::{Arrival, Group};
use crate::batch::Batch;
use crate::config::LearnerConfig;
use crate::critic::Critic;
use crate::dual::Duals;
use crate::objective::{KlEstimator, KlPlacement, Loss, Objective, ObjectiveConfig, Proximal, RECIPES};
use crate::policy::Policy;
use crate::testing::{Bigram, TextOnly, VOCAB, params, scored};
use crate::trainer::{PackedBatch, PolicyTrainer, TokenGradients, TokenLogProbs};
use crate::update::{Helpers, UpdateRules, Updated, update};

/// The bigram model, whose log-prob and entropy of one token are NaN.
struct Poisoned {
    inner: Bigram,
    token: Option<u32>,
}

/// A token that no mask covers, wherever it occurs.
const LIVE: u32 = 3;

impl Poisoned {
    fn spoil(&self, batch: &PackedBatch, mut found: TokenLogProbs) -> TokenLogProbs {
        for (t, _) in batch.targets.iter().enumerate().filter(|(_, t)| Some(t.token) == self.token) {
            (found.logprobs[t], found.entropies[t]) = (f32::NAN, f32::NAN);
        }
        found
    }
}

impl PolicyTrainer for Poisoned {
    fn layout(&self) -> &Arc<ParamLayout> {
        self.inner.layout()
    }

    fn load(&mut self, params: &Params, version: PolicyVersion) {
        self.inner.load(params, version);
    }

    fn log_probs(&self, batch: &PackedBatch) -> TokenLogProbs {
        self.spoil(batch, self.inner.log_probs(batch))
    }

    fn accumulate(
        &self,
        batch: &PackedBatch,
        loss: &mut dyn FnMut(&TokenLogProbs) -> TokenGradients,
        grads: &mut [f32],
    ) {
        let passed = &mut |found: &TokenLogProbs| {
            let gradients = loss(&self.spoil(batch, found.clone()));
            for (target, d) in batch.targets.iter().zip(&gradients.d_logprobs) {
                let masked = Some(target.token) == self.token && target.token != LIVE;
                assert!(!masked || *d == 0.0, "a masked token has gradient {d}");
            }
            gradients
        };
        self.inner.accumulate(batch, passed, grads);
    }
}

fn policy(config: &LearnerConfig, token: Option<u32>) -> Policy {
    let params = params(WeightsDtype::F32);
    let trainer = Poisoned { inner: Bigram::new(&params), token };
    Policy::new(Box::new(trainer), params, config.optimizer_settings(), Threads::single())
}

/// Two groups of three; token 7 was drawn with no finite log-prob, so that it is masked wherever it occurs.
fn groups() -> Vec<Group> {
    let member = |task: u64, index: u32| {
        let mut sample =
            scored(task, index, PolicyVersion::default(), (index + task as u32 % 2) as f32 * 0.5);
        let rollout = &mut sample.rollout;
        // One masked token for certain, in the middle of something to train on.
        rollout.output_ids.splice(1..2, [7, 3]);
        rollout.behaviour_logprobs = rollout
            .output_ids
            .iter()
            .map(|&id| if id == 7 { f32::NEG_INFINITY } else { -1.5 - 0.1 * id as f32 })
            .collect();
        rollout.versions[0].tokens = rollout.output_ids.len() as u32;
        Arrival::Scored(Box::new(sample))
    };
    let group = |task: u64| Group {
        id: TaskId(task),
        members: (0..3).map(|index| (index, member(task, index))).collect::<BTreeMap<_, _>>(),
    };
    vec![group(0), group(1)]
}

fn config(loss: ObjectiveConfig) -> LearnerConfig {
    let mut config = crate::testing::config(1);
    config.loss = loss;
    config
}

fn rules(config: &LearnerConfig) -> UpdateRules {
    UpdateRules {
        micro_batch_tokens: config.micro_batch_tokens,
        minibatches: config.minibatches,
        router_replay: false,
        learning_rate: config.learning_rate,
        ess_learning_rate: config.loss.ess_learning_rate,
        critic_learning_rate: config.learning_rate,
        credit: config.loss.credit_rules(),
        reward_divergence: config.loss.reward_divergence(),
        entropy_coef: None,
    }
}

/// The masters after one update of `groups`, and what it said.
fn train(config: &LearnerConfig, groups: &[Group], token: Option<u32>) -> (Vec<f32>, Updated) {
    let mut policy = policy(config, token);
    let reference = Poisoned { inner: Bigram::new(&params(WeightsDtype::Bf16)), token };
    let mut critic =
        config.loss.needs_critic().then(|| Critic { model: self::policy(config, token), clip: Some(0.2) });
    let loss = Loss::new(&config.loss).unwrap();
    let mut batch = Batch::new(groups, &config.loss, &TextOnly, 0, 16, &Duals::default());
    let helpers = Helpers {
        reference: loss.needs_reference().then_some(&reference as &dyn PolicyTrainer),
        critic: critic.as_mut(),
    };
    let updated = update(&mut policy, helpers, &loss, &mut batch, &rules(config));
    (policy.optimizer().masters().to_vec(), updated)
}

#[test]
fn masked_tokens_change_nothing_even_if_their_logits_are_nan() {
    let stages = [
        ObjectiveConfig { kl_coef: 0.1, kl_placement: KlPlacement::Reward, ..Default::default() },
        ObjectiveConfig {
            objective: Objective::DecoupledPpo,
            top_entropy: Some(0.8),
            entropy_coef: 0.0,
            kl_coef: 0.1,
            ess_learning_rate: true,
            anchor_coef: 0.01,
            ..Default::default()
        },
    ];
    let named = RECIPES.iter().map(|r| ObjectiveConfig { objective: r.objective, ..Default::default() });
    for loss in named.chain(stages) {
        for minibatches in [1, 2] {
            let mut config = config(loss.clone());
            config.minibatches = minibatches;
            let (clean, clean_update) = train(&config, &groups(), None);
            let (poisoned, update) = train(&config, &groups(), Some(7));
            assert!(update.applied && clean_update.applied, "{:?}", loss.objective);
            assert_eq!(clean, poisoned, "{:?}", loss.objective);
            assert_ne!(clean, params(WeightsDtype::F32).to_f32(), "{:?} moved nothing", loss.objective);
        }
    }
}

#[test]
fn a_nan_that_is_not_masked_is_refused_and_changes_nothing() {
    for recipe in RECIPES {
        let config = config(ObjectiveConfig { objective: recipe.objective, ..Default::default() });
        let (masters, updated) = train(&config, &groups(), Some(LIVE));
        assert!(!updated.applied && !updated.moved, "{}", recipe.name);
        assert_eq!(masters, params(WeightsDtype::F32).to_f32(), "{}", recipe.name);
    }
}

#[test]
fn a_sample_with_nothing_to_train_on_is_not_computed_and_counts_in_its_groups_baseline() {
    let config = config(ObjectiveConfig { overlong_filter: true, ..Default::default() });
    let mut groups = groups();
    for arrival in groups[0].members.values_mut().take(1) {
        let Arrival::Scored(sample) = arrival else { unreachable!("all are scored") };
        sample.rollout.finish_reason = FinishReason::Length;
        // NaN wherever it is asked about.
        sample.rollout.output_ids.iter_mut().for_each(|id| *id = VOCAB as u32 - 2);
    }
    for arrival in groups.iter_mut().flat_map(|group| group.members.values_mut()) {
        let Arrival::Scored(sample) = arrival else { unreachable!("all are scored") };
        if !sample.rollout.truncated() {
            sample.rollout.output_ids.iter_mut().filter(|id| **id == VOCAB as u32 - 2).for_each(|id| *id = 3);
        }
    }
    let (masters, updated) = train(&config, &groups, Some(VOCAB as u32 - 2));
    assert!(updated.applied);
    assert_eq!(updated.diagnostics.sequences, 5);
    let (clean, _) = train(&config, &groups, None);
    assert_eq!(masters, clean);
    let batch = Batch::new(&groups, &config.loss, &TextOnly, 0, 16, &Duals::default());
    assert_eq!(batch.samples.len(), 6, "it is still there to be compared with");
}

#[test]
fn a_completion_near_the_limit_costs_as_if_its_reward_were_lower() {
    let shaped = config(ObjectiveConfig { overlong_buffer: Some(16), ..Default::default() });
    let plain = config(ObjectiveConfig::default());
    // All 16 tokens that there may be are in the buffer: each costs a sixteenth.
    let mut lowered = groups();
    for arrival in lowered.iter_mut().flat_map(|group| group.members.values_mut()) {
        let Arrival::Scored(sample) = arrival else { unreachable!("all are scored") };
        let tokens = sample.rollout.len() as f32;
        let Verdict::Scored { reward, .. } = &mut sample.reward.verdict else {
            unreachable!("all are scored")
        };
        *reward -= tokens / 16.0;
    }
    let masters = train(&shaped, &groups(), None).0;
    assert_eq!(masters, train(&plain, &lowered, None).0);
    assert_ne!(masters, train(&plain, &groups(), None).0);
}

#[test]
fn a_divergence_in_the_reward_lowers_the_credit_of_what_strayed() {
    let with = |coef: f64| {
        config(ObjectiveConfig {
            kl_coef: coef,
            kl_placement: KlPlacement::Reward,
            kl_estimator: KlEstimator::K1,
            ..Default::default()
        })
    };
    let config = with(0.5);
    let mut policy = policy(&config, None);
    let reference = Bigram::new(&params(WeightsDtype::Bf16));
    let (loss, groups) = (Loss::new(&config.loss).unwrap(), groups());
    let mut batch = Batch::new(&groups, &config.loss, &TextOnly, 0, 16, &Duals::default());
    let helpers = Helpers { reference: Some(&reference), critic: None };
    let before = Bigram::new(&params(WeightsDtype::F32));
    update(&mut policy, helpers, &loss, &mut batch, &rules(&config));
    // By hand: R − 0.5·Σ (log π − log π_ref) over the tokens that count, less the mean of the group.
    let strayed = |index: usize| {
        let rollout = &batch.samples[index].scored.rollout;
        let row = |t: usize| if t == 0 { rollout.prompt_ids[0] } else { rollout.output_ids[t - 1] };
        let gap = |t: usize| {
            let token = rollout.output_ids[t] as usize;
            f64::from(before.row(row(t))[token] as f32) - f64::from(reference.row(row(t))[token] as f32)
        };
        (0..rollout.len()).filter(|&t| rollout.output_ids[t] != 7).map(gap).sum::<f64>()
    };
    let shaped: Vec<f64> = (0..3).map(|i| batch.samples[i].reward - 0.5 * strayed(i)).collect();
    let mean = shaped.iter().sum::<f64>() / 3.0;
    for (i, reward) in shaped.iter().enumerate() {
        let got = batch.samples[i].advantages[0];
        assert!((got - (reward - mean)).abs() <= 1e-9, "sample {i}: {got}, expected {}", reward - mean);
    }
    assert_ne!(train(&with(0.5), &groups, None).0, train(&with(0.0), &groups, None).0);
}

#[test]
fn the_rate_follows_the_effective_sample_size() {
    let plain = config(ObjectiveConfig { objective: Objective::Reinforce, ..Default::default() });
    let scaled = config(ObjectiveConfig { ess_learning_rate: true, ..plain.loss.clone() });
    let ((a, updated), (b, _)) = (train(&plain, &groups(), None), train(&scaled, &groups(), None));
    let (start, ess) = (params(WeightsDtype::F32).to_f32(), updated.diagnostics.ess());
    assert!(ess < 0.99, "the weights differ: {ess}");
    let moved = |to: &[f32]| to.iter().zip(&start).map(|(x, s)| f64::from(x - s).abs()).sum::<f64>();
    let ratio = moved(&b) / moved(&a);
    assert!((ratio - ess.sqrt()).abs() <= 1e-3, "{ratio} for an effective sample size of {ess}");
}

#[test]
fn the_log_linear_proximal_is_exact_with_one_update_and_near_with_two() {
    for minibatches in [1, 2] {
        let [exact, line] = [Proximal::Exact, Proximal::LogLinear].map(|proximal| {
            let loss = ObjectiveConfig { objective: Objective::DecoupledPpo, proximal, ..Default::default() };
            let mut config = config(loss);
            config.minibatches = minibatches;
            train(&config, &groups(), None).0
        });
        match minibatches {
            1 => assert_eq!(exact, line),
            _ => {
                let gap = exact.iter().zip(&line).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(gap <= 0.1, "off by {gap}");
            }
        }
    }
}

#[test]
fn any_split_into_micro_batches_gives_the_same_update() {
    for recipe in RECIPES {
        let updates = [1, 12, 10_000].map(|tokens| {
            let mut config = config(ObjectiveConfig { objective: recipe.objective, ..Default::default() });
            config.micro_batch_tokens = tokens;
            let (masters, updated) = train(&config, &groups(), None);
            (masters, updated.loss, updated.grad_norm)
        });
        for (_, loss, norm) in &updates[1..] {
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * a.abs().max(1e-3);
            assert!(close(updates[0].1, *loss) && close(updates[0].2, *norm), "{}: {updates:?}", recipe.name);
        }
    }
}
