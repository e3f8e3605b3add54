//! How tokens are drawn.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TypesError;

/// The transform from logits to the distribution that is sampled.
///
/// Order: temperature, then top-k, then top-p, then min-p, then renormalise
/// (the order of transformers' logits warpers). The learner applies the same transform before it compares
/// log-probs, so behaviour and policy share one action space.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SamplingParams {
    /// Softmax temperature; 0 means greedy (arg max, lowest id wins a tie).
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set with at least this probability mass; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than `min_p` times the most likely one; 0 drops none.
    pub min_p: f32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Whether the most likely token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether tokens can be cut from the support.
    pub fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }

    /// Checks every range.
    ///
    /// # Errors
    /// The first field out of range, with its limits.
    pub fn validate(&self) -> Result<(), TypesError> {
        let check = |field, value: f32, ok: bool, limit: &str| {
            if ok {
                Ok(())
            } else {
                Err(TypesError::OutOfRange { field, value: value.to_string(), limit: limit.to_owned() })
            }
        };
        check("temperature", self.temperature, (0.0..=100.0).contains(&self.temperature), "0 to 100")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0, up to 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1")
    }
}
