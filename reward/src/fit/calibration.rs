//! Calibration: from a score to a probability that means what it says.
//!
//! Platt's: p = 1 / (1 + exp(−(a x + b))), fitted by Newton's method with his smoothed targets, as written down by Lin, Lin and Weng (2007, "A note on
//! Platt's probabilistic outputs for support vector machines"), sign of the exponent aside. Isotonic: the non-decreasing function with the least squared
//! error, by pooling adjacent violators (Zadrozny and Elkan, 2002), straight between its points and level outside. Both never fall as the score rises.

use serde::{Deserialize, Serialize};

const ITERATIONS: usize = 100;
const RIDGE: f64 = 1e-12;
const GRADIENT_MIN: f64 = 1e-8;
const STEP_MIN: f64 = 1e-10;
/// More than these are no calibration but a copy of the examples.
const POINTS_MAX: usize = 1 << 20;

/// A non-decreasing function from scores to probabilities.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case", deny_unknown_fields)]
pub enum Curve {
    /// 1 / (1 + exp(−(a x + b))).
    Platt {
        /// Slope, 0 or more.
        a: f64,
        /// Offset.
        b: f64,
    },
    /// Straight lines between `[score, probability]` points.
    Isotonic {
        /// By rising score.
        points: Vec<[f64; 2]>,
    },
}

impl Curve {
    /// The probability of a score.
    ///
    /// # Panics
    /// If it is an isotonic curve without points.
    pub fn probability(&self, score: f64) -> f64 {
        match self {
            Self::Platt { a, b } => logistic(a * score + b),
            Self::Isotonic { points } => {
                let at = points.partition_point(|[x, _]| *x <= score);
                let Some(&[x1, p1]) = points.get(at) else { return points[points.len() - 1][1] };
                let Some(&[x0, p0]) = at.checked_sub(1).map(|below| &points[below]) else { return p1 };
                // Rounding must not carry it past either end.
                (p0 + (p1 - p0) * ((score - x0) / (x1 - x0))).clamp(p0, p1)
            }
        }
    }

    /// What is wrong with it, if anything.
    ///
    /// # Errors
    /// A slope that is negative or not finite; points that are not finite, not rising, not probabilities, or none.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Platt { a, b } if !(*a >= 0.0 && a.is_finite() && b.is_finite()) => {
                Err(format!("a = {a} must be 0 or more and b = {b} finite"))
            }
            Self::Platt { .. } => Ok(()),
            Self::Isotonic { points } => {
                if !(1..=POINTS_MAX).contains(&points.len()) {
                    return Err(format!("must have 1 to {POINTS_MAX} points, has {}", points.len()));
                }
                if let Some([x, p]) = points.iter().find(|[x, p]| !(x.is_finite() && (0.0..=1.0).contains(p)))
                {
                    return Err(format!("the point [{x}, {p}] is no score and probability"));
                }
                match points.windows(2).find(|pair| !(pair[0][0] < pair[1][0] && pair[0][1] <= pair[1][1])) {
                    Some(pair) => Err(format!("the points fall from {:?} to {:?}", pair[0], pair[1])),
                    None => Ok(()),
                }
            }
        }
    }

    /// Platt's constants for scores with labels.
    ///
    /// # Errors
    /// If either label never occurs, a score is not finite, or scores fall where labels rise.
    pub fn platt(samples: &[(f64, bool)]) -> Result<Self, String> {
        check_samples(samples)?;
        let (a, b) = newton(samples);
        if a < 0.0 {
            return Err(format!(
                "the score falls where the label is true (slope {a:.3}); are the labels the right way round?"
            ));
        }
        let curve = Self::Platt { a, b };
        curve.check().map(|()| curve)
    }

    /// The isotonic curve of scores with labels.
    ///
    /// # Errors
    /// If either label never occurs or a score is not finite.
    pub fn isotonic(samples: &[(f64, bool)]) -> Result<Self, String> {
        check_samples(samples)?;
        let mut sorted = samples.to_vec();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        // Blocks of (lowest score, highest score, sum of labels, samples), means rising.
        let mut blocks: Vec<(f64, f64, f64, f64)> = Vec::new();
        for tied in sorted.chunk_by(|a, b| a.0 == b.0) {
            let yes = tied.iter().filter(|(_, label)| *label).count() as f64;
            let mut block = (tied[0].0, tied[0].0, yes, tied.len() as f64);
            while let Some(below) = blocks.pop_if(|below| below.2 * block.3 >= block.2 * below.3) {
                block = (below.0, block.1, below.2 + block.2, below.3 + block.3);
            }
            blocks.push(block);
        }
        let mut points = Vec::new();
        for (low, high, yes, n) in blocks {
            points.push([low, yes / n]);
            if high > low {
                points.push([high, yes / n]);
            }
        }
        let curve = Self::Isotonic { points };
        curve.check().map(|()| curve)
    }
}

/// 1 / (1 + exp(−z)), without overflow.
pub fn logistic(z: f64) -> f64 {
    if z >= 0.0 { 1.0 / (1.0 + (-z).exp()) } else { z.exp() / (1.0 + z.exp()) }
}

fn check_samples(samples: &[(f64, bool)]) -> Result<(), String> {
    let positive = samples.iter().filter(|(_, label)| *label).count();
    if positive == 0 || positive == samples.len() {
        return Err(format!("{} examples, {positive} of them true; both labels are needed", samples.len()));
    }
    match samples.iter().find(|(score, _)| !score.is_finite()) {
        Some((score, _)) => Err(format!("the score {score} is not a finite number")),
        None => Ok(()),
    }
}

fn newton(samples: &[(f64, bool)]) -> (f64, f64) {
    let positive = samples.iter().filter(|(_, label)| *label).count() as f64;
    let negative = samples.len() as f64 - positive;
    let (high, low) = ((positive + 1.0) / (positive + 2.0), 1.0 / (negative + 2.0));
    let target = |label: bool| if label { high } else { low };
    let loss = |a: f64, b: f64| -> f64 {
        let term = |(score, label): &(f64, bool)| {
            let z = a * score + b;
            // -t ln p - (1 - t) ln (1 - p), without overflow.
            z.max(0.0) - target(*label) * z + (-z.abs()).exp().ln_1p()
        };
        samples.iter().map(term).sum()
    };
    let (mut a, mut b) = (0.0, ((positive + 1.0) / (negative + 1.0)).ln());
    let mut value = loss(a, b);
    for _ in 0..ITERATIONS {
        let (mut ga, mut gb, mut haa, mut hab, mut hbb) = (0.0, 0.0, RIDGE, 0.0, RIDGE);
        for (score, label) in samples {
            let p = logistic(a * score + b);
            let (d, w) = (p - target(*label), p * (1.0 - p));
            ga += d * score;
            gb += d;
            haa += w * score * score;
            hab += w * score;
            hbb += w;
        }
        if ga.abs() < GRADIENT_MIN && gb.abs() < GRADIENT_MIN {
            break;
        }
        let det = haa * hbb - hab * hab;
        let (da, db) = (-(hbb * ga - hab * gb) / det, -(haa * gb - hab * ga) / det);
        let slope = ga * da + gb * db;
        let mut step = 1.0;
        loop {
            let reached = loss(a + step * da, b + step * db);
            if reached < value + 1e-4 * step * slope {
                (a, b, value) = (a + step * da, b + step * db, reached);
                break;
            }
            step /= 2.0;
            if step < STEP_MIN {
                return (a, b);
            }
        }
    }
    (a, b)
}

#[cfg(test)]
mod tests {
    use freewheel_types::CounterRng;
    use proptest::prelude::*;

    use super::*;
    use crate::fit::calibration_error;

    #[test]
    fn platt_finds_the_constants_that_made_the_labels() {
        let truth = Curve::Platt { a: 1.7, b: -0.6 };
        let samples: Vec<(f64, bool)> = (0..20_000)
            .map(|i| {
                let rng = CounterRng::new(3, i);
                let score = rng.normal(0) * 2.0;
                (score, rng.uniform(2) < truth.probability(score))
            })
            .collect();
        let fitted = Curve::platt(&samples).unwrap();
        let Curve::Platt { a, b } = fitted else { panic!("{fitted:?}") };
        assert!((a - 1.7).abs() <= 0.08 && (b + 0.6).abs() <= 0.08, "{fitted:?}");
        let error = |curve: &Curve| {
            calibration_error(samples.iter().map(|(x, label)| (curve.probability(*x), *label)))
        };
        let before = error(&Curve::Platt { a: 1.0, b: 0.0 });
        assert!(error(&fitted) <= 0.01 && before >= 0.05, "{} from {before}", error(&fitted));
        assert!(error(&Curve::isotonic(&samples).unwrap()) <= 0.01);
    }

    #[test]
    fn platt_by_hand() {
        // Symmetric scores: b = 0, and a solves p(1) = the smoothed target (2 + 1) / (2 + 2) = 3/4, so a = ln 3.
        let fitted = Curve::platt(&[(-1.0, false), (-1.0, false), (1.0, true), (1.0, true)]).unwrap();
        let Curve::Platt { a, b } = fitted else { panic!("{fitted:?}") };
        assert!((a - 3_f64.ln()).abs() <= 1e-6 && b.abs() <= 1e-6, "{a} {b}");
    }

    #[test]
    fn isotonic_by_hand() {
        // 0 | 1 0 pooled to 1/2 | 1; ties at 4 are one block.
        let samples = [(1.0, false), (2.0, true), (3.0, false), (4.0, true), (4.0, true)];
        let curve = Curve::isotonic(&samples).unwrap();
        assert_eq!(curve, Curve::Isotonic { points: vec![[1.0, 0.0], [2.0, 0.5], [3.0, 0.5], [4.0, 1.0]] });
        let expected = [(0.0, 0.0), (1.5, 0.25), (2.0, 0.5), (2.7, 0.5), (3.5, 0.75), (9.0, 1.0)];
        for (x, p) in expected {
            assert_eq!(curve.probability(x), p, "{x}");
        }
    }

    #[test]
    fn what_cannot_be_fitted_is_refused() {
        assert!(Curve::platt(&[(1.0, true), (2.0, true)]).unwrap_err().contains("both labels"));
        assert!(Curve::isotonic(&[(1.0, false)]).unwrap_err().contains("both labels"));
        assert!(Curve::platt(&[(f64::NAN, true), (2.0, false)]).unwrap_err().contains("finite"));
        let backwards = [(1.0, false), (2.0, false), (-1.0, true), (-2.0, true)];
        assert!(Curve::platt(&backwards).unwrap_err().contains("right way round"));
        for points in [vec![], vec![[0.0, 0.5], [1.0, 0.4]], vec![[1.0, 0.1], [1.0, 0.2]], vec![[0.0, 1.5]]] {
            assert!(Curve::Isotonic { points }.check().is_err());
        }
    }

    proptest! {
        #[test]
        fn curves_rise_and_stay_probabilities(
            samples in prop::collection::vec((-9.0..9.0_f64, any::<bool>()), 2..60),
            mut scores in prop::collection::vec(-1e6..1e6_f64, 2..40),
        ) {
            scores.extend(samples.iter().map(|(x, _)| *x));
            scores.sort_by(f64::total_cmp);
            for curve in [Curve::platt(&samples), Curve::isotonic(&samples)].into_iter().flatten() {
                prop_assert_eq!(curve.check(), Ok(()));
                let found: Vec<f64> = scores.iter().map(|x| curve.probability(*x)).collect();
                prop_assert!(found.iter().all(|p| (0.0..=1.0).contains(p)), "{found:?}");
                prop_assert!(found.windows(2).all(|pair| pair[0] <= pair[1]), "{curve:?}: {found:?}");
                let text = serde_json::to_string(&curve).unwrap();
                // Numbers of 17 digits are read back to the last bit or its neighbour.
                let back: Curve = serde_json::from_str(&text).unwrap();
                let close = scores.iter().all(|x| (back.probability(*x) - curve.probability(*x)).abs() <= 1e-9);
                prop_assert!(close, "{text}");
            }
        }

        #[test]
        fn isotonic_is_the_mean_of_its_labels(
            samples in prop::collection::vec((-9.0..9.0_f64, any::<bool>()), 2..60),
        ) {
            if let Ok(curve) = Curve::isotonic(&samples) {
                let said: f64 = samples.iter().map(|(x, _)| curve.probability(*x)).sum();
                let seen = samples.iter().filter(|(_, label)| *label).count() as f64;
                prop_assert!((said - seen).abs() <= 1e-9 * seen, "{said} against {seen}");
            }
        }
    }
}
