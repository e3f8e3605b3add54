//! What pages hold: keys and values as they were computed, or rounded to bf16, as matrix tiles read them.
//!
//! ```text
//!   f32   K page [kv_heads][head_dim][16 keys]             V page [kv_heads][16 keys][value_dim]
//!   bf16  K page [kv_heads][head_dim / 2][16 keys][2]      V page [kv_heads][8 pairs of keys][value_dim][2]
//! ```
//!
//! A word of a bf16 page is two numbers, the first low. Where head_dim is odd, the last dimension's sixteen keys follow by
//! themselves, in eight words.

use super::{AttentionShape, KV_BLOCK};
use crate::Precision;
use crate::convert::bf16_bits;
use crate::simd::{LANES, Lanes};

/// Keys and values of a layer, page after page.
#[derive(Clone, Copy, Debug)]
pub enum KvPages<'a> {
    /// As computed.
    #[expect(missing_docs, reason = "keys and values")]
    F32 { k: &'a [f32], v: &'a [f32] },
    /// Rounded, two to a word. All of `v` must be finite at all times: zeros at first, then what [`super::kv_write`] put.
    #[expect(missing_docs, reason = "keys and values")]
    Bf16 { k: &'a [u32], v: &'a [u32] },
}

/// [`KvPages`] to be written.
#[derive(Debug)]
#[expect(missing_docs, reason = "keys and values")]
pub enum KvPagesMut<'a> {
    F32 { k: &'a mut [f32], v: &'a mut [f32] },
    Bf16 { k: &'a mut [u32], v: &'a mut [u32] },
}

/// Words of memory (f32) that `values` keys or values take in pages of `precision`. Whole pages fill whole words.
pub fn kv_words(precision: Precision, values: usize) -> usize {
    match precision {
        Precision::F32 => values,
        Precision::Bf16 => values.div_ceil(2),
    }
}

impl<'a> KvPages<'a> {
    /// Sees memory, [`kv_words`] long, as pages of `precision`.
    pub fn of(precision: Precision, k: &'a [f32], v: &'a [f32]) -> Self {
        match precision {
            Precision::F32 => Self::F32 { k, v },
            Precision::Bf16 => Self::Bf16 { k: bytemuck::cast_slice(k), v: bytemuck::cast_slice(v) },
        }
    }

    /// Values of all K pages and of all V pages.
    pub(super) fn lens(&self) -> (usize, usize) {
        match self {
            Self::F32 { k, v } => (k.len(), v.len()),
            Self::Bf16 { k, v } => (2 * k.len(), 2 * v.len()),
        }
    }
}

impl<'a> KvPagesMut<'a> {
    /// Sees memory, [`kv_words`] long, as pages of `precision`.
    pub fn of(precision: Precision, k: &'a mut [f32], v: &'a mut [f32]) -> Self {
        match precision {
            Precision::F32 => Self::F32 { k, v },
            Precision::Bf16 => Self::Bf16 { k: bytemuck::cast_slice_mut(k), v: bytemuck::cast_slice_mut(v) },
        }
    }

    /// The same pages to be read.
    pub fn as_ref(&self) -> KvPages<'_> {
        match self {
            Self::F32 { k, v } => KvPages::F32 { k, v },
            Self::Bf16 { k, v } => KvPages::Bf16 { k, v },
        }
    }
}

/// Numbers to an element of a page: a word of bf16 has two.
pub(super) trait Cell {
    const NUMBERS: usize;
}

impl Cell for f32 {
    const NUMBERS: usize = 1;
}

impl Cell for u32 {
    const NUMBERS: usize = 2;
}

impl AttentionShape {
    /// Keys of page `page` of one key-value head.
    #[inline(always)]
    pub(super) fn key_page<'a, C: Cell>(&self, pages: &'a [C], page: u32, kv_head: usize) -> &'a [C] {
        let len = self.head_dim * KV_BLOCK / C::NUMBERS;
        &pages[(page as usize * self.kv_heads + kv_head) * len..][..len]
    }

    /// Values of page `page` of one key-value head.
    #[inline(always)]
    pub(super) fn value_page<'a, C: Cell>(&self, pages: &'a [C], page: u32, kv_head: usize) -> &'a [C] {
        let len = self.value_dim * KV_BLOCK / C::NUMBERS;
        &pages[(page as usize * self.kv_heads + kv_head) * len..][..len]
    }
}

/// What is smaller is taken as zero: 2^−56. A bf16 has eight significant bits, so all products of two that are not
/// smaller, and all their sums, are multiples of 2^−126: none is subnormal, and no processor flushes any to zero.
pub(super) const TINY: f32 = f32::from_bits((127 - 56) << 23);

/// `x` rounded to bf16 (nearest even), below [`TINY`] a zero.
#[inline(always)]
pub(super) fn rounded(x: f32) -> u16 {
    if x.abs() < TINY { 0 } else { bf16_bits(x) }
}

/// [`rounded`], widened again.
#[inline(always)]
pub(super) fn round(x: f32) -> f32 {
    f32::from_bits(u32::from(rounded(x)) << 16)
}

/// The first sixteen pairs of `words`, or as many as there are, then zeros: their first numbers and their second.
#[inline(always)]
pub(super) fn pairs<S: Lanes>(words: &[u32]) -> (S, S) {
    if let Some(full) = words.first_chunk::<LANES>() {
        return (S::bf16_even(full), S::bf16_odd(full));
    }
    let mut lanes = [0; LANES];
    for (lane, &word) in lanes.iter_mut().zip(words) {
        *lane = word;
    }
    (S::bf16_even(&lanes), S::bf16_odd(&lanes))
}

/// The keys of the last dimension of an odd number.
#[inline(always)]
pub(super) fn last_keys<S: Lanes>(words: &[u32]) -> S {
    let mut lanes = [0; LANES];
    for (pair, &word) in lanes.chunks_exact_mut(2).zip(words) {
        pair[0] = word as u16;
        pair[1] = (word >> 16) as u16;
    }
    S::from_bf16(&lanes)
}
