//! New keys and values take their places in the pages.

use super::pages::Cell;
use super::{AttentionSeq, AttentionShape, KV_BLOCK, KvPagesMut};
use crate::Threads;
use crate::simd::simd;
use crate::threads::SharedMut;
use half::bf16;
use std::ops::Range;

/// Writes the keys `k [T, kv_heads·head_dim]` and values `v [T, kv_heads·value_dim]` of all rows to their pages, rounded to
/// what these hold. Must precede [`super::attention`] over the same rows.
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
    // Threads take heads: those of a page lie apart.
    let least = (1 << 12) * shape.kv_heads / (rows * k_width).max(1) + 1;
    match pages {
        KvPagesMut::F32 { k, v } => {
            let (k, v) = (SharedMut::new(k), SharedMut::new(v));
            threads.for_each_chunk(shape.kv_heads, least, &|heads| write_f32(&source, heads, &k, &v));
        }
        KvPagesMut::Bf16 { k, v } => {
            let (k, v) = (SharedMut::new(k), SharedMut::new(v));
            threads.for_each_chunk(shape.kv_heads, least, &|heads| write_bf16(&source, heads, &k, &v));
        }
    }
}

struct Source<'a> {
    shape: AttentionShape,
    k: &'a [f32],
    v: &'a [f32],
    seqs: &'a [AttentionSeq<'a>],
}

simd! {
    fn write_f32<S>(source: &Source, heads: Range<usize>, k: &SharedMut<f32>, v: &SharedMut<f32>) {
        write(source, heads, k, v);
    }
}

simd! {
    fn write_bf16<S>(source: &Source, heads: Range<usize>, k: &SharedMut<bf16>, v: &SharedMut<bf16>) {
        write(source, heads, k, v);
    }
}

#[inline(always)]
fn write<C: Cell>(source: &Source, heads: Range<usize>, k_pages: &SharedMut<C>, v_pages: &SharedMut<C>) {
    let AttentionShape { kv_heads, head_dim, value_dim, .. } = source.shape;
    for seq in source.seqs {
        for row in 0..seq.rows {
            let (page, lane) = ((seq.position + row) / KV_BLOCK, (seq.position + row) % KV_BLOCK);
            let (page, from) = (seq.pages[page] as usize, (seq.first_row + row) * kv_heads);
            for head in heads.clone() {
                let len = head_dim * KV_BLOCK;
                // SAFETY: a head belongs to one thread; the pages are borrowed until all are done.
                let slots = unsafe { k_pages.slice(page * source.shape.k_page_len() + head * len, len) };
                let keys = &source.k[(from + head) * head_dim..][..head_dim];
                for (slot, &value) in slots.chunks_exact_mut(KV_BLOCK).zip(keys) {
                    slot[lane] = C::of(value);
                }
                let to = page * source.shape.v_page_len() + (head * KV_BLOCK + lane) * value_dim;
                // SAFETY: as above.
                let slot = unsafe { v_pages.slice(to, value_dim) };
                let values = &source.v[(from + head) * value_dim..][..value_dim];
                for (slot, &value) in slot.iter_mut().zip(values) {
                    *slot = C::of(value);
                }
            }
        }
    }
}
