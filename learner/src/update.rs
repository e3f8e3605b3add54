//! One step of the policy on one batch: log-probs, loss, backward, optimiser.

use std::ops::Range;

use crate::advantage::CreditRules;
use crate::batch::{Batch, CreditSources};
use crate::critic::{Critic, ValueTargets};
use crate::objective::{
    BatchStats, Diagnostics, KlEstimator, Loss, Proximal, SequenceInput, log_linear, widen,
};
use crate::optim::StepOutcome;
use crate::packing::{TrainSequence, pack};
use crate::policy::Policy;
use crate::trainer::{ExpertLoad, PackedBatch, PolicyTrainer, TokenGradients, TokenLogProbs};

/// Models that an update asks beside the policy.
#[derive(Default)]
pub struct Helpers<'h> {
    /// The reference, where the loss or the reward asks for one.
    pub reference: Option<&'h dyn PolicyTrainer>,
    /// The critic, where there is one; it is trained on the same batch.
    pub critic: Option<&'h mut Critic>,
}

/// How a step is computed.
#[derive(Clone, Debug)]
pub struct UpdateRules {
    /// Tokens of one forward and backward pass.
    pub micro_batch_tokens: usize,
    /// Optimiser updates the batch is split into.
    pub minibatches: usize,
    /// Whether recorded experts are replayed.
    pub router_replay: bool,
    /// Rate of this step.
    pub learning_rate: f64,
    /// Whether the rate of each update is scaled by the root of its effective sample size.
    pub ess_learning_rate: bool,
    /// Rate of the critic.
    pub critic_learning_rate: f64,
    /// How rewards become credit.
    pub credit: CreditRules,
    /// Estimator and weight of a divergence in the reward.
    pub reward_divergence: Option<(KlEstimator, f64)>,
    /// Weight of the entropy bonus where it adapts.
    pub entropy_coef: Option<f64>,
}

/// What a step did.
#[derive(Clone, Debug)]
pub struct Updated {
    /// Loss of the batch, at the weights before the step where the batch is not split.
    pub loss: f64,
    /// Sums over live tokens.
    pub diagnostics: Diagnostics,
    /// Largest global gradient norm of its updates, before clipping.
    pub grad_norm: f64,
    /// Agreement of sampler and learner at the weights before the step.
    pub agreement: Agreement,
    /// Loss of the critic.
    pub value_loss: Option<f64>,
    /// Whether every update was applied. If not, the loss or the gradient was not finite and nothing changed from there on.
    pub applied: bool,
    /// Whether any update was applied: the weights are others than before.
    pub moved: bool,
    /// Forward and backward tokens.
    pub tokens: u64,
    /// Of the experts' loads in the last update, see [`ExpertLoad::max_violation`].
    pub max_violation: Option<f64>,
}

impl Default for Updated {
    /// Of an update that has not begun: nothing was refused yet.
    fn default() -> Self {
        Self {
            loss: 0.0,
            diagnostics: Diagnostics::default(),
            grad_norm: 0.0,
            agreement: Agreement::default(),
            value_loss: None,
            applied: true,
            moved: false,
            tokens: 0,
            max_violation: None,
        }
    }
}

/// Agreement of behaviour and policy log-probs on tokens drawn by exactly the weights being trained.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Such tokens.
    pub same_version_tokens: u64,
    /// Largest absolute difference among them: 0, or sampler and learner are not the same model.
    pub same_version_abs_max: f32,
}

/// Log-probs per sample of the batch, where they had to be computed ahead.
type Ahead = Option<Vec<TokenLogProbs>>;

/// Trains `policy`, and the critic if there is one, on `batch`, whose tokens get their credit on the way.
pub fn update(
    policy: &mut Policy,
    helpers: Helpers<'_>,
    loss: &Loss,
    batch: &mut Batch<'_>,
    rules: &UpdateRules,
) -> Updated {
    let Helpers { reference, mut critic } = helpers;
    let parts = batch.parts(rules.minibatches);
    let found = Foreseen::new(policy, reference, critic.as_deref(), loss, batch, rules);
    batch.assign_credit(&rules.credit, &found.sources(batch, rules));
    let batch = &*batch;
    let mut out = Updated::default();
    let shares: Vec<f64> = parts.iter().map(|part| part.len() as f64 / batch.samples.len() as f64).collect();
    let count = parts.len() as f64;
    for (made, (part, share)) in parts.into_iter().zip(shares).enumerate() {
        let version = policy.step() as f64 + made as f64 / count;
        let pass = Pass { loss, batch, part, rules, version, found: &found };
        let mut diagnostics = Diagnostics::default();
        let part_loss = pass.accumulate(policy, &mut out, &mut diagnostics);
        let value_loss = critic.as_deref_mut().map(|critic| pass.accumulate_values(critic));
        out.diagnostics.merge(&diagnostics);
        out.loss += share * part_loss;
        out.value_loss = value_loss.map(|value_loss| out.value_loss.unwrap_or(0.0) + share * value_loss);
        if !part_loss.is_finite() || value_loss.is_some_and(|value_loss| !value_loss.is_finite()) {
            policy.discard_gradient();
            critic.into_iter().for_each(|critic| critic.model.discard_gradient());
            out.applied = false;
            return out;
        }
        let scale = if rules.ess_learning_rate { diagnostics.ess().sqrt() } else { 1.0 };
        match policy.update(rules.learning_rate * scale) {
            StepOutcome::Applied { grad_norm, .. } => {
                out.grad_norm = out.grad_norm.max(grad_norm);
                out.moved = true;
                out.max_violation = policy.expert_load().and_then(ExpertLoad::max_violation);
            }
            StepOutcome::Refused { grad_norm } => {
                critic.into_iter().for_each(|critic| critic.model.discard_gradient());
                out.grad_norm = grad_norm;
                out.applied = false;
                return out;
            }
        }
        let value_step = critic.as_deref_mut().map(|critic| critic.model.update(rules.critic_learning_rate));
        if let Some(StepOutcome::Refused { .. }) = value_step {
            out.applied = false;
            return out;
        }
    }
    out
}

/// What is computed of the whole batch before its first update, per sample.
struct Foreseen {
    proximal: Ahead,
    reference: Ahead,
    values: Ahead,
}

impl Foreseen {
    fn new(
        policy: &Policy,
        reference: Option<&dyn PolicyTrainer>,
        critic: Option<&Critic>,
        loss: &Loss,
        batch: &Batch<'_>,
        rules: &UpdateRules,
    ) -> Self {
        let all = sequences(batch, &live(batch, 0..batch.samples.len()), rules);
        let ahead = |model: &dyn Fn(&PackedBatch) -> TokenLogProbs| {
            let found = gather(&all, rules.micro_batch_tokens, model);
            scatter(batch, 0..batch.samples.len(), found)
        };
        // With one update a batch the policy's own log-probs are the proximal ones; credit needs them before.
        let split = batch.parts(rules.minibatches).len() > 1 && loss.proximal() == Proximal::Exact;
        let ask = split || rules.reward_divergence.is_some();
        Self {
            reference: reference.map(|model| ahead(&|packed| model.log_probs(packed))),
            proximal: ask.then(|| ahead(&|packed| policy.log_probs(packed))),
            values: critic.map(|critic| ahead(&|packed| critic.values(packed))),
        }
    }

    /// What credit takes of it.
    fn sources(&self, batch: &Batch<'_>, rules: &UpdateRules) -> CreditSources {
        let rows = |found: &Ahead| -> Option<Vec<Vec<f64>>> {
            found.as_ref().map(|found| found.iter().map(|found| widen(&found.logprobs)).collect())
        };
        let penalties = rules.reward_divergence.map(|(estimator, coef)| {
            let (proximal, reference) = (rows(&self.proximal), rows(&self.reference));
            let pairs = proximal.into_iter().flatten().zip(reference.into_iter().flatten());
            let paid = |(proximal, reference): (Vec<f64>, Vec<f64>)| {
                let tokens = proximal.iter().zip(&reference);
                tokens.map(|(&p, &r)| coef * estimator.evaluate(p, r).0).collect()
            };
            let penalties: Vec<Vec<f64>> = pairs.map(paid).collect();
            assert_eq!(penalties.len(), batch.samples.len(), "a divergence in the reward needs a reference");
            penalties
        });
        CreditSources { penalties, values: rows(&self.values) }
    }
}

/// Gradient of one part of the batch.
struct Pass<'p> {
    loss: &'p Loss,
    batch: &'p Batch<'p>,
    part: Range<usize>,
    rules: &'p UpdateRules,
    /// Version of the weights, a fraction between the updates of a batch.
    version: f64,
    found: &'p Foreseen,
}

impl Pass<'_> {
    fn accumulate(&self, policy: &mut Policy, out: &mut Updated, diagnostics: &mut Diagnostics) -> f64 {
        let live = live(self.batch, self.part.clone());
        let sequences = sequences(self.batch, &live, self.rules);
        let totals = self.batch.totals(self.part.clone());
        let stats = self.batch_stats(policy, &live, &sequences);
        let mut part_loss = 0.0;
        for packed in policy.micro_batches(&sequences, self.rules.micro_batch_tokens) {
            out.tokens += packed.tokens.len() as u64;
            policy.accumulate(&packed, &mut |found| {
                let mut gradients = TokenGradients::default();
                for sequence in &packed.sequences {
                    let index = live[sequence.index];
                    let input = self.input(index, &part_of(found, sequence.targets.clone()));
                    self.note_agreement(index, &input, out);
                    let term = self.loss.sequence(&input, &totals, &stats);
                    part_loss += term.loss;
                    diagnostics.merge(&term.diagnostics);
                    gradients.d_logprobs.extend(&term.d_logprobs);
                    if let Some(d_entropies) = &term.d_entropies {
                        gradients.d_entropies.get_or_insert_default().extend(d_entropies);
                    }
                }
                gradients
            });
        }
        part_loss
    }

    /// Gradient of the critic on the part.
    fn accumulate_values(&self, critic: &mut Critic) -> f64 {
        let live = live(self.batch, self.part.clone());
        let tokens = self.batch.totals(self.part.clone()).tokens;
        let values = self.found.values.as_ref().expect("there is a critic");
        let targets: Vec<(Vec<f64>, Vec<bool>)> = live
            .iter()
            .map(|&index| (widen(&values[index].logprobs), self.batch.samples[index].live()))
            .collect();
        let of = |index: usize| ValueTargets {
            before: &targets[index].0,
            returns: self.batch.samples[live[index]]
                .returns
                .as_deref()
                .expect("credit was estimated with values"),
            live: &targets[index].1,
        };
        let sequences = sequences(self.batch, &live, self.rules);
        let packed = critic.model.micro_batches(&sequences, self.rules.micro_batch_tokens);
        packed.iter().map(|packed| critic.accumulate(packed, tokens, &of)).sum()
    }

    /// Figures over the part, for objectives that have some: costs one more forward pass.
    fn batch_stats(&self, policy: &Policy, live: &[usize], sequences: &[TrainSequence<'_>]) -> BatchStats {
        let entropy_coef = self.rules.entropy_coef;
        if !self.loss.needs_batch_pass() {
            return BatchStats::default().with_entropy_coef(entropy_coef);
        }
        let found = gather(sequences, self.rules.micro_batch_tokens, &|packed| policy.log_probs(packed));
        let inputs: Vec<SequenceInput> =
            found.iter().zip(live).map(|(found, &index)| self.input(index, found)).collect();
        self.loss.batch_stats(&inputs).with_entropy_coef(entropy_coef)
    }

    fn input(&self, index: usize, found: &TokenLogProbs) -> SequenceInput {
        let ahead = |values: &Ahead| values.as_ref().map(|values| values[index].logprobs.clone());
        let (proximal, reference) = (ahead(&self.found.proximal), ahead(&self.found.reference));
        let sample = &self.batch.samples[index];
        let mut input =
            sample.input(&found.logprobs, proximal.as_deref(), reference.as_deref(), &found.entropies);
        if self.loss.proximal() == Proximal::LogLinear {
            let (policy, behaviour) = (&input.policy_logprobs, &input.behaviour_logprobs);
            let point = log_linear(policy, behaviour, &sample.versions(), self.version.floor(), self.version);
            input.proximal_logprobs = Some(point);
        }
        input
    }

    fn note_agreement(&self, index: usize, input: &SequenceInput, out: &mut Updated) {
        let sample = &self.batch.samples[index];
        // A proximal policy off the line is none to compare with: then only the weights of the batch's start will do.
        let learner = match self.loss.proximal() {
            Proximal::Exact => input.proximal_logprobs.as_ref().unwrap_or(&input.policy_logprobs),
            Proximal::LogLinear if self.version.fract() == 0.0 => &input.policy_logprobs,
            Proximal::LogLinear => return,
        };
        let pairs = learner.iter().zip(&input.behaviour_logprobs).take(sample.same_version_tokens);
        for (learner, behaviour) in pairs {
            let gap = (learner - behaviour).abs() as f32;
            // NaN is the largest gap of all.
            let worst = out.agreement.same_version_abs_max;
            out.agreement.same_version_abs_max = if gap <= worst { worst } else { gap };
            out.agreement.same_version_tokens += 1;
        }
    }
}

/// Samples of `range` with a token that counts. The others are not computed at all: whatever they hold cannot reach the weights.
fn live(batch: &Batch<'_>, range: Range<usize>) -> Vec<usize> {
    range.filter(|&index| batch.samples[index].live().contains(&true)).collect()
}

fn sequences<'b>(batch: &'b Batch<'_>, indices: &[usize], rules: &UpdateRules) -> Vec<TrainSequence<'b>> {
    // Replayed and free routing do not share a batch: replay needs a record of every sample.
    let recorded = batch.samples.iter().all(|sample| !sample.scored.rollout.experts.ids.is_empty());
    let replay = rules.router_replay && recorded;
    indices.iter().map(|&index| batch.samples[index].sequence(replay)).collect()
}

/// Results of the live samples at their places; zeros for the others, which nobody looks at.
fn scatter(batch: &Batch<'_>, range: Range<usize>, found: Vec<TokenLogProbs>) -> Vec<TokenLogProbs> {
    let blank = |index: usize| {
        let zeros = vec![0.0; batch.samples[index].scored.rollout.len()];
        TokenLogProbs { logprobs: zeros.clone(), entropies: zeros }
    };
    let mut all: Vec<TokenLogProbs> = range.clone().map(blank).collect();
    let places = live(batch, range.clone());
    places.into_iter().zip(found).for_each(|(index, found)| all[index - range.start] = found);
    all
}

/// Log-probs of each sequence, in order.
fn gather(
    sequences: &[TrainSequence<'_>],
    budget: usize,
    model: &dyn Fn(&PackedBatch) -> TokenLogProbs,
) -> Vec<TokenLogProbs> {
    let mut all = Vec::with_capacity(sequences.len());
    for packed in pack(sequences, budget) {
        let found = model(&packed);
        all.extend(packed.sequences.iter().map(|sequence| part_of(&found, sequence.targets.clone())));
    }
    all
}

fn part_of(found: &TokenLogProbs, targets: std::ops::Range<usize>) -> TokenLogProbs {
    TokenLogProbs {
        logprobs: found.logprobs[targets.clone()].to_vec(),
        entropies: found.entropies[targets].to_vec(),
    }
}
