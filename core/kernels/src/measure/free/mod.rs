//! Kernels of other orders than ours, some free of all rules, for `measure::price` alone.
//!
//! ```text
//!   product    few rows by dot instructions, several sums over k; k shared out to threads; experts added up as they are done
//!   rows       norms with several sums, or in bf16; log-sum-exp and router with a shorter e^x, the vocabulary cut for threads
//!   attention  decoding with pages shared out to threads, four at a time, no rescaling between them
//! ```
//!
//! They need AVX-512 with BF16, take the weights as they are packed, and are right within a tolerance, not to the bit. No model
//! computes with them.

mod attention;
mod product;
mod rows;

pub(super) use attention::{Cell, Decode, can_decode};
pub(super) use product::{Add, Products, product_f32};
pub(super) use rows::{norm_bf16, norm_f32, row_stats, softmax_top_k, to_bf16};

use crate::isa;
use std::arch::x86_64::{
    __m512, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_roundscale_ps,
    _mm512_scalef_ps, _mm512_set1_ps,
};

/// Whether this machine has what they need, and uses it.
pub(super) fn available() -> bool {
    isa::current().has_tiles()
}

/// e^x within about 1e-6 for x from −87 to 88; below, about e^−87.
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    let x = _mm512_max_ps(x, _mm512_set1_ps(-87.0));
    let n = _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(std::f32::consts::LN_2), x);
    let mut p = _mm512_set1_ps(1.0 / 120.0);
    for c in [1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// Every door of these kernels passes here.
///
/// # Panics
/// When this machine lacks them.
fn check() {
    assert!(isa::detected().has_tiles(), "these kernels need AVX-512 with BF16");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::arch::x86_64::{_mm512_loadu_ps, _mm512_storeu_ps};

    #[test]
    fn exp_is_near() {
        if !available() {
            return eprintln!("skipped: no AVX-512 with BF16");
        }
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let mut out = [x; 16];
            // SAFETY: the instructions were detected; both pointers are to sixteen values.
            unsafe {
                let x = _mm512_loadu_ps(out.as_ptr());
                _mm512_storeu_ps(out.as_mut_ptr(), exp(x));
            }
            let want = f64::from(x).exp();
            assert!((f64::from(out[0]) - want).abs() <= 4e-6 * want, "{x}: {} for {want}", out[0]);
        }
    }
}
