//! Classifiers as scorers: golden scores in any batch, golden ids, and that a wrong model is refused. Their gradients are
//! compared with the golden ones in the whole-system tests.

use std::path::{Path, PathBuf};

use freewheel_kernels::Threads;
use freewheel_model::encoder::{EncoderBatch, EncoderWeights, mean_pooled};
use freewheel_model::{Framed, Purpose, Scorer, ScorerInfo, load, load_classifier, load_encoder, score_row};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn models() -> PathBuf {
    match std::env::var_os("FREEWHEEL_ORACLES") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures"),
    }
    .join("models")
}

/// A golden checkpoint's expected numbers.
struct Golden {
    dir: PathBuf,
    json: Value,
    tensors: Vec<u8>,
}

impl Golden {
    /// Every checkpoint of the index with this architecture's ending that is there.
    fn all(architecture: impl Fn(&str) -> bool) -> Vec<Self> {
        let index: Value =
            serde_json::from_slice(&std::fs::read(models().join("index.json")).expect("index"))
                .expect("JSON");
        let found: Vec<Self> = index
            .as_array()
            .expect("a list")
            .iter()
            .filter(|row| architecture(row["architecture"].as_str().expect("architecture")))
            .map(|row| models().join(row["name"].as_str().expect("name")))
            .filter(|dir| dir.is_dir())
            .map(Self::read)
            .collect();
        assert!(!found.is_empty(), "golden checkpoints are missing from {}", models().display());
        found
    }

    fn read(dir: PathBuf) -> Self {
        let json = std::fs::read(dir.join("golden.json")).expect("golden");
        let tensors = std::fs::read(dir.join("golden.safetensors")).expect("golden tensors");
        Self { json: serde_json::from_slice(&json).expect("JSON"), tensors, dir }
    }

    /// The BERT classifier, which is among the fixtures alone.
    fn bert() -> Self {
        Self::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/bert_classifier"))
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.tensors).expect("safetensors");
        let tensor = file.tensor(name).expect("tensor");
        assert_eq!(tensor.dtype(), Dtype::F32);
        tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    fn i64s(&self, name: &str) -> Vec<i64> {
        let file = SafeTensors::deserialize(&self.tensors).expect("safetensors");
        let tensor = file.tensor(name).expect("tensor");
        tensor.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
    }

    /// Sequences without their padding.
    fn rows(&self) -> Vec<Vec<u32>> {
        self.rows_of("input_ids")
    }

    fn rows_of(&self, name: &str) -> Vec<Vec<u32>> {
        let lengths = self.json["lengths"].as_array().expect("lengths");
        let ids = self.i64s(name);
        let width = ids.len() / lengths.len();
        ids.chunks(width)
            .zip(lengths)
            .map(|(row, len)| {
                row[..len.as_u64().expect("length") as usize].iter().map(|id| *id as u32).collect()
            })
            .collect()
    }

    fn check_scores(&self, got: &[f32]) {
        let error = largest_difference(got, &self.f32s("scores"));
        assert!(error <= 1e-4, "{}: scores differ by {error}", self.dir.display());
        println!("{}: scores within {error:e}", self.dir.display());
    }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // `max` would pass over a NaN.
    a.iter().zip(b).fold(0.0, |worst, (a, b)| if (a - b).abs() <= worst { worst } else { (a - b).abs() })
}

fn decoder(architecture: &str) -> bool {
    architecture.ends_with("ForSequenceClassification") && !architecture.starts_with("Deberta")
}

fn deberta(architecture: &str) -> bool {
    architecture == "DebertaV2ForSequenceClassification"
}

#[test]
fn sentence_embeddings_are_the_mean_of_the_rows_at_length_one() {
    let golden = Golden::bert();
    let loaded = load_encoder(&golden.dir, None).expect("an encoder");
    let threads = Threads::single();
    let weights = EncoderWeights::pack(&loaded.encoder, &loaded.params, Purpose::Sampling, &threads);
    let (rows, types) = (golden.rows(), golden.rows_of("token_type_ids").concat());
    let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
    let batch = EncoderBatch { tokens: &rows.concat(), token_types: Some(&types), lengths: &lengths };
    let hidden = weights.forward(&threads, &batch);
    let got = mean_pooled(&hidden, &lengths, loaded.encoder.spec().hidden);
    let error = largest_difference(&got, &golden.f32s("embeddings"));
    assert!(error <= 2e-6, "embeddings differ by {error}");
}

#[test]
fn wordpiece_pairs_have_the_ids_and_types_of_the_reference() {
    let golden = Golden::bert();
    let tokenizer = ScorerInfo::read(&golden.dir).expect("a classifier").tokenizer;
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    for case in golden.json["tokenizer"]["pairs"].as_array().expect("pairs") {
        let encode = |key: &str| tokenizer.encode(case[key].as_str().expect("text")).expect("ids");
        let framed = tokenizer.frame(&encode("first"), Some(&encode("second"))).expect("frame");
        assert_eq!(framed.ids, ids(&case["ids"]));
        assert_eq!(framed.token_types, ids(&case["token_types"]));
    }
}

#[test]
fn a_scorer_gives_the_golden_scores_alone_and_in_a_batch() {
    for golden in Golden::all(|name| decoder(name) || deberta(name)) {
        let scorer = Scorer::load(&golden.dir, &Threads::single()).expect("a scorer");
        let inputs: Vec<Framed> =
            golden.rows().into_iter().map(|ids| Framed { token_types: vec![0; ids.len()], ids }).collect();
        let together = scorer.score(&Threads::new(2), &inputs);
        golden.check_scores(&together.concat());
        assert_eq!(scorer.info().labels.len(), together[0].len());
        for (input, want) in inputs.iter().zip(&together) {
            let alone = scorer.score(&Threads::single(), std::slice::from_ref(input));
            assert_eq!(&alone[0], want, "another batch, other bits");
        }
        assert_eq!(scorer.version().len(), 16);
        assert!(scorer.score(&Threads::single(), &[]).is_empty());
    }
}

#[test]
fn segments_get_the_ids_of_the_reference() {
    for golden in Golden::all(deberta).into_iter().chain([Golden::bert()]) {
        let info = ScorerInfo::read(&golden.dir).expect("a classifier");
        for case in golden.json["tokenizer"]["cases"].as_array().expect("cases") {
            let text = case["text"].as_str().expect("text");
            let ids = |key: &str| -> Vec<u32> {
                let ids = case[key].as_array().expect("ids");
                ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
            };
            let plain = info.tokenizer.encode(text).expect("ids");
            if plain != ids("ids_no_special") {
                // The reference takes special tokens in a text for what they say; we never do.
                assert!(ids("ids_no_special").iter().any(|id| info.tokenizer.is_special(*id)), "{text:?}");
                continue;
            }
            assert_eq!(info.tokenizer.frame(&plain, None).expect("frame").ids, ids("ids"), "{text:?}");
        }
        if golden.json["architecture"] == "BertForSequenceClassification" {
            continue;
        }
        let pair = info.tokenizer.frame(&[7, 8], Some(&[9])).expect("frame");
        assert_eq!(pair.ids, [1, 7, 8, 2, 9, 2]);
        assert_eq!(pair.token_types, [0, 0, 0, 0, 1, 1]);
        assert_eq!(info.tokenizer.frame(&[], Some(&[])).expect("frame").ids, [1, 2, 2]);
    }
}

#[test]
fn what_writes_is_not_a_scorer_and_what_scores_is_not_a_policy() {
    let reward = models().join("qwen3_reward");
    let refused = load(&reward, None).expect_err("a classifier").to_string();
    assert!(
        refused.contains("Qwen3ForSequenceClassification") && refused.contains("reward component"),
        "{refused}"
    );
    let policy = models().join("llama3");
    let refused = Scorer::load(&policy, &Threads::single()).expect_err("a policy").to_string();
    assert!(refused.contains("LlamaForCausalLM") && refused.contains("DebertaV2For"), "{refused}");
    assert!(load_classifier(&policy, None).expect_err("a policy").to_string().contains("LlamaForCausalLM"));
}

#[test]
fn the_score_is_read_at_the_last_token_that_is_not_padding() {
    assert_eq!(score_row(&[5, 6, 9, 9], Some(9)), 1);
    assert_eq!(score_row(&[5, 9, 6], Some(9)), 2);
    assert_eq!(score_row(&[5, 6, 9], None), 2);
    assert_eq!(score_row(&[9, 9], Some(9)), 0);
}
