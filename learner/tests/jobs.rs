//! Jobs on the real transformer: tiny models with random weights.

use freewheel_kernels::Threads;
use freewheel_learner::metrics::NoMetrics;
use freewheel_learner::preference::reward_model::{
    RewardModelConfig, judge, run_reward_model, tokenise_pair,
};
use freewheel_learner::sft::{SftConfig, SftExample, run_sft};
use freewheel_model::{
    Framed, InitRequest, InitScale, LoadedModel, SaveOptions, Scorer, TokenizerChoice, classifier_from,
    init_model,
};
use freewheel_types::{Prompt, PromptBody, PromptId, WeightsDtype};
use serde_json::json;

fn tiny(arch: &str, dtype: WeightsDtype) -> LoadedModel {
    let sizes = [("hidden_size", 32), ("num_hidden_layers", 2), ("num_attention_heads", 2), ("head_dim", 16)];
    let mut overrides: Vec<_> = sizes.map(|(key, value)| (key.to_owned(), json!(value))).to_vec();
    overrides.push(("intermediate_size".into(), json!(48)));
    if arch == "qwen3_moe" {
        overrides.push(("moe_intermediate_size".into(), json!(16)));
    }
    let request = InitRequest {
        arch: arch.into(),
        overrides,
        seed: 3,
        scale: InitScale::FanIn,
        dtype,
        tokenizer: TokenizerChoice::Bytes,
    };
    init_model(&request).expect("a tiny model")
}

fn prompt(text: &str) -> Prompt {
    let body = PromptBody::Text(text.into());
    Prompt { id: PromptId([0; 16]), name: None, body, answer: None, tags: vec![], verifier: None, meta: None }
}

#[test]
fn a_reward_model_learns_its_pairs_and_scores_as_it_was_trained() {
    let base = tiny("qwen3", WeightsDtype::F32);
    let mut model = classifier_from(&base, "reward", 1).expect("Qwen3 has a classifier");
    let pair = |i: usize| {
        let (chosen, rejected) = (format!("good {i}"), format!("bad {}", i + 1));
        let texts = (chosen.as_str(), rejected.as_str());
        tokenise_pair(&model.tokenizer, model.generation.pad_id, &prompt("well?"), texts, 64, i)
            .expect("short")
    };
    let pairs: Vec<_> = (0..8).map(pair).collect();
    let threads = Threads::single();
    let before = judge(&model, &pairs, 1000, &threads);
    let mut config = RewardModelConfig::default();
    (config.steps, config.batch_size, config.learning_rate, config.threads) = (30, 4, 3e-3, 1);
    let summary = run_reward_model(&config, &mut model, &pairs, &NoMetrics).expect("it trains");
    let after = judge(&model, &pairs, 1000, &threads);
    assert_eq!(after.accuracy, 1.0, "before {before:?}, after {after:?}");
    assert!(after.loss <= 0.3 * before.loss, "before {before:?}, after {after:?}");
    assert!(summary.loss.is_finite());
    // The budget decides which texts share a pass, never what they score.
    assert_eq!(judge(&model, &pairs, 1, &threads), after);

    let folder = tempfile::tempdir().unwrap();
    freewheel_model::save(folder.path(), &model, &model.params, &SaveOptions::default()).unwrap();
    let scorer = Scorer::load(folder.path(), &threads).expect("it loads as a reward model");
    assert_eq!(scorer.info().labels, ["reward"]);
    let framed = |ids: &[u32]| Framed { ids: ids.to_vec(), token_types: vec![0; ids.len()] };
    let inputs: Vec<Framed> = pairs.iter().flat_map(|p| [framed(&p.chosen), framed(&p.rejected)]).collect();
    let scores = scorer.score(&threads, &inputs);
    let margin = scores.chunks(2).map(|s| f64::from(s[0][0]) - f64::from(s[1][0])).sum::<f64>() / 8.0;
    assert!((margin - after.margin).abs() <= 1e-6, "{margin}, in training {}", after.margin);
}

#[test]
fn adapters_learn_while_the_base_stays_and_experts_and_routers_may_have_them() {
    for (arch, targets) in [("qwen3", vec!["attention", "mlp"]), ("qwen3_moe", vec!["expert", "router"])] {
        let start = tiny(arch, WeightsDtype::Bf16);
        let mut model = start.clone();
        let mut config = SftConfig::default();
        (config.steps, config.batch_size, config.learning_rate, config.threads) = (30, 4, 1e-2, 1);
        config.optimizer.lora_rank = 4;
        config.optimizer.lora_targets = targets.iter().map(|&target| target.to_owned()).collect();
        let examples = || (0..4).map(|i| SftExample { prompt: prompt("say"), completion: format!("abc{i}") });
        let mut first = config.clone();
        (first.steps, first.learning_rate) = (1, 0.0);
        let at_start = run_sft(&first, &mut start.clone(), examples(), &NoMetrics).unwrap().loss;
        let summary = run_sft(&config, &mut model, examples(), &NoMetrics).unwrap();
        assert!(summary.loss <= 0.8 * at_start, "{arch}: from {at_start} to {}", summary.loss);
        let mut moved = std::collections::BTreeSet::new();
        for tensor in &start.params.layout.tensors {
            if model.params.range_f32(tensor.range()) != start.params.range_f32(tensor.range()) {
                moved.insert(format!("{:?}", tensor.kind).to_lowercase());
            }
        }
        assert!(moved.iter().eq(targets.iter()), "{arch}: {moved:?} moved");
        // The adapter on the base is the model, to the bit.
        let adapter = summary.adapter.expect("no fused experts here");
        let merged = adapter.merge(&start.params, std::path::Path::new("adapter")).unwrap();
        assert_eq!(merged, model.params);
    }
}

#[test]
fn adapters_that_fit_nothing_are_refused() {
    let mut config = SftConfig::default();
    config.optimizer.lora_rank = 4;
    config.optimizer.lora_targets = vec!["router".into(), "model.layers.9.*".into()];
    let examples = [SftExample { prompt: prompt("say"), completion: "a".into() }];
    let error = run_sft(&config, &mut tiny("qwen3", WeightsDtype::F32), examples, &NoMetrics).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("model.layers.9.*") && text.contains("fit none"), "{text}");
}
