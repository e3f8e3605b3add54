//! `family = "prompt_guard"`: an attack is found wherever it stands in a long prompt.

use std::path::Path;

use freewheel_reward::{
    Completion, ComponentConfig, ComponentKind, GuardFamily, GuardRole, RewardConfig, RewardStack,
};
use freewheel_types::{Prompt, PromptBody, PromptId, RewardRecord};
use serde_json::{Map, Value, json};

const HIDDEN: usize = 8;

/// A one-layer DeBERTa that fires on the word "attack" and nothing else: its first token takes the mean of what all tokens carry in their last four
/// dimensions, where only that word has anything; a norm brings it to a size that does not depend on how many tokens there are.
fn write_model(dir: &Path) {
    let fixture =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/deberta_v2_classifier");
    let text = std::fs::read_to_string(fixture.join("config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
    for (key, value) in [
        ("hidden_size", json!(HIDDEN)),
        ("pooler_hidden_size", json!(HIDDEN)),
        ("intermediate_size", json!(HIDDEN)),
        ("num_attention_heads", json!(2)),
        ("num_hidden_layers", json!(1)),
        ("max_position_embeddings", json!(512)),
        ("vocab_size", json!(8)),
    ] {
        config.insert(key.into(), value);
    }
    std::fs::write(dir.join("config.json"), Value::Object(config).to_string()).unwrap();
    let special = |id: u32, text: &str| json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let token = |text: &str, id: u32| json!({"id": text, "ids": [id], "tokens": [text]});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": [special(0, "[PAD]"), special(1, "[CLS]"), special(2, "[SEP]"), special(3, "[UNK]")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {"[CLS]": token("[CLS]", 1), "[SEP]": token("[SEP]", 2)}},
        "model": {"type": "WordLevel", "unk_token": "[UNK]",
            "vocab": {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "the": 4, "attack": 5, "a": 6, "b": 7}},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), r#"{"unk_token": "[UNK]"}"#).unwrap();
    std::fs::write(dir.join("model.safetensors"), safetensors(&tensors())).unwrap();
}

fn diagonal(values: [f32; HIDDEN]) -> Vec<f32> {
    (0..HIDDEN * HIDDEN).map(|i| if i / HIDDEN == i % HIDDEN { values[i % HIDDEN] } else { 0.0 }).collect()
}

fn tensors() -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let (square, row) = (vec![HIDDEN, HIDDEN], vec![HIDDEN]);
    let zeros = |n: usize| vec![0.0; n];
    let plain = [1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0];
    let attack = [0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0];
    let words = (0..8).flat_map(|id| if id == 5 { attack } else { plain }).collect();
    let layer = "deberta.encoder.layer.0";
    let mut all = vec![
        ("deberta.embeddings.word_embeddings.weight".to_owned(), vec![8, HIDDEN], words),
        ("deberta.encoder.rel_embeddings.weight".to_owned(), vec![16, HIDDEN], zeros(16 * HIDDEN)),
        ("classifier.weight".to_owned(), vec![2, HIDDEN], {
            let mut weight = zeros(2 * HIDDEN);
            (weight[HIDDEN + 4], weight[HIDDEN + 6]) = (4.0, 4.0);
            weight
        }),
        ("classifier.bias".to_owned(), vec![2], vec![0.0, -4.0]),
    ];
    for norm in [
        "deberta.embeddings.LayerNorm".to_owned(),
        "deberta.encoder.LayerNorm".to_owned(),
        format!("{layer}.attention.output.LayerNorm"),
        format!("{layer}.output.LayerNorm"),
    ] {
        all.push((format!("{norm}.weight"), row.clone(), vec![1.0; HIDDEN]));
        all.push((format!("{norm}.bias"), row.clone(), zeros(HIDDEN)));
    }
    let last_four = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0];
    for (name, weight) in [
        (format!("{layer}.attention.self.query_proj"), zeros(HIDDEN * HIDDEN)),
        (format!("{layer}.attention.self.key_proj"), zeros(HIDDEN * HIDDEN)),
        (format!("{layer}.attention.self.value_proj"), diagonal(last_four)),
        (format!("{layer}.attention.output.dense"), diagonal([5000.0; HIDDEN])),
        (format!("{layer}.intermediate.dense"), zeros(HIDDEN * HIDDEN)),
        (format!("{layer}.output.dense"), zeros(HIDDEN * HIDDEN)),
        ("pooler.dense".to_owned(), diagonal([1.0; HIDDEN])),
    ] {
        all.push((format!("{name}.weight"), square.clone(), weight));
        all.push((format!("{name}.bias"), row.clone(), zeros(HIDDEN)));
    }
    all
}

fn safetensors(tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

fn component(dir: &Path) -> ComponentConfig {
    ComponentConfig {
        name: "attack".into(),
        kind: ComponentKind::Guard,
        family: GuardFamily::PromptGuard,
        role: GuardRole::Prompt,
        model: Some(dir.to_str().unwrap().into()),
        ..Default::default()
    }
}

fn score(stack: &RewardStack, text: &str) -> RewardRecord {
    let prompt = Prompt {
        id: PromptId::of(b"p"),
        name: None,
        body: PromptBody::Text(text.into()),
        answer: None,
        tags: Vec::new(),
        verifier: None,
        meta: None,
    };
    stack.score(&Completion { prompt: &prompt, text: "fine", tokens: 1, truncated: false })
}

/// `n` harmless words, the attack in place of number `at`.
fn planted(n: usize, at: Option<usize>) -> String {
    (0..n).map(|i| if Some(i) == at { "attack" } else { "the" }).collect::<Vec<_>>().join(" ")
}

#[test]
fn an_attack_is_found_at_any_place_of_a_long_prompt() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    // Time is not what is tested: sixteen windows a prompt, on kernels that may not be optimised.
    let config =
        RewardConfig { component: vec![component(dir.path())], deadline_ms: 600_000, ..Default::default() };
    let stack = RewardStack::new(&config).unwrap();
    let value = |text: &str| {
        let record = score(&stack, text);
        record.components[0].value.unwrap_or_else(|| panic!("{:?}", record.verdict))
    };
    for at in [0, 1, 127, 381, 382, 509, 510, 511, 512, 891, 892, 5000, 5998, 5999] {
        let found = value(&planted(6000, Some(at)));
        assert!(found > 0.99, "planted at {at}: {found}");
    }
    for harmless in [planted(6000, None), planted(510, None), planted(1, None), String::new()] {
        let found = value(&harmless);
        assert!(found < 0.05, "{} words: {found}", harmless.len() / 4);
    }
    // The same model as the reference scanner reads it, cut at 512 tokens, sees nothing of what comes later.
    let cut = |at: usize| planted(6000, Some(at)).split(' ').take(510).collect::<Vec<_>>().join(" ");
    assert!(value(&cut(509)) > 0.99 && value(&cut(511)) < 0.05);

    let record = score(&stack, &planted(6000, Some(5000)));
    assert_eq!(record.components[0].label.as_deref(), Some("unsafe"));
    let detail = record.components[0].detail.as_deref().unwrap();
    assert!(detail.starts_with("16 windows, the worst from token"), "{detail}");
    assert!(record.reward().unwrap() < -0.99, "a guard's value is subtracted");
}

#[test]
fn wrong_settings_are_named() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    let problems = |component: ComponentConfig| {
        let config = RewardConfig { component: vec![component], ..Default::default() };
        let found = RewardStack::check(&config).expect_err("a problem");
        found.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    let too_long = ComponentConfig { max_tokens: Some(600), ..component(dir.path()) };
    assert!(problems(too_long).contains("max_tokens: must be 4 to 512"));
    let label = ComponentConfig { label: Some("EVIL".into()), ..component(dir.path()) };
    assert!(problems(label).contains("no label \"EVIL\"; it has 0 \"BENIGN\", 1 \"MALICIOUS\""));
    let nothing = ComponentConfig { model: None, ..component(dir.path()) };
    assert!(problems(nothing).contains("model: is not set"));
    let role = ComponentConfig { head: Some("x".into()), ..component(dir.path()) };
    assert!(problems(role).contains("head: only read with"));
}
