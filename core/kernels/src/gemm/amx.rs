//! The bf16 kernel on AMX tiles, by inline assembly (the intrinsics are not stable).
//!
//! ```text
//!   x  ──round──►  A tiles [m/16][k/32][16 rows][32]     1 KiB each, one after the other along k
//!   W  (packed) =  B tiles [n/16][k/32][16 pairs][16][2]
//!   C tile += A tile · B tile, k ascending: 2×2 tiles in registers; 1×4 where m ≤ 16
//! ```
//!
//! Rows of A past m hold whatever an earlier call left there: row i of a C tile reads row i of A only, and the rows
//! past m are not copied out.

use super::PackedMatrix;
use super::pack::{Element, Line, Precision, flush_bf16, transpose_lines};
use super::quant;
use super::tile::{Output, Store};
use crate::Threads;
use crate::convert::bf16_bits;
use crate::simd::{LANES, simd};
use std::arch::asm;
use std::cell::RefCell;
use std::ops::Range;

/// Rows (and columns) of a tile.
const TILE: usize = 16;
/// Values of k in a tile.
const TILE_K: usize = 32;
/// Lines of a tile.
const TILE_LINES: usize = 16;
/// Bytes of A tiles that are gone through before the next panels: what a second-level cache holds beside B.
const A_BLOCK_BYTES: usize = 1 << 20;
/// Multiply-adds a thread should have to be worth waking.
const MIN_WORK_PER_THREAD: usize = 1 << 23;

thread_local!(static A_TILES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) });

/// Computes the product with `x [m,k]` into `out`.
pub(super) fn product(threads: &Threads, x: &[f32], m: usize, w: &PackedMatrix, out: &Output) {
    with_a_tiles(m, w, |a| {
        round_to_tiles(threads, x, m, w.inner(), a);
        multiply(threads, a, m, w, out);
    });
}

/// Computes the product with the transpose `x_km [k,m]` into `out`.
pub(super) fn product_transposed(threads: &Threads, x_km: &[f32], m: usize, w: &PackedMatrix, out: &Output) {
    if m == 0 || w.rows() == 0 {
        return;
    }
    with_a_tiles(m, w, |a| {
        let lines = w.inner().div_ceil(TILE_K) * TILE_LINES;
        threads.for_each_row_chunk(
            a,
            lines.max(1),
            (1 << 15) / (TILE * w.inner().max(1)) + 1,
            |first, block| {
                for (i, tiles) in block.chunks_exact_mut(lines).enumerate() {
                    // Lines of pairs of k for sixteen m, as a panel of B has them; transposed, a tile of A.
                    f32::pack_panel_transposed(Precision::Bf16, x_km, m, (first + i) * TILE, tiles);
                    transpose_tiles(tiles);
                }
            },
        );
        multiply(threads, a, m, w, out);
    });
}

simd! {
    fn transpose_tiles<S>(tiles: &mut [Line]) {
        for tile in tiles.chunks_exact_mut(TILE_LINES) {
            let mut a = [[0; LANES]; LANES];
            for (a, line) in a.iter_mut().zip(tile.iter()) {
                *a = line.0;
            }
            transpose_lines::<S>(&a, tile);
        }
    }
}

/// Calls `f` with room for the A tiles of m rows.
fn with_a_tiles(m: usize, w: &PackedMatrix, f: impl FnOnce(&mut [Line])) {
    // Taken, not borrowed: a pool thread may start another product while it waits in this one.
    let mut a = A_TILES.take();
    let len = m.div_ceil(TILE) * w.inner().div_ceil(TILE_K) * TILE_LINES;
    if a.len() < len {
        a.resize(len, Line([0; LANES]));
    }
    f(&mut a[..len]);
    A_TILES.set(a);
}

fn multiply(threads: &Threads, a: &[Line], m: usize, w: &PackedMatrix, out: &Output) {
    let (m_tiles, k_tiles) = (m.div_ceil(TILE), w.inner().div_ceil(TILE_K));
    let task = Task { a, w, m, k_tiles, out };
    let panels = w.rows().div_ceil(LANES);
    let work_per_tile = (k_tiles * TILE * TILE * TILE_K).max(1);
    if panels >= 8 * threads.count() || panels > m_tiles {
        let min_panels = (MIN_WORK_PER_THREAD / (m_tiles * work_per_tile)).max(4);
        threads.for_each_chunk(panels, min_panels, &|panels| task.run(0..m_tiles, panels));
    } else {
        let min_tiles = (MIN_WORK_PER_THREAD / (panels * work_per_tile)).max(2);
        threads.for_each_chunk(m_tiles, min_tiles, &|tiles| task.run(tiles, 0..panels));
    }
}

/// Rounds `x [m,k]` to bf16 in A tiles.
fn round_to_tiles(threads: &Threads, x: &[f32], m: usize, k: usize, a: &mut [Line]) {
    let lines = k.div_ceil(TILE_K) * TILE_LINES;
    threads.for_each_row_chunk(a, lines.max(1), (1 << 15) / (TILE * k.max(1)) + 1, |first, block| {
        for (i, tiles) in block.chunks_exact_mut(lines).enumerate() {
            let row = (first + i) * TILE;
            round_tile_row(&x[row * k..m.min(row + TILE) * k], k, tiles);
        }
    });
}

simd! {
    /// Rounds up to sixteen rows of x into their tiles.
    fn round_tile_row<S>(x: &[f32], k: usize, tiles: &mut [Line]) {
        for (r, row) in x.chunks_exact(k).enumerate() {
            for (tile, values) in row.chunks(TILE_K).enumerate() {
                let line = &mut tiles[tile * TILE_LINES + r].0;
                let mut full = [0.0; TILE_K];
                let values = match values.as_array::<TILE_K>() {
                    Some(values) => values,
                    None => {
                        full[..values.len()].copy_from_slice(values);
                        &full
                    }
                };
                let line: &mut [u16; TILE_K] = bytemuck::cast_mut(line);
                for (bits, &value) in line.iter_mut().zip(values) {
                    *bits = flush_bf16(bf16_bits(value));
                }
            }
        }
    }
}

struct Task<'a> {
    a: &'a [Line],
    w: &'a PackedMatrix,
    m: usize,
    k_tiles: usize,
    out: &'a Output,
}

impl Task<'_> {
    /// Computes the tiles of `rows` (in tiles) and `panels`.
    fn run(&self, rows: Range<usize>, panels: Range<usize>) {
        if self.k_tiles == 0 {
            return self.no_inner(rows, panels);
        }
        quant::in_full(self.w, panels, &mut |w, panels, first| {
            Task { w, out: &self.out.starting_at(first), ..*self }.run_in_full(rows.clone(), panels);
        });
    }

    fn run_in_full(&self, rows: Range<usize>, panels: Range<usize>) {
        // SAFETY: `product` is reached only where `isa` found AMX and was granted its state.
        unsafe { configure() };
        let block = (A_BLOCK_BYTES / (self.k_tiles * size_of::<Line>() * TILE_LINES)).max(2) & !1;
        for start in rows.clone().step_by(block) {
            let rows = start..rows.end.min(start + block);
            if rows.len() == 1 {
                self.one_row(rows.start, panels.clone());
            } else {
                self.block(rows, panels.clone());
            }
        }
        // SAFETY: as above.
        unsafe { release() };
    }

    /// A product over an empty k is zero.
    fn no_inner(&self, rows: Range<usize>, panels: Range<usize>) {
        for panel in panels {
            for row in rows.start * TILE..self.m.min(rows.end * TILE) {
                if self.out.store == Store::Set {
                    // SAFETY: each tile belongs to one thread.
                    unsafe { self.out.part(row, panel) }.fill(0.0);
                }
            }
        }
    }

    /// One row of tiles: four panels at a time, for A is read once and B streams.
    fn one_row(&self, row: usize, panels: Range<usize>) {
        let mut panel = panels.start;
        while panel < panels.end {
            panel += match panels.end - panel {
                4.. => self.tiles::<1, 4>(row, panel, kernel_1x4),
                2.. => self.tiles::<1, 2>(row, panel, kernel_1x2),
                _ => self.tiles::<1, 1>(row, panel, kernel_1x1),
            };
        }
    }

    fn block(&self, rows: Range<usize>, panels: Range<usize>) {
        let mut panel = panels.start;
        while panel < panels.end {
            let two = panel + 2 <= panels.end;
            let mut row = rows.start;
            while row + 2 <= rows.end {
                if two {
                    self.tiles::<2, 2>(row, panel, kernel_2x2);
                } else {
                    self.tiles::<2, 1>(row, panel, kernel_2x1);
                }
                row += 2;
            }
            if row < rows.end {
                if two {
                    self.tiles::<1, 2>(row, panel, kernel_1x2);
                } else {
                    self.tiles::<1, 1>(row, panel, kernel_1x1);
                }
            }
            panel += if two { 2 } else { 1 };
        }
    }

    /// Computes `ROWS × PANELS` tiles and stores them; returns `PANELS`.
    #[inline(always)]
    fn tiles<const ROWS: usize, const PANELS: usize>(
        &self,
        row: usize,
        panel: usize,
        kernel: Kernel,
    ) -> usize {
        let lines = self.k_tiles * TILE_LINES;
        let a = &self.a[row * lines..(row + ROWS) * lines];
        let b = self.w.panel(panel).as_ptr();
        assert!((panel + PANELS) * LANES <= self.w.rows().next_multiple_of(LANES));
        let n = self.out.n;
        let whole = (row + ROWS) * TILE <= self.m && self.out.column(panel + PANELS) <= n;
        if whole && self.out.store == Store::Set {
            let mut c = [std::ptr::null_mut(); 4];
            for (i, c) in c.iter_mut().enumerate().take(ROWS * PANELS) {
                // SAFETY: each tile belongs to one thread; the last of its sixteen rows is in bounds by `whole`.
                *c = unsafe { self.out.part((row + i / PANELS) * TILE, panel + i % PANELS) }.as_mut_ptr();
            }
            // SAFETY: A and B hold `k_tiles` tiles for each row and panel; C tiles have sixteen rows `n` apart; the
            // tiles are configured by `run`.
            unsafe { kernel(a.as_ptr(), b, self.k_tiles, &c, n * 4) };
            return PANELS;
        }
        let mut buffer = [[Line([0; LANES]); TILE]; 4];
        let c = buffer.each_mut().map(|tile| tile.as_mut_ptr().cast::<f32>());
        // SAFETY: as above; each C tile is a buffer of sixteen lines.
        unsafe { kernel(a.as_ptr(), b, self.k_tiles, &c, size_of::<Line>()) };
        for (i, tile) in buffer.iter().enumerate().take(ROWS * PANELS) {
            let first = (row + i / PANELS) * TILE;
            let rows = TILE.min(self.m.saturating_sub(first));
            put_tile(&tile[..rows], first, panel + i % PANELS, self.out);
        }
        PANELS
    }
}

simd! {
    /// Stores the rows of a C tile.
    fn put_tile<S>(tile: &[Line], row: usize, panel: usize, out: &Output) {
        for (r, line) in tile.iter().enumerate() {
            // SAFETY: each tile belongs to one thread.
            unsafe { out.put(row + r, panel, S::load(bytemuck::cast_ref(&line.0))) };
        }
    }
}

/// `a`: A tiles, rows of `k_tiles`; `b`: B tiles, panels of `k_tiles`; `c`: where each C tile goes, `c_stride` bytes
/// between its rows.
type Kernel = unsafe fn(a: *const Line, b: *const Line, k_tiles: usize, c: &[*mut f32; 4], c_stride: usize);

/// Defines a kernel: tmm0–3 are C tiles, tmm4–5 A tiles, tmm6–7 B tiles.
macro_rules! kernel {
    ($name:ident, zero: [$($zero:literal),*], step: [$($step:literal),*], store: [$($store:literal),*]) => {
        /// # Safety
        /// AMX is granted and configured; the pointers hold what [`Kernel`] says.
        unsafe fn $name(a: *const Line, b: *const Line, k_tiles: usize, c: &[*mut f32; 4], c_stride: usize) {
            // SAFETY: the caller's promise; every register written is declared.
            unsafe {
                asm!(
                    $($zero,)*
                    "lea {b2}, [{b1} + {ld}]",
                    "lea {b3}, [{b2} + {ld}]",
                    "2:",
                    $($step,)*
                    "add {a0}, 1024",
                    "add {a1}, 1024",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "add {b2}, 1024",
                    "add {b3}, 1024",
                    "dec {count}",
                    "jnz 2b",
                    $($store,)*
                    a0 = inout(reg) a => _,
                    a1 = inout(reg) a.wrapping_add(k_tiles * TILE_LINES) => _,
                    b0 = inout(reg) b => _,
                    b1 = inout(reg) b.wrapping_add(k_tiles * TILE_LINES) => _,
                    b2 = out(reg) _,
                    b3 = out(reg) _,
                    ld = in(reg) k_tiles * size_of::<Line>() * TILE_LINES,
                    count = inout(reg) k_tiles => _,
                    s = in(reg) size_of::<Line>(),
                    c = in(reg) c.as_ptr(),
                    cs = in(reg) c_stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

kernel!(kernel_2x2,
    zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    step: [
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tileloadd tmm4, [{a0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm7, [{b1} + {s}*1]",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tileloadd tmm5, [{a1} + {s}*1]",
        "tdpbf16ps tmm2, tmm5, tmm6",
        "tdpbf16ps tmm3, tmm5, tmm7"
    ],
    store: [
        "mov {count}, [{c}]", "tilestored [{count} + {cs}*1], tmm0",
        "mov {count}, [{c} + 8]", "tilestored [{count} + {cs}*1], tmm1",
        "mov {count}, [{c} + 16]", "tilestored [{count} + {cs}*1], tmm2",
        "mov {count}, [{c} + 24]", "tilestored [{count} + {cs}*1], tmm3"
    ]
);

kernel!(kernel_2x1,
    zero: ["tilezero tmm0", "tilezero tmm1"],
    step: [
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tileloadd tmm4, [{a0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm5, [{a1} + {s}*1]",
        "tdpbf16ps tmm1, tmm5, tmm6"
    ],
    store: [
        "mov {count}, [{c}]", "tilestored [{count} + {cs}*1], tmm0",
        "mov {count}, [{c} + 8]", "tilestored [{count} + {cs}*1], tmm1"
    ]
);

kernel!(kernel_1x4,
    zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    step: [
        "tileloadd tmm4, [{a0} + {s}*1]",
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm7, [{b1} + {s}*1]",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tileloadd tmm5, [{b2} + {s}*1]",
        "tdpbf16ps tmm2, tmm4, tmm5",
        "tileloadd tmm6, [{b3} + {s}*1]",
        "tdpbf16ps tmm3, tmm4, tmm6"
    ],
    store: [
        "mov {count}, [{c}]", "tilestored [{count} + {cs}*1], tmm0",
        "mov {count}, [{c} + 8]", "tilestored [{count} + {cs}*1], tmm1",
        "mov {count}, [{c} + 16]", "tilestored [{count} + {cs}*1], tmm2",
        "mov {count}, [{c} + 24]", "tilestored [{count} + {cs}*1], tmm3"
    ]
);

kernel!(kernel_1x2,
    zero: ["tilezero tmm0", "tilezero tmm1"],
    step: [
        "tileloadd tmm4, [{a0} + {s}*1]",
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tileloadd tmm7, [{b1} + {s}*1]",
        "tdpbf16ps tmm1, tmm4, tmm7"
    ],
    store: [
        "mov {count}, [{c}]", "tilestored [{count} + {cs}*1], tmm0",
        "mov {count}, [{c} + 8]", "tilestored [{count} + {cs}*1], tmm1"
    ]
);

kernel!(kernel_1x1,
    zero: ["tilezero tmm0"],
    step: [
        "tileloadd tmm4, [{a0} + {s}*1]",
        "tileloadd tmm6, [{b0} + {s}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6"
    ],
    store: ["mov {count}, [{c}]", "tilestored [{count} + {cs}*1], tmm0"]
);

/// The operand of LDTILECFG: palette 1, all eight tiles of sixteen rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<TileConfig>() == 64);

static CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// # Safety
/// AMX is granted to this process.
unsafe fn configure() {
    // SAFETY: the operand is 64 bytes of a valid configuration; tile registers are this module's own.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
}

/// Returns the tiles to their initial state, so that a switch of threads need not save them.
///
/// # Safety
/// AMX is granted to this process.
unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
