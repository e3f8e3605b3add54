//! Causal language models: logits, log-probs, routing, gradients and greedy continuations.

use std::collections::BTreeSet;

use freewheel_kernels::Threads;
use freewheel_model::sampling::{SampleScratch, log_prob_of};
use freewheel_model::vision::{ImageTile, Tile};
use freewheel_model::{
    BatchSeq, ForwardBatch, KvCache, LoadedModel, PolicyWeights, Purpose, Tape, Target, TileRows, TrainBatch,
    TrainSeq, load,
};
use freewheel_types::{PolicyVersion, SamplingParams, WeightsDtype};
use serde_json::Value;

use super::golden::{LOSS_TOLERANCE, Measured, Oracle, TOLERANCE, max_diff, mean_diff, usizes, writers};

/// Tokens of one or more sequences, and the tiles of images that some of them show.
struct Tokens {
    ids: Vec<u32>,
    tiles: Vec<ImageTile>,
}

impl Tokens {
    /// `sequences` side by side; the golden tiles `pixels` belong to the runs of image tokens, in order.
    fn new(model: &LoadedModel, sequences: &[Vec<u32>], pixels: &[f32]) -> Self {
        let ids = sequences.concat();
        let Some(vision) = &model.model.spec().vision else {
            return Self { ids, tiles: Vec::new() };
        };
        let image = model.config_json["image_token_index"].as_u64().expect("an id") as u32;
        let starts = (0..ids.len()).filter(|&i| ids[i] == image && (i == 0 || ids[i - 1] != image));
        let tiles: Vec<ImageTile> = starts
            .zip(pixels.chunks_exact(vision.pixels()))
            .map(|(position, pixels)| ImageTile {
                position,
                tokens: vision.tokens(),
                tile: Tile::new(pixels.to_vec()).into(),
            })
            .collect();
        assert_eq!(tiles.len(), pixels.len() / vision.pixels(), "every tile has a place");
        Self { ids, tiles }
    }

    /// The rows that show tiles among the `count` tokens from `from` on.
    fn tile_rows(&self, from: usize, count: usize) -> Vec<TileRows<'_>> {
        self.tiles.iter().filter_map(|tile| tile.rows_in(from, count)).collect()
    }
}

/// The checkpoint as float32: what the golden numbers were computed from.
fn open(oracle: &Oracle) -> LoadedModel {
    load(&oracle.dir, Some(WeightsDtype::F32)).unwrap_or_else(|error| panic!("{}: {error}", oracle.name()))
}

fn weights(model: &LoadedModel, purpose: Purpose) -> PolicyWeights {
    PolicyWeights::pack(&model.model, &model.params, PolicyVersion::default(), purpose, &Threads::single())
}

/// The golden batch, computed.
struct Forward {
    tape: Tape,
    targets: Vec<Target>,
    rows: usize,
}

impl Forward {
    fn new(oracle: &Oracle, model: &LoadedModel, weights: &PolicyWeights) -> Self {
        let sequences = oracle.sequences();
        let tokens = Tokens::new(model, &sequences, &oracle.f32_if_there("pixel_values").unwrap_or_default());
        let tiles = tokens.tile_rows(0, tokens.ids.len());
        let seqs: Vec<_> = sequences.iter().map(|s| TrainSeq::whole(s.len())).collect();
        let batch = TrainBatch { tokens: &tokens.ids, seqs: &seqs, replay: None, tiles: &tiles };
        let tape = weights.forward_train(&Threads::single(), &batch);
        let mut targets = Vec::new();
        let mut first = 0;
        for sequence in &sequences {
            let of = |at: usize| Target { row: first + at - 1, token: sequence[at] };
            targets.extend((1..sequence.len()).map(of));
            first += sequence.len();
        }
        Self { tape, targets, rows: tokens.ids.len() }
    }

    fn logits(&self, weights: &PolicyWeights) -> Vec<f32> {
        let rows: Vec<usize> = (0..self.rows).collect();
        self.tape.logits(&Threads::single(), weights, &rows)
    }

    fn log_probs(&self, weights: &PolicyWeights) -> Vec<f32> {
        self.tape.log_probs(&Threads::single(), weights, &self.targets, &SamplingParams::default()).logprobs
    }
}

fn mean_nll(logprobs: &[f32]) -> f64 {
    -logprobs.iter().map(|x| f64::from(*x)).sum::<f64>() / logprobs.len() as f64
}

/// Logits, log-probs, mean log-likelihood and gradients of the golden batch: checked, and measured.
pub fn measure(oracle: &Oracle) -> Measured {
    let (name, model) = (oracle.name(), open(oracle));
    let weights = weights(&model, Purpose::Training);
    let run = Forward::new(oracle, &model, &weights);
    let logits = max_diff(&run.logits(&weights), &oracle.f32("logits"));
    assert!(logits <= TOLERANCE, "{name}: logits differ by {logits}");

    let found = run.log_probs(&weights);
    let golden = oracle.f32("logprobs");
    let lengths = usizes(&oracle.golden["lengths"]);
    let width = golden.len() / lengths.len();
    let wanted: Vec<f32> = lengths
        .iter()
        .enumerate()
        .flat_map(|(row, length)| golden[row * width..][..length - 1].to_vec())
        .collect();
    let logprobs = max_diff(&found, &wanted);
    assert!(logprobs <= TOLERANCE, "{name}: log-probs differ by {logprobs}");
    let (nll, wanted) = (mean_nll(&found), oracle.golden["mean_token_nll"].as_f64().expect("a number"));
    assert!((nll - wanted).abs() <= LOSS_TOLERANCE, "{name}: mean NLL {nll}, golden {wanted}");

    let d = vec![-1.0 / run.targets.len() as f32; run.targets.len()];
    let mut grads = vec![0.0; model.model.layout().total];
    let sampling = SamplingParams::default();
    let targets = run.targets;
    run.tape.backward(&Threads::single(), &weights, &targets, &sampling, &d, None, &mut grads);
    let gradients = oracle.check_gradients(model.model.layout(), &grads);
    Measured { logits, logprobs: Some(logprobs), gradients }
}

#[test]
fn every_row_is_routed_as_in_the_reference() {
    let mut checked = 0;
    for oracle in writers() {
        let (name, model) = (oracle.name(), open(&oracle));
        let (layers, k) = (model.model.spec().moe_layers(), model.model.spec().top_k());
        if layers == 0 {
            continue;
        }
        let run = Forward::new(&oracle, &model, &weights(&model, Purpose::Sampling));
        for (at, layer) in usizes(&oracle.golden["moe_layers"]).into_iter().enumerate() {
            let golden = oracle.i64(&format!("topk_ids.{layer}"));
            for (row, wanted) in golden.chunks_exact(k).enumerate() {
                let found = &run.tape.experts()[(row * layers + at) * k..][..k];
                let found: BTreeSet<i64> = found.iter().map(|&e| i64::from(e)).collect();
                assert_eq!(found, wanted.iter().copied().collect(), "{name}: layer {layer}, row {row}");
                checked += 1;
            }
        }
    }
    assert!(checked > 100, "only {checked} routing decisions were compared");
}

#[test]
fn greedy_continuations_are_the_references() {
    for oracle in writers() {
        let (name, model) = (oracle.name(), open(&oracle));
        let weights = weights(&model, Purpose::Sampling);
        for (case, greedy) in oracle.golden["greedy"].as_array().expect("a list").iter().enumerate() {
            let ids = |key: &str| usizes(&greedy[key]).iter().map(|&x| x as u32).collect::<Vec<u32>>();
            let (prompt, wanted) = (ids("prompt_ids"), ids("output_ids"));
            let pixels = oracle.f32_if_there("pixel_values").unwrap_or_default();
            let shown = match (&greedy["pixel_values_rows"], &model.model.spec().vision) {
                (Value::Array(range), Some(vision)) if !range.is_empty() => {
                    let at = |i: usize| range[i].as_u64().expect("a tile") as usize * vision.pixels();
                    &pixels[at(0)..at(1)]
                }
                _ => &[],
            };
            let tokens = Tokens::new(&model, &[prompt], shown);
            let (found, logprobs) = continue_greedily(&weights, &tokens, wanted.len());
            assert_eq!(found, wanted, "{name}: case {case}");
            let golden: Vec<f32> = greedy["logprobs"]
                .as_array()
                .expect("log-probs")
                .iter()
                .map(|x| x.as_f64().expect("a number") as f32)
                .collect();
            let error = max_diff(&logprobs, &golden);
            assert!(error <= TOLERANCE, "{name}: case {case}: log-probs differ by {error}");
        }
    }
}

/// `count` tokens after `tokens` by argmax over the cache, and their log-probs.
fn continue_greedily(weights: &PolicyWeights, tokens: &Tokens, count: usize) -> (Vec<u32>, Vec<f32>) {
    let prompt = &tokens.ids;
    let pages: Vec<u32> = (0..(prompt.len() + count).div_ceil(16) as u32).collect();
    let mut kv = KvCache::new(weights, pages.len());
    let mut sequence = prompt.clone();
    let (mut done, mut logprobs) = (0, Vec::new());
    let mut scratch = SampleScratch::default();
    while sequence.len() < prompt.len() + count {
        let seqs = [BatchSeq { rows: sequence.len() - done, position: done, pages: &pages }];
        let tiles = tokens.tile_rows(done, sequence.len() - done);
        let logit_rows = [sequence.len() - done - 1];
        let batch =
            ForwardBatch { tokens: &sequence[done..], seqs: &seqs, logit_rows: &logit_rows, tiles: &tiles };
        let out = weights.forward(&Threads::single(), &mut kv, &batch);
        done = sequence.len();
        let token = freewheel_kernels::softmax::argmax(&out.logits).expect("a vocabulary") as u32;
        let sampling = SamplingParams::default();
        logprobs.push(log_prob_of(&out.logits, &sampling, token, &mut scratch).logprob);
        sequence.push(token);
    }
    (sequence.split_off(prompt.len()), logprobs)
}

/// Computed in bfloat16, a checkpoint strays from the float32 numbers about as far as the reference does in bfloat16.
#[test]
fn bf16_checkpoints_stay_as_near_in_bf16_as_the_reference() {
    for oracle in writers().into_iter().filter(Oracle::is_bf16) {
        let name = oracle.name();
        let model = load(&oracle.dir, None).expect("loads as float32 too");
        assert_eq!(model.params.dtype(), WeightsDtype::Bf16);
        let weights = weights(&model, Purpose::Sampling);
        let run = Forward::new(&oracle, &model, &weights);
        let golden = oracle.f32("logits");
        let (ours, theirs) = (
            mean_diff(&run.logits(&weights), &golden),
            mean_diff(&oracle.f32("bf16_compute/logits"), &golden),
        );
        println!("{name}: mean error in bfloat16 {ours:e}, the reference's {theirs:e}");
        assert!(ours <= 1.5 * theirs, "{name}: mean error {ours}, the reference's {theirs}");
        let mean = mean_nll(&run.log_probs(&weights));
        let golden = oracle.golden["mean_token_nll"].as_f64().expect("a number");
        assert!((mean - golden).abs() <= 0.05, "{name}: mean NLL {mean} against {golden}");
    }
}
