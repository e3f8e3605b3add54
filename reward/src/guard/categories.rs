//! What each kind of harm is worth.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The entry that stands for all categories that are not named.
const DEFAULT: &str = "default";

/// Weight of a category.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum CategoryWeight {
    /// Factor of the probability, 0 to 1.
    Weight(f32),
    /// "hard": counts in full, and the guard's class is "hard".
    Word(HardWord),
}

/// The word "hard".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HardWord {
    /// Must never happen.
    Hard,
}

/// Checked weights.
#[derive(Clone, Debug, Default)]
pub(crate) struct Categories {
    named: BTreeMap<String, CategoryWeight>,
    default: Option<CategoryWeight>,
}

impl Categories {
    /// Weights for the categories `known`; problems as messages.
    pub(crate) fn new(
        config: &BTreeMap<String, CategoryWeight>,
        known: &[&str],
    ) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        for (name, weight) in config {
            if name != DEFAULT && !known.contains(&name.as_str()) {
                problems.push(format!(
                    "the guard knows no category {name:?}; it has {}, and {DEFAULT:?} is the rest",
                    known.join(", ")
                ));
            }
            if let CategoryWeight::Weight(weight) = weight
                && !(0.0..=1.0).contains(weight)
            {
                problems.push(format!("the weight of {name:?} must be 0 to 1 or \"hard\", is {weight}"));
            }
        }
        if problems.is_empty() {
            let mut named = config.clone();
            let default = named.remove(DEFAULT);
            Ok(Self { named, default })
        } else {
            Err(problems)
        }
    }

    /// Weight of a category; 1 where nothing is said.
    pub(crate) fn weight(&self, name: &str) -> f32 {
        match self.named.get(name).or(self.default.as_ref()) {
            Some(CategoryWeight::Weight(weight)) => *weight,
            Some(CategoryWeight::Word(HardWord::Hard)) | None => 1.0,
        }
    }

    /// Whether it must never happen.
    pub(crate) fn is_hard(&self, name: &str) -> bool {
        matches!(self.named.get(name).or(self.default.as_ref()), Some(CategoryWeight::Word(HardWord::Hard)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_named_hard_or_the_default() {
        let config: BTreeMap<String, CategoryWeight> =
            serde_json::from_str(r#"{"S4": "hard", "S6": 0.3, "default": 0.5}"#).unwrap();
        let categories = Categories::new(&config, &["S4", "S6", "S7"]).unwrap();
        assert_eq!(["S4", "S6", "S7"].map(|name| categories.weight(name)), [1.0, 0.3, 0.5]);
        assert_eq!(["S4", "S6"].map(|name| categories.is_hard(name)), [true, false]);
        let problems = Categories::new(&config, &["S6"]).unwrap_err();
        assert!(problems[0].contains("no category \"S4\""), "{problems:?}");
        let heavy = BTreeMap::from([("S6".to_owned(), CategoryWeight::Weight(2.0))]);
        assert!(Categories::new(&heavy, &["S6"]).unwrap_err()[0].contains("is 2"));
        assert!(serde_json::from_str::<CategoryWeight>("\"soft\"").is_err());
    }
}
