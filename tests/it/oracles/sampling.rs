//! Temperature, top-k, top-p and min-p: the distribution that tokens are drawn from is transformers'.

use std::collections::BTreeSet;

use freewheel_model::sampling::{SampleScratch, log_prob_of, sample};
use freewheel_tests::fixtures;
use freewheel_types::SamplingParams;
use safetensors::SafeTensors;
use serde_json::Value;

/// Draws that sweep a distribution; no token of the golden cases that is kept is likelier than this to be passed over.
const DRAWS: u32 = 20_000;

#[test]
fn tokens_are_drawn_from_the_references_distribution() {
    let cases: Value =
        serde_json::from_slice(&std::fs::read(fixtures("rl").join("sampling_filters.json")).expect("cases"))
            .expect("JSON");
    let bytes = std::fs::read(fixtures("rl").join("sampling_filters.safetensors")).expect("tensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let rows = |name: &str| -> Vec<Vec<f32>> {
        let view = tensors.tensor(name).expect("a golden tensor");
        let values: Vec<f32> = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        values.chunks_exact(view.shape()[1]).map(<[f32]>::to_vec).collect()
    };
    let (logits, mut checked) = (rows("logits"), 0);
    for case in cases["cases"].as_array().expect("a list") {
        let config = &case["config"];
        if config.get("repetition_penalty").is_some() {
            continue; // No rollout is drawn with one: the learner could not tell its gradient from the policy's.
        }
        let number = |key: &str, default: f64| config[key].as_f64().unwrap_or(default);
        let params = SamplingParams {
            temperature: number("temperature", 1.0) as f32,
            top_k: number("top_k", 0.0) as u32,
            top_p: number("top_p", 1.0) as f32,
            min_p: number("min_p", 0.0) as f32,
        };
        let probs = rows(case["probs"].as_str().expect("a name"));
        for (logits, probs) in logits.iter().zip(&probs) {
            check(&params, logits, probs, &config.to_string());
            checked += 1;
        }
    }
    assert!(checked >= 30, "only {checked} distributions");
}

fn check(params: &SamplingParams, logits: &[f32], probs: &[f32], what: &str) {
    let mut scratch = SampleScratch::default();
    let kept: BTreeSet<u32> = (0..probs.len() as u32).filter(|token| probs[*token as usize] > 0.0).collect();
    for &token in &kept {
        let found = log_prob_of(logits, params, token, &mut scratch).logprob.exp();
        let golden = probs[token as usize];
        assert!((found - golden).abs() <= 1e-5, "{what}: token {token} has {found}, golden {golden}");
    }
    let mut drawn = BTreeSet::new();
    for i in 0..DRAWS {
        let uniform = (f64::from(i) + 0.5) / f64::from(DRAWS);
        drawn.insert(sample(logits, params, uniform, &mut scratch).token);
    }
    assert!(drawn.is_subset(&kept), "{what}: {:?} are cut", drawn.difference(&kept));
    let likely = kept.iter().filter(|token| probs[**token as usize] > 2.0 / DRAWS as f32);
    assert!(likely.clone().all(|token| drawn.contains(token)), "{what}: a token is never drawn");
}
