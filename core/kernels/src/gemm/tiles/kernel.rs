//! What kernels are given, and which there are.

use super::super::pack::Line;
use super::{amx, dots};

/// Panels that a kernel takes at most.
pub(super) const MOST_PANELS: usize = 4;

/// Operands of a kernel. C tiles lie one after the other, row of tiles by row of tiles.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    /// A tiles, one after the other along k.
    pub a: *const Line,
    /// Lines between rows of A tiles.
    pub a_lines: usize,
    /// Rows that are wanted: of one row of tiles, or of two. The others' sums may become anything.
    pub rows: usize,
    /// B tiles of each panel, one after the other along k. Kernels of two panels that ask for panels to come have these third and
    /// fourth.
    pub b: [*const Line; MOST_PANELS],
    /// Tiles along k, at least 1.
    pub k_tiles: usize,
    /// C tiles.
    pub c: *mut Line,
    /// Whether C holds sums over earlier k, to go on from; else they start at zero.
    pub go_on: bool,
    /// Where each panel goes on after these: at later k, or at the panel that the thread will likely come to next.
    pub follow: [*const Line; MOST_PANELS],
    /// Rows that have been through these tiles of B before, and all that will be.
    pub before: usize,
    pub all_rows: usize,
    /// Where the first line of these tiles goes, which kernels of two panels and two rows of tiles or more ask for.
    pub out: *const f32,
    /// Bytes from one row there to the next.
    pub out_stride: usize,
}

/// # Safety
/// The instruction set that the kernel is of is there, AMX configured; the pointers are to as many tiles as it reads and writes.
pub(super) type Kernel = unsafe fn(&Operands);

/// Kernels for two rows of tiles and for one.
pub(super) struct Kernels {
    pub pair: Kernel,
    pub single: Kernel,
    /// Lines of each tile of `b[2]` and `b[3]` that `pair` asks for.
    pub asks: usize,
}

impl Kernels {
    /// Those for so many panels. Where two more panels are to be asked for in `passes` of `pair`, it asks for as many lines
    /// as make up whole tiles then.
    pub(super) fn of<const PANELS: usize>(on_amx: bool, passes: Option<usize>) -> Self {
        if on_amx {
            return amx::kernels::<PANELS>(passes);
        }
        let kernel = dots::kernel::<PANELS>;
        Self { pair: kernel, single: kernel, asks: 0 }
    }
}
