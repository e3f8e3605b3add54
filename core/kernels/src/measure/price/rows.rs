//! What is done row by row: norms, the choice of experts, attention, log-probs.

use super::{Contest, Price, Setting, values};
use crate::attention::{AttentionMask, AttentionSeq, AttentionShape, KV_BLOCK, KvPages, attention};
use crate::norm::{NormScale, rms_norm};
use crate::{Precision, router, softmax};
#[cfg(target_arch = "x86_64")]
use crate::{Threads, measure::free};
use bytemuck::cast;
use half::bf16;
use std::hint::black_box;

pub(super) fn choice(setting: &Setting, experts: usize, top_k: usize) -> Price {
    let logits = values(setting.rows * experts);
    let logits = &logits;
    let room = || (vec![0u16; setting.rows * top_k], vec![0.0f32; setting.rows * top_k]);
    let (mut ids, mut weights) = room();
    let contest = Contest::of(move || {
        router::softmax_top_k(logits, experts, top_k, true, &mut ids, black_box(&mut weights));
    });
    #[cfg(target_arch = "x86_64")]
    let contest = contest.beside(|contest| {
        let (mut ids, mut weights) = room();
        contest.exact("exp of the chosen", move || {
            free::softmax_top_k(logits, experts, top_k, &mut ids, black_box(&mut weights));
        });
    });
    contest.decide(setting.rounds)
}

pub(super) fn norm(setting: &Setting, width: usize, per_row: usize) -> Price {
    let (x, weight) = (values(setting.rows * per_row * width), values(width));
    let (x, weight) = (&x, &weight);
    let mut out = vec![0.0f32; x.len()];
    let contest = Contest::of(move || {
        rms_norm(setting.threads, x, width, NormScale::Weight(weight), 1e-5, black_box(&mut out));
    });
    #[cfg(target_arch = "x86_64")]
    let contest = contest.beside(|contest| {
        if !width.is_multiple_of(16) {
            return;
        }
        let mut out = vec![0.0f32; x.len()];
        contest.exact("four sums", move || free::norm_f32(x, weight, 1e-5, black_box(&mut out)));
        let rounded = |x: &[f32]| {
            let mut out = vec![0u16; x.len()];
            free::to_bf16(x, &mut out);
            out
        };
        let (x, weight, mut out) = (rounded(x), rounded(weight), vec![0u16; x.len()]);
        contest.free("bf16 rows", move || free::norm_bf16(&x, &weight, 1e-5, black_box(&mut out)));
    });
    contest.decide(setting.rounds)
}

pub(super) fn decode(
    setting: &Setting,
    shape: AttentionShape,
    precision: Precision,
    context: usize,
) -> Price {
    let &Setting { threads, rows, .. } = setting;
    let shape = AttentionShape { mask: AttentionMask::Causal, ..shape };
    let blocks = context.div_ceil(KV_BLOCK);
    let pages: Vec<u32> = (0..(rows * blocks) as u32).collect();
    let q = values(rows * shape.heads * shape.head_dim);
    let seqs: Vec<AttentionSeq> = pages
        .chunks_exact(blocks)
        .enumerate()
        .map(|(row, pages)| AttentionSeq { first_row: row, rows: 1, position: context - 1, pages })
        .collect();
    let (k, v) = (values(pages.len() * shape.k_page_len()), values(pages.len() * shape.v_page_len()));
    let round = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let (k_rounded, v_rounded) = (round(&k), round(&v));
    let room = || vec![0.0f32; rows * shape.heads * shape.value_dim];
    let (mut out, q, seqs) = (room(), &q, &seqs);
    let words = |x: &[bf16]| x.as_chunks::<2>().0.iter().map(|pair| cast(*pair)).collect::<Vec<u32>>();
    let (k_words, v_words) = (words(&k_rounded), words(&v_rounded));
    let kept = match precision {
        Precision::F32 => KvPages::F32 { k: &k, v: &v },
        Precision::Bf16 => KvPages::Bf16 { k: &k_words, v: &v_words },
    };
    let contest = Contest::of(move || attention(threads, &shape, q, kept, seqs, black_box(&mut out), None));
    #[cfg(target_arch = "x86_64")]
    let contest = contest.beside(|contest| {
        if !free::can_decode(&shape) {
            return;
        }
        // Pages of the others are laid out as pages of f32 are, in both numbers.
        match precision {
            Precision::F32 => decode_otherwise(contest, setting, shape, (q, &k, &v), seqs),
            Precision::Bf16 => {
                decode_otherwise(contest, setting, shape, (q, &k_rounded, &v_rounded), seqs);
            }
        }
    });
    contest.decide(setting.rounds)
}

#[cfg(target_arch = "x86_64")]
fn decode_otherwise<'a, C: free::Cell>(
    contest: &mut Contest<'a>,
    setting: &Setting<'a>,
    shape: AttentionShape,
    (q, k_pages, v_pages): (&'a [f32], &'a [C], &'a [C]),
    seqs: &'a [AttentionSeq<'a>],
) {
    let threads = setting.threads;
    let decode = move || free::Decode { shape, q, k_pages, v_pages, seqs };
    let room = || vec![0.0f32; setting.rows * shape.heads * shape.value_dim];
    let mut out = room();
    contest.exact("four pages", move || decode().run(threads, false, black_box(&mut out)));
    let mut out = room();
    contest.free("parts for threads", move || decode().run(threads, true, black_box(&mut out)));
    let (mut out, single) = (room(), Threads::single());
    contest.exact("four pages, one thread", move || decode().run(&single, false, black_box(&mut out)));
}

pub(super) fn log_prob(setting: &Setting, vocabulary: usize) -> Price {
    let &Setting { threads, rows, .. } = setting;
    let logits: Vec<f32> = values(rows * vocabulary).iter().map(|x| 10.0 * x).collect();
    let logits = &logits;
    let contest = Contest::of(move || {
        threads.for_each(rows, &|row| {
            black_box(softmax::row_stats(&logits[row * vocabulary..][..vocabulary], 1.0));
        });
    });
    #[cfg(target_arch = "x86_64")]
    let contest = contest.beside(|contest| {
        contest.exact("several sums", move || {
            threads.for_each(rows, &|row| {
                let logits = &logits[row * vocabulary..][..vocabulary];
                black_box(free::row_stats(&Threads::single(), logits, vocabulary, 1));
            });
        });
        let parts = (2 * threads.count()).div_ceil(rows);
        contest.free("several sums, shared out", move || {
            black_box(free::row_stats(threads, logits, vocabulary, parts));
        });
    });
    contest.decide(setting.rounds)
}
