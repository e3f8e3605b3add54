//! What actors and pool say about themselves, on its way into the learner's metrics lines.
//!
//! In one process it comes through watch channels; from other processes on this machine through small files in `roles/`.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use freewheel_actor::ActorMetrics;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;

use crate::folder::StepLine;
use crate::prompts::PoolMetrics;

/// Folder of the files, within the run's.
pub const ROLES: &str = "roles";
const WRITE_EVERY: Duration = Duration::from_millis(500);

/// Counters of one actor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ActorStat {
    /// Seconds at work.
    pub wall_s: f64,
    /// Tokens drawn.
    pub tokens: u64,
    /// Rows computed.
    pub rows: u64,
    /// Prompt tokens that needed no row: their keys and values were there.
    pub prefix_tokens: u64,
    /// Tokens guessed.
    pub drafted: u64,
    /// Guessed tokens that were drawn.
    pub draft_hits: u64,
    /// Samples that were computed again.
    pub preemptions: u64,
    /// Seconds of token slots in use.
    pub slot_s: f64,
    /// Longest pause of a weight swap, seconds.
    pub apply_pause_s: f64,
    /// Update of the weights it serves.
    pub step: Option<u64>,
}

impl ActorStat {
    /// Rows, tokens found, tokens guessed, guesses that were right, preemptions.
    fn counts(&self) -> [u64; 5] {
        [self.rows, self.prefix_tokens, self.drafted, self.draft_hits, self.preemptions]
    }
}

/// The pool's view.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolStat {
    /// Share of zero-signal groups.
    pub zero_signal: f64,
    /// Prompts that may be chosen.
    pub active: usize,
    /// Prompts retired.
    pub retired: usize,
    /// Mean difficulty.
    pub difficulty_mean: f64,
    /// Groups that ended; nothing is known before the first.
    pub ended: u64,
    /// Moving mean of the share of right answers.
    #[serde(default)]
    pub success: f64,
    /// Middle of the band.
    #[serde(default)]
    pub target: f64,
}

impl From<ActorMetrics> for ActorStat {
    fn from(m: ActorMetrics) -> Self {
        Self {
            wall_s: m.wall_s,
            tokens: m.tokens,
            rows: m.rows,
            prefix_tokens: m.prefix_tokens,
            drafted: m.drafted,
            draft_hits: m.draft_hits,
            preemptions: m.preemptions,
            slot_s: m.slot_s,
            apply_pause_s: m.apply_pause_s,
            step: m.version.map(|version| version.step),
        }
    }
}

impl From<PoolMetrics> for PoolStat {
    fn from(m: PoolMetrics) -> Self {
        Self {
            zero_signal: m.zero_signal,
            active: m.active,
            retired: m.retired,
            difficulty_mean: m.difficulty_mean,
            ended: m.trained + m.dropped,
            success: m.success,
            target: m.target,
        }
    }
}

/// Everybody's word at one moment.
pub type Snapshot = (Vec<ActorStat>, Option<PoolStat>);

/// Adds to each line what happened since the line before it.
pub fn extras(
    source: impl Fn() -> Snapshot + Send + Sync + 'static,
) -> Box<dyn Fn(&mut StepLine) + Send + Sync> {
    let before: Mutex<Vec<ActorStat>> = Mutex::default();
    Box::new(move |line| {
        let (actors, pool) = source();
        let mut before = before.lock().expect("no holder of the lock panics");
        add_actors(line, &actors, &before);
        *before = actors;
        if let Some(pool) = pool.filter(|pool| pool.ended > 0) {
            line.insert("prompts/zero_signal".into(), json!(pool.zero_signal));
            line.insert("prompts/active".into(), json!(pool.active));
            line.insert("prompts/retired".into(), json!(pool.retired));
            line.insert("prompts/difficulty_mean".into(), json!(pool.difficulty_mean));
            line.insert("prompts/success".into(), json!(pool.success));
            line.insert("prompts/target".into(), json!(pool.target));
        }
    })
}

fn add_actors(line: &mut StepLine, actors: &[ActorStat], before: &[ActorStat]) {
    let (mut rate, mut used, mut wall) = (0.0, 0.0, 0.0);
    let mut sums = [0u64; 5];
    for (index, actor) in actors.iter().enumerate() {
        let earlier = before.get(index).cloned().unwrap_or_default();
        // A restarted actor counts from zero again.
        let earlier = if earlier.wall_s > actor.wall_s { ActorStat::default() } else { earlier };
        let seconds = actor.wall_s - earlier.wall_s;
        if seconds > 0.0 {
            rate += actor.tokens.saturating_sub(earlier.tokens) as f64 / seconds;
            used += actor.slot_s - earlier.slot_s;
            wall += seconds;
        }
        for (sum, (now, then)) in sums.iter_mut().zip(actor.counts().into_iter().zip(earlier.counts())) {
            *sum += now.saturating_sub(then);
        }
    }
    if wall > 0.0 {
        line.insert("rollout/tokens_per_s".into(), json!(rate));
        line.insert("bubble/actor".into(), json!((1.0 - used / wall).clamp(0.0, 1.0)));
    }
    let [rows, prefix, drafted, hits, preemptions] = sums;
    if wall > 0.0 {
        line.insert("rollout/preemptions".into(), json!(preemptions));
    }
    // Shares of nothing are left out: a run without guesses or prompts has none.
    for (key, part, whole) in
        [("rollout/prefix_share", prefix, rows + prefix), ("rollout/draft_accepted", hits, drafted)]
    {
        if whole > 0 {
            line.insert(key.into(), json!(part as f64 / whole as f64));
        }
    }
    if let Some(pause) = actors.iter().map(|actor| actor.apply_pause_s).max_by(f64::total_cmp) {
        line.insert("weights/apply_pause_s".into(), json!(pause));
    }
}

/// The snapshot that the files of `run_dir` hold.
pub fn from_files(run_dir: &Path) -> Snapshot {
    let dir = run_dir.join(ROLES);
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(&dir).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    names.sort();
    let is_actor =
        |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("actor"));
    let actors = names.iter().filter(is_actor).filter_map(|path| read(path)).collect();
    (actors, read(&dir.join("prompts.json")))
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    if path.extension()? != "json" {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Writes what `receiver` shows to `roles/<name>.json` until its sender is gone.
pub async fn to_file<M, S>(run_dir: PathBuf, name: String, mut receiver: watch::Receiver<M>)
where
    M: Copy,
    S: From<M> + Serialize,
{
    let dir = run_dir.join(ROLES);
    let (path, tmp) = (dir.join(format!("{name}.json")), dir.join(format!("{name}.tmp")));
    loop {
        let stat = S::from(*receiver.borrow_and_update());
        let written = std::fs::create_dir_all(&dir)
            .and_then(|()| std::fs::write(&tmp, serde_json::to_vec(&stat)?))
            .and_then(|()| std::fs::rename(&tmp, &path));
        if let Err(error) = written {
            tracing::debug!(%error, name, "status not written");
        }
        tokio::time::sleep(WRITE_EVERY).await;
        if receiver.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_over_the_time_since_the_last_line() {
        let stat = |wall_s, tokens, slot_s| ActorStat {
            wall_s,
            tokens,
            slot_s,
            apply_pause_s: 0.001,
            rows: 2 * tokens,
            prefix_tokens: tokens / 2,
            ..ActorStat::default()
        };
        let now = std::sync::Arc::new(Mutex::new(vec![stat(1.0, 100, 0.5)]));
        let seen = now.clone();
        let add = extras(move || (seen.lock().unwrap().clone(), None));
        let mut first = StepLine::new();
        add(&mut first);
        assert_eq!(first["rollout/tokens_per_s"], 100.0);
        assert_eq!((&first["rollout/prefix_share"], &first["rollout/preemptions"]), (&json!(0.2), &json!(0)));
        assert!(!first.contains_key("rollout/draft_accepted"), "nothing was guessed");
        *now.lock().unwrap() =
            vec![ActorStat { drafted: 8, draft_hits: 6, preemptions: 3, ..stat(3.0, 500, 2.5) }];
        let mut second = StepLine::new();
        add(&mut second);
        assert_eq!((&second["rollout/tokens_per_s"], &second["bubble/actor"]), (&json!(200.0), &json!(0.0)));
        assert!(!second.contains_key("prompts/active"));
        assert_eq!(
            (&second["rollout/draft_accepted"], &second["rollout/preemptions"]),
            (&json!(0.75), &json!(3))
        );
        // Killed and started again: not a negative rate.
        *now.lock().unwrap() = vec![stat(0.5, 25, 0.25)];
        let mut third = StepLine::new();
        add(&mut third);
        assert_eq!((&third["rollout/tokens_per_s"], &third["bubble/actor"]), (&json!(50.0), &json!(0.5)));
    }
}
