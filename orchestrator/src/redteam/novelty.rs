//! How much of a text is new: MinHash over its runs of three words (Broder 1997).

use freewheel_types::{CounterRng, Digest};

/// Hashes kept; the estimate's deviation is 1/16 at most.
const HASHES: usize = 64;
const KEY: u64 = 0x006d_696e_6861_7368;

/// The smallest hash of the runs of a text, under each of some hash functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sketch([u64; HASHES]);

impl Sketch {
    /// The sketch of `text`; white space and case do not count.
    pub fn of(text: &str) -> Self {
        let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
        let mut least = [u64::MAX; HASHES];
        let mut take = |run: &[String]| {
            let bytes = Digest::of(run.join(" ").as_bytes()).0;
            let hash = u64::from_le_bytes(bytes[..8].try_into().expect("a digest has 32 bytes"));
            let rng = CounterRng::new(KEY, hash);
            for (k, least) in least.iter_mut().enumerate() {
                *least = (*least).min(rng.u64(k as u64));
            }
        };
        if words.len() < 3 {
            take(&words)
        } else {
            words.windows(3).for_each(take)
        }
        Self(least)
    }

    /// 1 less the estimated share of runs that both have.
    pub fn distance(&self, other: &Self) -> f64 {
        let same = self.0.iter().zip(&other.0).filter(|(a, b)| a == b).count();
        1.0 - same as f64 / HASHES as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_is_near_the_overlap() {
        let words =
            |from: usize, to: usize| (from..to).map(|i| format!("w{i}")).collect::<Vec<_>>().join(" ");
        let whole = Sketch::of(&words(0, 102));
        assert_eq!(whole.distance(&Sketch::of(&words(0, 102).to_uppercase())), 0.0);
        assert_eq!(whole.distance(&Sketch::of(&words(500, 600))), 1.0);
        // 50 of 150 runs are in both.
        let half = whole.distance(&Sketch::of(&words(50, 152)));
        assert!((half - 2.0 / 3.0).abs() <= 0.2, "{half}");
        assert!(Sketch::of("").distance(&Sketch::of("one word")) > 0.5);
    }
}
