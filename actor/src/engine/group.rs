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
use super::pages::{PagePool, PageTable};
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
    matcher: StopMatcher,
    started: Option<Instant>,
}

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

    /// The token of `sample` at `position`.
    pub(crate) fn token(&self, sample: &Sample, position: usize) -> u32 {
        position.checked_sub(self.prompt.len()).map_or_else(|| self.prompt[position], |t| sample.output[t])
    }

    /// Tokens of `sample` known so far.
    pub(crate) fn known(&self, sample: &Sample) -> usize {
        self.prompt.len() + sample.output.len()
    }

    /// The draw of the next token of `sample` from row `row`.
    pub(crate) fn draw(&self, sample: &Sample, row: usize) -> Draw {
        let rng = CounterRng::new(self.request.seed, sample.spec.rollout.0);
        Draw { row, sampling: self.request.sampling, uniform: rng.uniform(sample.output.len() as u64) }
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

    /// Adds a drawn token to sample `index`; the finished sample if that ended it.
    pub(crate) fn push(
        &mut self,
        index: usize,
        drawn: Drawn,
        version: PolicyVersion,
        decoder: &dyn TextDecoder,
    ) -> Option<(FinishReason, Option<String>)> {
        let (stop, limit) = (&self.request.stop, self.request.max_new_tokens);
        self.samples[index].push(drawn, version, stop, limit, decoder)
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
            matcher: StopMatcher::default(),
            started: None,
        }
    }

    /// Leaves the batch; its tokens and log-probs stay.
    pub(crate) fn preempt(&mut self) {
        assert!(self.state == State::Running, "only a running sample has pages to give");
        self.state = State::Preempted;
        self.pages.clear();
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
        let per_row = experts.len() / rows;
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
    ) -> Option<(FinishReason, Option<String>)> {
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
        let over = group.push(0, Drawn { token: 7, logprob: -1.0 }, new, &Blank);
        assert!(matches!(over, Some((FinishReason::Length, None))));
        let info = BackendInfo {
            vocab_size: 9,
            max_positions: 9,
            moe_layers: 0,
            top_k: 0,
            page_tokens: 4,
            page_bytes: 1,
            local: None,
            images: false,
        };
        let done = group.finish(0, FinishReason::Length, None, &info, &Blank);
        assert_eq!(
            done.versions,
            [VersionSpan { version: old, tokens: 0 }, VersionSpan { version: new, tokens: 1 }]
        );
    }
}
