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
use freewheel_types::{FinishReason, PolicyVersion, Prompt, SamplingParams, TaskId};
use serde_json::{Map, Value, json};

use crate::intervals::{bootstrap, wilson};

impl Judged {
    /// Prompts whose completions gave no cost at all, because they could not be judged.
    pub fn without_costs(&self) -> usize {
        self.tallies.iter().filter(|tally| tally.costs.is_empty()).count()
    }
}

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
pub struct Tally {
    /// The prompt's tags.
    pub tags: Vec<String>,
    /// Right completions.
    pub right: u32,
    /// Completions with a verdict.
    pub judged: u32,
    /// Limited costs by name, of the completions they are about.
    pub costs: BTreeMap<String, Vec<f64>>,
}

/// All judged completions of a set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged {
    /// A tally a prompt, in order.
    pub tallies: Vec<Tally>,
    /// Completions without a verdict.
    pub unscored: usize,
    completions: usize,
    tokens: usize,
    truncated: usize,
}

/// A mean over prompts with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Prompts it is over.
    pub prompts: usize,
    /// Mean of the prompts' means; `None` if nothing could be judged.
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
    /// Share of right completions over all prompts.
    pub overall: Estimate,
    /// The same over the prompts of each tag.
    pub per_tag: BTreeMap<String, Estimate>,
    /// Limited costs (`reward.combine.lagrangian`), each over the prompts it is about.
    pub costs: BTreeMap<String, Estimate>,
    /// (k, pass@k) for powers of two up to the completions per prompt.
    pub pass_at: Vec<(u32, f64)>,
    /// Mean tokens of a completion.
    pub length_mean: f64,
    /// Share of completions cut off.
    pub truncated: f64,
    /// Completions without a verdict.
    pub unscored: usize,
}

/// Draws and judges all completions of `set` with the weights the engine holds, and sums up.
///
/// # Errors
/// If a prompt does not fit the model.
pub fn evaluate<B: Backend>(
    engine: &mut Engine<B>,
    stack: &RewardStack,
    set: &EvalSet,
) -> Result<EvalReport, freewheel_actor::ActorError> {
    let judged = judge(engine, stack, set)?;
    Ok(report(set, engine.version(), judged))
}

/// Draws and judges all completions of `set` with the weights the engine holds.
///
/// # Errors
/// If a prompt does not fit the model.
pub fn judge<B: Backend>(
    engine: &mut Engine<B>,
    stack: &RewardStack,
    set: &EvalSet,
) -> Result<Judged, freewheel_actor::ActorError> {
    Ok(tally(set, &draw(engine, set)?, stack))
}

/// Draws all completions of `set` with the weights the engine holds; `request` of each is its prompt's place in the set.
///
/// # Errors
/// If a prompt does not fit the model.
pub fn draw<B: Backend>(
    engine: &mut Engine<B>,
    set: &EvalSet,
) -> Result<Vec<Finished>, freewheel_actor::ActorError> {
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
    engine.run_to_end(requests.collect())
}

fn tally(set: &EvalSet, finished: &[Finished], stack: &RewardStack) -> Judged {
    let of = |(prompt, _): &(Prompt, EncodedPrompt)| Tally { tags: prompt.tags.clone(), ..Tally::default() };
    let mut judged = Judged {
        tallies: set.prompts.iter().map(of).collect(),
        completions: finished.len(),
        ..Judged::default()
    };
    for done in finished {
        let prompt = &set.prompts[done.request as usize].0;
        let cut = done.finish_reason == FinishReason::Length;
        let completion =
            Completion { prompt, text: &done.text, tokens: done.output_ids.len(), truncated: cut };
        let tally = &mut judged.tallies[done.request as usize];
        let record = stack.score(&completion);
        for cost in &record.costs {
            let of_cost = tally.costs.entry(cost.name.clone()).or_default();
            of_cost.extend(cost.value.map(f64::from));
        }
        match record.correct() {
            Some(right) => {
                tally.judged += 1;
                tally.right += u32::from(right);
            }
            None => judged.unscored += 1,
        }
        judged.tokens += done.output_ids.len();
        judged.truncated += usize::from(cut);
    }
    judged
}

fn report(set: &EvalSet, version: PolicyVersion, judged: Judged) -> EvalReport {
    let Judged { tallies, unscored, completions, tokens, truncated } = judged;
    let mut tags: Vec<&String> = tallies.iter().flat_map(|tally| &tally.tags).collect();
    tags.sort();
    tags.dedup();
    let of_tag =
        |tag: &String| accuracy(&tallies.iter().filter(|tally| tally.tags.contains(tag)).collect::<Vec<_>>());
    let n = completions.max(1) as f64;
    EvalReport {
        name: set.name.clone(),
        version,
        overall: accuracy(&tallies.iter().collect::<Vec<_>>()),
        per_tag: tags.into_iter().map(|tag| (tag.clone(), of_tag(tag))).collect(),
        costs: costs(&tallies),
        pass_at: pass_at(&tallies, set.samples),
        length_mean: tokens as f64 / n,
        truncated: truncated as f64 / n,
        unscored,
    }
}

fn accuracy(tallies: &[&Tally]) -> Estimate {
    let shares: Vec<f64> =
        tallies.iter().filter(|t| t.judged > 0).map(|t| f64::from(t.right) / f64::from(t.judged)).collect();
    estimate(&shares, tallies.iter().all(|t| t.judged <= 1))
}

fn costs(tallies: &[Tally]) -> BTreeMap<String, Estimate> {
    let names: std::collections::BTreeSet<&String> = tallies.iter().flat_map(|t| t.costs.keys()).collect();
    let of = |name: &String| {
        let known: Vec<&Vec<f64>> =
            tallies.iter().filter_map(|t| t.costs.get(name)).filter(|costs| !costs.is_empty()).collect();
        let means: Vec<f64> =
            known.iter().map(|costs| costs.iter().sum::<f64>() / costs.len() as f64).collect();
        let yes_or_no = known.iter().all(|costs| matches!(costs[..], [0.0] | [1.0]));
        estimate(&means, yes_or_no)
    };
    names.into_iter().map(|name| (name.clone(), of(name))).collect()
}

/// The mean of one value a prompt; `yes_or_no`: each is 0 or 1.
pub fn estimate(values: &[f64], yes_or_no: bool) -> Estimate {
    if values.is_empty() {
        return Estimate { prompts: 0, mean: None, low: 0.0, high: 1.0 };
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let (low, high) = if yes_or_no { wilson(mean, values.len()) } else { bootstrap(values) };
    Estimate { prompts: values.len(), mean: Some(mean), low, high }
}

/// (k, pass@k) for powers of two up to `samples`, over the prompts that have k verdicts.
pub fn pass_at(tallies: &[Tally], samples: u32) -> Vec<(u32, f64)> {
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
        let put = |map: &mut Map<String, Value>, key: String, estimate: &Estimate| {
            if let Some(mean) = estimate.mean {
                map.insert(key.clone(), json!(mean));
                map.insert(format!("{key}_low"), json!(estimate.low));
                map.insert(format!("{key}_high"), json!(estimate.high));
            }
        };
        put(&mut map, format!("{at}/accuracy"), &self.overall);
        for (k, value) in self.pass_at.iter().filter(|(k, _)| *k > 1) {
            map.insert(format!("{at}/pass@{k}"), json!(value));
        }
        for (tag, accuracy) in &self.per_tag {
            put(&mut map, format!("{at}/tag/{tag}/accuracy"), accuracy);
        }
        for (name, cost) in &self.costs {
            put(&mut map, format!("{at}/cost/{name}"), cost);
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
    fn pass_at_k_is_the_unbiased_estimator() {
        // n = 5, c = 2, k = 2: 1 − C(3,2)/C(5,2) = 0.7.
        assert!((pass_one(5, 2, 2) - 0.7).abs() <= 1e-12);
        assert_eq!(pass_one(4, 0, 4), 0.0);
        assert_eq!(pass_one(4, 1, 4), 1.0);
        assert!((pass_one(4, 1, 1) - 0.25).abs() <= 1e-12);
    }

    #[test]
    fn what_could_not_be_judged_is_left_out_not_wrong() {
        let tally = |right, judged| Tally { right, judged, ..Tally::default() };
        let (a, b, c) = (tally(1, 1), tally(0, 0), tally(1, 1));
        assert_eq!(accuracy(&[&a, &b, &c]).mean, Some(1.0));
        assert_eq!(accuracy(&[&b]).mean, None);
    }

    #[test]
    fn a_cost_is_over_the_prompts_it_is_about() {
        let tally = |costs: &[f64]| Tally {
            costs: BTreeMap::from([("unsafe".to_owned(), costs.to_vec())]),
            ..Tally::default()
        };
        let single = costs(&[tally(&[1.0]), tally(&[0.0]), tally(&[]), Tally::default()]);
        assert_eq!((single["unsafe"].mean, single["unsafe"].prompts), (Some(0.5), 2));
        assert_eq!((single["unsafe"].low, single["unsafe"].high), wilson(0.5, 2));
        let many = costs(&[tally(&[1.0, 0.0]), tally(&[0.0, 0.0])]);
        assert_eq!((many["unsafe"].mean, many["unsafe"].low), (Some(0.25), 0.0));
        assert_eq!(costs(&[tally(&[])])["unsafe"].mean, None);
    }
}
