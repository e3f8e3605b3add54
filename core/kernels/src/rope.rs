//! Rotary position embedding (Su et al. 2021): rotation of pairs of a head's dimensions by an angle of the position.
//!
//! As transformers computes it: angle = position · inv_freq in f32, its cosine and sine rounded to f32, both times a
//! scale (1, or YaRN's attention factor). Batch-invariant; threads take rows.

use crate::Threads;
use crate::math::sin_cos;
use crate::simd::simd;

/// Which dimensions form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Dimension i with i + half (Llama as in transformers, Qwen).
    Half,
    /// Dimension 2i with 2i + 1 (Llama 4, DeepSeek).
    Interleaved,
}

/// Cosines and sines of every position up to a limit. Those of the first positions are kept; those beyond are computed
/// anew each time, to the same bits: a table for millions of positions would take gigabytes.
#[derive(Clone, Debug)]
pub struct RopeTable {
    inv_freq: Vec<f32>,
    scale: f32,
    first: usize,
    positions: usize,
    /// `[kept positions][pairs]` of (cos, sin).
    rows: Vec<(f32, f32)>,
}

/// Pairs of a table that are kept: 32 MiB, or 65,536 positions of a head of 128.
const KEPT: usize = 1 << 22;

impl RopeTable {
    /// A table for positions `0..max_positions`. `inv_freq` has one value a pair; a head's first `2 · inv_freq.len()`
    /// dimensions are rotated, or those after [`RopeTable::starting_at`]. `scale` multiplies cosine and sine.
    pub fn new(inv_freq: &[f32], scale: f32, max_positions: usize) -> Self {
        let mut table =
            RopeTable { inv_freq: inv_freq.to_vec(), scale, first: 0, positions: 0, rows: Vec::new() };
        table.grow(max_positions);
        table
    }

    /// A table of given angles, `[rows][pairs]` in radians: "position" r turns by the angles of row r (two-dimensional
    /// positions of image patches, say). It does not grow.
    ///
    /// # Panics
    /// When there are no pairs, or the angles are not a whole number of rows.
    pub fn from_angles(angles: &[f32], pairs: usize) -> Self {
        assert!(
            pairs > 0 && angles.len().is_multiple_of(pairs),
            "rope: {} angles, {pairs} a row",
            angles.len()
        );
        let turn = |&angle: &f32| {
            let (sin, cos) = sin_cos(angle);
            (cos, sin)
        };
        let rows = angles.iter().map(turn).collect();
        let positions = angles.len() / pairs;
        RopeTable { inv_freq: vec![0.0; pairs], scale: 1.0, first: 0, positions, rows }
    }

    /// Leaves the first `first` dimensions of a head as they are and rotates the ones after them (DeepSeek).
    #[must_use]
    pub fn starting_at(self, first: usize) -> Self {
        RopeTable { first, ..self }
    }

    /// Makes sure that positions `0..positions` are in the table.
    pub fn grow(&mut self, positions: usize) {
        self.positions = self.positions.max(positions);
        let Some(kept) = self.rows.len().checked_div(self.inv_freq.len()) else { return };
        for position in kept..positions.min(KEPT / self.inv_freq.len()) {
            let Self { rows, inv_freq, scale, .. } = self;
            compute(inv_freq, *scale, position, rows);
        }
    }

    /// Number of positions in the table.
    pub fn positions(&self) -> usize {
        if self.inv_freq.is_empty() { usize::MAX } else { self.positions }
    }

    /// The row of `position`: kept, or computed into `scratch`.
    fn row<'a>(&'a self, position: u32, scratch: &'a mut Vec<(f32, f32)>) -> &'a [(f32, f32)] {
        let pairs = self.inv_freq.len();
        if let Some(row) = self.rows.get(position as usize * pairs..(position as usize + 1) * pairs) {
            return row;
        }
        scratch.clear();
        compute(&self.inv_freq, self.scale, position as usize, scratch);
        scratch
    }
}

fn compute(inv_freq: &[f32], scale: f32, position: usize, rows: &mut Vec<(f32, f32)>) {
    rows.extend(inv_freq.iter().map(|&inv_freq| {
        let (sin, cos) = sin_cos(position as f32 * inv_freq);
        (cos * scale, sin * scale)
    }));
}

/// Rotates `x [T, heads, head_dim]` in place, row t by `positions[t]`.
///
/// # Panics
/// When a length does not fit the shapes or a position is not in the table.
pub fn rope(
    threads: &Threads,
    table: &RopeTable,
    style: RopeStyle,
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    positions: &[u32],
) {
    rotate(threads, table, style, x, heads, head_dim, positions, 1.0);
}

/// Gradient of [`rope`], in place: the transposed rotation.
///
/// # Panics
/// As [`rope`].
pub fn rope_backward(
    threads: &Threads,
    table: &RopeTable,
    style: RopeStyle,
    dx: &mut [f32],
    heads: usize,
    head_dim: usize,
    positions: &[u32],
) {
    rotate(threads, table, style, dx, heads, head_dim, positions, -1.0);
}

#[expect(clippy::too_many_arguments, reason = "the operands of one op")]
fn rotate(
    threads: &Threads,
    table: &RopeTable,
    style: RopeStyle,
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    positions: &[u32],
    direction: f32,
) {
    let (pairs, first) = (table.inv_freq.len(), table.first);
    assert!(first + 2 * pairs <= head_dim, "rope: {pairs} pairs from {first} on in a head of {head_dim}");
    assert_eq!(x.len(), positions.len() * heads * head_dim, "rope: x is [T, heads, head_dim]");
    if x.is_empty() || pairs == 0 {
        return;
    }
    let (known, width) = (table.positions(), heads * head_dim);
    if let Some(position) = positions.iter().find(|position| **position as usize >= known) {
        panic!("rope: position {position} in a table of {known}");
    }
    threads.for_each_row_chunk(x, width, MIN_VALUES / width + 1, |first_row, x| {
        let mut scratch = Vec::new();
        for (row, &position) in x.chunks_exact_mut(width).zip(&positions[first_row..]) {
            let angles = table.row(position, &mut scratch);
            for head in row.chunks_exact_mut(head_dim) {
                let head = &mut head[first..first + 2 * pairs];
                match style {
                    RopeStyle::Half => rotate_halves(head, angles, direction),
                    RopeStyle::Interleaved => {
                        let (both, _) = head.as_chunks_mut::<2>();
                        rotate_pairs(both.iter_mut().map(|[a, b]| (a, b)), angles, direction);
                    }
                }
            }
        }
    });
}

/// Values of a part of an operation that is worth sharing out.
const MIN_VALUES: usize = 1 << 14;

simd! {
    fn rotate_halves<S>(head: &mut [f32], angles: &[(f32, f32)], direction: f32) {
        let (low, high) = head.split_at_mut(angles.len());
        rotate_pairs(low.iter_mut().zip(high), angles, direction);
    }
}

/// (a, b) becomes (a·cos − b·sin, b·cos + a·sin): each product and each sum is rounded, as transformers does it.
#[inline(always)]
fn rotate_pairs<'a>(
    pairs: impl Iterator<Item = (&'a mut f32, &'a mut f32)>,
    angles: &[(f32, f32)],
    direction: f32,
) {
    for ((a, b), &(cos, sin)) in pairs.zip(angles) {
        let sin = sin * direction;
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn frequencies(pairs: usize) -> Vec<f32> {
        (0..pairs).map(|i| 10_000f32.powf(-(i as f32) / pairs as f32)).collect()
    }

    #[test]
    fn a_table_of_angles_turns_as_one_of_frequencies() {
        let inv_freq = [1.0f32, 0.1, 0.01];
        let angles: Vec<f32> = (0..9).flat_map(|row| inv_freq.map(|f| row as f32 * f)).collect();
        let (by_angle, by_frequency) =
            (RopeTable::from_angles(&angles, 3), RopeTable::new(&inv_freq, 1.0, 9));
        assert_eq!(by_angle.positions(), 9);
        let x: Vec<f32> = (0..2 * 2 * 6).map(|i| i as f32 * 0.37 - 3.0).collect();
        let (mut a, mut b) = (x.clone(), x);
        rope(&Threads::single(), &by_angle, RopeStyle::Interleaved, &mut a, 2, 6, &[8, 3]);
        rope(&Threads::single(), &by_frequency, RopeStyle::Interleaved, &mut b, 2, 6, &[8, 3]);
        assert_eq!(a, b);
    }

    #[test]
    fn rotates_the_right_pairs() {
        // Head of 6, of which the first 4 rotate; position 1, frequencies 1 and 0.5.
        let table = RopeTable::new(&[1.0, 0.5], 1.0, 2);
        let (c, s) = ([1f64.cos(), 0.5f64.cos()], [1f64.sin(), 0.5f64.sin()]);
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let mut half = x;
        rope(&Threads::single(), &table, RopeStyle::Half, &mut half, 1, 6, &[1]);
        let want = [
            c[0] - 3.0 * s[0],
            2.0 * c[1] - 4.0 * s[1],
            3.0 * c[0] + s[0],
            4.0 * c[1] + 2.0 * s[1],
            5.0,
            6.0,
        ];
        assert_close(&half, &want, 1e-6, "half");
        let mut pairs = x;
        rope(&Threads::single(), &table, RopeStyle::Interleaved, &mut pairs, 1, 6, &[1]);
        let want = [
            c[0] - 2.0 * s[0],
            2.0 * c[0] + s[0],
            3.0 * c[1] - 4.0 * s[1],
            4.0 * c[1] + 3.0 * s[1],
            5.0,
            6.0,
        ];
        assert_close(&pairs, &want, 1e-6, "interleaved");
        for style in [RopeStyle::Half, RopeStyle::Interleaved] {
            let late = table.clone().starting_at(2);
            let mut whole = x;
            rope(&Threads::single(), &late, style, &mut whole, 1, 6, &[1]);
            let mut tail = [3.0, 4.0, 5.0, 6.0];
            rope(&Threads::single(), &table, style, &mut tail, 1, 4, &[1]);
            assert_same_bits(&whole, &[&x[..2], &tail].concat(), "the dimensions after the first two");
        }
    }

    #[test]
    fn position_zero_changes_nothing_and_scale_scales() {
        let mut random = Random(1);
        let x = random.vec(2 * 3 * 8);
        for style in [RopeStyle::Half, RopeStyle::Interleaved] {
            let mut y = x.clone();
            rope(&Threads::single(), &RopeTable::new(&frequencies(4), 1.0, 1), style, &mut y, 3, 8, &[0, 0]);
            assert_same_bits(&y, &x, "position 0");
            rope(&Threads::single(), &RopeTable::new(&frequencies(4), 2.0, 1), style, &mut y, 3, 8, &[0, 0]);
            assert!(y.iter().zip(&x).all(|(y, x)| *y == 2.0 * x));
        }
    }

    #[test]
    fn backward_is_the_transpose() {
        // <rope(x), y> = <x, rope_backward(y)>
        let mut random = Random(2);
        let (heads, head_dim, positions) = (2, 10, [3, 77, 5000]);
        let table = RopeTable::new(&frequencies(4), 1.3, 5001);
        for style in [RopeStyle::Half, RopeStyle::Interleaved] {
            let (x, y) = (random.vec(3 * 20), random.vec(3 * 20));
            let (mut forward, mut backward) = (x.clone(), y.clone());
            rope(&Threads::single(), &table, style, &mut forward, heads, head_dim, &positions);
            rope_backward(&Threads::single(), &table, style, &mut backward, heads, head_dim, &positions);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            assert!((dot(&forward, &y) - dot(&x, &backward)).abs() <= 1e-5, "{style:?}");
            assert!((dot(&forward, &y) - dot(&x, &y)).abs() > 1e-3, "{style:?}: it did rotate");
        }
    }

    #[test]
    fn growing_gives_the_same_rows() {
        let mut grown = RopeTable::new(&frequencies(3), 1.0, 5);
        grown.grow(40);
        grown.grow(10);
        let whole = RopeTable::new(&frequencies(3), 1.0, 40);
        assert_eq!(grown.positions(), 40);
        assert_eq!(grown.rows, whole.rows);
    }

    #[test]
    fn positions_beyond_the_kept_ones_turn_by_the_same_bits() {
        let pairs = 64;
        let table = RopeTable::new(&frequencies(pairs), 1.2, 10 << 20);
        assert_eq!((table.positions(), table.rows.len()), (10 << 20, KEPT));
        let x = Random(3).vec(2 * pairs);
        for position in [KEPT as u32 / 64 - 1, KEPT as u32 / 64, 9_999_999] {
            let mut found = x.clone();
            rope(&Threads::single(), &table, RopeStyle::Half, &mut found, 1, 2 * pairs, &[position]);
            let angles: Vec<f32> = table.inv_freq.iter().map(|f| position as f32 * f).collect();
            let scaled = |x: f32, y: f32, angle: f32| {
                let (sin, cos) = sin_cos(angle);
                (x * (cos * 1.2) - y * (sin * 1.2), y * (cos * 1.2) + x * (sin * 1.2))
            };
            for (i, &angle) in angles.iter().enumerate() {
                let (low, high) = scaled(x[i], x[i + pairs], angle);
                assert_eq!((found[i], found[i + pairs]), (low, high), "position {position}, pair {i}");
            }
        }
    }
}
