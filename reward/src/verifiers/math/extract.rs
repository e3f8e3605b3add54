//! Where in a completion the answer is.
//!
//! First that applies: the last `\boxed{…}`; what follows the last `####`; what follows the last "answer is";
//! the whole text if it is an answer; its last formula; the last expression among its words. One answer only:
//! an earlier one does not count. A `\boxed{` that never closes is no answer.

use std::sync::LazyLock;

use regex::Regex;

use super::expr::{Expr, parse};
use super::lexer::{Reading, matching_brace};
use super::units;

/// What is taken to be the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Its text.
    pub(crate) text: String,
    /// Whether it was marked as a formula, so that letters are variables.
    pub(crate) formula: bool,
    /// The letter of a choice that starts the text it was found in: `B) 42`.
    pub(crate) choice: Option<char>,
}

/// Words that may stand around an expression in prose.
const WINDOW_WORDS: usize = 16;

static ANCHOR: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)\b(?:answer|result|solution)\b[\s*_]*(?:is|are|:|=|：)+(?:\s+(?:equal to|simply|just)\b)?[\s*:_]*").expect("a fixed pattern")
});

/// The answer of a completion; `None` if there is none.
pub(crate) fn answer(completion: &str) -> Option<Candidate> {
    match last_boxed(completion) {
        Boxed::Whole(inner) => return formula(&inner),
        Boxed::Unclosed => return None,
        Boxed::None => {}
    }
    if let Some(at) = completion.rfind("####") {
        let line = completion[at + 4..].trim_start().lines().next().unwrap_or("");
        return segment(line, true);
    }
    if let Some(anchor) = ANCHOR.find_iter(completion).last() {
        let after = sentence(&completion[anchor.end()..]);
        if let Some(found) = segment(after, true) {
            return Some(found);
        }
    }
    segment(completion, false)
}

/// The reference answer: like an answer, but what is written is all of it.
pub(crate) fn reference(gold: &str) -> Option<Candidate> {
    match last_boxed(gold) {
        Boxed::Whole(inner) => formula(&inner),
        Boxed::Unclosed => None,
        Boxed::None => match gold.rfind("####") {
            Some(at) => plain(&gold[at + 4..]),
            None if formulas(gold).len() == 1 && outside(gold).trim().is_empty() => {
                formula(&formulas(gold)[0])
            }
            None => {
                let is_formula = gold.contains('\\') || gold.contains('$');
                plain(gold).map(|c| Candidate { formula: is_formula, text: undelimited(&c.text), ..c })
            }
        },
    }
}

fn formula(text: &str) -> Option<Candidate> {
    let text = undelimited(text).trim().to_owned();
    (!text.is_empty()).then_some(Candidate { text, formula: true, choice: None })
}

fn plain(text: &str) -> Option<Candidate> {
    let text = tidy(text).to_owned();
    (!text.is_empty()).then_some(Candidate { text, formula: false, choice: None })
}

/// Without emphasis marks and the stop at the end.
fn tidy(text: &str) -> &str {
    text.trim()
        .trim_matches(['*', '`', '"', '“', '”'])
        .trim()
        .trim_end_matches(['.', ',', ';', ':'])
        .trim_matches(['*', '`', '"'])
        .trim()
}

enum Boxed {
    None,
    Unclosed,
    Whole(String),
}

/// The last `\boxed` or `\fbox` that is not inside another.
fn last_boxed(text: &str) -> Boxed {
    let start =
        ["\\boxed", "\\fbox"].iter().filter_map(|name| text.rfind(name).map(|at| (at, name.len()))).max();
    let Some((at, len)) = start else { return Boxed::None };
    let rest = text[at + len..].trim_start();
    let chars: Vec<char> = rest.chars().collect();
    if chars.first() != Some(&'{') {
        // `\boxed 5`
        let word: String =
            chars.into_iter().take_while(|c| c.is_alphanumeric() || *c == '.' || *c == '-').collect();
        return if word.is_empty() { Boxed::Unclosed } else { Boxed::Whole(word) };
    }
    match matching_brace(&chars) {
        Some(close) => Boxed::Whole(chars[1..close].iter().collect()),
        None => Boxed::Unclosed,
    }
}

/// Up to the end of the sentence or line.
fn sentence(text: &str) -> &str {
    let text = text.trim_start();
    let mut end = text.len();
    if let Some(at) = text.find('\n') {
        // A display formula may start on the next line.
        let line = text[..at].trim();
        end = if line.is_empty() || line == "$$" || line == "\\[" { text.len() } else { at };
    }
    for mark in [". ", "! ", "? "] {
        if let Some(at) = text[..end].find(mark) {
            end = end.min(at);
        }
    }
    &text[..end]
}

/// The answer within a piece of text: the first one after an anchor, else the last.
fn segment(text: &str, anchored: bool) -> Option<Candidate> {
    let text = tidy(text);
    let choice = super::text::choice(text.lines().next().unwrap_or(""));
    expression(text, anchored).map(|found| Candidate { choice, ..found })
}

fn expression(text: &str, anchored: bool) -> Option<Candidate> {
    if text.is_empty() {
        return None;
    }
    let found = formulas(text);
    if let (Some(first), Some(last)) = (found.first(), found.last()) {
        let whole = undelimited(text);
        if found.len() == 1 && outside(text).trim_matches([' ', '.', ',', '\n']).is_empty() {
            return formula(first);
        }
        if readable(&whole, false) || units::split(&whole).is_some_and(|(value, _)| readable(value, false)) {
            return formula(&whole);
        }
        return formula(if anchored { first } else { last });
    }
    if readable(text, false) || units::split(text).is_some_and(|(value, _)| readable(value, false)) {
        return plain(text);
    }
    if text.contains('\\') && readable(text, true) {
        return formula(text);
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    among(&words, anchored).or_else(|| plain(text))
}

fn readable(text: &str, formula: bool) -> bool {
    parse(text, Reading { formula, thousands: true }).is_some()
}

/// The contents of `$…$`, `$$…$$`, `\(…\)` and `\[…\]`.
fn formulas(text: &str) -> Vec<String> {
    ranges(text).into_iter().map(|(from, to, _)| text[from..to].to_owned()).collect()
}

/// What is not inside a formula.
fn outside(text: &str) -> String {
    let mut out = String::new();
    let mut at = 0;
    for (from, to, mark) in ranges(text) {
        out.push_str(&text[at..from - mark]);
        out.push(' ');
        at = to + mark;
    }
    out.push_str(&text[at..]);
    out
}

/// (start, end, length of the delimiter) of each formula.
fn ranges(text: &str) -> Vec<(usize, usize, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(offset) = text[at..].find(['$', '\\']) {
        let open = at + offset;
        let rest = &text[open..];
        let (mark, close) = if rest.starts_with("$$") {
            (2, "$$")
        } else if rest.starts_with("\\(") {
            (2, "\\)")
        } else if rest.starts_with("\\[") {
            (2, "\\]")
        } else if rest.starts_with('$') {
            (1, "$")
        } else {
            at = open + 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
            continue;
        };
        let Some(len) = find_unescaped(&rest[mark..], close) else { return found };
        found.push((open + mark, open + mark + len, mark));
        at = open + mark + len + mark;
    }
    found
}

fn find_unescaped(text: &str, close: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        let offset = text[at..].find(close)?;
        let escaped = close.starts_with('$') && text[..at + offset].ends_with('\\');
        if !escaped {
            return Some(at + offset);
        }
        at += offset + close.len();
    }
}

/// Without formula delimiters; two spaces in their place, so that numbers do not run together.
fn undelimited(text: &str) -> String {
    let mut out = text.to_owned();
    for mark in ["\\(", "\\)", "\\[", "\\]"] {
        out = out.replace(mark, "  ");
    }
    out.replace("\\$", "  ").replace('$', "  ")
}

/// Whether no word stands among the items: "sixths, 5/6" is not a list.
fn wordless(expr: &Expr) -> bool {
    match expr {
        Expr::Text(_) => false,
        Expr::List(items) | Expr::Relation(items, _) => items.iter().all(wordless),
        _ => true,
    }
}

/// The first or last longest run of words that is an expression and holds a digit or a sign of mathematics.
fn among(words: &[&str], first: bool) -> Option<Candidate> {
    let clean = |word: &str| tidy(word).trim_end_matches(['!', '?', ')']).to_owned();
    let telling = |word: &&str| word.chars().any(|c| c.is_numeric() || "π√∞½¼¾".contains(c));
    let anchor = if first { words.iter().position(telling) } else { words.iter().rposition(telling) }?;
    let run = |from: usize, to: usize| {
        let mut text = words[from..to].join(" ");
        text.push(' ');
        text.push_str(&clean(words[to]));
        text.trim().to_owned()
    };
    let fits = |from: usize, to: usize| {
        parse(&run(from, to), Reading { formula: false, thousands: true }).is_some_and(|expr| wordless(&expr))
    };
    let low = anchor.saturating_sub(WINDOW_WORDS);
    let high = (anchor + WINDOW_WORDS).min(words.len() - 1);
    let mut best: Option<(usize, usize)> = None;
    for from in low..=anchor {
        for to in anchor..=if first { high } else { anchor } {
            let longer = best.is_none_or(|(f, t)| to - from > t - f);
            if longer && fits(from, to) {
                best = Some((from, to));
            }
        }
    }
    let (from, to) = best?;
    let mut text = run(from, to);
    if words.get(to + 1).is_some_and(|w| clean(w).eq_ignore_ascii_case("percent")) {
        text.push('%');
    }
    Some(Candidate { text, formula: false, choice: None })
}
