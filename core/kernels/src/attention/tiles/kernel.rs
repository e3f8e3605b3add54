//! What kernels are given, and which there are.

use super::super::CHUNK_PAGES;
use super::{Line, amx, dots};
use crate::isa::{self, Isa};

/// Output tiles that a kernel takes at most.
pub(super) const MOST_TILES: usize = 4;

/// What multiplies: said once, by the thread that asks for attention.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernels {
    Amx,
    Dots,
}

impl Kernels {
    /// This machine's.
    pub(super) fn here() -> Self {
        if isa::current() == Isa::Amx { Self::Amx } else { Self::Dots }
    }

    /// Scores of `rows` queries against one to four pages.
    ///
    /// # Safety
    /// The instructions were detected, AMX configured for these tiles; the pointers are to as many of them, of as many rows.
    pub(super) unsafe fn scores(self, o: &Scores, rows: usize, pages: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Amx => amx::SCORES[pages - 1](o),
                Self::Dots => dots::scores(o, rows, pages),
            }
        }
    }

    /// Up to [`MOST_TILES`] output tiles of `rows` queries.
    ///
    /// # Safety
    /// As [`Kernels::scores`].
    pub(super) unsafe fn outputs(self, o: &Outputs, rows: usize, tiles: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Amx => amx::OUTPUT[tiles - 1](o),
                Self::Dots => dots::outputs(o, rows, tiles),
            }
        }
    }
}

/// Operands of a kernel of scores.
pub(super) struct Scores {
    /// Q tiles, one after the other.
    pub q: *const Line,
    /// Bytes of a Q or C tile.
    pub tile_bytes: usize,
    /// Each page's K tiles, one after the other.
    pub keys: [*const u32; CHUNK_PAGES],
    /// Their number, at least 1.
    pub k_tiles: usize,
    /// C tiles, one a page, one after the other.
    pub c: *mut Line,
}

/// Operands of a kernel of outputs.
pub(super) struct Outputs {
    /// P `[rows][64 keys]`, from the first page's keys on.
    pub p: *const u8,
    /// V pages.
    pub values: *const *const u32,
    /// Their number, at least 1.
    pub pages: usize,
    /// Where their tiles start, in bytes.
    pub offset: usize,
    /// Bytes from one pair of keys to the next.
    pub stride: usize,
    /// C tiles, one after the other.
    pub c: *mut Line,
    /// Bytes of each.
    pub tile_bytes: usize,
}
