//! Bidirectional encoders: BERT and DeBERTa-v2 (also v3, which has the same `model_type`).

use std::path::Path;

use serde_json::{Map, Value};

use super::classifier::labels;
use super::fields::Fields;
use super::refuse_quantised;
use crate::encoder::{EncoderFamily, EncoderSpec, PoolerSpec, Positions, RelativeSpec};
use crate::error::ModelError;
use freewheel_kernels::pointwise::Pointwise;

/// Entries of `architectures` that are encoders.
pub const ENCODERS: [&str; 4] =
    ["BertModel", "BertForSequenceClassification", "DebertaV2Model", "DebertaV2ForSequenceClassification"];

/// The encoder that `config` (the content of the file `path`) describes, checked.
///
/// # Errors
/// As [`super::spec_from_config`].
pub fn encoder_spec_from_config(path: &Path, config: &Map<String, Value>) -> Result<EncoderSpec, ModelError> {
    let fields = Fields::new(path, config);
    let name = match fields.get("architectures") {
        Some(Value::Array(names)) => names.first().and_then(Value::as_str).unwrap_or_default(),
        _ => return Err(fields.invalid("architectures: expected a list of names")),
    };
    refuse_quantised(&fields, name)?;
    match name {
        "BertModel" => bert(&fields, name, false),
        "BertForSequenceClassification" => bert(&fields, name, true),
        "DebertaV2Model" => deberta_v2(&fields, name, false),
        "DebertaV2ForSequenceClassification" => deberta_v2(&fields, name, true),
        other => Err(fields
            .unsupported(format!("encoder `{other}`"), &format!("supported are {}", ENCODERS.join(", ")))),
    }
}

fn bert(fields: &Fields<'_>, name: &str, classifier: bool) -> Result<EncoderSpec, ModelError> {
    match fields.text("position_embedding_type")?.unwrap_or("absolute") {
        "absolute" => {}
        other => return Err(fields.unsupported(format!("position_embedding_type `{other}`"), "")),
    }
    fields.refuse_flag("is_decoder")?;
    fields.refuse_flag("add_cross_attention")?;
    let spec = EncoderSpec {
        family: EncoderFamily::Bert,
        norm_eps: fields.number_or("layer_norm_eps", 1e-12)? as f32,
        positions: Positions::Absolute,
        token_types: fields.size_or("type_vocab_size", 2)?,
        pooler: Some(PoolerSpec { width: fields.size("hidden_size")?, activation: Pointwise::Tanh }),
        ..common(fields, name, classifier)?
    };
    checked(fields, spec)
}

fn deberta_v2(fields: &Fields<'_>, name: &str, classifier: bool) -> Result<EncoderSpec, ModelError> {
    let common = common(fields, name, classifier)?;
    let hidden = common.hidden;
    if whole(fields, "conv_kernel_size")?.unwrap_or(0) > 0 {
        return Err(fields.unsupported("a convolution layer (conv_kernel_size above 0)", ""));
    }
    for (key, wanted) in [("embedding_size", hidden), ("attention_head_size", hidden / common.heads)] {
        if fields.size_or(key, wanted)? != wanted {
            return Err(fields.unsupported(format!("{key} other than {wanted}"), ""));
        }
    }
    let pooler = PoolerSpec {
        width: fields.size_or("pooler_hidden_size", hidden)?,
        activation: activation(fields, "pooler_hidden_act", "gelu")?,
    };
    if classifier && pooler.width != hidden {
        return Err(fields.unsupported(format!("pooler_hidden_size other than {hidden}"), ""));
    }
    let biased = fields.flag_or("position_biased_input", true)?;
    let spec = EncoderSpec {
        family: EncoderFamily::DebertaV2,
        norm_eps: fields.number_or("layer_norm_eps", 1e-7)? as f32,
        positions: if biased { Positions::Absolute } else { Positions::None },
        token_types: whole(fields, "type_vocab_size")?.unwrap_or(0).max(0) as usize,
        relative: relative(fields, common.max_positions)?,
        pooler: classifier.then_some(pooler),
        ..common
    };
    checked(fields, spec)
}

fn relative(fields: &Fields<'_>, max_positions: usize) -> Result<Option<RelativeSpec>, ModelError> {
    if !fields.flag_or("relative_attention", false)? {
        return Ok(None);
    }
    let kinds = words(fields, "pos_att_type")?;
    if let Some(other) = kinds.iter().find(|kind| !["c2p", "p2c"].contains(&kind.as_str())) {
        return Err(fields.unsupported(format!("pos_att_type `{other}`"), "supported are c2p and p2c"));
    }
    let norm = words(fields, "norm_rel_ebd")?;
    if let Some(other) = norm.iter().find(|kind| !["none", "layer_norm"].contains(&kind.as_str())) {
        return Err(fields.unsupported(format!("norm_rel_ebd `{other}`"), ""));
    }
    let positive = |key| Ok(whole(fields, key)?.filter(|&n| n > 0).map(|n| n as usize));
    let max_distance = positive("max_relative_positions")?.unwrap_or(max_positions);
    let buckets = positive("position_buckets")?;
    if let Some(n) = buckets.filter(|&n| n < 4 || max_distance <= n / 2 + 1) {
        return Err(fields.invalid(format!(
            "position_buckets = {n}: expected at least 4, and the largest distance ({max_distance}) beyond half of it"
        )));
    }
    Ok(Some(RelativeSpec {
        buckets,
        max_distance,
        content_to_position: kinds.iter().any(|kind| kind == "c2p"),
        position_to_content: kinds.iter().any(|kind| kind == "p2c"),
        shared_projections: fields.flag_or("share_att_key", false)?,
        normalised: norm.iter().any(|kind| kind == "layer_norm"),
    }))
}

/// What both families spell the same; the rest is filled in by the caller.
fn common(fields: &Fields<'_>, name: &str, classifier: bool) -> Result<EncoderSpec, ModelError> {
    let (hidden, heads) = (fields.size("hidden_size")?, fields.size("num_attention_heads")?);
    if hidden % heads != 0 {
        return Err(
            fields.invalid(format!("hidden_size = {hidden} is not a multiple of {heads} attention heads"))
        );
    }
    Ok(EncoderSpec {
        family: EncoderFamily::Bert,
        vocab_size: fields.size("vocab_size")?,
        hidden,
        layers: fields.layers()?,
        heads,
        ffn_width: fields.size("intermediate_size")?,
        activation: activation(fields, "hidden_act", "gelu")?,
        norm_eps: 1e-12,
        positions: Positions::None,
        token_types: 0,
        relative: None,
        pooler: None,
        labels: classifier.then(|| labels(fields)).transpose()?.map(|names| names.len()),
        max_positions: fields.size_or("max_position_embeddings", 512)?,
        architecture: name.to_owned(),
    })
}

fn checked(fields: &Fields<'_>, spec: EncoderSpec) -> Result<EncoderSpec, ModelError> {
    if spec.max_positions > 1 << 16 || spec.relative.as_ref().is_some_and(|r| r.max_distance > 1 << 16) {
        return Err(fields.invalid("max_position_embeddings: expected at most 65536 for an encoder"));
    }
    if spec.token_types > 1 << 16 {
        return Err(fields.invalid("type_vocab_size: expected at most 65536"));
    }
    Ok(spec)
}

fn activation(fields: &Fields<'_>, key: &str, default: &str) -> Result<Pointwise, ModelError> {
    match fields.text(key)?.unwrap_or(default) {
        "gelu" => Ok(Pointwise::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" => Ok(Pointwise::GeluTanh),
        "relu" => Ok(Pointwise::Relu),
        "silu" | "swish" => Ok(Pointwise::Silu),
        "tanh" => Ok(Pointwise::Tanh),
        other => Err(fields.unsupported(
            format!("{key} `{other}`"),
            "supported are gelu, gelu_new, gelu_pytorch_tanh, relu, silu and tanh",
        )),
    }
}

/// A whole number that may be negative: configurations write -1 for "none".
fn whole(fields: &Fields<'_>, key: &str) -> Result<Option<i64>, ModelError> {
    let Some(value) = fields.get(key) else { return Ok(None) };
    match value.as_i64().filter(|n| (-1..=1 << 24).contains(n)) {
        Some(n) => Ok(Some(n)),
        None => Err(fields.invalid(format!("{key} = {value}: expected a whole number"))),
    }
}

/// A list of words, or one text with `|` between them.
fn words(fields: &Fields<'_>, key: &str) -> Result<Vec<String>, ModelError> {
    let invalid = |value: &Value| fields.invalid(format!("{key} = {value}: expected a list of words"));
    match fields.get(key) {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(text
            .split('|')
            .map(|word| word.trim().to_lowercase())
            .filter(|word| !word.is_empty())
            .collect()),
        Some(value @ Value::Array(items)) => items
            .iter()
            .map(|item| item.as_str().map(str::to_lowercase).ok_or_else(|| invalid(value)))
            .collect(),
        Some(value) => Err(invalid(value)),
    }
}
