//! The kernels on matrix tiles (AMX), by inline assembly (the intrinsics are not stable).
//!
//! ```text
//!   C tile += A tile · B tile, k ascending: 2×2 tiles in registers; 1×4 where there is one row of tiles
//! ```
//!
//! What is used again soon should stay in the first-level cache: B where several rows of tiles pass by it, A where there is
//! one row. The other of the two is loaded with the instruction's hint that it streams.

use super::super::pack::Line;
use super::TILE_LINES;
use super::kernel::{Kernel, Kernels, Operands};
use crate::amx::{self, TileConfig};
use std::arch::asm;

/// Those for so many panels.
pub(super) fn kernels<const PANELS: usize>(passes: Option<usize>) -> Kernels {
    let (pair, single, asks): (Kernel, Kernel, usize) = match (PANELS, passes) {
        (1, _) => (kernel_2x1, kernel_1x1, 0),
        (2, None) => (kernel_2x2, kernel_1x2, 0),
        (2, Some(0..=1)) => (kernel_2x2_asks_16, kernel_1x2, 16),
        (2, Some(2..=3)) => (kernel_2x2_asks_8, kernel_1x2, 8),
        (2, Some(4..=7)) => (kernel_2x2_asks_4, kernel_1x2, 4),
        (2, Some(_)) => (kernel_2x2_asks_2, kernel_1x2, 2),
        _ => (kernel_1x4, kernel_1x4, 0),
    };
    Kernels { pair, single, asks }
}

/// Asks for the tile of a panel that is used two tiles later.
macro_rules! ask {
    ($b:literal) => {
        ask!($b, 2048, 2112, 2176, 2240, 2304, 2368, 2432, 2496, 2560, 2624, 2688, 2752, 2816, 2880, 2944, 3008)
    };
    ($b:literal, $($at:literal),*) => {
        concat!($("prefetcht0 [{", $b, "} + ", $at, "]\n"),*)
    };
}

/// Asks for lines of tiles of the panels to come, into the second-level cache.
macro_rules! ask_next {
    ($($at:literal),*) => {
        concat!($("prefetcht1 [{b2} + ", $at, "]\nprefetcht1 [{b3} + ", $at, "]\n"),*)
    };
}

/// Asks for the lines of a row that C tiles go to, to be written: another core's cache may have them.
macro_rules! ask_out {
    () => {
        "prefetchw [{out}]\nprefetchw [{out} + 64]\nadd {out}, {stride}\n"
    };
}

/// Defines a kernel: tmm0–3 are C tiles, tmm4–7 A and B tiles.
macro_rules! kernel {
    ($name:ident, zero: [$($zero:expr),*], load: [$($load:expr),*], step: [$($step:expr),*], store: [$($store:expr),*]) => {
        /// # Safety
        /// As [`Kernel`] says.
        unsafe fn $name(o: &Operands) {
            // SAFETY: the caller's promise; every register written is declared.
            unsafe {
                asm!(
                    "test {go_on}, {go_on}",
                    "jnz 3f",
                    $($zero,)*
                    "jmp 2f",
                    "3:",
                    $($load,)*
                    "2:",
                    $($step,)*
                    "add {a0}, 1024",
                    "add {a1}, 1024",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "add {b2}, 1024",
                    "add {b3}, 1024",
                    "// {out} {stride}: of some kernels",
                    "dec {count}",
                    "jnz 2b",
                    $($store,)*
                    a0 = inout(reg) o.a => _,
                    a1 = inout(reg) o.a.wrapping_add(o.a_lines) => _,
                    b0 = inout(reg) o.b[0] => _,
                    b1 = inout(reg) o.b[1] => _,
                    b2 = inout(reg) o.b[2] => _,
                    b3 = inout(reg) o.b[3] => _,
                    count = inout(reg) o.k_tiles => _,
                    s = in(reg) size_of::<Line>(),
                    c = in(reg) o.c,
                    go_on = in(reg) usize::from(o.go_on),
                    out = inout(reg) o.out => _,
                    stride = in(reg) o.out_stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

/// Defines a kernel of 2×2 tiles that in each step asks for lines of the output and for lines of the panels to come.
macro_rules! kernel_2x2 {
    ($name:ident, $out:expr, $first:expr, $second:expr) => {
        kernel!($name,
            zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
            load: [
                "tileloadd tmm0, [{c} + {s}*1]", "tileloadd tmm1, [{c} + {s}*1 + 1024]",
                "tileloadd tmm2, [{c} + {s}*1 + 2048]", "tileloadd tmm3, [{c} + {s}*1 + 3072]"
            ],
            step: [
                "tileloadd tmm6, [{b0} + {s}*1]",
                "tileloaddt1 tmm4, [{a0} + {s}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                $first,
                $out,
                "tileloadd tmm7, [{b1} + {s}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloaddt1 tmm5, [{a1} + {s}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                $second,
                $out,
                "tdpbf16ps tmm3, tmm5, tmm7"
            ],
            store: [
                "tilestored [{c} + {s}*1], tmm0", "tilestored [{c} + {s}*1 + 1024], tmm1",
                "tilestored [{c} + {s}*1 + 2048], tmm2", "tilestored [{c} + {s}*1 + 3072], tmm3"
            ]
        );
    };
}

kernel_2x2!(kernel_2x2, "", "", "");
kernel_2x2!(kernel_2x2_asks_2, ask_out!(), ask_next!(0), ask_next!(64));
kernel_2x2!(kernel_2x2_asks_4, ask_out!(), ask_next!(0, 64), ask_next!(128, 192));
kernel_2x2!(kernel_2x2_asks_8, ask_out!(), ask_next!(0, 64, 128, 192), ask_next!(256, 320, 384, 448));
kernel_2x2!(
    kernel_2x2_asks_16,
    "",
    ask_next!(0, 64, 128, 192, 256, 320, 384, 448),
    ask_next!(512, 576, 640, 704, 768, 832, 896, 960)
);

kernel!(kernel_2x1,
    zero: ["tilezero tmm0", "tilezero tmm1"],
    load: ["tileloadd tmm0, [{c} + {s}*1]", "tileloadd tmm1, [{c} + {s}*1 + 1024]"],
    step: [
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tileloaddt1 tmm4, [{a0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloaddt1 tmm5, [{a1} + {s}*1]",
        "tdpbf16ps tmm1, tmm5, tmm6"
    ],
    store: ["tilestored [{c} + {s}*1], tmm0", "tilestored [{c} + {s}*1 + 1024], tmm1"]
);

kernel!(kernel_1x4,
    zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    load: [
        "tileloadd tmm0, [{c} + {s}*1]", "tileloadd tmm1, [{c} + {s}*1 + 1024]",
        "tileloadd tmm2, [{c} + {s}*1 + 2048]", "tileloadd tmm3, [{c} + {s}*1 + 3072]"
    ],
    step: [
        "tileloadd tmm4, [{a0} + {s}*1]",
        ask!("b0"),
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        ask!("b1"),
        "tileloadd tmm7, [{b1} + {s}*1]",
        "tdpbf16ps tmm1, tmm4, tmm7",
        ask!("b2"),
        "tileloadd tmm5, [{b2} + {s}*1]",
        "tdpbf16ps tmm2, tmm4, tmm5",
        ask!("b3"),
        "tileloadd tmm6, [{b3} + {s}*1]",
        "tdpbf16ps tmm3, tmm4, tmm6"
    ],
    store: [
        "tilestored [{c} + {s}*1], tmm0", "tilestored [{c} + {s}*1 + 1024], tmm1",
        "tilestored [{c} + {s}*1 + 2048], tmm2", "tilestored [{c} + {s}*1 + 3072], tmm3"
    ]
);

kernel!(kernel_1x2,
    zero: ["tilezero tmm0", "tilezero tmm1"],
    load: ["tileloadd tmm0, [{c} + {s}*1]", "tileloadd tmm1, [{c} + {s}*1 + 1024]"],
    step: [
        "tileloadd tmm4, [{a0} + {s}*1]",
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm7, [{b1} + {s}*1]",
        "tdpbf16ps tmm1, tmm4, tmm7"
    ],
    store: ["tilestored [{c} + {s}*1], tmm0", "tilestored [{c} + {s}*1 + 1024], tmm1"]
);

kernel!(kernel_1x1,
    zero: ["tilezero tmm0"],
    load: ["tileloadd tmm0, [{c} + {s}*1]"],
    step: [
        "tileloadd tmm4, [{a0} + {s}*1]",
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6"
    ],
    store: ["tilestored [{c} + {s}*1], tmm0"]
);

const _: () = assert!(size_of::<Line>() * TILE_LINES == 1024);

static CONFIG: TileConfig = TileConfig::new([(16, 64); 8]);

/// # Safety
/// AMX is granted to this process.
pub(super) unsafe fn configure() {
    // SAFETY: the caller's promise.
    unsafe { amx::configure(&CONFIG) };
}

pub(super) use amx::release;
