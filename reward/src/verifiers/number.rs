//! The last number of the completion: integers, decimals, fractions, thousands separators, percent.

use super::ratio::Ratio;
use super::{Verifier, VerifierInput, after_thinking, excerpt, judged, references, tail};
use crate::stack::{Judgement, Unscored};

/// Equality of numbers, exact unless a tolerance is given.
#[derive(Clone, Copy, Debug)]
pub struct Number {
    /// Largest absolute difference that is still right.
    pub tolerance: f64,
}

/// A number as written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Written {
    /// Without regard to `%`.
    value: Ratio,
    percent: bool,
}

impl Verifier for Number {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        let mut golds = Vec::new();
        for reference in references(input.answer)? {
            match whole_number(&reference) {
                Some(number) => golds.push(number),
                None => {
                    return Err(Unscored(format!(
                        "the reference answer {:?} is not a number",
                        excerpt(&reference)
                    )));
                }
            }
        }
        let text = tail(after_thinking(input.text));
        let Some((found, written)) = last_number(text) else { return Ok(judged(false, None)) };
        let right = golds.iter().any(|gold| self.same(*gold, found));
        Ok(judged(right, Some(written.to_owned())))
    }
}

impl Number {
    /// 25, 25% and 0.25 all answer "25%"; 0.25 does not answer 25.
    fn same(self, gold: Written, found: Written) -> bool {
        let within =
            |a: Ratio, b: Ratio| self.tolerance > 0.0 && (a.to_f64() - b.to_f64()).abs() <= self.tolerance;
        let close = |a: Ratio, b: Ratio| a == b || within(a, b);
        let hundredth = |r: Ratio| r.div(Ratio::integer(100)).unwrap_or(r);
        close(gold.value, found.value)
            || (gold.percent && !found.percent && close(hundredth(gold.value), found.value))
            || (!gold.percent && found.percent && close(gold.value, hundredth(found.value)))
    }
}

fn whole_number(text: &str) -> Option<Written> {
    let text = text.trim().trim_start_matches(['$', '€', '£']);
    let (number, range) = number_at(text, text.find(|c: char| c.is_ascii_digit() || "+-.−".contains(c))?)?;
    (range.0 == 0 && range.1 == text.len()).then_some(number)
}

/// The last number in `text`, with the text it was read from.
fn last_number(text: &str) -> Option<(Written, &str)> {
    let mut last = None;
    let mut at = 0;
    while let Some(offset) = text[at..].find(|c: char| c.is_ascii_digit()) {
        // A sign or a bare point belongs to the number if no digit or closing bracket stands before it.
        let start = sign_start(text, at + offset);
        match number_at(text, start) {
            Some((number, (from, to))) => {
                last = Some((number, &text[from..to]));
                at = to;
            }
            None => at += offset + 1,
        }
    }
    last
}

fn sign_start(text: &str, digit: usize) -> usize {
    let before = |at: usize| text[..at].chars().next_back();
    let operand = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || ")]}".contains(c));
    let mut start = digit;
    if before(start) == Some('.') && !operand(before(start - 1)) {
        start -= 1;
    }
    if let Some(sign @ ('-' | '+' | '−')) = before(start) {
        let at = start - sign.len_utf8();
        // "42 -9" subtracts, "so -9" does not.
        let spaced = text[..at].trim_end().chars().next_back().filter(|c| !c.is_alphabetic());
        if !operand(before(at)) && !operand(spaced) {
            start = at;
        }
    }
    start
}

/// Reads a number that starts at byte `start`; gives its byte range.
fn number_at(text: &str, start: usize) -> Option<(Written, (usize, usize))> {
    let mut at = start;
    let mut negative = false;
    if let Some(sign @ ('-' | '+' | '−')) = text[at..].chars().next() {
        negative = sign != '+';
        at += sign.len_utf8();
    }
    let (mut value, mut end) = unsigned_at(text, at)?;
    if let Some(rest) = text[end..].strip_prefix('/')
        && rest.starts_with(|c: char| c.is_ascii_digit())
        && let Some((den, den_end)) = unsigned_at(text, end + 1)
        && let Some(quotient) = value.div(den)
    {
        (value, end) = (quotient, den_end);
    }
    let percent_sign = text[end..].trim_start_matches(' ').trim_start_matches('\\');
    let percent = percent_sign.starts_with('%');
    if percent {
        end = text.len() - percent_sign.len() + 1;
    }
    let value = if negative { value.neg()? } else { value };
    Some((Written { value, percent }, (start, end)))
}

/// Digits with thousands separators (`,` in threes) and a decimal part.
fn unsigned_at(text: &str, start: usize) -> Option<(Ratio, usize)> {
    let bytes = text.as_bytes();
    let digits = |from: usize| bytes[from..].iter().take_while(|b| b.is_ascii_digit()).count();
    let mut end = start + digits(start);
    let mut plain = text[start..end].to_owned();
    if (1..=3).contains(&plain.len()) {
        while bytes.get(end) == Some(&b',') && digits(end + 1) == 3 {
            plain.push_str(&text[end + 1..end + 4]);
            end += 4;
        }
    }
    if bytes.get(end) == Some(&b'.') && digits(end + 1) > 0 {
        let to = end + 1 + digits(end + 1);
        plain.push_str(&text[end..to]);
        end = to;
    }
    Some((Ratio::decimal(&plain)?, end))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::verifiers::tests::verdict;

    fn check(gold: Value, text: &str) -> Option<f32> {
        verdict(&Number { tolerance: 0.0 }, &gold, text)
    }

    #[test]
    fn the_last_number_counts() {
        assert_eq!(check(json!(33), "17+25=42;42-9=33;#33"), Some(1.0));
        assert_eq!(check(json!(42), "17+25=42;42-9=33;#33"), Some(0.0));
        assert_eq!(check(json!(9), "42-9"), Some(1.0));
        assert_eq!(check(json!(-9), "42-9"), Some(0.0));
        assert_eq!(check(json!(-9), "x = -9."), Some(1.0));
        assert_eq!(check(json!(8), "<think>7</think> It is 8"), Some(1.0));
        assert_eq!(check(json!(8), ""), Some(0.0));
    }

    #[test]
    fn forms_of_numbers() {
        let right = [
            ("1234567", "1,234,567"),
            ("1/2", "0.50"),
            ("-3/4", "so -0.75"),
            ("0.5", ".5"),
            ("25%", "0.25"),
            ("25", "25 %"),
            ("0.25", "25\\%"),
            ("$20", "20 dollars"),
            ("1000", "1,000."),
            ("12", "12.0"),
            ("−7", "-7"),
        ];
        for (gold, text) in right {
            assert_eq!(check(json!(gold), text), Some(1.0), "{gold} {text}");
        }
        for (gold, text) in [("25", "0.25"), ("12", "1,2"), ("1234", "1,23,4"), ("0.33", "1/3"), ("5", "1/0")]
        {
            assert_eq!(check(json!(gold), text), Some(0.0), "{gold} {text}");
        }
    }

    #[test]
    fn large_integers_are_compared_exactly() {
        assert_eq!(check(json!("12345678901234567890123"), "12345678901234567890124"), Some(0.0));
        assert_eq!(check(json!("12345678901234567890123"), "12345678901234567890123"), Some(1.0));
    }

    #[test]
    fn a_reference_that_is_no_number_is_unscored() {
        assert_eq!(check(json!("seven"), "7"), None);
        assert_eq!(check(json!("7 apples"), "7"), None);
        assert_eq!(verdict(&Number { tolerance: 0.01 }, &json!(2.5), "2.509"), Some(1.0));
    }
}
