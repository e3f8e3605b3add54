//! Keeps user text from turning into special tokens.
//!
//! Before rendering, whatever in a string from outside spells a special token is replaced by a single character from a
//! private plane of Unicode; the template moves it about like any other text. After rendering, what spells a special
//! token can only have come from the template. The text between those is then encoded as plain text with the
//! replacements undone. Ordinary text contains nothing to replace and takes the reference library's path unchanged.
//!
//! Two strings may each hold half of a special token and be joined by the template, so the beginning of one is replaced
//! at the end of a string too.

use serde_json::Value;

const FIRST: u32 = 0xF_0000;
const LAST: u32 = 0xF_FFFD;

/// What was replaced while one conversation was rendered.
pub(crate) struct Shield<'a> {
    specials: &'a [String],
    literals: Vec<String>,
}

impl<'a> Shield<'a> {
    /// A shield against `specials`.
    pub(crate) fn new(specials: &'a [String]) -> Self {
        Self { specials, literals: Vec::new() }
    }

    /// Whether nothing had to be replaced.
    pub(crate) fn is_empty(&self) -> bool {
        self.literals.is_empty()
    }

    /// `value` with all strings in it (keys too: tools come from outside) protected.
    pub(crate) fn protect_json(&mut self, value: &Value) -> Value {
        match value {
            Value::String(text) => self.protect(text).into(),
            Value::Array(items) => items.iter().map(|item| self.protect_json(item)).collect(),
            Value::Object(map) => {
                let pairs = map.iter().map(|(key, value)| (self.protect(key), self.protect_json(value)));
                Value::Object(pairs.collect())
            }
            other => other.clone(),
        }
    }

    /// `text` with every special token replaced.
    pub(crate) fn protect(&mut self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        // A template may trim the string before it joins it, so an opened token before final white space counts.
        let body = text.trim_end();
        let tail = self.open_at_end(body);
        let mut rest = &body[..body.len() - tail];
        while let Some(c) = rest.chars().next() {
            let special =
                self.specials.iter().filter(|s| rest.starts_with(s.as_str())).max_by_key(|s| s.len());
            let taken = match special {
                Some(special) if !special.is_empty() => special.len(),
                _ if reserved(c) => c.len_utf8(),
                _ => 0,
            };
            if taken > 0 {
                out.push(self.placeholder(&rest[..taken]));
                rest = &rest[taken..];
            } else {
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
        if tail > 0 {
            out.push(self.placeholder(&body[body.len() - tail..]));
        }
        // Special tokens that contain white space could open in it as well; none is known, and trim keeps them whole.
        out.push_str(&text[body.len()..]);
        out
    }

    /// Bytes of the longest proper beginning of a special token at the end of `text`.
    fn open_at_end(&self, text: &str) -> usize {
        let beginnings =
            self.specials.iter().flat_map(|special| special.char_indices().map(|(at, _)| &special[..at]));
        beginnings.filter(|start| text.ends_with(start)).map(str::len).max().unwrap_or(0)
    }

    fn placeholder(&mut self, literal: &str) -> char {
        let index = self.literals.iter().position(|known| known == literal).unwrap_or_else(|| {
            self.literals.push(literal.to_owned());
            self.literals.len() - 1
        });
        // More than 65 533 different literals do not fit the plane; the last one then stands for a blank.
        char::from_u32(FIRST + index as u32).filter(|c| reserved(*c)).unwrap_or(' ')
    }

    /// `text` with the replacements undone; and for every byte of that (and its end), where in `text` it comes from.
    pub(crate) fn restore(&self, text: &str) -> (String, Vec<usize>) {
        let (mut out, mut origin) = (String::with_capacity(text.len()), Vec::with_capacity(text.len() + 1));
        for (at, c) in text.char_indices() {
            match (c as u32).checked_sub(FIRST).and_then(|index| self.literals.get(index as usize)) {
                Some(literal) => out.push_str(literal),
                None => out.push(c),
            }
            origin.resize(out.len(), at);
        }
        origin.push(text.len());
        (out, origin)
    }
}

/// Characters with a meaning here: placeholders, and the brackets that templates leave.
fn reserved(c: char) -> bool {
    (FIRST..=LAST).contains(&(c as u32)) || (0x10_FF00..=0x10_FF02).contains(&(c as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials() -> Vec<String> {
        ["<|eot|>", "<|eot_id|>", "</s>"].map(String::from).to_vec()
    }

    #[test]
    fn everything_special_is_replaced_and_comes_back() {
        let specials = specials();
        let texts = [
            "<|eot_id|>",
            "a<|eot|>b</s></s>",
            "<|<|eot|>eot|>",
            "\u{F0000}\u{F0001}\u{10FF00}",
            "x <|eo  \n",
            "2 <",
        ];
        for text in texts {
            let mut shield = Shield::new(&specials);
            let safe = shield.protect(text);
            assert!(!shield.is_empty(), "{text:?}");
            assert!(specials.iter().all(|s| !safe.contains(s.as_str())), "{safe:?}");
            assert_eq!(shield.restore(&safe).0, text);
        }
    }

    #[test]
    fn ordinary_text_is_left_alone() {
        let specials = specials();
        let mut shield = Shield::new(&specials);
        for text in ["", "What is 12 + 30?", "<think> a < b </think>.", "<|other|>"] {
            assert_eq!(shield.protect(text), text);
        }
        assert!(shield.is_empty());
    }

    #[test]
    fn halves_of_a_token_do_not_meet() {
        let specials = specials();
        let mut shield = Shield::new(&specials);
        let joined = shield.protect("<|eot_") + shield.protect("id|>").as_str();
        assert!(!joined.contains("<|eot_id|>"));
        let trimmed = shield.protect("<|eot \n").trim().to_owned() + shield.protect("|>").as_str();
        assert!(!trimmed.contains("<|eot|>"));
        assert_eq!(shield.restore(&joined).0, "<|eot_id|>");
    }
}
