//! AdamW on f32 masters (Loshchilov and Hutter, arXiv 1711.05101), with torch's clipping and arithmetic.

use std::ops::Range;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::optim::{self, adamw_step, sum_squares};
use freewheel_model::{ParamData, ParamLayout, Params, TensorKind};

/// Settings, defaults of the config section filled in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay, on tensors of two and more dimensions only unless `decay_1d`.
    pub weight_decay: f64,
    /// Whether norms and biases decay too.
    pub decay_1d: bool,
    /// Gradients with a larger global norm are scaled down to it; `None`: never.
    pub max_grad_norm: Option<f64>,
    /// Whether the image encoder is frozen: it does not decay either, so that with no gradient it stays as it is.
    pub freeze_vision: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.0,
            decay_1d: false,
            max_grad_norm: Some(1.0),
            freeze_vision: false,
        }
    }
}

/// What a call of [`AdamW::step`] did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepOutcome {
    /// The masters moved.
    Applied {
        /// Global norm of the gradient before clipping.
        grad_norm: f64,
        /// What the gradient was multiplied with; 1 if not clipped.
        clip_factor: f64,
    },
    /// The gradient was not finite: nothing changed, the step does not count.
    Refused {
        /// Global norm of the gradient: NaN or infinite.
        grad_norm: f64,
    },
}

/// One tensor of the optimiser's state, for the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct StateTensor<'a> {
    /// `master.NAME`, `exp_avg.NAME` or `exp_avg_sq.NAME`, NAME being the parameter's.
    pub name: String,
    /// The parameter's shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: &'a [f32],
}

/// The same to write to.
#[derive(Debug, PartialEq)]
pub struct StateTensorMut<'a> {
    /// As in [`StateTensor`].
    pub name: String,
    /// The parameter's shape.
    pub shape: &'a [usize],
    /// Values.
    pub values: &'a mut [f32],
}

/// AdamW over one arena: masters and both moments in the layout of the weights.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    config: AdamWConfig,
    layout: Arc<ParamLayout>,
    masters: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    /// Runs of neighbouring tensors with the same decay, in arena order; without those the optimiser leaves alone.
    groups: Vec<(Range<usize>, bool)>,
    steps: u64,
}

/// What the names of an image encoder's tensors begin with.
const VISION: &str = "vision_model.";

const PARTS: [&str; 3] = ["master", "exp_avg", "exp_avg_sq"];

impl AdamW {
    /// An optimiser that starts at `params`, which may be of either element type.
    pub fn new(config: AdamWConfig, params: &Params) -> Self {
        let layout = params.layout.clone();
        Self {
            config,
            groups: decay_groups(&layout, &config),
            masters: params.to_f32(),
            exp_avg: vec![0.0; layout.total],
            exp_avg_sq: vec![0.0; layout.total],
            layout,
            steps: 0,
        }
    }

    /// Updates done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The f32 masters, arena order.
    pub fn masters(&self) -> &[f32] {
        &self.masters
    }

    /// One update with the gradient arena `grads` at `learning_rate`. A gradient that is not finite is refused.
    ///
    /// The norm is summed in f64 in a fixed order and clipped by torch's coefficient min(1, max/(norm + 1e-6)).
    ///
    /// # Panics
    /// If `grads` does not have the layout's length.
    pub fn step(&mut self, threads: &Threads, grads: &[f32], learning_rate: f64) -> StepOutcome {
        assert_eq!(grads.len(), self.layout.total, "one gradient for each parameter");
        let grad_norm = sum_squares(threads, grads).sqrt();
        if !grad_norm.is_finite() {
            return StepOutcome::Refused { grad_norm };
        }
        let clip_factor = self.config.max_grad_norm.map_or(1.0, |max| (max / (grad_norm + 1e-6)).min(1.0));
        self.steps += 1;
        for (range, decays) in &self.groups {
            let constants = self.constants(learning_rate, *decays);
            adamw_step(
                threads,
                &mut self.masters[range.clone()],
                &mut self.exp_avg[range.clone()],
                &mut self.exp_avg_sq[range.clone()],
                &grads[range.clone()],
                &constants,
                clip_factor as f32,
            );
        }
        StepOutcome::Applied { grad_norm, clip_factor }
    }

    fn constants(&self, learning_rate: f64, decays: bool) -> optim::AdamW {
        let [beta1, beta2] = self.config.betas.map(|beta| beta as f32);
        let weight_decay = if decays { self.config.weight_decay as f32 } else { 0.0 };
        optim::AdamW::at_step(
            learning_rate as f32,
            beta1,
            beta2,
            self.config.eps as f32,
            weight_decay,
            self.steps,
        )
    }

    /// Writes the masters into `params`, rounded to nearest even where those are bf16.
    ///
    /// # Panics
    /// If `params` has another layout.
    pub fn write_weights(&self, threads: &Threads, params: &mut Params) {
        assert_eq!(params.layout.total, self.layout.total, "weights and masters share a layout");
        match &mut params.data {
            ParamData::F32(values) => values.copy_from_slice(&self.masters),
            ParamData::Bf16(values) => threads.for_each_row_chunk(values, 1, 1 << 16, |first, chunk| {
                freewheel_kernels::convert::f32_to_bf16(&self.masters[first..first + chunk.len()], chunk);
            }),
        }
    }

    /// Every tensor of the state; with [`AdamW::steps`] this is all of it.
    pub fn state(&self) -> impl Iterator<Item = StateTensor<'_>> {
        let arenas = [&self.masters, &self.exp_avg, &self.exp_avg_sq];
        PARTS.into_iter().zip(arenas).flat_map(|(part, arena)| {
            self.layout.tensors.iter().map(move |tensor| StateTensor {
                name: format!("{part}.{}", tensor.name),
                shape: tensor.shape.clone(),
                values: &arena[tensor.range()],
            })
        })
    }

    /// The same to write to.
    pub fn state_mut(&mut self) -> impl Iterator<Item = StateTensorMut<'_>> {
        let arenas = [&mut self.masters, &mut self.exp_avg, &mut self.exp_avg_sq];
        PARTS.into_iter().zip(arenas).flat_map(|(part, arena)| {
            let mut rest: &mut [f32] = arena;
            self.layout.tensors.iter().map(move |tensor| {
                let (values, after) = std::mem::take(&mut rest).split_at_mut(tensor.len());
                rest = after;
                StateTensorMut { name: format!("{part}.{}", tensor.name), shape: &tensor.shape, values }
            })
        })
    }

    /// Says how many updates are in a state that was written with [`AdamW::state_mut`].
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }
}

fn decay_groups(layout: &ParamLayout, config: &AdamWConfig) -> Vec<(Range<usize>, bool)> {
    let mut groups: Vec<(Range<usize>, bool)> = Vec::new();
    for tensor in layout.tensors.iter().filter(|tensor| tensor.kind != TensorKind::RouterBias) {
        let frozen = config.freeze_vision && tensor.name.starts_with(VISION);
        let (range, decays) = (tensor.range(), !frozen && (config.decay_1d || tensor.shape.len() > 1));
        match groups.last_mut() {
            Some((last, same)) if *same == decays && last.end == range.start => last.end = range.end,
            _ => groups.push((range, decays)),
        }
    }
    groups
}

#[cfg(test)]
mod tests {

    use freewheel_model::TensorSpec;

    use super::*;

    fn params() -> Params {
        let tensor = |name: &str, shape: &[usize], offset| TensorSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            offset,
            kind: TensorKind::Mlp,
        };
        let tensors = vec![tensor("w", &[2, 2], 0), tensor("norm", &[2], 4), tensor("v", &[1, 3], 6)];
        let layout = Arc::new(ParamLayout { tensors, total: 9 });
        Params { layout, data: ParamData::F32((0..9).map(|i| 0.1 * (i + 1) as f32).collect()) }
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let mut optimiser = AdamW::new(AdamWConfig::default(), &params());
        let before = optimiser.clone();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut grads = vec![0.5; 9];
            grads[7] = bad;
            let outcome = optimiser.step(&Threads::single(), &grads, 1e-3);
            assert!(matches!(outcome, StepOutcome::Refused { .. }), "{outcome:?}");
        }
        assert_eq!(optimiser, before);
    }

    #[test]
    fn a_learning_rate_of_zero_leaves_the_weights_alone() {
        let config = AdamWConfig { weight_decay: 0.1, ..Default::default() };
        let mut optimiser = AdamW::new(config, &params());
        assert!(matches!(optimiser.step(&Threads::single(), &[0.5; 9], 0.0), StepOutcome::Applied { .. }));
        assert_eq!(optimiser.masters(), params().to_f32());
        assert_eq!(optimiser.steps(), 1);
    }

    #[test]
    fn vectors_do_not_decay() {
        let config = AdamWConfig { weight_decay: 0.5, ..Default::default() };
        let mut optimiser = AdamW::new(config, &params());
        optimiser.step(&Threads::single(), &[0.0; 9], 0.1);
        let (old, new) = (params().to_f32(), optimiser.masters());
        assert_eq!(new[4..6], old[4..6]);
        assert!((new[0] - 0.95 * old[0]).abs() <= 1e-7 && (new[8] - 0.95 * old[8]).abs() <= 1e-7);
    }

    #[test]
    fn corrections_of_a_router_are_left_alone() {
        let mut start = params();
        let mut layout = (*start.layout).clone();
        layout.tensors[1].kind = TensorKind::RouterBias;
        start.layout = Arc::new(layout);
        let config = AdamWConfig { weight_decay: 0.5, decay_1d: true, ..Default::default() };
        let mut optimiser = AdamW::new(config, &start);
        optimiser.step(&Threads::single(), &[0.1; 9], 0.1);
        let (old, new) = (start.to_f32(), optimiser.masters());
        assert_eq!(new[4..6], old[4..6]);
        assert!((0..4).chain(6..9).all(|i| new[i] != old[i]), "the others move");
    }
}
