//! Held-out accuracy: completions by the actor's engine, judged by the run's reward stack.
//!
//! accuracy = mean over prompts of the share of right completions (avg@k); pass@k = chance that k of a prompt's completions
//! hold a right one, the unbiased estimator 1 − C(n−c, k)/C(n, k) (Chen et al. 2021, arXiv 2107.03374). Intervals are 95 %:
//! Wilson's for one completion a prompt, else a bootstrap over prompts (a prompt's completions are not independent).
//! A completion without a verdict is left out and counted, never taken for wrong.

use std::collections::BTreeMap;

use freewheel_actor::{Backend, Engine, Finished, Request, SampleSpec, StopSpec};
use freewheel_model::vision::EncodedPrompt;
use freewheel_reward::{Completion, RewardStack};
use freewheel_types::{CounterRng, FinishReason, PolicyVersion, Prompt, SamplingParams, TaskId};
use serde_json::{Map, Value, json};

/// What is asked, and how.
#[derive(Clone, Debug)]
pub struct EvalSet {
    /// Name in metrics.
    pub name: String,
    /// Held-out prompts as they are and as the model reads them.
    pub prompts: Vec<(Prompt, EncodedPrompt)>,
    /// Completions per prompt.
    pub samples: u32,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Seed of the draws.
    pub seed: u64,
    /// Longest completion.
    pub max_new_tokens: usize,
    /// What ends a completion.
    pub stop: StopSpec,
}

/// Judged completions of one prompt.
#[derive(Clone, Debug, Default, PartialEq)]
struct Tally {
    tags: Vec<String>,
    right: u32,
    judged: u32,
}

/// An accuracy with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// Prompts it is over.
    pub prompts: usize,
    /// Mean share of right completions; `None` if nothing could be judged.
    pub mean: Option<f64>,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// One evaluation.
#[derive(Clone, Debug)]
pub struct EvalReport {
    /// Name in metrics.
    pub name: String,
    /// Weights that were judged.
    pub version: PolicyVersion,
    /// Over all prompts.
    pub overall: Accuracy,
    /// Over the prompts of each tag.
    pub per_tag: BTreeMap<String, Accuracy>,
    /// (k, pass@k) for powers of two up to the completions per prompt.
    pub pass_at: Vec<(u32, f64)>,
    /// Mean tokens of a completion.
    pub length_mean: f64,
    /// Share of completions cut off.
    pub truncated: f64,
    /// Completions without a verdict.
    pub unscored: usize,
}

/// Draws and judges all completions of `set` with the weights the engine holds.
///
/// # Errors
/// If a prompt does not fit the model.
pub fn evaluate<B: Backend>(
    engine: &mut Engine<B>,
    stack: &RewardStack,
    set: &EvalSet,
) -> Result<EvalReport, freewheel_actor::ActorError> {
    let requests = set.prompts.iter().enumerate().map(|(index, (_, encoded))| {
        let task = TaskId(index as u64);
        Request {
            id: index as u64,
            prompt_ids: encoded.ids.clone(),
            tiles: encoded.tiles.clone(),
            samples: (0..set.samples).map(|k| SampleSpec { rollout: task.rollout(k) }).collect(),
            seed: set.seed,
            sampling: set.sampling,
            max_new_tokens: set.max_new_tokens,
            stop: set.stop.clone(),
        }
    });
    let finished = engine.run_to_end(requests.collect())?;
    Ok(report(set, engine.version(), &finished, stack))
}

fn report(set: &EvalSet, version: PolicyVersion, finished: &[Finished], stack: &RewardStack) -> EvalReport {
    let mut tallies: Vec<Tally> = set
        .prompts
        .iter()
        .map(|(prompt, _)| Tally { tags: prompt.tags.clone(), ..Tally::default() })
        .collect();
    let (mut unscored, mut tokens, mut truncated) = (0, 0, 0);
    for done in finished {
        let prompt = &set.prompts[done.request as usize].0;
        let cut = done.finish_reason == FinishReason::Length;
        let completion =
            Completion { prompt, text: &done.text, tokens: done.output_ids.len(), truncated: cut };
        let tally = &mut tallies[done.request as usize];
        match stack.score(&completion).correct() {
            Some(right) => {
                tally.judged += 1;
                tally.right += u32::from(right);
            }
            None => unscored += 1,
        }
        tokens += done.output_ids.len();
        truncated += usize::from(cut);
    }
    let mut tags: Vec<&String> = tallies.iter().flat_map(|tally| &tally.tags).collect();
    tags.sort();
    tags.dedup();
    let of_tag =
        |tag: &String| accuracy(&tallies.iter().filter(|tally| tally.tags.contains(tag)).collect::<Vec<_>>());
    let n = finished.len().max(1) as f64;
    EvalReport {
        name: set.name.clone(),
        version,
        overall: accuracy(&tallies.iter().collect::<Vec<_>>()),
        per_tag: tags.into_iter().map(|tag| (tag.clone(), of_tag(tag))).collect(),
        pass_at: pass_at(&tallies, set.samples),
        length_mean: tokens as f64 / n,
        truncated: truncated as f64 / n,
        unscored,
    }
}

fn accuracy(tallies: &[&Tally]) -> Accuracy {
    let shares: Vec<f64> =
        tallies.iter().filter(|t| t.judged > 0).map(|t| f64::from(t.right) / f64::from(t.judged)).collect();
    if shares.is_empty() {
        return Accuracy { prompts: 0, mean: None, low: 0.0, high: 1.0 };
    }
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    let single = tallies.iter().all(|t| t.judged <= 1);
    let (low, high) = if single { wilson(mean, shares.len()) } else { bootstrap(&shares) };
    Accuracy { prompts: shares.len(), mean: Some(mean), low, high }
}

/// Wilson's score interval, 95 %.
fn wilson(p: f64, n: usize) -> (f64, f64) {
    let (n, z) = (n as f64, 1.959_964);
    let z2n = z * z / n;
    let middle = (p + z2n / 2.0) / (1.0 + z2n);
    let half = z / (1.0 + z2n) * (p * (1.0 - p) / n + z2n / (4.0 * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// Percentiles of 1,000 means over prompts drawn with replacement; the same shares give the same interval.
fn bootstrap(shares: &[f64]) -> (f64, f64) {
    const DRAWS: u64 = 1000;
    let n = shares.len() as u64;
    let mut means: Vec<f64> = (0..DRAWS)
        .map(|draw| {
            let rng = CounterRng::new(0x0062_6f6f_7473, draw);
            (0..n).map(|i| shares[rng.below(i, n) as usize]).sum::<f64>() / n as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    (means[25], means[974])
}

fn pass_at(tallies: &[Tally], samples: u32) -> Vec<(u32, f64)> {
    let ks = (0..7).map(|power| 1 << power).filter(|k| *k <= samples);
    ks.filter_map(|k| {
        // Only prompts with k verdicts can say anything about k tries.
        let enough: Vec<&Tally> = tallies.iter().filter(|t| t.judged >= k).collect();
        let sum: f64 = enough.iter().map(|t| pass_one(t.judged, t.right, k)).sum();
        (!enough.is_empty()).then(|| (k, sum / enough.len() as f64))
    })
    .collect()
}

/// 1 − C(n−c, k)/C(n, k), as a product that cannot overflow.
fn pass_one(n: u32, c: u32, k: u32) -> f64 {
    if n - c < k {
        return 1.0;
    }
    1.0 - (n - c + 1..=n).map(|i| 1.0 - f64::from(k) / f64::from(i)).product::<f64>()
}

impl EvalReport {
    /// The report with the contract's metric names; `eval/<name>/accuracy` is absent if nothing could be judged.
    pub fn metrics(&self) -> Map<String, Value> {
        let at = format!("eval/{}", self.name);
        let mut map = Map::new();
        let put = |map: &mut Map<String, Value>, key: String, accuracy: &Accuracy| {
            if let Some(mean) = accuracy.mean {
                map.insert(key.clone(), json!(mean));
                map.insert(format!("{key}_low"), json!(accuracy.low));
                map.insert(format!("{key}_high"), json!(accuracy.high));
            }
        };
        put(&mut map, format!("{at}/accuracy"), &self.overall);
        for (k, value) in self.pass_at.iter().filter(|(k, _)| *k > 1) {
            map.insert(format!("{at}/pass@{k}"), json!(value));
        }
        for (tag, accuracy) in &self.per_tag {
            put(&mut map, format!("{at}/tag/{tag}/accuracy"), accuracy);
        }
        map.insert(format!("{at}/length_mean"), json!(self.length_mean));
        map.insert(format!("{at}/truncated"), json!(self.truncated));
        map.insert(format!("{at}/unscored"), json!(self.unscored));
        map.insert(format!("{at}/prompts"), json!(self.overall.prompts));
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_matches_the_textbook() {
        // 15 of 20: Wilson 95 % = (0.5313, 0.8881) (R: prop.test(15, 20, correct = FALSE)).
        let (low, high) = wilson(0.75, 20);
        assert!((low - 0.5313).abs() <= 1e-4 && (high - 0.8881).abs() <= 1e-4, "{low} {high}");
    }

    #[test]
    fn pass_at_k_is_the_unbiased_estimator() {
        // n = 5, c = 2, k = 2: 1 − C(3,2)/C(5,2) = 0.7.
        assert!((pass_one(5, 2, 2) - 0.7).abs() <= 1e-12);
        assert_eq!(pass_one(4, 0, 4), 0.0);
        assert_eq!(pass_one(4, 1, 4), 1.0);
        assert!((pass_one(4, 1, 1) - 0.25).abs() <= 1e-12);
    }

    #[test]
    fn what_could_not_be_judged_is_left_out_not_wrong() {
        let tally = |right, judged| Tally { tags: vec![], right, judged };
        let (a, b, c) = (tally(1, 1), tally(0, 0), tally(1, 1));
        assert_eq!(accuracy(&[&a, &b, &c]).mean, Some(1.0));
        assert_eq!(accuracy(&[&b]).mean, None);
    }

    #[test]
    fn the_bootstrap_holds_the_mean_and_repeats() {
        let shares: Vec<f64> = (0..40).map(|i| f64::from(i % 4) / 3.0).collect();
        let (low, high) = bootstrap(&shares);
        assert!(low < 0.5 && 0.5 < high && high - low < 0.35, "{low} {high}");
        assert_eq!(bootstrap(&shares), (low, high));
    }
}
