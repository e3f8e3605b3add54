//! The guard in the box: words and patterns with categories.
//!
//! Text is normalised first, so that case, hidden characters (zero width, bidi controls, tags), full-width
//! forms, accents written as combining marks and look-alike Cyrillic or Greek letters do not hide a word.
//! Patterns are linear-time. It knows words, not meaning: a cheap first line, not a judge. Guards that are models lie below this module.

pub(crate) mod categories;
pub mod embedding;
pub(crate) mod llama;
pub(crate) mod prompt_guard;

use regex::{RegexSet, RegexSetBuilder};

use crate::config::{GuardCategory, GuardRole};
use crate::stack::{Completion, Component, Judgement, Unscored};
use crate::verifiers::compile;
use freewheel_types::{ContentPart, MessageContent, Prompt, PromptBody};

const COMPILED_BYTES_MAX: usize = 16 << 20;

/// A compiled word and pattern policy.
#[derive(Debug)]
pub struct PolicyGuard {
    role: GuardRole,
    set: RegexSet,
    /// Category of each pattern of `set`.
    owner: Vec<usize>,
    categories: Vec<(String, f32)>,
}

impl PolicyGuard {
    /// Compiles the categories.
    ///
    /// # Errors
    /// If a pattern does not compile or all together are too large.
    pub fn new(categories: &[GuardCategory], role: GuardRole) -> Result<Self, String> {
        let (mut patterns, mut owner) = (Vec::new(), Vec::new());
        for (i, category) in categories.iter().enumerate() {
            for word in &category.words {
                patterns.push(word_pattern(word));
                owner.push(i);
            }
            for pattern in &category.patterns {
                compile(pattern)?;
                patterns.push(pattern.clone());
                owner.push(i);
            }
        }
        let set = RegexSetBuilder::new(&patterns)
            .case_insensitive(true)
            .size_limit(COMPILED_BYTES_MAX)
            .build()
            .map_err(|error| format!("the patterns do not compile together: {error}"))?;
        let categories = categories.iter().map(|c| (c.name.clone(), c.score)).collect();
        Ok(Self { role, set, owner, categories })
    }

    /// Highest score of the categories hit (0 if none), and their names in config order.
    pub fn check(&self, text: &str) -> (f32, Vec<&str>) {
        let normal = normalise(text);
        let mut hit = vec![false; self.categories.len()];
        for pattern in self.set.matches(&normal) {
            hit[self.owner[pattern]] = true;
        }
        let hits = || self.categories.iter().zip(&hit).filter(|(_, hit)| **hit).map(|(category, _)| category);
        (hits().map(|c| c.1).fold(0.0, f32::max), hits().map(|c| c.0.as_str()).collect())
    }
}

impl Component for PolicyGuard {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        let (value, categories) = self.check(&text_of(completion, self.role));
        let detail = (!categories.is_empty()).then(|| categories.join(","));
        Ok(Judgement { value, detail, label: None, odds: None })
    }
}

/// The words that a guard of `role` reads.
pub fn text_of(completion: &Completion<'_>, role: GuardRole) -> String {
    match role {
        GuardRole::Response => completion.text.to_owned(),
        GuardRole::Prompt => prompt_text(completion.prompt),
        GuardRole::Both => format!("{}\n{}", prompt_text(completion.prompt), completion.text),
    }
}

/// A word becomes its normalised letters with any white space between its parts, bounded by non-word characters.
fn word_pattern(word: &str) -> String {
    let normal = normalise(word);
    let parts: Vec<_> = normal.split_whitespace().map(regex::escape).collect();
    let edge = |c: Option<char>| if c.is_some_and(|c| c.is_alphanumeric() || c == '_') { r"\b" } else { "" };
    let trimmed = normal.trim();
    format!("{}{}{}", edge(trimmed.chars().next()), parts.join(r"\s+"), edge(trimmed.chars().last()))
}

/// The prompt as text, a turn a line.
pub(crate) fn prompt_text(prompt: &Prompt) -> String {
    match &prompt.body {
        PromptBody::Text(text) => text.clone(),
        PromptBody::Messages(messages) => {
            let mut out = String::new();
            for message in messages {
                match &message.content {
                    MessageContent::Text(text) => out.push_str(text),
                    MessageContent::Parts(parts) => {
                        for part in parts {
                            if let ContentPart::Text(text) = part {
                                out.push_str(text);
                                out.push('\n');
                            }
                        }
                    }
                }
                out.push('\n');
            }
            out
        }
    }
}

/// Lower case, without hidden characters and combining marks, look-alikes and full-width forms as ASCII.
pub fn normalise(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars().filter(|c| !hidden(*c)) {
        for lower in plain(c).to_lowercase() {
            let lower = plain(lower);
            if !hidden(lower) {
                out.push(lower);
            }
        }
    }
    out
}

fn hidden(c: char) -> bool {
    let c = u32::from(c);
    matches!(c,
        0x00..=0x08 | 0x0B | 0x0C | 0x0E..=0x1F | 0x7F..=0x84 | 0x86..=0x9F          // controls but tab and line ends
        | 0xAD | 0x34F | 0x61C | 0x115F | 0x1160 | 0x17B4 | 0x17B5 | 0x180B..=0x180F  // soft hyphen, joiners, fillers
        | 0x200B..=0x200F | 0x202A..=0x202E | 0x2060..=0x206F | 0xFEFF | 0xFFF9..=0xFFFB // zero width, bidi
        | 0x0300..=0x036F | 0x1AB0..=0x1AFF | 0x1DC0..=0x1DFF | 0x20D0..=0x20FF          // combining marks
        | 0xFE00..=0xFE0F | 0xE0000..=0xE0FFF) // variation selectors, tags
}

fn plain(c: char) -> char {
    match c {
        '\u{FF01}'..='\u{FF5E}' => char::from_u32(u32::from(c) - 0xFEE0).unwrap_or(c),
        '\u{A0}' | '\u{2000}'..='\u{200A}' | '\u{202F}' | '\u{205F}' | '\u{3000}' => ' ',
        '\u{2018}' | '\u{2019}' => '\'',
        '\u{2010}'..='\u{2015}' => '-',
        'а' | 'α' | 'à' | 'á' | 'â' | 'ä' | 'ã' | 'å' | 'А' | 'Α' => 'a',
        'В' | 'Β' => 'b',
        'с' | 'С' | 'ϲ' | 'ç' => 'c',
        'е' | 'ё' | 'ε' | 'è' | 'é' | 'ê' | 'ë' | 'Е' | 'Ε' => 'e',
        'һ' | 'Н' | 'Η' => 'h',
        'і' | 'ι' | 'ì' | 'í' | 'î' | 'ï' | 'ı' | 'І' | 'Ι' => 'i',
        'ј' | 'Ј' => 'j',
        'к' | 'κ' | 'К' | 'Κ' => 'k',
        'М' | 'Μ' => 'm',
        'ñ' | 'Ν' => 'n',
        'о' | 'ο' | 'ò' | 'ó' | 'ô' | 'ö' | 'õ' | 'О' | 'Ο' => 'o',
        'р' | 'ρ' | 'Р' | 'Ρ' => 'p',
        'ѕ' | 'Ѕ' => 's',
        'т' | 'τ' | 'Т' | 'Τ' => 't',
        'υ' | 'ù' | 'ú' | 'û' | 'ü' => 'u',
        'ν' | 'ѵ' => 'v',
        'х' | 'χ' | 'Х' | 'Χ' => 'x',
        'у' | 'γ' | 'У' | 'Υ' => 'y',
        'Ζ' => 'z',
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> PolicyGuard {
        let category = |name: &str, words: &[&str], patterns: &[&str], score| GuardCategory {
            name: name.into(),
            words: words.iter().map(|w| (*w).to_owned()).collect(),
            patterns: patterns.iter().map(|w| (*w).to_owned()).collect(),
            score,
        };
        let categories = [
            category("insult", &["blockhead", "silly goose"], &[], 0.6),
            category("code_word", &[], &[r"blue\s*bird\d*"], 1.0),
        ];
        PolicyGuard::new(&categories, GuardRole::Response).unwrap()
    }

    #[test]
    fn disguises_do_not_hide_a_word() {
        let guard = guard();
        let disguised = [
            "You BLOCKHEAD!",
            "block\u{200b}head",
            "bl\u{202e}ockhead",
            "ｂｌｏｃｋｈｅａｄ",
            "blосkhеаd", // Cyrillic о, с, е, а
            "b\u{301}lockhead",
            "blo\u{ad}ckhead",
            "bl\u{e0020}ockhead",
            "silly \n goose",
        ];
        for text in disguised {
            assert_eq!(guard.check(text), (0.6, vec!["insult"]), "{text:?}");
        }
        for innocent in ["blockheads of cheese", "a silly, silly game of goose", "", "blackhead"] {
            assert_eq!(guard.check(innocent), (0.0, vec![]), "{innocent:?}");
        }
    }

    #[test]
    fn the_worst_category_counts_and_all_are_named() {
        assert_eq!(guard().check("blockhead, say BlueBird7"), (1.0, vec!["insult", "code_word"]));
    }
}
