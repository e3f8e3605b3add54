//! Which option was chosen? The last one that is stated as the answer.

use std::sync::LazyLock;

use regex::Regex;

use super::{Verifier, VerifierInput, after_thinking, excerpt, judged, references, tail};
use crate::stack::{Judgement, Unscored};

/// Multiple choice, options A to J.
#[derive(Clone, Copy, Debug)]
pub struct Choice;

fn constant(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern")
}

/// In order of how plainly they state an answer: boxed, said to be the answer, alone on a line, alone in brackets.
static STATED: LazyLock<[Regex; 4]> = LazyLock::new(|| {
    [
        constant(r"\\boxed\{\s*(?:\\text(?:bf|rm)?\{)?\s*\(?\s*([A-Ja-j])\s*\)?\s*\.?\s*\}"),
        constant(
            r"(?i)\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be|must\s+be|should\s+be))?\s*:?\s*(?:option\s+|choice\s+)?[*_(\[\s]*\b(?-i:([A-J]))\b(?:[).\]*_:,]|\s|$)",
        ),
        constant(r"(?m)^\s*[*_(\[]*([A-J])[)\]*_]*[.:]?[*_]*\s*$"),
        constant(r"[(\[]([A-J])[)\]]"),
    ]
});

/// The option a text states, in upper case.
fn stated(text: &str) -> Option<char> {
    STATED.iter().find_map(|pattern| {
        let letter = pattern.captures_iter(text).last()?.get(1)?;
        letter.as_str().chars().next().map(|c| c.to_ascii_uppercase())
    })
}

/// The option a reference names: a letter, or an index from 0.
fn wanted(reference: &str) -> Option<char> {
    let text = reference.trim().trim_matches(['(', ')', '.', ' ']);
    if let Ok(index) = text.parse::<u8>() {
        return (index < 10).then(|| char::from(b'A' + index));
    }
    let mut chars = text.chars();
    match (chars.next().map(|c| c.to_ascii_uppercase()), chars.next()) {
        (Some(letter @ 'A'..='J'), None) => Some(letter),
        _ => None,
    }
}

impl Verifier for Choice {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        let mut right = Vec::new();
        for reference in references(input.answer)? {
            let option = wanted(&reference);
            right.push(option.ok_or_else(|| {
                Unscored(format!(
                    "the reference answer {:?} is no option A to J or index 0 to 9",
                    excerpt(&reference)
                ))
            })?);
        }
        let found = stated(after_thinking(tail(input.text)));
        Ok(judged(found.is_some_and(|option| right.contains(&option)), found.map(String::from)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::verifiers::tests::verdict;

    #[test]
    fn the_last_stated_option_counts() {
        for (text, option) in [
            ("The answer is (B).", Some('B')),
            ("A is wrong. The answer is C", Some('C')),
            ("The answer is A. No: the answer is B.", Some('B')),
            (r"so \boxed{\text{D}}", Some('D')),
            (r"\boxed{b}, the answer is (A)", Some('B')),
            ("**Answer: C**", Some('C')),
            ("Let me think about it.\n\nC", Some('C')),
            ("**B.**", Some('B')),
            ("I choose (A) over the rest", Some('A')),
            ("<think>The answer is A.</think>Option D", Some('D')),
            ("The answer is a matter of taste", None),
            ("The answer is Always yes", None),
            ("A man walks in", None),
            ("", None),
        ] {
            assert_eq!(stated(after_thinking(text)), option, "{text:?}");
        }
    }

    #[test]
    fn references_are_letters_or_indices() {
        assert_eq!(verdict(&Choice, &json!("B"), "the answer is B"), Some(1.0));
        assert_eq!(verdict(&Choice, &json!(1), "the answer is B"), Some(1.0));
        assert_eq!(verdict(&Choice, &json!(["A", "(c)"]), "the answer is C"), Some(1.0));
        assert_eq!(verdict(&Choice, &json!("A"), "the answer is C"), Some(0.0));
        assert_eq!(verdict(&Choice, &json!("Paris"), "the answer is C"), None);
    }
}
