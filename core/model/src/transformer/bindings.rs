//! Where each projection of each layer lies in the parameter arena.

use std::collections::HashMap;
use std::ops::Range;

use super::vision::VisionBinding;
use crate::params::{ParamLayout, TensorSpec};
use crate::spec::{
    Activation, AttentionSpec, ExpertNames, FfnSpec, LatentSpec, ModelSpec, MoeSpec, OutputHead, QkNorm,
    RouterKind, TensorNames,
};

/// A linear map `[n, k]` somewhere in the arena.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// First element.
    pub offset: usize,
    /// Output width.
    pub n: usize,
    /// Input width.
    pub k: usize,
    /// Stored `[k, n]` (Llama 4's fused experts) instead of `[n, k]`.
    pub transposed: bool,
}

impl Linear {
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.n * self.k
    }
}

/// A gated MLP: gate and up as one matrix `[2F, D]`, down `[D, F]`; biases `[2F]` and `[D]`.
#[derive(Clone, Debug)]
pub(super) struct MlpBinding {
    pub gate_up: Linear,
    pub gate_up_bias: Option<Range<usize>>,
    pub down: Linear,
    pub down_bias: Option<Range<usize>>,
    pub width: usize,
    pub activation: Activation,
}

#[derive(Clone, Debug)]
pub(super) struct MoeBinding {
    pub router: Linear,
    pub router_bias: Option<Range<usize>>,
    /// Correction of the experts' scores in the choice `[E]`.
    pub correction: Option<Range<usize>>,
    pub experts: Vec<MlpBinding>,
    pub shared: Option<MlpBinding>,
}

#[derive(Clone, Debug)]
pub(super) enum FfnBinding {
    Dense(MlpBinding),
    Moe(MoeBinding),
}

/// What unpacks the compressed queries, keys and values.
#[derive(Clone, Debug)]
pub(super) struct LatentBinding {
    pub q: Option<UnpackBinding>,
    pub kv: UnpackBinding,
}

/// The norm of a compressed vector, and the projection after it.
#[derive(Clone, Debug)]
pub(super) struct UnpackBinding {
    pub norm: Range<usize>,
    pub up: Linear,
}

#[derive(Clone, Debug)]
pub(super) struct LayerBinding {
    pub input_norm: Range<usize>,
    /// All that reads the residual stream: q, k, v, or what they are unpacked from.
    pub qkv: Linear,
    pub qkv_bias: Option<Range<usize>>,
    pub latent: Option<LatentBinding>,
    pub q_norm: Option<Range<usize>>,
    pub k_norm: Option<Range<usize>>,
    pub out: Linear,
    pub out_bias: Option<Range<usize>>,
    pub sinks: Option<Range<usize>>,
    /// Sandwich norm of the attention's output.
    pub attention_out_norm: Option<Range<usize>>,
    pub post_norm: Range<usize>,
    /// Sandwich norm of the feed-forward's output.
    pub ffn_out_norm: Option<Range<usize>>,
    pub ffn: FfnBinding,
}

#[derive(Clone, Debug)]
pub(super) struct ModelBinding {
    pub embedding: Range<usize>,
    pub layers: Vec<LayerBinding>,
    pub final_norm: Range<usize>,
    pub head: Linear,
    pub vision: Option<VisionBinding>,
}

impl ModelBinding {
    pub fn new(spec: &ModelSpec, layout: &ParamLayout) -> Self {
        let index = Index { by_name: layout.tensors.iter().map(|t| (t.name.as_str(), t)).collect() };
        let named = |name: &str| index.range(&format!("{}{name}", spec.prefix()));
        let embedding = named("model.embed_tokens.weight");
        let head = match spec.head {
            OutputHead::LanguageModel if spec.tied_embeddings => embedding.start,
            OutputHead::LanguageModel => named("lm_head.weight").start,
            OutputHead::Classifier { .. } => index.range("score.weight").start,
        };
        Self {
            layers: (0..spec.layers.len()).map(|layer| index.layer(spec, layer)).collect(),
            final_norm: named("model.norm.weight"),
            vision: spec.vision.as_ref().map(|vision| VisionBinding::new(vision, &index)),
            head: Linear { offset: head, n: spec.head_width(), k: spec.hidden, transposed: false },
            embedding,
        }
    }
}

/// Tensors by name. Panics on a missing one: the layout is made from the same spec.
pub(super) struct Index<'a> {
    by_name: HashMap<&'a str, &'a TensorSpec>,
}

impl Index<'_> {
    pub fn range(&self, name: &str) -> Range<usize> {
        self.by_name.get(name).unwrap_or_else(|| panic!("the layout holds no {name}")).range()
    }

    /// `parts`, which lie side by side, as one matrix.
    pub fn fused(&self, parts: &[String], k: usize) -> Linear {
        let ranges: Vec<_> = parts.iter().map(|name| self.range(name)).collect();
        for pair in ranges.windows(2) {
            assert_eq!(pair[0].end, pair[1].start, "{parts:?} do not lie side by side");
        }
        let (start, end) = (ranges[0].start, ranges[ranges.len() - 1].end);
        Linear { offset: start, n: (end - start) / k, k, transposed: false }
    }

    fn layer(&self, spec: &ModelSpec, layer: usize) -> LayerBinding {
        let (attention, ffn) = &spec.layers[layer];
        let d = spec.hidden;
        let at = format!("{}model.layers.{layer}", spec.prefix());
        let named = |name: &str| self.range(&format!("{at}.{name}"));
        let qkv = |suffix: &str| -> Vec<String> {
            read_projections(attention).iter().map(|p| format!("{at}.self_attn.{p}.{suffix}")).collect()
        };
        let weighted = matches!(attention.qk_norm, QkNorm::PerHead | QkNorm::WholeProjection);
        LayerBinding {
            input_norm: named("input_layernorm.weight"),
            qkv: self.fused(&qkv("weight"), d),
            qkv_bias: attention.qkv_bias.then(|| self.fused(&qkv("bias"), 1).range()),
            latent: attention.latent.as_ref().map(|latent| self.latent(&format!("{at}.self_attn"), latent)),
            q_norm: weighted.then(|| named("self_attn.q_norm.weight")),
            k_norm: weighted.then(|| named("self_attn.k_norm.weight")),
            out: self.fused(&[format!("{at}.self_attn.o_proj.weight")], attention.out_width()),
            out_bias: attention.out_bias.then(|| named("self_attn.o_proj.bias")),
            sinks: attention.sinks.then(|| named("self_attn.sinks")),
            attention_out_norm: spec.sandwich_norms.then(|| named("post_attention_layernorm.weight")),
            post_norm: named(if spec.sandwich_norms {
                "pre_feedforward_layernorm.weight"
            } else {
                "post_attention_layernorm.weight"
            }),
            ffn_out_norm: spec.sandwich_norms.then(|| named("post_feedforward_layernorm.weight")),
            ffn: match ffn {
                FfnSpec::Dense { width, activation } => {
                    let at = format!("{at}.{}", spec.names.mlp);
                    FfnBinding::Dense(self.mlp(&at, d, *width, *activation))
                }
                FfnSpec::Moe(moe) => {
                    let at = format!("{at}.{}", spec.names.moe);
                    FfnBinding::Moe(self.moe(&spec.names, &at, d, moe))
                }
            },
        }
    }

    fn latent(&self, at: &str, latent: &LatentSpec) -> LatentBinding {
        let unpack = |norm: &str, up: &str, rank: usize| UnpackBinding {
            norm: self.range(&format!("{at}.{norm}.weight")),
            up: self.fused(&[format!("{at}.{up}.weight")], rank),
        };
        LatentBinding {
            q: latent.q_rank.map(|rank| unpack("q_a_layernorm", "q_b_proj", rank)),
            kv: unpack("kv_a_layernorm", "kv_b_proj", latent.kv_rank),
        }
    }

    fn mlp(&self, at: &str, d: usize, width: usize, activation: Activation) -> MlpBinding {
        self.mlp_named(at, ["gate_proj", "up_proj", "down_proj"], d, width, activation)
    }

    fn mlp_named(
        &self,
        at: &str,
        [gate, up, down]: [&str; 3],
        d: usize,
        width: usize,
        activation: Activation,
    ) -> MlpBinding {
        MlpBinding {
            gate_up: self.fused(&[format!("{at}.{gate}.weight"), format!("{at}.{up}.weight")], d),
            gate_up_bias: None,
            down: self.fused(&[format!("{at}.{down}.weight")], width),
            down_bias: None,
            width,
            activation,
        }
    }

    fn moe(&self, names: &TensorNames, at: &str, d: usize, moe: &MoeSpec) -> MoeBinding {
        let router = names.router;
        let f = moe.width;
        let expert = |e: usize| match names.experts {
            ExpertNames::Fused => self.fused_expert(at, e, d, moe),
            ExpertNames::Each(parts) => {
                self.mlp_named(&format!("{at}.experts.{e}"), parts, d, f, moe.activation)
            }
        };
        MoeBinding {
            router: self.fused(&[format!("{at}.{router}.weight")], d),
            router_bias: moe.bias.then(|| self.range(&format!("{at}.{router}.bias"))),
            correction: matches!(moe.router, RouterKind::SigmoidGrouped { .. })
                .then(|| self.range(&format!("{at}.{router}.e_score_correction_bias"))),
            experts: (0..moe.experts).map(expert).collect(),
            shared: moe
                .shared_width
                .map(|width| self.mlp(&format!("{at}.{}", names.shared_expert), d, width, moe.activation)),
        }
    }

    /// Expert `e` of tensors that hold all experts, `[E, in, out]`.
    fn fused_expert(&self, at: &str, e: usize, d: usize, moe: &MoeSpec) -> MlpBinding {
        let f = moe.width;
        let part = |name: &str, len: usize| {
            let start = self.range(&format!("{at}.experts.{name}")).start + e * len;
            start..start + len
        };
        let linear = |name: &str, n: usize, k: usize| Linear {
            offset: part(name, n * k).start,
            n,
            k,
            transposed: true,
        };
        MlpBinding {
            gate_up: linear("gate_up_proj", 2 * f, d),
            gate_up_bias: moe.bias.then(|| part("gate_up_proj_bias", 2 * f)),
            down: linear("down_proj", d, f),
            down_bias: moe.bias.then(|| part("down_proj_bias", d)),
            width: f,
            activation: moe.activation,
        }
    }
}

/// Projections of the residual stream, in arena order.
fn read_projections(attention: &AttentionSpec) -> &'static [&'static str] {
    match &attention.latent {
        None => &["q_proj", "k_proj", "v_proj"],
        Some(LatentSpec { q_rank: Some(_), .. }) => &["q_a_proj", "kv_a_proj_with_mqa"],
        Some(LatentSpec { q_rank: None, .. }) => &["q_proj", "kv_a_proj_with_mqa"],
    }
}
