//! Products of a few rows without tiles: weights, or the codes that stand for them, go from memory straight into the sums.
//!
//! A tile has room for sixteen rows. One row in it takes as long as sixteen, and codes have to be unfolded first: both
//! longer than reading the weights. Here a line of sixteen columns becomes f32 lanes and meets a value of each row of x,
//! in the order that the module gives for bf16. A scale of 8 bits is a power of two, which moves no rounding, so the sums
//! of a tile are taken over the codes and scaled once; 4 bits are scaled code by code.
//!
//! ```text
//!   panels a, b, …  ──line after line of each──► even, odd k of a block of 32 ──► sums, a register for each row and panel
//!        └─ asked for ahead: of the same panel, at its end of the one that comes after
//! ```
//!
//! Several panels at a time keep both multipliers at work: a chain over 16 k waits four cycles for each step.
//!
//! That gives the tile instruction's bits as long as nothing is subnormal and nothing overflows on either way. Where values
//! of x, and weights or scales, are zero or from 2^−56 to 2^56 in size, neither can be: with at most 8 bits in a value, or 7
//! in a code beside its scale, every product and every rounded sum, scaled or not, is a multiple of 2^−126 and below 2^127.

use super::PackedMatrix;
use super::pack::Line;
use super::quant::{CodeBits, Quantisation, TILE_K};
use super::tile::{Gate, Matrix, Output};
use crate::activation::{Activate, GeluTanh, Silu};
use crate::isa::{self, Isa};
use crate::simd::{LANES, Lanes, simd};
use std::ops::Range;

/// Bits of 2^−56 and of 2^56.
const LEAST: u32 = (127 - 56) << 23;
const MOST: u32 = (127 + 56) << 23;

/// Lines of each panel that are asked for ahead of their use.
const AHEAD: usize = 32;

/// Whether [`block`] may multiply so many rows by `w`, if they are plain.
pub(super) fn may_take(rows: usize, w: &PackedMatrix) -> bool {
    rows <= most_rows() && w.is_plain()
}

/// The most rows that it is worth for. With more, tiles are as quick, and there are no registers for two panels. Dot products
/// take few rows as they take many.
pub(super) fn most_rows() -> usize {
    match isa::current() {
        Isa::Avx512Bf16 => 0,
        Isa::Avx512 | Isa::Amx => 6,
        _ => 4,
    }
}

simd! {
    /// Whether all values are zero or from 2^−56 to 2^56 in size.
    pub(super) fn plain<S>(x: &[f32]) -> bool {
        let mut plain = true;
        for &x in x {
            let size = x.to_bits() & 0x7fff_ffff;
            plain &= (size == 0) | (size.wrapping_sub(LEAST) <= MOST - LEAST);
        }
        plain
    }
}

simd! {
    /// The same for the first `rows` rows of a row of tiles.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn plain_tiles<S>(tiles: &[Line], rows: usize) -> bool {
        let mut sizes = Sizes::NONE;
        for tile in tiles.chunks_exact(LANES) {
            sizes.see(bytemuck::cast_slice(&tile[..rows]));
        }
        sizes.are_plain()
    }
}

/// What bf16 values have been seen, by the bits of their sizes.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// The least, less one: zero is above all others.
    least: u16,
    most: u16,
}

impl Sizes {
    /// Nothing seen.
    pub(super) const NONE: Self = Self { least: u16::MAX, most: 0 };

    /// Sees pairs.
    #[inline(always)]
    pub(super) fn see(&mut self, pairs: &[[u32; LANES]]) {
        for &bits in bytemuck::cast_slice::<_, u16>(pairs) {
            let size = bits & 0x7fff;
            self.least = self.least.min(size.wrapping_sub(1));
            self.most = self.most.max(size);
        }
    }

    /// Whether all were zero or from 2^−56 to 2^56 in size.
    pub(super) fn are_plain(self) -> bool {
        u32::from(self.least) >= (LEAST >> 16) - 1 && u32::from(self.most) <= MOST >> 16
    }
}

/// What the lines of a panel hold, `LINES` of them for each 32 of k.
trait Held<const LINES: usize> {
    /// The even and the odd of a pair of k in sixteen columns.
    fn pair<S: Lanes>(tile: &[Line; LINES], pair: usize, scale: S) -> (S, S);

    /// The sums over more k, given those of a tile.
    #[inline(always)]
    fn add<S: Lanes>(sums: S, of_tile: S, _scale: S) -> S {
        sums.add(of_tile)
    }
}

/// Weights in bf16.
struct Full;
/// Codes of 8 bits.
struct Eight;
/// Codes of 4 bits.
struct Four;

impl Held<16> for Full {
    #[inline(always)]
    fn pair<S: Lanes>(tile: &[Line; 16], pair: usize, _scale: S) -> (S, S) {
        (S::bf16_even(&tile[pair].0), S::bf16_odd(&tile[pair].0))
    }
}

impl Held<8> for Eight {
    #[inline(always)]
    fn pair<S: Lanes>(tile: &[Line; 8], pair: usize, _scale: S) -> (S, S) {
        let codes: &[[u8; LANES]; TILE_K] = bytemuck::cast_ref(tile);
        (S::from_i8(&codes[2 * pair]), S::from_i8(&codes[2 * pair + 1]))
    }

    #[inline(always)]
    fn add<S: Lanes>(sums: S, of_tile: S, scale: S) -> S {
        scale.fma(of_tile, sums)
    }
}

impl Held<4> for Four {
    #[inline(always)]
    fn pair<S: Lanes>(tile: &[Line; 4], pair: usize, scale: S) -> (S, S) {
        let codes: &[[u8; LANES]; TILE_K / 2] = bytemuck::cast_ref(tile);
        let (even, odd) = S::from_i4(&codes[pair]);
        (even.mul(scale), odd.mul(scale))
    }
}

simd! {
    /// Computes the product of `x [rows, k]`, rounded to bf16 and each row padded with zeros to a multiple of 32, for `panels`
    /// of the output; those after them are what the thread will likely have next.
    pub(super) fn block<S>(
        x: &[f32],
        rows: usize,
        w: &PackedMatrix,
        panels: Range<usize>,
        out: &Output,
    ) {
        match w.quantisation().map(Quantisation::bits) {
            None => block_of::<S, Full, 16>(x, rows, w, panels, out),
            Some(CodeBits::Eight) => block_of::<S, Eight, 8>(x, rows, w, panels, out),
            Some(CodeBits::Four) => block_of::<S, Four, 4>(x, rows, w, panels, out),
        }
        S::fence();
    }
}

/// Panels of the weight that are gone through at a time: as many as there are registers for.
#[cfg(target_arch = "x86_64")]
pub(super) fn panels_at_once(rows: usize) -> usize {
    if rows <= 2 { 4 } else { 2 }
}

/// As many panels at a time as [`panels_at_once`] says.
#[inline(always)]
fn block_of<S: Lanes, H: Held<LINES>, const LINES: usize>(
    x: &[f32],
    rows: usize,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &Output,
) {
    match rows {
        1 => strips::<S, H, LINES, 1, 4>(x, w, panels, out),
        2 => strips::<S, H, LINES, 2, 4>(x, w, panels, out),
        3 => strips::<S, H, LINES, 3, 2>(x, w, panels, out),
        4 => strips::<S, H, LINES, 4, 2>(x, w, panels, out),
        5 => strips::<S, H, LINES, 5, 2>(x, w, panels, out),
        6 => strips::<S, H, LINES, 6, 2>(x, w, panels, out),
        _ => unreachable!("{rows} rows are not few: `takes`"),
    }
}

/// All of `panels`, `PANELS` of the weight at a time and the last ones by fewer; of a gated product as many gates as what goes
/// through them.
#[inline(always)]
fn strips<S: Lanes, H: Held<LINES>, const LINES: usize, const ROWS: usize, const PANELS: usize>(
    x: &[f32],
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &Output,
) {
    let mut j = panels.start;
    while j < panels.end {
        let left = panels.end - j;
        let up = j + w.rows() / (2 * LANES);
        let (most, least) = if out.gate.is_some() { (PANELS / 2, 1) } else { (PANELS, 2) };
        let taken = if left >= most { most } else { left.min(least) };
        match (out.gate, taken) {
            (None, 4) if PANELS >= 4 => {
                strip::<S, H, LINES, ROWS, 4>(x, w, [j, j + 1, j + 2, j + 3], taken, out)
            }
            (None, 2) => strip::<S, H, LINES, ROWS, 2>(x, w, [j, j + 1], taken, out),
            (None, _) => strip::<S, H, LINES, ROWS, 1>(x, w, [j], taken, out),
            (Some(_), 2) if PANELS >= 4 => {
                strip::<S, H, LINES, ROWS, 4>(x, w, [j, j + 1, up, up + 1], taken, out)
            }
            (Some(_), _) => strip::<S, H, LINES, ROWS, 2>(x, w, [j, up], taken, out),
        }
        j += taken;
    }
}

/// The panels `of` the weight, of which the next ones lie `step` further.
#[inline(always)]
fn strip<S: Lanes, H: Held<LINES>, const LINES: usize, const ROWS: usize, const PANELS: usize>(
    x: &[f32],
    w: &PackedMatrix,
    of: [usize; PANELS],
    step: usize,
    out: &Output,
) {
    let (x, _) = x.as_chunks::<TILE_K>();
    let tiles = x.len() / ROWS;
    let mut scales = [&[][..]; PANELS];
    let mut held: [&[[Line; LINES]]; PANELS] = [&[]; PANELS];
    for p in 0..PANELS {
        let lines;
        (scales[p], lines) = w.scales_and_lines(of[p]);
        held[p] = &lines.as_chunks().0[..tiles];
    }
    let tiles_per_group = w.quantisation().map_or(1, |quantisation| quantisation.group() / TILE_K);
    let mut sums = [[S::splat(0.0); PANELS]; ROWS];
    for tile in 0..tiles {
        let mut ahead = tile * LINES + AHEAD;
        if ahead >= tiles * LINES {
            ahead += (step - 1) * w.lines_per_panel();
        }
        let mut scale = [S::splat(0.0); PANELS];
        if w.quantisation().is_some() {
            for p in 0..PANELS {
                scale[p] = S::from_bf16(&scales[p][tile / tiles_per_group]);
            }
        }
        let mut even = [[S::splat(0.0); PANELS]; ROWS];
        let mut odd = even;
        for pair in 0..TILE_K / 2 {
            let (mut w_even, mut w_odd) = ([S::splat(0.0); PANELS], [S::splat(0.0); PANELS]);
            for p in 0..PANELS {
                if (pair * LINES).is_multiple_of(TILE_K / 2) {
                    S::prefetch(held[p].as_flattened(), ahead + pair * LINES / (TILE_K / 2));
                }
                (w_even[p], w_odd[p]) = H::pair::<S>(&held[p][tile], pair, scale[p]);
            }
            for r in 0..ROWS {
                let x = &x[r * tiles + tile];
                for p in 0..PANELS {
                    even[r][p] = S::splat(x[2 * pair]).fma(w_even[p], even[r][p]);
                    odd[r][p] = S::splat(x[2 * pair + 1]).fma(w_odd[p], odd[r][p]);
                }
            }
        }
        for r in 0..ROWS {
            for p in 0..PANELS {
                sums[r][p] = H::add(sums[r][p], even[r][p].add(odd[r][p]), scale[p]);
            }
        }
    }
    let mut done = [[[0.0; LANES]; PANELS]; ROWS];
    for r in 0..ROWS {
        for p in 0..PANELS {
            sums[r][p].store(&mut done[r][p]);
        }
    }
    put(done.as_flattened(), &of, out);
}

simd! {
    /// Stores sums `[rows, panels]` of the weight's `panels`.
    fn put<S>(sums: &[[f32; LANES]], panels: &[usize], out: &Output) {
        match out.gate {
            None => {
                for (r, sums) in sums.chunks_exact(panels.len()).enumerate() {
                    for (sum, &panel) in sums.iter().zip(panels) {
                        // SAFETY: each (row, panel) is given to one thread only.
                        unsafe { out.put(r, panel, S::load(sum)) };
                    }
                }
            }
            Some((Gate::Silu, kept)) => put_gated::<S, Silu>(sums, panels, out, kept.as_ref()),
            Some((Gate::GeluTanh, kept)) => put_gated::<S, GeluTanh>(sums, panels, out, kept.as_ref()),
        }
    }
}

/// The first half of the panels are gates, the second what goes through them.
#[inline(always)]
fn put_gated<S: Lanes, A: Activate>(
    sums: &[[f32; LANES]],
    panels: &[usize],
    out: &Output,
    kept: Option<&Matrix>,
) {
    let (gates, ups) = panels.split_at(panels.len() / 2);
    for (r, sums) in sums.chunks_exact(panels.len()).enumerate() {
        for (p, (&gate, &up)) in gates.iter().zip(ups).enumerate() {
            let (value, through) = (S::load(&sums[p]), S::load(&sums[gates.len() + p]));
            // SAFETY: each (row, panel) is given to one thread only.
            unsafe {
                out.put(r, gate, A::gate(value, through));
                if let Some(kept) = kept {
                    out.keep(kept, r, gate, value);
                    out.keep(kept, r, up, through);
                }
            }
        }
    }
}
