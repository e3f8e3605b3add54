//! What the arithmetic units reach on registers alone.

use super::best_rate;
use crate::Threads;
use crate::gemm::Precision;
use crate::isa;
use crate::simd::{LANES, simd};
use std::time::Duration;

/// Steps of one call: a millisecond or two.
const STEPS: usize = 1 << 17;
/// Chains of multiply-adds under way at once: what two units of four steps each need.
const CHAINS: usize = 8;

/// Operations a second (a multiply-add counts two) that all threads reach together with operands in registers: AMX tiles of
/// bf16 or dot products of its pairs where the kernels use them, multiply-adds of f32 otherwise (bf16 is then computed so too).
pub fn peak_flops(threads: &Threads, precision: Precision) -> f64 {
    let (of_call, call): (usize, fn()) = match (precision, isa::current()) {
        #[cfg(target_arch = "x86_64")]
        (Precision::Bf16, isa::Isa::Amx) => (STEPS * amx::FLOPS, || amx::multiply(STEPS)),
        #[cfg(target_arch = "x86_64")]
        (Precision::Bf16, isa::Isa::Avx512Bf16) => (STEPS * PAIR_CHAINS * LANES * 4, || {
            // SAFETY: `isa` found AVX512-BF16.
            std::hint::black_box(unsafe { pairs(STEPS, std::hint::black_box(0)) });
        }),
        _ => (STEPS * CHAINS * LANES * 2, || {
            std::hint::black_box(fused(STEPS, std::hint::black_box(0.5)));
        }),
    };
    let parts = threads.count();
    best_rate((parts * of_call) as f64, Duration::from_millis(200), || threads.for_each(parts, &|_| call()))
}

simd! {
    /// `steps` fused multiply-adds on each of [`CHAINS`] registers.
    fn fused<S>(steps: usize, a: f32) -> f32 {
        let (a, mut chains) = (S::splat(a), [S::splat(1.0); CHAINS]);
        for _ in 0..steps {
            for chain in &mut chains {
                *chain = a.fma(*chain, a);
            }
        }
        chains.iter().map(|chain| chain.sum()).sum()
    }
}

/// Chains of dot products under way at once: what two units of six steps each need.
#[cfg(target_arch = "x86_64")]
const PAIR_CHAINS: usize = 12;

/// `steps` dot products of pairs on each of [`PAIR_CHAINS`] registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(steps: usize, pair: i32) -> f32 {
    use std::arch::x86_64::*;
    let (pair, mut chains) = (_mm512_set1_epi32(pair), [_mm512_setzero_ps(); PAIR_CHAINS]);
    for _ in 0..steps {
        for chain in &mut chains {
            *chain = crate::dots::dot(*chain, pair, pair);
        }
    }
    chains.iter().map(|&chain| _mm512_reduce_add_ps(chain)).sum()
}

#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::asm;

    /// Operations of a step: four products of 16×32 and 32×16.
    pub(super) const FLOPS: usize = 4 * 2 * 16 * 16 * 32;

    /// The operand of LDTILECFG: palette 1, all eight tiles of sixteen rows of 64 bytes.
    #[repr(C, align(64))]
    struct TileConfig {
        head: [u8; 16],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    const _: () = assert!(size_of::<TileConfig>() == 64);

    static CONFIG: TileConfig = TileConfig {
        head: [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// `steps` times four products of tiles of zeros, which take as long as any others.
    pub(super) fn multiply(steps: usize) {
        assert!(steps > 0, "a loop of no steps would not end");
        // SAFETY: reached only where `isa` found AMX and was granted its state; the configuration is valid and 64 bytes
        // long; every register written is declared, and the tiles are released at the end.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {count}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &raw const CONFIG,
                count = inout(reg) steps => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::forced;
    use crate::measure::Product;

    #[test]
    fn every_step_is_computed() {
        // x ← 0.5·x + 0.5 keeps 1 in every lane of every chain.
        for (isa, sum) in forced::under_each(|| fused(1000, 0.5)) {
            assert_eq!(sum, (CHAINS * LANES) as f32, "{isa:?}");
        }
        for (isa, sum) in forced::under_each(|| fused(2, 2.0)) {
            // 1 → 4 → 10
            assert_eq!(sum, (10 * CHAINS * LANES) as f32, "{isa:?}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_pair_is_added() {
        if !isa::detected().has_tiles() {
            return eprintln!("skipped: no AVX-512 with BF16");
        }
        // 2 · 2 + 3 · 3 in each lane, each step.
        // SAFETY: detected.
        let sum = unsafe { pairs(10, 0x4000_4040) };
        assert_eq!(sum, (13 * 10 * PAIR_CHAINS * LANES) as f32);
    }

    #[test]
    fn a_peak_is_above_a_products_rate() {
        let threads = Threads::single();
        for precision in [Precision::F32, Precision::Bf16] {
            let product = Product { m: 64, cold: false };
            let weights = product.matrices((256, 256), precision, None);
            let rate = 2.0 * (64 * 256 * 256) as f64 / product.times(&threads, &weights)[0];
            let peak = peak_flops(&threads, precision);
            // Both are the best of many, on a machine that others use too: only a wrong count is this far off.
            assert!(rate <= 2.0 * peak && peak <= 200.0 * rate, "{precision:?}: {rate:e} of {peak:e}");
        }
    }
}
