//! Shares of a range: a thread takes from the front of its own, and, once that is empty, from the back of another's.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::*};

/// What is left of a share, `front:32 | back:32`; by itself in its cache lines, for its owner looks at it most.
#[repr(align(128))]
pub(super) struct Share(AtomicU64);

impl Share {
    /// All of `range`.
    pub fn new(range: Range<u32>) -> Self {
        Share(AtomicU64::new(u64::from(range.start) << 32 | u64::from(range.end)))
    }

    /// Takes half of what is left, at least `least` where there is as much, from the front.
    pub fn take_front(&self, least: u32) -> Option<Range<u32>> {
        self.take(least, |left, n| (left.start..left.start + n, left.start + n..left.end))
    }

    /// The same from the back.
    pub fn take_back(&self, least: u32) -> Option<Range<u32>> {
        self.take(least, |left, n| (left.end - n..left.end, left.start..left.end - n))
    }

    fn take(
        &self,
        least: u32,
        cut: impl Fn(Range<u32>, u32) -> (Range<u32>, Range<u32>),
    ) -> Option<Range<u32>> {
        let mut now = self.0.load(Relaxed);
        loop {
            let left = (now >> 32) as u32..now as u32;
            let n = left.end - left.start;
            if n == 0 {
                return None;
            }
            let half = n.div_ceil(2).max(least);
            let n = if n < half.saturating_add(least) { n } else { half };
            let (taken, left) = cut(left, n);
            let after = u64::from(left.start) << 32 | u64::from(left.end);
            // What the parts compute is published by the team's count of finished parts, not by this.
            match self.0.compare_exchange_weak(now, after, Relaxed, Relaxed) {
                Ok(_) => return Some(taken),
                Err(other) => now = other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_taken_until_little_is_left() {
        let share = Share::new(10..110);
        assert_eq!(share.take_front(8), Some(10..60));
        assert_eq!(share.take_back(8), Some(85..110));
        assert_eq!(share.take_front(8), Some(60..73));
        // Six would be left of twelve, fewer than may be taken.
        assert_eq!(share.take_back(8), Some(73..85));
        assert_eq!(share.take_front(8), None);
        assert_eq!(share.take_back(8), None);
    }

    #[test]
    fn no_more_is_taken_than_there_is() {
        assert_eq!(Share::new(0..3).take_back(u32::MAX), Some(0..3));
        assert_eq!(Share::new(5..5).take_front(1), None);
        assert_eq!(Share::new(0..u32::MAX).take_front(1), Some(0..1 << 31));
    }
}
