//! Stop strings: text grows token by token, and a stop string may begin in one token and end in another.

use super::backend::TextDecoder;

/// Decodes a growing token sequence and watches for stop strings in its text.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopMatcher {
    text: String,
    /// Tokens before this are settled; decoding starts here so that it costs the same at every token.
    window: usize,
    /// Tokens whose text is in `text`.
    read: usize,
}

impl StopMatcher {
    /// Takes in the text of `ids`, of which only the last is new. Returns the text before the earliest stop string, if
    /// one is complete now.
    ///
    /// Decoding goes over a short window and keeps the difference, because a token's text depends on those before it
    /// (spaces, characters of several tokens). A trailing half character waits for the token that completes it.
    pub(crate) fn push(
        &mut self,
        decoder: &dyn TextDecoder,
        ids: &[u32],
        stops: &[String],
    ) -> Option<String> {
        if stops.is_empty() {
            return None;
        }
        let before = decoder.decode(&ids[self.window..self.read]);
        let after = decoder.decode(&ids[self.window..]);
        if after.len() <= before.len() || after.ends_with('\u{FFFD}') || !after.is_char_boundary(before.len())
        {
            return None;
        }
        let old_len = self.text.len();
        self.text.push_str(&after[before.len()..]);
        self.window = self.read;
        self.read = ids.len();
        stops
            .iter()
            .filter_map(|stop| self.find_from(stop, old_len))
            .min()
            .map(|at| self.text[..at].to_owned())
    }

    /// First place of `stop` that was not complete when the text had `old_len` bytes.
    fn find_from(&self, stop: &str, old_len: usize) -> Option<usize> {
        if stop.is_empty() {
            return None;
        }
        let mut from = (old_len + 1).saturating_sub(stop.len());
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        self.text[from..].find(stop).map(|at| from + at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One byte a token.
    struct Bytes;

    impl TextDecoder for Bytes {
        fn decode(&self, ids: &[u32]) -> String {
            String::from_utf8_lossy(&ids.iter().map(|&id| id as u8).collect::<Vec<_>>()).into_owned()
        }
    }

    fn run(text: &str, stops: &[&str]) -> Option<(usize, String)> {
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut matcher = StopMatcher::default();
        (1..=ids.len()).find_map(|n| matcher.push(&Bytes, &ids[..n], &stops).map(|text| (n, text)))
    }

    #[test]
    fn a_stop_string_is_found_across_tokens_at_its_last_byte() {
        assert_eq!(run("one\n\ntwo", &["\n\n"]), Some((5, "one".to_owned())));
        assert_eq!(run("aab", &["ab"]), Some((3, "a".to_owned())));
        assert_eq!(run("abc", &["x", "d"]), None);
    }

    #[test]
    fn characters_of_several_tokens_are_waited_for() {
        assert_eq!(run("grüß dich", &["ß"]), Some((6, "grü".to_owned())));
        assert_eq!(run("日本語。次", &["。"]), Some((12, "日本語".to_owned())));
    }

    #[test]
    fn the_earliest_of_several_wins() {
        assert_eq!(run("END.", &["D.", "END."]), Some((4, String::new())));
    }
}
