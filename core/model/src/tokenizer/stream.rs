//! Ids → text, one id at a time: a character that is spread over several tokens comes out whole.

use std::sync::Arc;

/// Turns ids into text as they come; bytes of an unfinished character wait for the rest of it.
pub struct DecodeStream {
    tokenizer: Arc<tokenizers::Tokenizer>,
    ids: Vec<u32>,
    /// `ids[..sent]` only gives context; `ids[sent..read]` is text that was handed out.
    sent: usize,
    read: usize,
}

impl std::fmt::Debug for DecodeStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecodeStream").field("ids", &self.ids).finish_non_exhaustive()
    }
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Arc<tokenizers::Tokenizer>) -> Self {
        Self { tokenizer, ids: Vec::new(), sent: 0, read: 0 }
    }

    /// Takes one id; returns the text that is certain now, if there is any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.ids.push(id);
        self.advance(false)
    }

    /// What is left at the end, incomplete characters as U+FFFD.
    pub fn finish(mut self) -> Option<String> {
        self.advance(true)
    }

    fn advance(&mut self, last: bool) -> Option<String> {
        let before = self.tokenizer.decode(&self.ids[self.sent..self.read], true).unwrap_or_default();
        let after = self.tokenizer.decode(&self.ids[self.sent..], true).unwrap_or_default();
        if after.ends_with('\u{FFFD}') && !last {
            return None;
        }
        let new = after.strip_prefix(&before).filter(|new| !new.is_empty())?.to_owned();
        self.ids.drain(..self.read);
        self.sent = 0;
        self.read = self.ids.len();
        Some(new)
    }
}
