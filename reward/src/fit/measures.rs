//! How good scores are against labels.

/// Bins of [`calibration_error`].
const BINS: usize = 10;

/// Expected calibration error over ten equal bins of probability: the mean distance, weighted by samples, between what was predicted and what
/// was seen (Guo et al., arXiv 1706.04599, eq. 3, for a binary label). 0 for no samples.
pub fn calibration_error(samples: impl IntoIterator<Item = (f64, bool)>) -> f64 {
    let (mut bins, mut n) = ([(0.0, 0.0); BINS], 0.0);
    for (p, label) in samples {
        let bin = &mut bins[((p * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + p, bin.1 + f64::from(u8::from(label)));
        n += 1.0;
    }
    bins.iter().map(|(p, seen)| (p - seen).abs()).sum::<f64>() / f64::max(n, 1.0)
}

/// Probability that a positive scores above a negative, ties counted half; `None` if either is missing or a score is not a number.
pub fn auc(samples: &[(f64, bool)]) -> Option<f64> {
    if samples.iter().any(|(score, _)| score.is_nan()) {
        return None;
    }
    let mut sorted = samples.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut above_pairs, mut positives) = (0.0, 0.0, 0.0);
    for tied in sorted.chunk_by(|a, b| a.0 == b.0) {
        let yes = tied.iter().filter(|(_, label)| *label).count() as f64;
        let no = tied.len() as f64 - yes;
        above_pairs += yes * (below + no / 2.0);
        positives += yes;
        below += no;
    }
    (positives > 0.0 && below > 0.0).then(|| above_pairs / (positives * below))
}

/// Right and wrong decisions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Said and so.
    pub true_positives: u64,
    /// Said, but not so.
    pub false_positives: u64,
    /// So, but not said.
    pub false_negatives: u64,
    /// Neither.
    pub true_negatives: u64,
}

impl Counts {
    /// Decisions `said`, each with what is so.
    pub fn of(decisions: impl IntoIterator<Item = (bool, bool)>) -> Self {
        let mut counts = Self::default();
        for decision in decisions {
            match decision {
                (true, true) => counts.true_positives += 1,
                (true, false) => counts.false_positives += 1,
                (false, true) => counts.false_negatives += 1,
                (false, false) => counts.true_negatives += 1,
            }
        }
        counts
    }

    /// 2·TP / (2·TP + FP + FN); `None` where nothing is positive and nothing was called so.
    pub fn f1(&self) -> Option<f64> {
        let all = 2 * self.true_positives + self.false_positives + self.false_negatives;
        (all > 0).then(|| (2 * self.true_positives) as f64 / all as f64)
    }

    /// Share of the positives that were found.
    pub fn recall(&self) -> Option<f64> {
        let all = self.true_positives + self.false_negatives;
        (all > 0).then(|| self.true_positives as f64 / all as f64)
    }

    /// Share of the negatives that were called positive.
    pub fn false_positive_rate(&self) -> Option<f64> {
        let all = self.false_positives + self.true_negatives;
        (all > 0).then(|| self.false_positives as f64 / all as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // Bin 0: two at 0.05, none so. Bin 7: two at 0.7, one so. Bin 9: one at 1.0, so.
        let samples = [(0.05, false), (0.05, false), (0.7, true), (0.7, false), (1.0, true)];
        let error = calibration_error(samples);
        assert!((error - (0.1 + 0.4 + 0.0) / 5.0).abs() <= 1e-12, "{error}");
        // Pairs: 0.7 beats both 0.05 and ties one 0.7; 1.0 beats all three.
        assert_eq!(auc(&samples), Some(5.5 / 6.0));
        assert_eq!(auc(&[(1.0, true)]), None);
        assert_eq!(auc(&[(f64::NAN, true), (0.0, false)]), None);
        let counts = Counts::of(samples.map(|(p, label)| (p > 0.5, label)));
        assert_eq!((counts.true_positives, counts.false_positives, counts.false_negatives), (2, 1, 0));
        assert_eq!((counts.f1(), counts.recall()), (Some(0.8), Some(1.0)));
        assert_eq!(counts.false_positive_rate(), Some(1.0 / 3.0));
        assert_eq!(Counts::default().f1(), None);
    }
}
