//! A pattern finds the answer, or is the answer.

use regex::Regex;

use super::{Exact, Verifier, VerifierInput, judged, references};
use crate::stack::{Judgement, Unscored};

/// With a capture group: group 1 of the *last* match must equal the reference. Without: the text must match.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// The pattern.
    pub regex: Regex,
    /// How the captured text is compared.
    pub compare: Exact,
}

impl Verifier for Pattern {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        if self.regex.captures_len() < 2 {
            return Ok(judged(self.regex.is_match(input.text), None));
        }
        let references = references(input.answer)?;
        let found = self.regex.captures_iter(input.text).last().and_then(|groups| groups.get(1));
        let Some(found) = found else { return Ok(judged(false, None)) };
        let right = references.iter().any(|reference| self.compare.same(reference, found.as_str()));
        Ok(judged(right, Some(found.as_str().to_owned())))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::verifiers::{compile, tests::verdict};

    #[test]
    fn the_last_match_counts_and_its_group_is_compared() {
        let verifier = Pattern { regex: compile(r"answer: (\w+)").unwrap(), compare: Exact::default() };
        assert_eq!(verdict(&verifier, &json!("7"), "answer: 6 no, answer: 7"), Some(1.0));
        assert_eq!(verdict(&verifier, &json!("6"), "answer: 6 no, answer: 7"), Some(0.0));
        assert_eq!(verdict(&verifier, &json!("7"), "7"), Some(0.0));
        assert_eq!(verdict(&verifier, &json!(null), "answer: 7"), None);
    }

    #[test]
    fn without_a_group_it_only_has_to_match() {
        let verifier = Pattern { regex: compile(r"^\d+$").unwrap(), compare: Exact::default() };
        assert_eq!(verdict(&verifier, &json!(null), "123"), Some(1.0));
        assert_eq!(verdict(&verifier, &json!(null), "12a"), Some(0.0));
    }
}
