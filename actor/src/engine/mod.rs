//! Rollout engine: continuous batching over paged keys and values. Knows no queue, no reward, no learner.
//!
//! ```text
//! submit ─► groups by age ─► admit: prefill what of the prompt no earlier sequence left (`prefix`), once;
//!                              │      start samples while slots and pages last
//!            step: swap? ─► admit ─► plan rows (one a running sample and its guesses, then prompt chunks) ─► forward ─► draw
//!                              ▲                                                                               │
//!                              └──────────── preempted: pages gone, tokens kept ◄── no pages ──────────────────┤
//!                                                                      finished samples ◄──────────────────────┘
//! ```
//!
//! What a sample draws depends on its prompt, its seed, its rollout id and the weights, and on nothing else: not on
//! what else is in the batch, when it was admitted, how its prompt was cut into chunks, what was there of it already, what
//! was guessed, or whether it was preempted.
//! The engine is single-threaded and synchronous; a backend may use many threads inside a step.

mod backend;
mod draft;
mod group;
mod pages;
mod prefix;
mod request;
mod schedule;
mod stats;
mod stop;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use freewheel_kernels::attention::AttentionMask;
use freewheel_model::TileRows;
use freewheel_types::{FinishReason, PolicyVersion};

pub use backend::{
    Backend, BackendInfo, Draw, Drawn, LocalLayers, SeqRows, StepBatch, StepOutput, TextDecoder,
};
pub use request::{Finished, Request, SampleSpec, StopSpec};
pub use stats::EngineStats;

use crate::ActorError;
use crate::config::InFlight;
use group::{Group, Progress, State};
use pages::PagePool;
use prefix::PrefixCache;
use schedule::{Planned, Unit};

/// Bounds of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most samples in the batch at once.
    pub max_live: usize,
    /// Bytes for keys and values; whole pages of it are used.
    pub kv_bytes: u64,
    /// Most prompt (or recomputed) rows in one step, beside one row for every running sample.
    pub prefill_tokens: usize,
    /// What running samples do when new weights arrive.
    pub in_flight: InFlight,
    /// Whether computed pages are kept for later prompts that begin alike, as long as there is room.
    pub prefix_cache: bool,
    /// Most tokens guessed for a sample in one step; 0 for none.
    pub draft_tokens: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        crate::ActorConfig::default().engine()
    }
}

/// KV pages that `kv_bytes` holds, and those of them that local layers have room for: what all sequences at work can
/// see at once, or every page where memory is short.
fn page_counts(info: &BackendInfo, config: &EngineConfig) -> (usize, usize) {
    // Pages beyond what full slots of the longest sequences can hold would never be used.
    let most = (config.max_live + 1).saturating_mul(info.max_positions.div_ceil(info.page_tokens) + 1);
    let most = most.clamp(2, 1 << 30);
    let everywhere =
        usize::try_from(config.kv_bytes / info.page_bytes as u64).unwrap_or(usize::MAX).min(most);
    let Some(local) = info.local else { return (everywhere, 0) };
    let span = match local.mask {
        AttentionMask::Chunked(span) | AttentionMask::Sliding(span) => span,
        AttentionMask::Causal | AttentionMask::Bidirectional => info.max_positions,
    };
    // Running samples, their prompts, prompts that are next in line; and the rows of one step.
    let sequences = config.max_live.saturating_mul(2).saturating_add(config.max_live / 4 + 2);
    let seen = sequences.saturating_mul(span.div_ceil(info.page_tokens) + 1);
    let seen = seen.saturating_add(config.prefill_tokens.div_ceil(info.page_tokens));
    if seen >= everywhere {
        return (everywhere, everywhere);
    }
    let left = config.kv_bytes - (seen * local.page_bytes) as u64;
    let whole = (info.page_bytes - local.page_bytes) as u64;
    let pages = left.checked_div(whole).map_or(most, |n| usize::try_from(n).unwrap_or(usize::MAX).min(most));
    (pages, seen)
}

/// Samples completions for many prompts at once.
pub struct Engine<B: Backend> {
    backend: B,
    info: BackendInfo,
    config: EngineConfig,
    decoder: Arc<dyn TextDecoder>,
    pool: PagePool,
    cache: PrefixCache,
    /// Keyed by age: the order of `submit`.
    groups: BTreeMap<u64, Group>,
    next_age: u64,
    pending: Option<Arc<B::Weights>>,
    retired: Vec<Arc<B::Weights>>,
    finished: Vec<Finished>,
    stats: EngineStats,
}

impl<B: Backend> Engine<B> {
    /// An idle engine over `backend`, with as many KV pages as `kv_bytes` holds.
    ///
    /// # Errors
    /// [`ActorError::Config`] if a bound is zero or not even two pages fit.
    pub fn new(
        mut backend: B,
        decoder: Arc<dyn TextDecoder>,
        mut config: EngineConfig,
    ) -> Result<Self, ActorError> {
        let info = backend.info();
        // Local layers let go of what a sequence's next row does not see: nothing whole is left to others.
        config.prefix_cache &= info.local.is_none();
        let refuse =
            |key, value: u64, limit: String| Err(ActorError::Config { key, value: value.to_string(), limit });
        if config.max_live == 0 || config.prefill_tokens == 0 {
            let key = if config.max_live == 0 { "max_live" } else { "prefill_tokens" };
            return refuse(key, 0, "it must be at least 1".to_owned());
        }
        let (pages, local) = page_counts(&info, &config);
        if pages < 2 {
            let least = 2 * info.page_bytes;
            return refuse(
                "kv_bytes",
                config.kv_bytes,
                format!("this model needs at least {least} (two pages)"),
            );
        }
        backend.allocate(pages, local);
        let stats = EngineStats { slots: config.max_live, pages, ..EngineStats::default() };
        Ok(Self {
            backend,
            info,
            config,
            decoder,
            pool: PagePool::new(pages),
            cache: PrefixCache::default(),
            groups: BTreeMap::new(),
            next_age: 0,
            pending: None,
            retired: Vec::new(),
            finished: Vec::new(),
            stats,
        })
    }

    /// Takes in a request. Requests are served in the order of `submit`.
    ///
    /// # Errors
    /// [`ActorError::BadRequest`] if it can never run: empty prompt, no samples, a token outside the vocabulary, a
    /// prompt that fills the context, a sampling value out of range, or more keys and values than all pages hold.
    pub fn submit(&mut self, mut request: Request) -> Result<(), ActorError> {
        let context = self.info.max_positions;
        let length = request.prompt_ids.len();
        let refuse = |field, value: String, limit: String| {
            Err(ActorError::BadRequest { request: request.id, field, value, limit })
        };
        if length == 0 || length >= context {
            let limit =
                format!("the model's context is {context} tokens: a prompt may have 1 to {}", context - 1);
            return refuse("prompt length", length.to_string(), limit);
        }
        if request.samples.is_empty() || request.max_new_tokens == 0 {
            let field = if request.samples.is_empty() { "samples" } else { "max_new_tokens" };
            return refuse(field, "0".to_owned(), "at least 1 is needed".to_owned());
        }
        if let Some(id) = request.prompt_ids.iter().find(|&&id| id as usize >= self.info.vocab_size) {
            return refuse(
                "prompt token id",
                id.to_string(),
                format!("the vocabulary has {}", self.info.vocab_size),
            );
        }
        let beyond = request.tiles.iter().any(|tile| tile.position + tile.tokens > length);
        if beyond || !(self.info.images || request.tiles.is_empty()) {
            let limit = if beyond { "they must lie within the prompt" } else { "the model reads text only" };
            return refuse("tiles of images", request.tiles.len().to_string(), limit.to_owned());
        }
        if let Err(error) = request.sampling.validate() {
            return refuse("sampling", error.to_string(), "choose values in range".to_owned());
        }
        let max_new_tokens = request.max_new_tokens.min(context - length);
        // One sample at its longest, and the partial prompt page that its group keeps for the others.
        let pages = (length + max_new_tokens).div_ceil(self.info.page_tokens) + 1;
        if pages > self.pool.total() {
            let have = self.pool.total() * self.info.page_tokens;
            let need = pages * self.info.page_bytes;
            let limit = format!("actor.kv_bytes holds {have}: raise it to {need} or lower max_new_tokens");
            return refuse("prompt and completion tokens", (length + max_new_tokens).to_string(), limit);
        }
        request.max_new_tokens = max_new_tokens;
        self.groups.insert(self.next_age, Group::new(request, self.info.page_tokens));
        self.next_age += 1;
        Ok(())
    }

    /// Gives up every sample of the requests called `id`; what they drew so far comes back as
    /// [`FinishReason::Cancelled`], and their pages are free at once.
    pub fn cancel(&mut self, id: u64) -> Vec<Finished> {
        let ages: Vec<u64> =
            self.groups.iter().filter(|(_, group)| group.request.id == id).map(|(&age, _)| age).collect();
        let mut cancelled = Vec::new();
        for mut group in ages.into_iter().filter_map(|age| self.groups.remove(&age)) {
            while !group.samples.is_empty() {
                cancelled.push(group.finish(0, FinishReason::Cancelled, None, &self.info, &*self.decoder));
            }
        }
        cancelled
    }

    /// Takes new weights. They are used from the next step on; with [`InFlight::Finish`] from the first step after the
    /// samples that have begun are over.
    pub fn swap(&mut self, weights: Arc<B::Weights>) {
        self.retired.extend(self.pending.replace(weights));
        self.flip();
    }

    /// Weights no longer in use, to be filled again.
    pub fn take_retired(&mut self) -> Vec<Arc<B::Weights>> {
        std::mem::take(&mut self.retired)
    }

    /// One step: one token for every running sample, more where guesses were right. Returns the samples that ended in it.
    pub fn step(&mut self) -> Vec<Finished> {
        let start = Instant::now();
        self.flip();
        self.admit();
        let plan = self.plan();
        if !plan.is_empty() {
            self.forward(&plan);
        }
        let live = self.live();
        self.stats.record_step(live, start.elapsed().as_secs_f64());
        std::mem::take(&mut self.finished)
    }

    /// Runs `requests` (and whatever was submitted before) to the end; sorted by request and rollout id.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), before anything runs.
    pub fn run_to_end(&mut self, requests: Vec<Request>) -> Result<Vec<Finished>, ActorError> {
        for request in requests {
            self.submit(request)?;
        }
        let mut finished = Vec::new();
        while !self.is_idle() {
            finished.extend(self.step());
        }
        finished.sort_by_key(|done| (done.request, done.rollout));
        Ok(finished)
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    /// Version of the weights in use.
    pub fn version(&self) -> PolicyVersion {
        self.backend.version()
    }

    /// Shape of the model.
    pub fn info(&self) -> &BackendInfo {
        &self.info
    }

    /// Counters since the engine was made, and what it holds now.
    pub fn stats(&self) -> EngineStats {
        let waiting = self.groups.values().map(Group::waiting).sum();
        let pages_cached = self.cache.idle();
        EngineStats {
            live: self.live(),
            waiting,
            pages_used: self.pool.total() - self.pool.free() - pages_cached,
            pages_cached,
            ..self.stats
        }
    }

    fn live(&self) -> usize {
        self.groups.values().map(Group::running).sum()
    }

    /// Flips to pending weights if the mode allows it now.
    fn flip(&mut self) {
        let begun = self.groups.values().any(|group| group.begun);
        if self.pending.is_none() || (begun && self.config.in_flight == InFlight::Finish) {
            return;
        }
        let Some(weights) = self.pending.take() else { return };
        let start = Instant::now();
        let info = &self.info;
        self.retired.push(self.backend.swap(weights));
        self.cache.clear();
        for group in self.groups.values_mut() {
            let recompute = group.begun && self.config.in_flight == InFlight::Recompute;
            if group.begun && !recompute {
                continue;
            }
            // Pages that others hold too must stay as they are: theirs may be read with the old keys yet.
            if group.is_entangled() {
                let running = group.samples.iter_mut().filter(|sample| sample.state == State::Running);
                running.for_each(|sample| {
                    sample.preempt();
                    self.stats.preemptions += 1;
                });
                group.release();
                continue;
            }
            // Nothing drawn: the new weights may as well compute the prompt.
            group.restart();
            let shared = group.shared();
            let running = group.samples.iter_mut().filter(|sample| sample.state == State::Running);
            running.for_each(|sample| sample.restart(shared, info));
        }
        self.stats.record_swap(start.elapsed().as_secs_f64());
    }

    /// Computes the planned rows, takes in the results and draws.
    fn forward(&mut self, plan: &[Planned]) {
        let mut tokens = Vec::new();
        let mut tiles = Vec::new();
        let mut logit_rows = Vec::new();
        let mut seqs = Vec::with_capacity(plan.len());
        for planned in plan {
            let group = &self.groups[&planned.unit.age()];
            let positions = planned.position..planned.position + planned.rows;
            let shown = group.request.tiles.iter();
            tiles.extend(
                shown
                    .filter_map(|tile| tile.rows_in(planned.position, planned.rows))
                    .map(|part| TileRows { row: tokens.len() + part.row, ..part }),
            );
            let pages = match planned.unit {
                Unit::Prompt { .. } => {
                    tokens.extend_from_slice(&group.prompt[positions]);
                    &group.pages
                }
                Unit::Sample { index, .. } => {
                    let sample = &group.samples[index];
                    tokens.extend(positions.map(|position| group.token(sample, position)));
                    &sample.pages
                }
            };
            logit_rows.extend(tokens.len() - planned.logits..tokens.len());
            seqs.push(SeqRows { rows: planned.rows, position: planned.position, pages: pages.indices() });
        }
        self.backend.forget(&self.pool.take_passed());
        let batch = StepBatch { tokens: &tokens, seqs: &seqs, logit_rows: &logit_rows, tiles: &tiles };
        let output = self.backend.forward(&batch);
        assert_eq!(
            output.logits.len(),
            logit_rows.len() * self.info.vocab_size,
            "a row of logits for every row asked"
        );
        let experts_row = self.info.moe_layers * self.info.top_k;
        assert_eq!(output.experts.len(), tokens.len() * experts_row, "expert ids of every row");
        self.stats.rows += tokens.len() as u64;
        self.take_in(plan, &output, experts_row);
        self.backend.reuse(output);
    }

    fn take_in(&mut self, plan: &[Planned], output: &StepOutput, experts_row: usize) {
        let version = self.backend.version();
        let (mut row, mut logit_row) = (0, 0);
        let (mut draws, mut drawers) = (Vec::new(), Vec::new());
        for planned in plan {
            let experts = row * experts_row..(row + planned.rows) * experts_row;
            let group =
                self.groups.get_mut(&planned.unit.age()).expect("planned groups live until their draws");
            match planned.unit {
                Unit::Prompt { .. } => {
                    let vocab = self.info.vocab_size;
                    let logits =
                        (planned.logits > 0).then(|| output.logits[logit_row * vocab..][..vocab].to_vec());
                    self.stats.prompts += u64::from(planned.logits > 0);
                    group.advance(planned.rows, version, &output.experts[experts], logits);
                    if group.ready() && self.config.prefix_cache {
                        group.leave_prompt(&mut self.cache, version);
                    }
                    group.pass(&self.info);
                }
                Unit::Sample { age, index } => {
                    let sample = &group.samples[index];
                    draws.extend((0..planned.logits).map(|i| group.draw(sample, i, logit_row + i)));
                    drawers.push(Drawer { age, index, draws: planned.logits, rows: planned.rows, experts });
                }
            }
            row += planned.rows;
            logit_row += planned.logits;
        }
        let drawn = self.backend.sample(&output.logits, &draws);
        self.push_drawn(&drawers, &drawn, &output.experts, version);
    }

    /// Adds drawn tokens to their samples (in plan order: by age, then by index) and takes out those that ended.
    fn push_drawn(&mut self, drawers: &[Drawer], drawn: &[Drawn], experts: &[u16], version: PolicyVersion) {
        let mut over = Vec::new();
        let mut left = drawn;
        for drawer in drawers {
            let (drawn, rest) = left.split_at(drawer.draws);
            left = rest;
            let group = self.groups.get_mut(&drawer.age).expect("a drawing group is there");
            let experts = &experts[drawer.experts.clone()];
            let guessed = group.samples[drawer.index].draft.len();
            let progress = Progress { drawn, version, rows: drawer.rows, experts };
            let (tokens, ended) = group.take_in(drawer.index, &progress, &*self.decoder);
            group.samples[drawer.index].pass(&self.info);
            self.stats.tokens += tokens as u64;
            self.stats.drafted += guessed as u64;
            self.stats.draft_hits += tokens.saturating_sub(1) as u64;
            if let Some((reason, text)) = ended {
                over.push((drawer.age, drawer.index, reason, text));
            }
        }
        assert!(left.is_empty(), "one token for every draw");
        // Highest index first, so that indices still to come stay right.
        over.sort_by_key(|&(age, index, ..)| std::cmp::Reverse((age, index)));
        let from = self.finished.len();
        for (age, index, reason, text) in over {
            let group = self.groups.get_mut(&age).expect("a finishing group is there");
            if self.config.prefix_cache {
                group.leave_sample(index, &mut self.cache, version);
            }
            self.finished.push(group.finish(index, reason, text, &self.info, &*self.decoder));
            if group.samples.is_empty() {
                self.groups.remove(&age);
            }
        }
        self.finished[from..].reverse();
    }
}

/// A sample of a step: its draws, and the rows they came of.
struct Drawer {
    age: u64,
    index: usize,
    draws: usize,
    rows: usize,
    /// Where the rows' expert ids are.
    experts: Range<usize>,
}
