//! Which prompt is next: shares of tasks, and within a share the rule that picks.
//!
//! ```text
//! canary 5 % │ intake 5 % │ explore 10 % │ the rest: `selection`, within the tag whose turn it is under `quotas`
//! ```

use std::collections::BTreeMap;

use freewheel_types::CounterRng;
use serde::{Deserialize, Serialize};

use super::super::params::{PoolError, Selection};
use super::super::posterior::{draw_beta, informative_probability};
use super::{Prior, PromptPool};

/// Prompts that a Thompson draw is made for, at most; more are drawn from at random.
const CANDIDATES: usize = 256;
/// Two samples are enough to notice that a solved prompt no longer is.
const CANARY_SIZE: u32 = 2;
/// The fraction of the golden ratio: its multiples fall evenly into 0 to 1, so quotas hold in every batch, not only on average.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// Which rule chose a prompt, and what it saw; in the pool's log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chosen {
    /// The share of tasks it belongs to.
    pub share: Share,
    /// The tag whose turn it was, with quotas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// The drawn probability of a right answer (selection "band").
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drawn: Option<f64>,
    /// The band that it had to lie in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub band: Option<(f64, f64)>,
}

/// Shares of tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// By `selection`.
    Selection,
    /// Among those least seen.
    Explore,
    /// A retired prompt, to see whether it still is solved (or not).
    Canary,
    /// A prompt of the intake tag.
    Intake,
}

/// A choice.
pub(super) struct Choice {
    pub(super) prompt: usize,
    pub(super) group_size: u32,
    pub(super) chosen: Chosen,
}

impl Choice {
    fn plain(prompt: usize, group_size: u32, share: Share) -> Self {
        Self { prompt, group_size, chosen: Chosen { share, tag: None, drawn: None, band: None } }
    }
}

impl PromptPool {
    /// The prompt of the next task and its group size.
    pub(super) fn choose(&self) -> Result<Choice, PoolError> {
        let usable: Vec<usize> =
            (0..self.prompts.len()).filter(|i| self.states[*i].quarantined.is_none()).collect();
        if usable.is_empty() {
            let reason =
                self.states.iter().rev().find_map(|state| state.quarantined.clone()).unwrap_or_default();
            return Err(PoolError::Exhausted { prompts: self.prompts.len(), reason });
        }
        // A prompt that is out already is asked again only when all are.
        let free: Vec<usize> = usable.iter().copied().filter(|i| !self.busy.contains(i)).collect();
        let free = if free.is_empty() { usable } else { free };
        let (retired, active): (Vec<usize>, Vec<usize>) = free.iter().partition(|i| self.retired(**i));
        let c = &self.params.curriculum;
        let rng = CounterRng::new(self.params.seed ^ 0x706f_6f6c, self.next_task);
        let full = self.params.group_size;
        if !c.selection.learns() {
            return Ok(self.select(&active, &rng));
        }
        let draw = rng.uniform(0);
        if let Some(suspects) = self.suspects(&retired) {
            return Ok(Choice::plain(self.least_seen(&suspects, &rng), CANARY_SIZE, Share::Canary));
        }
        if !retired.is_empty() && (active.is_empty() || draw < c.canary) {
            let size = if active.is_empty() { full } else { CANARY_SIZE };
            return Ok(Choice::plain(self.least_seen(&retired, &rng), size, Share::Canary));
        }
        if draw < c.canary + c.explore {
            return Ok(Choice::plain(self.least_seen(&active, &rng), full, Share::Explore));
        }
        if draw >= 1.0 - c.intake {
            let taken: Vec<usize> =
                active.iter().copied().filter(|i| self.has_tag(*i, &c.intake_tag)).collect();
            if !taken.is_empty() {
                return Ok(Choice::plain(self.weighted(&taken, &rng), full, Share::Intake));
            }
        }
        Ok(self.select(&active, &rng))
    }

    fn has_tag(&self, i: usize, tag: &str) -> bool {
        self.prompts[i].tags.iter().any(|known| known == tag)
    }

    /// By `selection`, within the tag whose turn it is.
    fn select(&self, active: &[usize], rng: &CounterRng) -> Choice {
        let tag = self.turn();
        let tagged: Option<Vec<usize>> =
            tag.map(|tag| active.iter().copied().filter(|i| self.has_tag(*i, tag)).collect());
        // A tag none of whose prompts is free gives its turn away.
        let (among, tag) = match &tagged {
            Some(among) if !among.is_empty() => (among.as_slice(), tag),
            _ => (active, None),
        };
        let mut choice = self.select_among(among, rng);
        choice.chosen.tag = tag.map(str::to_owned);
        choice
    }

    /// The tag whose turn it is; `None` in turns that no quota takes.
    fn turn(&self) -> Option<&str> {
        let at = (self.next_task as f64 * GOLDEN).fract();
        let mut sum = 0.0;
        let mut tags = self.params.curriculum.quotas.iter();
        tags.find(|(_, share)| {
            sum += **share;
            at < sum
        })
        .map(|(tag, _)| tag.as_str())
    }

    fn select_among(&self, among: &[usize], rng: &CounterRng) -> Choice {
        let full = self.params.group_size;
        let plain = |prompt| Choice::plain(prompt, full, Share::Selection);
        match self.params.curriculum.selection {
            Selection::Uniform => plain(self.least_seen(among, rng)),
            Selection::Informative => plain(self.weighted(among, rng)),
            Selection::Band => self.thompson(among, rng),
            Selection::Pools => {
                let pool = self.open_pool();
                let within: Vec<usize> =
                    among.iter().copied().filter(|i| pool.is_none_or(|tag| self.has_tag(*i, tag))).collect();
                plain(self.least_seen(if within.is_empty() { among } else { &within }, rng))
            }
            Selection::File => {
                plain(among.iter().copied().min_by_key(|i| (self.states[*i].issued, *i)).expect("not empty"))
            }
        }
    }

    /// The first pool that is not yet solved; `None` once all are, or without pools.
    pub(super) fn open_pool(&self) -> Option<&str> {
        let c = &self.params.curriculum;
        let solved = |tag: &str| {
            self.tags
                .get(tag)
                .is_some_and(|p| p.samples >= c.retire_samples && p.recent_rate() >= Some(c.pool_solved))
        };
        c.pools.iter().map(String::as_str).find(|tag| !solved(tag))
    }

    /// Skills that the band takes now: `target` from `band_start` to `band_end` as the run gets harder, and as far on both sides
    /// as `band_width` says.
    pub(super) fn band(&self) -> (f64, f64) {
        let c = &self.params.curriculum;
        let target = self.target();
        ((target - c.band_width).max(0.05), (target + c.band_width).min(0.95))
    }

    /// The middle of the band.
    pub(super) fn target(&self) -> f64 {
        let c = &self.params.curriculum;
        c.band_start + (c.band_end - c.band_start) * self.hardness
    }

    /// Thompson sampling: a skill is drawn from each belief; of the prompts whose draw lies in the band one is taken, by the
    /// probability of a mixed group. If none does, the one that comes nearest to the middle.
    fn thompson(&self, among: &[usize], rng: &CounterRng) -> Choice {
        let priors = self.priors();
        let (low, high) = self.band();
        let candidates: Vec<usize> = if among.len() <= CANDIDATES {
            among.to_vec()
        } else {
            (0..CANDIDATES).map(|k| among[rng.below(8 + k as u64, among.len() as u64) as usize]).collect()
        };
        let (mut total, mut cumulative) = (0.0, Vec::with_capacity(candidates.len()));
        let mut draws = Vec::with_capacity(candidates.len());
        for i in &candidates {
            let (alpha, beta) = self.belief(*i, &priors);
            // A stream a prompt and task: no draw depends on who else is a candidate.
            let own = CounterRng::new(self.params.seed ^ 0x7468_6f6d, self.next_task << 32 ^ *i as u64);
            let drawn = draw_beta(alpha, beta, &own);
            total += if (low..=high).contains(&drawn) { self.worth(*i, alpha, beta) } else { 0.0 };
            cumulative.push(total);
            draws.push(drawn);
        }
        let at = if total > 0.0 {
            let wanted = rng.uniform(1) * total;
            cumulative.partition_point(|sum| *sum <= wanted).min(candidates.len() - 1)
        } else {
            let far = |k: &usize| (draws[*k] - self.target()).abs();
            (0..candidates.len()).min_by(|a, b| far(a).total_cmp(&far(b))).expect("not empty")
        };
        let chosen =
            Chosen { share: Share::Selection, tag: None, drawn: Some(draws[at]), band: Some((low, high)) };
        Choice { prompt: candidates[at], group_size: self.params.group_size, chosen }
    }

    /// One of the prompts issued least often.
    fn least_seen(&self, among: &[usize], rng: &CounterRng) -> usize {
        let least = among.iter().map(|i| self.states[*i].issued).min().expect("not empty");
        let least: Vec<usize> = among.iter().copied().filter(|i| self.states[*i].issued == least).collect();
        least[rng.below(1, least.len() as u64) as usize]
    }

    /// One prompt with probability proportional to its informative probability to the power of `sharpness`.
    fn weighted(&self, among: &[usize], rng: &CounterRng) -> usize {
        let priors = self.priors();
        let weight = |i: usize| {
            if self.states[i].posterior.is_fresh() {
                return priors[self.tag_set[i]].fresh;
            }
            let (alpha, beta) = self.belief(i, &priors);
            self.worth(i, alpha, beta)
        };
        let mut total = 0.0;
        let mut add = |i: &usize| {
            total += weight(*i);
            total
        };
        let cumulative: Vec<f64> = among.iter().map(&mut add).collect();
        if total <= 0.0 || !total.is_finite() {
            return self.least_seen(among, rng);
        }
        let target = rng.uniform(1) * total;
        among[cumulative.partition_point(|sum| *sum <= target).min(among.len() - 1)]
    }

    /// What the tags of each tag set have shown.
    pub(super) fn priors(&self) -> Vec<Prior> {
        let prior = |tags: &Vec<String>| {
            let known: Vec<_> = tags.iter().filter_map(|tag| self.tags.get(tag)).collect();
            let mean = known.iter().map(|p| p.mean()).sum::<f64>() / known.len().max(1) as f64;
            let evidence = known.iter().map(|p| p.alpha + p.beta - 2.0).fold(0.0, f64::max);
            let strength = evidence.min(self.params.curriculum.tag_prior);
            Prior { mean, strength, fresh: self.weight(1.0 + strength * mean, 1.0 + strength * (1.0 - mean)) }
        };
        self.tag_sets.iter().map(prior).collect()
    }

    /// Selection weight of prompt `i`, of which that is believed.
    fn worth(&self, i: usize, alpha: f64, beta: f64) -> f64 {
        match self.contrast(i) {
            Some(contrast) => contrast.powf(self.params.curriculum.sharpness),
            None => self.weight(alpha, beta),
        }
    }

    /// Selection weight under a belief.
    fn weight(&self, alpha: f64, beta: f64) -> f64 {
        informative_probability(alpha, beta, self.params.group_size).powf(self.params.curriculum.sharpness)
    }

    /// What is believed about prompt `i`: its own samples; its tags stand in for those it lacks.
    pub(super) fn belief(&self, i: usize, priors: &[Prior]) -> (f64, f64) {
        let (own, prior) = (&self.states[i].posterior, &priors[self.tag_set[i]]);
        let strength = (prior.strength - (own.alpha + own.beta - 2.0)).max(0.0);
        (own.alpha + strength * prior.mean, own.beta + strength * (1.0 - prior.mean))
    }

    pub(super) fn retired(&self, i: usize) -> bool {
        let c = &self.params.curriculum;
        if let Some(spread) = &self.states[i].spread {
            // Rewards that are not yes or no: by how far they lie apart, whatever their mean.
            return c.selection.learns() && spread.alike >= c.retire_streak;
        }
        let posterior = &self.states[i].posterior;
        let Some(rate) = posterior.recent_rate() else { return false };
        // Two samples of a canary that fell out of the ranks bring a prompt of one streak back at once.
        let streak = posterior.recent >= c.retire_streak as f64 && (rate <= 0.0 || rate >= 1.0);
        let known =
            posterior.samples >= c.retire_samples && !(c.retire_below..=c.retire_above).contains(&rate);
        c.selection.learns() && (streak || known)
    }
}

/// How often a prompt was solved before the run, from its `meta`: the share in the column "avg@N" with the largest N, and that N.
pub(super) fn measured_before(meta: &str) -> Option<(f64, u32)> {
    let columns: BTreeMap<String, serde_json::Value> = serde_json::from_str(meta).ok()?;
    let known = columns.iter().filter_map(|(name, value)| {
        let n: u32 = name.strip_prefix("avg@")?.parse().ok()?;
        let share = value.as_f64().filter(|share| (0.0..=1.0).contains(share))?;
        (n > 0).then_some((share, n))
    });
    known.max_by_key(|(_, n)| *n)
}
