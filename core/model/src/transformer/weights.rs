//! One version of the weights in the layout the kernels want.

use std::ops::Range;
use std::sync::Arc;

use freewheel_kernels::{PackedMatrix, Precision, Quantisation, Threads};
use freewheel_types::PolicyVersion;
use half::bf16;

use super::bindings::{FfnBinding, Linear, MlpBinding, UnpackBinding};
use super::buffers::BufferPool;
use super::moe::RouterLosses;
use super::tape::UpdatePart;
use super::vision::VisionWeights;
use super::{Quantised, Transformer};
use crate::params::{ParamData, Params};

/// What packed weights are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Forward only.
    Sampling,
    /// Forward and backward: every projection is packed a second time, transposed.
    Training,
}

/// One policy version, packed.
///
/// Precision follows the parameters: bf16 parameters run on bf16 kernels (f32 accumulation) and keep keys and values in bf16,
/// f32 on f32. Router
/// matrices always run in f32, so that routing does not hang on the rounding of activations. The projections of a
/// [quantised](Transformer::quantised) model have the values of their codes.
#[derive(Debug)]
pub struct PolicyWeights {
    pub(super) model: Arc<Transformer>,
    pub(super) precision: Precision,
    pub(super) embedding: Table,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) final_norm: Vec<f32>,
    pub(super) head: PackedLinear,
    pub(super) vision: Option<VisionWeights>,
    pub(super) vision_frozen: bool,
    pub(super) train_options: TrainOptions,
    pub(super) pool: BufferPool,
    purpose: Purpose,
    version: PolicyVersion,
}

/// The embedding matrix, for look-ups.
#[derive(Debug)]
pub(super) enum Table {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// A projection, and its transpose for the backward pass.
#[derive(Debug)]
pub(super) struct PackedLinear {
    pub forward: PackedMatrix,
    pub backward: Option<PackedMatrix>,
    /// Its values are rounded so. Codes are stored for sampling only: a backward pass reads the transpose too, whose
    /// groups lie the other way.
    quantisation: Option<Quantisation>,
}

#[derive(Debug)]
pub(super) struct MlpWeights {
    pub gate_up: PackedLinear,
    pub gate_up_bias: Option<Vec<f32>>,
    pub down: PackedLinear,
    pub down_bias: Option<Vec<f32>>,
}

#[derive(Debug)]
pub(super) struct MoeWeights {
    pub router: PackedLinear,
    pub router_bias: Option<Vec<f32>>,
    pub correction: Option<Vec<f32>>,
    pub experts: Vec<MlpWeights>,
    pub shared: Option<MlpWeights>,
}

#[derive(Debug)]
pub(super) enum FfnWeights {
    Dense(MlpWeights),
    Moe(MoeWeights),
}

#[derive(Debug)]
pub(super) struct LatentWeights {
    pub q: Option<UnpackWeights>,
    pub kv: UnpackWeights,
}

#[derive(Debug)]
pub(super) struct UnpackWeights {
    pub norm: Vec<f32>,
    pub up: PackedLinear,
}

/// Norm gains are what the normed rows are multiplied by: a family's offset is already added to the weight.
#[derive(Debug)]
pub(super) struct LayerWeights {
    pub input_norm: Vec<f32>,
    pub qkv: PackedLinear,
    pub qkv_bias: Option<Vec<f32>>,
    pub latent: Option<LatentWeights>,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub out: PackedLinear,
    pub out_bias: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    pub attention_out_norm: Option<Vec<f32>>,
    pub post_norm: Vec<f32>,
    pub ffn_out_norm: Option<Vec<f32>>,
    pub ffn: FfnWeights,
}

/// How training passes are made.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TrainOptions {
    /// Keep only what enters each layer, and compute the rest again in the backward pass, with the same experts: about a third
    /// more arithmetic for a fraction of the memory. No bit of a result depends on it.
    pub recompute_layers: bool,
    /// Weight of the load-balancing loss (Fedus et al., arXiv 2101.03961, eq. 4): E·Σ f·P over the experts of a layer, f being the
    /// share of choices and P the mean softmax of the router's logits in the update; mean over layers.
    pub balance_coef: f32,
    /// Weight of the z-loss (Zoph et al., arXiv 2202.08906, eq. 5): the mean square of the logarithm of Σ exp over a router's
    /// logits; mean over layers.
    pub z_coef: f32,
}

impl PackedLinear {
    /// The transpose, which only weights packed for training have.
    pub fn transpose(&self) -> &PackedMatrix {
        self.backward.as_ref().expect("these weights were packed for sampling, not for training")
    }
}

impl PolicyWeights {
    /// Packs `params` as `version`.
    ///
    /// # Panics
    /// If `params` do not have the layout of `model`.
    pub fn pack(
        model: &Arc<Transformer>,
        params: &Params,
        version: PolicyVersion,
        purpose: Purpose,
        threads: &Threads,
    ) -> Self {
        let packer = Packer::new(model, params, purpose, threads);
        let precision = packer.precision;
        let bindings = &model.bindings;
        let mut weights = Self {
            precision,
            embedding: match params.data {
                ParamData::F32(_) => Table::F32(Vec::new()),
                ParamData::Bf16(_) => Table::Bf16(Vec::new()),
            },
            layers: (0..bindings.layers.len()).map(|layer| packer.layer(model, layer)).collect(),
            final_norm: Vec::new(),
            head: packer.empty_in(precision, packer.quantised.map(|q| q.head), &bindings.head),
            vision_frozen: false,
            train_options: TrainOptions::default(),
            vision: bindings.vision.as_ref().map(|at| VisionWeights::empty(at, &packer)),
            pool: BufferPool::default(),
            purpose,
            version,
            model: model.clone(),
        };
        weights.repack(params, version, threads);
        weights
    }

    /// Puts the values of `params` into the same allocation as `version`.
    ///
    /// # Panics
    /// If `params` have another layout or element type.
    pub fn repack(&mut self, params: &Params, version: PolicyVersion, threads: &Threads) {
        assert_eq!(params.layout.total, self.model.layout.total, "parameters of another model");
        let model = self.model.clone();
        let packer = Packer::new(&model, params, self.purpose, threads);
        let bindings = &model.bindings;
        match (&mut self.embedding, &params.data) {
            (Table::F32(table), ParamData::F32(values)) => {
                replace(table, &values[bindings.embedding.clone()])
            }
            (Table::Bf16(table), ParamData::Bf16(values)) => {
                replace(table, &values[bindings.embedding.clone()])
            }
            _ => panic!("parameters changed their element type"),
        }
        for (layer, binding) in self.layers.iter_mut().zip(&bindings.layers) {
            packer.fill_layer(layer, binding);
        }
        self.final_norm = packer.gain(&bindings.final_norm);
        packer.fill(&mut self.head, &bindings.head);
        if let (Some(vision), Some(at)) = (&mut self.vision, &bindings.vision) {
            vision.fill(at, &packer);
        }
        self.version = version;
    }

    /// Whether the image encoder (`vision_model`) is left out of the backward pass: it gets no gradient, and nothing is
    /// kept for one. The projector behind it is trained all the same.
    pub fn freeze_vision(&mut self, frozen: bool) {
        self.vision_frozen = frozen;
    }

    /// How training passes are made from now on.
    pub fn set_train_options(&mut self, options: TrainOptions) {
        self.train_options = options;
    }

    /// The losses of the router of `layer`, the `moe_layer`-th that routes, on a batch that is `part` of an update and whose rows went
    /// to `experts [T, MoE layers, K]`; `None` if it does not route.
    pub(super) fn router_losses<'p>(
        &self,
        part: &'p UpdatePart,
        experts: &[u16],
        (layer, moe_layer): (usize, usize),
    ) -> Option<RouterLosses<'p>> {
        let of_layer = self.moe_layer(layer)?.spec.experts;
        let spec = self.model.spec();
        let (layers, width, options) = (spec.moe_layers(), spec.experts(), &self.train_options);
        let mut counts = vec![0u64; width];
        if !part.choices.is_empty() {
            assert_eq!(part.choices.len(), layers * width, "choices of another model");
            counts.copy_from_slice(&part.choices[moe_layer * width..][..width]);
        } else if options.balance_coef != 0.0 {
            let chosen = experts.chunks_exact(spec.top_k()).skip(moe_layer).step_by(layers);
            chosen.flatten().for_each(|&id| counts[usize::from(id)] += 1);
        }
        let sum = counts.iter().sum::<u64>().max(1) as f64;
        counts.truncate(of_layer);
        Some(RouterLosses {
            balance: options.balance_coef / layers as f32,
            z: options.z_coef / layers as f32,
            rows: part.rows,
            shares: counts.iter().map(|&count| (count as f64 / sum) as f32).collect(),
            repeats: &part.repeats,
        })
    }

    /// The numbers that products, and keys and values, are in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Which version these weights are.
    pub fn version(&self) -> PolicyVersion {
        self.version
    }

    /// The structure they fit.
    pub fn model(&self) -> &Arc<Transformer> {
        &self.model
    }

    /// Bytes of the packed projections read by one forward pass over every weight.
    pub fn forward_bytes(&self) -> usize {
        let mlp = |w: &MlpWeights| w.gate_up.forward.bytes() + w.down.forward.bytes();
        let layers: usize = self
            .layers
            .iter()
            .map(|layer| {
                let ffn = match &layer.ffn {
                    FfnWeights::Dense(w) => mlp(w),
                    FfnWeights::Moe(moe) => {
                        moe.router.forward.bytes()
                            + moe.experts.iter().map(mlp).sum::<usize>()
                            + moe.shared.as_ref().map_or(0, mlp)
                    }
                };
                let unpack = layer.latent.as_ref().map_or(0, |latent| {
                    latent.q.iter().chain([&latent.kv]).map(|unpack| unpack.up.forward.bytes()).sum()
                });
                layer.qkv.forward.bytes() + unpack + layer.out.forward.bytes() + ffn
            })
            .sum();
        layers + self.head.forward.bytes()
    }
}

fn replace<T: Copy>(table: &mut Vec<T>, values: &[T]) {
    table.clear();
    table.extend_from_slice(values);
}

/// Packs pieces of an arena. Matrices are allocated empty first and filled by the one path that refills them.
pub(super) struct Packer<'a> {
    pub params: &'a Params,
    precision: Precision,
    purpose: Purpose,
    norm_offset: f32,
    quantised: Option<Quantised>,
    threads: &'a Threads,
}

impl<'a> Packer<'a> {
    fn new(model: &Transformer, params: &'a Params, purpose: Purpose, threads: &'a Threads) -> Self {
        let precision = match params.data {
            ParamData::F32(_) => Precision::F32,
            ParamData::Bf16(_) => Precision::Bf16,
        };
        let (norm_offset, quantised) = (model.spec.norm_offset, model.quantisation);
        Self { params, precision, purpose, norm_offset, quantised, threads }
    }

    /// Room for a projection that is never quantised.
    pub fn empty(&self, at: &Linear) -> PackedLinear {
        self.empty_in(self.precision, None, at)
    }

    /// Room for a projection of a layer.
    fn empty_projection(&self, at: &Linear) -> PackedLinear {
        self.empty_in(self.precision, self.quantised.map(|quantised| quantised.layers), at)
    }

    fn empty_in(
        &self,
        precision: Precision,
        quantisation: Option<Quantisation>,
        at: &Linear,
    ) -> PackedLinear {
        let training = self.purpose == Purpose::Training;
        PackedLinear {
            forward: match quantisation {
                Some(quantisation) if !training => {
                    PackedMatrix::quantised(quantisation, precision, at.n, at.k)
                }
                _ => PackedMatrix::zeros(precision, at.n, at.k),
            },
            backward: training.then(|| PackedMatrix::zeros(precision, at.k, at.n)),
            quantisation,
        }
    }

    fn empty_mlp(&self, at: &MlpBinding) -> MlpWeights {
        let (gate_up, down) = (self.empty_projection(&at.gate_up), self.empty_projection(&at.down));
        MlpWeights { gate_up, gate_up_bias: None, down, down_bias: None }
    }

    fn empty_unpack(&self, at: &UnpackBinding) -> UnpackWeights {
        UnpackWeights { norm: Vec::new(), up: self.empty_projection(&at.up) }
    }

    fn layer(&self, model: &Transformer, layer: usize) -> LayerWeights {
        let binding = &model.bindings.layers[layer];
        LayerWeights {
            input_norm: Vec::new(),
            qkv: self.empty_projection(&binding.qkv),
            qkv_bias: None,
            latent: binding.latent.as_ref().map(|latent| LatentWeights {
                q: latent.q.as_ref().map(|at| self.empty_unpack(at)),
                kv: self.empty_unpack(&latent.kv),
            }),
            q_norm: None,
            k_norm: None,
            out: self.empty_projection(&binding.out),
            out_bias: None,
            sinks: None,
            attention_out_norm: None,
            post_norm: Vec::new(),
            ffn_out_norm: None,
            ffn: match &binding.ffn {
                FfnBinding::Dense(mlp) => FfnWeights::Dense(self.empty_mlp(mlp)),
                FfnBinding::Moe(moe) => FfnWeights::Moe(MoeWeights {
                    router: self.empty_in(Precision::F32, None, &moe.router),
                    router_bias: None,
                    correction: None,
                    experts: moe.experts.iter().map(|mlp| self.empty_mlp(mlp)).collect(),
                    shared: moe.shared.as_ref().map(|mlp| self.empty_mlp(mlp)),
                }),
            },
        }
    }

    fn fill_layer(&self, layer: &mut LayerWeights, binding: &super::bindings::LayerBinding) {
        let gain = |range: &Range<usize>| self.gain(range);
        layer.input_norm = gain(&binding.input_norm);
        layer.qkv_bias = self.bias(&binding.qkv_bias);
        layer.q_norm = binding.q_norm.as_ref().map(gain);
        layer.k_norm = binding.k_norm.as_ref().map(gain);
        layer.out_bias = self.bias(&binding.out_bias);
        layer.sinks = self.bias(&binding.sinks);
        layer.attention_out_norm = binding.attention_out_norm.as_ref().map(gain);
        layer.post_norm = gain(&binding.post_norm);
        layer.ffn_out_norm = binding.ffn_out_norm.as_ref().map(gain);
        self.fill(&mut layer.qkv, &binding.qkv);
        if let (Some(latent), Some(at)) = (&mut layer.latent, &binding.latent) {
            for (unpack, at) in latent.q.iter_mut().zip(&at.q).chain([(&mut latent.kv, &at.kv)]) {
                unpack.norm = gain(&at.norm);
                self.fill(&mut unpack.up, &at.up);
            }
        }
        self.fill(&mut layer.out, &binding.out);
        match (&mut layer.ffn, &binding.ffn) {
            (FfnWeights::Dense(weights), FfnBinding::Dense(at)) => self.fill_mlp(weights, at),
            (FfnWeights::Moe(weights), FfnBinding::Moe(at)) => {
                self.fill(&mut weights.router, &at.router);
                weights.router_bias = self.bias(&at.router_bias);
                weights.correction = self.bias(&at.correction);
                for (expert, at) in weights.experts.iter_mut().zip(&at.experts) {
                    self.fill_mlp(expert, at);
                }
                if let (Some(shared), Some(at)) = (&mut weights.shared, &at.shared) {
                    self.fill_mlp(shared, at);
                }
            }
            _ => unreachable!("weights are made from the same bindings"),
        }
    }

    fn fill_mlp(&self, weights: &mut MlpWeights, at: &MlpBinding) {
        self.fill(&mut weights.gate_up, &at.gate_up);
        self.fill(&mut weights.down, &at.down);
        weights.gate_up_bias = self.bias(&at.gate_up_bias);
        weights.down_bias = self.bias(&at.down_bias);
    }

    fn bias(&self, at: &Option<Range<usize>>) -> Option<Vec<f32>> {
        at.as_ref().map(|range| self.params.range_f32(range.clone()))
    }

    fn gain(&self, at: &Range<usize>) -> Vec<f32> {
        let mut gain = self.params.range_f32(at.clone());
        gain.iter_mut().for_each(|weight| *weight += self.norm_offset);
        gain
    }

    pub fn fill(&self, packed: &mut PackedLinear, at: &Linear) {
        match (packed.quantisation, self.purpose) {
            (Some(quantisation), Purpose::Training) => self.fill_rounded(packed, quantisation, at),
            _ => self.fill_as_stored(packed, at),
        }
    }

    fn fill_as_stored(&self, packed: &mut PackedLinear, at: &Linear) {
        match &self.params.data {
            ParamData::F32(values) => {
                let values = &values[at.range()];
                in_both(packed, at.transposed, |packed, transposed| match transposed {
                    false => packed.repack_from_f32(self.threads, values),
                    true => packed.repack_from_f32_transposed(self.threads, values),
                });
            }
            ParamData::Bf16(values) => {
                let values = &values[at.range()];
                in_both(packed, at.transposed, |packed, transposed| match transposed {
                    false => packed.repack_from_bf16(self.threads, values),
                    true => packed.repack_from_bf16_transposed(self.threads, values),
                });
            }
        }
    }

    /// Fills in the values that the codes of the same parameters stand for.
    fn fill_rounded(&self, packed: &mut PackedLinear, quantisation: Quantisation, at: &Linear) {
        let (shape, mut rounded) = ((at.n, at.k), Vec::new());
        match &self.params.data {
            ParamData::F32(values) => {
                quantisation.round(self.threads, &values[at.range()], shape, at.transposed, &mut rounded);
            }
            ParamData::Bf16(values) => {
                quantisation.round(self.threads, &values[at.range()], shape, at.transposed, &mut rounded);
            }
        }
        in_both(packed, at.transposed, |packed, transposed| match transposed {
            false => packed.repack_from_f32(self.threads, &rounded),
            true => packed.repack_from_f32_transposed(self.threads, &rounded),
        });
    }
}

/// Calls `fill` for a matrix and its transpose, with whether the stored values are the other way round for it.
fn in_both(packed: &mut PackedLinear, transposed: bool, fill: impl Fn(&mut PackedMatrix, bool)) {
    fill(&mut packed.forward, transposed);
    if let Some(backward) = &mut packed.backward {
        fill(backward, !transposed);
    }
}
