//! Every architecture against its oracle: logits, log-probs, routing, gradients and greedy continuations that the
//! reference implementation computed (float32) from the very same checkpoint bytes.
//!
//! Reads `tests/fixtures/models/` or `$FREEWHEEL_ORACLES/models/`, by its index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use freewheel_kernels::Threads;
use freewheel_model::{
    BatchSeq, ForwardBatch, KvCache, LoadedModel, ModelError, PolicyWeights, Purpose, Tape, Target,
    TrainBatch, TrainSeq, load,
};
fn fixtures(part: &str) -> PathBuf { std::env::var_os("FREEWHEEL_ORACLES").map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures")), PathBuf::from).join(part) }
use freewheel_types::{PolicyVersion, SamplingParams, WeightsDtype};
use safetensors::SafeTensors;
use serde_json::Value;

/// Absolute tolerance on logits and log-probs (the oracles' README).
const TOLERANCE: f32 = 2e-4;

struct Oracle {
    dir: PathBuf,
    golden: Value,
    tensors: Vec<u8>,
}

impl Oracle {
    fn read(dir: PathBuf) -> Self {
        let golden = std::fs::read(dir.join("golden.json")).expect("golden.json");
        let tensors = std::fs::read(dir.join("golden.safetensors")).expect("golden.safetensors");
        Self { golden: serde_json::from_slice(&golden).expect("golden.json parses"), tensors, dir }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.tensors).expect("golden.safetensors parses")
    }

    fn f32(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).ok()?;
        Some(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
    }

    fn i64(&self, name: &str) -> Vec<i64> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).unwrap_or_else(|_| panic!("golden tensor {name}"));
        view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
    }

    /// The real tokens of every row of the right-padded batch.
    fn sequences(&self) -> Vec<Vec<u32>> {
        let lengths: Vec<usize> = usizes(&self.golden["lengths"]);
        let ids = self.i64("input_ids");
        let width = ids.len() / lengths.len();
        let row =
            |(row, &len): (usize, &usize)| ids[row * width..][..len].iter().map(|&id| id as u32).collect();
        lengths.iter().enumerate().map(row).collect()
    }
}

fn usizes(value: &Value) -> Vec<usize> {
    value.as_array().expect("a list").iter().map(|x| x.as_u64().expect("a count") as usize).collect()
}

fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    a.iter().zip(b).fold(0.0, |worst, (a, b)| {
        let diff = (a - b).abs();
        if diff > worst || diff.is_nan() { diff } else { worst }
    })
}

/// Every causal language model of the index that this build supports; the others are named.
fn oracles() -> Vec<(Oracle, LoadedModel)> {
    let root = fixtures("models");
    let index: Value =
        serde_json::from_slice(&std::fs::read(root.join("index.json")).expect("models/index.json"))
            .expect("models/index.json parses");
    let mut found = Vec::new();
    for entry in index.as_array().expect("a list") {
        let name = entry["name"].as_str().expect("a name");
        let dir = root.join(name);
        if !dir.exists() && std::env::var_os("FREEWHEEL_ORACLES").is_none() {
            println!("not among the fixtures: {name}");
            continue;
        }
        match load(&dir, Some(WeightsDtype::F32)) {
            Ok(model) => found.push((Oracle::read(dir), model)),
            Err(ModelError::Unsupported { what, .. }) => {
                println!("skipped {name}: {what} is not supported yet")
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
    assert!(found.len() >= 4, "only {} oracles could be read from {}", found.len(), root.display());
    found
}

fn weights(model: &LoadedModel, purpose: Purpose) -> PolicyWeights {
    PolicyWeights::pack(&model.model, &model.params, PolicyVersion::default(), purpose, &Threads::single())
}

struct Forward {
    tape: Tape,
    targets: Vec<Target>,
    rows: usize,
}

fn forward(weights: &PolicyWeights, sequences: &[Vec<u32>]) -> Forward {
    let tokens = sequences.concat();
    let seqs: Vec<_> = sequences.iter().map(|s| TrainSeq::whole(s.len())).collect();
    let batch = TrainBatch { tokens: &tokens, seqs: &seqs, replay: None };
    let tape = weights.forward_train(&Threads::single(), &batch);
    let mut targets = Vec::new();
    let mut first = 0;
    for sequence in sequences {
        let of = |at: usize| Target { row: first + at - 1, token: sequence[at] };
        targets.extend((1..sequence.len()).map(of));
        first += sequence.len();
    }
    Forward { tape, targets, rows: tokens.len() }
}

#[test]
fn oracles_logits_and_log_probs() {
    for (oracle, model) in oracles() {
        let name = oracle.dir.display();
        let sequences = oracle.sequences();
        let weights = weights(&model, Purpose::Sampling);
        let run = forward(&weights, &sequences);
        let rows: Vec<usize> = (0..run.rows).collect();
        let logits = run.tape.logits(&Threads::single(), &weights, &rows);
        let error = max_diff(&logits, &oracle.f32("logits").expect("golden logits"));
        println!("{name}: max logit error {error:e}");
        assert!(error <= TOLERANCE, "{name}: logits differ by {error}");

        let found =
            run.tape.log_probs(&Threads::single(), &weights, &run.targets, &SamplingParams::default());
        let golden = oracle.f32("logprobs").expect("golden logprobs");
        let width = golden.len() / sequences.len();
        let wanted: Vec<f32> = sequences
            .iter()
            .enumerate()
            .flat_map(|(row, s)| golden[row * width..][..s.len() - 1].to_vec())
            .collect();
        let error = max_diff(&found.logprobs, &wanted);
        assert!(error <= TOLERANCE, "{name}: log-probs differ by {error}");
    }
}

#[test]
fn oracles_routing() {
    let mut checked = 0;
    for (oracle, model) in oracles() {
        let name = oracle.dir.display();
        let (layers, k) = (model.model.spec().moe_layers(), model.model.spec().top_k());
        if layers == 0 {
            continue;
        }
        let run = forward(&weights(&model, Purpose::Sampling), &oracle.sequences());
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
fn oracles_gradients() {
    for (oracle, model) in oracles() {
        let name = oracle.dir.display();
        let weights = weights(&model, Purpose::Training);
        let run = forward(&weights, &oracle.sequences());
        let d = vec![-1.0 / run.targets.len() as f32; run.targets.len()];
        let mut grads = vec![0.0; model.model.layout().total];
        let sampling = SamplingParams::default();
        run.tape.backward(&Threads::single(), &weights, &run.targets, &sampling, &d, None, &mut grads);
        let mut worst = BTreeMap::new();
        for tensor in &model.model.layout().tensors {
            let Some(golden) = oracle.f32(&format!("grad/{}", tensor.name)) else { continue };
            let largest = golden.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            let error = max_diff(&grads[tensor.range()], &golden);
            assert!(
                error <= 2e-4 * largest + 1e-7,
                "{name}: {} differs by {error}, largest {largest}",
                tensor.name
            );
            worst.insert(tensor.name.clone(), error / largest);
        }
        assert!(worst.len() >= 5, "{name}: only {} gradients were compared", worst.len());
        let norm = grads.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let golden = oracle.golden["grad_norm_all_params"].as_f64().expect("a norm");
        assert!((norm - golden).abs() <= 1e-4 * golden, "{name}: gradient norm {norm}, oracle {golden}");
    }
}

#[test]
fn oracles_greedy_continuations() {
    for (oracle, model) in oracles() {
        let name = oracle.dir.display();
        let weights = weights(&model, Purpose::Sampling);
        for (case, greedy) in oracle.golden["greedy"].as_array().expect("a list").iter().enumerate() {
            let ids = |key: &str| usizes(&greedy[key]).iter().map(|&x| x as u32).collect::<Vec<u32>>();
            let (prompt, wanted) = (ids("prompt_ids"), ids("output_ids"));
            assert_eq!(continue_greedily(&weights, &prompt, wanted.len()), wanted, "{name}: case {case}");
        }
    }
}

fn continue_greedily(weights: &PolicyWeights, prompt: &[u32], count: usize) -> Vec<u32> {
    let pages: Vec<u32> = (0..(prompt.len() + count).div_ceil(16) as u32).collect();
    let mut kv = KvCache::new(weights.model(), pages.len());
    let mut sequence = prompt.to_vec();
    let mut done = 0;
    while sequence.len() < prompt.len() + count {
        let seqs = [BatchSeq { rows: sequence.len() - done, position: done, pages: &pages }];
        let batch =
            ForwardBatch { tokens: &sequence[done..], seqs: &seqs, logit_rows: &[sequence.len() - done - 1] };
        let out = weights.forward(&Threads::single(), &mut kv, &batch);
        done = sequence.len();
        sequence.push(freewheel_kernels::softmax::argmax(&out.logits).expect("a vocabulary") as u32);
    }
    sequence.split_off(prompt.len())
}

#[test]
fn oracles_of_bf16_checkpoints_stay_near_in_bf16() {
    for (oracle, _) in oracles().into_iter().filter(|(oracle, _)| is_bf16(&oracle.dir)) {
        let model = load(&oracle.dir, None).expect("loaded before");
        assert_eq!(model.params.dtype(), WeightsDtype::Bf16);
        let weights = weights(&model, Purpose::Sampling);
        let run = forward(&weights, &oracle.sequences());
        let found =
            run.tape.log_probs(&Threads::single(), &weights, &run.targets, &SamplingParams::default());
        let mean = -found.logprobs.iter().map(|x| f64::from(*x)).sum::<f64>() / found.logprobs.len() as f64;
        let golden = oracle.golden["mean_token_nll"].as_f64().expect("a number");
        // bf16 activations: a few thousandths of a nat on average, never a different distribution.
        assert!((mean - golden).abs() <= 0.05, "{}: mean NLL {mean} against {golden}", oracle.dir.display());
    }
}

fn is_bf16(dir: &Path) -> bool {
    dir.file_name().is_some_and(|name| name.to_string_lossy().ends_with("_bf16"))
}
