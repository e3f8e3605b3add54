//! What this machine reaches: bytes read a second, products a second, and which instruction sets it has.
//!
//! Numbers for `freewheel bench` and `doctor`; nothing else depends on them.

use crate::gemm::{PackedMatrix, Precision, matmul};
use crate::isa;
use crate::{Threads, optim};
use std::time::{Duration, Instant};

/// Instruction sets, as the kernels use them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuFeatures {
    /// The best that processor and operating system allow: `portable`, `avx2`, `avx512` or `amx`.
    pub detected: &'static str,
    /// The one in use: `detected`, or a lower one asked for by `FREEWHEEL_KERNELS`.
    pub used: &'static str,
}

/// What the kernels found on this machine.
pub fn cpu_features() -> CpuFeatures {
    CpuFeatures { detected: isa::detected().name(), used: isa::current().name() }
}

/// Bytes a second read from memory by all threads together: the best of several passes over 256 MiB.
pub fn read_bandwidth(threads: &Threads) -> f64 {
    let data = vec![1.0f32; 64 << 20];
    let bytes = size_of_val(data.as_slice()) as f64;
    best_rate(bytes, Duration::from_millis(300), || {
        std::hint::black_box(optim::sum_squares(threads, std::hint::black_box(&data)));
    })
}

/// Floating-point operations a second (a multiply-add counts two) of a product of 512×1024×1024 in `precision`.
pub fn peak_flops(threads: &Threads, precision: Precision) -> f64 {
    let (m, n, k) = (512, 1024, 1024);
    let x = vec![0.5f32; m * k];
    let w = PackedMatrix::from_f32(precision, &vec![0.25f32; n * k], n, k);
    let mut out = vec![0.0f32; m * n];
    best_rate(2.0 * (m * n * k) as f64, Duration::from_millis(300), || {
        matmul(threads, &x, m, &w, std::hint::black_box(&mut out));
    })
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
}
