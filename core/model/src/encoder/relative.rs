//! DeBERTa's distances: which row of the table a query and a key look at.

use super::spec::RelativeSpec;

/// Row of the table for every distance query − key that occurs.
#[derive(Debug)]
pub(super) struct Distances {
    /// Row for distance `i − (max_positions − 1)`.
    rows: Vec<u32>,
    /// Index of distance 0.
    zero: usize,
    /// Rows of the table, 2·S.
    pub table_rows: usize,
}

impl Distances {
    pub fn new(spec: &RelativeSpec, max_positions: usize) -> Self {
        let span = spec.span() as i64;
        let zero = max_positions as i64 - 1;
        let row = |distance: i64| {
            let bucket = match spec.buckets {
                Some(buckets) => log_bucket(distance, buckets, spec.max_distance),
                None => distance,
            };
            (bucket + span).clamp(0, 2 * span - 1) as u32
        };
        Self { rows: (-zero..=zero).map(row).collect(), zero: zero as usize, table_rows: 2 * span as usize }
    }

    /// Rows for the query at `query` and the keys 0, 1, … : read backwards, since the distance falls.
    pub fn of_query(&self, query: usize, keys: usize) -> impl Iterator<Item = usize> {
        let last = self.zero + query;
        self.rows[last + 1 - keys..=last].iter().rev().map(|&row| row as usize)
    }
}

/// `make_log_bucket_position`: near distances as they are, far ones in logarithmic steps up to `max_distance`.
fn log_bucket(distance: i64, buckets: usize, max_distance: usize) -> i64 {
    let middle = (buckets / 2) as i64;
    let size = distance.abs();
    if size <= middle {
        return distance;
    }
    // In f32 and in this order, as the reference library: the ceiling is sensitive to a last digit.
    let ratio =
        (size as f32 / middle as f32).ln() / (((max_distance as f64 - 1.0) / middle as f64) as f32).ln();
    let log = (ratio * (middle - 1) as f32).ceil() as i64 + middle;
    log * distance.signum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_the_reference() {
        // make_log_bucket_position(range, 8, 128) in transformers.
        let bucket = |distance| log_bucket(distance, 8, 128);
        assert_eq!([0, 1, 4, -4].map(bucket), [0, 1, 4, -4]);
        assert_eq!([5, 12, 13, 40, 41, 127].map(bucket), [5, 5, 6, 6, 7, 7]);
        assert_eq!([-5, -13, -127].map(bucket), [-5, -6, -7]);
    }

    #[test]
    fn a_querys_rows_go_down_with_the_key() {
        let spec = RelativeSpec {
            buckets: None,
            max_distance: 4,
            content_to_position: true,
            position_to_content: false,
            shared_projections: true,
            normalised: false,
        };
        let distances = Distances::new(&spec, 10);
        assert_eq!(distances.of_query(1, 3).collect::<Vec<_>>(), [5, 4, 3]);
        assert_eq!(distances.of_query(9, 10).collect::<Vec<_>>(), [7, 7, 7, 7, 7, 7, 7, 6, 5, 4]);
        assert_eq!(distances.of_query(0, 10).last(), Some(0));
    }
}
