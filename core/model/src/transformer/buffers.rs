//! Recycled f32 buffers: a step takes the same sizes again and again, and fresh pages cost more than the arithmetic on them.
//!
//! Batches differ by a few rows from step to step. So capacities come in classes, eight an octave, and a buffer that has become
//! too small is let go for the larger one that replaces it: the pool holds what one step needs, not what every step needed.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use freewheel_kernels::Pages;

/// A shared store of idle buffers.
#[derive(Clone, Debug, Default)]
pub(super) struct BufferPool {
    idle: Arc<Mutex<Vec<Pages<f32>>>>,
}

/// A buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub(super) struct Buf {
    values: Pages<f32>,
    pool: BufferPool,
}

impl BufferPool {
    /// `len` values of unspecified content: the taker overwrites them all.
    pub fn take(&self, len: usize) -> Buf {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, so that a large one is not spent on a small need.
        let best = idle
            .iter()
            .enumerate()
            .filter(|(_, v)| v.capacity() >= len && v.capacity() <= 4 * len + 1024)
            .min_by_key(|(_, v)| v.capacity())
            .map(|(at, _)| at);
        let outgrown = |values: &Pages<f32>| values.capacity() < len && values.capacity() >= len / 4;
        let replaced = match best {
            Some(_) => None,
            None => idle.iter().position(outgrown).map(|at| idle.swap_remove(at)),
        };
        let found = best.map(|at| idle.swap_remove(at));
        drop(idle);
        drop(replaced);
        let mut values = found.unwrap_or_else(|| Pages::zeros(class(len)));
        values.reset(len);
        Buf { values, pool: self.clone() }
    }

    /// `len` zeros.
    pub fn zeros(&self, len: usize) -> Buf {
        let mut buf = self.take(len);
        buf.fill(0.0);
        buf
    }

    /// A copy of `source`.
    pub fn copy(&self, source: &[f32]) -> Buf {
        let mut buf = self.take(source.len());
        buf.copy_from_slice(source);
        buf
    }
}

/// The smallest class that holds `len`: multiples of an eighth of the power of two below it.
fn class(len: usize) -> usize {
    let step = (len.max(8).ilog2() as usize).saturating_sub(3);
    len.next_multiple_of(1 << step)
}

impl Deref for Buf {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let mut idle = self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < 1024 {
            idle.push(std::mem::take(&mut self.values));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_buffer_is_used_again_and_a_large_one_is_not_spent_on_a_small_need() {
        let pool = BufferPool::default();
        let address = {
            let buf = pool.take(100_000);
            buf.as_ptr() as usize
        };
        assert_ne!(pool.take(10).as_ptr() as usize, address);
        assert_eq!(pool.zeros(90_000).as_ptr() as usize, address);
    }

    #[test]
    fn growing_batches_do_not_pile_up_buffers() {
        let pool = BufferPool::default();
        for rows in 1000..2000 {
            let _step: Vec<Buf> = (0..4).map(|_| pool.take(rows * 128)).collect();
        }
        let idle = pool.idle.lock().unwrap();
        let held: usize = idle.iter().map(Pages::capacity).sum();
        assert!(idle.len() <= 4 && held <= 4 * class(2000 * 128), "{} buffers of {held}", idle.len());
        assert!((1..5000).all(|len| class(len) >= len && class(len) <= len + len / 8 + 1));
    }
}
