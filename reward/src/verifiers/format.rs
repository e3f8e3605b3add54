//! The form of a completion; its content does not matter.

use regex::Regex;

use super::{Verifier, VerifierInput, compile, judged};
use crate::config::ComponentConfig;
use crate::stack::{Judgement, Unscored};

/// Every condition must hold.
#[derive(Clone, Debug, Default)]
pub struct Format {
    /// The whole text must match.
    pub pattern: Option<Regex>,
    /// Must occur.
    pub contains: Vec<String>,
    /// Must not occur.
    pub excludes: Vec<String>,
    /// Fewest characters.
    pub length_min: usize,
    /// Most characters.
    pub length_max: Option<usize>,
}

impl Format {
    /// From a component of `[reward]`; a problem as (key, message).
    pub(crate) fn new(c: &ComponentConfig) -> Result<Self, (&'static str, String)> {
        let nothing = c.pattern.is_none()
            && c.contains.is_empty()
            && c.excludes.is_empty()
            && c.length_min == 0
            && c.length_max.is_none();
        if nothing {
            let message = "verifier = \"format\" needs pattern, contains, excludes, length_min or length_max";
            return Err(("verifier", message.into()));
        }
        if c.length_max.is_some_and(|max| max < c.length_min) {
            return Err(("length_max", format!("is below length_min ({})", c.length_min)));
        }
        // `\A(?:…)\z` makes the user's pattern span the whole text, whatever alternatives it has.
        let whole = c.pattern.as_ref().map(|pattern| compile(&format!(r"\A(?:{pattern})\z")));
        Ok(Self {
            pattern: whole.transpose().map_err(|message| ("pattern", message))?,
            contains: c.contains.clone(),
            excludes: c.excludes.clone(),
            length_min: c.length_min,
            length_max: c.length_max,
        })
    }

    /// The first condition that does not hold.
    fn violated(&self, text: &str) -> Option<String> {
        let length = text.chars().count();
        if length < self.length_min {
            return Some(format!("{length} characters, fewer than {}", self.length_min));
        }
        if let Some(max) = self.length_max.filter(|max| length > *max) {
            return Some(format!("{length} characters, more than {max}"));
        }
        if let Some(missing) = self.contains.iter().find(|s| !text.contains(s.as_str())) {
            return Some(format!("does not contain {missing:?}"));
        }
        if let Some(present) = self.excludes.iter().find(|s| text.contains(s.as_str())) {
            return Some(format!("contains {present:?}"));
        }
        let form = self.pattern.as_ref()?;
        (!form.is_match(text)).then(|| "does not match the pattern".to_owned())
    }
}

impl Verifier for Format {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        let violated = self.violated(input.text);
        Ok(judged(violated.is_none(), violated))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::verifiers::tests::verdict;

    #[test]
    fn every_condition_can_fail_alone() {
        let config = ComponentConfig {
            pattern: Some(r"a.*z|q".into()),
            contains: vec!["m".into()],
            excludes: vec!["!".into()],
            length_min: 3,
            length_max: Some(6),
            ..Default::default()
        };
        let format = Format::new(&config).unwrap();
        let score = |text: &str| verdict(&format, &Value::Null, text);
        assert_eq!(score("amäz"), Some(1.0));
        for bad in ["az", "ammmmmz", "abbz", "am!z", "amzy", "qm.."] {
            assert_eq!(score(bad), Some(0.0), "{bad:?}");
        }
    }
}
