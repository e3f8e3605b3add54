//! Were the instructions followed? The checkable ones of IFEval (arXiv 2311.07911), strict: the text as it is.
//!
//! The reference answer holds `instruction_id_list` and `kwargs` as in IFEval's file, null arguments included. Departures from its code: sentences end at
//! `.`, `!`, `?` before white space (there: a trained splitter), words in capitals are runs of letters and digits, and the language checks
//! (`language:response_language`) are refused, not guessed; letter-case checks do not ask for English.

use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Verifier, VerifierInput, after_thinking, excerpt, tail};
use crate::stack::{Judgement, Unscored};

/// Checks instructions; value 1 if all are followed, or the share of those followed.
#[derive(Clone, Copy, Debug)]
pub struct Instructions {
    /// The share is the value.
    pub partial: bool,
}

#[derive(Debug, Deserialize)]
struct Answer {
    instruction_id_list: Vec<String>,
    #[serde(default)]
    kwargs: Vec<Map<String, Value>>,
}

impl Verifier for Instructions {
    fn score(&self, input: &VerifierInput<'_>) -> Result<Judgement, Unscored> {
        let answer =
            input.answer.ok_or_else(|| Unscored("the prompt has no instructions as its answer".into()))?;
        let answer: Answer = serde_json::from_value(answer.clone())
            .map_err(|e| Unscored(format!("the reference answer holds no instructions: {e}")))?;
        let all = answer.instruction_id_list.len();
        if all == 0 {
            return Err(Unscored("the list of instructions is empty".into()));
        }
        let text = after_thinking(tail(input.text));
        let (nothing, mut missed) = (Map::new(), Vec::new());
        for (i, id) in answer.instruction_id_list.iter().enumerate() {
            let args = Args { id, given: answer.kwargs.get(i).unwrap_or(&nothing) };
            if text.trim().is_empty() || !followed(id, &args, text).map_err(Unscored)? {
                missed.push(id.as_str());
            }
        }
        let share = (all - missed.len()) as f32 / all as f32;
        let value = if self.partial { share } else { f32::from(u8::from(missed.is_empty())) };
        let detail = (!missed.is_empty()).then(|| excerpt(&format!("not followed: {}", missed.join(", "))));
        Ok(Judgement { value, detail, label: None, odds: None })
    }
}

/// Arguments of one instruction.
struct Args<'a> {
    id: &'a str,
    given: &'a Map<String, Value>,
}

impl Args<'_> {
    fn text(&self, key: &str) -> Result<&str, String> {
        self.given
            .get(key)
            .and_then(Value::as_str)
            .ok_or_else(|| format!("{}: {key} must be a text", self.id))
    }

    fn number(&self, key: &str) -> Result<usize, String> {
        let number = self.given.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        number.ok_or_else(|| format!("{}: {key} must be a whole number", self.id))
    }

    fn list(&self, key: &str) -> Result<Vec<&str>, String> {
        let list = self.given.get(key).and_then(Value::as_array);
        let list = list.ok_or_else(|| format!("{}: {key} must be a list", self.id))?;
        list.iter().map(|v| v.as_str().ok_or_else(|| format!("{}: {key} must hold texts", self.id))).collect()
    }

    /// Whether a count stands in the wanted relation.
    fn compares(&self, count: usize, number: &str, relation: &str) -> Result<bool, String> {
        let limit = self.number(number)?;
        match self.text(relation)? {
            "less than" => Ok(count < limit),
            "at least" => Ok(count >= limit),
            other => {
                Err(format!("{}: {relation} is {other:?}, must be \"less than\" or \"at least\"", self.id))
            }
        }
    }
}

fn pattern(text: &str) -> Result<Regex, String> {
    RegexBuilder::new(text)
        .multi_line(true)
        .case_insensitive(true)
        .size_limit(1 << 20)
        .build()
        .map_err(|e| format!("{text:?} does not compile: {e}"))
}

/// Occurrences of a keyword anywhere, without regard to case.
fn occurrences(text: &str, keyword: &str) -> Result<usize, String> {
    Ok(pattern(&regex::escape(keyword))?.find_iter(text).count())
}

fn count(text: &str, regex: &str) -> Result<usize, String> {
    Ok(pattern(regex)?.find_iter(text).count())
}

fn followed(id: &str, args: &Args<'_>, text: &str) -> Result<bool, String> {
    let trimmed = text.trim();
    Ok(match id {
        "keywords:existence" => {
            let mut all = true;
            for keyword in args.list("keywords")? {
                all &= occurrences(text, keyword)? > 0;
            }
            all
        }
        "keywords:frequency" => {
            args.compares(occurrences(text, args.text("keyword")?)?, "frequency", "relation")?
        }
        "keywords:forbidden_words" => {
            let mut none = true;
            for word in args.list("forbidden_words")? {
                none &= count(text, &format!(r"\b{}\b", regex::escape(word)))? == 0;
            }
            none
        }
        "keywords:letter_frequency" => {
            let letter = args.text("letter")?.to_lowercase();
            args.compares(text.to_lowercase().matches(&letter).count(), "let_frequency", "let_relation")?
        }
        "length_constraints:number_sentences" => {
            let sentences = count(trimmed, r"[.!?]+(?:\s|$)|[^.!?\s][^.!?]*\z")?;
            args.compares(sentences, "num_sentences", "relation")?
        }
        "length_constraints:number_words" => args.compares(count(text, r"\w+")?, "num_words", "relation")?,
        "length_constraints:number_paragraphs" => {
            separated(&pattern(r"\s?\*\*\*\s?")?, text) == Some(args.number("num_paragraphs")?)
        }
        "length_constraints:nth_paragraph_first_word" => nth_paragraph(args, text)?,
        "detectable_content:number_placeholders" => {
            count(text, r"\[[^\n]*?\]")? >= args.number("num_placeholders")?
        }
        "detectable_content:postscript" => {
            let marker = args.text("postscript_marker")?;
            let regex = match marker {
                "P.P.S" => r"\s*p\.\s?p\.\s?s.*$".to_owned(),
                "P.S." => r"\s*p\.\s?s\..*$".to_owned(),
                marker => format!(r"\s*{}.*$", regex::escape(marker)),
            };
            count(text, &regex)? > 0
        }
        "detectable_format:number_bullet_lists" => {
            let bullets = count(text, r"^[ \t]*\*[^*\n].*$")? + count(text, r"^[ \t]*-.*$")?;
            bullets == args.number("num_bullets")?
        }
        "detectable_format:constrained_response" => {
            ["My answer is yes.", "My answer is no.", "My answer is maybe."]
                .iter()
                .any(|answer| trimmed.contains(answer))
        }
        "detectable_format:number_highlighted_sections" => {
            count(text, r"\*{1,2}[^\n*]*[^\n*\s][^\n*]*\*{1,2}")? >= args.number("num_highlights")?
        }
        "detectable_format:multiple_sections" => {
            let sections = format!(r"\s?{}\s?\d+\s?", regex::escape(args.text("section_spliter")?));
            count(text, &sections)? >= args.number("num_sections")?
        }
        "detectable_format:json_format" => {
            let inside = trimmed.strip_prefix("```").map_or(trimmed, |rest| {
                let rest = rest.strip_suffix("```").unwrap_or(rest);
                let rest = rest.strip_prefix("json").or_else(|| rest.strip_prefix("JSON")).unwrap_or(rest);
                rest.strip_prefix("Json").unwrap_or(rest)
            });
            serde_json::from_str::<serde::de::IgnoredAny>(inside.trim()).is_ok()
        }
        "detectable_format:title" => count(text, r"<<[^\n<>]*[^\n<>\s][^\n<>]*>>")? > 0,
        "combination:two_responses" => {
            let parts: Vec<&str> = text.split("******").collect();
            let inner = parts.len().saturating_sub(1);
            let empty_inside =
                parts.iter().enumerate().any(|(i, part)| part.trim().is_empty() && i > 0 && i < inner);
            let said: Vec<&str> =
                parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty()).collect();
            !empty_inside && said.len() == 2 && said[0] != said[1]
        }
        "combination:repeat_prompt" => {
            trimmed.to_lowercase().starts_with(&args.text("prompt_to_repeat")?.trim().to_lowercase())
        }
        "startend:end_checker" => {
            let end = args.text("end_phrase")?.trim().to_lowercase();
            trimmed.trim_matches('"').to_lowercase().ends_with(&end)
        }
        "startend:quotation" => trimmed.len() > 1 && trimmed.starts_with('"') && trimmed.ends_with('"'),
        "change_case:english_capital" => {
            text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)
        }
        "change_case:english_lowercase" => {
            text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)
        }
        "change_case:capital_word_frequency" => {
            let capital =
                |word: &str| word.chars().any(char::is_uppercase) && !word.chars().any(char::is_lowercase);
            let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| capital(word)).count();
            args.compares(words, "capital_frequency", "capital_relation")?
        }
        "punctuation:no_comma" => !text.contains(','),
        _ => return Err(format!("the instruction {id:?} is not known here")),
    })
}

/// Parts between separators; `None` if one inside is empty. Empty ones at the ends do not count.
fn separated(separator: &Regex, text: &str) -> Option<usize> {
    let parts: Vec<&str> = separator.split(text).collect();
    let last = parts.len() - 1;
    let empty = |i: usize| parts[i].trim().is_empty();
    if (1..last).any(empty) {
        return None;
    }
    Some((0..parts.len()).filter(|i| !empty(*i)).count())
}

fn nth_paragraph(args: &Args<'_>, text: &str) -> Result<bool, String> {
    let (number, nth) = (args.number("num_paragraphs")?, args.number("nth_paragraph")?);
    let paragraphs: Vec<&str> = text.split("\n\n").collect();
    if nth == 0
        || nth > paragraphs.len()
        || paragraphs.iter().filter(|p| !p.trim().is_empty()).count() != number
    {
        return Ok(false);
    }
    let Some(word) = paragraphs[nth - 1].split_whitespace().next() else { return Ok(false) };
    let word = word.trim_start_matches(['\'', '"']);
    let word = word.split(['.', ',', '?', '!', '\'', '"']).next().unwrap_or("");
    Ok(word.to_lowercase() == args.text("first_word")?.to_lowercase())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::verifiers::tests::verdict;

    fn holds(id: &str, kwargs: Value, text: &str) -> Option<f32> {
        let answer = json!({"instruction_id_list": [id], "kwargs": [kwargs]});
        verdict(&Instructions { partial: false }, &answer, text)
    }

    #[test]
    fn every_instruction_is_told_followed_from_not() {
        for (id, kwargs, good, bad) in [
            ("keywords:existence", json!({"keywords": ["sun", "Moon"]}), "the moon and the Sun", "the moon"),
            (
                "keywords:frequency",
                json!({"keyword": "a", "frequency": 2, "relation": "at least"}),
                "a b A",
                "a b",
            ),
            ("keywords:forbidden_words", json!({"forbidden_words": ["bad"]}), "badly", "so Bad!"),
            (
                "keywords:letter_frequency",
                json!({"letter": "e", "let_frequency": 2, "let_relation": "less than"}),
                "he",
                "Eek",
            ),
            (
                "length_constraints:number_sentences",
                json!({"num_sentences": 2, "relation": "at least"}),
                "One. Two is 2.5 long",
                "One is 1.5.",
            ),
            (
                "length_constraints:number_words",
                json!({"num_words": 3, "relation": "less than"}),
                "one two",
                "one two three",
            ),
            (
                "length_constraints:number_paragraphs",
                json!({"num_paragraphs": 2}),
                "a\n***\nb",
                "a\n***\n\n***\nb",
            ),
            (
                "length_constraints:nth_paragraph_first_word",
                json!({"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "hello"}),
                "a\n\n\"Hello, you",
                "hello\n\nyou",
            ),
            (
                "detectable_content:number_placeholders",
                json!({"num_placeholders": 2}),
                "[a] and [b]",
                "[a] b",
            ),
            ("detectable_content:postscript", json!({"postscript_marker": "P.S."}), "x\nP. S. y", "x PS y"),
            ("detectable_format:number_bullet_lists", json!({"num_bullets": 2}), "* a\n- b", "* a\n**b**"),
            ("detectable_format:constrained_response", json!({}), "My answer is no.", "No."),
            (
                "detectable_format:number_highlighted_sections",
                json!({"num_highlights": 2}),
                "*a* and **b**",
                "*a* and * *",
            ),
            (
                "detectable_format:multiple_sections",
                json!({"section_spliter": "Section", "num_sections": 2}),
                "Section 1 a\nSection 2 b",
                "Section 1",
            ),
            ("detectable_format:json_format", json!({}), "```json\n{\"a\": 1}\n```", "{a: 1}"),
            ("detectable_format:title", json!({}), "<<A title>>\ntext", "<< >> text"),
            ("combination:two_responses", json!({}), "a\n******\nb", "a ****** a"),
            ("combination:repeat_prompt", json!({"prompt_to_repeat": "Say it"}), "say it. Done", "Done"),
            (
                "startend:end_checker",
                json!({"end_phrase": "The end."}),
                "so. \"the END.\"",
                "The end. Or not",
            ),
            ("startend:quotation", json!({}), " \"x\" ", "\"x"),
            ("change_case:english_capital", json!({}), "ABC 1", "ABc"),
            ("change_case:english_lowercase", json!({}), "abc 1", "Abc"),
            (
                "change_case:capital_word_frequency",
                json!({"capital_frequency": 2, "capital_relation": "at least"}),
                "AB c DE",
                "AB Cd",
            ),
            ("punctuation:no_comma", json!({}), "a b", "a, b"),
        ] {
            assert_eq!(holds(id, kwargs.clone(), good), Some(1.0), "{id}: {good:?}");
            assert_eq!(holds(id, kwargs.clone(), bad), Some(0.0), "{id}: {bad:?}");
            assert_eq!(holds(id, kwargs, ""), Some(0.0), "{id}: nothing");
        }
    }

    #[test]
    fn unknown_instructions_and_missing_arguments_are_unscored() {
        assert_eq!(holds("language:response_language", json!({"language": "de"}), "x"), None);
        assert_eq!(
            holds(
                "keywords:frequency",
                json!({"keyword": "a", "frequency": null, "relation": "at least"}),
                "x"
            ),
            None
        );
        assert_eq!(
            holds("keywords:frequency", json!({"keyword": "a", "frequency": 1, "relation": "about"}), "x"),
            None
        );
    }

    #[test]
    fn the_share_is_the_value_where_it_is_asked_for() {
        let answer = json!({"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]});
        assert_eq!(verdict(&Instructions { partial: true }, &answer, "a b"), Some(0.5));
        assert_eq!(verdict(&Instructions { partial: false }, &answer, "a b"), Some(0.0));
    }
}
