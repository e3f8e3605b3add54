//! Folds for cross-validation, the same on every machine.

use std::collections::BTreeMap;

use freewheel_types::Digest;

/// The fold, 0 to `k - 1`, of every item `(text, stratum)`.
///
/// Equal texts share a fold, so that what is held out was not seen; within a stratum texts are dealt out in the order of their digests, so
/// that folds are alike in their labels and do not depend on the order of the file.
///
/// # Panics
/// If `k` is 0.
pub fn folds(items: &[(&str, &str)], k: usize) -> Vec<usize> {
    assert!(k > 0, "at least one fold");
    let keys: Vec<Digest> = items.iter().map(|(text, _)| Digest::of(text.as_bytes())).collect();
    // The first occurrence decides the stratum of a text.
    let mut strata: BTreeMap<[u8; 32], &str> = BTreeMap::new();
    for (key, (_, stratum)) in keys.iter().zip(items) {
        strata.entry(key.0).or_insert(stratum);
    }
    let mut dealt: BTreeMap<&str, usize> = BTreeMap::new();
    let fold_of: BTreeMap<[u8; 32], usize> = strata
        .into_iter()
        .map(|(key, stratum)| {
            let next = dealt.entry(stratum).or_default();
            let fold = *next % k;
            *next += 1;
            (key, fold)
        })
        .collect();
    keys.iter().map(|key| fold_of[&key.0]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_are_alike_keep_equal_texts_together_and_ignore_the_order() {
        let texts: Vec<String> = (0..100).map(|i| format!("text {}", i % 80)).collect();
        let stratum = |i: usize| if (i % 80).is_multiple_of(4) { "yes" } else { "no" };
        let items: Vec<(&str, &str)> = texts.iter().enumerate().map(|(i, t)| (&**t, stratum(i))).collect();
        let found = folds(&items, 5);
        for i in 80..100 {
            assert_eq!(found[i], found[i - 80], "equal texts");
        }
        for fold in 0..5 {
            let count = |wanted: &str| (0..80).filter(|i| found[*i] == fold && items[*i].1 == wanted).count();
            assert_eq!((count("yes"), count("no")), (4, 12));
        }
        let reversed: Vec<_> = items.iter().rev().copied().collect();
        let back: Vec<usize> = folds(&reversed, 5).into_iter().rev().collect();
        assert_eq!(back[..80], found[..80]);
    }
}
