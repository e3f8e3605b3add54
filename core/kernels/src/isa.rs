//! Which instruction sets this processor has: found once, remembered, never asked in an inner loop.
//!
//! `FREEWHEEL_KERNELS=portable|avx2|avx512|avx512bf16|amx`, on aarch64 `portable|neon`, lowers the choice (never raises it), to
//! check on one machine what others would give. Any other value is ignored; `measure::cpu_features` tells what is in use.
//!
//! All give the same bits but `avx512bf16`, whose products of bf16 have an order of their own (`gemm`): machines that have
//! it compute with those without it, to the bit, under `FREEWHEEL_KERNELS=avx512`.

use std::sync::OnceLock;

/// An instruction set that the kernels are written for, in rising order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    /// Plain Rust: any processor.
    Portable,
    /// NEON: any aarch64.
    Neon,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, VL, DQ.
    Avx512,
    /// AVX-512 with BF16, whose dot products of pairs this is about, and VBMI.
    Avx512Bf16,
    /// These, and AMX bf16 tiles, which the operating system has allowed us.
    Amx,
}

impl Isa {
    /// Every instruction set, in rising order.
    pub(crate) const ALL: [Isa; 6] =
        [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    /// Whether this architecture has it at all: those of others stand in the same order.
    fn is_native(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Neon => cfg!(target_arch = "aarch64"),
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => cfg!(target_arch = "x86_64"),
        }
    }

    /// Whether products of bf16 go through tiles: those of AMX, or lines of them by dot products.
    pub(crate) fn has_tiles(self) -> bool {
        self >= Isa::Avx512Bf16
    }

    /// Whether products of bf16 have the order of pairs, not that of the tile instruction (`gemm`).
    pub(crate) fn adds_pairs(self) -> bool {
        self == Isa::Avx512Bf16
    }

    /// The name used by `FREEWHEEL_KERNELS` and in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        }
    }
}

/// The best instruction set that the processor and the operating system allow.
pub(crate) fn detected() -> Isa {
    static DETECTED: OnceLock<Isa> = OnceLock::new();
    *DETECTED.get_or_init(detect)
}

/// The instruction set that dispatching uses: the detected one, or a lower one asked for by the environment.
#[inline]
pub(crate) fn current() -> Isa {
    #[cfg(test)]
    if let Some(isa) = forced::get() {
        return isa;
    }
    static CURRENT: OnceLock<Isa> = OnceLock::new();
    *CURRENT.get_or_init(|| {
        let wanted = std::env::var("FREEWHEEL_KERNELS").unwrap_or_default();
        let asked = Isa::ALL.into_iter().find(|isa| isa.is_native() && isa.name() == wanted.trim());
        asked.map_or(detected(), |asked| asked.min(detected()))
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    // Every aarch64 that std is made for has NEON, which `simd::neon` asserts.
    if cfg!(target_arch = "aarch64") { Isa::Neon } else { Isa::Portable }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("fma")) {
        return Isa::Portable;
    }
    if !(has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq")) {
        return Isa::Avx2;
    }
    if !(has!("avx512bf16") && has!("avx512vbmi")) {
        return Isa::Avx512;
    }
    if amx_allowed() { Isa::Amx } else { Isa::Avx512Bf16 }
}

/// Processor has AMX tiles with bf16, and Linux grants their state to this process.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_allowed() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(0).eax < 7 {
        return false;
    }
    let leaf = __cpuid_count(7, 0);
    let (tile, bf16) = (leaf.edx >> 24 & 1 == 1, leaf.edx >> 22 & 1 == 1);
    let os_saves_extended_state = __cpuid(1).ecx >> 27 & 1 == 1;
    if !(tile && bf16 && os_saves_extended_state) {
        return false;
    }
    let (low, _high): (u32, u32);
    // SAFETY: XGETBV with ECX = 0 only reads XCR0; OSXSAVE was checked above, so the instruction exists.
    unsafe {
        std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _high, options(nomem, nostack));
    }
    if low >> 17 & 0b11 != 0b11 {
        return false;
    }
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: a system call that takes two integers and only changes this process's permission to use tile data;
    // rcx and r11 are declared as clobbered, as the system-call convention says.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx_allowed() -> bool {
    false
}

/// Tests run one operation under each instruction set, on the thread that asks for it.
#[cfg(test)]
pub(crate) mod forced {
    use super::Isa;
    use std::cell::Cell;

    thread_local!(static FORCED: Cell<Option<Isa>> = const { Cell::new(None) });

    pub(super) fn get() -> Option<Isa> {
        FORCED.get()
    }

    /// Runs `f` under `isa` on this thread; `None` where this machine lacks it.
    pub(crate) fn with<R>(isa: Isa, f: impl FnOnce() -> R) -> Option<R> {
        if !isa.is_native() || isa > super::detected() {
            eprintln!("skipped: this machine has no {}", isa.name());
            return None;
        }
        let before = FORCED.replace(Some(isa));
        let result = f();
        FORCED.set(before);
        Some(result)
    }

    /// Runs `f` under every instruction set of this machine and returns the results, portable first.
    pub(crate) fn under_each<R>(mut f: impl FnMut() -> R) -> Vec<(Isa, R)> {
        Isa::ALL.into_iter().filter_map(|isa| with(isa, &mut f).map(|r| (isa, r))).collect()
    }
}
