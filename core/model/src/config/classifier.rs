//! `…ForSequenceClassification`: a decoder's body under a head with one score for each label.

use std::path::Path;

use serde_json::{Map, Value};

use super::fields::Fields;
use super::{llama, mixtral, qwen3_moe};
use crate::error::ModelError;
use crate::spec::{ModelSpec, OutputHead};

/// Keeps the head of a hostile configuration small.
const MAX_LABELS: usize = 1 << 16;

/// Defines the builder of one classifier from the builder of its body.
macro_rules! classifiers {
    ($($name:ident: $body:path, $architecture:literal;)*) => {$(
        #[doc = concat!($architecture, ".")]
        pub(super) fn $name(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
            let head = OutputHead::Classifier { labels: labels(fields)?.len() };
            Ok(ModelSpec { head, architecture: $architecture.to_owned(), ..$body(fields)? })
        }
    )*};
}

classifiers! {
    llama: llama::llama, "LlamaForSequenceClassification";
    mistral: llama::mistral, "MistralForSequenceClassification";
    qwen2: llama::qwen2, "Qwen2ForSequenceClassification";
    qwen3: llama::qwen3, "Qwen3ForSequenceClassification";
    mixtral: mixtral::mixtral, "MixtralForSequenceClassification";
    qwen3_moe: qwen3_moe::qwen3_moe, "Qwen3MoeForSequenceClassification";
}

/// The labels of `config` (the content of the file `path`) in the order of the scores.
///
/// # Errors
/// [`ModelError::Invalid`] if `id2label` is not a list of names from 0 on.
pub(crate) fn labels_of(path: &Path, config: &Map<String, Value>) -> Result<Vec<String>, ModelError> {
    labels(&Fields::new(path, config))
}

/// `id2label`, else `num_labels` names, else two: what the reference library takes for missing.
pub(super) fn labels(fields: &Fields<'_>) -> Result<Vec<String>, ModelError> {
    let names = |count: usize| (0..count).map(|i| format!("LABEL_{i}")).collect::<Vec<_>>();
    let Some(map) = fields.object("id2label")? else {
        let count = fields.size_or("num_labels", 2)?;
        if count > MAX_LABELS {
            return Err(fields.invalid(format!("num_labels = {count}: expected at most {MAX_LABELS}")));
        }
        return Ok(names(count));
    };
    let count = map.map.len();
    if !(1..=MAX_LABELS).contains(&count) {
        return Err(fields.invalid(format!("id2label has {count} entries: expected 1 to {MAX_LABELS}")));
    }
    (0..count)
        .map(|i| match map.map.get(&i.to_string()).and_then(Value::as_str) {
            Some(name) => Ok(name.to_owned()),
            None => Err(fields.invalid(format!("id2label: expected names for \"0\" to \"{}\"", count - 1))),
        })
        .collect()
}
