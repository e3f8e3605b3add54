//! One step of the policy on one batch: log-probs, loss, backward, optimiser.

use crate::batch::Batch;
use crate::objective::{BatchStats, Diagnostics, Loss, Proximal, SequenceInput, log_linear};
use crate::optim::StepOutcome;
use crate::packing::{TrainSequence, pack};
use crate::policy::Policy;
use crate::trainer::{PackedBatch, PolicyTrainer, TokenGradients, TokenLogProbs};

/// How a step is computed.
#[derive(Clone, Copy, Debug)]
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
    /// Whether every update was applied. If not, the loss or the gradient was not finite and nothing changed from there on.
    pub applied: bool,
    /// Whether any update was applied: the weights are others than before.
    pub moved: bool,
    /// Forward and backward tokens.
    pub tokens: u64,
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

/// Trains `policy` on `batch`.
pub fn update(
    policy: &mut Policy,
    reference: Option<&dyn PolicyTrainer>,
    loss: &Loss,
    batch: &Batch<'_>,
    rules: &UpdateRules,
) -> Updated {
    let parts = batch.parts(rules.minibatches);
    let all = sequences(batch, 0..batch.samples.len(), rules);
    let ahead = |model: &dyn Fn(&PackedBatch) -> TokenLogProbs| gather(&all, rules.micro_batch_tokens, model);
    let reference = reference.map(|model| ahead(&|packed| model.log_probs(packed)));
    // With one update a batch the policy's own log-probs are the proximal ones.
    let ask = parts.len() > 1 && loss.proximal() == Proximal::Exact;
    let proximal = ask.then(|| ahead(&|packed| policy.log_probs(packed)));
    let mut out = Updated {
        loss: 0.0,
        diagnostics: Diagnostics::default(),
        grad_norm: 0.0,
        agreement: Agreement::default(),
        applied: true,
        moved: false,
        tokens: 0,
    };
    let shares: Vec<f64> = parts.iter().map(|part| part.len() as f64 / batch.samples.len() as f64).collect();
    let count = parts.len() as f64;
    for (made, (part, share)) in parts.into_iter().zip(shares).enumerate() {
        let version = policy.step() as f64 + made as f64 / count;
        let pass = Pass { loss, batch, part, rules, version, proximal: &proximal, reference: &reference };
        let mut diagnostics = Diagnostics::default();
        let part_loss = pass.accumulate(policy, &mut out, &mut diagnostics);
        out.diagnostics.merge(&diagnostics);
        out.loss += share * part_loss;
        if !part_loss.is_finite() {
            policy.discard_gradient();
            out.applied = false;
            return out;
        }
        let scale = if rules.ess_learning_rate { diagnostics.ess().sqrt() } else { 1.0 };
        match policy.update(rules.learning_rate * scale) {
            StepOutcome::Applied { grad_norm, .. } => {
                out.grad_norm = out.grad_norm.max(grad_norm);
                out.moved = true;
            }
            StepOutcome::Refused { grad_norm } => {
                out.grad_norm = grad_norm;
                out.applied = false;
                return out;
            }
        }
    }
    out
}

/// Gradient of one part of the batch.
struct Pass<'p> {
    loss: &'p Loss,
    batch: &'p Batch<'p>,
    part: std::ops::Range<usize>,
    rules: &'p UpdateRules,
    /// Version of the weights, a fraction between the updates of a batch.
    version: f64,
    proximal: &'p Ahead,
    reference: &'p Ahead,
}

impl Pass<'_> {
    fn accumulate(&self, policy: &mut Policy, out: &mut Updated, diagnostics: &mut Diagnostics) -> f64 {
        let sequences = sequences(self.batch, self.part.clone(), self.rules);
        let totals = self.batch.totals(self.part.clone());
        let stats = self.batch_stats(policy, &sequences);
        let mut part_loss = 0.0;
        for packed in pack(&sequences, self.rules.micro_batch_tokens) {
            out.tokens += packed.tokens.len() as u64;
            policy.accumulate(&packed, &mut |found| {
                let mut gradients = TokenGradients::default();
                for sequence in &packed.sequences {
                    let index = self.part.start + sequence.index;
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

    /// Thresholds over the part, for objectives that have some: costs one more forward pass.
    fn batch_stats(&self, policy: &Policy, sequences: &[TrainSequence<'_>]) -> BatchStats {
        if !self.loss.needs_batch_pass() {
            return BatchStats::default();
        }
        let found = gather(sequences, self.rules.micro_batch_tokens, &|packed| policy.log_probs(packed));
        let inputs: Vec<SequenceInput> =
            found.iter().enumerate().map(|(i, found)| self.input(self.part.start + i, found)).collect();
        self.loss.batch_stats(&inputs)
    }

    fn input(&self, index: usize, found: &TokenLogProbs) -> SequenceInput {
        let ahead = |values: &Ahead| values.as_ref().map(|values| values[index].logprobs.clone());
        let (proximal, reference) = (ahead(self.proximal), ahead(self.reference));
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

fn sequences<'b>(
    batch: &'b Batch<'_>,
    range: std::ops::Range<usize>,
    rules: &UpdateRules,
) -> Vec<TrainSequence<'b>> {
    // Replayed and free routing do not share a batch: replay needs a record of every sample.
    let recorded = batch.samples.iter().all(|sample| !sample.scored.rollout.experts.ids.is_empty());
    batch.samples[range].iter().map(|sample| sample.sequence(rules.router_replay && recorded)).collect()
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
