//! Segments of text as encoders read them: `[CLS] first [SEP]`, or `[CLS] first [SEP] second [SEP]` with token types.

use super::Tokenizer;
use crate::error::ModelError;

/// One or two segments between the special tokens that the tokenizer puts around them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Framed {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Segment of every token, as the tokenizer counts them.
    pub token_types: Vec<u32>,
}

impl Tokenizer {
    /// Puts the special tokens of the post-processor around one segment, or two, of plain ids ([`Tokenizer::encode`]).
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn frame(&self, first: &[u32], second: Option<&[u32]>) -> Result<Framed, ModelError> {
        let failed = |e: tokenizers::Error| ModelError::Tokenizer(e.to_string());
        // Any text will do: what is around the segments does not depend on what is in them.
        let sample = match second {
            None => self.interpreting.encode("a", true),
            Some(_) => self.interpreting.encode(("a", "a"), true),
        }
        .map_err(failed)?;
        let segments = [first, second.unwrap_or_default()];
        let (mut framed, mut placed) = (Framed::default(), None);
        let tokens = sample.get_ids().iter().zip(sample.get_type_ids()).zip(sample.get_sequence_ids());
        for ((&id, &kind), sequence) in tokens {
            match sequence {
                None => framed.push(&[id], kind),
                Some(sequence) if placed != Some(sequence) => {
                    framed.push(segments.get(sequence).copied().unwrap_or_default(), kind);
                    placed = Some(sequence);
                }
                Some(_) => {}
            }
        }
        Ok(framed)
    }
}

impl Framed {
    fn push(&mut self, ids: &[u32], kind: u32) {
        self.ids.extend_from_slice(ids);
        self.token_types.resize(self.ids.len(), kind);
    }
}
