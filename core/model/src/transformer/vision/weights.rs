//! The image encoder's parameters: where they lie, and packed for the kernels.

use std::ops::Range;

use super::super::bindings::Index;
use super::super::weights::Packer;
use super::affine::{Affine, AffineBinding, AffineWeights, Norm, NormBinding, NormWeights};
use crate::spec::VisionSpec;

#[derive(Clone, Debug)]
pub(in crate::transformer) struct VisionBinding {
    pub patch: AffineBinding,
    pub class: Range<usize>,
    pub positions: Range<usize>,
    pub pre: NormBinding,
    pub layers: Vec<VisionLayerBinding>,
    pub post: NormBinding,
    pub adapter: [AffineBinding; 2],
    pub projector: AffineBinding,
}

#[derive(Clone, Debug)]
pub(in crate::transformer) struct VisionLayerBinding {
    pub input_norm: NormBinding,
    pub qkv: AffineBinding,
    pub out: AffineBinding,
    pub post_norm: NormBinding,
    pub up: AffineBinding,
    pub down: AffineBinding,
}

#[derive(Debug)]
pub(in crate::transformer) struct VisionWeights {
    pub(super) patch: AffineWeights,
    /// `[h]`
    pub(super) class: Vec<f32>,
    /// `[P, h]`
    pub(super) positions: Vec<f32>,
    pub(super) pre: NormWeights,
    pub(super) layers: Vec<VisionLayerWeights>,
    pub(super) post: NormWeights,
    pub(super) adapter: [AffineWeights; 2],
    pub(super) projector: AffineWeights,
}

#[derive(Debug)]
pub(super) struct VisionLayerWeights {
    pub input_norm: NormWeights,
    pub qkv: AffineWeights,
    pub out: AffineWeights,
    pub post_norm: NormWeights,
    pub up: AffineWeights,
    pub down: AffineWeights,
}

impl VisionBinding {
    pub fn new(spec: &VisionSpec, index: &Index<'_>) -> Self {
        let at = "vision_model";
        let patch = spec.channels * spec.patch_size * spec.patch_size;
        let adapter = |n: usize, k: usize| {
            AffineBinding::new(index, &format!("{at}.vision_adapter.mlp.fc{n}"), k, false)
        };
        Self {
            patch: AffineBinding::new(index, &format!("{at}.patch_embedding.linear"), patch, false),
            class: index.range(&format!("{at}.class_embedding")),
            positions: index.range(&format!("{at}.positional_embedding_vlm")),
            pre: NormBinding::new(index, &format!("{at}.layernorm_pre")),
            layers: (0..spec.layers).map(|layer| VisionLayerBinding::new(spec, index, layer)).collect(),
            post: NormBinding::new(index, &format!("{at}.layernorm_post")),
            adapter: [adapter(1, spec.hidden * spec.shuffle * spec.shuffle), adapter(2, spec.adapter_width)],
            projector: AffineBinding::new(index, "multi_modal_projector.linear_1", spec.output, false),
        }
    }
}

impl VisionLayerBinding {
    fn new(spec: &VisionSpec, index: &Index<'_>, layer: usize) -> Self {
        let at = format!("vision_model.model.layers.{layer}");
        let qkv = ["q", "k", "v"].map(|name| format!("{at}.self_attn.{name}_proj"));
        Self {
            input_norm: NormBinding::new(index, &format!("{at}.input_layernorm")),
            qkv: AffineBinding::fused(index, &qkv, spec.hidden, true),
            out: AffineBinding::new(index, &format!("{at}.self_attn.o_proj"), spec.hidden, true),
            post_norm: NormBinding::new(index, &format!("{at}.post_attention_layernorm")),
            up: AffineBinding::new(index, &format!("{at}.mlp.fc1"), spec.hidden, true),
            down: AffineBinding::new(index, &format!("{at}.mlp.fc2"), spec.width, true),
        }
    }
}

impl VisionWeights {
    /// Weights of the right sizes, to be filled.
    pub fn empty(at: &VisionBinding, packer: &Packer<'_>) -> Self {
        let layer = |at: &VisionLayerBinding| VisionLayerWeights {
            input_norm: NormWeights::default(),
            qkv: at.qkv.empty(packer),
            out: at.out.empty(packer),
            post_norm: NormWeights::default(),
            up: at.up.empty(packer),
            down: at.down.empty(packer),
        };
        Self {
            patch: at.patch.empty(packer),
            class: Vec::new(),
            positions: Vec::new(),
            pre: NormWeights::default(),
            layers: at.layers.iter().map(layer).collect(),
            post: NormWeights::default(),
            adapter: [at.adapter[0].empty(packer), at.adapter[1].empty(packer)],
            projector: at.projector.empty(packer),
        }
    }

    /// Takes in the values of the packer's parameters.
    pub fn fill(&mut self, at: &VisionBinding, packer: &Packer<'_>) {
        at.patch.fill(&mut self.patch, packer);
        self.class = packer.params.range_f32(at.class.clone());
        self.positions = packer.params.range_f32(at.positions.clone());
        at.pre.fill(&mut self.pre, packer);
        for (weights, at) in self.layers.iter_mut().zip(&at.layers) {
            at.input_norm.fill(&mut weights.input_norm, packer);
            at.qkv.fill(&mut weights.qkv, packer);
            at.out.fill(&mut weights.out, packer);
            at.post_norm.fill(&mut weights.post_norm, packer);
            at.up.fill(&mut weights.up, packer);
            at.down.fill(&mut weights.down, packer);
        }
        at.post.fill(&mut self.post, packer);
        for (weights, at) in self.adapter.iter_mut().zip(&at.adapter) {
            at.fill(weights, packer);
        }
        at.projector.fill(&mut self.projector, packer);
    }
}

/// A map with its weights.
pub(super) fn affine<'a>(at: &'a AffineBinding, weights: &'a AffineWeights) -> Affine<'a> {
    Affine { at, weights }
}

/// A norm with its weights.
pub(super) fn norm<'a>(at: &'a NormBinding, weights: &'a NormWeights, eps: f32) -> Norm<'a> {
    Norm { at, weights, eps }
}
