//! What a model is, independent of where its description came from.
//!
//! A [`ModelSpec`] is derived from `config.json` (or GGUF metadata) once and validated there; layers, shapes and
//! parameter names follow from it alone.

use freewheel_kernels::attention::AttentionMask;

/// What a checkpoint calls the parts of a layer that families name differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorNames {
    /// A dense feed-forward.
    pub mlp: &'static str,
    /// A mixture of experts.
    pub moe: &'static str,
    /// The router of a mixture.
    pub router: &'static str,
    /// The MLP of a mixture that every token passes through.
    pub shared_expert: &'static str,
    /// The routed experts of a mixture.
    pub experts: ExpertNames,
    /// Whether a checkpoint may hold layers past the last one, which predict several tokens ahead and have no part in the
    /// model (DeepSeek-V3; transformers leaves them out too).
    pub predictors: bool,
}

/// How a checkpoint holds the routed experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExpertNames {
    /// `experts.N.NAME.weight` `[out, in]` for gate, up and down.
    Each([&'static str; 3]),
    /// `experts.gate_up_proj` `[E, in, 2·out]` and `experts.down_proj` `[E, in, out]`.
    Fused,
}

impl TensorNames {
    /// Those of Llama and of most families after it.
    pub const LLAMA: Self = Self {
        mlp: "mlp",
        moe: "mlp",
        router: "gate",
        shared_expert: "shared_expert",
        experts: ExpertNames::Each(["gate_proj", "up_proj", "down_proj"]),
        predictors: false,
    };
}

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// What its checkpoints call things.
    pub names: TensorNames,
    /// Vocabulary size V.
    pub vocab_size: usize,
    /// Residual width D.
    pub hidden: usize,
    /// Per layer: attention, then feed-forward.
    pub layers: Vec<(AttentionSpec, FfnSpec)>,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// What a norm's weight lacks to be its gain: 0, or 1 (Gemma).
    pub norm_offset: f32,
    /// Whether the outputs of attention and feed-forward are normed before they join the residual stream (Gemma).
    pub sandwich_norms: bool,
    /// Factor on embeddings as they enter the first layer: 1, or the root of the width (Gemma).
    pub embedding_scale: f32,
    /// Whether the LM head is the embedding matrix.
    pub tied_embeddings: bool,
    /// What the final rows become.
    pub head: OutputHead,
    /// Longest sequence the model was made for, tokens.
    pub max_positions: usize,
    /// Architecture string as in `config.json`, for messages and export.
    pub architecture: String,
    /// The image encoder, for models that read images.
    pub vision: Option<VisionSpec>,
}

/// Llama 4's image encoder: tiles of an image, each on its own, to rows of the residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionSpec {
    /// Side of a square tile, pixels.
    pub image_size: usize,
    /// Side of a square patch, pixels; divides `image_size`.
    pub patch_size: usize,
    /// Colour channels.
    pub channels: usize,
    /// Width of the encoder.
    pub hidden: usize,
    /// Encoder layers.
    pub layers: usize,
    /// Attention heads; `hidden / heads` is a multiple of 4.
    pub heads: usize,
    /// Hidden width of an encoder layer's feed-forward.
    pub width: usize,
    /// Epsilon of every layer norm.
    pub norm_eps: f32,
    /// Inverse rotary frequencies of a patch's column, and of its row; `head_dim / 4` of them.
    pub inv_freq: Vec<f32>,
    /// Patches along each side that the pixel shuffle joins into one token (2 for a ratio of 0.5).
    pub shuffle: usize,
    /// Hidden width of the adapter after the pixel shuffle.
    pub adapter_width: usize,
    /// Width that leaves the adapter and enters the projector.
    pub output: usize,
}

impl VisionSpec {
    /// Patches along a side of a tile.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Rows of a tile inside the encoder: its patches, and the class token behind them.
    pub fn rows(&self) -> usize {
        self.grid() * self.grid() + 1
    }

    /// Tokens that a tile takes in the sequence.
    pub fn tokens(&self) -> usize {
        (self.grid() / self.shuffle).pow(2)
    }

    /// Values of a tile, `[channels, image_size, image_size]`.
    pub fn pixels(&self) -> usize {
        self.channels * self.image_size * self.image_size
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}

/// What a row of the final norm becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputHead {
    /// Logits of the next token `[V]`, by `lm_head` or the embedding.
    LanguageModel,
    /// One score for each label, by `score` (`…ForSequenceClassification`); a single label is a reward model's.
    Classifier {
        /// Number of labels.
        labels: usize,
    },
}

/// One attention layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads H.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one query and key head; of a value head too, unless `latent` says otherwise.
    pub head_dim: usize,
    /// Factor on the scores, usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// Rotary embedding; `None` for NoPE layers.
    pub rope: Option<RopeSpec>,
    /// Normalisation of queries and keys.
    pub qk_norm: QkNorm,
    /// Local attention in chunks of this many positions (Llama 4 RoPE layers).
    pub chunk: Option<usize>,
    /// Sliding window of this many positions.
    pub window: Option<usize>,
    /// Whether every head has a learned logit that takes part in the softmax without a value (gpt-oss).
    pub sinks: bool,
    /// Query temperature growing with position (Llama 4 NoPE layers).
    pub temperature: Option<TemperatureTuning>,
    /// Bias on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub out_bias: bool,
    /// Queries, keys and values by way of compressed ones (DeepSeek).
    pub latent: Option<LatentSpec>,
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1): keys and values of all heads are projections of one
/// narrow normalised vector, and the part of a key that rotates is shared by all heads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentSpec {
    /// Width of the compressed queries; `None`: queries are projected in one step.
    pub q_rank: Option<usize>,
    /// Width of the compressed keys and values.
    pub kv_rank: usize,
    /// Leading dimensions of a query and key head without position; the rest of `head_dim` rotates.
    pub nope_dim: usize,
    /// Width of one value head.
    pub value_dim: usize,
    /// Epsilon of the norms of the compressed vectors.
    pub norm_eps: f32,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Inverse frequencies after scaling, one per rotated pair.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin (yarn's attention factor; else 1).
    pub attention_factor: f32,
    /// How pairs are laid out.
    pub style: RopeStyle,
}

/// Layout of rotated pairs within a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Pair (i, i + half): Llama in HF layout, Qwen.
    Half,
    /// Pair (2i, 2i + 1): Llama 4.
    Interleaved,
}

/// `rope_scaling` / `rope_parameters` of `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain frequencies.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high kept, a ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f32,
        /// Ramp start.
        low_freq_factor: f32,
        /// Ramp end.
        high_freq_factor: f32,
        /// Context of the original training.
        original_max_positions: usize,
    },
    /// YaRN (Peng et al. 2023): pairs that turn often in the original context are kept, slow ones divided, a ramp between;
    /// cos and sin are multiplied by `attention_factor`.
    Yarn {
        /// Divisor of slow pairs.
        factor: f32,
        /// Context of the original training.
        original_max_positions: usize,
        /// Turns in the original context from which a pair is kept.
        beta_fast: f64,
        /// Turns up to which a pair is divided.
        beta_slow: f64,
        /// Whether the ramp starts and ends at whole pairs.
        truncate: bool,
        /// Factor on cos and sin.
        attention_factor: f32,
    },
}

/// Normalisation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// RMS norm with weight `[head_dim]` on each head, before rotation (Qwen3).
    PerHead,
    /// RMS norm with weight over the whole projection, before rotation (OLMoE).
    WholeProjection,
    /// RMS norm without weight on each head, after rotation, eps as the model's (Llama 4 RoPE layers).
    WeightlessAfterRope,
}

/// Llama 4: `q *= 1 + attn_scale * ln(1 + floor((pos + 1) / floor_scale))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TemperatureTuning {
    /// Strength, 0.1 in released models.
    pub attn_scale: f32,
    /// Positions per step, 8192 in released models.
    pub floor_scale: f32,
}

/// One feed-forward layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FfnSpec {
    /// Gated MLP of width F.
    Dense {
        /// Hidden width F.
        width: usize,
        /// Gate activation.
        activation: Activation,
    },
    /// Mixture of experts.
    Moe(MoeSpec),
}

/// Gate activation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// x·sigmoid(x).
    Silu,
    /// GELU, tanh form.
    GeluTanh,
    /// g·sigmoid(alpha·g)·(u + 1) with g = min(gate, limit) and u = up within ±limit; gate and up in alternating columns
    /// (gpt-oss).
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Bound of gate and up.
        limit: f32,
    },
}

/// A mixture-of-experts layer.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Routed experts E.
    pub experts: usize,
    /// Experts per token K.
    pub top_k: usize,
    /// Hidden width F of one routed expert.
    pub width: usize,
    /// How tokens choose.
    pub router: RouterKind,
    /// Hidden width of the shared expert, if there is one.
    pub shared_width: Option<usize>,
    /// Gate activation.
    pub activation: Activation,
    /// Biases on the router and on both projections of every expert.
    pub bias: bool,
}

/// How a token chooses its experts and how their outputs are weighed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RouterKind {
    /// Softmax over all experts, top-k of it, optionally renormalised to sum 1; weights multiply the experts' outputs.
    Softmax {
        /// Renormalise the chosen weights.
        renormalise: bool,
    },
    /// Top-k of the raw logits; sigmoid(logit) multiplies the experts' *input* (Llama 4).
    SigmoidOnInput,
    /// Top-k of sigmoid(logit) + a correction of each expert, within the best groups; sigmoid(logit), optionally
    /// renormalised, times a factor multiplies the experts' outputs (DeepSeek-V3).
    SigmoidGrouped {
        /// Equal groups of neighbouring experts; a group is as good as its two best experts together.
        groups: usize,
        /// Groups a token may choose from.
        groups_kept: usize,
        /// Renormalise the chosen weights to sum 1.
        renormalise: bool,
        /// Factor on the weights.
        scale: f32,
    },
}

impl ModelSpec {
    /// What precedes the names of the decoder's tensors in a checkpoint.
    pub fn prefix(&self) -> &'static str {
        if self.vision.is_some() { "language_model." } else { "" }
    }

    /// Values that the head gives for a row: V, or the number of labels.
    pub fn head_width(&self) -> usize {
        match self.head {
            OutputHead::LanguageModel => self.vocab_size,
            OutputHead::Classifier { labels } => labels,
        }
    }

    /// Number of MoE layers.
    pub fn moe_layers(&self) -> usize {
        self.layers.iter().filter(|(_, ffn)| matches!(ffn, FfnSpec::Moe(_))).count()
    }

    /// Experts of a MoE layer, the most of all layers; 0 for dense models.
    pub fn experts(&self) -> usize {
        let experts = self.layers.iter().map(|(_, ffn)| match ffn {
            FfnSpec::Moe(moe) => moe.experts,
            FfnSpec::Dense { .. } => 0,
        });
        experts.max().unwrap_or(0)
    }

    /// Experts per token of the MoE layers (they all agree), 0 for dense models.
    pub fn top_k(&self) -> usize {
        self.layers
            .iter()
            .find_map(|(_, ffn)| match ffn {
                FfnSpec::Moe(moe) => Some(moe.top_k),
                FfnSpec::Dense { .. } => None,
            })
            .unwrap_or(0)
    }
}

impl AttentionSpec {
    /// Which keys a query may see.
    pub fn mask(&self) -> AttentionMask {
        match (self.chunk, self.window) {
            (Some(chunk), _) => AttentionMask::Chunked(chunk),
            (None, Some(window)) => AttentionMask::Sliding(window),
            (None, None) => AttentionMask::Causal,
        }
    }

    /// Columns of everything that is projected from the residual stream in one go: q, k, v, or what they are unpacked
    /// from.
    pub fn qkv_width(&self) -> usize {
        let [q, k, v] = self.projected_widths();
        q + k + v
    }

    /// Rows of the tensors that project the residual stream: q, k, v; with compression queries (compressed, if they
    /// are), compressed keys and values, and the rotating part of a key.
    pub(crate) fn projected_widths(&self) -> [usize; 3] {
        match &self.latent {
            None => [self.query_width(), self.key_width(), self.value_width()],
            Some(latent) => {
                let q = latent.q_rank.unwrap_or(self.query_width());
                [q, latent.kv_rank, self.head_dim - latent.nope_dim]
            }
        }
    }

    /// Width of one value head.
    pub fn value_dim(&self) -> usize {
        self.latent.map_or(self.head_dim, |latent| latent.value_dim)
    }

    /// Columns of all query heads.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of all key heads.
    pub fn key_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Columns of all value heads.
    pub fn value_width(&self) -> usize {
        self.kv_heads * self.value_dim()
    }

    /// Columns of what attention gives, all heads.
    pub fn out_width(&self) -> usize {
        self.heads * self.value_dim()
    }
}
