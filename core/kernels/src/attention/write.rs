//! New keys and values take their places in the pages.

use super::pages::rounded;
use super::{AttentionSeq, AttentionShape, KV_BLOCK, KvPagesMut};
use crate::Threads;
use crate::simd::simd;
use crate::threads::SharedMut;
use std::ops::Range;

/// Writes the keys `k [T, kv_heads·head_dim]` and values `v [T, kv_heads·value_dim]` of all rows to their pages, rounded to
/// what these hold. Must precede [`super::attention`] over the same rows. No two sequences write to one page.
///
/// In pages of bf16 values stay finite, so that a key that a mask hides can be given the weight 0. A row whose values are not
/// finite leaves zeros there, and NaN for a key: it shows in every query that sees the key.
///
/// # Panics
/// When a length does not fit the shapes, or a page id is past the pages.
pub fn kv_write(
    threads: &Threads,
    shape: &AttentionShape,
    k: &[f32],
    v: &[f32],
    seqs: &[AttentionSeq],
    pages: &mut KvPagesMut,
) {
    let (k_width, v_width) = (shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim);
    let rows = k.len() / k_width;
    assert!(
        k.len() == rows * k_width && v.len() == rows * v_width,
        "kv_write: k is [T, kv_heads*head_dim], v is [T, kv_heads*value_dim]"
    );
    shape.check(seqs, rows, &pages.as_ref());
    let source = Source { shape: *shape, k, v, seqs };
    let written = |seq: &AttentionSeq| seq.position / KV_BLOCK..(seq.position + seq.rows).div_ceil(KV_BLOCK);
    let with_rows = seqs.iter().filter(|seq| seq.rows > 0);
    let mut pages_written = with_rows.flat_map(|seq| &seq.pages[written(seq)]);
    let mut seen = std::collections::HashSet::new();
    debug_assert!(pages_written.all(|page| seen.insert(page)), "kv_write: two sequences write to one page");
    // Threads take heads of sequences: their pages lie apart.
    let parts = seqs.len() * shape.kv_heads;
    let least = (1 << 12) * parts / (rows * k_width).max(1) + 1;
    match pages {
        KvPagesMut::F32 { k, v } => {
            let (k, v) = (SharedMut::new(k), SharedMut::new(v));
            threads.for_each_chunk(parts, least, &|parts| write_f32(&source, parts, &k, &v));
        }
        KvPagesMut::Bf16 { k, v } => {
            let (k, v) = (SharedMut::new(k), SharedMut::new(v));
            threads.for_each_chunk(parts, least, &|parts| write_bf16(&source, parts, &k, &v));
        }
    }
}

struct Source<'a> {
    shape: AttentionShape,
    k: &'a [f32],
    v: &'a [f32],
    seqs: &'a [AttentionSeq<'a>],
}

impl Source<'_> {
    /// Page and lane of a sequence's row, and where among all rows it is.
    #[inline(always)]
    fn place(&self, seq: &AttentionSeq, row: usize) -> (usize, usize, usize) {
        let position = seq.position + row;
        let page = seq.pages[position / KV_BLOCK] as usize * self.shape.kv_heads;
        (page, position % KV_BLOCK, (seq.first_row + row) * self.shape.kv_heads)
    }
}

simd! {
    fn write_f32<S>(source: &Source, parts: Range<usize>, k_pages: &SharedMut<f32>, v_pages: &SharedMut<f32>) {
        let AttentionShape { head_dim, value_dim, kv_heads, .. } = source.shape;
        for part in parts {
            let (seq, head) = (&source.seqs[part / kv_heads], part % kv_heads);
            for row in 0..seq.rows {
                let (page, lane, from) = source.place(seq, row);
                let len = head_dim * KV_BLOCK;
                // SAFETY: a head of a sequence belongs to one thread; the pages are borrowed until all are done.
                let slots = unsafe { k_pages.slice((page + head) * len, len) };
                let keys = &source.k[(from + head) * head_dim..][..head_dim];
                for (slot, &key) in slots.chunks_exact_mut(KV_BLOCK).zip(keys) {
                    slot[lane] = key;
                }
                let to = ((page + head) * KV_BLOCK + lane) * value_dim;
                // SAFETY: as above.
                let slot = unsafe { v_pages.slice(to, value_dim) };
                slot.copy_from_slice(&source.v[(from + head) * value_dim..][..value_dim]);
            }
        }
    }
}

simd! {
    fn write_bf16<S>(source: &Source, parts: Range<usize>, k_pages: &SharedMut<u32>, v_pages: &SharedMut<u32>) {
        let AttentionShape { head_dim, value_dim, kv_heads, .. } = source.shape;
        let (k_len, v_len) = (head_dim * KV_BLOCK / 2, value_dim * KV_BLOCK / 2);
        for part in parts {
            let (seq, head) = (&source.seqs[part / kv_heads], part % kv_heads);
            for row in 0..seq.rows {
                let (page, lane, from) = source.place(seq, row);
                let keys = &source.k[(from + head) * head_dim..][..head_dim];
                let values = &source.v[(from + head) * value_dim..][..value_dim];
                // SAFETY: a head of a sequence belongs to one thread; the pages are borrowed until all are done.
                let (k, v) = unsafe {
                    (k_pages.slice((page + head) * k_len, k_len), v_pages.slice((page + head) * v_len, v_len))
                };
                let slots = &mut v[lane / 2 * value_dim..][..value_dim];
                let shown = put_values(slots, values, lane % 2 == 1);
                put_keys(k, keys, lane, shown);
            }
        }
    }
}

/// Puts the values of a key, whose pair's second it is or first, in their places; returns whether all are finite. If not,
/// zeros take their places.
#[inline(always)]
fn put_values(slots: &mut [u32], values: &[f32], second: bool) -> bool {
    let (shift, other) = if second { (16, 0x0000_ffff) } else { (0, 0xffff_0000) };
    let mut infinite = false;
    for (slot, &value) in slots.iter_mut().zip(values) {
        let bits = rounded(value);
        infinite |= bits & 0x7f80 == 0x7f80;
        *slot = *slot & other | u32::from(bits) << shift;
    }
    if infinite {
        for slot in slots {
            *slot &= other;
        }
    }
    !infinite
}

/// Puts a key in its lane; one that does not `show` its value becomes NaN.
#[inline(always)]
fn put_keys(slots: &mut [u32], keys: &[f32], lane: usize, show: bool) {
    const NAN: u16 = 0x7fc0;
    let bits = |x: f32| if show { rounded(x) } else { NAN };
    let (pairs, last) = keys.as_chunks::<2>();
    for (slot, pair) in slots.chunks_exact_mut(KV_BLOCK).zip(pairs) {
        slot[lane] = u32::from(bits(pair[0])) | u32::from(bits(pair[1])) << 16;
    }
    if let &[last] = last {
        let slot = &mut slots[pairs.len() * KV_BLOCK + lane / 2];
        let (shift, other) = if lane % 2 == 1 { (16, 0x0000_ffff) } else { (0, 0xffff_0000) };
        *slot = *slot & other | u32::from(bits(last)) << shift;
    }
}
