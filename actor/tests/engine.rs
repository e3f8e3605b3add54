//! The engine against a policy that notices every misplaced key.

mod fake;

use std::collections::BTreeMap;
use std::sync::Arc;

use fake::{
    CONTEXT, EOS, FakeBackend, LAYERS, Letters, Reference, TOP_K, VOCAB, continue_from, reference, request,
    weights,
};
use freewheel_actor::{ActorError, Engine, EngineConfig, Finished, InFlight, Request, StopSpec, TextDecoder};
use freewheel_types::{FinishReason, PolicyVersion, RolloutId, SamplingParams, TaskId, VersionSpan};
use proptest::prelude::*;

const V0: PolicyVersion = PolicyVersion { epoch: 1, step: 0 };
const V1: PolicyVersion = PolicyVersion { epoch: 1, step: 1 };

fn config(max_live: usize, pages: usize, prefill_tokens: usize, in_flight: InFlight) -> EngineConfig {
    let kv_bytes = pages as u64 * 100;
    EngineConfig { max_live, kv_bytes, prefill_tokens, in_flight, prefix_cache: false, draft_tokens: 0 }
}

/// With everything that saves work: pages kept for later, guesses.
fn saving(config: EngineConfig) -> EngineConfig {
    EngineConfig { prefix_cache: true, draft_tokens: 5, ..config }
}

fn engine(config: EngineConfig) -> Engine<FakeBackend> {
    let backend = if config.prefix_cache { FakeBackend::without_local(0) } else { FakeBackend::new(0) };
    Engine::new(backend, Arc::new(Letters), config).unwrap()
}

fn roomy() -> Engine<FakeBackend> {
    engine(config(8, 400, 64, InFlight::Keep))
}

fn assert_is(done: &Finished, expected: &Reference, version: PolicyVersion) {
    assert_eq!(done.output_ids, expected.output_ids, "{}", done.rollout);
    let bits = |logprobs: &[f32]| logprobs.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&done.behaviour_logprobs), bits(&expected.logprobs), "{}", done.rollout);
    assert_eq!(done.versions, [VersionSpan { version, tokens: done.output_ids.len() as u32 }]);
    assert_eq!(done.experts.ids, expected.experts, "{}", done.rollout);
    assert_eq!((done.experts.layers, done.experts.top_k), (LAYERS as u16, TOP_K as u16));
    assert_eq!(done.finish_reason, expected.finish_reason);
}

/// A request whose samples all run for `tokens` tokens.
fn endless(id: u64, prompt_len: usize, samples: u32, tokens: usize) -> Request {
    let prompt: Vec<u32> =
        (0..prompt_len as u32).map(|i| 1 + (i * 7 + id as u32) % (VOCAB as u32 - 1)).collect();
    Request { stop: StopSpec::default(), ..request(id, &prompt, samples, tokens) }
}

#[test]
fn a_group_prefills_its_prompt_once() {
    let mut engine = roomy();
    let request = endless(1, 11, 8, 5);
    let done = engine.run_to_end(vec![request.clone()]).unwrap();
    assert_eq!(done.len(), 8);
    for sample in &done {
        assert_is(sample, &reference(&request, sample.rollout, V0), V0);
    }
    // 11 prompt rows, then every drawn token but the last of each sample.
    assert_eq!((engine.stats().prompts, engine.stats().rows), (1, 11 + 8 * 4));
    assert_eq!(engine.stats().pages_used, 0);
    let distinct: std::collections::BTreeSet<_> = done.iter().map(|sample| &sample.output_ids).collect();
    assert!(distinct.len() > 1, "samples of a group draw different numbers");
}

#[test]
fn samples_beyond_the_slots_start_as_others_end() {
    let mut engine = engine(config(3, 400, 64, InFlight::Keep));
    let requests = vec![endless(1, 5, 7, 4), endless(2, 9, 2, 6)];
    let done = engine.run_to_end(requests.clone()).unwrap();
    assert_eq!(done.len(), 9);
    for sample in &done {
        assert_is(sample, &reference(&requests[sample.request as usize - 1], sample.rollout, V0), V0);
    }
    assert_eq!(engine.stats().prompts, 2);
    assert!(engine.stats().slot_s <= engine.stats().step_s);
}

#[test]
fn when_pages_run_out_the_youngest_is_recomputed_and_draws_the_same() {
    // Six sequences of up to 8 + 40 tokens want 12 pages each; 20 are there.
    let mut engine = engine(config(6, 20, 16, InFlight::Keep));
    let requests = vec![endless(1, 8, 3, 40), endless(2, 6, 3, 40)];
    let done = engine.run_to_end(requests.clone()).unwrap();
    assert_eq!(done.len(), 6);
    for sample in &done {
        assert_is(sample, &reference(&requests[sample.request as usize - 1], sample.rollout, V0), V0);
    }
    assert!(engine.stats().preemptions > 0, "the test must reach preemption");
    assert_eq!(engine.stats().pages_used, 0);
}

#[test]
fn a_cancelled_request_frees_its_pages_and_leaves_the_others_alone() {
    let mut engine = roomy();
    let (gone, kept) = (endless(1, 9, 4, 30), endless(2, 9, 2, 12));
    engine.submit(gone).unwrap();
    engine.submit(kept.clone()).unwrap();
    (0..5).for_each(|_| assert!(engine.step().is_empty()));
    let before = engine.stats().pages_used;
    let cancelled = engine.cancel(1);
    assert_eq!(cancelled.len(), 4);
    assert!(cancelled.iter().all(|s| s.finish_reason == FinishReason::Cancelled && !s.output_ids.is_empty()));
    assert!(engine.stats().pages_used < before);
    let done = engine.run_to_end(vec![]).unwrap();
    assert_eq!(done.len(), 2);
    for sample in &done {
        assert_is(sample, &reference(&kept, sample.rollout, V0), V0);
    }
    assert_eq!(engine.stats().pages_used, 0);
    assert!(engine.cancel(2).is_empty());
}

#[test]
fn a_stop_string_across_tokens_cuts_the_text_and_keeps_the_tokens() {
    let plain = endless(1, 4, 1, 20);
    let rollout = plain.samples[0].rollout;
    let ids = reference(&plain, rollout, V0).output_ids;
    let full = Letters.decode(&ids);
    let stop = full[9..11].to_owned();
    let at = full.find(&stop).unwrap();
    let request =
        Request { stop: StopSpec { ids: [].into(), strings: ["??".to_owned(), stop].into() }, ..plain };
    let done = roomy().run_to_end(vec![request]).unwrap().remove(0);
    assert_eq!((done.finish_reason, done.text.as_str()), (FinishReason::StopString, &full[..at]));
    let tokens = (1..).find(|&n| Letters.decode(&ids[..n]).len() == at + 2).unwrap();
    assert_eq!(done.output_ids, ids[..tokens], "drawn tokens stay, the stop string's too");
}

#[test]
fn a_stop_id_stays_in_the_output_and_out_of_the_text() {
    let mut request = request(3, &[5, 6, 7], 40, 50);
    request.samples.truncate(40);
    let done = roomy().run_to_end(vec![request]).unwrap();
    let stopped: Vec<_> = done.iter().filter(|sample| sample.finish_reason == FinishReason::Stop).collect();
    assert!(stopped.len() > 20, "most samples draw token 0 of 19 within 50");
    for sample in stopped {
        assert_eq!(sample.output_ids.iter().position(|&id| id == EOS), Some(sample.output_ids.len() - 1));
        assert_eq!(sample.text.len(), sample.output_ids.len() - 1);
    }
}

#[test]
fn a_completion_ends_at_the_context() {
    let request = endless(1, CONTEXT - 3, 2, 1000);
    let done = roomy().run_to_end(vec![request]).unwrap();
    assert!(done.iter().all(|s| s.output_ids.len() == 3 && s.finish_reason == FinishReason::Length));
}

#[test]
fn requests_that_can_never_run_are_refused_by_name() {
    let mut engine = engine(config(4, 6, 8, InFlight::Keep));
    let sampling = SamplingParams { temperature: -1.0, ..SamplingParams::default() };
    let cases = [
        (endless(1, 0, 1, 4), "prompt length is 0"),
        (endless(1, CONTEXT, 1, 4), "the model's context is 64 tokens"),
        (endless(1, 4, 0, 4), "samples is 0"),
        (endless(1, 4, 1, 0), "max_new_tokens is 0"),
        (request(1, &[VOCAB as u32], 1, 4), "the vocabulary has 19"),
        (Request { sampling, ..endless(1, 4, 1, 4) }, "temperature is -1"),
        (endless(1, 10, 1, 30), "raise it to 1100"),
    ];
    for (request, expected) in cases {
        let error = engine.submit(request).unwrap_err();
        assert!(matches!(error, ActorError::BadRequest { request: 1, .. }));
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert!(engine.is_idle());
    let tiny = Engine::new(FakeBackend::new(0), Arc::new(Letters), config(4, 1, 8, InFlight::Keep));
    assert!(tiny.err().unwrap().to_string().contains("at least 200 (two pages)"));
}

/// Runs one request for `before` steps on version 0, swaps, runs to the end.
fn swapped(in_flight: InFlight, request: &Request, before: usize) -> (Vec<Finished>, Engine<FakeBackend>) {
    let mut engine = engine(config(4, 400, 64, in_flight));
    engine.submit(request.clone()).unwrap();
    let mut done: Vec<_> = (0..before).flat_map(|_| engine.step()).collect();
    engine.swap(weights(1));
    done.extend(engine.run_to_end(vec![]).unwrap());
    (done, engine)
}

#[test]
fn keep_goes_on_at_once_and_says_which_version_drew_what() {
    let request = endless(1, 6, 2, 10);
    let (done, mut engine) = swapped(InFlight::Keep, &request, 4);
    for sample in &done {
        let [old, new] = sample.versions[..] else { panic!("two spans, not {:?}", sample.versions) };
        assert_eq!((old.version, new.version, old.tokens + new.tokens), (V0, V1, 10));
        let n = old.tokens as usize;
        assert_eq!(sample.output_ids[..n], reference(&request, sample.rollout, V0).output_ids[..n]);
        let rebuilt = continue_from(&request, sample.rollout, V1, &sample.output_ids[..n]);
        assert_ne!(
            sample.output_ids, rebuilt.output_ids,
            "old keys are kept, so the rest differs from a rebuild"
        );
    }
    assert_eq!((engine.version(), engine.take_retired().len(), engine.stats().swaps), (V1, 1, 1));
}

#[test]
fn recompute_rebuilds_keys_and_goes_on_as_if_the_new_weights_had_read_it_all() {
    for prompt_len in [2, 6, 8] {
        let request = endless(1, prompt_len, 3, 14);
        let (done, engine) = swapped(InFlight::Recompute, &request, 6);
        for sample in &done {
            assert_eq!(sample.versions.len(), 2);
            let n = sample.versions[0].tokens as usize;
            assert_eq!(sample.output_ids[..n], reference(&request, sample.rollout, V0).output_ids[..n]);
            let expected = continue_from(&request, sample.rollout, V1, &sample.output_ids[..n]);
            assert_eq!(sample.output_ids, expected.output_ids, "prompt of {prompt_len}");
        }
        assert_eq!(engine.stats().pages_used, 0);
    }
}

#[test]
fn finish_ends_the_old_on_the_old_and_starts_the_new_on_the_new() {
    let mut engine = engine(config(4, 400, 64, InFlight::Finish));
    let (old, new) = (endless(1, 6, 6, 10), endless(2, 6, 2, 10));
    engine.submit(old.clone()).unwrap();
    let mut done: Vec<_> = (0..3).flat_map(|_| engine.step()).collect();
    engine.swap(weights(1));
    engine.submit(new.clone()).unwrap();
    assert_eq!(engine.version(), V0);
    done.extend(engine.run_to_end(vec![]).unwrap());
    assert_eq!((done.len(), engine.version()), (8, V1));
    for sample in &done {
        let (request, version) = if sample.request == 1 { (&old, V0) } else { (&new, V1) };
        assert_is(sample, &reference(request, sample.rollout, version), version);
    }
}

#[test]
fn a_prompt_nobody_drew_from_is_computed_by_the_new_weights() {
    let mut engine = engine(config(4, 400, 2, InFlight::Keep));
    let request = endless(1, 9, 2, 5);
    engine.submit(request.clone()).unwrap();
    (0..3).for_each(|_| assert!(engine.step().is_empty()));
    engine.swap(weights(1));
    for sample in engine.run_to_end(vec![]).unwrap() {
        assert_is(&sample, &reference(&request, sample.rollout, V1), V1);
    }
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_is_computed_from_where_they_part() {
    let mut engine = engine(EngineConfig { prefix_cache: true, ..config(4, 400, 64, InFlight::Keep) });
    let first = endless(1, 11, 2, 6);
    let done = engine.run_to_end(vec![first.clone()]).unwrap();
    let rows = engine.stats().rows;
    // The next turn: the first prompt, its answer, something new. Four pages of four; the fifth is where they part.
    let turn: Vec<u32> = [&first.prompt_ids[..], &done[0].output_ids, &[3, 4, 5]].concat();
    let second = Request { prompt_ids: turn.clone(), ..endless(2, 1, 3, 5) };
    for sample in engine.run_to_end(vec![second.clone()]).unwrap() {
        assert_is(&sample, &reference(&second, sample.rollout, V0), V0);
    }
    let stats = engine.stats();
    assert_eq!(stats.prefix_tokens, 16, "11 + 5 computed positions are four pages");
    assert_eq!(stats.rows - rows, turn.len() as u64 - 16 + 3 * 4);
    assert_eq!(stats.pages_used, 0);
    assert!(stats.pages_cached > 4);
    // The same prompt again: all but its last page, for its last token is drawn from.
    engine.run_to_end(vec![Request { id: 3, prompt_ids: turn[..16].to_vec(), ..second.clone() }]).unwrap();
    assert_eq!(engine.stats().prefix_tokens, 16 + 12);
    // New weights know none of it.
    engine.swap(weights(1));
    assert_eq!(engine.stats().pages_cached, 0);
    let again = Request { id: 4, ..second };
    for sample in engine.run_to_end(vec![again.clone()]).unwrap() {
        assert_is(&sample, &reference(&again, sample.rollout, V1), V1);
    }
    assert_eq!(engine.stats().prefix_tokens, 16 + 12);
}

#[test]
fn pages_kept_for_later_give_way_to_whoever_needs_them_now() {
    let mut engine = engine(saving(config(3, 20, 16, InFlight::Keep)));
    for id in 0..30 {
        let request = endless(id, 9, 3, 12);
        for sample in engine.run_to_end(vec![request.clone()]).unwrap() {
            assert_is(&sample, &reference(&request, sample.rollout, V0), V0);
        }
    }
    let stats = engine.stats();
    assert_eq!((stats.pages_used, stats.preemptions), (0, 0), "nobody gives way to what is merely kept");
    assert!(stats.pages_cached > 10, "what is free is put to use");
}

/// A policy that says the same few tokens over and over: the fake one, nearly greedy, on few distinct keys.
#[test]
fn guessing_draws_the_same_tokens_in_fewer_steps() {
    let run = |draft_tokens, request: &Request| {
        let mut engine = engine(EngineConfig { draft_tokens, ..config(8, 400, 64, InFlight::Keep) });
        let done = engine.run_to_end(vec![request.clone()]).unwrap();
        (done, engine.stats())
    };
    let (mut hits, mut misses) = (0, 0);
    for seed in 0..200 {
        // A long prompt over few tokens: what was drawn before often comes again by chance.
        let prompt: Vec<u32> = (0..30).map(|i| 1 + (i * i + seed) % 3).collect();
        let mut request = Request { prompt_ids: prompt, ..endless(u64::from(seed), 1, 2, 30) };
        request.sampling.temperature = 0.2;
        request.seed = u64::from(seed);
        let ((plain, without), (guessed, with)) = (run(0, &request), run(6, &request));
        for (a, b) in plain.iter().zip(&guessed) {
            assert_is(b, &reference(&request, b.rollout, V0), V0);
            assert_eq!((&a.output_ids, &a.experts), (&b.output_ids, &b.experts));
        }
        assert_eq!(with.tokens, without.tokens);
        assert!(with.steps <= without.steps);
        assert_eq!(without.drafted, 0);
        hits += with.draft_hits;
        misses += with.drafted - with.draft_hits;
    }
    assert!(hits > 20 && misses > 20, "the test must see right guesses and wrong ones: {hits}, {misses}");
}

#[test]
fn nothing_is_guessed_while_many_run() {
    let mut engine = engine(saving(config(40, 2000, 64, InFlight::Keep)));
    let prompt: Vec<u32> = (0..30).map(|i| 1 + i % 2).collect();
    engine.submit(Request { prompt_ids: prompt, ..endless(1, 1, 40, 20) }).unwrap();
    while engine.stats().live < 40 {
        engine.step();
    }
    assert_eq!(engine.stats().drafted, 0);
    (0..5).for_each(|_| drop(engine.step()));
    assert_eq!(
        (engine.stats().live, engine.stats().drafted),
        (40, 0),
        "sixteen rows are cheap, forty are not"
    );
}

#[test]
fn two_thousand_live_samples_are_served_swapped_and_cancelled() {
    let mut engine = engine(saving(config(2000, 40_000, 4096, InFlight::Keep)));
    let requests: Vec<Request> = (0..500).map(|id| endless(id, 5 + id as usize % 30, 4, 25)).collect();
    requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    while engine.stats().live < 2000 {
        engine.step();
    }
    let before = engine.stats().pages_used;
    assert_eq!(engine.cancel(7).len(), 4);
    assert!(engine.stats().pages_used < before);
    // The pause of a swap, the best of some on a busy machine: a pointer, and what was kept for later let go.
    let mut shortest = f64::INFINITY;
    for _ in 0..10 {
        engine.swap(weights(0));
        shortest = shortest.min(engine.stats().swap_pause_s);
    }
    assert!(shortest <= 1e-3, "a swap takes {shortest} s");
    let done = engine.run_to_end(vec![]).unwrap();
    assert_eq!(done.len(), 1996);
    for sample in done.iter().step_by(17) {
        assert_is(sample, &reference(&requests[sample.request as usize], sample.rollout, V0), V0);
    }
    assert_eq!(engine.stats().pages_used, 0);
}

/// Up to six requests with the step they arrive at.
fn mixes() -> impl Strategy<Value = Vec<(usize, Request)>> {
    let one = (0..30usize, 1..14usize, 1..6u32, 1..16usize, any::<bool>(), 0.3f32..2.0);
    proptest::collection::vec(one, 1..6).prop_map(|all| {
        let build = |(id, (at, prompt_len, samples, tokens, stops, temperature))| {
            // Every other prompt begins alike, so that pages are found again.
            let like = if id % 2 == 0 { 0 } else { id as u64 };
            let prompt = endless(like, prompt_len, 1, 1).prompt_ids;
            let mut request = Request { prompt_ids: prompt, ..endless(id as u64, 1, samples, tokens) };
            request.sampling.temperature = temperature;
            if stops {
                request.stop.ids = [EOS, 3, 11].into();
            }
            (at, request)
        };
        all.into_iter().enumerate().map(build).collect()
    })
}

fn run_mix(
    engine: &mut Engine<FakeBackend>,
    mix: &[(usize, Request)],
    swap_at: &[usize],
) -> BTreeMap<RolloutId, Finished> {
    let mut done = BTreeMap::new();
    for step in 0.. {
        for (_, request) in mix.iter().filter(|(at, _)| *at == step) {
            engine.submit(request.clone()).unwrap();
        }
        if let Some(n) = swap_at.iter().position(|&at| at == step) {
            engine.swap(weights(n as u64 + 1));
        }
        for sample in engine.step() {
            assert!(done.insert(sample.rollout, sample).is_none(), "a sample ends once");
        }
        assert!(engine.stats().live <= engine.stats().slots);
        if step > 40 && engine.is_idle() {
            break;
        }
        assert!(step < 20_000, "the engine makes no progress");
    }
    assert_eq!(engine.stats().pages_used, 0, "pages leak");
    let expected: usize = mix.iter().map(|(_, request)| request.samples.len()).sum();
    assert_eq!(done.len(), expected);
    done
}

fn request_of(mix: &[(usize, Request)], task: TaskId) -> &Request {
    &mix[task.0 as usize].1
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever else is in the batch, whatever the bounds: the same tokens, log-probs and experts, to the bit.
    #[test]
    fn batch_mix_and_bounds_never_change_a_sample(
        mix in mixes(), max_live in 1..9usize, pages in 9..60usize, prefill in 1..20usize,
        prefix_cache in any::<bool>(), draft_tokens in 0..8usize,
    ) {
        let config = config(max_live, pages, prefill, InFlight::Keep);
        let mut engine = engine(EngineConfig { prefix_cache, draft_tokens, ..config });
        for (rollout, sample) in run_mix(&mut engine, &mix, &[]) {
            assert_is(&sample, &reference(request_of(&mix, rollout.task()), rollout, V0), V0);
        }
    }

    /// What the learner relies on: as long as all spans so far, those of no tokens included, name one version, the
    /// tokens are those which that version alone would have drawn.
    #[test]
    fn tokens_of_one_version_were_drawn_by_it_alone(
        mix in mixes(), max_live in 1..7usize, pages in 9..40usize, prefill in 1..8usize,
        swap_at in proptest::collection::btree_set(0..60usize, 0..5),
        in_flight in prop_oneof![Just(InFlight::Keep), Just(InFlight::Recompute), Just(InFlight::Finish)],
        prefix_cache in any::<bool>(), draft_tokens in 0..8usize,
    ) {
        let swap_at: Vec<usize> = swap_at.into_iter().collect();
        let config = config(max_live, pages, prefill, in_flight);
        let mut engine = engine(EngineConfig { prefix_cache, draft_tokens, ..config });
        for (rollout, sample) in run_mix(&mut engine, &mix, &swap_at) {
            let first = sample.versions[0].version;
            let pure: u32 = sample.versions.iter().take_while(|span| span.version == first).map(|span| span.tokens).sum();
            let pure = pure as usize;
            let expected = reference(request_of(&mix, rollout.task()), rollout, first);
            prop_assert_eq!(&sample.output_ids[..pure], &expected.output_ids[..pure]);
            let total: u32 = sample.versions.iter().map(|span| span.tokens).sum();
            prop_assert_eq!(total as usize, sample.output_ids.len());
            prop_assert!(sample.versions.is_sorted_by_key(|span| span.version));
            let request = request_of(&mix, rollout.task());
            let rows = request.prompt_ids.len() + sample.output_ids.len() - 1;
            prop_assert_eq!(sample.experts.ids.len(), rows * LAYERS * TOP_K);
            if in_flight == InFlight::Finish {
                prop_assert_eq!(sample.versions.len(), 1);
            }
        }
    }
}
