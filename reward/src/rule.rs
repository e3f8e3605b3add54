//! Rules: fixed formulas over the rollout itself.

use std::collections::BTreeSet;

use crate::stack::{Completion, Component, Judgement, Unscored};

/// The soft overlong penalty (DAPO, arXiv 2503.14476, eq. 13): with `T` tokens, limit `L` and buffer `B`,
/// 0 for `T <= L - B`, `((L - B) - T) / B` up to `L`, -1 beyond.
pub(crate) struct Overlong {
    /// L.
    pub(crate) max_tokens: u32,
    /// B, above 0 and at most L.
    pub(crate) buffer_tokens: u32,
}

impl Component for Overlong {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        let (t, l, b) = (completion.tokens as f64, f64::from(self.max_tokens), f64::from(self.buffer_tokens));
        let value = if t <= l - b {
            0.0
        } else if t <= l {
            ((l - b) - t) / b
        } else {
            -1.0
        };
        Ok(Judgement { value: value as f32, ..Judgement::default() })
    }
}

/// Minus the share of runs of `ngram` words that occurred before: 0 where none did.
pub(crate) struct Repetition {
    /// Words in a run, at least 1.
    pub(crate) ngram: usize,
}

impl Component for Repetition {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        let words: Vec<&str> = completion.text.split_whitespace().collect();
        let runs = words.len().saturating_sub(self.ngram - 1);
        if runs == 0 {
            return Ok(Judgement::default());
        }
        let distinct: BTreeSet<&[&str]> = words.windows(self.ngram).collect();
        let repeated = (runs - distinct.len()) as f64 / runs as f64;
        // 0 and not -0 where nothing is repeated.
        Ok(Judgement { value: (0.0 - repeated) as f32, ..Judgement::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stack::tests::prompt;

    #[test]
    fn overlong_is_zero_then_linear_then_minus_one() {
        let rule = Overlong { max_tokens: 100, buffer_tokens: 20 };
        let prompt = prompt("1");
        let at = |tokens| {
            rule.judge(&Completion { prompt: &prompt, text: "", tokens, truncated: false }).unwrap().value
        };
        let repeats = |text| {
            let completion = Completion { prompt: &prompt, text, tokens: 1, truncated: false };
            Repetition { ngram: 2 }.judge(&completion).unwrap().value
        };
        assert_eq!(["", "a", "a b c", "a b a b a", "a a a"].map(repeats), [0.0, 0.0, 0.0, -0.5, -0.5]);
        assert_eq!([at(0), at(80), at(85), at(90), at(100), at(101)], [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]);
    }
}
