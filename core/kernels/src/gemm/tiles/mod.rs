//! The bf16 kernels on tiles: by AMX, or by AVX512-BF16's dot products of pairs.
//!
//! ```text
//!   x  ──round──►  A tiles [m/16][k/32][16 rows][32]     1 KiB each, one after the other along k
//!   W  (packed) =  B tiles [n/16][k/32][16 pairs][16][2]
//!
//!   task: a run of panels × a block of rows (A of it: second-level cache)
//!     for two panels (four where there is one row of tiles)
//!       for a block of k (B of it: first-level cache; quantised panels are unfolded here)
//!         for two rows of tiles: C += A · B in registers, kept aside between blocks of k
//! ```
//!
//! The blocks change no sum's order: each C tile goes through k ascending.
//!
//! Rows of A past m hold whatever an earlier call left there: row i of a C tile reads row i of A only, and the rows
//! past m are not copied out.

mod amx;
mod codes;
mod dots;
mod kernel;
mod put;
mod round;
mod unfold;

use super::pack::{Element, LINES_AT_ONCE, Line, Precision, transpose_lines};
use super::tile::{Gate, Matrix, Output, TileRows};
use super::{Group, PackedMatrix, few};
use crate::simd::{LANES, simd};
use crate::isa::{self, Isa};
use crate::{Pages, Threads};
use codes::Codes;
use kernel::{Kernels, MOST_PANELS, Operands};
use std::arch::x86_64::_mm_sfence;
use std::cell::RefCell;
use std::ops::Range;
use std::thread::LocalKey;

pub(super) use round::{columns_to_lines, put_rounded};

/// Rows (and columns) of a tile.
const TILE: usize = 16;
/// Values of k in a tile.
const TILE_K: usize = 32;
/// Lines of a tile.
const TILE_LINES: usize = 16;
/// Bytes of A tiles that are gone through before the next panels: what a second-level cache holds beside B.
const A_BLOCK_BYTES: usize = 1 << 20;
/// B tiles of a block of k, in all its panels: what a first-level cache holds beside C.
const B_BLOCK_TILES: usize = 40;
/// The same where the tiles are unfolded from codes.
const UNFOLDED_TILES: usize = 32;
/// Multiply-adds, padding counted, that are worth sharing out: some microseconds where weights come from memory.
const MIN_WORK: usize = 1 << 18;

#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    c: Vec<Line>,
    unfolded: Vec<Line>,
}

type Tiles = LocalKey<RefCell<Pages<Line>>>;

thread_local! {
    static A_TILES: RefCell<Pages<Line>> = RefCell::new(Pages::new());
    static ACT_TILES: RefCell<Pages<Line>> = RefCell::new(Pages::new());
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Computes the products of each group's rows of `x [m,k]` with its weight into the same rows of `out`.
pub(super) fn product(threads: &Threads, x: &[f32], k: usize, groups: &[Group], out: &Output) {
    with_rows(threads, x, k, groups, |a| multiply(threads, &parts(a, groups, out)));
}

/// Computes `down(act(gate) · up)` for each group's rows of `x [m,k]` into the same rows of `out`; `gate_up` and `down` have one
/// group after the other in common. What is between the two is rounded as it leaves the first and never a matrix.
pub(super) fn mlp(
    threads: &Threads,
    x: &[f32],
    gate_up: &[Group],
    (gate, kept): (Gate, Option<Matrix>),
    down: &[Group],
    out: &Output,
) {
    let (k, width) = (gate_up[0].w.inner(), down[0].w.inner());
    with_rows(threads, x, k, gate_up, |a| {
        with_tiles(&ACT_TILES, tile_rows(gate_up).count(), width, |act| {
            if !width.is_multiple_of(TILE_K) {
                // The last tile's other half.
                act.fill(Line([0; LANES]));
            }
            let to = TileRows::new(act, lines_of_row(width) * 2 * LANES);
            multiply(threads, &parts(a, gate_up, &Output::gated(gate, kept, to)));
            multiply(threads, &parts(act, down, out));
        });
    });
}

/// The rows of each row of tiles: each group begins a new one.
fn tile_rows(groups: &[Group]) -> impl Iterator<Item = Range<usize>> {
    let of_group =
        |rows: Range<usize>| rows.clone().step_by(TILE).map(move |row| row..rows.end.min(row + TILE));
    groups.iter().flat_map(move |group| of_group(group.rows.clone()))
}

/// Calls `f` with the rows of the groups in A tiles.
fn with_rows(threads: &Threads, x: &[f32], k: usize, groups: &[Group], f: impl FnOnce(&[Line])) {
    let rows: Vec<_> = tile_rows(groups).collect();
    with_tiles(&A_TILES, rows.len(), k, |a| {
        let lines = lines_of_row(k).max(1);
        threads.for_each_row_chunk(a, lines, (1 << 14) / (TILE * k.max(1)) + 1, |first, block| {
            for (rows, tiles) in rows[first..].iter().zip(block.chunks_exact_mut(lines)) {
                round::rows_to_tiles(&x[rows.start * k..rows.end * k], k, tiles);
            }
        });
        f(a);
    });
}

/// The products of groups whose rows are the tiles `a`.
fn parts<'a>(a: &'a [Line], groups: &[Group<'a>], out: &Output) -> Vec<Part<'a>> {
    let (mut first_tile_row, on_amx) = (0, isa::current() == Isa::Amx);
    let part = |group: &Group<'a>| {
        let (m, lines) = (group.rows.len(), lines_of_row(group.w.inner()));
        let tile_rows = first_tile_row..first_tile_row + m.div_ceil(TILE);
        first_tile_row = tile_rows.end;
        let a = &a[tile_rows.start * lines..tile_rows.end * lines];
        let few = few::may_take(m, group.w) && few::plain_tiles(a, m);
        Part { a, w: group.w, m, on_amx, few, out: out.below(group.rows.start, tile_rows.start) }
    };
    groups.iter().map(part).collect()
}

/// Computes the product with the transpose `x_km [k,m]` into `out`.
pub(super) fn product_transposed(threads: &Threads, x_km: &[f32], m: usize, w: &PackedMatrix, out: &Output) {
    if m == 0 || w.rows() == 0 {
        return;
    }
    let k = w.inner();
    with_tiles(&A_TILES, m.div_ceil(TILE), k, |a| {
        let lines = lines_of_row(k).max(1);
        threads.for_each_row_chunk(a, lines, (1 << 15) / (TILE * k.max(1)) + 1, |first, block| {
            // A few rows of the source at a time, across all rows of tiles, so that it is read in long runs.
            for start in (0..lines).step_by(LINES_AT_ONCE) {
                let end = lines.min(start + LINES_AT_ONCE);
                let rows = &x_km[k.min(2 * start) * m..k.min(2 * end) * m];
                for (i, tiles) in block.chunks_exact_mut(lines).enumerate() {
                    let tiles = &mut tiles[start..end];
                    // Lines of pairs of k for sixteen m, as a panel of B has them; transposed, a tile of A.
                    f32::pack_panel_transposed(Precision::Bf16, rows, m, (first + i) * TILE, tiles);
                    transpose_tiles(tiles);
                }
            }
        });
        multiply(threads, &[Part { a, w, m, on_amx: isa::current() == Isa::Amx, few: false, out: *out }]);
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

/// Lines of a row of A tiles, or of a panel of B tiles.
fn lines_of_row(k: usize) -> usize {
    k.div_ceil(TILE_K) * TILE_LINES
}

/// Calls `f` with room for rows of tiles.
fn with_tiles(tiles: &'static Tiles, tile_rows: usize, k: usize, f: impl FnOnce(&mut [Line])) {
    // Taken, not borrowed: what `f` runs on this thread may be a product too.
    let mut room = tiles.take();
    room.reset(tile_rows * lines_of_row(k));
    f(&mut room);
    tiles.set(room);
}

/// A product of rows that share a weight.
struct Part<'a> {
    a: &'a [Line],
    w: &'a PackedMatrix,
    m: usize,
    /// Whether by matrix tiles, or by dot products: said once, by the thread that asks for the product.
    on_amx: bool,
    /// Whether it needs no tiles: `few`.
    few: bool,
    out: Output,
}

impl Part<'_> {
    /// Panels of the output.
    fn panels(&self) -> usize {
        self.w.rows().div_ceil(LANES) / self.per_panel()
    }

    /// Panels of the weight that a panel of the output is made of.
    fn per_panel(&self) -> usize {
        if self.out.gate.is_some() { 2 } else { 1 }
    }

    /// Panels of the output that the kernels take at once.
    fn width(&self) -> usize {
        let of_weight = match (self.few, self.on_amx) {
            (true, _) => few::panels_at_once(self.m),
            (false, true) => MOST_PANELS,
            // Dot products take four as two and two.
            (false, false) => 2,
        };
        if self.m <= TILE { of_weight / self.per_panel() } else { 2 / self.per_panel() }
    }
}

/// Strips of panels of a part's output, in a block of rows (of tiles).
struct Block<'a> {
    part: &'a Part<'a>,
    rows: Range<usize>,
    /// Which of all strips its first one is.
    first: usize,
}

/// Some rows (in tiles) and panels of the output of a part.
struct Task<'a> {
    part: &'a Part<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
}

fn multiply(threads: &Threads, parts: &[Part]) {
    let (mut blocks, mut strips, mut work) = (Vec::new(), 0, 0);
    for part in parts.iter().filter(|part| part.m > 0 && part.w.rows() > 0) {
        let (m_tiles, lines) = (part.m.div_ceil(TILE), lines_of_row(part.w.inner()).max(1));
        let most = (A_BLOCK_BYTES / (lines * size_of::<Line>())).max(2) & !1;
        let block = m_tiles.div_ceil(m_tiles.div_ceil(most)).next_multiple_of(2);
        for rows in (0..m_tiles).step_by(block).map(|row| row..m_tiles.min(row + block)) {
            blocks.push(Block { part, rows, first: strips });
            strips += part.panels().div_ceil(part.width());
        }
        // A line of B meets a line of A in 512 multiply-adds.
        work += m_tiles * part.w.rows().div_ceil(LANES) * lines * 512;
    }
    threads.for_each_chunk(strips, MIN_WORK * strips / work.max(1) + 1, &|taken| {
        let first = blocks.partition_point(|block| block.first <= taken.start) - 1;
        for block in blocks[first..].iter().take_while(|block| block.first < taken.end) {
            block.run(&taken);
        }
    });
}

impl Block<'_> {
    /// What is the block's of some strips.
    fn run(&self, strips: &Range<usize>) {
        let panel =
            |strip: usize| self.part.panels().min(strip.saturating_sub(self.first) * self.part.width());
        let panels = panel(strips.start)..panel(strips.end);
        Task { part: self.part, rows: self.rows.clone(), panels }.run();
    }
}

impl Task<'_> {
    fn run(&self) {
        if self.part.w.inner() == 0 {
            return self.no_inner();
        }
        if self.part.few {
            return self.without_tiles();
        }
        if self.part.on_amx {
            // SAFETY: `isa` found AMX and was granted its state.
            unsafe { amx::configure() };
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let mut j = self.panels.start;
            while j < self.panels.end {
                // In a gated product, the panel of `up` that belongs to one of `gate`.
                let up = j + self.part.panels();
                j += match (self.part.out.gate, self.rows.len(), self.panels.end - j) {
                    (None, 1, 4..) => {
                        self.strip([j, j + 1, j + 2, j + 3], None, scratch);
                        4
                    }
                    (None, _, 2..) => {
                        self.strip([j, j + 1], self.after(j + 2, 1), scratch);
                        2
                    }
                    (None, ..) => {
                        self.strip([j], None, scratch);
                        1
                    }
                    (Some(_), 1, 2..) => {
                        self.strip([j, j + 1, up, up + 1], None, scratch);
                        2
                    }
                    (Some(_), ..) => {
                        self.strip([j, up], self.after(j + 1, up - j), scratch);
                        1
                    }
                };
            }
        });
        if self.part.on_amx {
            // SAFETY: as above.
            unsafe { amx::release() };
        }
        // SAFETY: every x86-64 has it. What was streamed is visible before the task counts as done.
        unsafe { _mm_sfence() };
    }

    /// A product of a few rows.
    fn without_tiles(&self) {
        let Part { a, w, m, out, .. } = self.part;
        SCRATCH.with_borrow_mut(|Scratch { x, .. }| {
            let padded = w.inner().next_multiple_of(TILE_K);
            x.resize(m * padded, 0.0);
            for (row, x) in x.chunks_exact_mut(padded).enumerate() {
                widen(a, row, x);
            }
            few::block(x, *m, w, self.panels.clone(), out);
        });
    }

    /// A product over an empty k is zero.
    fn no_inner(&self) {
        let Part { m, out, .. } = self.part;
        for panel in self.panels.clone() {
            let panels = [panel, panel + self.part.panels()];
            let panels = &panels[..self.part.per_panel()];
            for row in self.rows.clone() {
                let zeros = [Line([0; LANES]); 2 * TILE_LINES];
                put::put_tiles(&zeros[..panels.len() * TILE_LINES], panels, row * TILE, *m, out);
            }
        }
    }

    /// The two panels, `apart` from each other, that this thread will go through once those before `panel` are done: of this
    /// task or, likely, of its next.
    fn after(&self, panel: usize, apart: usize) -> Option<[usize; 2]> {
        let w = self.part.w;
        let exist = panel < self.part.panels() && panel + apart < w.rows().div_ceil(LANES);
        (exist && w.quantisation().is_none()).then_some([panel, panel + apart])
    }

    /// The tiles that a strip of `panels` goes to from tile `tile` of its panel `panel` on: those that follow, or the first of the
    /// panel that it comes to next.
    fn follows(&self, panel: usize, tile: usize, panels: usize) -> Option<*const Line> {
        let Part { w, .. } = self.part;
        if tile < w.inner().div_ceil(TILE_K) {
            return Some(w.panels(panel, 1)[tile * TILE_LINES..].as_ptr());
        }
        let later = panel + panels / self.part.per_panel();
        (later < w.rows().div_ceil(LANES)).then(|| w.scales_and_lines(later).1.as_ptr())
    }

    /// All rows, of one row of tiles, of some panels of codes that need not be unfolded.
    fn strip_of_codes<const PANELS: usize>(&self, panels: [usize; PANELS], scratch: &mut Scratch) {
        let Part { a, w, m, out, .. } = self.part;
        let (row, lines, k_tiles) = (self.rows.start, lines_of_row(w.inner()), w.inner().div_ceil(TILE_K));
        let (codes, b) = Codes::of(w, panels);
        let mut follow = b;
        for (follow, &panel) in follow.iter_mut().zip(&panels) {
            *follow = self.follows(panel, k_tiles, PANELS).unwrap_or(*follow);
        }
        scratch.c.resize((PANELS * TILE_LINES).max(scratch.c.len()), Line([0; LANES]));
        let c = &mut scratch.c[..PANELS * TILE_LINES];
        let rows = TILE.min(m - row * TILE);
        let operands = Operands {
            a: a[row * lines..].as_ptr(),
            a_lines: lines,
            rows,
            b,
            follow,
            before: 0,
            all_rows: rows,
            k_tiles,
            c: c.as_mut_ptr(),
            go_on: false,
            out: std::ptr::null(),
            out_stride: 0,
        };
        // SAFETY: dot products were detected, and the codes can be met; A has that row of tiles, C room for the panels' tiles.
        unsafe { dots::kernel_of_codes::<PANELS>(&operands, codes) };
        put::put_tiles(c, &panels, row * TILE, *m, out);
    }

    /// All rows of some panels of the weight, two rows of tiles at a time. Meanwhile the panels `next` are asked for.
    #[inline(always)]
    fn strip<const PANELS: usize>(
        &self,
        panels: [usize; PANELS],
        next: Option<[usize; 2]>,
        scratch: &mut Scratch,
    ) {
        if !self.part.on_amx && self.rows.len() == 1 && Codes::can_be_met(self.part.w) {
            return self.strip_of_codes(panels, scratch);
        }
        let kernels = Kernels::of::<PANELS>(self.part.on_amx, next.map(|_| self.rows.len() / 2));
        let Part { a, w, m, out, .. } = self.part;
        let (k_tiles, lines) = (w.inner().div_ceil(TILE_K), lines_of_row(w.inner()));
        let quantised = w.quantisation().is_some();
        let most = match (quantised, self.rows.len()) {
            (true, _) => UNFOLDED_TILES / PANELS,
            // B passes by once: nothing is gained by keeping it.
            (false, 1..=2) => k_tiles,
            (false, _) => B_BLOCK_TILES / PANELS,
        };
        let block = k_tiles.div_ceil(k_tiles.div_ceil(most));
        let aside = if block < k_tiles { self.rows.len().div_ceil(2) } else { 1 } * 2 * PANELS * TILE_LINES;
        scratch.c.resize(aside.max(scratch.c.len()), Line([0; LANES]));
        for k in (0..k_tiles).step_by(block) {
            let end = k_tiles.min(k + block);
            let mut b = [std::ptr::null(); MOST_PANELS];
            if quantised {
                let b_lines = (end - k) * TILE_LINES;
                scratch.unfolded.resize(UNFOLDED_TILES.max(PANELS * block) * TILE_LINES, Line([0; LANES]));
                let room = scratch.unfolded.chunks_exact_mut(b_lines);
                for ((b, panel), tiles) in b.iter_mut().zip(panels).zip(room) {
                    unfold::unfold(w, panel, k, tiles);
                    *b = tiles.as_ptr();
                }
            } else {
                for (b, panel) in b.iter_mut().zip(panels) {
                    *b = w.panels(panel, 1)[k * TILE_LINES..].as_ptr();
                }
            }
            for (i, row) in self.rows.clone().step_by(2).enumerate() {
                let two = row + 2 <= self.rows.end;
                let rows = if two { 2 } else { 1 };
                let at = if block < k_tiles { i * 2 * PANELS * TILE_LINES } else { 0 };
                if let Some(next) = next {
                    // The next block of k, or the first of the next panels: in each pass some lines of its tiles.
                    let (asked, tile) =
                        if end < k_tiles { ([panels[0], panels[PANELS - 1]], end) } else { (next, 0) };
                    for (b, panel) in b[2..].iter_mut().zip(asked) {
                        *b = w.panels(panel, 1)[tile * TILE_LINES + i * kernels.asks % TILE_LINES..].as_ptr();
                    }
                }
                let c = &mut scratch.c[at..][..rows * PANELS * TILE_LINES];
                // The lines that the result goes to, unless all rows are these.
                let to = out.cached(row * TILE, panels[0]).filter(|_| end == k_tiles && self.rows.len() > 2);
                let (to, stride) = to.unwrap_or((c.as_ptr().cast(), 0));
                let mut follow = b;
                if !quantised {
                    for (follow, &panel) in follow.iter_mut().zip(&panels) {
                        *follow = self.follows(panel, end, PANELS).unwrap_or(*follow);
                    }
                }
                let operands = Operands {
                    a: a[row * lines..(row + rows) * lines][k * TILE_LINES..].as_ptr(),
                    a_lines: lines,
                    rows: (rows * TILE).min(m - row * TILE),
                    b,
                    follow,
                    before: i * 2 * TILE,
                    all_rows: (self.rows.len() * TILE).min(m - self.rows.start * TILE),
                    k_tiles: end - k,
                    c: c.as_mut_ptr(),
                    go_on: k > 0,
                    out: to,
                    out_stride: stride,
                };
                // SAFETY: the kernels are this machine's, AMX is configured; A has `rows` rows of tiles from `row` on, B `PANELS` panels, both from tile
                // `k` to `end` of each; C has room for their tiles.
                unsafe { if two { (kernels.pair)(&operands) } else { (kernels.single)(&operands) } };
                if end == k_tiles {
                    put::put_tiles(c, &panels, row * TILE, *m, out);
                }
            }
        }
    }
}

simd! {
    /// Row `row` of A tiles, in f32.
    fn widen<S>(a: &[Line], row: usize, x: &mut [f32]) {
        for (tile, x) in a.chunks_exact(TILE_LINES).zip(x.as_chunks_mut::<TILE_K>().0) {
            let halves: &[[u16; LANES]; 2] = bytemuck::cast_ref(&tile[row].0);
            for (half, x) in halves.iter().zip(x.as_chunks_mut::<LANES>().0) {
                S::from_bf16(half).store(x);
            }
        }
    }
}
