//! Checkpoint names → GGUF names.

use crate::spec::ModelSpec;

/// Where a tensor of ours is in a GGUF file.
pub(super) struct Source {
    pub(super) name: String,
    /// This expert of so many, cut out of a fused tensor.
    pub(super) expert: Option<(usize, usize)>,
    /// Rows are permuted per head; so many heads.
    pub(super) rotary_heads: Option<usize>,
    /// What the file has added to the values: 1 for the norms of Gemma, which are stored as gains.
    pub(super) offset: f32,
}

/// The source of the tensor `name`; `None` if GGUF has no place for it.
pub(super) fn source(spec: &ModelSpec, name: &str) -> Option<Source> {
    let offset = if name.ends_with("norm.weight") { spec.norm_offset } else { 0.0 };
    let plain = |name: &str| Some(Source { name: name.to_owned(), expert: None, rotary_heads: None, offset });
    let Some(rest) = name.strip_prefix("model.layers.") else {
        return match name {
            "model.embed_tokens.weight" => plain("token_embd.weight"),
            "model.norm.weight" => plain("output_norm.weight"),
            "lm_head.weight" => plain("output.weight"),
            _ => None,
        };
    };
    let (layer, rest) = rest.split_once('.')?;
    let attention = &spec.layers.get(layer.parse::<usize>().ok()?)?.0;
    let (module, kind) = rest.rsplit_once('.')?;
    let at = |part: &str| format!("blk.{layer}.{part}.{kind}");
    if let Some((_, tail)) = module.split_once(".experts.") {
        let (expert, part) = tail.split_once('.')?;
        let experts = spec.layers.iter().find_map(|(_, ffn)| match ffn {
            crate::spec::FfnSpec::Moe(moe) => Some(moe.experts),
            crate::spec::FfnSpec::Dense { .. } => None,
        })?;
        let part = match part {
            "gate_proj" | "w1" => "ffn_gate_exps",
            "up_proj" | "w3" => "ffn_up_exps",
            "down_proj" | "w2" => "ffn_down_exps",
            _ => return None,
        };
        return Some(Source { expert: Some((expert.parse().ok()?, experts)), ..plain(&at(part))? });
    }
    // Only the converters of Llama and Mixtral permute.
    let permuted = matches!(spec.architecture.as_str(), "LlamaForCausalLM" | "MixtralForCausalLM");
    let rotary = |part: &str, heads: usize| {
        Some(Source { rotary_heads: permuted.then_some(heads), ..plain(&at(part))? })
    };
    match module {
        "input_layernorm" => plain(&at("attn_norm")),
        "post_attention_layernorm" if spec.sandwich_norms => plain(&at("post_attention_norm")),
        "post_attention_layernorm" | "pre_feedforward_layernorm" => plain(&at("ffn_norm")),
        "post_feedforward_layernorm" => plain(&at("post_ffw_norm")),
        "self_attn.q_proj" => rotary("attn_q", attention.heads),
        "self_attn.k_proj" => rotary("attn_k", attention.kv_heads),
        "self_attn.v_proj" => plain(&at("attn_v")),
        "self_attn.o_proj" => plain(&at("attn_output")),
        "self_attn.q_norm" => plain(&at("attn_q_norm")),
        "self_attn.k_norm" => plain(&at("attn_k_norm")),
        "mlp.gate_proj" => plain(&at("ffn_gate")),
        "mlp.up_proj" => plain(&at("ffn_up")),
        "mlp.down_proj" => plain(&at("ffn_down")),
        "mlp.gate" | "block_sparse_moe.gate" => plain(&at("ffn_gate_inp")),
        _ => None,
    }
}
