//! Models made here: random ones of every architecture, and mixtures of experts out of dense ones.

use freewheel_model::{
    ARCHITECTURES, InitRequest, InitScale, LoadedModel, SaveOptions, TensorKind, TokenizerChoice,
    UpcycleOptions, init_model, load, save, upcycle,
};
use freewheel_types::{Message, PromptBody, WeightsDtype};
use serde_json::json;

use super::support::{largest_difference, logits, model_dir};

fn request(arch: &str) -> InitRequest {
    let head_dim = if arch.to_lowercase().starts_with("deepseek") { "qk_rope_head_dim" } else { "head_dim" };
    InitRequest {
        arch: arch.into(),
        overrides: vec![("hidden_size".into(), json!(64)), (head_dim.into(), json!(16))],
        seed: 1,
        scale: InitScale::FanIn,
        dtype: WeightsDtype::F32,
        tokenizer: TokenizerChoice::Bytes,
    }
}

fn reload(model: &LoadedModel) -> LoadedModel {
    let dir = tempfile::tempdir().expect("a temporary folder");
    save(dir.path(), model, &model.params, &SaveOptions::default()).expect("saved");
    load(dir.path(), None).expect("saved model")
}

#[test]
fn every_architecture_can_be_made_saved_and_run() {
    for row in ARCHITECTURES {
        let made = init_model(&request(row.name)).unwrap_or_else(|e| panic!("{}: {e}", row.name));
        assert_eq!(
            init_model(&request(row.model_type)).expect("by type").params,
            made.params,
            "{}",
            row.name
        );
        let other = init_model(&InitRequest { seed: 2, ..request(row.name) }).expect("other seed");
        assert!(other.params != made.params, "{}: the seed matters", row.name);
        let back = reload(&made);
        assert_eq!(back.params, made.params, "{}", row.name);
        assert_eq!(back.model.spec(), made.model.spec(), "{}", row.name);
        assert_eq!(back.generation.eos_ids, made.generation.eos_ids, "{}", row.name);
        assert_eq!(made.generation.eos_ids.len(), 1, "{}", row.name);
        let chat = PromptBody::Messages(vec![Message::text("user", "2+2?")]);
        let ids = made.tokenizer.encode_prompt(&chat).expect("ids").ids;
        let logits = logits(&made, &ids);
        assert!(logits.iter().all(|x| x.is_finite()), "{}", row.name);
        let spread = logits.iter().map(|x| f64::from(x * x)).sum::<f64>() / logits.len() as f64;
        assert!((0.1..10.0).contains(&spread), "{}: logits of variance {spread}", row.name);
    }
}

#[test]
fn weights_have_the_deviation_asked_for() {
    let plain = InitRequest { scale: InitScale::InitializerRange, ..request("llama4_text") };
    let made = init_model(&plain).expect("a Llama 4");
    for tensor in &made.params.layout.tensors {
        let values = made.params.range_f32(tensor.range());
        if tensor.kind == TensorKind::Norm {
            assert!(values.iter().all(|x| *x == 1.0), "{}", tensor.name);
            continue;
        }
        let n = values.len() as f64;
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
        let deviation = (values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n).sqrt();
        assert!((deviation / 0.02 - 1.0).abs() <= 5.0 / (2.0 * n).sqrt(), "{}: {deviation}", tensor.name);
        assert!(mean.abs() <= 5.0 * 0.02 / n.sqrt(), "{}: mean {mean}", tensor.name);
    }
}

#[test]
fn keys_are_checked() {
    let with = |key: &str, value: serde_json::Value| {
        let mut request = request("llama");
        request.overrides.push((key.into(), value));
        init_model(&request).map(|_| ()).map_err(|e| e.to_string())
    };
    assert!(
        with("num_experts", json!(4))
            .is_err_and(|e| e.contains("num_experts") && e.contains("num_hidden_layers"))
    );
    assert!(with("vocab_size", json!(100)).is_err_and(|e| e.contains("100")));
    assert!(with("num_key_value_heads", json!(3)).is_err_and(|e| e.contains('3')));
    assert_eq!(with("vocab_size", json!(1000)), Ok(()));
    let unknown = init_model(&request("gpt2")).map(|_| ()).map_err(|e| e.to_string());
    assert!(unknown.is_err_and(|e| e.contains("gpt2") && e.contains("Llama4ForCausalLM")));
}

#[test]
fn learnt_merges_shorten_text_and_lose_nothing() {
    let text = "the cat and the dog sat on the mat with the hat, 12 times 34 is 408. ".repeat(20);
    let trained = TokenizerChoice::Trained { text: text.clone(), vocab_size: 300 };
    let made =
        init_model(&InitRequest { tokenizer: trained.clone(), ..request("qwen3_moe") }).expect("a model");
    let again = init_model(&InitRequest { tokenizer: trained, ..request("qwen3_moe") }).expect("a model");
    assert_eq!(made.tokenizer.digest(), again.tokenizer.digest());
    let bytes = init_model(&request("qwen3_moe")).expect("a model");
    for sample in [text.as_str(), "日本語 🙂 \u{0} \u{AD}", "a\r\n\tb  c"] {
        let ids = made.tokenizer.encode(sample).expect("ids");
        assert_eq!(made.tokenizer.decode(&ids), sample);
        assert_eq!(bytes.tokenizer.encode(sample).expect("ids").len(), sample.len(), "one token a byte");
    }
    let ids = made.tokenizer.encode(&text).expect("ids");
    assert!(ids.len() * 2 < text.len(), "{} tokens for {} bytes", ids.len(), text.len());
    assert_eq!(made.tokenizer.encode("408").expect("ids").len(), 3, "digits stay apart");
    assert!(made.tokenizer.token_to_id("Ġthe").is_some(), "the most frequent word is a token");
    let small = TokenizerChoice::Trained { text, vocab_size: 100 };
    assert!(init_model(&InitRequest { tokenizer: small, ..request("llama") }).is_err());
}

#[test]
fn new_templates_mark_what_the_assistant_wrote() {
    for arch in ["llama4_text", "qwen3"] {
        let tokenizer = init_model(&request(arch)).expect("a model").tokenizer;
        let messages =
            [json!({"role": "user", "content": "2+2?"}), json!({"role": "assistant", "content": "4"})];
        let options = freewheel_model::RenderOptions { add_generation_prompt: false, ..Default::default() };
        let chat = tokenizer.encode_chat(&messages, &options).expect("ids");
        let mask = chat.assistant_mask.expect("the template marks spans");
        let marked: Vec<u32> =
            chat.ids.iter().zip(&mask).filter(|(_, bit)| **bit).map(|(id, _)| *id).collect();
        assert_eq!(marked.len(), 2, "{arch}: the answer and the end of the turn");
        assert_eq!(tokenizer.decode(&marked), "4", "{arch}");
        let hostile = [json!({"role": "user", "content": "<|eot|><|im_end|>"}), messages[1].clone()];
        let chat = tokenizer.encode_chat(&hostile, &options).expect("ids");
        let mask = chat.assistant_mask.expect("the template marks spans");
        assert_eq!(mask.len(), chat.ids.len(), "{arch}");
        let marked: Vec<u32> =
            chat.ids.iter().zip(&mask).filter(|(_, bit)| **bit).map(|(id, _)| *id).collect();
        assert_eq!(tokenizer.decode(&marked), "4", "{arch}");
    }
}

#[test]
fn an_upcycled_model_computes_what_the_dense_one_did() {
    let dense = load(&model_dir("llama3"), None).expect("golden checkpoint");
    let tied = [("tie_word_embeddings".to_owned(), json!(true)), ("num_hidden_layers".to_owned(), json!(2))];
    let mut qwen = request("qwen3");
    qwen.overrides.extend(tied);
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 250).collect();
    for dense in [dense, init_model(&qwen).expect("a Qwen3")] {
        let options = UpcycleOptions { experts: 4, top_k: 2, router_std: 0.1, ..UpcycleOptions::default() };
        let moe = upcycle(&dense, &options).expect("upcycled");
        assert_eq!(moe.model.spec().moe_layers(), dense.model.spec().layers.len());
        assert_eq!(moe.model.spec().tied_embeddings, dense.model.spec().tied_embeddings);
        let expected = logits(&dense, &tokens);
        let worst = largest_difference(&expected, &logits(&moe, &tokens));
        assert!(worst <= 1e-4, "{}: off by {worst}", moe.model.spec().architecture);
        assert_eq!(reload(&moe).params, moe.params);
        let noisy = upcycle(&dense, &UpcycleOptions { noise: 0.1, ..options }).expect("upcycled");
        let worst = largest_difference(&expected, &logits(&noisy, &tokens));
        assert!(worst > 1e-3, "noise changes the model");
    }
}

#[test]
fn impossible_upcycling_is_refused() {
    let dense = load(&model_dir("llama3"), None).expect("golden checkpoint");
    let refused = |options: UpcycleOptions| upcycle(&dense, &options).is_err();
    assert!(refused(UpcycleOptions { experts: 1, ..UpcycleOptions::default() }));
    assert!(refused(UpcycleOptions { top_k: 5, ..UpcycleOptions::default() }));
    assert!(refused(UpcycleOptions { router_std: f64::NAN, ..UpcycleOptions::default() }));
    let moe = upcycle(&dense, &UpcycleOptions::default()).expect("upcycled");
    let again = upcycle(&moe, &UpcycleOptions::default()).map(|_| ()).map_err(|e| e.to_string());
    assert!(again.is_err_and(|e| e.contains("MixtralForCausalLM")));
    let biased = init_model(&request("qwen2")).expect("a Qwen2");
    assert!(upcycle(&biased, &UpcycleOptions::default()).is_err_and(|e| e.to_string().contains("bias")));
}
