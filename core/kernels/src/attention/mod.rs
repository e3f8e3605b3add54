//! Attention over a paged key-value cache, forward and backward, with grouped queries and four masks.
//!
//! ```text
//!   position p of a sequence lives in page  pages[p / 16], lane p % 16
//!   K page: one register holds one dimension (bf16: two) of sixteen keys: scores need no reduction
//!   V page: one register holds sixteen dimensions of a key (bf16: of two)            ([`KvPages`])
//! ```
//!
//! Prefill, decode and training forward are this one call. A query is a row and a head; nothing but itself, the keys that it
//! sees and their positions decide its bits: neither other sequences, nor how a prompt was cut into calls, nor threads.
//!
//! **Order of operations over pages of f32**: key blocks of a page ascending from the first with a visible key; a score is one
//! FMA chain over dimensions, times the scale; the block's largest visible score → running maximum; e^(score − maximum), sums
//! rescaled (Milakov and Gimelshein 2018); the output is an FMA chain over visible keys ascending. Lanes that the mask hides
//! are never read into a result, so a page's unwritten part may hold anything.
//!
//! **Order of operations over pages of bf16**, which tiles follow where there are some, and f32 lanes elsewhere:
//! - Queries, keys and values are rounded to bf16, nearest even; what is smaller than 2^−56 becomes zero.
//! - A score is the product of [`crate::gemm`] in [`crate::Precision::Bf16`] over dimensions, in the machine's order. Of the tile
//!   instruction, in blocks of 32: of each, one FMA chain over the even dimensions from 0, one over the odd, their sum, which is added to
//!   the blocks before. By pairs: one chain, of each pair the odd, then the even. Then times the scale.
//! - Keys are taken in chunks of 64 positions, the first at position 0, ascending. The chunk's largest visible score →
//!   running maximum, from the least f32. A weight is e^(score − maximum) in f32; where it is below e^−38, or the key is hidden, 0.
//! - Sum: that before times e^(old − new maximum), added in one FMA to the chunk's: the weights of its four pages added lane by
//!   lane, then the sixteen lanes as a tree (`Lanes::sum`).
//! - Weights are rounded to bf16. The chunk's output is a product over keys in blocks of 16 (a page), or by pairs, as for scores. The output before
//!   times e^(old − new maximum) is added to it in one FMA.
//! - At the end, the output times 1 / sum; log-sum-exp = maximum + ln(sum).
//!
//! A hidden key adds 0 times its value, so chunks, pages and keys that a query does not see change no bit of it, and queries
//! may share tiles: values in pages must only be finite, which [`kv_write`] sees to. Keys may be anything. By the bound of
//! 2^−56 no product and no sum is subnormal, so it makes no difference that tiles would flush those.

mod backward;
mod forward;
mod pages;
mod rounded;
mod sinks;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod write;

pub use backward::attention_backward;
pub use forward::attention;
pub use pages::{KvPages, KvPagesMut, kv_words};
pub use sinks::{add_sinks, sinks_backward};
pub use write::kv_write;

use std::ops::Range;

/// Positions per page.
pub const KV_BLOCK: usize = 16;

/// Pages of a chunk of keys, over pages of bf16.
const CHUNK_PAGES: usize = 4;

const _: () = assert!(KV_BLOCK == crate::simd::LANES);

/// Which keys a query may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionMask {
    /// All keys up to its own position.
    Causal,
    /// Keys of its own chunk of so many positions (Llama 4): position p sees ⌊p/c⌋·c ..= p.
    Chunked(usize),
    /// The last so many keys, its own included (Mistral): position p sees p−w+1 ..= p.
    Sliding(usize),
    /// Every key of its sequence, later ones included (image encoders). The rows of one call are the whole sequence.
    Bidirectional,
}

impl AttentionMask {
    /// First key that the query at `position` sees.
    ///
    /// # Panics
    /// When a chunk or window is 0.
    pub fn first_visible(self, position: usize) -> usize {
        match self {
            AttentionMask::Causal | AttentionMask::Bidirectional => 0,
            AttentionMask::Chunked(chunk) => {
                assert!(chunk > 0, "an attention chunk holds at least one position");
                position / chunk * chunk
            }
            AttentionMask::Sliding(window) => {
                assert!(window > 0, "an attention window holds at least one position");
                (position + 1).saturating_sub(window)
            }
        }
    }

    /// End of the keys that the query at `position` sees, in a sequence whose rows end at `end`.
    #[inline(always)]
    fn end_visible(self, position: usize, end: usize) -> usize {
        if self == AttentionMask::Bidirectional { end } else { position + 1 }
    }

    /// Lanes of key block `block` that the query at `position` sees, in a sequence whose rows end at `end`.
    #[inline(always)]
    fn visible_lanes(self, position: usize, block: usize, end: usize) -> Range<usize> {
        let start = block * KV_BLOCK;
        let first = self.first_visible(position).clamp(start, start + KV_BLOCK) - start;
        let end = self.end_visible(position, end).clamp(start, start + KV_BLOCK) - start;
        first..end.max(first)
    }
}

/// Sizes of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`; head h reads key-value head h / (heads / kv_heads).
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Dimensions of a query and key head.
    pub head_dim: usize,
    /// Dimensions of a value head, and so of an output head; most models have it equal to `head_dim`.
    pub value_dim: usize,
    /// Factor on scores, usually 1/√head_dim.
    pub scale: f32,
    /// Which keys a query sees.
    pub mask: AttentionMask,
}

impl AttentionShape {
    /// Values of one K page.
    pub fn k_page_len(&self) -> usize {
        self.kv_heads * self.head_dim * KV_BLOCK
    }

    /// Values of one V page.
    pub fn v_page_len(&self) -> usize {
        self.kv_heads * self.value_dim * KV_BLOCK
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn check(&self, seqs: &[AttentionSeq], rows: usize, pages: &KvPages) {
        let AttentionShape { heads, kv_heads, head_dim, value_dim, .. } = *self;
        let sizes = head_dim > 0 && value_dim > 0;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads) && sizes, "attention: {self:?}");
        let (k_len, v_len) = pages.lens();
        let page_count = k_len / self.k_page_len();
        assert_eq!(page_count, v_len / self.v_page_len(), "attention: as many K pages as V pages");
        for seq in seqs {
            assert!(seq.first_row + seq.rows <= rows, "attention: a sequence ends past row {rows}");
            let whole = self.mask != AttentionMask::Bidirectional || seq.position == 0;
            assert!(whole, "attention: a bidirectional sequence is computed whole, from position 0");
            let blocks = (seq.position + seq.rows).div_ceil(KV_BLOCK);
            assert!(seq.pages.len() >= blocks, "attention: {} pages for {blocks} blocks", seq.pages.len());
            let visible = self.mask.first_visible(seq.position) / KV_BLOCK..blocks;
            let pages_exist = seq.pages[visible].iter().all(|&page| (page as usize) < page_count);
            assert!(pages_exist, "attention: a page id past the {page_count} pages");
        }
    }
}

/// One sequence's part of a batch of packed rows.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSeq<'a> {
    /// Row of the batch where it starts.
    pub first_row: usize,
    /// Number of rows, at consecutive positions.
    pub rows: usize,
    /// Position of the first row in the sequence.
    pub position: usize,
    /// Page i holds positions 16·i .. 16·i+16. Pages that the mask hides from every row may be any number.
    pub pages: &'a [u32],
}
