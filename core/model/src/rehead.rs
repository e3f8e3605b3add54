//! A language model's body under a head that scores: where the training of a reward model starts.

use freewheel_types::WeightsDtype;
use serde_json::{Value, json};

use crate::Transformer;
use crate::checkpoint::LoadedModel;
use crate::config::{CLASSIFIERS, spec_from_config};
use crate::error::ModelError;
use crate::params::{ParamData, Params};
use crate::upcycle::normal;

/// Deviation of the new head, as the reference library's `initializer_range`.
const DEVIATION: f64 = 0.02;

/// The classifier with the one label `label` made from `model`: its body as it is, a small random head `score.weight`.
///
/// # Errors
/// [`ModelError::Unsupported`] if there is no classifier on this kind of body, or `model` is one already.
pub fn classifier_from(model: &LoadedModel, label: &str, seed: u64) -> Result<LoadedModel, ModelError> {
    let kind = model.config_json.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let architecture = &model.model.spec().architecture;
    let row = CLASSIFIERS.iter().find(|row| row.model_type == kind && row.name != architecture);
    let Some(row) = row else {
        let known: Vec<&str> = CLASSIFIERS.iter().map(|row| row.model_type).collect();
        return Err(ModelError::Unsupported {
            path: model.source.clone(),
            what: format!("a scoring head on architecture `{architecture}`"),
            hint: format!("; supported are language models of type {}", known.join(", ")),
        });
    };
    let mut config = model.config_json.clone();
    config.insert("architectures".into(), json!([row.name]));
    config.insert("num_labels".into(), 1.into());
    config.insert("id2label".into(), json!({"0": label}));
    config.insert("label2id".into(), json!({label: 0}));
    // The reference library pads batches with it and reads scores before it.
    if let Some(pad) = model.generation.pad_id {
        config.insert("pad_token_id".into(), pad.into());
    }
    let transformer = Transformer::new(spec_from_config(&model.source, &config)?);
    let mut values = Vec::with_capacity(transformer.layout().total);
    for tensor in &transformer.layout().tensors {
        match model.params.layout.get(&tensor.name) {
            Some(same) if same.shape == tensor.shape => values.extend(model.params.range_f32(same.range())),
            _ => values.extend(normal(seed, &tensor.name, tensor.len(), DEVIATION)),
        }
    }
    let wide = Params { layout: transformer.layout().clone(), data: ParamData::F32(values) };
    let params =
        if model.params.dtype() == WeightsDtype::F32 { wide } else { wide.cast(model.params.dtype()) };
    Ok(LoadedModel {
        model: transformer,
        params,
        tokenizer: model.tokenizer.clone(),
        generation: model.generation.clone(),
        config_json: config,
        source: model.source.clone(),
    })
}
