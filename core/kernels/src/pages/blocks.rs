//! Blocks of large pages that matrices share.
//!
//! A matrix with a mapping of its own lies in small pages where it is smaller than a large one, and so does what a larger one
//! has past its last large page. Cut from a common block, all but the ends of the block lie in large pages.

use memmap2::{MmapMut, MmapRaw};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Bytes of a block.
const BLOCK: usize = 32 << 20;
/// What pieces begin at multiples of: a small page, which is what can be given back.
const GRAIN: usize = 4096;
/// Bytes of the largest piece: so that little of a block is left over.
pub(super) const LARGEST: usize = BLOCK / 2;

struct Block {
    map: MmapRaw,
    /// What belongs to no piece, all zeros: offsets and lengths, no two of them neighbours.
    free: Mutex<BTreeMap<usize, usize>>,
}

/// Blocks that have pieces; the memory of others is given back.
static BLOCKS: Mutex<Vec<Weak<Block>>> = Mutex::new(Vec::new());

/// Part of a block that one owner reads and writes.
pub(super) struct Piece {
    block: Arc<Block>,
    offset: usize,
    len: usize,
}

impl Piece {
    /// `bytes` zeros, at the start of a small page.
    ///
    /// # Panics
    /// When there is no memory left.
    pub(super) fn zeros(bytes: usize) -> Self {
        let len = bytes.next_multiple_of(GRAIN);
        assert!(len <= BLOCK, "{bytes} bytes do not fit a block");
        let mut blocks = lock(&BLOCKS);
        blocks.retain(|block| block.strong_count() > 0);
        let found = blocks.iter().rev().filter_map(Weak::upgrade).find_map(|block| {
            let offset = block.take(len)?;
            Some((block, offset))
        });
        let (block, offset) = found.unwrap_or_else(|| {
            let block = Arc::new(Block::new());
            blocks.push(Arc::downgrade(&block));
            let offset = block.take(len).expect("a new block has room");
            (block, offset)
        });
        Self { block, offset, len: bytes }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies in the block and belongs to this piece alone; whoever changes it borrows the piece mutably.
        unsafe { std::slice::from_raw_parts(self.block.map.as_ptr().add(self.offset), self.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the piece is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.block.map.as_mut_ptr().add(self.offset), self.len) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let len = self.len.next_multiple_of(GRAIN);
        if !self.block.give_back(self.offset, len) {
            self.bytes_mut().fill(0);
        }
        let mut free = lock(&self.block.free);
        let (mut offset, mut end) = (self.offset, self.offset + len);
        if let Some(after) = free.remove(&end) {
            end += after;
        }
        if let Some((&before, &len)) = free.range(..offset).next_back()
            && before + len == offset
        {
            offset = before;
        }
        free.insert(offset, end - offset);
    }
}

impl Block {
    fn new() -> Self {
        let map = MmapMut::map_anon(BLOCK).unwrap_or_else(|e| panic!("{BLOCK} bytes of memory: {e}"));
        // A wish: without large pages, small ones serve.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self { map: map.into(), free: Mutex::new(BTreeMap::from([(0, BLOCK)])) }
    }

    /// The offset of `len` bytes, if there are so many in a row; they are no longer free.
    fn take(&self, len: usize) -> Option<usize> {
        let mut free = lock(&self.free);
        let (&offset, &room) = free.iter().find(|(_, room)| **room >= len)?;
        free.remove(&offset);
        if room > len {
            free.insert(offset + len, room - len);
        }
        Some(offset)
    }

    /// Gives whole small pages of a piece that ends back to the operating system, which makes them zeros; whether it did.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn give_back(&self, offset: usize, len: usize) -> bool {
        // SAFETY: the range is whole pages of 4 KiB, which no one reads or writes any more.
        unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) }.is_ok()
    }

    /// Elsewhere pages may be larger, or keep what they hold.
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    fn give_back(&self, _offset: usize, _len: usize) -> bool {
        false
    }
}

/// What a panic elsewhere left is whole: nothing panics between two changes.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zeros_and_their_owners_alone() {
        let mut held: Vec<(u8, Piece)> = Vec::new();
        let mut state = 7u32;
        for turn in 0..400 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let random = (state >> 8) as usize;
            if held.len() > 12 || (turn % 3 == 2 && !held.is_empty()) {
                held.swap_remove(random % held.len());
            }
            let mut piece = Piece::zeros(1 + random % (3 << 20));
            assert!(piece.bytes().iter().all(|byte| *byte == 0), "{turn}");
            assert!(piece.bytes().as_ptr().addr().is_multiple_of(GRAIN));
            piece.bytes_mut().fill(turn as u8 | 1);
            held.push((turn as u8 | 1, piece));
        }
        assert!(held.iter().all(|(value, piece)| piece.bytes().iter().all(|byte| byte == value)));
    }

    #[test]
    fn what_is_given_back_becomes_one_again() {
        let block = Arc::new(Block::new());
        let piece = |len| Piece { block: block.clone(), offset: block.take(len).unwrap(), len };
        let (a, b, c) = (piece(GRAIN), piece(3 * GRAIN), piece(2 * GRAIN));
        assert_eq!([a.offset, b.offset, c.offset], [0, GRAIN, 4 * GRAIN]);
        drop(b);
        assert_eq!(*lock(&block.free), BTreeMap::from([(GRAIN, 3 * GRAIN), (6 * GRAIN, BLOCK - 6 * GRAIN)]));
        assert_eq!(block.take(BLOCK), None);
        drop(a);
        drop(c);
        assert_eq!(*lock(&block.free), BTreeMap::from([(0, BLOCK)]));
    }
}
