//! Weights from rankings: the hinge loss of rule-based rewards.
//!
//! Minimises l2/2 · |w|² + mean over pairs of max(0, 1 + s(worse) − s(better)), s = base + w·x (Mu et al., arXiv 2411.01111, section 4.2), by the
//! projection-free subgradient method with steps 1/(l2·t) and the mean of the later half of its steps (Shalev-Shwartz et al., Pegasos). All pairs in every step:
//! the same examples in the same order give the same bits.

const STEPS: u32 = 20_000;

/// An answer as the fit sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Ranked {
    /// Answers are compared within their group.
    pub group: String,
    /// Higher is better.
    pub rank: f64,
    /// What the rest of the reward says of it.
    pub base: f64,
    /// What is true of it: 1 or 0 for each statement.
    pub x: Vec<f64>,
}

/// Weights, and how well they order the pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// One for each input.
    pub weights: Vec<f64>,
    /// Pairs of unequal rank within a group.
    pub pairs: usize,
    /// Of those, how many the base alone orders rightly.
    pub right_before: usize,
    /// How many base and weights order rightly together.
    pub right_after: usize,
}

/// Fits weights to the order within groups.
///
/// # Errors
/// If no group holds two answers of unequal rank, inputs differ in length, a number is not finite, or `l2` is not above 0.
pub fn fit(examples: &[Ranked], l2: f64) -> Result<Fitted, String> {
    let width = examples.first().map_or(0, |example| example.x.len());
    let fine = |e: &Ranked| {
        e.x.len() == width && e.x.iter().chain([&e.rank, &e.base]).all(|number| number.is_finite())
    };
    if let Some(at) = examples.iter().position(|example| !fine(example)) {
        return Err(format!("example {} must have {width} finite inputs, rank and base", at + 1));
    }
    if !(l2 > 0.0 && l2.is_finite()) {
        return Err(format!("the penalty must be above 0 and finite, is {l2}"));
    }
    // What the better answer has over the worse one.
    let mut pairs: Vec<(f64, Vec<f64>)> = Vec::new();
    for (i, a) in examples.iter().enumerate() {
        for b in examples[i + 1..].iter().filter(|b| b.group == a.group && b.rank != a.rank) {
            let (better, worse) = if a.rank > b.rank { (a, b) } else { (b, a) };
            let x = better.x.iter().zip(&worse.x).map(|(better, worse)| better - worse).collect();
            pairs.push((better.base - worse.base, x));
        }
    }
    if pairs.is_empty() {
        return Err("no group holds two answers of unequal rank".into());
    }
    let gap = |weights: &[f64], (base, x): &(f64, Vec<f64>)| {
        base + weights.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()
    };
    let (mut weights, mut mean) = (vec![0.0; width], vec![0.0; width]);
    for t in 1..=STEPS {
        let rate = 1.0 / (l2 * f64::from(t));
        let mut slope: Vec<f64> = weights.iter().map(|w| l2 * w).collect();
        for pair in pairs.iter().filter(|pair| gap(&weights, pair) < 1.0) {
            slope.iter_mut().zip(&pair.1).for_each(|(slope, x)| *slope -= x / pairs.len() as f64);
        }
        weights.iter_mut().zip(&slope).for_each(|(w, slope)| *w -= rate * slope);
        if t > STEPS / 2 {
            mean.iter_mut().zip(&weights).for_each(|(mean, w)| *mean += w / f64::from(STEPS / 2));
        }
    }
    let right = |weights: &[f64]| pairs.iter().filter(|pair| gap(weights, pair) > 0.0).count();
    Ok(Fitted {
        pairs: pairs.len(),
        right_before: right(&vec![0.0; width]),
        right_after: right(&mean),
        weights: mean,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranked(group: &str, rank: f64, base: f64, x: &[f64]) -> Ranked {
        Ranked { group: group.into(), rank, base, x: x.to_vec() }
    }

    #[test]
    fn by_hand() {
        // One pair, x = 1 for the better: l2/2 · w² + max(0, 1 − w) is least at w = 1 for l2 ≤ 1 and at w = 1 / l2 beyond.
        let pair = [ranked("a", 1.0, 0.0, &[1.0]), ranked("a", 0.0, 0.0, &[0.0])];
        for (l2, wanted) in [(0.1, 1.0), (0.5, 1.0), (4.0, 0.25)] {
            let found = fit(&pair, l2).unwrap();
            assert!((found.weights[0] - wanted).abs() <= 2e-3, "{l2}: {found:?}");
        }
        // The base is two ahead the wrong way round: the weight makes up for it and for the margin.
        let behind = [ranked("a", 1.0, -2.0, &[1.0]), ranked("a", 0.0, 0.0, &[0.0])];
        let found = fit(&behind, 0.05).unwrap();
        assert!((found.weights[0] - 3.0).abs() <= 0.02, "{found:?}");
        assert_eq!((found.pairs, found.right_before, found.right_after), (1, 0, 1));
    }

    #[test]
    fn orders_are_found_within_groups_alone() {
        // A good sign, a bad sign, and one that says nothing; groups have bases of their own.
        let examples: Vec<Ranked> = (0..6)
            .flat_map(|g| {
                let (group, base) = (format!("g{g}"), f64::from(g) * 10.0);
                let odd = f64::from(g % 2);
                [
                    ranked(&group, 2.0, base, &[1.0, 0.0, odd]),
                    ranked(&group, 1.0, base, &[0.0, 0.0, 1.0 - odd]),
                    ranked(&group, 0.0, base, &[0.0, 1.0, odd]),
                ]
            })
            .collect();
        let found = fit(&examples, 0.01).unwrap();
        assert_eq!((found.pairs, found.right_before, found.right_after), (18, 0, 18));
        let w = &found.weights;
        assert!(w[0] > 0.8 && w[1] < -0.8 && w[2].abs() <= 0.1, "{w:?}");
        assert_eq!(fit(&examples, 0.01).unwrap(), found);
    }

    #[test]
    fn what_cannot_be_fitted_is_refused() {
        let alone = [ranked("a", 1.0, 0.0, &[1.0]), ranked("b", 0.0, 0.0, &[0.0])];
        assert!(fit(&alone, 0.1).unwrap_err().contains("no group"));
        assert!(fit(&[], 0.1).unwrap_err().contains("no group"));
        let uneven = [ranked("a", 1.0, 0.0, &[1.0]), ranked("a", 0.0, 0.0, &[])];
        assert!(fit(&uneven, 0.1).unwrap_err().contains("example 2"));
        assert!(fit(&alone, 0.0).unwrap_err().contains("above 0"));
    }
}
