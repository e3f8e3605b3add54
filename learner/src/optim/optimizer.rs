//! Masters and moments of all parameters, and the update that moves them.
//!
//! An update reads the gradient once for its norm, and then goes over memory once: a part of the arena is read, moved and written back,
//! its weights rounded and its gradient set to zero, before the next is touched. Which thread has which part changes no bit.

use std::cmp::Ordering;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::optim::{self as kernels, adamw_step, lion_step, sgd_step, sum_squares};
use freewheel_model::{Growth, ParamData, ParamLayout, Params, TensorKind, TensorSpec};
use freewheel_types::CounterRng;
use half::bf16;

use super::config::{OptimizerKind, OptimizerSettings};
use super::moment::{BLOCK, Minifloat, Moment, MomentMut, StateValues, StateValuesMut};
use super::muon;
use super::select::Selector;
use crate::trainer::ExpertLoad;

/// What a call of [`Optimizer::step`] did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum StepOutcome {
    /// The masters moved.
    Applied {
        /// Global norm of the gradient before clipping; frozen parameters have no part in it.
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
    /// `master.NAME`, `exp_avg.NAME` …, NAME being the parameter's; `….scales` for the scales of 8-bit moments.
    pub name: String,
    /// The parameter's shape; of scales, their number.
    pub shape: Vec<usize>,
    /// Values.
    pub values: StateValues<'a>,
}

/// The same to write to.
#[derive(Debug, PartialEq)]
pub struct StateTensorMut<'a> {
    /// As in [`StateTensor`].
    pub name: String,
    /// As in [`StateTensor`].
    pub shape: Vec<usize>,
    /// Values.
    pub values: StateValuesMut<'a>,
}

/// An optimiser over one arena: masters in the layout of the weights, and the moments of each tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    settings: OptimizerSettings,
    layout: Arc<ParamLayout>,
    masters: Vec<f32>,
    tensors: Vec<TensorState>,
    steps: u64,
}

/// How one tensor moves, and its moments.
#[derive(Clone, Debug, PartialEq)]
struct TensorState {
    rule: Rule,
    lr_scale: f64,
    weight_decay: f64,
    first: Moment,
    second: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Keeps its values.
    Frozen,
    Adamw,
    Muon(muon::Shape),
    Lion,
    Sgd,
}

impl Rule {
    /// Names of its moments in a checkpoint.
    fn moments(self) -> [Option<&'static str>; 2] {
        match self {
            Self::Frozen => [None, None],
            Self::Adamw => [Some("exp_avg"), Some("exp_avg_sq")],
            Self::Lion => [Some("exp_avg"), None],
            Self::Muon(_) | Self::Sgd => [Some("momentum_buffer"), None],
        }
    }
}

/// Values of one piece of work: whole blocks of 8-bit moments, and little enough to balance.
const PIECE: usize = 1 << 16;
/// Values that are widened at a time.
const STRIDE: usize = 4096;
/// Key of the random rounding of moments.
const ROUNDING: u64 = 0x6d6f_6d65_6e74_7321;

impl Optimizer {
    /// An optimiser that starts at `params`, which may be of either element type.
    pub fn new(settings: OptimizerSettings, params: &Params) -> Self {
        let layout = params.layout.clone();
        let growth = settings.config.metap().and_then(|base| base.growth(&layout));
        let state = |tensor| TensorState::new(&settings, growth.as_ref(), tensor);
        let tensors = layout.tensors.iter().map(state).collect();
        Self { settings, masters: params.to_f32(), tensors, layout, steps: 0 }
    }

    /// Updates done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The f32 masters, arena order.
    pub fn masters(&self) -> &[f32] {
        &self.masters
    }

    /// Bytes of masters and moments.
    pub fn bytes(&self) -> usize {
        let moments = self.tensors.iter().map(|tensor| tensor.first.bytes() + tensor.second.bytes());
        4 * self.masters.len() + moments.sum::<usize>()
    }

    /// One update with the gradient arena `grads` at `learning_rate`. A gradient that is not finite is refused. The gradient of
    /// frozen parameters is set to zero.
    ///
    /// The norm is summed in f64 in a fixed order and clipped by torch's coefficient min(1, max/(norm + 1e-6)).
    ///
    /// # Panics
    /// If `grads` does not have the layout's length.
    pub fn step(&mut self, threads: &Threads, grads: &mut [f32], learning_rate: f64) -> StepOutcome {
        self.run(threads, grads, learning_rate, WeightsMut::None)
    }

    /// The same, and in the same pass the masters that moved go into `weights` (rounded to nearest even where those are bf16) and the
    /// gradient becomes zero; it does so too if it is refused.
    ///
    /// # Panics
    /// If `grads` or `weights` do not have the layout's length.
    pub fn update(
        &mut self,
        threads: &Threads,
        grads: &mut [f32],
        learning_rate: f64,
        weights: &mut Params,
    ) -> StepOutcome {
        assert_eq!(weights.layout.total, self.layout.total, "weights and masters share a layout");
        let outcome = self.run(threads, grads, learning_rate, WeightsMut::of(weights));
        if matches!(outcome, StepOutcome::Refused { .. }) {
            grads.fill(0.0);
        }
        outcome
    }

    fn run(
        &mut self,
        threads: &Threads,
        grads: &mut [f32],
        learning_rate: f64,
        weights: WeightsMut<'_>,
    ) -> StepOutcome {
        assert_eq!(grads.len(), self.layout.total, "one gradient for each parameter");
        for (tensor, state) in self.layout.tensors.iter().zip(&self.tensors) {
            if state.rule == Rule::Frozen {
                grads[tensor.range()].fill(0.0);
            }
        }
        let grad_norm = sum_squares(threads, grads).sqrt();
        if !grad_norm.is_finite() {
            return StepOutcome::Refused { grad_norm };
        }
        let clip_factor = self.settings.max_grad_norm.map_or(1.0, |max| (max / (grad_norm + 1e-6)).min(1.0));
        self.steps += 1;
        let cx = StepContext {
            settings: &self.settings,
            learning_rate,
            step: self.steps,
            grad_scale: clip_factor as f32,
        };
        let (mut pieces, matrices) =
            pieces(&self.layout, &mut self.masters, &mut self.tensors, grads, weights);
        let least = if self.layout.total < PIECE { pieces.len() } else { 1 };
        threads.for_each_row_chunk(&mut pieces, 1, least, |_, pieces| {
            let mut scratch = [Vec::new(), Vec::new()];
            pieces.iter_mut().for_each(|piece| cx.run(piece, &mut scratch));
        });
        cx.run_matrices(threads, matrices);
        StepOutcome::Applied { grad_norm, clip_factor }
    }

    /// Moves the corrections of routers by `rate`: up for experts that had less than the mean load, down for those that had more
    /// (Wang et al., arXiv 2408.15664). They are the model's, not the gradient's: no rate or decay of `step` touches them.
    pub fn balance(&mut self, load: &ExpertLoad, rate: f64) {
        let corrections = self.layout.tensors.iter().filter(|tensor| tensor.kind == TensorKind::RouterBias);
        let layers: Vec<&[u64]> = load.counts.chunks_exact(load.experts.max(1)).collect();
        for (tensor, counts) in corrections.zip(layers) {
            let sum: u64 = counts.iter().sum();
            let experts = tensor.len() as u64;
            for (correction, &count) in self.masters[tensor.range()].iter_mut().zip(counts) {
                match (count * experts).cmp(&sum) {
                    Ordering::Less => *correction += rate as f32,
                    Ordering::Greater => *correction -= rate as f32,
                    Ordering::Equal => {}
                }
            }
        }
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

    /// Every tensor of the state; with [`Optimizer::steps`] this is all of it.
    pub fn state(&self) -> impl Iterator<Item = StateTensor<'_>> {
        let masters = self.layout.tensors.iter().map(|tensor| StateTensor {
            name: format!("master.{}", tensor.name),
            shape: tensor.shape.clone(),
            values: StateValues::F32(&self.masters[tensor.range()]),
        });
        masters.chain(self.layout.tensors.iter().zip(&self.tensors).flat_map(|(tensor, state)| {
            let names = state.rule.moments().into_iter().flatten();
            names.zip([&state.first, &state.second]).flat_map(|(part, moment)| {
                let name = format!("{part}.{}", tensor.name);
                let (values, scales) = moment.parts();
                let scales = scales.map(|values| StateTensor {
                    name: format!("{name}.scales"),
                    shape: vec![values.len()],
                    values,
                });
                let values = values.map(|values| StateTensor { name, shape: tensor.shape.clone(), values });
                values.into_iter().chain(scales)
            })
        }))
    }

    /// The same to write to.
    pub fn state_mut(&mut self) -> Vec<StateTensorMut<'_>> {
        let mut found = Vec::new();
        let mut masters: &mut [f32] = &mut self.masters;
        for (tensor, state) in self.layout.tensors.iter().zip(&mut self.tensors) {
            let values = masters.split_off_mut(..tensor.len()).expect("tensors fill the arena in order");
            let mut put = |name, shape, values| found.push(StateTensorMut { name, shape, values });
            put(format!("master.{}", tensor.name), tensor.shape.clone(), StateValuesMut::F32(values));
            let names = state.rule.moments().into_iter().flatten();
            for (part, moment) in names.zip([&mut state.first, &mut state.second]) {
                let name = format!("{part}.{}", tensor.name);
                let (values, scales) = moment.parts_mut();
                if let Some(scales) = scales {
                    put(format!("{name}.scales"), vec![scales.len()], scales);
                }
                if let Some(values) = values {
                    put(name, tensor.shape.clone(), values);
                }
            }
        }
        found
    }

    /// Says how many updates are in a state that was written with [`Optimizer::state_mut`].
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }
}

impl TensorState {
    fn new(settings: &OptimizerSettings, growth: Option<&Growth>, tensor: &TensorSpec) -> Self {
        let config = &settings.config;
        let fits = |text: &str| Selector::new(text).is_ok_and(|selector| selector.fits(tensor));
        let group = config.param_groups.iter().find(|group| fits(&group.params));
        let lr_scale = group.map_or(1.0, |group| group.lr_scale);
        let frozen = tensor.kind == TensorKind::RouterBias
            || (config.freeze_vision && fits("vision"))
            || lr_scale == 0.0
            || config.freeze.iter().any(|params| fits(params));
        let rule = if frozen { Rule::Frozen } else { rule_of(config.optimizer, tensor) };
        let decays = settings.decay_1d || tensor.shape.len() > 1;
        let weight_decay = group.and_then(|group| group.weight_decay).unwrap_or(if decays {
            settings.weight_decay
        } else {
            0.0
        });
        // With another rate decay keeps its pace: rate · decay is that of the base.
        let grown = growth.map_or(1.0, |growth| growth.rate(tensor));
        let (lr_scale, weight_decay) = (lr_scale * grown, weight_decay / grown);
        let moment = |used: bool, form| match used {
            true => Moment::zeros(config.optimizer_state, form, tensor.len()),
            false => Moment::None,
        };
        let [first, second] = rule.moments().map(|name| name.is_some());
        let plain = rule == Rule::Sgd && config.decay_of_momentum() == 0.0;
        Self {
            rule,
            lr_scale,
            weight_decay,
            first: moment(first && !plain, Minifloat::Signed),
            second: moment(second, Minifloat::Positive),
        }
    }
}

fn rule_of(kind: OptimizerKind, tensor: &TensorSpec) -> Rule {
    match kind {
        OptimizerKind::Adamw => Rule::Adamw,
        OptimizerKind::Lion => Rule::Lion,
        OptimizerKind::Sgd => Rule::Sgd,
        OptimizerKind::Muon => muon_shape(tensor).map_or(Rule::Adamw, Rule::Muon),
    }
}

/// The matrix, or each of the matrices, that Muon orthogonalises.
fn muon_shape(tensor: &TensorSpec) -> Option<muon::Shape> {
    let hidden = matches!(tensor.kind, TensorKind::Attention | TensorKind::Mlp | TensorKind::Expert);
    match tensor.shape[..] {
        [rows, cols] if hidden => Some(muon::Shape { rows, cols, transposed: false }),
        [_, rows, cols] if hidden => Some(muon::Shape { rows, cols, transposed: true }),
        _ => None,
    }
}

/// A part of one tensor with all that belongs to it.
struct Piece<'a> {
    rule: Rule,
    lr_scale: f64,
    weight_decay: f64,
    /// Number of the tensor, and of the part's first value in it.
    tensor: usize,
    start: usize,
    params: &'a mut [f32],
    first: MomentMut<'a>,
    second: MomentMut<'a>,
    grad: &'a mut [f32],
    weights: WeightsMut<'a>,
}

/// Where the weights of a part go.
enum WeightsMut<'a> {
    /// Nowhere, and the gradient is kept.
    None,
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> WeightsMut<'a> {
    fn of(params: &'a mut Params) -> Self {
        match &mut params.data {
            ParamData::F32(values) => Self::F32(values),
            ParamData::Bf16(values) => Self::Bf16(values),
        }
    }

    /// Takes the first `len` off.
    fn split_off(&mut self, len: usize) -> WeightsMut<'a> {
        match self {
            Self::None => WeightsMut::None,
            Self::F32(values) => {
                WeightsMut::F32(values.split_off_mut(..len).expect("as long as the masters"))
            }
            Self::Bf16(values) => {
                WeightsMut::Bf16(values.split_off_mut(..len).expect("as long as the masters"))
            }
        }
    }

    /// Ends the update of a part: its weights follow from `masters`, its gradient is used up.
    fn take(self, masters: &[f32], grad: &mut [f32]) {
        match self {
            Self::None => return,
            Self::F32(values) => values.copy_from_slice(masters),
            Self::Bf16(values) => freewheel_kernels::convert::f32_to_bf16(masters, values),
        }
        grad.fill(0.0);
    }
}

/// Parts to move value by value, and matrices to move whole.
fn pieces<'a>(
    layout: &ParamLayout,
    mut masters: &'a mut [f32],
    tensors: &'a mut [TensorState],
    mut grads: &'a mut [f32],
    mut weights: WeightsMut<'a>,
) -> (Vec<Piece<'a>>, Vec<Piece<'a>>) {
    let (mut pieces, mut matrices) = (Vec::new(), Vec::new());
    for (index, (spec, state)) in layout.tensors.iter().zip(tensors).enumerate() {
        let mut params = masters.split_off_mut(..spec.len()).expect("tensors fill the arena in order");
        let mut grad = grads.split_off_mut(..spec.len()).expect("one gradient for each parameter");
        let mut weights = weights.split_off(spec.len());
        let (mut first, mut second) = (state.first.borrow(), state.second.borrow());
        let longest = match state.rule {
            Rule::Frozen => continue,
            Rule::Muon(shape) => shape.rows * shape.cols,
            Rule::Adamw | Rule::Lion | Rule::Sgd => PIECE,
        };
        // The moments of fused experts are split only where blocks end.
        let longest = match state.rule {
            Rule::Muon(_) if !longest.is_multiple_of(BLOCK) => spec.len(),
            _ => longest,
        };
        while !params.is_empty() {
            let len = longest.min(params.len());
            let piece = Piece {
                rule: state.rule,
                lr_scale: state.lr_scale,
                weight_decay: state.weight_decay,
                tensor: index,
                start: spec.len() - params.len(),
                params: params.split_off_mut(..len).expect("no longer than what is left"),
                first: first.split_off(len),
                second: second.split_off(len),
                grad: grad.split_off_mut(..len).expect("as long as the parameters"),
                weights: weights.split_off(len),
            };
            match state.rule {
                Rule::Muon(_) => matrices.push(piece),
                _ => pieces.push(piece),
            }
        }
    }
    (pieces, matrices)
}

/// One update, the same for all pieces.
struct StepContext<'a> {
    settings: &'a OptimizerSettings,
    learning_rate: f64,
    step: u64,
    grad_scale: f32,
}

impl StepContext<'_> {
    fn run(&self, piece: &mut Piece<'_>, scratch: &mut [Vec<f32>; 2]) {
        let [beta1, beta2] = self.settings.betas.map(|beta| beta as f32);
        let (lr, weight_decay) = ((self.learning_rate * piece.lr_scale) as f32, piece.weight_decay as f32);
        let (config, scale) = (&self.settings.config, self.grad_scale);
        match piece.rule {
            Rule::Frozen | Rule::Muon(_) => unreachable!("neither moves value by value"),
            Rule::Adamw => {
                let eps = config.eps as f32;
                let constants = kernels::AdamW::at_step(lr, beta1, beta2, eps, weight_decay, self.step);
                self.each_stride(piece, scratch, |p, m, v, g| {
                    adamw_step(&Threads::single(), p, m, v, g, &constants, scale);
                });
            }
            Rule::Lion => {
                let constants = kernels::Lion { lr, beta1, beta2, weight_decay };
                self.each_stride(piece, scratch, |p, m, _, g| lion_step(p, m, g, &constants, scale));
            }
            Rule::Sgd => {
                let momentum = config.decay_of_momentum() as f32;
                let nesterov = config.nesterov && momentum > 0.0;
                let constants = kernels::Sgd { lr, momentum, nesterov, weight_decay };
                let mut none = Vec::new();
                self.each_stride(piece, scratch, |p, m, _, g| {
                    // Without momentum nothing is kept: the buffer is the gradient, once.
                    none.clear();
                    none.resize(if m.is_empty() { p.len() } else { 0 }, 0.0);
                    let m = if m.is_empty() { &mut none } else { m };
                    sgd_step(p, m, g, &constants, scale);
                });
            }
        }
    }

    /// Calls `kernel` on parameters, moments and gradient, a stretch at a time.
    fn each_stride(
        &self,
        piece: &mut Piece<'_>,
        scratch: &mut [Vec<f32>; 2],
        mut kernel: impl FnMut(&mut [f32], &mut [f32], &mut [f32], &[f32]),
    ) {
        let [first_scratch, second_scratch] = scratch;
        let (random1, random2) = (self.rounding(piece.tensor, 0), self.rounding(piece.tensor, 1));
        let strides = piece.params.chunks_mut(STRIDE).zip(piece.grad.chunks_mut(STRIDE));
        for (at, (params, grad)) in (piece.start as u64..).step_by(STRIDE).zip(strides) {
            let (mut first, mut second) =
                (piece.first.split_off(params.len()), piece.second.split_off(params.len()));
            kernel(params, first.open(first_scratch), second.open(second_scratch), grad);
            first.close(first_scratch, &random1, at);
            second.close(second_scratch, &random2, at);
            piece.weights.split_off(params.len()).take(params, grad);
        }
    }

    fn rounding(&self, tensor: usize, moment: u64) -> CounterRng {
        CounterRng::new(ROUNDING ^ self.step, 2 * tensor as u64 + moment)
    }

    /// Many small matrices go side by side, few large ones one after the other, each on all threads.
    fn run_matrices(&self, threads: &Threads, mut matrices: Vec<Piece<'_>>) {
        if matrices.len() >= 4 * threads.count() {
            let single = Threads::single();
            threads.for_each_row_chunk(&mut matrices, 1, 1, |_, matrices| {
                matrices.iter_mut().for_each(|piece| self.run_muon(&single, piece));
            });
        } else {
            matrices.iter_mut().for_each(|piece| self.run_muon(threads, piece));
        }
    }

    fn run_muon(&self, threads: &Threads, piece: &mut Piece<'_>) {
        let Rule::Muon(shape) = piece.rule else { unreachable!("only Muon moves matrices") };
        let config = &self.settings.config;
        let step = muon::Step {
            lr: self.learning_rate * piece.lr_scale,
            momentum: config.decay_of_momentum() as f32,
            nesterov: config.nesterov,
            weight_decay: piece.weight_decay,
            scale: config.muon_scale,
        };
        let mut scratch = Vec::new();
        let momentum = piece.first.open(&mut scratch);
        let size = shape.rows * shape.cols;
        let each = piece.params.chunks_mut(size).zip(momentum.chunks_mut(size)).zip(piece.grad.chunks(size));
        for ((params, momentum), grad) in each {
            muon::step(threads, shape, params, momentum, grad, self.grad_scale, &step);
        }
        piece.first.close(&scratch, &self.rounding(piece.tensor, 0), piece.start as u64);
        piece.weights.split_off(piece.params.len()).take(piece.params, piece.grad);
    }
}
