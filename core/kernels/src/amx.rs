//! The state of the matrix tiles: configured before a run of tile instructions, released after it.

use std::arch::asm;

/// The operand of LDTILECFG: palette 1, eight tiles, the rest of the sixteen unused.
#[repr(C, align(64))]
pub(crate) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<TileConfig>() == 64);

impl TileConfig {
    /// Tiles of so many (rows, bytes a row): at most 16 and 64.
    pub(crate) const fn new(tiles: [(u8, u16); 8]) -> Self {
        let (mut bytes_per_row, mut rows) = ([0; 16], [0; 16]);
        let mut i = 0;
        while i < tiles.len() {
            assert!(tiles[i].0 >= 1 && tiles[i].0 <= 16 && tiles[i].1 >= 4 && tiles[i].1 <= 64);
            (rows[i], bytes_per_row[i]) = tiles[i];
            i += 1;
        }
        Self { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row, rows }
    }
}

/// # Safety
/// AMX is granted to this process.
pub(crate) unsafe fn configure(config: &TileConfig) {
    // SAFETY: the operand is 64 bytes of a valid configuration; nobody but the caller uses tile registers on this thread.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const *config, options(nostack, readonly)) };
}

/// Returns the tiles to their initial state, so that a switch of threads need not save them.
///
/// # Safety
/// AMX is granted to this process.
pub(crate) unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}
