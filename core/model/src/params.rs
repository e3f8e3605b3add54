//! Every parameter of a model in one flat arena, under its checkpoint name and shape.
//!
//! The order inside a layer puts what the kernels fuse side by side: q, k, v rows form one matrix, gate and up another.
//! A delta, a checkpoint, an optimiser state and a gradient all share this layout.

use std::ops::Range;
use std::sync::Arc;

use freewheel_types::{Digest, TensorEntry, WeightsDtype};
use half::bf16;

use crate::spec::{
    AttentionSpec, ExpertNames, FfnSpec, LatentSpec, ModelSpec, MoeSpec, OutputHead, QkNorm, RouterKind,
    TensorNames, VisionSpec,
};

/// What a tensor is, for initialisation, decay and parametrisation rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorKind {
    /// Token embedding `[V, D]` (also the head when tied).
    Embedding,
    /// Output head `[V, D]`, or `[labels, D]`.
    Head,
    /// Norm gain.
    Norm,
    /// Bias; also attention sinks.
    Bias,
    /// Attention projection `[out, in]`.
    Attention,
    /// Dense or shared-expert projection `[out, in]`.
    Mlp,
    /// Routed expert projection: `[out, in]`, or `[E, in, out]` when fused.
    Expert,
    /// Router `[E, D]`.
    Router,
    /// Learned positions and class token of an image encoder.
    Position,
    /// Correction of each expert's score `[E]`, used in choosing only. No gradient reaches it and the optimiser leaves
    /// it alone: it belongs to a balancing rule of its own.
    RouterBias,
}

/// One tensor in the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Checkpoint name.
    pub name: String,
    /// Shape as in the checkpoint.
    pub shape: Vec<usize>,
    /// First element in the arena.
    pub offset: usize,
    /// What it is.
    pub kind: TensorKind,
}

impl TensorSpec {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements (never, in a checked model).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its place in the arena.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Names, shapes and places of all tensors of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamLayout {
    /// Tensors in arena order, gapless.
    pub tensors: Vec<TensorSpec>,
    /// Elements in all.
    pub total: usize,
}

/// The values of an arena.
#[derive(Clone, Debug, PartialEq)]
pub enum ParamData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
}

/// All parameters of one model, as values.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// Names and places.
    pub layout: Arc<ParamLayout>,
    /// Values, `layout.total` of them.
    pub data: ParamData,
}

impl ParamLayout {
    /// The layout of `spec`.
    pub fn new(spec: &ModelSpec) -> Self {
        let mut builder = Builder { tensors: Vec::new(), total: 0 };
        let prefix = spec.prefix();
        builder.push(
            &format!("{prefix}model.embed_tokens.weight"),
            &[spec.vocab_size, spec.hidden],
            TensorKind::Embedding,
        );
        for index in 0..spec.layers.len() {
            builder.layer(spec, index);
        }
        builder.push(&format!("{prefix}model.norm.weight"), &[spec.hidden], TensorKind::Norm);
        match spec.head {
            OutputHead::LanguageModel if spec.tied_embeddings => {}
            OutputHead::LanguageModel => {
                let shape = [spec.vocab_size, spec.hidden];
                builder.push(&format!("{prefix}lm_head.weight"), &shape, TensorKind::Head);
            }
            OutputHead::Classifier { labels } => {
                builder.push("score.weight", &[labels, spec.hidden], TensorKind::Head);
            }
        }
        if let Some(vision) = &spec.vision {
            builder.vision(vision, spec.hidden);
        }
        Self { tensors: builder.tensors, total: builder.total }
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&TensorSpec> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The table a manifest carries.
    pub fn entries(&self) -> Vec<TensorEntry> {
        self.tensors
            .iter()
            .map(|t| TensorEntry { name: t.name.clone(), shape: t.shape.iter().map(|&n| n as u64).collect() })
            .collect()
    }
}

struct Builder {
    tensors: Vec<TensorSpec>,
    total: usize,
}

impl Builder {
    fn push(&mut self, name: &str, shape: &[usize], kind: TensorKind) {
        let tensor = TensorSpec { name: name.to_owned(), shape: shape.to_vec(), offset: self.total, kind };
        self.total += tensor.len();
        self.tensors.push(tensor);
    }

    fn layer(&mut self, spec: &ModelSpec, index: usize) {
        let (attention, ffn) = &spec.layers[index];
        let d = spec.hidden;
        let at = format!("{}model.layers.{index}", spec.prefix());
        self.push(&format!("{at}.input_layernorm.weight"), &[d], TensorKind::Norm);
        match &attention.latent {
            None => self.qkv(&format!("{at}.self_attn"), d, attention),
            Some(latent) => self.latent_qkv(&format!("{at}.self_attn"), d, attention, latent),
        }
        self.push(
            &format!("{at}.self_attn.o_proj.weight"),
            &[d, attention.out_width()],
            TensorKind::Attention,
        );
        if attention.out_bias {
            self.push(&format!("{at}.self_attn.o_proj.bias"), &[d], TensorKind::Bias);
        }
        if attention.sinks {
            self.push(&format!("{at}.self_attn.sinks"), &[attention.heads], TensorKind::Bias);
        }
        self.push(&format!("{at}.post_attention_layernorm.weight"), &[d], TensorKind::Norm);
        if spec.sandwich_norms {
            self.push(&format!("{at}.pre_feedforward_layernorm.weight"), &[d], TensorKind::Norm);
            self.push(&format!("{at}.post_feedforward_layernorm.weight"), &[d], TensorKind::Norm);
        }
        let names = &spec.names;
        match ffn {
            FfnSpec::Dense { width, .. } => {
                self.mlp(&format!("{at}.{}", names.mlp), d, *width, TensorKind::Mlp);
            }
            FfnSpec::Moe(moe) => self.moe(names, &format!("{at}.{}", names.moe), d, moe),
        }
    }

    /// An image encoder with its adapter and the projector to the decoder's width `d`.
    fn vision(&mut self, spec: &VisionSpec, d: usize) {
        let (h, at) = (spec.hidden, "vision_model");
        let patch = spec.channels * spec.patch_size * spec.patch_size;
        self.push(&format!("{at}.patch_embedding.linear.weight"), &[h, patch], TensorKind::Mlp);
        self.push(&format!("{at}.class_embedding"), &[h], TensorKind::Position);
        self.push(&format!("{at}.positional_embedding_vlm"), &[spec.rows(), h], TensorKind::Position);
        self.layer_norm(&format!("{at}.layernorm_pre"), h);
        for layer in 0..spec.layers {
            let at = format!("{at}.model.layers.{layer}");
            self.layer_norm(&format!("{at}.input_layernorm"), h);
            for name in ["q", "k", "v"] {
                self.push(&format!("{at}.self_attn.{name}_proj.weight"), &[h, h], TensorKind::Attention);
            }
            for name in ["q", "k", "v"] {
                self.push(&format!("{at}.self_attn.{name}_proj.bias"), &[h], TensorKind::Bias);
            }
            self.push(&format!("{at}.self_attn.o_proj.weight"), &[h, h], TensorKind::Attention);
            self.push(&format!("{at}.self_attn.o_proj.bias"), &[h], TensorKind::Bias);
            self.layer_norm(&format!("{at}.post_attention_layernorm"), h);
            self.push(&format!("{at}.mlp.fc1.weight"), &[spec.width, h], TensorKind::Mlp);
            self.push(&format!("{at}.mlp.fc1.bias"), &[spec.width], TensorKind::Bias);
            self.push(&format!("{at}.mlp.fc2.weight"), &[h, spec.width], TensorKind::Mlp);
            self.push(&format!("{at}.mlp.fc2.bias"), &[h], TensorKind::Bias);
        }
        self.layer_norm(&format!("{at}.layernorm_post"), h);
        let shuffled = h * spec.shuffle * spec.shuffle;
        let adapter = format!("{at}.vision_adapter.mlp");
        self.push(&format!("{adapter}.fc1.weight"), &[spec.adapter_width, shuffled], TensorKind::Mlp);
        self.push(&format!("{adapter}.fc2.weight"), &[spec.output, spec.adapter_width], TensorKind::Mlp);
        self.push("multi_modal_projector.linear_1.weight", &[d, spec.output], TensorKind::Mlp);
    }

    /// Gain, then bias.
    fn layer_norm(&mut self, at: &str, width: usize) {
        self.push(&format!("{at}.weight"), &[width], TensorKind::Norm);
        self.push(&format!("{at}.bias"), &[width], TensorKind::Bias);
    }

    fn qkv(&mut self, at: &str, d: usize, attention: &AttentionSpec) {
        let (q, kv) = (attention.query_width(), attention.key_width());
        for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
            self.push(&format!("{at}.{name}_proj.weight"), &[rows, d], TensorKind::Attention);
        }
        if attention.qkv_bias {
            for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
                self.push(&format!("{at}.{name}_proj.bias"), &[rows], TensorKind::Bias);
            }
        }
        let qk_norm = match attention.qk_norm {
            QkNorm::PerHead => Some((attention.head_dim, attention.head_dim)),
            QkNorm::WholeProjection => Some((q, kv)),
            QkNorm::None | QkNorm::WeightlessAfterRope => None,
        };
        if let Some((q_width, k_width)) = qk_norm {
            self.push(&format!("{at}.q_norm.weight"), &[q_width], TensorKind::Norm);
            self.push(&format!("{at}.k_norm.weight"), &[k_width], TensorKind::Norm);
        }
    }

    /// What reads the residual stream first and side by side, then what unpacks it.
    fn latent_qkv(&mut self, at: &str, d: usize, attention: &AttentionSpec, latent: &LatentSpec) {
        let [q, kv_rank, rotary] = attention.projected_widths();
        let q_name = if latent.q_rank.is_some() { "q_a_proj" } else { "q_proj" };
        let reads = [(q_name, q), ("kv_a_proj_with_mqa", kv_rank + rotary)];
        for (name, rows) in reads {
            self.push(&format!("{at}.{name}.weight"), &[rows, d], TensorKind::Attention);
        }
        if attention.qkv_bias {
            for (name, rows) in reads {
                self.push(&format!("{at}.{name}.bias"), &[rows], TensorKind::Bias);
            }
        }
        if let Some(rank) = latent.q_rank {
            let shape = [attention.query_width(), rank];
            self.push(&format!("{at}.q_a_layernorm.weight"), &[rank], TensorKind::Norm);
            self.push(&format!("{at}.q_b_proj.weight"), &shape, TensorKind::Attention);
        }
        let shape = [attention.heads * (latent.nope_dim + latent.value_dim), kv_rank];
        self.push(&format!("{at}.kv_a_layernorm.weight"), &[kv_rank], TensorKind::Norm);
        self.push(&format!("{at}.kv_b_proj.weight"), &shape, TensorKind::Attention);
    }

    fn mlp(&mut self, at: &str, d: usize, width: usize, kind: TensorKind) {
        self.push(&format!("{at}.gate_proj.weight"), &[width, d], kind);
        self.push(&format!("{at}.up_proj.weight"), &[width, d], kind);
        self.push(&format!("{at}.down_proj.weight"), &[d, width], kind);
    }

    fn moe(&mut self, names: &TensorNames, at: &str, d: usize, moe: &MoeSpec) {
        let router = names.router;
        self.push(&format!("{at}.{router}.weight"), &[moe.experts, d], TensorKind::Router);
        if moe.bias {
            self.push(&format!("{at}.{router}.bias"), &[moe.experts], TensorKind::Bias);
        }
        if let RouterKind::SigmoidGrouped { .. } = moe.router {
            let name = format!("{at}.{router}.e_score_correction_bias");
            self.push(&name, &[moe.experts], TensorKind::RouterBias);
        }
        match names.experts {
            ExpertNames::Fused => {
                let (e, f) = (moe.experts, moe.width);
                self.push(&format!("{at}.experts.gate_up_proj"), &[e, d, 2 * f], TensorKind::Expert);
                self.push(&format!("{at}.experts.down_proj"), &[e, f, d], TensorKind::Expert);
                if moe.bias {
                    self.push(&format!("{at}.experts.gate_up_proj_bias"), &[e, 2 * f], TensorKind::Bias);
                    self.push(&format!("{at}.experts.down_proj_bias"), &[e, d], TensorKind::Bias);
                }
            }
            ExpertNames::Each([gate, up, down]) => (0..moe.experts).for_each(|e| {
                for (name, shape) in [(gate, [moe.width, d]), (up, [moe.width, d]), (down, [d, moe.width])] {
                    self.push(&format!("{at}.experts.{e}.{name}.weight"), &shape, TensorKind::Expert);
                }
            }),
        }
        if let Some(width) = moe.shared_width {
            self.mlp(&format!("{at}.{}", names.shared_expert), d, width, TensorKind::Mlp);
        }
    }
}

impl Params {
    /// Element type.
    pub fn dtype(&self) -> WeightsDtype {
        match self.data {
            ParamData::F32(_) => WeightsDtype::F32,
            ParamData::Bf16(_) => WeightsDtype::Bf16,
        }
    }

    /// All values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            ParamData::F32(values) => values.clone(),
            ParamData::Bf16(values) => values.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// The values of `range` as f32.
    pub fn range_f32(&self, range: Range<usize>) -> Vec<f32> {
        match &self.data {
            ParamData::F32(values) => values[range].to_vec(),
            ParamData::Bf16(values) => values[range].iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// The arena as bytes, little-endian elements.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.data {
            ParamData::F32(values) => bytemuck::cast_slice(values),
            ParamData::Bf16(values) => bytemuck::cast_slice(values),
        }
    }

    /// Digest of the arena's bytes: two versions are the same weights if this is the same.
    pub fn digest(&self) -> Digest {
        Digest::of(self.as_bytes())
    }

    /// The same parameters in another element type (nearest even when narrowing).
    pub fn cast(&self, dtype: WeightsDtype) -> Self {
        let data = match (dtype, &self.data) {
            (WeightsDtype::F32, _) => ParamData::F32(self.to_f32()),
            (WeightsDtype::Bf16, ParamData::F32(values)) => {
                ParamData::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect())
            }
            (WeightsDtype::Bf16, ParamData::Bf16(values)) => ParamData::Bf16(values.clone()),
        };
        Self { layout: self.layout.clone(), data }
    }
}
