//! C tiles go to the output, through its gate where it has one.

use super::super::pack::Line;
use super::super::tile::{Gate, Matrix, Output};
use super::{TILE, TILE_LINES};
use crate::activation::{Activate, GeluTanh, Silu};
use crate::simd::{LANES, Lanes, simd};

simd! {
    /// Stores C tiles, those of `panels` in each row of tiles, from row `first` on.
    pub(super) fn put_tiles<S>(c: &[Line], panels: &[usize], first: usize, m: usize, out: &Output) {
        match out.gate {
            None => put_plain::<S>(c, panels, first, m, out),
            Some((Gate::Silu, kept)) => put_gated::<S, Silu>(c, panels, first, m, out, kept.as_ref()),
            Some((Gate::GeluTanh, kept)) => put_gated::<S, GeluTanh>(c, panels, first, m, out, kept.as_ref()),
        }
    }
}

#[inline(always)]
fn put_plain<S: Lanes>(c: &[Line], panels: &[usize], first: usize, m: usize, out: &Output) {
    for (i, tiles) in c.chunks_exact(panels.len() * TILE_LINES).enumerate() {
        let first = first + i * TILE;
        for r in 0..TILE.min(m - first) {
            for (p, &panel) in panels.iter().enumerate() {
                // SAFETY: each tile belongs to one task.
                unsafe { out.put(first + r, panel, lanes::<S>(&tiles[p * TILE_LINES + r])) };
            }
        }
    }
}

/// The first half of the panels are gates, the second what goes through them.
#[inline(always)]
fn put_gated<S: Lanes, A: Activate>(
    c: &[Line],
    panels: &[usize],
    first: usize,
    m: usize,
    out: &Output,
    kept: Option<&Matrix>,
) {
    let (gates, ups) = panels.split_at(panels.len() / 2);
    for (i, tiles) in c.chunks_exact(panels.len() * TILE_LINES).enumerate() {
        let first = first + i * TILE;
        let rows = TILE.min(m - first);
        let (gate, up) = tiles.as_chunks::<TILE_LINES>().0.split_at(gates.len());
        for (p, (gate, up)) in gate.iter().zip(up).enumerate() {
            let mut lines = [[0.0; LANES]; TILE];
            for r in 0..rows {
                A::gate(lanes::<S>(&gate[r]), lanes::<S>(&up[r])).store(&mut lines[r]);
            }
            // SAFETY: each tile belongs to one task.
            unsafe { out.put_lines::<S>(first, gates[p], &lines[..rows]) };
            let Some(kept) = kept else { continue };
            for r in 0..rows {
                // SAFETY: as above.
                unsafe {
                    out.keep(kept, first + r, gates[p], lanes::<S>(&gate[r]));
                    out.keep(kept, first + r, ups[p], lanes::<S>(&up[r]));
                }
            }
        }
    }
}

/// A line of a C tile.
#[inline(always)]
fn lanes<S: Lanes>(line: &Line) -> S {
    S::load(bytemuck::cast_ref(&line.0))
}
