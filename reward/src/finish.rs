//! From what a component found to the value that everything else reads.
//!
//! ```text
//! score ─► calibration ─► + margin (log-odds) ─► × weight of the worst category ─► value, and a guard's class
//! ```
//!
//! Every step is non-decreasing, so more harm never gives a lower value. The margin moves the threshold: an answer counts as harmful while it is within
//! so many log-odds below it, since training against a guard leads answers to its edge (Boundary Guidance, arXiv 2510.11834).

use std::path::Path;

use freewheel_types::Digest;
use serde::{Deserialize, Serialize};

use crate::fit::calibration::{Curve, logistic};
use crate::json_file;
use crate::stack::Judgement;

/// Classes of guards whose scores are log-odds.
pub(crate) const GUARD_CLASSES: [&str; 3] = ["safe", "unsafe", "hard"];

/// A score as log-odds, before calibration, and what the harm found is worth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Odds {
    /// ln p / (1 - p).
    pub logit: f32,
    /// Factor of the probability, 0 to 1: weight of the worst category.
    pub weight: f32,
    /// Log-odds of the worst that must never happen, if there is such.
    pub hard: Option<f32>,
}

impl Odds {
    /// Log-odds that count in full.
    pub fn of(logit: f32) -> Self {
        Self { logit, weight: 1.0, hard: None }
    }
}

/// What `calibrate` names: a curve, and what it was fitted to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// From score to probability.
    pub curve: Curve,
    /// The component it was fitted to.
    pub component: String,
    /// Version of that component's model, if it has one; another model needs another calibration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_version: Option<String>,
    /// Examples.
    pub samples: usize,
    /// Those with a true label.
    pub positives: usize,
    /// Expected calibration error on examples that were held out: of the score as it was.
    pub error_before: f64,
    /// The same after calibration.
    pub error_after: f64,
}

impl Calibration {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// If it cannot be read, is too large, is no calibration, or its curve falls.
    pub fn read(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let read: Self = json_file::read(path, "freewheel guard calibrate")?;
        read.curve.check().map_err(|why| format!("{shown}: {why}"))?;
        Ok(read)
    }
}

/// What is done to every judgement of one component.
#[derive(Clone, Debug, Default)]
pub(crate) struct Finish {
    calibration: Option<Calibration>,
    margin: f32,
    /// Above it a guard's value is of class "unsafe".
    threshold: f32,
}

impl Finish {
    pub(crate) fn new(calibration: Option<Calibration>, margin: f32, threshold: f32) -> Self {
        Self { calibration, margin, threshold }
    }

    /// Identity of the calibration, part of the reward version.
    pub(crate) fn version(&self) -> Option<String> {
        let bytes = serde_json::to_vec(&self.calibration.as_ref()?.curve).ok()?;
        Some(Digest::of(&bytes).to_string()[..16].to_owned())
    }

    /// What is wrong between the calibration and a component whose model has `version`.
    pub(crate) fn mismatch(&self, version: Option<&str>) -> Option<String> {
        let fitted = self.calibration.as_ref()?.model_version.as_deref()?;
        match version {
            Some(version) if version == fitted => None,
            other => Some(format!(
                "was fitted to a model of version {fitted}, this one is {}; fit it again with `freewheel guard calibrate`",
                other.unwrap_or("without a version")
            )),
        }
    }

    fn probability(&self, score: f64, log_odds: bool) -> f64 {
        let p = match &self.calibration {
            Some(calibration) => calibration.curve.probability(score),
            None if log_odds => logistic(score),
            None => score,
        };
        if self.margin == 0.0 {
            return p;
        }
        // ln p / (1 - p) of 0 and 1 are infinite and stay so.
        logistic(p.ln() - (-p).ln_1p() + f64::from(self.margin))
    }

    pub(crate) fn apply(&self, judgement: Judgement) -> Judgement {
        if judgement.odds.is_none() && self.calibration.is_none() && self.margin == 0.0 {
            return judgement;
        }
        let Judgement { value, detail, mut label, odds } = judgement;
        let score = f64::from(odds.map_or(value, |odds| odds.logit));
        let p = self.probability(score, odds.is_some());
        let value = (p * odds.map_or(1.0, |odds| f64::from(odds.weight))) as f32;
        if let Some(odds) = odds {
            let over = |hard: f32| self.probability(hard.into(), true) as f32 > self.threshold;
            let class = match odds.hard {
                Some(hard) if over(hard) => 2,
                _ => usize::from(value > self.threshold),
            };
            label = Some(GUARD_CLASSES[class].to_owned());
        }
        let said = self.calibration.is_some().then(|| format!("score {score:.3}"));
        let detail = [said, detail].into_iter().flatten().collect::<Vec<_>>().join("; ");
        Judgement { value, detail: (!detail.is_empty()).then_some(detail), label, odds }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn calibration(a: f64, b: f64) -> Calibration {
        Calibration {
            curve: Curve::Platt { a, b },
            component: "guard".into(),
            model_version: Some("v1".into()),
            samples: 2,
            positives: 1,
            error_before: 0.2,
            error_after: 0.1,
        }
    }

    fn guard(logit: f32, weight: f32, hard: bool) -> Judgement {
        let hard = hard.then_some(logit);
        Judgement { odds: Some(Odds { logit, weight, hard }), ..Judgement::default() }
    }

    #[test]
    fn by_hand() {
        let plain = Finish::new(None, 0.0, 0.5);
        let value = |finish: &Finish, j: Judgement| {
            let j = finish.apply(j);
            (j.value, j.label.unwrap_or_default())
        };
        // p = 3/4.
        let logit = 3_f32.ln();
        assert_eq!(value(&plain, guard(logit, 1.0, false)), (0.75, "unsafe".into()));
        assert_eq!(value(&plain, guard(logit, 0.4, false)), (0.3, "safe".into()));
        assert_eq!(value(&plain, guard(logit, 0.4, true)), (0.3, "hard".into()));
        assert_eq!(value(&plain, guard(-logit, 1.0, true)), (0.25, "safe".into()));
        // A margin of ln 3 takes 1/4 to 1/2 and 1/2 to 3/4; certainty stays.
        let wide = Finish::new(None, logit, 0.5);
        assert!((value(&wide, guard(-logit, 1.0, false)).0 - 0.5).abs() <= 1e-6);
        let words = |value| Judgement { value, ..Judgement::default() };
        assert!((value(&wide, words(0.5)).0 - 0.75).abs() <= 1e-6);
        assert_eq!((value(&wide, words(0.0)).0, value(&wide, words(1.0)).0), (0.0, 1.0));
        // Calibration reads the logit: 2 · ln 3 - ln 3.
        let fitted = Finish::new(Some(calibration(2.0, f64::from(-logit))), 0.0, 0.5);
        let found = fitted.apply(Judgement { detail: Some("S1".into()), ..guard(logit, 1.0, false) });
        assert!((found.value - 0.75).abs() <= 1e-6);
        assert_eq!(found.detail.as_deref(), Some("score 1.099; S1"));
        // What has no odds and is not calibrated is left alone, a reward model's 7 too.
        assert_eq!(plain.apply(words(7.0)), words(7.0));
    }

    #[test]
    fn a_calibration_belongs_to_its_model() {
        let finish = Finish::new(Some(calibration(1.0, 0.0)), 0.0, 0.5);
        assert_eq!(finish.mismatch(Some("v1")), None);
        assert!(finish.mismatch(Some("v2")).unwrap().contains("version v1, this one is v2"));
        assert_ne!(finish.version(), Finish::new(Some(calibration(1.5, 0.0)), 0.0, 0.5).version());
    }

    #[test]
    fn files_are_read_back_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.json");
        std::fs::write(&path, serde_json::to_string(&calibration(1.5, 0.5)).unwrap()).unwrap();
        assert_eq!(Calibration::read(&path), Ok(calibration(1.5, 0.5)));
        for (text, part) in [
            (r#"{"curve": 1}"#, "no file of `freewheel guard calibrate`"),
            (&serde_json::to_string(&calibration(-1.0, 0.0)).unwrap(), "0 or more"),
        ] {
            std::fs::write(&path, text).unwrap();
            let why = Calibration::read(&path).unwrap_err();
            assert!(why.contains(part) && why.contains("c.json"), "{why}");
        }
        assert!(Calibration::read(&dir.path().join("no")).unwrap_err().contains("cannot be read"));
    }

    proptest! {
        #[test]
        fn more_harm_never_gives_a_lower_value(
            a in 0.0..5.0_f64, b in -5.0..5.0_f64, margin in 0.0..5.0_f32,
            low in -40.0..40.0_f32, rise in 0.0..10.0_f32, weight in 0.0..=1.0_f32, calibrated: bool,
        ) {
            let finish = Finish::new(calibrated.then(|| calibration(a, b)), margin, 0.5);
            let value = |logit| finish.apply(guard(logit, weight, false)).value;
            prop_assert!(value(low) <= value(low + rise));
            prop_assert!((0.0..=1.0).contains(&value(low)));
            let narrow = Finish::new(calibrated.then(|| calibration(a, b)), 0.0, 0.5);
            prop_assert!(narrow.apply(guard(low, weight, false)).value <= value(low), "a margin never helps");
        }
    }
}
