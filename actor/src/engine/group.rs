//! A request inside the engine: one prompt whose keys and values are shared, and its samples.
//!
//! ```text
//! prompt   │ full │ full │ full │ tail·· │            group.pages
//! sample 0 │ full │ full │ full │ copy 0 │ own │ own │   full pages shared, the partial one copied
//! sample 1 │ full │ full │ full │ copy 1 │ own │
//! ```

use std::sync::Arc;
use std::time::Instant;

use freewheel_types::{CounterRng, ExpertTrace, FinishReason, PolicyVersion, VersionSpan};

use super::backend::{BackendInfo, Draw, Drawn, TextDecoder};
use super::draft::Drafter;
use super::pages::{PagePool, PageTable};
use super::prefix::{Prefix, PrefixCache};
use super::request::{Finished, Request, SampleSpec, StopSpec};
use super::stop::StopMatcher;

/// A prompt and those of its samples that are not over.
pub(crate) struct Group {
    pub(crate) request: Request,
    pub(crate) prompt: Arc<[u32]>,
    /// Pages of the prompt: the full ones, and the partial one as long as a sample may still copy it.
    pub(crate) pages: PageTable,
    /// Prompt positions whose keys and values are in `pages`.
    pub(crate) computed: usize,
    /// Logits after the last prompt token, with the version that made them; first tokens are drawn from them.
    pub(crate) logits: Option<(Vec<f32>, PolicyVersion)>,
    /// Version that computed the first position in `pages`, the oldest of all.
    pub(crate) first_version: Option<PolicyVersion>,
    /// Expert ids of the prompt `[computed, layers, top_k]`.
    pub(crate) experts: Vec<u16>,
    /// Samples not over, in request order.
    pub(crate) samples: Vec<Sample>,
    /// Whether any sample ever drew a token.
    pub(crate) begun: bool,
    /// Tokens in a page.
    page_tokens: usize,
}

/// Where a sample stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing drawn.
    Unstarted,
    /// In the batch.
    Running,
    /// Gave its pages away; goes on after its tokens are computed again.
    Preempted,
}

/// One sample that is not over.
pub(crate) struct Sample {
    pub(crate) spec: SampleSpec,
    pub(crate) state: State,
    /// Shared full pages of the prompt, then its own.
    pub(crate) pages: PageTable,
    /// Positions whose keys and values are in `pages`.
    pub(crate) computed: usize,
    pub(crate) output: Vec<u32>,
    logprobs: Vec<f32>,
    versions: Vec<VersionSpan>,
    prompt_experts: Vec<u16>,
    experts: Vec<u16>,
    /// Guessed tokens after the known ones, in the step under way.
    pub(crate) draft: Vec<u32>,
    drafter: Drafter,
    matcher: StopMatcher,
    started: Option<Instant>,
}

/// What a step found out about one sample.
pub(crate) struct Progress<'a> {
    /// Draws made, in order of their places.
    pub(crate) drawn: &'a [Drawn],
    /// Version that made their logits.
    pub(crate) version: PolicyVersion,
    /// Rows computed for it; the draws belong to the last ones.
    pub(crate) rows: usize,
    /// Expert ids of those rows.
    pub(crate) experts: &'a [u16],
}

/// How a sample ended: why, and its text where a stop string cut it.
pub(crate) type Ended = (FinishReason, Option<String>);

impl Group {
    pub(crate) fn new(request: Request, page_tokens: usize) -> Self {
        let samples = request.samples.iter().map(|&spec| Sample::new(spec)).collect();
        let prompt = request.prompt_ids.as_slice().into();
        Self {
            request,
            prompt,
            pages: PageTable::default(),
            computed: 0,
            logits: None,
            first_version: None,
            experts: Vec::new(),
            samples,
            begun: false,
            page_tokens,
        }
    }

    /// Prompt positions in full pages: what samples share.
    pub(crate) fn shared(&self) -> usize {
        self.prompt.len() / self.page_tokens * self.page_tokens
    }

    /// Prompt positions that must be computed before a waiting sample can go on.
    pub(crate) fn target(&self) -> usize {
        if self.any(State::Unstarted) { self.prompt.len() } else { self.shared() }
    }

    /// Pages the target takes.
    pub(crate) fn target_pages(&self) -> usize {
        self.target().div_ceil(self.page_tokens)
    }

    /// Whether waiting samples can start or go on.
    pub(crate) fn ready(&self) -> bool {
        self.computed >= self.target() && (self.logits.is_some() || !self.any(State::Unstarted))
    }

    /// Whether the prompt is being computed.
    pub(crate) fn prefilling(&self) -> bool {
        self.pages.len() > 0 && !self.ready()
    }

    /// Whether some sample is in `state`.
    pub(crate) fn any(&self, state: State) -> bool {
        self.samples.iter().any(|sample| sample.state == state)
    }

    /// Samples not in the batch.
    pub(crate) fn waiting(&self) -> usize {
        self.samples.iter().filter(|sample| sample.state != State::Running).count()
    }

    /// Samples in the batch.
    pub(crate) fn running(&self) -> usize {
        self.samples.len() - self.waiting()
    }

    /// Takes pages for the prompt, those of `prefix` as `version` computed them.
    pub(crate) fn place(&mut self, prefix: Prefix, pool: &PagePool, version: PolicyVersion) {
        let pages = self.target_pages();
        self.computed = prefix.pages.len() * self.page_tokens;
        self.first_version = (self.computed > 0).then_some(version);
        (self.pages, self.experts) = (prefix.pages, prefix.experts);
        self.pages.grow(pool, pages);
    }

    /// Prompt tokens that need not be computed if an earlier sequence left them: whole pages, and never the last token
    /// of a prompt that somebody is to draw from.
    pub(crate) fn reusable(&self) -> &[u32] {
        let len = if self.any(State::Unstarted) { self.prompt.len() - 1 } else { self.shared() };
        // What shows an image is not told apart by its tokens.
        if self.request.tiles.is_empty() { &self.prompt[..len] } else { &[] }
    }

    /// Leaves the computed prompt to later requests.
    pub(crate) fn leave_prompt(&self, cache: &mut PrefixCache, version: PolicyVersion) {
        if self.request.tiles.is_empty() && self.first_version == Some(version) {
            cache.insert(&self.prompt[..self.computed], self.page_tokens, &self.pages, &self.experts);
        }
    }

    /// Leaves what was computed of sample `index` to later requests.
    pub(crate) fn leave_sample(&self, index: usize, cache: &mut PrefixCache, version: PolicyVersion) {
        let sample = &self.samples[index];
        let current = sample.versions.iter().all(|span| span.version == version);
        if self.request.tiles.is_empty() && current && sample.computed > self.prompt.len() {
            let ids = [&self.prompt[..], &sample.output[..sample.computed - self.prompt.len()]].concat();
            let experts = [&sample.prompt_experts[..], &sample.experts[..]].concat();
            cache.insert(&ids, self.page_tokens, &sample.pages, &experts);
        }
    }

    /// Whether a page that the prompt lies in is held by sequences of other groups.
    pub(crate) fn is_entangled(&self) -> bool {
        let own = 1 + self.running();
        self.pages.pages().iter().any(|page| page.holders() > own)
    }

    /// Forgets what was computed but keeps the pages.
    pub(crate) fn restart(&mut self) {
        self.computed = 0;
        self.pages.want_from(0);
        self.logits = None;
        self.first_version = None;
        self.experts.clear();
    }

    /// Gives the prompt's pages away.
    pub(crate) fn release(&mut self) {
        self.restart();
        self.pages.clear();
    }

    /// Drops what only unstarted samples need, once there are none.
    pub(crate) fn trim(&mut self) {
        if !self.any(State::Unstarted) {
            self.pages.truncate(self.shared() / self.page_tokens);
            self.computed = self.computed.min(self.shared());
            self.logits = None;
            self.experts = Vec::new();
        }
    }

    /// Takes in `rows` computed positions of the prompt; `logits` if the last of them was asked for.
    pub(crate) fn advance(
        &mut self,
        rows: usize,
        version: PolicyVersion,
        experts: &[u16],
        logits: Option<Vec<f32>>,
    ) {
        self.first_version.get_or_insert(version);
        self.computed += rows;
        self.experts.extend_from_slice(experts);
        self.logits = logits.map(|row| (row, version));
    }

    /// Lets go of what no row sees any more in local layers: not the prompt's next one, and not those of samples, which
    /// go on (or begin again) after the full pages at the earliest.
    pub(crate) fn pass(&mut self, info: &BackendInfo) {
        let next = self.computed.min(self.shared());
        self.pages.pass(info.first_local_page(next));
    }

    /// The token of `sample` at `position`, known or guessed.
    pub(crate) fn token(&self, sample: &Sample, position: usize) -> u32 {
        match position.checked_sub(self.prompt.len()) {
            None => self.prompt[position],
            Some(t) => sample.output.get(t).copied().unwrap_or_else(|| sample.draft[t - sample.output.len()]),
        }
    }

    /// Guesses at most `most` tokens of sample `index`, as many as may still be drawn before its last.
    pub(crate) fn guess(&mut self, index: usize, most: usize) {
        let sample = &mut self.samples[index];
        let left = self.request.max_new_tokens - sample.output.len();
        sample.draft = sample.drafter.guess(&self.prompt, &sample.output, most.min(left - 1));
    }

    /// Tokens of `sample` known so far.
    pub(crate) fn known(&self, sample: &Sample) -> usize {
        self.prompt.len() + sample.output.len()
    }

    /// The draw of the token of `sample` that comes `ahead` places after its next one, from row `row`.
    pub(crate) fn draw(&self, sample: &Sample, ahead: usize, row: usize) -> Draw {
        let rng = CounterRng::new(self.request.seed, sample.spec.rollout.0);
        let uniform = rng.uniform((sample.output.len() + ahead) as u64);
        Draw { row, sampling: self.request.sampling, uniform }
    }

    /// Puts sample `index` into the batch: it shares the full pages, gets its own for the rest, and knows how far its
    /// keys and values are computed. Returns the pages to copy the partial one from and to, if there is one to copy.
    pub(crate) fn start(&mut self, index: usize, pool: &PagePool) -> Option<(u32, u32)> {
        let (shared, full) = (self.shared(), self.shared() / self.page_tokens);
        let known = self.known(&self.samples[index]);
        let sample = &mut self.samples[index];
        sample.pages = self.pages.share(full);
        sample.pages.grow(pool, known.div_ceil(self.page_tokens));
        let fresh = sample.state == State::Unstarted;
        sample.computed = if fresh { known } else { shared };
        sample.state = State::Running;
        if !fresh {
            return None;
        }
        self.begun = true;
        sample.started = Some(Instant::now());
        sample.prompt_experts = self.experts.clone();
        if let (Some(first), Some((_, drawing))) = (self.first_version, &self.logits)
            && first != *drawing
        {
            sample.versions.push(VersionSpan { version: first, tokens: 0 });
        }
        (known > shared).then(|| (self.pages.indices()[full], sample.pages.indices()[full]))
    }

    /// Adds what was drawn for sample `index`, as far as its guesses were right, and takes in the rows that led to it.
    /// Returns how many tokens that are, and how the sample ended if it did.
    pub(crate) fn take_in(
        &mut self,
        index: usize,
        progress: &Progress<'_>,
        decoder: &dyn TextDecoder,
    ) -> (usize, Option<Ended>) {
        let prompt_len = self.prompt.len();
        let (stop, limit) = (&self.request.stop, self.request.max_new_tokens);
        let sample = &mut self.samples[index];
        let draft = std::mem::take(&mut sample.draft);
        let (mut pushed, mut ended) = (0, None);
        for (i, &drawn) in progress.drawn.iter().enumerate() {
            ended = sample.push(drawn, progress.version, stop, limit, decoder);
            pushed += 1;
            if ended.is_some() || draft.get(i) != Some(&drawn.token) {
                break;
            }
        }
        let right = pushed.min(draft.iter().zip(progress.drawn).take_while(|(a, b)| **a == b.token).count());
        sample.drafter.learn(draft.len(), right, pushed);
        // Rows after the first wrong guess are rows of a text that does not exist.
        let rows = progress.rows - progress.rows.min(progress.drawn.len() - pushed);
        sample.advance(
            rows,
            prompt_len,
            &progress.experts[..progress.experts.len() / progress.rows.max(1) * rows],
        );
        (pushed, ended)
    }

    /// Takes sample `index` out as finished.
    pub(crate) fn finish(
        &mut self,
        index: usize,
        finish_reason: FinishReason,
        text: Option<String>,
        info: &BackendInfo,
        decoder: &dyn TextDecoder,
    ) -> Finished {
        let sample = self.samples.remove(index);
        self.trim();
        let mut ids = sample.prompt_experts;
        ids.extend_from_slice(&sample.experts);
        Finished {
            request: self.request.id,
            rollout: sample.spec.rollout,
            prompt_ids: self.prompt.clone(),
            text: text.unwrap_or_else(|| decoder.decode(&sample.output)),
            output_ids: sample.output,
            behaviour_logprobs: sample.logprobs,
            versions: sample.versions,
            experts: ExpertTrace { layers: info.moe_layers as u16, top_k: info.top_k as u16, ids },
            finish_reason,
            generation_s: sample.started.map_or(0.0, |at| at.elapsed().as_secs_f32()),
        }
    }
}

impl Sample {
    fn new(spec: SampleSpec) -> Self {
        Self {
            spec,
            state: State::Unstarted,
            pages: PageTable::default(),
            computed: 0,
            output: Vec::new(),
            logprobs: Vec::new(),
            versions: Vec::new(),
            prompt_experts: Vec::new(),
            experts: Vec::new(),
            draft: Vec::new(),
            drafter: Drafter::default(),
            matcher: StopMatcher::default(),
            started: None,
        }
    }

    /// Leaves the batch; its tokens and log-probs stay.
    pub(crate) fn preempt(&mut self) {
        assert!(self.state == State::Running, "only a running sample has pages to give");
        self.state = State::Preempted;
        self.pages.clear();
        self.draft.clear();
        self.computed = 0;
    }

    /// Computes again what follows the first `shared` positions, in the same pages.
    pub(crate) fn restart(&mut self, shared: usize, info: &BackendInfo) {
        self.computed = shared;
        self.pages.want_from(info.first_local_page(shared).unwrap_or(0));
    }

    /// Lets go of what the next row does not see in local layers.
    pub(crate) fn pass(&mut self, info: &BackendInfo) {
        self.pages.pass(info.first_local_page(self.computed));
    }

    /// Takes in `rows` computed positions. A position computed again keeps the experts it had when its successor was
    /// drawn: those are what the drawn token's log-prob depends on.
    pub(crate) fn advance(&mut self, rows: usize, prompt_len: usize, experts: &[u16]) {
        let per_row = experts.len() / rows.max(1);
        if let Some(recorded) = self.experts.len().checked_div(per_row) {
            let skip = (prompt_len + recorded).saturating_sub(self.computed).min(rows);
            self.experts.extend_from_slice(&experts[skip * per_row..]);
        }
        self.computed += rows;
    }

    fn push(
        &mut self,
        drawn: Drawn,
        version: PolicyVersion,
        stop: &StopSpec,
        limit: usize,
        decoder: &dyn TextDecoder,
    ) -> Option<Ended> {
        self.output.push(drawn.token);
        self.logprobs.push(drawn.logprob);
        match self.versions.last_mut() {
            Some(span) if span.version == version => span.tokens += 1,
            _ => self.versions.push(VersionSpan { version, tokens: 1 }),
        }
        if stop.ids.contains(&drawn.token) {
            return Some((FinishReason::Stop, None));
        }
        if let Some(text) = self.matcher.push(decoder, &self.output, &stop.strings) {
            return Some((FinishReason::StopString, Some(text)));
        }
        (self.output.len() >= limit).then_some((FinishReason::Length, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freewheel_types::{SamplingParams, TaskId};

    struct Blank;

    impl TextDecoder for Blank {
        fn decode(&self, _ids: &[u32]) -> String {
            String::new()
        }
    }

    #[test]
    fn a_prompt_begun_by_an_older_version_shows_as_a_span_of_no_tokens() {
        let request = Request {
            id: 1,
            prompt_ids: vec![1, 2, 3],
            tiles: Vec::new(),
            samples: vec![SampleSpec { rollout: TaskId(1).rollout(0) }],
            seed: 0,
            sampling: SamplingParams::default(),
            max_new_tokens: 1,
            stop: StopSpec::default(),
        };
        let (old, new) = (PolicyVersion::new(1, 4), PolicyVersion::new(1, 5));
        let pool = PagePool::new(4);
        let mut group = Group::new(request, 4);
        group.pages.grow(&pool, 1);
        group.advance(2, old, &[], None);
        assert!(!group.ready());
        group.advance(1, new, &[], Some(vec![0.0]));
        assert_eq!(group.start(0, &pool), Some((0, 1)), "the partial page is copied");
        let drawn = [Drawn { token: 7, logprob: -1.0 }];
        let progress = Progress { drawn: &drawn, version: new, rows: 0, experts: &[] };
        assert_eq!(group.take_in(0, &progress, &Blank), (1, Some((FinishReason::Length, None))));
        let info = BackendInfo {
            vocab_size: 9,
            max_positions: 9,
            moe_layers: 0,
            top_k: 0,
            page_tokens: 4,
            page_bytes: 1,
            local: None,
            cheap_rows: 1,
            images: false,
        };
        let done = group.finish(0, FinishReason::Length, None, &info, &Blank);
        assert_eq!(
            done.versions,
            [VersionSpan { version: old, tokens: 0 }, VersionSpan { version: new, tokens: 1 }]
        );
    }
}
