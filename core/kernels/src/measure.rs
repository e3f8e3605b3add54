//! What this machine reaches: bytes read a second, products a second, and which instruction sets it has.
//!
//! ```text
//!   read_bandwidth   all threads read memory, as STREAM does     what bounds a product with few rows
//!   peak_flops       multiply-adds on registers, nothing read    what no product passes
//!   product          one product, warm or cold                   what the kernels make of both
//!   price            our operations beside kernels without rules what exactness costs
//! ```
//!
//! Numbers for `freewheel bench` and `doctor`; nothing else depends on them.

#[cfg(target_arch = "x86_64")]
mod free;
mod peak;
pub mod price;

use crate::gemm::{PackedMatrix, Precision, matmul};
use crate::isa;
use crate::simd::{LANES, simd};
use crate::{Pages, Quantisation, Threads};
use std::time::{Duration, Instant};

pub use peak::peak_flops;

/// Instruction sets, as the kernels use them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuFeatures {
    /// The best that processor and operating system allow: `portable`, `neon`, `avx2`, `avx512`, `avx512bf16` or `amx`.
    pub detected: &'static str,
    /// The one in use: `detected`, or a lower one asked for by `FREEWHEEL_KERNELS`.
    pub used: &'static str,
}

/// What the kernels found on this machine.
pub fn cpu_features() -> CpuFeatures {
    CpuFeatures { detected: isa::detected().name(), used: isa::current().name() }
}

/// Bytes a second that all threads together read, each its own part, of `bytes` that they go through again and again: the
/// best of several passes. Many times the caches it is the memory's rate; less than they hold, theirs.
pub fn read_bandwidth(threads: &Threads, bytes: usize) -> f64 {
    // In large pages, as weights are.
    let mut data = Pages::<f32>::zeros((bytes / size_of::<f32>()).max(1 << 16));
    data.fill(1.0);
    best_rate(size_of_val(&*data) as f64, Duration::from_millis(300), || {
        threads.for_each_chunk(data.len(), 1 << 12, &|part| {
            std::hint::black_box(sum(&data[part]));
        });
    })
}

simd! {
    /// The sum of `x`, in an order that keeps as many loads under way as there can be.
    fn sum<S>(x: &[f32]) -> f32 {
        let mut sums = [S::splat(0.0); 8];
        let (blocks, _) = x.as_chunks::<{ 8 * LANES }>();
        for block in blocks {
            let (lines, _) = block.as_chunks::<LANES>();
            for (sum, line) in sums.iter_mut().zip(lines) {
                *sum = sum.add(S::load(line));
            }
        }
        sums.iter().map(|sum| sum.sum()).sum()
    }
}

/// Operations a second (a multiply-add counts two) of a product of 512×1024×1024 in `precision`, by the kernels.
pub fn gemm_flops(threads: &Threads, precision: Precision) -> f64 {
    let (m, n, k) = (512, 1024, 1024);
    let w = PackedMatrix::from_f32(precision, &vec![0.25f32; n * k], n, k);
    2.0 * (m * n * k) as f64 / Product { m, cold: false }.times(threads, &[w])[0]
}

/// A product to be timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Rows of x.
    pub m: usize,
    /// Whether W comes from memory each time, as in a model that does not fit the caches, or is used again at once.
    pub cold: bool,
}

/// Bytes of weights that no cache keeps.
const COLD_BYTES: usize = 512 << 20;

impl Product {
    /// Copies of W `[n,k]` to take turns, so that each comes from memory: enough to be many times the caches. One if warm.
    pub fn matrices(
        &self,
        (n, k): (usize, usize),
        precision: Precision,
        quantisation: Option<Quantisation>,
    ) -> Vec<PackedMatrix> {
        let values: Vec<f32> = (0..n * k).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
        let mut w = match quantisation {
            Some(quantisation) => PackedMatrix::quantised(quantisation, precision, n, k),
            None => PackedMatrix::zeros(precision, n, k),
        };
        w.repack_from_f32(&Threads::single(), &values);
        let copies = if self.cold { COLD_BYTES.div_ceil(w.bytes().max(1)) } else { 1 };
        vec![w; copies]
    }

    /// Seconds that single products with `weights`, taken in turn, take: rising, five or more, as many as fit in a fifth
    /// of a second.
    ///
    /// # Panics
    /// When there is no matrix, or they differ in shape.
    pub fn times(&self, threads: &Threads, weights: &[PackedMatrix]) -> Vec<f64> {
        let (n, k) = (weights[0].rows(), weights[0].inner());
        let x: Vec<f32> = (0..self.m * k).map(|i| (i % 241) as f32 / 241.0 - 0.5).collect();
        let mut out = Pages::<f32>::zeros(self.m * n);
        let mut turn = weights.iter().cycle();
        let mut once = || {
            let w = turn.next().expect("there is a matrix");
            let began = Instant::now();
            matmul(threads, &x, self.m, w, std::hint::black_box(&mut out));
            began.elapsed().as_secs_f64()
        };
        once();
        let start = Instant::now();
        let mut times = Vec::new();
        while times.len() < 5 || start.elapsed() < Duration::from_millis(200) {
            times.push(once());
        }
        times.sort_by(f64::total_cmp);
        times
    }
}

/// The best of the rates seen in `total` (and at least three calls) of a call that does `amount` of work.
fn best_rate(amount: f64, total: Duration, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    let mut calls = 0;
    while calls < 3 || start.elapsed() < total {
        let begin = Instant::now();
        call();
        best = best.min(begin.elapsed().as_secs_f64());
        calls += 1;
    }
    amount / best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::CodeBits;
    use crate::isa::{Isa, forced};

    #[test]
    fn features_tell_what_is_forced() {
        for isa in Isa::ALL {
            if let Some(features) = forced::with(isa, cpu_features) {
                assert_eq!(features.used, isa.name());
                assert_eq!(features.detected, isa::detected().name());
            }
        }
    }

    #[test]
    fn a_rate_is_work_over_the_best_time() {
        let mut calls = 0;
        let rate = best_rate(10.0, Duration::ZERO, || {
            calls += 1;
            std::thread::sleep(Duration::from_millis(if calls == 2 { 5 } else { 40 }));
        });
        assert_eq!(calls, 3);
        assert!((1.0..=10.0 / 0.005).contains(&rate), "{rate}");
        assert!(rate > 10.0 / 0.040, "the best of three, not their mean: {rate}");
    }

    #[test]
    fn every_value_is_read() {
        let x: Vec<f32> = (0..1024).map(|i| i as f32).collect();
        for (isa, sum) in forced::under_each(|| sum(&x)) {
            assert_eq!(sum, (1023 * 512) as f32, "{isa:?}");
        }
    }

    #[test]
    fn cold_weights_are_more_than_caches_hold() {
        let quantised = Some(Quantisation::new(CodeBits::Eight, 32));
        for quantisation in [None, quantised] {
            let cold = Product { m: 1, cold: true }.matrices((2048, 4096), Precision::Bf16, quantisation);
            let bytes: usize = cold.iter().map(PackedMatrix::bytes).sum();
            assert!(bytes >= COLD_BYTES && bytes - COLD_BYTES < cold[0].bytes(), "{bytes}");
        }
        let warm = Product { m: 3, cold: false };
        let weights = warm.matrices((32, 64), Precision::F32, None);
        let times = warm.times(&Threads::single(), &weights);
        assert!(weights.len() == 1 && times.len() >= 5 && times.is_sorted(), "{times:?}");
    }
}
