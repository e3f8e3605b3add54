//! Llama 4: rotary layers with chunked attention, every n-th layer without positions (iRoPE); routed experts beside
//! a shared one. And the image encoder that stands before the text model (early fusion).

use super::fields::Fields;
use super::rope::rope;
use crate::error::ModelError;
use crate::spec::{
    AttentionSpec, ExpertNames, FfnSpec, ModelSpec, MoeSpec, OutputHead, QkNorm, RopeStyle, RouterKind,
    TemperatureTuning, TensorNames, VisionSpec,
};

const NAMES: TensorNames = TensorNames {
    mlp: "feed_forward",
    moe: "feed_forward",
    router: "router",
    experts: ExpertNames::Fused,
    ..TensorNames::LLAMA
};

/// Llama4ForCausalLM.
pub(super) fn llama4_text(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let layers = fields.layers()?;
    let hidden = fields.size("hidden_size")?;
    let rotary = rotary_layers(fields, layers)?;
    let chunked = chunked_layers(fields, &rotary)?;
    let moe_layers = match fields.list("moe_layers")? {
        Some(list) => list,
        None => {
            let step = fields.size_or("interleave_moe_layer_step", 1)?;
            (step - 1..layers).step_by(step).collect()
        }
    };
    let layers = (0..layers)
        .map(|layer| {
            let attention = attention(fields, rotary[layer], chunked[layer])?;
            let ffn = feed_forward(fields, moe_layers.contains(&layer))?;
            Ok((attention, ffn))
        })
        .collect::<Result<_, ModelError>>()?;
    Ok(ModelSpec {
        names: NAMES,
        vocab_size: fields.size("vocab_size")?,
        hidden,
        layers,
        norm_eps: fields.number_or("rms_norm_eps", 1e-5)? as f32,
        norm_offset: 0.0,
        sandwich_norms: false,
        embedding_scale: 1.0,
        tied_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        head: OutputHead::LanguageModel,
        max_positions: fields.size_or("max_position_embeddings", 4096 * 32)?,
        architecture: "Llama4ForCausalLM".to_owned(),
        vision: None,
    })
}

/// Llama4ForConditionalGeneration: the text model, and an image encoder before it.
pub(super) fn llama4(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let part = |key: &str| fields.object(key)?.ok_or_else(|| fields.invalid(format!("{key} is missing")));
    let mut spec = llama4_text(&part("text_config")?)?;
    spec.tied_embeddings = fields.flag_or("tie_word_embeddings", spec.tied_embeddings)?;
    spec.architecture = "Llama4ForConditionalGeneration".to_owned();
    spec.vision = Some(vision(&part("vision_config")?)?);
    Ok(spec)
}

fn vision(fields: &Fields<'_>) -> Result<VisionSpec, ModelError> {
    match fields.text("hidden_act")?.unwrap_or("gelu") {
        "gelu" => {}
        other => return Err(fields.unsupported(format!("vision_config.hidden_act `{other}`"), "")),
    }
    fields.refuse_flag("multi_modal_projector_bias")?;
    let ratio = fields.number_or("pixel_shuffle_ratio", 0.5)?;
    let shuffle = ratio.recip().round();
    if !(1.0..=64.0).contains(&shuffle) || shuffle.recip() != ratio {
        return Err(fields.invalid(format!("pixel_shuffle_ratio = {ratio}: expected 1, 1/2, 1/4 …")));
    }
    let (hidden, heads) = (fields.size_or("hidden_size", 768)?, fields.size_or("num_attention_heads", 16)?);
    if hidden % heads != 0 || (hidden / heads) % 4 != 0 {
        return Err(fields.invalid(format!(
            "vision_config: hidden_size = {hidden} over num_attention_heads = {heads} must give heads of a multiple of 4"
        )));
    }
    let spec = VisionSpec {
        image_size: fields.size_or("image_size", 448)?,
        patch_size: fields.size_or("patch_size", 14)?,
        channels: fields.size_or("num_channels", 3)?,
        hidden,
        layers: fields.layers()?,
        heads,
        width: fields.size_or("intermediate_size", 5632)?,
        norm_eps: fields.number_or("norm_eps", 1e-5)? as f32,
        // One half of a head turns by the patch's column, the other by its row.
        inv_freq: rope(fields, hidden / heads / 2, 10_000.0, RopeStyle::Interleaved)?.inv_freq,
        shuffle: shuffle as usize,
        adapter_width: fields.size_or("projector_input_dim", 4096)?,
        output: fields.size_or("vision_output_dim", 4096)?,
    };
    check_vision(fields, &spec)?;
    Ok(spec)
}

/// Sides are bounded so that a hostile file cannot make us build a huge table of rotations.
const MAX_SIDE: usize = 4096;

fn check_vision(fields: &Fields<'_>, spec: &VisionSpec) -> Result<(), ModelError> {
    let VisionSpec { image_size, patch_size, shuffle, .. } = *spec;
    if image_size > MAX_SIDE || patch_size > image_size || image_size % patch_size != 0 {
        return Err(fields.invalid(format!(
            "vision_config: image_size = {image_size} must be at most {MAX_SIDE} and a multiple of patch_size = {patch_size}"
        )));
    }
    if spec.grid() > 256 || !spec.grid().is_multiple_of(shuffle) {
        return Err(fields.invalid(format!(
            "vision_config: {} patches a side; expected at most 256 and a multiple of {shuffle} (pixel_shuffle_ratio)",
            spec.grid()
        )));
    }
    // The reference library gives the width of the feed-forward and of the shuffled patches one key.
    let shuffled = spec.hidden * shuffle * shuffle;
    if spec.width != shuffled {
        return Err(fields.invalid(format!(
            "vision_config: intermediate_size = {}, but hidden_size over pixel_shuffle_ratio squared is {shuffled}",
            spec.width
        )));
    }
    if spec.channels != 3 {
        return Err(
            fields.unsupported(format!("vision_config: num_channels = {}", spec.channels), "only 3 are")
        );
    }
    let projector = fields.size_or("projector_output_dim", spec.output)?;
    if projector != spec.output || spec.adapter_width != spec.output {
        return Err(fields.invalid(format!(
            "vision_config: projector_input_dim = {}, projector_output_dim = {projector} and vision_output_dim = {} differ",
            spec.adapter_width, spec.output
        )));
    }
    Ok(())
}

/// `no_rope_layers` holds 1 for layers *with* rotary embedding, whatever its name says.
fn rotary_layers(fields: &Fields<'_>, layers: usize) -> Result<Vec<bool>, ModelError> {
    match fields.list("no_rope_layers")?.filter(|list| !list.is_empty()) {
        Some(list) if list.len() == layers => Ok(list.into_iter().map(|flag| flag != 0).collect()),
        Some(list) => {
            Err(fields.invalid(format!("no_rope_layers has {} entries for {layers} layers", list.len())))
        }
        None => {
            let interval = fields.size_or("no_rope_layer_interval", 4)?;
            Ok((0..layers).map(|layer| (layer + 1) % interval != 0).collect())
        }
    }
}

fn chunked_layers(fields: &Fields<'_>, rotary: &[bool]) -> Result<Vec<bool>, ModelError> {
    let Some(names) = fields.layer_types(rotary.len())? else { return Ok(rotary.to_vec()) };
    names
        .into_iter()
        .map(|name| match name {
            "chunked_attention" => Ok(true),
            "full_attention" => Ok(false),
            other => Err(fields.unsupported(format!("layer_types entry `{other}`"), "")),
        })
        .collect()
}

fn attention(fields: &Fields<'_>, rotary: bool, chunked: bool) -> Result<AttentionSpec, ModelError> {
    let heads = fields.size("num_attention_heads")?;
    let head_dim = match fields.size_opt("head_dim")? {
        Some(width) => width,
        None => fields.size("hidden_size")? / heads,
    };
    if head_dim == 0 {
        return Err(fields.invalid("hidden_size is smaller than num_attention_heads"));
    }
    let bias = fields.flag_or("attention_bias", false)?;
    let temperature = if !rotary && fields.flag_or("attn_temperature_tuning", true)? {
        Some(TemperatureTuning {
            attn_scale: fields.number_or("attn_scale", 0.1)? as f32,
            floor_scale: fields.number_or("floor_scale", 8192.0)? as f32,
        })
    } else {
        None
    };
    // Absent means the architecture's default; an explicit null switches chunks off.
    let chunk = match fields.map.get("attention_chunk_size") {
        None => Some(8192),
        Some(_) => fields.size_opt("attention_chunk_size")?,
    };
    Ok(AttentionSpec {
        heads,
        kv_heads: fields.size_or("num_key_value_heads", heads)?,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
        rope: if rotary { Some(rope(fields, head_dim, 500_000.0, RopeStyle::Interleaved)?) } else { None },
        qk_norm: if rotary && fields.flag_or("use_qk_norm", true)? {
            QkNorm::WeightlessAfterRope
        } else {
            QkNorm::None
        },
        chunk: chunk.filter(|_| chunked),
        window: None,
        sinks: false,
        temperature,
        qkv_bias: bias,
        out_bias: bias,
        latent: None,
    })
}

fn feed_forward(fields: &Fields<'_>, sparse: bool) -> Result<FfnSpec, ModelError> {
    let activation = fields.activation()?;
    if !sparse {
        return Ok(FfnSpec::Dense { width: fields.size_or("intermediate_size_mlp", 16384)?, activation });
    }
    let width = fields.size("intermediate_size")?;
    Ok(FfnSpec::Moe(MoeSpec {
        experts: fields.size_any(&["num_local_experts", "num_experts"], 16)?,
        top_k: fields.size_or("num_experts_per_tok", 1)?,
        width,
        router: RouterKind::SigmoidOnInput,
        shared_width: Some(width),
        activation,
        bias: false,
    }))
}
