//! Recycled f32 buffers: a step takes the same sizes again and again, and fresh pages cost more than the arithmetic on them.
//!
//! Batches differ in rows from step to step. So capacities come in classes, eight an octave, a buffer serves somewhat smaller needs
//! than it was made for, and one that nobody has wanted for some steps is let go. All buffers together, idle ones included, hold a quarter
//! more than what was in use at once at the worst time: before there are more, those that have been idle longest go. (Without that limit,
//! the buffers of a small batch pile up beside those of a large one: 2.2 times what was ever in use, on the quickstart.)

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use freewheel_kernels::Pages;

/// A shared store of idle buffers.
#[derive(Clone, Debug, Default)]
pub(super) struct BufferPool {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Idle>,
    /// Buffers taken so far.
    taken: u64,
    /// Buffers in use, and the most that ever were.
    out: u64,
    most_out: u64,
    /// Values they have room for.
    room: usize,
    /// Values asked of them, and the most that ever were at once.
    wanted: usize,
    most_wanted: usize,
}

#[derive(Debug)]
struct Idle {
    values: Pages<f32>,
    /// What `taken` was when it came back.
    since: u64,
}

/// A buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub(super) struct Buf {
    values: Pages<f32>,
    pool: BufferPool,
}

/// A buffer is let go when so many times the buffers of a step have been taken without it.
const PATIENCE: u64 = 16;
/// Values that buffers may hold beyond the most that were ever in use: a quarter of these, or so many.
const SLACK: usize = 4 << 20;

impl State {
    /// Whether one more buffer for `len` values would be more than there may be.
    fn is_full(&self, len: usize) -> bool {
        let idle: usize = self.idle.iter().map(|idle| idle.values.capacity()).sum();
        let needed = self.most_wanted.max(self.wanted + len);
        self.room + idle + class(len) > needed + (needed / 4).max(SLACK)
    }

    /// Counts a buffer with `room` values as in use for `len`.
    fn lend(&mut self, room: usize, len: usize) {
        self.taken += 1;
        self.out += 1;
        self.most_out = self.most_out.max(self.out);
        self.room += room;
        self.wanted += len;
        self.most_wanted = self.most_wanted.max(self.wanted);
    }

    /// Idle buffers to let go: those that nobody wanted for long, and as many as stand in the way of one more for `len` values.
    fn unwanted(&mut self, len: Option<usize>) -> Vec<Idle> {
        let oldest = self.taken.saturating_sub(PATIENCE * self.most_out);
        let mut unwanted: Vec<Idle> = self.idle.extract_if(.., |idle| idle.since < oldest).collect();
        while len.is_some_and(|len| self.is_full(len))
            && let Some(longest) = (0..self.idle.len()).min_by_key(|at| self.idle[*at].since)
        {
            unwanted.push(self.idle.swap_remove(longest));
        }
        unwanted
    }
}

impl BufferPool {
    /// `len` values of unspecified content: the taker overwrites them all.
    pub fn take(&self, len: usize) -> Buf {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |idle: &Idle| idle.values.capacity() >= len && idle.values.capacity() <= spare(len);
        // The smallest that is large enough, so that a large one is not spent on a small need.
        let best = (0..state.idle.len())
            .filter(|at| fits(&state.idle[*at]))
            .min_by_key(|at| state.idle[*at].values.capacity());
        let found = best.map(|at| state.idle.swap_remove(at).values);
        let unwanted = state.unwanted(found.is_none().then_some(len));
        state.lend(found.as_ref().map_or(class(len), Pages::capacity), len);
        drop(state);
        drop(unwanted);
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

/// The largest capacity that is spent on `len` values.
fn spare(len: usize) -> usize {
    len + len / 2 + 1024
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
        let mut state = self.pool.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.out -= 1;
        state.room -= self.values.capacity();
        state.wanted -= self.values.len();
        let since = state.taken;
        state.idle.push(Idle { values: std::mem::take(&mut self.values), since });
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
    fn batches_of_all_sizes_take_what_is_there() {
        let pool = BufferPool::default();
        let step = |rows: usize| {
            let _step: Vec<Buf> = [128, 192, 192, 384, 512].map(|width| pool.take(rows * width)).into();
        };
        let held = || -> Vec<*const f32> {
            let state = pool.state.lock().unwrap();
            let mut at: Vec<_> = state.idle.iter().map(|idle| idle.values.as_ptr()).collect();
            at.sort();
            at
        };
        (0..100).for_each(|i| step(800 + i * 271 % 400));
        let before = held();
        (0..100).for_each(|i| step(800 + i * 271 % 400));
        let after = held();
        let new = after.iter().filter(|at| !before.contains(at)).count();
        assert!(new <= 3, "{new} allocations were kept of 500 takes that could have done without");
        assert!(after.len() <= 12, "{} buffers for five", after.len());
    }

    #[test]
    fn small_batches_beside_large_ones_do_not_pile_up_buffers() {
        let pool = BufferPool::default();
        let step = |rows: usize| {
            let _step: Vec<Buf> = [128, 192, 192, 384, 512].map(|width| pool.take(rows * width)).into();
        };
        let held = || {
            let state = pool.state.lock().unwrap();
            assert_eq!((state.out, state.room, state.wanted), (0, 0, 0));
            state.idle.iter().map(|idle| idle.values.capacity()).sum::<usize>()
        };
        let most = 16_000 * 1408;
        for i in 0..40 {
            step(16_000);
            step(1000 + 700 * (i % 13));
            assert!(held() <= most + most / 4, "{} values, {most} were ever in use", held());
        }
    }

    #[test]
    fn growing_batches_do_not_pile_up_buffers() {
        let pool = BufferPool::default();
        for rows in 1000..2000 {
            let _step: Vec<Buf> = (0..4).map(|_| pool.take(rows * 128)).collect();
        }
        let idle = &pool.state.lock().unwrap().idle;
        let held: usize = idle.iter().map(|idle| idle.values.capacity()).sum();
        assert!(idle.len() <= 4 && held <= 4 * class(2000 * 128), "{} buffers of {held}", idle.len());
        assert!((1..5000).all(|len| class(len) >= len && class(len) <= len + len / 8 + 1));
    }
}
