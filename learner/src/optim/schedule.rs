//! Learning-rate schedules, as `transformers.optimization` computes them.
//!
//! One departure: past the last step the cosine stays at its end, where the original rises again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Stays.
    #[default]
    Constant,
    /// Falls in a line to the minimum at the last step.
    Linear,
    /// Falls along half a cosine to the minimum at the last step.
    Cosine,
    /// Stays, then falls to the minimum over the last `decay_steps` (warm-up, stable, decay).
    Wsd,
    /// Falls with one over the root of the step.
    InverseSqrt,
    /// Falls along (remaining share)^power to the minimum at the last step.
    Polynomial,
}

/// The shape of a decay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// Half a cosine.
    #[default]
    Cosine,
    /// A line.
    Linear,
    /// One minus the root of the progress.
    OneMinusSqrt,
}

/// Settings of the schedule, part of `[learner]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// `constant` (default), `linear`, `cosine`, `wsd`, `inverse_sqrt` or `polynomial`.
    pub schedule: ScheduleKind,
    /// Updates over which the rate rises from 0 in a line. Default 0.
    pub warmup_steps: u64,
    /// The rate's end as a share of `learning_rate`. In [0, 1]. Default 0.
    pub min_lr_ratio: f64,
    /// Updates of the final decay of `wsd`. Default 0.
    pub decay_steps: u64,
    /// Shape of that decay: `cosine` (default), `linear` or `one_minus_sqrt`.
    pub decay_shape: DecayShape,
    /// Power of `polynomial`. Above 0. Default 1.
    pub decay_power: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            schedule: ScheduleKind::Constant,
            warmup_steps: 0,
            min_lr_ratio: 0.0,
            decay_steps: 0,
            decay_shape: DecayShape::Cosine,
            decay_power: 1.0,
        }
    }
}

/// A schedule over a run of known length.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    config: ScheduleConfig,
    total_steps: u64,
}

impl ScheduleConfig {
    /// Everything wrong with the settings for a run of `total_steps`, one line each. Empty: all is well.
    pub fn problems(&self, total_steps: u64) -> Vec<String> {
        let mut problems = Vec::new();
        if !(0.0..=1.0).contains(&self.min_lr_ratio) {
            problems.push(format!("learner.min_lr_ratio is {}, outside 0 to 1", self.min_lr_ratio));
        }
        if !(self.decay_power > 0.0 && self.decay_power.is_finite()) {
            problems.push(format!("learner.decay_power is {}, outside values above 0", self.decay_power));
        }
        let decay_steps = if self.schedule == ScheduleKind::Wsd { self.decay_steps } else { 0 };
        if self.warmup_steps.saturating_add(decay_steps) > total_steps {
            problems.push(format!(
                "learner.warmup_steps ({}) + learner.decay_steps ({decay_steps}) exceed learner.steps ({total_steps})",
                self.warmup_steps
            ));
        }
        problems
    }
}

impl Schedule {
    /// The schedule of `config` over `total_steps` updates.
    pub fn new(config: ScheduleConfig, total_steps: u64) -> Self {
        Self { config, total_steps }
    }

    /// Factor on the learning rate for update number `step`, counted from 0.
    pub fn factor(&self, step: u64) -> f64 {
        let config = &self.config;
        let warmup = config.warmup_steps;
        if step < warmup {
            let rise = step as f64 / warmup as f64;
            return if config.schedule == ScheduleKind::Wsd { self.above_minimum(rise) } else { rise };
        }
        let progress = |from: u64, over: u64| ((step - from.min(step)) as f64 / over.max(1) as f64).min(1.0);
        let after_warmup = progress(warmup, self.total_steps.saturating_sub(warmup));
        match config.schedule {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => self.above_minimum(1.0 - after_warmup),
            ScheduleKind::Cosine => self.above_minimum(DecayShape::Cosine.remaining(after_warmup)),
            ScheduleKind::Polynomial => self.above_minimum((1.0 - after_warmup).powf(config.decay_power)),
            ScheduleKind::InverseSqrt => {
                let timescale = if warmup == 0 { 10_000 } else { warmup };
                (timescale as f64 / (step + timescale - warmup) as f64).sqrt()
            }
            ScheduleKind::Wsd => {
                let start = self.total_steps.saturating_sub(config.decay_steps);
                if step < start {
                    1.0
                } else {
                    self.above_minimum(config.decay_shape.remaining(progress(start, config.decay_steps)))
                }
            }
        }
    }

    fn above_minimum(&self, factor: f64) -> f64 {
        factor * (1.0 - self.config.min_lr_ratio) + self.config.min_lr_ratio
    }
}

impl DecayShape {
    /// What is left at `progress` in [0, 1].
    fn remaining(self, progress: f64) -> f64 {
        match self {
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Self::Linear => 1.0 - progress,
            Self::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_the_end_the_rate_stays_at_the_minimum() {
        for schedule in
            [ScheduleKind::Linear, ScheduleKind::Cosine, ScheduleKind::Wsd, ScheduleKind::Polynomial]
        {
            let config = ScheduleConfig { schedule, min_lr_ratio: 0.1, decay_steps: 5, ..Default::default() };
            let schedule = Schedule::new(config, 20);
            for step in [20, 21, 40] {
                assert!((schedule.factor(step) - 0.1).abs() <= 1e-12, "{schedule:?} at {step}");
            }
        }
    }

    #[test]
    fn a_warm_up_longer_than_the_run_is_a_problem() {
        let config = ScheduleConfig { warmup_steps: 30, min_lr_ratio: f64::NAN, ..Default::default() };
        assert_eq!(config.problems(20).len(), 2);
        assert!(config.problems(20)[1].contains("learner.warmup_steps (30)"));
    }
}
