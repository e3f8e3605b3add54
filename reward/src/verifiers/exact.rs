//! The whole completion equals the reference.

use super::{Verifier, VerifierInput, judged, references};
use crate::stack::{Judgement, Unscored};

/// Equality of the whole text.
#[derive(Clone, Copy, Debug)]
pub struct Exact {
    /// Without regard to case.
    pub ignore_case: bool,
    /// Runs of white space are one space; none at the ends.
    pub ignore_space: bool,
}

impl Default for Exact {
    fn default() -> Self {
        Self { ignore_case: false, ignore_space: true }
    }
}

impl Exact {
    /// Whether both are the same text under the options.
    pub fn same(&self, a: &str, b: &str) -> bool {
        self.canonical(a) == self.canonical(b)
    }

    fn canonical(&self, text: &str) -> String {
        let mut text = if self.ignore_space {
            text.split_whitespace().collect::<Vec<_>>().join(" ")
        } else {
            text.to_owned()
        };
        if self.ignore_case {
            text = text.to_lowercase();
        }
        text
    }
}

impl Verifier for Exact {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        let right = references(input.answer)?.iter().any(|reference| self.same(reference, input.text));
        Ok(judged(right, None))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::verifiers::tests::verdict;

    #[test]
    fn options_decide_what_counts_as_the_same() {
        let loose = Exact { ignore_case: true, ignore_space: true };
        let strict = Exact { ignore_case: false, ignore_space: false };
        let gold = json!("Paris is  nice");
        assert_eq!(verdict(&loose, &gold, " paris IS nice\n"), Some(1.0));
        assert_eq!(verdict(&Exact::default(), &gold, "paris is nice"), Some(0.0));
        assert_eq!(verdict(&Exact::default(), &gold, "Paris is nice "), Some(1.0));
        assert_eq!(verdict(&strict, &gold, "Paris is nice"), Some(0.0));
        assert_eq!(verdict(&strict, &json!(["a", "b"]), "b"), Some(1.0));
    }
}
