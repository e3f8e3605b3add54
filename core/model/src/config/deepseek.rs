//! DeepSeek-V3 (arXiv 2412.19437; also R1, V3.1, Moonlight, Kimi K2): latent attention, leading dense layers, then routed
//! experts chosen within groups beside shared ones.
//!
//! Layers for predicting several tokens ahead (`num_nextn_predict_layers`) are left out, as in transformers.

use super::fields::Fields;
use super::rope::{rope, score_factor};
use crate::error::ModelError;
use crate::spec::{
    AttentionSpec, FfnSpec, LatentSpec, ModelSpec, MoeSpec, OutputHead, QkNorm, RopeStyle, RouterKind,
    TensorNames,
};

/// Epsilon of the norms inside attention, which `rms_norm_eps` does not reach.
const LATENT_NORM_EPS: f32 = 1e-6;

/// DeepseekV3ForCausalLM.
pub(super) fn deepseek_v3(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let attention = attention(fields)?;
    let dense = FfnSpec::Dense {
        width: fields.size_or("intermediate_size", 18432)?,
        activation: fields.activation()?,
    };
    let moe = FfnSpec::Moe(experts(fields)?);
    let leading_dense = match fields.get("first_k_dense_replace") {
        None => 3,
        Some(value) => value.as_u64().ok_or_else(|| {
            fields.invalid(format!("first_k_dense_replace = {value}: expected a whole number of 0 or more"))
        })?,
    };
    if let Some(step) = fields.size_opt("moe_layer_freq")?.filter(|&step| step != 1) {
        return Err(fields.unsupported(format!("moe_layer_freq = {step}"), "only 1 is"));
    }
    let layers = (0..fields.layers()? as u64)
        .map(|layer| (attention.clone(), if layer < leading_dense { dense.clone() } else { moe.clone() }))
        .collect();
    Ok(ModelSpec {
        names: TensorNames { shared_expert: "shared_experts", predictors: true, ..TensorNames::LLAMA },
        vocab_size: fields.size("vocab_size")?,
        hidden: fields.size("hidden_size")?,
        layers,
        norm_eps: fields.number_or("rms_norm_eps", 1e-6)? as f32,
        norm_offset: 0.0,
        sandwich_norms: false,
        embedding_scale: 1.0,
        tied_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        head: OutputHead::LanguageModel,
        max_positions: fields.size_or("max_position_embeddings", 4096)?,
        architecture: "DeepseekV3ForCausalLM".to_owned(),
        vision: None,
    })
}

fn attention(fields: &Fields<'_>) -> Result<AttentionSpec, ModelError> {
    let heads = fields.size("num_attention_heads")?;
    let kv_heads = fields.size_or("num_key_value_heads", heads)?;
    if kv_heads != heads {
        return Err(fields.unsupported(
            format!("num_key_value_heads = {kv_heads} of {heads} heads"),
            "latent attention unpacks keys and values for every head",
        ));
    }
    let (nope_dim, rotary) =
        (fields.size_or("qk_nope_head_dim", 128)?, fields.size_or("qk_rope_head_dim", 64)?);
    let head_dim = nope_dim + rotary;
    // Keys that newer files repeat; they follow from the two above.
    for (key, derived) in [("head_dim", rotary), ("qk_head_dim", head_dim)] {
        if let Some(given) = fields.size_opt(key)?.filter(|given| *given != derived) {
            return Err(fields.invalid(format!(
                "{key} = {given}, where qk_nope_head_dim = {nope_dim} and qk_rope_head_dim = {rotary} make it {derived}"
            )));
        }
    }
    if rotary % 2 != 0 {
        return Err(fields.invalid(format!("qk_rope_head_dim = {rotary} is odd, rotary pairs need it even")));
    }
    // Absent means the architecture's default; an explicit null switches compression of queries off.
    let q_rank = match fields.map.get("q_lora_rank") {
        None => Some(1536),
        Some(_) => fields.size_opt("q_lora_rank")?,
    };
    let bias = fields.flag_or("attention_bias", false)?;
    if bias && q_rank.is_none() {
        return Err(fields.unsupported("attention_bias = true without q_lora_rank", ""));
    }
    let style =
        if fields.flag_or("rope_interleave", true)? { RopeStyle::Interleaved } else { RopeStyle::Half };
    Ok(AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        scale: ((head_dim as f64).powf(-0.5) * score_factor(fields)?) as f32,
        rope: Some(rope(fields, rotary, 10_000.0, style)?),
        qk_norm: QkNorm::None,
        chunk: None,
        window: None,
        sinks: false,
        temperature: None,
        qkv_bias: bias,
        out_bias: bias,
        latent: Some(LatentSpec {
            q_rank,
            kv_rank: fields.size_or("kv_lora_rank", 512)?,
            nope_dim,
            value_dim: fields.size_or("v_head_dim", 128)?,
            norm_eps: LATENT_NORM_EPS,
        }),
    })
}

fn experts(fields: &Fields<'_>) -> Result<MoeSpec, ModelError> {
    for (key, known) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
        if let Some(other) = fields.text(key)?.filter(|value| *value != known) {
            return Err(fields.unsupported(format!("{key} `{other}`"), &format!("only {known} is")));
        }
    }
    let experts = fields.size_any(&["n_routed_experts", "num_local_experts"], 256)?;
    let top_k = fields.size_or("num_experts_per_tok", 8)?;
    let (groups, groups_kept) = (fields.size_or("n_group", 8)?, fields.size_or("topk_group", 4)?);
    if experts % groups != 0 || experts / groups < 2 {
        return Err(fields.invalid(format!(
            "n_group = {groups}: {experts} experts do not make so many equal groups of 2 and more"
        )));
    }
    if groups_kept > groups || top_k > groups_kept * (experts / groups) {
        return Err(fields.invalid(format!(
            "num_experts_per_tok = {top_k} from topk_group = {groups_kept} of {groups} groups of {} experts",
            experts / groups
        )));
    }
    let width = fields.size_or("moe_intermediate_size", 2048)?;
    Ok(MoeSpec {
        experts,
        top_k,
        width,
        router: RouterKind::SigmoidGrouped {
            groups,
            groups_kept,
            renormalise: fields.flag_or("norm_topk_prob", true)?,
            scale: fields.number_or("routed_scaling_factor", 2.5)? as f32,
        },
        shared_width: Some(width * fields.size_or("n_shared_experts", 1)?),
        activation: fields.activation()?,
        bias: false,
    })
}
