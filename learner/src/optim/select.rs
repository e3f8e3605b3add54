//! Which parameters a setting is for: by kind, by name, by pattern.

use freewheel_model::{TensorKind, TensorSpec};

/// What the names of an image encoder's tensors begin with.
const VISION: &str = "vision_model.";

const KINDS: [(&str, TensorKind); 9] = [
    ("embedding", TensorKind::Embedding),
    ("head", TensorKind::Head),
    ("norm", TensorKind::Norm),
    ("bias", TensorKind::Bias),
    ("attention", TensorKind::Attention),
    ("mlp", TensorKind::Mlp),
    ("expert", TensorKind::Expert),
    ("router", TensorKind::Router),
    ("position", TensorKind::Position),
];

/// Some of a model's tensors.
#[derive(Clone, Debug, PartialEq)]
pub enum Selector {
    /// All of a kind.
    Kind(TensorKind),
    /// The image encoder.
    Vision,
    /// Those whose name fits; `*` stands for any characters.
    Name(String),
}

impl Selector {
    /// Reads a kind, a name or a pattern.
    ///
    /// # Errors
    /// What it should have been.
    pub fn new(text: &str) -> Result<Self, String> {
        if let Some((_, kind)) = KINDS.iter().find(|(name, _)| *name == text) {
            return Ok(Self::Kind(*kind));
        }
        match text {
            "vision" => Ok(Self::Vision),
            _ if text.contains(['.', '*']) => Ok(Self::Name(text.to_owned())),
            _ => {
                let kinds: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
                Err(format!("neither a kind ({}, vision) nor a tensor's name", kinds.join(", ")))
            }
        }
    }

    /// Whether `tensor` is one of them.
    pub fn fits(&self, tensor: &TensorSpec) -> bool {
        match self {
            Self::Kind(kind) => tensor.kind == *kind,
            Self::Vision => tensor.name.starts_with(VISION),
            Self::Name(pattern) => matches_pattern(pattern, &tensor.name),
        }
    }
}

/// Whether `name` is `pattern` with each `*` replaced by some characters.
pub(crate) fn matches_pattern(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_characters() {
        let name = "model.layers.11.mlp.experts.3.up_proj.weight";
        for (pattern, fits) in [
            (name, true),
            ("model.layers.11.mlp.experts.3.up_proj", false),
            ("*", true),
            ("model.layers.*.mlp.*", true),
            ("*.experts.*.up_proj.weight", true),
            ("*.experts.*.down_proj.*", false),
            ("layers.*", false),
            ("*weight*weight", false),
        ] {
            assert_eq!(matches_pattern(pattern, name), fits, "{pattern}");
        }
    }

    #[test]
    fn a_word_that_is_no_kind_is_refused() {
        assert_eq!(Selector::new("router"), Ok(Selector::Kind(TensorKind::Router)));
        let error = Selector::new("routers").unwrap_err();
        assert!(error.contains("router, position, vision"), "{error}");
    }
}
