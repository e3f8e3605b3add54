//! C tiles go to the output, through its gate where it has one.

use super::super::pack::Line;
use super::super::tile::{Gate, Matrix, Output};
use super::{TILE, TILE_LINES};
use crate::activation::{Activate, GeluTanh, Silu};
use crate::simd::{Lanes, simd};

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
        let (gate, up) = tiles.split_at(gates.len() * TILE_LINES);
        for r in 0..TILE.min(m - first) {
            for (p, &panel) in gates.iter().enumerate() {
                let (gate, up) = (lanes::<S>(&gate[p * TILE_LINES + r]), lanes::<S>(&up[p * TILE_LINES + r]));
                // SAFETY: each tile belongs to one task.
                unsafe {
                    out.put(first + r, panel, A::gate(gate, up));
                    if let Some(kept) = kept {
                        out.keep(kept, first + r, panel, gate);
                        out.keep(kept, first + r, ups[p], up);
                    }
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
