//! What pages hold: keys and values as they were computed, or rounded to bf16, in which a decoded token reads half the bytes.

use super::{AttentionShape, KV_BLOCK};
use crate::Precision;
use crate::convert::bf16_bits;
use crate::simd::{LANES, Lanes};
use bytemuck::{cast_slice, cast_slice_mut};
use half::bf16;

/// Keys and values of a layer, page after page.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "keys and values")]
pub enum KvPages<'a> {
    F32 { k: &'a [f32], v: &'a [f32] },
    Bf16 { k: &'a [bf16], v: &'a [bf16] },
}

/// [`KvPages`] to be written.
#[derive(Debug)]
#[expect(missing_docs, reason = "keys and values")]
pub enum KvPagesMut<'a> {
    F32 { k: &'a mut [f32], v: &'a mut [f32] },
    Bf16 { k: &'a mut [bf16], v: &'a mut [bf16] },
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
            Precision::Bf16 => Self::Bf16 { k: cast_slice(k), v: cast_slice(v) },
        }
    }

    /// Values of all K pages and of all V pages.
    pub(super) fn lens(&self) -> (usize, usize) {
        match self {
            Self::F32 { k, v } => (k.len(), v.len()),
            Self::Bf16 { k, v } => (k.len(), v.len()),
        }
    }
}

impl<'a> KvPagesMut<'a> {
    /// Sees memory, [`kv_words`] long, as pages of `precision`.
    pub fn of(precision: Precision, k: &'a mut [f32], v: &'a mut [f32]) -> Self {
        match precision {
            Precision::F32 => Self::F32 { k, v },
            Precision::Bf16 => Self::Bf16 { k: cast_slice_mut(k), v: cast_slice_mut(v) },
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

/// A number that pages hold.
pub(super) trait Cell: Copy + Send + Sync {
    /// `x`, rounded to this kind of number.
    fn of(x: f32) -> Self;
    /// The first sixteen, or as many as there are, then zeros.
    fn read<S: Lanes>(x: &[Self]) -> S;
}

impl Cell for f32 {
    #[inline(always)]
    fn of(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn read<S: Lanes>(x: &[Self]) -> S {
        S::read(x, 0.0)
    }
}

impl Cell for bf16 {
    #[inline(always)]
    fn of(x: f32) -> Self {
        bf16::from_bits(bf16_bits(x))
    }

    #[inline(always)]
    fn read<S: Lanes>(x: &[Self]) -> S {
        let bits: &[u16] = cast_slice(x);
        if let Some(full) = bits.first_chunk::<LANES>() {
            return S::from_bf16(full);
        }
        let mut lanes = [0; LANES];
        for (lane, &value) in lanes.iter_mut().zip(bits) {
            *lane = value;
        }
        S::from_bf16(&lanes)
    }
}

impl AttentionShape {
    /// Keys of page `page` of one key-value head.
    #[inline(always)]
    pub(super) fn key_page<'a, C>(&self, pages: &'a [C], page: u32, kv_head: usize) -> &'a [C] {
        let len = self.head_dim * KV_BLOCK;
        &pages[page as usize * self.k_page_len() + kv_head * len..][..len]
    }

    /// Values of page `page` of one key-value head.
    #[inline(always)]
    pub(super) fn value_page<'a, C>(&self, pages: &'a [C], page: u32, kv_head: usize) -> &'a [C] {
        let len = self.value_dim * KV_BLOCK;
        &pages[page as usize * self.v_page_len() + kv_head * len..][..len]
    }
}
