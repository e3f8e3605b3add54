//! The kernels on matrix tiles (AMX), by inline assembly (the intrinsics are not stable).
//!
//! tmm0–3 are C tiles, tmm4 is Q, tmm5 P, tmm6 K `[16 pairs of dimensions][16 keys]`, tmm7 V `[8 pairs of keys][16 dimensions]`.

use super::super::CHUNK_PAGES;
use super::kernel::{MOST_TILES, Outputs, Scores};
use std::arch::asm;

/// Kernels of scores against 1, 2, 3 and 4 pages.
///
/// # Safety
/// Of each: AMX is granted and configured as above; the pointers are to as many tiles as the kernel reads and writes.
pub(super) const SCORES: [unsafe fn(&Scores); CHUNK_PAGES] = [scores_1, scores_2, scores_3, scores_4];

/// Kernels of 1, 2, 3 and 4 output tiles.
///
/// # Safety
/// As of [`SCORES`].
pub(super) const OUTPUT: [unsafe fn(&Outputs); MOST_TILES] = [output_1, output_2, output_3, output_4];

macro_rules! scores {
    ($name:ident, $(($c:literal, $k:literal)),*) => {
        /// # Safety
        /// As [`SCORES`] says.
        unsafe fn $name(o: &Scores) {
            // SAFETY: the caller's promise; every register written is declared.
            unsafe {
                asm!(
                    $(concat!("tilezero tmm", $c),)*
                    "2:",
                    "tileloadd tmm4, [{q} + {s}*1]",
                    $(
                        concat!("tileloadd tmm6, [{k", $k, "} + {s}*1]"),
                        concat!("tdpbf16ps tmm", $c, ", tmm4, tmm6"),
                        concat!("add {k", $k, "}, 1024"),
                    )*
                    "add {q}, {tile}",
                    "dec {count}",
                    "jnz 2b",
                    $(
                        concat!("tilestored [{c} + {s}*1], tmm", $c),
                        "add {c}, {tile}",
                    )*
                    "/* {k0} {k1} {k2} {k3} */",
                    q = inout(reg) o.q => _,
                    k0 = inout(reg) o.keys[0] => _,
                    k1 = inout(reg) o.keys[1] => _,
                    k2 = inout(reg) o.keys[2] => _,
                    k3 = inout(reg) o.keys[3] => _,
                    count = inout(reg) o.k_tiles => _,
                    c = inout(reg) o.c => _,
                    tile = in(reg) o.tile_bytes,
                    s = in(reg) 64usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm6") _,
                    options(nostack),
                );
            }
        }
    };
}

scores!(scores_1, ("0", "0"));
scores!(scores_2, ("0", "0"), ("1", "1"));
scores!(scores_3, ("0", "0"), ("1", "1"), ("2", "2"));
scores!(scores_4, ("0", "0"), ("1", "1"), ("2", "2"), ("3", "3"));

macro_rules! output {
    ($name:ident, $(($c:literal, $at:literal)),*) => {
        /// # Safety
        /// As [`SCORES`] says.
        unsafe fn $name(o: &Outputs) {
            // SAFETY: the caller's promise; every register written is declared.
            unsafe {
                asm!(
                    $(concat!("tilezero tmm", $c),)*
                    "2:",
                    "mov {v}, [{values}]",
                    "add {v}, {offset}",
                    "tileloadd tmm5, [{p} + {row}*1]",
                    $(
                        concat!("tileloadd tmm7, [{v} + {stride}*1 + ", $at, "]"),
                        concat!("tdpbf16ps tmm", $c, ", tmm5, tmm7"),
                    )*
                    "add {p}, 32",
                    "add {values}, 8",
                    "dec {count}",
                    "jnz 2b",
                    $(
                        concat!("tilestored [{c} + {s}*1], tmm", $c),
                        "add {c}, {tile}",
                    )*
                    p = inout(reg) o.p => _,
                    v = out(reg) _,
                    values = inout(reg) o.values => _,
                    offset = in(reg) o.offset,
                    stride = in(reg) o.stride,
                    count = inout(reg) o.pages => _,
                    c = inout(reg) o.c => _,
                    tile = in(reg) o.tile_bytes,
                    s = in(reg) 64usize,
                    row = in(reg) super::P_ROW_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm5") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

output!(output_1, ("0", "0"));
output!(output_2, ("0", "0"), ("1", "64"));
output!(output_3, ("0", "0"), ("1", "64"), ("2", "128"));
output!(output_4, ("0", "0"), ("1", "64"), ("2", "128"), ("3", "192"));
