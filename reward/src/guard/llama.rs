//! Llama Guard 3 and 4, here or behind an OpenAI-compatible server.
//!
//! ```text
//! prompt, completion ─► turns, markers made harmless ─► the guard's own template ─► distribution of the first word ─► log-odds of "unsafe"
//!                                                                                       └ beyond 5 %: categories ─► weight, hard
//! ```
//!
//! The model cards take the probability of the first token as the score. Llama Guard 3 puts a blank line before its verdict; so the score is the
//! probability that the verdict is "unsafe" with or without a blank line first: P(unsafe) + P(blank) · P(unsafe | blank), and the same for "safe".

mod native;
mod prompt;
mod served;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::categories::Categories;
use crate::config::{ComponentConfig, GuardFamily, GuardRole};
use crate::finish::Odds;
use crate::model::holds_image;
use crate::stack::{Completion, Component, Judgement, Unscored};
use native::{Native, NativePlan};
use prompt::CATEGORIES;
use served::Served;

/// Below this probability of harm nobody asks which harm.
const ASK_CATEGORIES: f64 = 0.05;
/// Less than this on both words together, and the guard hardly understood the question.
const MASS_MIN: f64 = 0.9;

/// What the first words of the verdict may be.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Verdict {
    /// Probability of "safe".
    safe: f64,
    /// Probability of "unsafe".
    harmful: f64,
}

impl Verdict {
    /// The verdict with or without a blank line before it.
    fn after_blank(self, blank: f64, then: Self) -> Self {
        Self { safe: self.safe + blank * then.safe, harmful: self.harmful + blank * then.harmful }
    }

    fn logit(self) -> f64 {
        // What underflows is as far as an f32 can say.
        let ln = |p: f64| p.max(f64::MIN_POSITIVE).ln();
        ln(self.harmful) - ln(self.safe)
    }

    fn mass(self) -> f64 {
        self.safe + self.harmful
    }
}

/// Settings, checked against the files of a model that runs here.
pub(crate) struct Plan {
    source: Source,
    role: GuardRole,
    categories: Categories,
}

enum Source {
    Native(Box<NativePlan>),
    Served(Box<Served>),
}

impl Plan {
    /// Reads tokenizer and template, not weights, and asks no server; problems as (key, message).
    pub(crate) fn new(c: &ComponentConfig, deadline: Duration) -> Result<Self, Vec<(&'static str, String)>> {
        let mut problems = Vec::new();
        if c.role == GuardRole::Both {
            let message = "Llama Guard judges \"prompt\" or \"response\" (with the prompt before it); for both, use two components";
            problems.push(("role", message.to_owned()));
        }
        let known: Vec<&str> = CATEGORIES.iter().map(|(key, _)| *key).collect();
        let categories = Categories::new(&c.categories, &known).unwrap_or_else(|found| {
            problems.extend(found.into_iter().map(|message| ("categories", message)));
            Categories::default()
        });
        let source = match (c.model.as_deref().filter(|path| !path.is_empty()), &c.remote) {
            (Some(dir), None) => NativePlan::new(dir, c.family == GuardFamily::LlamaGuard4)
                .map(|plan| Source::Native(Box::new(plan)))
                .map_err(|message| vec![("model", message)]),
            (None, Some(remote)) => {
                Served::new(remote, deadline).map(|served| Source::Served(Box::new(served)))
            }
            _ => Err(vec![(
                "model",
                "give the folder of a Llama Guard in `model`, or its server in `remote`, not both".into(),
            )]),
        };
        match source {
            Ok(source) if problems.is_empty() => Ok(Self { source, role: c.role, categories }),
            Ok(_) => Err(problems),
            Err(found) => Err(problems.into_iter().chain(found).collect()),
        }
    }
}

/// The component.
pub(crate) struct LlamaGuard {
    model: Model,
    role: GuardRole,
    categories: Categories,
    warned: AtomicBool,
}

enum Model {
    Native(Box<Native>),
    Served(Box<Served>),
}

impl LlamaGuard {
    /// Loads a model that runs here.
    pub(crate) fn new(plan: Plan, threads: usize) -> Result<Self, String> {
        let model = match plan.source {
            Source::Native(native) => Model::Native(Box::new(Native::load(*native, threads)?)),
            Source::Served(served) => Model::Served(served),
        };
        Ok(Self { model, role: plan.role, categories: plan.categories, warned: AtomicBool::new(false) })
    }

    /// Weight of the worst category, and whether one is hard; what is not known to be minor counts in full.
    fn weigh(&self, logit: f32, named: &Result<Vec<String>, String>) -> (Odds, String) {
        match named {
            Ok(names) if !names.is_empty() => {
                let weight = names.iter().map(|name| self.categories.weight(name)).fold(0.0, f32::max);
                let hard = names.iter().any(|name| self.categories.is_hard(name)).then_some(logit);
                (Odds { logit, weight, hard }, names.join(","))
            }
            Ok(_) => (Odds::of(logit), "no category".to_owned()),
            Err(said) => {
                let shown: String = said.chars().take(40).collect();
                (Odds::of(logit), format!("categories unreadable: {shown:?}"))
            }
        }
    }

    fn note_mass(&self, mass: f64) -> Option<String> {
        if mass >= MASS_MIN {
            return None;
        }
        let note = format!("only {:.0} % of the first word is a verdict", mass * 100.0);
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(mass, "a guard's first word is often no verdict; is its template right?");
        }
        Some(note)
    }
}

impl Component for LlamaGuard {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        if holds_image(completion.prompt) {
            return Err(Unscored("the prompt holds an image, which this guard is not shown".into()));
        }
        let turns = prompt::turns(completion, self.role).map_err(Unscored)?;
        let verdict = match &self.model {
            Model::Native(native) => native.verdict(&turns),
            Model::Served(served) => served.verdict(&turns),
        };
        let verdict = verdict.map_err(Unscored)?;
        let logit = verdict.logit() as f32;
        let note = self.note_mass(verdict.mass());
        if verdict.harmful <= ASK_CATEGORIES * verdict.mass() {
            return Ok(Judgement { detail: note, odds: Some(Odds::of(logit)), ..Judgement::default() });
        }
        let said = match &self.model {
            Model::Native(native) => native.categories(&turns),
            Model::Served(served) => served.categories(&turns),
        };
        let (odds, named) = self.weigh(logit, &prompt::parse(&said.map_err(Unscored)?));
        let detail = [Some(named), note].into_iter().flatten().collect::<Vec<_>>().join("; ");
        Ok(Judgement { detail: Some(detail), odds: Some(odds), ..Judgement::default() })
    }

    fn away(&self) -> Option<Duration> {
        match &self.model {
            Model::Native(_) => None,
            Model::Served(served) => served.away(),
        }
    }

    fn version(&self) -> Option<&str> {
        Some(match &self.model {
            Model::Native(native) => native.version(),
            Model::Served(served) => served.version(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_may_come_after_a_blank_line() {
        let first = Verdict { safe: 0.01, harmful: 0.02 };
        let verdict = first.after_blank(0.9, Verdict { safe: 0.25, harmful: 0.7 });
        assert!((verdict.safe - 0.235).abs() <= 1e-12 && (verdict.harmful - 0.65).abs() <= 1e-12);
        assert!((verdict.logit() - (0.65_f64 / 0.235).ln()).abs() <= 1e-12);
        let sure = Verdict { safe: 0.0, harmful: 1.0 };
        assert!((sure.logit() as f32).is_finite());
    }
}
