//! Equality of mathematical answers, LaTeX or plain.
//!
//! ```text
//! completion ─extract─► text ─lexer─► tokens ─expr─► tree ─compare─► same?   (gold likewise, once per call)
//! ```
//!
//! Numbers are compared exactly where 128-bit rationals hold them, else in floating point; formulas with
//! variables at fixed sample points. Everything is bounded: length, nesting, list sizes, so there is no
//! timeout to run into. The cases it must get right are in `tests/fixtures/verifier/cases.json`.

mod compare;
mod eval;
mod expr;
mod extract;
mod lexer;
mod sets;
mod text;
mod units;

use std::sync::LazyLock;

use regex::Regex;

use self::expr::{Expr, parse};
use self::extract::Candidate;
use self::lexer::Reading;
use self::units::Unit;
use super::{Verifier, VerifierInput, after_thinking, excerpt, judged, references, tail};
use crate::stack::{Judgement, Unscored};

/// Equality of mathematical answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Math;

impl Verifier for Math {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        let golds: Result<Vec<_>, _> = references(input.answer)?.iter().map(|text| Gold::new(text)).collect();
        let golds = golds?;
        let found = extract::answer(tail(after_thinking(input.text)));
        let Some(found) = found else { return Ok(judged(false, None)) };
        Ok(judged(golds.iter().any(|gold| gold.accepts(&found)), Some(found.text)))
    }
}

/// Whether the answer in `completion` equals `gold`.
///
/// # Errors
/// If `gold` is no usable reference answer.
pub fn verify(gold: &str, completion: &str) -> Result<bool, Unscored> {
    let gold = Gold::new(gold)?;
    Ok(extract::answer(tail(after_thinking(completion))).is_some_and(|found| gold.accepts(&found)))
}

/// One way to read an answer.
#[derive(Clone, Debug, PartialEq)]
struct Parsed {
    expr: Expr,
    unit: Option<Unit>,
}

struct Gold {
    text: String,
    readings: Vec<Parsed>,
}

static DECIMAL_COMMA: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^-?\d+,\d+$").expect("a fixed pattern"));

impl Gold {
    fn new(text: &str) -> Result<Self, Unscored> {
        let unusable = |why: &str| Unscored(format!("the reference answer {:?} {why}", excerpt(text)));
        let candidate = extract::reference(text).ok_or_else(|| unusable("is empty"))?;
        if candidate.text.eq_ignore_ascii_case("nan") {
            return Err(unusable("is not a number"));
        }
        let readings = readings(&candidate, true);
        let undefined = |parsed: &Parsed| undefined(&parsed.expr);
        if !readings.is_empty() && readings.iter().all(undefined) {
            return Err(unusable("has no value"));
        }
        Ok(Self { text: candidate.text, readings })
    }

    fn accepts(&self, found: &Candidate) -> bool {
        self.same_words(&found.text) || self.same_choice(found) || {
            let mut answers = readings(found, false);
            if DECIMAL_COMMA.is_match(&found.text) {
                let candidate =
                    Candidate { text: found.text.replace(',', "."), formula: false, choice: None };
                answers.extend(readings(&candidate, false));
            }
            self.readings.iter().any(|gold| answers.iter().any(|answer| gold.same(answer)))
        }
    }

    fn same_words(&self, answer: &str) -> bool {
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        if squeezed(&self.text) == squeezed(answer) {
            return !self.readings.iter().any(|parsed| undefined(&parsed.expr));
        }
        let digits = |text: &str| text.chars().any(char::is_numeric);
        let gold = text::canonical(&self.text);
        !digits(&self.text) && !digits(answer) && gold.len() > 1 && gold == text::canonical(answer)
    }

    /// A gold of one capital letter may be a choice.
    fn same_choice(&self, answer: &Candidate) -> bool {
        let gold = self.text.chars().filter(char::is_ascii_uppercase).count() == 1;
        let letter = text::canonical(&self.text);
        let chosen = text::choice(&answer.text).or(answer.choice);
        gold && letter.len() == 1 && chosen.is_some_and(|c| letter.starts_with(c))
    }
}

impl Parsed {
    fn same(&self, answer: &Self) -> bool {
        match (&self.unit, &answer.unit) {
            (Some(gold), Some(found)) if gold != found => {
                gold.agrees(found) && compare::same(&gold.scaled(&self.expr), &found.scaled(&answer.expr))
            }
            _ => compare::same(&self.expr, &answer.expr),
        }
    }
}

/// Every way to read `candidate`. A gold that is prose may also be read as a formula.
fn readings(candidate: &Candidate, gold: bool) -> Vec<Parsed> {
    let mut found: Vec<Parsed> = Vec::new();
    let mut add = |text: &str, unit: Option<Unit>| {
        for formula in if gold || !candidate.formula { [candidate.formula, true] } else { [true, true] } {
            for thousands in [true, false] {
                if let Some(expr) = parse(text, Reading { formula, thousands })
                    && !found.iter().any(|parsed| parsed.expr == expr && parsed.unit == unit)
                {
                    found.push(Parsed { expr, unit: unit.clone() });
                }
            }
        }
    };
    // With a unit that is understood as one, the value alone is the answer: "5 m" is not 5 times m.
    match units::split(&candidate.text) {
        Some((value, unit)) => {
            add(value, Some(unit));
            add(&candidate.text, None);
        }
        None => add(&candidate.text, None),
    }
    found
}

/// A number that has no value, such as 1/0.
fn undefined(expr: &Expr) -> bool {
    let number = matches!(
        expr,
        Expr::Quotient(..) | Expr::Power(..) | Expr::Sum(_) | Expr::Product(_) | Expr::Call(..)
    );
    number && !eval::has_variables(expr) && eval::value(expr, 0).is_none() && !mentions_infinity(expr)
}

fn mentions_infinity(expr: &Expr) -> bool {
    match expr {
        Expr::Infinity => true,
        Expr::Neg(a) => mentions_infinity(a),
        Expr::Sum(list) | Expr::Product(list) => list.iter().any(mentions_infinity),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
