//! Against a plain f64 attention, its finite differences, and itself cut in other ways (bit for bit).

use super::*;
use crate::convert::round_to_bf16;
use crate::isa::forced::under_each;
use crate::testing::*;
use crate::{Precision, Threads};

const MASKS: [AttentionMask; 6] = [
    AttentionMask::Bidirectional,
    AttentionMask::Causal,
    AttentionMask::Chunked(20),
    AttentionMask::Chunked(16),
    AttentionMask::Sliding(7),
    AttentionMask::Sliding(33),
];

/// Those that let a sequence be cut and continued; a bidirectional one is always computed whole.
fn causal_masks() -> impl Iterator<Item = AttentionMask> {
    MASKS.into_iter().filter(|mask| *mask != AttentionMask::Bidirectional)
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, mask: AttentionMask) -> AttentionShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape { heads, kv_heads, head_dim, value_dim: head_dim, scale, mask }
}

/// Attention in f64 over one sequence that starts at position 0; also the log-sum-exps.
fn plain(shape: &AttentionShape, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    plain_with_sinks(shape, &vec![f64::NEG_INFINITY; shape.heads], q, k, v)
}

fn plain_with_sinks(
    shape: &AttentionShape,
    sinks: &[f64],
    q: &[f64],
    k: &[f64],
    v: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let AttentionShape { heads, kv_heads, head_dim, value_dim, scale, mask } = *shape;
    let rows = q.len() / (heads * head_dim);
    let (mut out, mut lses) = (Vec::new(), Vec::new());
    for row in 0..rows {
        for head in 0..heads {
            let q = &q[(row * heads + head) * head_dim..][..head_dim];
            let kv = |x: &[f64], key: usize, width: usize| {
                x[(key * kv_heads + head / (heads / kv_heads)) * width..][..width].to_vec()
            };
            let first = match mask {
                AttentionMask::Causal | AttentionMask::Bidirectional => 0,
                AttentionMask::Chunked(c) => row / c * c,
                AttentionMask::Sliding(w) => (row + 1).max(w) - w,
            };
            let last = if mask == AttentionMask::Bidirectional { rows - 1 } else { row };
            let score =
                |key| q.iter().zip(kv(k, key, head_dim)).map(|(a, b)| a * b).sum::<f64>() * f64::from(scale);
            let scores: Vec<f64> = (first..=last).map(score).collect();
            let all = || scores.iter().chain([&sinks[head]]);
            let max = all().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + all().map(|s| (s - max).exp()).sum::<f64>().ln();
            let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
            let values: Vec<_> = (first..=last).map(|key| kv(v, key, value_dim)).collect();
            out.extend((0..value_dim).map(|d| values.iter().zip(&p).map(|(v, p)| p * v[d]).sum::<f64>()));
            lses.push(lse);
        }
    }
    (out, lses)
}

const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// Pages filled with what no result may depend on. Values of bf16 are always finite, so the largest there are.
fn dirty_pages(precision: Precision, shape: &AttentionShape, count: usize) -> (Vec<f32>, Vec<f32>) {
    let (k_len, v_len) = (count * shape.k_page_len(), count * shape.v_page_len());
    let largest = match precision {
        Precision::F32 => f32::NAN,
        Precision::Bf16 => f32::from_bits(0x7f7f_ff7f),
    };
    (vec![f32::NAN; kv_words(precision, k_len)], vec![largest; kv_words(precision, v_len)])
}

/// Random q, k, v of so many rows.
fn rows_of(random: &mut Random, shape: &AttentionShape, rows: usize) -> [Vec<f32>; 3] {
    let kv = rows * shape.kv_heads;
    let mut draw = |len: usize| -> Vec<f32> { random.vec(len).iter().map(|x| 2.0 * x).collect() };
    [draw(rows * shape.heads * shape.head_dim), draw(kv * shape.head_dim), draw(kv * shape.value_dim)]
}

/// What the arithmetic of a precision rounds to before anything else.
fn as_attended(precision: Precision, mut x: Vec<f32>) -> Vec<f32> {
    if precision == Precision::Bf16 {
        round_to_bf16(&mut x);
    }
    x
}

/// Weights of 8 bits weigh values up to 2.
fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 3e-6,
        Precision::Bf16 => 4e-3,
    }
}

/// As [`assert_all_agree`], but products by pairs are compared with those of f32 lanes in the same order.
#[track_caller]
fn assert_products_agree(what: &str, mut f: impl FnMut() -> Vec<f32>) -> Vec<f32> {
    let mut results = under_each(&mut f);
    for (isa, got) in &results[1..] {
        let what = format!("{what}, {}", isa.name());
        if !isa.adds_pairs() {
            assert_same_bits(got, &results[0].1, &what);
            continue;
        }
        #[cfg(target_arch = "x86_64")]
        {
            tiles::LEFT_OUT.set(true);
            let want = crate::isa::forced::with(*isa, &mut f).expect("it was there before");
            tiles::LEFT_OUT.set(false);
            assert_same_bits(got, &want, &what);
        }
    }
    results.swap_remove(0).1
}

#[test]
fn prefill_matches_plain_attention() {
    let mut random = Random(1);
    for (mask, precision) in MASKS.into_iter().flat_map(|mask| PRECISIONS.map(|precision| (mask, precision)))
    {
        for (heads, kv_heads, head_dim, value_dim) in [
            (1, 1, 1, 1),
            (2, 2, 8, 8),
            (4, 2, 16, 16),
            (6, 2, 24, 24),
            (3, 1, 40, 40),
            (4, 4, 24, 16),
            (2, 1, 5, 35),
            (2, 1, 33, 16),
            (9, 3, 64, 64),
            (4, 4, 32, 112),
            (20, 1, 96, 16),
        ] {
            let shape = AttentionShape { value_dim, ..shape(heads, kv_heads, head_dim, mask) };
            for rows in [1, 2, 15, 16, 17, 50] {
                let [q, k, v] = rows_of(&mut random, &shape, rows).map(|x| as_attended(precision, x));
                let seqs = [AttentionSeq { first_row: 0, rows, position: 0, pages: &[3, 0, 2, 1] }];
                let got = assert_products_agree("attention", || {
                    let (mut k_pages, mut v_pages) = dirty_pages(precision, &shape, 4);
                    kv_write(
                        &Threads::new(2),
                        &shape,
                        &k,
                        &v,
                        &seqs,
                        &mut KvPagesMut::of(precision, &mut k_pages, &mut v_pages),
                    );
                    let (mut out, mut lse) =
                        (vec![f32::NAN; rows * heads * value_dim], vec![f32::NAN; rows * heads]);
                    let threads = Threads::single();
                    attention(
                        &threads,
                        &shape,
                        &q,
                        KvPages::of(precision, &k_pages, &v_pages),
                        &seqs,
                        &mut out,
                        Some(&mut lse),
                    );
                    [out, lse].concat()
                });
                let (out, lse) = plain(&shape, &wide(&q), &wide(&k), &wide(&v));
                assert_close(
                    &got,
                    &[out, lse].concat(),
                    tolerance(precision),
                    &format!("{mask:?} {precision:?} {heads}/{kv_heads} {head_dim} {rows}"),
                );
            }
        }
    }
}

#[test]
fn decode_and_chunked_prefill_give_the_bits_of_prefill() {
    let mut random = Random(2);
    let rows = 150;
    for (mask, (precision, head_dim)) in causal_masks().flat_map(|mask| {
        [(Precision::F32, 24), (Precision::Bf16, 24), (Precision::Bf16, 64)].map(|x| (mask, x))
    }) {
        let shape = shape(6, 2, head_dim, mask);
        let [q, k, v] = rows_of(&mut random, &shape, rows);
        let (q_width, kv_width) = (6 * head_dim, 2 * head_dim);
        let ids = [4, 1, 3, 0, 2, 9, 7, 8, 5, 6];
        let run = |cuts: &[usize], threads: &Threads| {
            let (mut k_pages, mut v_pages) = dirty_pages(precision, &shape, 10);
            let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; rows * 6]);
            for cut in cuts.windows(2) {
                let (from, to) = (cut[0], cut[1]);
                let seqs = [AttentionSeq { first_row: 0, rows: to - from, position: from, pages: &ids }];
                let kv = from * kv_width..to * kv_width;
                kv_write(
                    &Threads::new(2),
                    &shape,
                    &k[kv.clone()],
                    &v[kv],
                    &seqs,
                    &mut KvPagesMut::of(precision, &mut k_pages, &mut v_pages),
                );
                let (part, lse) = (from * q_width..to * q_width, &mut lse[from * 6..to * 6]);
                let out = &mut out[part.clone()];
                attention(
                    threads,
                    &shape,
                    &q[part],
                    KvPages::of(precision, &k_pages, &v_pages),
                    &seqs,
                    out,
                    Some(lse),
                );
            }
            [out, lse].concat()
        };
        let whole = run(&[0, rows], &Threads::single());
        let one_by_one: Vec<usize> = (0..=rows).collect();
        let what = format!("{mask:?} {precision:?} {head_dim}");
        assert_same_bits(&run(&one_by_one, &Threads::single()), &whole, &format!("{what} decode"));
        let cuts = [0, 5, 37, 38, 64, 130, rows];
        assert_same_bits(&run(&cuts, &Threads::new(2)), &whole, &format!("{what} cut"));
    }
}

#[test]
fn gradients_over_pages_of_bf16_are_those_of_rounded_numbers() {
    let mut random = Random(6);
    for (heads, kv_heads, head_dim, value_dim) in
        [(9, 3, 64, 64), (4, 2, 24, 16), (2, 1, 5, 35), (16, 2, 16, 16)]
    {
        let mask = AttentionMask::Sliding(33);
        let shape = AttentionShape { value_dim, ..shape(heads, kv_heads, head_dim, mask) };
        let rows = 50;
        let all = rows_of(&mut random, &shape, rows);
        let dout = random.vec(rows * heads * value_dim);
        let seqs = [AttentionSeq { first_row: 0, rows, position: 0, pages: &[3, 0, 2, 1] }];
        let run = |precision: Precision, [q, k, v]: &[Vec<f32>; 3]| {
            assert_products_agree("pages of bf16", || {
                // The backward pass wants numbers where nothing is written.
                let words = |values| vec![0.0; kv_words(precision, 4 * values)];
                let (mut k_words, mut v_words) = (words(shape.k_page_len()), words(shape.v_page_len()));
                let threads = Threads::new(2);
                let mut pages = KvPagesMut::of(precision, &mut k_words, &mut v_words);
                kv_write(&threads, &shape, k, v, &seqs, &mut pages);
                let (mut out, mut lse) = (vec![0.0; dout.len()], vec![0.0; rows * heads]);
                attention(&threads, &shape, q, pages.as_ref(), &seqs, &mut out, Some(&mut lse));
                let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
                let pages = pages.as_ref();
                attention_backward(
                    &threads, &shape, q, pages, &seqs, &out, &lse, &dout, &mut dq, &mut dk, &mut dv,
                );
                [out, lse, dq, dk, dv].concat()
            })
        };
        let got = run(Precision::Bf16, &all);
        let rounded = all.map(|x| as_attended(Precision::Bf16, x));
        assert_same_bits(&got, &run(Precision::Bf16, &rounded), "rounding twice is rounding once");
        let want = run(Precision::F32, &rounded);
        assert_close(&got, &wide(&want), 8e-3, &format!("{shape:?}"));
    }
}

#[test]
fn a_value_that_is_not_finite_shows_where_it_is_seen_and_nowhere_else() {
    let mut random = Random(8);
    for (head_dim, bad) in [(24, f32::NAN), (64, f32::INFINITY), (64, f32::MAX)] {
        let mask = AttentionMask::Sliding(9);
        let shape = shape(6, 2, head_dim, mask);
        let rows = 40;
        let [q, k, mut v] = rows_of(&mut random, &shape, rows);
        let seqs = [AttentionSeq { first_row: 0, rows, position: 0, pages: &[2, 0, 1] }];
        let run = |v: &[f32]| {
            assert_products_agree("not finite", || {
                let (mut k_pages, mut v_pages) = dirty_pages(Precision::Bf16, &shape, 3);
                let mut pages = KvPagesMut::of(Precision::Bf16, &mut k_pages, &mut v_pages);
                let threads = Threads::single();
                kv_write(&threads, &shape, &k, v, &seqs, &mut pages);
                let mut out = vec![0.0; q.len()];
                attention(&threads, &shape, &q, pages.as_ref(), &seqs, &mut out, None);
                out
            })
        };
        let before = run(&v);
        // Of the first key-value head, key 20.
        v[20 * 2 * head_dim + 3] = bad;
        let after = run(&v);
        for (row, (before, after)) in before.chunks(6 * head_dim).zip(after.chunks(6 * head_dim)).enumerate()
        {
            let (seeing, others) = after.split_at(3 * head_dim);
            assert_same_bits(others, &before[3 * head_dim..], "the other head");
            if (20..29).contains(&row) {
                assert!(seeing.iter().all(|x| x.is_nan()), "{bad} is seen by row {row}");
            } else {
                assert_same_bits(seeing, &before[..3 * head_dim], "rows that do not see it");
            }
        }
    }
}

#[test]
fn scores_far_apart_and_numbers_of_every_size_agree() {
    let mut random = Random(9);
    for (heads, kv_heads, head_dim) in [(3, 1, 64), (4, 4, 32), (2, 1, 128)] {
        for (low, high) in [(1, 100), (60, 128), (120, 134), (100, 254)] {
            let shape = shape(heads, kv_heads, head_dim, AttentionMask::Causal);
            let rows = 90;
            let draw =
                |random: &mut Random, heads: usize| random.wide_vec(rows * heads * head_dim, low, high);
            let (q, k) = (draw(&mut random, heads), draw(&mut random, kv_heads));
            let v = draw(&mut random, kv_heads);
            let seqs = [AttentionSeq { first_row: 0, rows, position: 0, pages: &[2, 0, 1, 4, 5, 3] }];
            assert_products_agree(&format!("{heads}/{kv_heads} {head_dim}, {low}..={high}"), || {
                let (mut k_pages, mut v_pages) = dirty_pages(Precision::Bf16, &shape, 6);
                let mut pages = KvPagesMut::of(Precision::Bf16, &mut k_pages, &mut v_pages);
                kv_write(&Threads::single(), &shape, &k, &v, &seqs, &mut pages);
                let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; rows * heads]);
                attention(&Threads::single(), &shape, &q, pages.as_ref(), &seqs, &mut out, Some(&mut lse));
                [out, lse].concat()
            });
        }
    }
}

#[test]
fn a_sequence_knows_nothing_of_the_others_nor_of_threads() {
    PRECISIONS.into_iter().for_each(sequences_by_themselves);
}

fn sequences_by_themselves(precision: Precision) {
    let mut random = Random(3);
    let shape = shape(4, 2, 32, AttentionMask::Causal);
    let lens = [100, 1, 33, 60];
    let total: usize = lens.iter().sum();
    let [q, k, v] = rows_of(&mut random, &shape, total);
    let page_lists: Vec<Vec<u32>> = (0..4).map(|s| (0..8).map(|i| (i * 4 + s) as u32).collect()).collect();
    let mut seqs = Vec::new();
    let mut first_row = 0;
    for (rows, pages) in lens.into_iter().zip(&page_lists) {
        seqs.push(AttentionSeq { first_row, rows, position: 0, pages });
        first_row += rows;
    }
    let (mut k_pages, mut v_pages) = dirty_pages(precision, &shape, 32);
    kv_write(
        &Threads::new(2),
        &shape,
        &k,
        &v,
        &seqs,
        &mut KvPagesMut::of(precision, &mut k_pages, &mut v_pages),
    );
    let dout = random.vec(q.len());
    let run = |threads: &Threads, seqs: &[AttentionSeq]| {
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; total * 4]);
        attention(
            threads,
            &shape,
            &q,
            KvPages::of(precision, &k_pages, &v_pages),
            seqs,
            &mut out,
            Some(&mut lse),
        );
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        attention_backward(
            threads,
            &shape,
            &q,
            KvPages::of(precision, &k_pages, &v_pages),
            seqs,
            &out,
            &lse,
            &dout,
            &mut dq,
            &mut dk,
            &mut dv,
        );
        [out, lse, dq, dk, dv].concat()
    };
    let all = run(&Threads::single(), &seqs);
    assert_same_bits(&run(&Threads::new(3), &seqs), &all, "three threads");
    // Each alone leaves the others' rows at zero, so the sum over sequences is the whole.
    let mut sum = vec![0.0; all.len()];
    for seq in &seqs {
        let alone = run(&Threads::single(), &[*seq]);
        sum.iter_mut().zip(alone).for_each(|(sum, x)| *sum += x);
    }
    assert!(sum == all, "each alone");
}

#[test]
fn backward_is_the_derivative() {
    let mut random = Random(4);
    let precision = Precision::F32;
    for mask in MASKS {
        for (heads, kv_heads, head_dim, value_dim, rows) in
            [(1, 1, 17, 17, 5), (4, 2, 3, 3, 18), (2, 1, 2, 2, 41), (2, 2, 3, 2, 19), (2, 1, 2, 18, 18)]
        {
            let shape = AttentionShape { value_dim, ..shape(heads, kv_heads, head_dim, mask) };
            let [q, k, v] = rows_of(&mut random, &shape, rows);
            let dout = random.vec(rows * heads * value_dim);
            let seqs = [AttentionSeq { first_row: 0, rows, position: 0, pages: &[1, 2, 0] }];
            let got = assert_all_agree("attention_backward", || {
                let (mut k_pages, mut v_pages) = dirty_pages(precision, &shape, 3);
                kv_write(
                    &Threads::new(2),
                    &shape,
                    &k,
                    &v,
                    &seqs,
                    &mut KvPagesMut::of(precision, &mut k_pages, &mut v_pages),
                );
                let (mut out, mut lse) = (vec![0.0; dout.len()], vec![0.0; rows * heads]);
                let threads = Threads::single();
                attention(
                    &threads,
                    &shape,
                    &q,
                    KvPages::of(precision, &k_pages, &v_pages),
                    &seqs,
                    &mut out,
                    Some(&mut lse),
                );
                let nan = |len| vec![f32::NAN; len];
                let (mut dq, mut dk, mut dv) = (nan(q.len()), nan(k.len()), nan(v.len()));
                attention_backward(
                    &threads,
                    &shape,
                    &q,
                    KvPages::of(precision, &k_pages, &v_pages),
                    &seqs,
                    &out,
                    &lse,
                    &dout,
                    &mut dq,
                    &mut dk,
                    &mut dv,
                );
                [dq, dk, dv].concat()
            });
            let want = plain_gradient(&shape, &wide(&q), &wide(&k), &wide(&v), &wide(&dout));
            assert_close(&got, &want, 2e-5, &format!("{shape:?} {rows}"));
        }
    }
}

#[test]
fn branches_of_a_trunk_give_the_gradients_of_whole_sequences() {
    let mut random = Random(5);
    for (mask, precision) in causal_masks().flat_map(|mask| PRECISIONS.map(|precision| (mask, precision))) {
        let shape = shape(4, 2, 32, mask);
        let (q_width, kv_width) = (4 * 32, 2 * 32);
        // A trunk of 45 rows; branches continue its first 16, 21 and 45.
        let (trunk, branches) = (45, [(16, 20), (21, 30), (45, 9)]);
        let total = trunk + branches.iter().map(|b| b.1).sum::<usize>();
        let [q, k, v] = rows_of(&mut random, &shape, total);
        let dout = random.vec(q.len());
        let ids: [&[u32]; 4] = [&[0, 1, 2], &[0, 3, 4], &[0, 5, 6, 7], &[0, 1, 8, 9]];
        let mut seqs = vec![AttentionSeq { first_row: 0, rows: trunk, position: 0, pages: ids[0] }];
        let mut first_row = trunk;
        for ((position, rows), pages) in branches.into_iter().zip(&ids[1..]) {
            seqs.push(AttentionSeq { first_row, rows, position, pages });
            first_row += rows;
        }
        // What a branch's first page holds of the trunk is written there too.
        let copy = |branch: &AttentionSeq<'static>| {
            let position = branch.position / KV_BLOCK * KV_BLOCK;
            AttentionSeq { first_row: position, rows: branch.position - position, position, ..*branch }
        };
        let copies: Vec<_> = seqs[1..].iter().map(copy).collect();
        let run = |q: &[f32],
                   k: &[f32],
                   v: &[f32],
                   dout: &[f32],
                   seqs: &[AttentionSeq],
                   copies: &[AttentionSeq]| {
            let (mut k_pages, mut v_pages) = dirty_pages(precision, &shape, 10);
            let threads = Threads::new(2);
            for seqs in [seqs, copies] {
                let mut pages = KvPagesMut::of(precision, &mut k_pages, &mut v_pages);
                kv_write(&threads, &shape, k, v, seqs, &mut pages);
            }
            let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; q.len() / 32]);
            attention(
                &threads,
                &shape,
                q,
                KvPages::of(precision, &k_pages, &v_pages),
                seqs,
                &mut out,
                Some(&mut lse),
            );
            let (mut dq, mut dk, mut dv) =
                (vec![f32::NAN; q.len()], vec![f32::NAN; k.len()], vec![f32::NAN; v.len()]);
            attention_backward(
                &threads,
                &shape,
                q,
                KvPages::of(precision, &k_pages, &v_pages),
                seqs,
                &out,
                &lse,
                dout,
                &mut dq,
                &mut dk,
                &mut dv,
            );
            [out, dq, dk, dv]
        };
        let got = run(&q, &k, &v, &dout, &seqs, &copies);
        let (mut dk, mut dv) = (vec![0.0f64; k.len()], vec![0.0f64; v.len()]);
        for seq in &seqs {
            // The same sequence from position 0, the shared rows without a gradient of their own.
            let rows: Vec<usize> = (0..seq.position).chain(seq.first_row..seq.first_row + seq.rows).collect();
            let pick = |x: &[f32], width: usize| -> Vec<f32> {
                rows.iter().flat_map(|&row| &x[row * width..][..width]).copied().collect()
            };
            let own = seq.position..seq.position + seq.rows;
            let mut dout = pick(&dout, q_width);
            dout[..seq.position * q_width].fill(0.0);
            let whole =
                [AttentionSeq { first_row: 0, rows: rows.len(), position: 0, pages: &[4, 2, 3, 1, 0] }];
            let want = run(&pick(&q, q_width), &pick(&k, kv_width), &pick(&v, kv_width), &dout, &whole, &[]);
            for (got, want) in got.iter().zip(&want).take(2) {
                let got = &got[seq.first_row * q_width..][..seq.rows * q_width];
                assert_same_bits(got, &want[own.start * q_width..own.end * q_width], &format!("{mask:?}"));
            }
            for (sum, part) in [(&mut dk, &want[2]), (&mut dv, &want[3])] {
                for (&row, part) in rows.iter().zip(part.chunks_exact(kv_width)) {
                    let sum = &mut sum[row * kv_width..][..kv_width];
                    sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += f64::from(*x));
                }
            }
        }
        assert_close(&got[2], &dk, 2e-5, &format!("{mask:?} dk"));
        assert_close(&got[3], &dv, 2e-5, &format!("{mask:?} dv"));
    }
}

/// Finite differences of Σ dout·out by q, k and v.
fn plain_gradient(shape: &AttentionShape, q: &[f64], k: &[f64], v: &[f64], dout: &[f64]) -> Vec<f64> {
    let all = [q, k, v].concat();
    let (q_len, k_len) = (q.len(), k.len());
    gradient(&all, |x| {
        let (out, _) = plain(shape, &x[..q_len], &x[q_len..q_len + k_len], &x[q_len + k_len..]);
        out.iter().zip(dout).map(|(o, d)| o * d).sum()
    })
}

#[test]
fn visible_lanes_are_those_of_the_mask() {
    for mask in MASKS {
        for position in 0..60 {
            let first = mask.first_visible(position);
            for block in 0..5 {
                let lanes = mask.visible_lanes(position, block, 60);
                for lane in 0..KV_BLOCK {
                    let key = block * KV_BLOCK + lane;
                    let last = if mask == AttentionMask::Bidirectional { 59 } else { position };
                    let visible = key >= first && key <= last;
                    assert_eq!(lanes.contains(&lane), visible, "{mask:?} query {position} key {key}");
                }
            }
        }
    }
}

#[test]
fn sinks_take_their_share_forward_and_backward() {
    let mut random = Random(5);
    let precision = Precision::F32;
    for mask in [AttentionMask::Causal, AttentionMask::Sliding(7)] {
        for (heads, kv_heads, head_dim, rows) in [(1, 1, 17, 5), (4, 2, 3, 18), (18, 9, 2, 20)] {
            let shape = shape(heads, kv_heads, head_dim, mask);
            let [q, k, v] = rows_of(&mut random, &shape, rows);
            let sinks: Vec<f32> = random.vec(heads).iter().map(|x| 4.0 * x).collect();
            let dout = random.vec(q.len());
            let seqs = [AttentionSeq { first_row: 0, rows, position: 0, pages: &[1, 2, 0] }];
            let before = 0.25;
            let got = assert_all_agree("sinks", || {
                let (mut k_pages, mut v_pages) = dirty_pages(precision, &shape, 3);
                kv_write(
                    &Threads::new(2),
                    &shape,
                    &k,
                    &v,
                    &seqs,
                    &mut KvPagesMut::of(precision, &mut k_pages, &mut v_pages),
                );
                let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; rows * heads]);
                let threads = Threads::single();
                attention(
                    &threads,
                    &shape,
                    &q,
                    KvPages::of(precision, &k_pages, &v_pages),
                    &seqs,
                    &mut out,
                    Some(&mut lse),
                );
                add_sinks(&sinks, &mut out, &mut lse);
                let nan = |len| vec![f32::NAN; len];
                let (mut dq, mut dk, mut dv) = (nan(q.len()), nan(k.len()), nan(v.len()));
                attention_backward(
                    &threads,
                    &shape,
                    &q,
                    KvPages::of(precision, &k_pages, &v_pages),
                    &seqs,
                    &out,
                    &lse,
                    &dout,
                    &mut dq,
                    &mut dk,
                    &mut dv,
                );
                let mut d_sinks = vec![before; heads];
                sinks_backward(&sinks, &out, &lse, &dout, &mut d_sinks);
                [out, lse, dq, dk, dv, d_sinks].concat()
            });
            let all = [wide(&q), wide(&k), wide(&v), wide(&sinks)].concat();
            let (k_at, v_at, s_at) = (q.len(), q.len() + k.len(), q.len() + 2 * k.len());
            let run =
                |x: &[f64]| plain_with_sinks(&shape, &x[s_at..], &x[..k_at], &x[k_at..v_at], &x[v_at..s_at]);
            let (out, lse) = run(&all);
            let mut gradients =
                gradient(&all, |x| run(x).0.iter().zip(&dout).map(|(o, d)| o * f64::from(*d)).sum());
            gradients[s_at..].iter_mut().for_each(|d| *d += f64::from(before));
            let what = format!("{mask:?} {heads}/{kv_heads} {head_dim} {rows}");
            let split = out.len() + lse.len();
            assert_close(&got[..split], &[out, lse].concat(), 3e-6, &what);
            assert_close(&got[split..], &gradients, 2e-5, &what);
        }
    }
}

#[test]
fn extreme_sinks_take_nothing_or_everything() {
    let (mut out, mut lse) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.5, 0.5, f32::NAN]);
    add_sinks(&[-200.0, 200.0, 0.0], &mut out, &mut lse);
    assert_eq!(out[..4], [1.0, 2.0, 0.0, 0.0]);
    assert_eq!(lse[..2], [0.5, 200.0]);
    assert!(out[4].is_nan() && lse[2].is_nan(), "a NaN shows");
}
