//! Verifiers: is this completion right?
//!
//! A verifier gives 1 or 0. If it cannot tell because of *its own* side (no reference answer, one that does not
//! parse, an unknown name) the rollout is unscored. All of them are bounded: text is cut to
//! [`TEXT_BYTES_MAX`], patterns are linear-time, expressions have a depth and a length limit.

mod choice;
mod code;
mod exact;
mod format;
mod instructions;
pub mod math;
mod number;
mod pattern;
mod ratio;
mod schema;

pub use choice::Choice;
pub use code::Code;
pub use exact::Exact;
pub use format::Format;
pub use instructions::Instructions;
pub use math::Math;
pub use number::Number;
pub use pattern::Pattern;
pub use schema::{JsonSchema, Schema};

use regex::{Regex, RegexBuilder};
use serde_json::Value;

use crate::config::{ComponentConfig, VerifierKind};
use crate::sandbox::Sandbox;
use crate::stack::{Completion, Component, Judgement, Unscored};

/// Only this much of the end of a completion is read for an answer.
pub const TEXT_BYTES_MAX: usize = 64 << 10;
const COMPILED_BYTES_MAX: usize = 2 << 20;

/// What a verifier sees.
#[derive(Clone, Copy, Debug)]
pub struct VerifierInput<'a> {
    /// The completion.
    pub text: &'a str,
    /// Reference answer; an array means that any of its elements is right.
    pub answer: Option<&'a Value>,
}

/// Something that tells right from wrong.
pub trait Verifier: Send + Sync {
    /// 1 for right, 0 for wrong.
    ///
    /// # Errors
    /// If the verifier itself cannot tell: missing or unusable reference answer.
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored>;
}

/// Right or wrong, with what was read as the answer.
pub(crate) fn judged(right: bool, detail: Option<String>) -> Judgement {
    Judgement {
        value: f32::from(u8::from(right)),
        detail: detail.map(|text| excerpt(&text)),
        label: None,
        odds: None,
    }
}

fn excerpt(text: &str) -> String {
    const CHARS: usize = 120;
    let mut out: String = text.chars().take(CHARS).collect();
    if out.len() < text.len() {
        out.push('…');
    }
    out
}

/// The end of `text`, at most [`TEXT_BYTES_MAX`] bytes, cut at a character.
pub(crate) fn tail(text: &str) -> &str {
    let mut from = text.len().saturating_sub(TEXT_BYTES_MAX);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

/// What comes after the last closing reasoning tag.
pub(crate) fn after_thinking(text: &str) -> &str {
    text.rfind("</think>").map_or(text, |at| &text[at + "</think>".len()..])
}

/// The reference answers as text, at least one.
pub(crate) fn references(answer: Option<&Value>) -> Result<Vec<String>, Unscored> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(flag) => Ok(flag.to_string()),
        other => Err(Unscored(format!(
            "the reference answer must be text or a number, is {}",
            excerpt(&other.to_string())
        ))),
    };
    match answer {
        None | Some(Value::Null) => Err(Unscored("the prompt has no reference answer".into())),
        Some(Value::Array(list)) if list.is_empty() => {
            Err(Unscored("the list of reference answers is empty".into()))
        }
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}

/// Compiles a user's pattern: linear-time, bounded size.
pub(crate) fn compile(pattern: &str) -> Result<Regex, String> {
    RegexBuilder::new(pattern).size_limit(COMPILED_BYTES_MAX).build().map_err(|error| {
        let hint = if pattern.contains("(?=") || pattern.contains("(?!") || pattern.contains("(?<") {
            "; look-around and back-references are not supported, they cannot run in linear time"
        } else {
            ""
        };
        format!("{pattern:?} does not compile: {error}{hint}")
    })
}

/// The verifier of a component: a fixed one, or the one each prompt names.
pub(crate) struct Verifiers {
    kind: VerifierKind,
    exact: Exact,
    number: Number,
    pattern: Option<Pattern>,
    format: Option<Format>,
    code: Option<Code>,
    schema: JsonSchema,
    instructions: Instructions,
}

impl Verifiers {
    /// Builds what the component needs; problems as (key, message).
    pub(crate) fn new(
        c: &ComponentConfig,
        sandbox: Option<&Sandbox>,
    ) -> Result<Self, Vec<(&'static str, String)>> {
        let mut problems = Vec::new();
        if !(c.tolerance >= 0.0 && c.tolerance.is_finite()) {
            problems.push(("tolerance", format!("must be 0 or more, is {}", c.tolerance)));
        }
        let exact = Exact { ignore_case: c.ignore_case, ignore_space: c.ignore_space.unwrap_or(true) };
        let compiled = c.pattern.as_deref().map(compile).transpose();
        let compiled = compiled.unwrap_or_else(|message| {
            problems.push(("pattern", message));
            None
        });
        if c.verifier == VerifierKind::Regex && c.pattern.is_none() {
            problems.push(("pattern", "verifier = \"regex\" needs a pattern".into()));
        }
        let mut format = None;
        if c.verifier == VerifierKind::Format {
            format = Some(Format::new(c).unwrap_or_else(|(key, message)| {
                problems.push((key, message));
                Format::default()
            }));
        }
        let mut schema = None;
        if let Some(text) = &c.schema {
            let parsed = serde_json::from_str(text).map_err(|e| e.to_string()).and_then(Schema::new);
            schema = parsed.map_err(|message| problems.push(("schema", message))).ok();
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let pattern = compiled.map(|regex| Pattern { regex, compare: exact });
        let number = Number { tolerance: c.tolerance };
        let code = sandbox.map(|sandbox| Code { sandbox: sandbox.clone(), partial: c.partial });
        let instructions = Instructions { partial: c.partial };
        let schema = JsonSchema { schema };
        Ok(Self { kind: c.verifier, exact, number, pattern, format, code, schema, instructions })
    }

    fn chosen(&self, completion: &Completion<'_>) -> Result<&dyn Verifier, Unscored> {
        let named = completion.prompt.verifier.as_deref();
        Ok(match (self.kind, named) {
            (VerifierKind::Math, _) | (VerifierKind::Auto, None | Some("math")) => &Math,
            (VerifierKind::Number, _) | (VerifierKind::Auto, Some("number")) => &self.number,
            (VerifierKind::Exact, _) | (VerifierKind::Auto, Some("exact")) => &self.exact,
            (VerifierKind::Choice, _) | (VerifierKind::Auto, Some("choice")) => &Choice,
            (VerifierKind::Schema, _) | (VerifierKind::Auto, Some("schema")) => &self.schema,
            (VerifierKind::Instructions, _) | (VerifierKind::Auto, Some("instructions")) => {
                &self.instructions
            }
            (VerifierKind::Regex, _) => self.pattern.as_ref().expect("checked when it was built"),
            (VerifierKind::Format, _) => self.format.as_ref().expect("checked when it was built"),
            (VerifierKind::Code, _) => self.code.as_ref().expect("checked when it was built"),
            (VerifierKind::Auto, Some(other)) => {
                return Err(Unscored(format!(
                    "the prompt names the verifier {other:?}; a prompt can name \"math\", \"number\", \"exact\", \"choice\", \"schema\" or \"instructions\""
                )));
            }
        })
    }
}

impl Component for Verifiers {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        let verifier = self.chosen(completion)?;
        let answer: Option<Value> = match completion.prompt.answer.as_deref() {
            None => None,
            Some(text) => Some(
                serde_json::from_str(text)
                    .map_err(|e| Unscored(format!("the reference answer is not JSON: {e}")))?,
            ),
        };
        verifier.score(&VerifierInput { text: completion.text, answer: answer.as_ref() })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// 1, 0, or `None` for unscored.
    pub(crate) fn verdict(verifier: &dyn Verifier, answer: &Value, text: &str) -> Option<f32> {
        verifier.score(&VerifierInput { text, answer: Some(answer) }).ok().map(|j| j.value)
    }

    #[test]
    fn a_missing_or_unusable_reference_is_unscored_not_wrong() {
        for answer in [Value::Null, serde_json::json!({"a": 1}), serde_json::json!([])] {
            for verifier in [&Math as &dyn Verifier, &Number { tolerance: 0.0 }, &Exact::default()] {
                assert_eq!(verdict(verifier, &answer, "1"), None, "{answer}");
            }
        }
        assert!(Math.score(&VerifierInput { text: "1", answer: None }).is_err());
    }

    #[test]
    fn a_pattern_that_needs_backtracking_is_refused_with_the_reason() {
        assert!(compile("(?=a)b").unwrap_err().contains("linear time"));
        assert!(compile(r"(\w{1000}){1000}").unwrap_err().contains("does not compile"));
    }

    #[test]
    fn the_tail_is_cut_at_a_character() {
        let text = format!("{}5", "ä".repeat(TEXT_BYTES_MAX));
        assert!(tail(&text).len() <= TEXT_BYTES_MAX && tail(&text).ends_with("ä5"));
    }
}
