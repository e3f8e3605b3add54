//! A handle to a team of compute threads, and the ways work is split over it.
//!
//! A split only says who computes what: no kernel's result depends on it. The caller works too, and waits until every
//! part is done. A range is shared out in runs of neighbours, a run for each thread, and a thread that is done takes from
//! what another has left: one that the operating system holds up costs no more than what it is at.

mod share;
mod team;

use std::ops::Range;
use std::sync::Arc;

use share::Share;
use team::Team;

/// The most pieces that a thread's share falls into, but for those that another takes.
const PIECES: usize = 16;

/// A team of compute threads; clones share it.
#[derive(Clone)]
pub struct Threads {
    team: Option<Arc<Team>>,
    count: usize,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("count", &self.count).finish()
    }
}

impl Threads {
    /// No team: all work runs on the calling thread.
    pub fn single() -> Self {
        Threads { team: None, count: 1 }
    }

    /// The calling thread and `count - 1` others (1 is [`Threads::single`]).
    ///
    /// # Panics
    /// When `count` is 0 or the operating system refuses to start a thread.
    pub fn new(count: usize) -> Self {
        assert!(count > 0, "a compute team needs at least one thread");
        Threads { team: (count > 1).then(|| Arc::new(Team::new(count - 1))), count }
    }

    /// Number of threads, the caller's included.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Calls `f` on contiguous ranges that together are `0..items`, each at least `min_chunk` long where there are as many;
    /// on the calling thread when one range is all there is. A thread mostly goes from a range to the one after it.
    pub fn for_each_chunk(&self, items: usize, min_chunk: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
        if items == 0 {
            return;
        }
        // Shares count in 32 bits.
        let unit = (items >> 32) + 1;
        let (units, min_units) = (items.div_ceil(unit), min_chunk.div_ceil(unit).max(1));
        let count = self.count.min(units / min_units);
        let Some(team) = self.team.as_ref().filter(|_| count > 1) else {
            return f(0..items);
        };
        let bound = |share: usize| (units as u64 * share as u64 / count as u64) as u32;
        let shares: Vec<Share> = (0..count).map(|i| Share::new(bound(i)..bound(i + 1))).collect();
        let least = min_units.max(units / (PIECES * count)) as u32;
        let f = |taken: Range<u32>| f(taken.start as usize * unit..items.min(taken.end as usize * unit));
        team.run(count, &|own| {
            while let Some(taken) = shares[own].take_front(least) {
                f(taken);
            }
            for other in 1..count {
                while let Some(taken) = shares[(own + other) % count].take_back(least) {
                    f(taken);
                }
            }
        });
    }

    /// Calls `f` once for each index in `0..items`; threads take indices as they become free, so uneven work balances.
    pub fn for_each(&self, items: usize, f: &(dyn Fn(usize) + Sync)) {
        match &self.team {
            Some(team) if items > 1 => team.run(items, f),
            _ => (0..items).for_each(f),
        }
    }

    /// Splits `out`, rows of `row_len`, in contiguous blocks of at least `min_rows` rows and calls `f(first_row, block)`
    /// for each.
    ///
    /// # Panics
    /// When `out` is not a whole number of rows.
    pub fn for_each_row_chunk<T: Send>(
        &self,
        out: &mut [T],
        row_len: usize,
        min_rows: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        if out.is_empty() {
            return;
        }
        assert!(row_len > 0 && out.len().is_multiple_of(row_len), "{} is not rows of {row_len}", out.len());
        let rows = out.len() / row_len;
        let base = SharedMut::new(out);
        self.for_each_chunk(rows, min_rows, &|range| {
            // SAFETY: ranges handed out by `for_each_chunk` are disjoint and within `rows`.
            let block = unsafe { base.slice(range.start * row_len, range.len() * row_len) };
            f(range.start, block);
        });
    }
}

/// A mutable slice that several threads write disjoint parts of.
pub(crate) struct SharedMut<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: only hands out parts through `slice`, whose caller promises that parts in use do not overlap.
unsafe impl<T: Send> Sync for SharedMut<T> {}
// SAFETY: as above; a pointer to `Send` values may move between threads.
unsafe impl<T: Send> Send for SharedMut<T> {}

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Borrows `slice` for the time the result is used.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        SharedMut { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// Where value `at` is, or would be past the end.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn address(&self, at: usize) -> *const T {
        self.start.wrapping_add(at).cast_const()
    }

    /// Where a block starts: `rows` rows of `width` values, the first at `start`, each `stride` after the one before.
    ///
    /// # Panics
    /// When it ends past the slice.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn block(&self, start: usize, rows: usize, stride: usize, width: usize) -> *mut T {
        let end = start + rows.saturating_sub(1) * stride + width;
        assert!(end <= self.len, "block {start}..{end} of {}", self.len);
        self.start.wrapping_add(start)
    }

    /// The part `start..start + len`.
    ///
    /// # Safety
    /// The slice given to `new` is still borrowed by the caller, and no other part in use overlaps this one.
    #[expect(clippy::mut_from_ref, reason = "each part belongs to one thread, as the caller promises")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: in bounds by the assertion; unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn chunks_cover_every_item_once() {
        for threads in [Threads::single(), Threads::new(3)] {
            for items in [0, 1, 2, 3, 7, 100] {
                for min_chunk in [0, 1, 3, 200] {
                    let seen: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                    threads.for_each_chunk(items, min_chunk, &|range| {
                        for i in range {
                            seen[i].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{items} {min_chunk}");
                    threads.for_each(items, &|i| {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 2), "{items}");
                }
            }
        }
    }

    #[test]
    fn row_chunks_know_their_first_row() {
        let mut out = vec![0usize; 7 * 3];
        Threads::new(2).for_each_row_chunk(&mut out, 3, 1, |first_row, block| {
            for (i, row) in block.chunks_mut(3).enumerate() {
                row.fill(first_row + i);
            }
        });
        assert_eq!(out, (0..21).map(|i| i / 3).collect::<Vec<_>>());
    }
}
