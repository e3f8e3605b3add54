//! LoRA against golden values of PEFT: merged weights, logits, log-probs, gradients of both factors.

mod oracle;

use std::path::{Path, PathBuf};

use freewheel_kernels::Threads;
use freewheel_learner::lora::Lora;
use freewheel_learner::optim::OptimizerConfig;
use freewheel_model::{Adapter, PolicyWeights, Purpose, Target, TrainBatch, TrainSeq};
use freewheel_types::{PolicyVersion, SamplingParams};
use oracle::{Oracle, max_diff};

fn root() -> PathBuf {
    let fixtures = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    std::env::var_os("FREEWHEEL_ORACLES").map_or_else(fixtures, PathBuf::from)
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn adapters_are_read_merged_and_trained_as_peft_does() {
    let golden = Oracle::open("lora/golden");
    let base_name = golden.cases["base"].as_str().unwrap();
    let base = freewheel_model::load(&root().join(base_name), None).expect("the base");
    let folder = root().join(golden.cases["adapter"].as_str().unwrap());
    let adapter = Adapter::load(&folder).expect("PEFT's adapter");
    let merged = adapter.merge(&base.params, &folder).expect("it fits the base");
    for name in golden.cases["merged"].as_array().unwrap() {
        let name = name.as_str().unwrap();
        let got = widened(&merged.range_f32(merged.layout.get(name).unwrap().range()));
        let diff = max_diff(&got, &golden.values(&format!("merged/{name}")));
        assert!(diff <= 1e-6, "{name}: merged weights off by {diff}");
    }

    let config = OptimizerConfig {
        lora_rank: adapter.rank,
        lora_alpha: Some(adapter.alpha),
        lora_targets: ["q_proj", "v_proj", "up_proj", "down_proj"].map(|m| format!("*.{m}.weight")).to_vec(),
        ..Default::default()
    };
    let (lora, start) = Lora::new(&config, &base.params).expect("a rank above 0");
    let factor = |name: &str| adapter.params.range_f32(adapter.params.layout.get(name).unwrap().range());
    let masters: Vec<f32> = start.layout.tensors.iter().flat_map(|tensor| factor(&tensor.name)).collect();
    let (threads, mut weights) = (Threads::single(), base.params.clone());
    lora.merge(&threads, &masters, &mut weights);
    assert_eq!(weights, merged, "trained and merged adapters are the same weights");

    // The batch of the base's goldens, padding left out.
    let inputs = Oracle::open(&format!("{base_name}/golden"));
    let (shape, ids) = inputs.tensor("input_ids");
    let mask = inputs.values("attention_mask");
    let real = |row: usize| mask[row * shape[1]..][..shape[1]].iter().sum::<f64>() as usize;
    let lengths: Vec<usize> = (0..shape[0]).map(real).collect();
    let tokens: Vec<u32> =
        (0..shape[0]).flat_map(|row| &ids[row * shape[1]..][..lengths[row]]).map(|&id| id as u32).collect();
    let seqs: Vec<TrainSeq> = lengths.iter().map(|&rows| TrainSeq::whole(rows)).collect();
    let packed =
        PolicyWeights::pack(&base.model, &weights, PolicyVersion::default(), Purpose::Training, &threads);
    let batch = TrainBatch { tokens: &tokens, seqs: &seqs, replay: None, tiles: &[] };
    let tape = packed.forward_train(&threads, &batch);
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let logits = widened(&tape.logits(&threads, &packed, &rows));
    let diff = max_diff(&logits, &golden.values("logits"));
    assert!(diff <= 2e-4, "logits off by {diff}");

    let (mut targets, mut first) = (Vec::new(), 0);
    for length in lengths {
        targets.extend((first..first + length - 1).map(|row| Target { row, token: tokens[row + 1] }));
        first += length;
    }
    let (sampling, slope) = (SamplingParams::default(), vec![-1.0 / targets.len() as f32; targets.len()]);
    let found = tape.log_probs(&threads, &packed, &targets, &sampling);
    let nll = -found.logprobs.iter().map(|&x| f64::from(x)).sum::<f64>() / targets.len() as f64;
    let expected = golden.cases["mean_token_nll"].as_f64().unwrap();
    assert!((nll - expected).abs() <= 1e-4, "mean NLL {nll}, PEFT {expected}");
    let mut grads = vec![0.0; weights.layout.total];
    tape.backward(&threads, &packed, &targets, &sampling, &slope, None, &mut grads);
    let projected = lora.project(&threads, &masters, &grads);
    let mut held = 0;
    for name in golden.cases["grads"].as_array().unwrap() {
        let name = name.as_str().unwrap();
        let got = widened(&projected[start.layout.get(name).unwrap().range()]);
        let expected = golden.values(&format!("grad/{name}"));
        let scale = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        let diff = max_diff(&got, &expected);
        assert!(diff <= 2e-4 * scale + 1e-7, "{name}: gradient off by {diff} of {scale}");
        held += 1;
    }
    assert!(held >= 4, "{held} gradients found");
}
