//! Every implementation of this machine against the scalar definition, bit for bit; and against f64.

use super::*;
use crate::convert::bf16_bits;
use crate::isa::Isa;
use crate::isa::forced::{under_each, with};
use crate::testing::{Random, assert_same_bits};
use half::bf16;

/// The definition of the f32 product.
fn scalar_f32(x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let element = |i: usize| (0..k).fold(0.0f32, |sum, q| x[i / n * k + q].mul_add(w[i % n * k + q], sum));
    (0..m * n).map(element).collect()
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// Fused multiply-add whose result is flushed when it is tiny before it is rounded to a subnormal's fewer bits.
fn fma_flush(a: f32, b: f32, c: f32) -> f32 {
    let sum = a.mul_add(b, c);
    if sum.abs() == f32::MIN_POSITIVE {
        // Did it round up to the least normal number? Scaled up, it keeps all its bits.
        let (a, b) = if a.abs() < b.abs() { (a * 2f32.powi(60), b) } else { (a, b * 2f32.powi(60)) };
        if a.mul_add(b, c * 2f32.powi(60)).abs() < f32::MIN_POSITIVE * 2f32.powi(60) {
            return 0.0f32.copysign(sum);
        }
    }
    flush(sum)
}

/// What the tile instruction gives for a row and a column of bf16: TDPBF16PS by the Intel SDM's pseudo-code.
fn tiles_of(x: &[f32], w: &[f32]) -> f32 {
    let mut sum = 0.0f32;
    for (x, w) in x.chunks(32).zip(w.chunks(32)) {
        let chain = |odd: usize| {
            let pairs = x.iter().zip(w).skip(odd).step_by(2);
            pairs.fold(0.0f32, |sum, (&x, &w)| fma_flush(x, w, sum))
        };
        sum = flush(sum + flush(chain(0) + chain(1)));
    }
    sum
}

/// What dot products of pairs give: VDPBF16PS by the same.
fn pairs_of(x: &[f32], w: &[f32]) -> f32 {
    let pairs = x.as_chunks::<2>().0.iter().zip(w.as_chunks::<2>().0);
    pairs.fold(0.0f32, |sum, (x, w)| fma_flush(x[0], w[0], fma_flush(x[1], w[1], sum)))
}

/// The definitions of the bf16 product.
fn scalar_bf16(x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Wanted {
    let round = |x: &f32| f32::from_bits(u32::from(bf16_bits(flush(*x))) << 16);
    // Rows of whole blocks.
    let padded = k.next_multiple_of(32);
    let rows = |x: &[f32], rows: usize| -> Vec<f32> {
        let row = |row: usize| x[row * k..(row + 1) * k].iter().map(round).chain(vec![0.0; padded - k]);
        (0..rows).flat_map(row).collect()
    };
    let (x, w) = (rows(x, m), rows(w, n));
    let all = |of: fn(&[f32], &[f32]) -> f32| {
        (0..m * n).map(|i| of(&x[i / n * padded..][..padded], &w[i % n * padded..][..padded])).collect()
    };
    Wanted { others: all(tiles_of), pairs: all(pairs_of) }
}

/// A result in the order of [`Isa::Avx512Bf16`], and of all others.
#[derive(Clone)]
struct Wanted {
    others: Vec<f32>,
    pairs: Vec<f32>,
}

impl Wanted {
    fn by(&self, isa: Isa) -> &[f32] {
        if isa == Isa::Avx512Bf16 { &self.pairs } else { &self.others }
    }

    fn here(&self) -> &[f32] {
        self.by(crate::isa::current())
    }

    /// What becomes of them when they are added to `before`.
    fn added_to(&self, before: &[f32]) -> Self {
        let add = |x: &[f32]| before.iter().zip(x).map(|(a, b)| a + b).collect();
        Self { others: add(&self.others), pairs: add(&self.pairs) }
    }
}

fn scalar(precision: Precision, x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Wanted {
    match precision {
        Precision::F32 => {
            let product = scalar_f32(x, w, m, n, k);
            Wanted { others: product.clone(), pairs: product }
        }
        Precision::Bf16 => scalar_bf16(x, w, m, n, k),
    }
}

const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 16, 32),
    (2, 17, 33),
    (3, 15, 31),
    (5, 64, 64),
    (7, 80, 1),
    (12, 33, 100),
    (16, 96, 128),
    (17, 40, 65),
    (31, 7, 3),
    (32, 32, 64),
    (33, 49, 70),
    (48, 63, 97),
    (4, 3, 0),
];

#[test]
fn every_implementation_gives_the_scalar_bits() {
    let mut random = Random(1);
    for precision in [Precision::F32, Precision::Bf16] {
        for (m, n, k) in SHAPES {
            let (x, w) = (random.vec(m * k), random.vec(n * k));
            let want = scalar(precision, &x, &w, m, n, k);
            let packed = PackedMatrix::from_f32(precision, &w, n, k);
            for (isa, got) in under_each(|| {
                let mut out = vec![f32::NAN; m * n];
                matmul(&Threads::single(), &x, m, &packed, &mut out);
                out
            }) {
                assert_same_bits(&got, want.by(isa), &format!("{precision:?} {m}x{n}x{k} {}", isa.name()));
            }
        }
    }
}

#[test]
fn subnormals_zeros_and_cancellation_follow_the_definition() {
    let mut random = Random(2);
    let (m, n, k) = (19, 35, 96);
    // Exponents whose products fall around the subnormals, products all subnormal, operands subnormal.
    for (low, high) in [(50, 75), (30, 64), (60, 66), (0, 3), (100, 150), (62, 65)] {
        for precision in [Precision::F32, Precision::Bf16] {
            let (x, w) = (random.wide_vec(m * k, low, high), random.wide_vec(n * k, low, high));
            let want = scalar(precision, &x, &w, m, n, k);
            let packed = PackedMatrix::from_f32(precision, &w, n, k);
            for (isa, got) in under_each(|| {
                let mut out = vec![f32::NAN; m * n];
                matmul(&Threads::single(), &x, m, &packed, &mut out);
                out
            }) {
                let what = format!("{precision:?} exponents {low}..{high} {}", isa.name());
                assert_same_bits(&got, want.by(isa), &what);
            }
        }
    }
}

#[test]
fn tiny_is_judged_before_rounding_to_a_subnormal() {
    let power = |n: i32| f32::from_bits(((127 + n) as u32) << 23);
    // 2^−126 less a little: three quarters of 2^−150 would round back up, yet is flushed; a quarter is not seen.
    for (factor, want) in [(0.75, 0.0), (0.25, f32::MIN_POSITIVE)] {
        let (mut x, mut w) = ([0.0; 32], [0.0; 32]);
        (x[0], w[0]) = (power(-63), power(-63));
        (x[2], w[2]) = (power(-75), -factor * power(-75));
        for isa in Isa::ALL {
            assert_same_bits(scalar_bf16(&x, &w, 1, 1, 32).by(isa), &[want], "the definition");
        }
        let packed = PackedMatrix::from_f32(Precision::Bf16, &w, 1, 32);
        for (isa, got) in under_each(|| {
            let mut out = [f32::NAN];
            matmul(&Threads::single(), &x, 1, &packed, &mut out);
            out
        }) {
            assert_same_bits(&got, &[want], &format!("{factor} {}", isa.name()));
        }
    }
}

#[test]
fn not_a_number_and_infinity_reach_the_output() {
    let (m, n, k) = (3, 20, 40);
    for precision in [Precision::F32, Precision::Bf16] {
        let mut random = Random(3);
        let (mut x, mut w) = (random.vec(m * k), random.vec(n * k));
        x[5] = f32::NAN;
        x[k + 7] = f32::INFINITY;
        w[3 * k + 2] = f32::NEG_INFINITY;
        let want = scalar(precision, &x, &w, m, n, k);
        let packed = PackedMatrix::from_f32(precision, &w, n, k);
        for (isa, got) in under_each(|| {
            let mut out = vec![0.0; m * n];
            matmul(&Threads::single(), &x, m, &packed, &mut out);
            out
        }) {
            assert!(got[..n].iter().all(|x| x.is_nan()), "{}", isa.name());
            assert!(got[n..2 * n].iter().all(|x| !x.is_finite()), "{}", isa.name());
            assert!(got[2 * n + 3].is_infinite(), "{}", isa.name());
            assert_same_bits(&got, want.by(isa), &format!("{precision:?} {}", isa.name()));
        }
    }
}

#[test]
fn a_row_knows_neither_its_neighbours_nor_the_threads() {
    let mut random = Random(4);
    let (m, n, k) = (530, 200, 72);
    let (x, w) = (random.vec(m * k), random.vec(n * k));
    for precision in [Precision::F32, Precision::Bf16] {
        let packed = PackedMatrix::from_f32(precision, &w, n, k);
        let mut all = vec![0.0; m * n];
        matmul(&Threads::new(3), &x, m, &packed, &mut all);
        for (first, rows) in [(0, 1), (529, 1), (100, 2), (7, 16), (33, 40), (200, 330)] {
            let mut some = vec![0.0; rows * n];
            matmul(&Threads::single(), &x[first * k..(first + rows) * k], rows, &packed, &mut some);
            assert_same_bits(
                &some,
                &all[first * n..(first + rows) * n],
                &format!("{precision:?} {first}+{rows}"),
            );
        }
    }
}

#[test]
fn adding_adds_the_whole_product_once() {
    let mut random = Random(5);
    let (m, n, k) = (18, 37, 90);
    let (x, w, before) = (random.vec(m * k), random.vec(n * k), random.vec(m * n));
    for precision in [Precision::F32, Precision::Bf16] {
        let packed = PackedMatrix::from_f32(precision, &w, n, k);
        let product = scalar(precision, &x, &w, m, n, k);
        let want = product.added_to(&before);
        for (isa, got) in under_each(|| {
            let mut out = before.clone();
            matmul_add(&Threads::single(), &x, m, &packed, &mut out);
            out
        }) {
            assert_same_bits(&got, want.by(isa), &format!("{precision:?} {}", isa.name()));
        }
    }
}

#[test]
fn packing_from_any_source_gives_the_same_matrix() {
    let mut random = Random(6);
    for (n, k) in [(1, 1), (16, 32), (17, 33), (40, 31), (5, 100), (33, 64)] {
        let w: Vec<bf16> = random.vec(n * k).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
        let turn = |i: usize| i % n * k + i / n;
        let w_kn: Vec<bf16> = (0..n * k).map(|i| w[turn(i)]).collect();
        let wide_kn: Vec<f32> = (0..n * k).map(|i| wide[turn(i)]).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            let reference = with(Isa::Portable, || PackedMatrix::from_f32(precision, &wide, n, k)).unwrap();
            for (isa, packed) in under_each(|| {
                [
                    PackedMatrix::from_f32(precision, &wide, n, k),
                    PackedMatrix::from_bf16(precision, &w, n, k),
                    PackedMatrix::from_f32_transposed(precision, &wide_kn, n, k),
                    PackedMatrix::from_bf16_transposed(precision, &w_kn, n, k),
                ]
            }) {
                for (source, packed) in packed.iter().enumerate() {
                    for panel in 0..n.div_ceil(LANES) {
                        let lines = packed.panel(panel).iter().zip(reference.panel(panel));
                        for (i, (got, want)) in lines.enumerate() {
                            assert_eq!(
                                got.0, want.0,
                                "{precision:?} [{n},{k}] source {source} line {i} {isa:?}"
                            );
                        }
                    }
                }
            }
            // And it is the matrix: multiplied with the identity, it comes out transposed.
            let mut identity = vec![0.0; k * k];
            (0..k).for_each(|i| identity[i * k + i] = 1.0);
            let mut out = vec![f32::NAN; k * n];
            matmul(&Threads::single(), &identity, k, &reference, &mut out);
            assert_same_bits(&out, &wide_kn, &format!("{precision:?} [{n},{k}]"));
        }
    }
}

#[test]
fn repacking_keeps_the_allocation() {
    let mut packed = PackedMatrix::from_f32(Precision::Bf16, &[1.0; 40 * 70], 40, 70);
    let address = packed.panel(0).as_ptr();
    packed.repack_from_f32(&Threads::new(2), &[2.0; 40 * 70]);
    assert_eq!(packed.panel(0).as_ptr(), address);
    let mut out = [0.0; 40];
    matmul(&Threads::single(), &[1.0; 70], 1, &packed, &mut out);
    assert_eq!(out, [140.0; 40]);
}

#[test]
fn weight_gradient_is_the_product_over_rows_in_order() {
    let mut random = Random(7);
    for (t, n, k) in [(1, 1, 1), (5, 17, 33), (33, 40, 20), (70, 64, 48), (0, 3, 4)] {
        let (dy, x, before) = (random.vec(t * n), random.vec(t * k), random.vec(n * k));
        let dy_nt: Vec<f32> = (0..n * t).map(|i| dy[i % t * n + i / t]).collect();
        let x_kt: Vec<f32> = (0..k * t).map(|i| x[i % t * k + i / t]).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            let product = scalar(precision, &dy_nt, &x_kt, n, k, t);
            let want = product.added_to(&before);
            for (isa, got) in under_each(|| {
                let mut dw = before.clone();
                weight_grad(&Threads::single(), precision, &dy, &x, t, n, k, &mut dw);
                dw
            }) {
                assert_same_bits(&got, want.by(isa), &format!("{precision:?} {t} {n}x{k} {}", isa.name()));
            }
            let mut dw = before.clone();
            weight_grad(&Threads::new(3), precision, &dy, &x, t, n, k, &mut dw);
            assert_same_bits(&dw, want.here(), &format!("{precision:?} {t} {n}x{k} threads"));
        }
    }
}

#[test]
fn products_are_right_in_f64_too() {
    let mut random = Random(8);
    let (m, n, k) = (9, 21, 300);
    let (x, w) = (random.vec(m * k), random.vec(n * k));
    for (precision, tolerance) in [(Precision::F32, 2e-5), (Precision::Bf16, 0.1)] {
        let mut out = vec![0.0; m * n];
        matmul(&Threads::single(), &x, m, &PackedMatrix::from_f32(precision, &w, n, k), &mut out);
        for (i, &got) in out.iter().enumerate() {
            let want: f64 = (0..k).map(|q| f64::from(x[i / n * k + q]) * f64::from(w[i % n * k + q])).sum();
            let error = (f64::from(got) - want).abs();
            assert!(error <= tolerance, "{precision:?} {i}: {got} is {error} from {want}");
        }
    }
}

const QUANTISATIONS: [(CodeBits, usize); 4] =
    [(CodeBits::Eight, 32), (CodeBits::Four, 32), (CodeBits::Eight, 128), (CodeBits::Four, 128)];

/// The definition of quantising: `quant`, one weight at a time.
fn quantise_scalar(bits: CodeBits, group: usize, w: &[f32], k: usize) -> Vec<f32> {
    let (limit, significant) = if bits == CodeBits::Eight { (127.0f32, 1) } else { (7.0, 5) };
    let one = |values: &[f32]| -> Vec<f32> {
        if values.iter().any(|value| !value.is_finite()) {
            return vec![f32::NAN; values.len()];
        }
        let size = values.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        if size < 2f32.powi(-100) {
            return vec![0.0; values.len()];
        }
        // Up to the next number of `significant` bits, by counting units of the last of them.
        let least = size / limit;
        let unit = 2f32.powi(least.log2().floor() as i32 - (significant - 1));
        let scale = (least / unit).ceil() * unit;
        let code = |value: f32| (value / scale).round_ties_even().clamp(-limit, limit);
        values.iter().map(|&value| code(value) * scale + 0.0).collect()
    };
    w.chunks(k.max(1)).flat_map(|row| row.chunks(group).flat_map(one)).collect()
}

#[test]
fn quantised_products_are_those_of_the_rounded_weights() {
    let mut random = Random(9);
    for (bits, group) in QUANTISATIONS {
        let quantisation = Quantisation::new(bits, group);
        for (m, n, k) in SHAPES.into_iter().chain([(3, 50, 300), (40, 130, 257)]) {
            let (x, mut w) = (random.vec(m * k), random.vec(n * k));
            if let Some(last) = w.last_mut() {
                *last = 100.0;
            }
            let want_w = quantise_scalar(bits, group, &w, k);
            let w_kn: Vec<f32> = (0..n * k).map(|i| w[i % n * k + i / n]).collect();
            for precision in [Precision::F32, Precision::Bf16] {
                let want = scalar(precision, &x, &want_w, m, n, k);
                for (isa, got) in under_each(|| {
                    let mut rounded = [Vec::new(), Vec::new()];
                    quantisation.round(&Threads::new(2), &w, (n, k), false, &mut rounded[0]);
                    quantisation.round(&Threads::single(), &w_kn, (n, k), true, &mut rounded[1]);
                    let mut products = [vec![f32::NAN; m * n], vec![f32::NAN; m * n]];
                    let mut packed = PackedMatrix::quantised(quantisation, precision, n, k);
                    packed.repack_from_f32(&Threads::single(), &w);
                    matmul(&Threads::new(2), &x, m, &packed, &mut products[0]);
                    packed.repack_from_f32_transposed(&Threads::single(), &w_kn);
                    matmul(&Threads::single(), &x, m, &packed, &mut products[1]);
                    (rounded, products)
                }) {
                    let what = format!("{bits:?}/{group} {precision:?} {m}x{n}x{k} {}", isa.name());
                    let ([rounded, rounded_kn], [product, product_kn]) = got;
                    let back: Vec<f32> =
                        (0..n * k).map(|i| rounded_kn[i % k.max(1) * n + i / k.max(1)]).collect();
                    assert_same_bits(&rounded, &want_w, &what);
                    assert_same_bits(&back, &want_w, &what);
                    assert_same_bits(&product, want.by(isa), &what);
                    assert_same_bits(&product_kn, want.by(isa), &what);
                }
            }
        }
    }
}

#[test]
fn a_few_rows_meet_codes_as_the_definition_says() {
    let mut random = Random(12);
    let (n, k) = (70, 300);
    // What x and w are, and whether sums of codes may be scaled: exponents 71 and 183 are those of 2^−56 and 2^56.
    let ranges = [
        ((71, 75), (80, 84), true),
        ((178, 182), (180, 184), true),
        ((71, 182), (100, 184), true),
        ((66, 72), (80, 84), false),
        ((1, 40), (90, 110), false),
        ((100, 120), (60, 70), false),
        ((100, 120), (192, 220), false),
        ((240, 250), (110, 130), false),
    ];
    for (bits, group) in QUANTISATIONS {
        for ((x_low, x_high), (w_low, w_high), taken) in ranges {
            let w = random.wide_vec(n * k, w_low, w_high);
            let mut packed = PackedMatrix::quantised(Quantisation::new(bits, group), Precision::Bf16, n, k);
            packed.repack_from_f32(&Threads::single(), &w);
            let rounded = quantise_scalar(bits, group, &w, k);
            for m in 1..=8 {
                let x = random.wide_vec(m * k, x_low, x_high);
                let takes = with(Isa::Portable, || few::may_take(m, &packed) && few::plain(&x));
                assert_eq!(takes, Some(taken && m <= 4), "{bits:?}/{group} {m} rows {x_low} {w_low}");
                let want = scalar_bf16(&x, &rounded, m, n, k);
                for (isa, got) in under_each(|| {
                    let mut out = vec![f32::NAN; m * n];
                    matmul(&Threads::new(2), &x, m, &packed, &mut out);
                    out
                }) {
                    let what = format!("{bits:?}/{group} {m} rows {x_low} {w_low} {}", isa.name());
                    assert_same_bits(&got, want.by(isa), &what);
                }
            }
        }
    }
}

#[test]
fn a_few_rows_meet_weights_as_the_definition_says() {
    let mut random = Random(13);
    // What x and w are, and whether tiles may be left out: exponents 71 and 183 are those of 2^−56 and 2^56.
    let ranges = [
        ((71, 75), (71, 75), true),
        ((178, 182), (178, 182), true),
        ((71, 182), (71, 182), true),
        ((120, 128), (110, 120), true),
        ((60, 71), (71, 75), false),
        ((71, 75), (60, 71), false),
        ((0, 3), (120, 128), false),
        ((120, 128), (0, 3), false),
        ((240, 254), (120, 128), false),
        ((120, 128), (240, 254), false),
    ];
    // Panels: one, some, and more than are taken at once; k: of whole blocks and not.
    for (n, k) in [(7, 31), (16, 64), (70, 300), (96, 33), (117, 160)] {
        for ((x_low, x_high), (w_low, w_high), taken) in ranges {
            let w = random.wide_vec(n * k, w_low, w_high);
            let packed = PackedMatrix::from_f32(Precision::Bf16, &w, n, k);
            for m in 1..=9 {
                let x = random.wide_vec(m * k, x_low, x_high);
                let what = format!("{m} rows, [{n},{k}], exponents {x_low} {w_low}");
                let takes = with(Isa::Portable, || few::may_take(m, &packed) && few::plain(&x));
                assert_eq!(takes, Some(taken && m <= 4), "{what}");
                let before = random.vec(m * n);
                let want = scalar_bf16(&x, &w, m, n, k);
                let want_added = want.added_to(&before);
                for (isa, (set, added)) in under_each(|| {
                    let (mut set, mut added) = (vec![f32::NAN; m * n], before.clone());
                    matmul(&Threads::new(2), &x, m, &packed, &mut set);
                    matmul_add(&Threads::single(), &x, m, &packed, &mut added);
                    (set, added)
                }) {
                    assert_same_bits(&set, want.by(isa), &format!("{what} {}", isa.name()));
                    assert_same_bits(&added, want_added.by(isa), &format!("{what} {} added", isa.name()));
                }
            }
        }
    }
}

#[test]
fn packing_tells_plain_weights_wherever_they_come_from() {
    let power = |n: i32| f32::from_bits(((127 + n) as u32) << 23);
    let least = power(-56);
    let below = f32::from_bits(least.to_bits() - (1 << 16));
    // Values, and whether a matrix that holds one is plain. A subnormal is packed as zero; what rounds to 2^−56 is 2^−56.
    let cases = [
        (0.0, true),
        (-0.0, true),
        (1e-40, true),
        (least, true),
        (-least, true),
        (f32::from_bits(least.to_bits() - 1), true),
        (below, false),
        (-below, false),
        (f32::MIN_POSITIVE, false),
        (power(56), true),
        (-power(56), true),
        (power(56) * 1.01, false),
        (-power(57), false),
        (f32::INFINITY, false),
        (f32::NAN, false),
    ];
    let mut random = Random(14);
    for (n, k) in [(1, 1), (16, 32), (33, 70), (50, 2100)] {
        let w = random.vec(n * k).iter().map(|w| w + 3.0f32.copysign(*w)).collect::<Vec<_>>();
        for (value, plain) in cases {
            for at in [0, n * k / 2, n * k - 1] {
                let mut w = w.clone();
                w[at] = value;
                let turned: Vec<f32> = (0..n * k).map(|i| w[i % n * k + i / n]).collect();
                let [bf16, bf16_turned] = [&w, &turned]
                    .map(|w| w.iter().map(|w| bf16::from_bits(super::pack::round(*w))).collect::<Vec<_>>());
                for (isa, got) in under_each(|| {
                    let mut packed = PackedMatrix::zeros(Precision::Bf16, n, k);
                    let threads = Threads::new(2);
                    let mut of = |pack: &dyn Fn(&mut PackedMatrix)| {
                        pack(&mut packed);
                        packed.is_plain()
                    };
                    [
                        of(&|packed| packed.repack_from_f32(&threads, &w)),
                        of(&|packed| packed.repack_from_bf16(&threads, &bf16)),
                        of(&|packed| packed.repack_from_f32_transposed(&threads, &turned)),
                        of(&|packed| packed.repack_from_bf16_transposed(&threads, &bf16_turned)),
                    ]
                }) {
                    assert_eq!(got, [plain; 4], "{value:e} at {at} of [{n},{k}], {}", isa.name());
                }
            }
        }
    }
}

#[test]
fn quantising_awkward_weights_follows_the_definition() {
    let mut random = Random(10);
    let (n, k) = (33, 160);
    for (low, high) in [(0, 3), (20, 40), (60, 70), (120, 130), (240, 250)] {
        let mut w = random.wide_vec(n * k, low, high);
        w[5 * k..5 * k + 40].fill(0.0);
        (w[7 * k + 3], w[9 * k + 4], w[9 * k + 50]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        for (bits, group) in QUANTISATIONS {
            let want = quantise_scalar(bits, group, &w, k);
            for (isa, got) in under_each(|| {
                let mut rounded = Vec::new();
                let quantisation = Quantisation::new(bits, group);
                quantisation.round(&Threads::single(), &w, (n, k), false, &mut rounded);
                rounded
            }) {
                assert_same_bits(&got, &want, &format!("{bits:?}/{group} {low}..{high} {}", isa.name()));
            }
            // Every weight is a bf16, and quantising again changes nothing.
            assert!(want.iter().all(|value| value.to_bits() & 0xffff == 0));
            let bf16: Vec<bf16> = want.iter().map(|&value| bf16::from_f32(value)).collect();
            let mut again = Vec::new();
            Quantisation::new(bits, group).round(&Threads::single(), &bf16, (n, k), false, &mut again);
            assert_same_bits(&again, &want, "again");
        }
    }
}

#[test]
fn quantised_weights_take_a_half_and_a_quarter_of_the_bytes() {
    let full = PackedMatrix::zeros(Precision::Bf16, 64, 1024).bytes();
    let bytes = |(bits, group)| {
        PackedMatrix::quantised(Quantisation::new(bits, group), Precision::Bf16, 64, 1024).bytes()
    };
    let shares = QUANTISATIONS.map(|quantisation| bytes(quantisation) as f64 / full as f64);
    assert_eq!(shares, [0.53125, 0.28125, 0.5078125, 0.2578125]);
}

#[test]
fn quantisation_errs_by_half_a_step() {
    let mut random = Random(11);
    let w = random.vec(64 * 256);
    for ((bits, group), limit) in
        QUANTISATIONS.into_iter().zip([1.0 / 127.0, 0.52 / 7.0, 1.0 / 127.0, 0.54 / 7.0])
    {
        let mut rounded = Vec::new();
        Quantisation::new(bits, group).round(&Threads::single(), &w, (64, 256), false, &mut rounded);
        let worst = w.iter().zip(&rounded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= limit, "{bits:?}/{group} errs by {worst}");
    }
}

#[test]
fn groups_give_what_each_product_gives() {
    let mut random = Random(77);
    // As many rows as are few, none, more; and a group in three holds weights or rows that need tiles.
    let (n, k, sizes) = (70, 45, [3usize, 0, 18, 39, 1, 2, 4, 5, 6, 7, 8, 9, 1, 6]);
    let ends: Vec<usize> =
        sizes.iter().scan(0, |end, size| Some(*end + size).inspect(|next| *end = *next)).collect();
    let m = ends[ends.len() - 1];
    let mut x = random.vec(m * k);
    x[ends[5] * k + 7] = 1e-30;
    x[ends[12] * k + 50] = 1e30;
    let matrices: Vec<Vec<f32>> = (0..sizes.len())
        .map(|i| if i % 3 == 0 { random.wide_vec(n * k, 60, 75) } else { random.vec(n * k) })
        .collect();
    for precision in [Precision::F32, Precision::Bf16] {
        let packed: Vec<_> = matrices.iter().map(|w| PackedMatrix::from_f32(precision, w, n, k)).collect();
        let groups: Vec<_> = packed
            .iter()
            .zip(ends.iter().zip(sizes))
            .map(|(w, (&end, size))| Group { rows: end - size..end, w })
            .collect();
        for (isa, (set, added)) in under_each(|| {
            let (mut set, mut added) = (vec![f32::NAN; m * n], vec![1.0; m * n]);
            grouped_matmul(&Threads::new(2), &x, &groups, &mut set);
            grouped_matmul_add(&Threads::new(2), &x, &groups, &mut added);
            (set, added)
        }) {
            for (group, w) in groups.iter().zip(&matrices) {
                let rows = group.rows.clone();
                let want = scalar(precision, &x[rows.start * k..rows.end * k], w, rows.len(), n, k);
                let want = want.by(isa);
                assert_same_bits(&set[rows.start * n..rows.end * n], want, isa.name());
                let want: Vec<f32> = want.iter().map(|x| 1.0 + x).collect();
                assert_same_bits(&added[rows.start * n..rows.end * n], &want, isa.name());
            }
        }
    }
}

/// Weights `[n,k]` for each of the groups that end there.
fn weights(
    random: &mut Random,
    groups: usize,
    quantisation: Option<Quantisation>,
    n: usize,
    k: usize,
) -> Vec<PackedMatrix> {
    let weight = |_| {
        let w = random.vec(n * k);
        let mut packed = match quantisation {
            Some(quantisation) => PackedMatrix::quantised(quantisation, Precision::Bf16, n, k),
            None => PackedMatrix::zeros(Precision::Bf16, n, k),
        };
        packed.repack_from_f32(&Threads::single(), &w);
        packed
    };
    (0..groups).map(weight).collect()
}

/// A group for each weight, which ends there.
fn grouped<'a>(weights: &'a [PackedMatrix], ends: &[usize]) -> Vec<Group<'a>> {
    let starts = [0].iter().chain(ends);
    let rows = starts.zip(ends).map(|(&start, &end)| start..end);
    rows.zip(weights).map(|(rows, w)| Group { rows, w }).collect()
}

#[test]
fn gated_mlps_give_the_bits_of_their_steps() {
    let mut random = Random(79);
    // Panels of gates: odd and even; k: of none, one and several blocks.
    for (width, k, n, ends) in [
        (48, 45, 33, [3usize, 3, 21, 60]),
        (32, 700, 64, [17, 50, 51, 100]),
        (16, 2000, 16, [1, 2, 4, 40]),
        (80, 64, 48, [5, 11, 15, 24]),
        (112, 96, 100, [2, 9, 10, 16]),
        (32, 0, 20, [2, 9, 30, 31]),
    ] {
        let m = ends[3];
        let x = random.vec(m * k);
        let before = random.vec(m * n);
        for quantisation in [None, Some(Quantisation::new(CodeBits::Eight, 32))] {
            let gate_up = weights(&mut random, 4, quantisation, 2 * width, k);
            let down = weights(&mut random, 4, quantisation, n, width);
            let (gate_up, down) = (grouped(&gate_up, &ends), grouped(&down, &ends));
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let threads = Threads::new(2);
                let mlp = GatedMlp { gate_up: &gate_up, activation, down: &down };
                under_each(|| {
                    let isa = crate::isa::current();
                    let (mut got, mut got_added) = (before.clone(), before.clone());
                    let mut kept = vec![7.0; 2 * m * width];
                    let done = mlp.forward(&threads, &x, &mut got, Store::Set, None)
                        & mlp.forward(&threads, &x, &mut got_added, Store::Add, Some(&mut kept));
                    assert_eq!(done, isa.has_tiles(), "{} {width} {k}", isa.name());
                    let mut apart = vec![7.0; 2 * m * width];
                    let (mut set, mut added) = (before.clone(), before.clone());
                    if done {
                        let mut act = vec![f32::NAN; m * width];
                        grouped_matmul(&threads, &x, &gate_up, &mut apart);
                        crate::activation::gated(&threads, activation, &apart, width, &mut act);
                        grouped_matmul(&threads, &act, &down, &mut set);
                        grouped_matmul_add(&threads, &act, &down, &mut added);
                    }
                    let what = format!("{activation:?} {width} {k} {}", isa.name());
                    assert_same_bits(&got, &set, &what);
                    assert_same_bits(&got_added, &added, &format!("{what} added"));
                    assert_same_bits(&kept, &apart, &format!("{what} kept"));
                });
            }
            let activation = Activation::ClampedSwiglu { alpha: 1.0, limit: 1.0 };
            let alternating = GatedMlp { gate_up: &gate_up, activation, down: &down };
            let mut out = before.clone();
            assert!(!alternating.forward(&Threads::single(), &x, &mut out, Store::Set, None));
        }
    }
}

#[test]
fn outputs_past_the_caches_hold_the_same_bits() {
    let mut random = Random(78);
    let (m, n, k) = (70, 16 * 1024, 33);
    let (x, w) = (random.vec(m * k), random.vec(n * k));
    let packed = PackedMatrix::from_f32(Precision::Bf16, &w, n, k);
    // On a line of memory and four bytes past one.
    let mut out = crate::Pages::<f32>::zeros(m * n + 1);
    let threads = Threads::new(2);
    matmul(&threads, &x, m, &packed, &mut out[1..]);
    let want = out[1..].to_vec();
    matmul(&threads, &x, m, &packed, &mut out[..m * n]);
    assert_same_bits(&out[..m * n], &want, "streamed");
    assert_same_bits(&want[..n], scalar(Precision::Bf16, &x[..k], &w, 1, n, k).here(), "a row");
}
