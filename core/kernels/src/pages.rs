//! Memory for large matrices, in large pages where the operating system has them.
//!
//! A weight or a layer's activations take megabytes. In pages of 4 KiB their addresses overflow the processor's tables, and
//! their places in the second-level cache collide at random; in pages of 2 MiB neither happens, and a first touch costs one fault
//! in five hundred.

mod blocks;

use blocks::Piece;
use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};

/// Bytes from which memory is asked of the operating system directly.
const LARGE: usize = 1 << 20;

/// Bytes from which memory that lasts is cut from blocks of large pages.
const SHARED: usize = 1 << 16;

/// A vector of plain numbers that start as zeros.
pub struct Pages<T> {
    memory: Memory<T>,
    len: usize,
}

enum Memory<T> {
    Small(Vec<T>),
    /// As many `T` as fit.
    Large(MmapMut),
    /// The same in a block that others share.
    Shared(Box<Piece>),
}

impl<T: bytemuck::Pod> Pages<T> {
    /// Nothing.
    pub fn new() -> Self {
        Self { memory: Memory::Small(Vec::new()), len: 0 }
    }

    /// `len` zeros.
    ///
    /// # Panics
    /// When there is no memory left, as `Vec` does.
    pub fn zeros(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a length that fits the address space");
        let memory = if bytes < LARGE {
            Memory::Small(vec![T::zeroed(); len])
        } else {
            let map = MmapMut::map_anon(bytes).unwrap_or_else(|e| panic!("{bytes} bytes of memory: {e}"));
            // A wish: without large pages, small ones serve.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            Memory::Large(map)
        };
        Self { memory, len }
    }

    /// As [`Pages::zeros`], in blocks of large pages shared with others made so: for what lasts, such as weights. Other memory
    /// would leave gaps in them.
    ///
    /// # Panics
    /// As [`Pages::zeros`].
    pub fn lasting(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a length that fits the address space");
        match bytes {
            SHARED..=blocks::LARGEST => Self { memory: Memory::Shared(Box::new(Piece::zeros(bytes))), len },
            _ => Self::zeros(len),
        }
    }

    /// Values that fit without another allocation.
    pub fn capacity(&self) -> usize {
        match &self.memory {
            Memory::Small(values) => values.len(),
            Memory::Large(map) => map.len() / size_of::<T>(),
            Memory::Shared(piece) => piece.bytes().len() / size_of::<T>(),
        }
    }

    /// Becomes `len` values of unspecified content: old ones or zeros.
    pub fn reset(&mut self, len: usize) {
        if len > self.capacity() {
            *self = Self::zeros(len);
        }
        self.len = len;
    }
}

impl<T: bytemuck::Pod> From<Vec<T>> for Pages<T> {
    fn from(values: Vec<T>) -> Self {
        let len = values.len();
        Self { memory: Memory::Small(values), len }
    }
}

impl<T: bytemuck::Pod> Default for Pages<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: bytemuck::Pod> Clone for Pages<T> {
    fn clone(&self) -> Self {
        let mut copy = match self.memory {
            Memory::Shared(_) => Self::lasting(self.len),
            _ => Self::zeros(self.len),
        };
        copy.copy_from_slice(self);
        copy
    }
}

impl<T> std::fmt::Debug for Pages<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").field("len", &self.len).finish_non_exhaustive()
    }
}

impl<T: bytemuck::Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.memory {
            Memory::Small(values) => &values[..self.len],
            Memory::Large(map) => bytemuck::cast_slice(&map[..self.len * size_of::<T>()]),
            Memory::Shared(piece) => bytemuck::cast_slice(&piece.bytes()[..self.len * size_of::<T>()]),
        }
    }
}

impl<T: bytemuck::Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::Small(values) => &mut values[..self.len],
            Memory::Large(map) => bytemuck::cast_slice_mut(&mut map[..self.len * size_of::<T>()]),
            Memory::Shared(piece) => {
                bytemuck::cast_slice_mut(&mut piece.bytes_mut()[..self.len * size_of::<T>()])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_hold_what_is_written() {
        let made: [fn(usize) -> Pages<f32>; 2] = [Pages::zeros, Pages::lasting];
        let lens =
            [0, 1, 1000, SHARED / 4, LARGE / 4 - 1, LARGE / 4, 3 * LARGE / 4 + 5, blocks::LARGEST / 4 + 1];
        for (len, made) in lens.into_iter().flat_map(|len| made.map(|made| (len, made))) {
            let mut pages = made(len);
            assert!(pages.len() == len && pages.capacity() >= len && pages.iter().all(|x| *x == 0.0));
            pages.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let copy = pages.clone();
            assert!(copy.iter().enumerate().all(|(i, x)| *x == i as f32), "{len}");
            let before = pages.as_ptr();
            pages.reset(len / 2);
            assert_eq!((pages.len(), pages.as_ptr()), (len / 2, before), "room that is there is kept");
            pages.reset(2 * len + 1);
            assert_eq!(pages.len(), 2 * len + 1);
        }
    }
}
