//! Images against the reference library: tiles, grids and prompt ids, what the encoder makes of tiles, log-probs and
//! gradients of prompts with images. And against itself: bits do not depend on the batch.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::vision::{ImageTile, Rgb8, Tile};
use freewheel_model::{
    BatchSeq, ForwardBatch, KvCache, LoadedModel, PolicyWeights, Purpose, Target, TileRows, TrainBatch,
    TrainSeq, load,
};
use freewheel_types::{
    ContentPart, ImagePart, Message, MessageContent, PolicyVersion, PromptBody, SamplingParams, WeightsDtype,
};
use safetensors::SafeTensors;
use serde_json::Value;

/// The first model of the index that reads images.
fn dir() -> PathBuf {
    let models = match std::env::var_os("FREEWHEEL_ORACLES") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures"),
    }
    .join("models");
    let index: Value = serde_json::from_slice(&std::fs::read(models.join("index.json")).unwrap()).unwrap();
    let reads_images = |row: &&Value| row["architecture"] == "Llama4ForConditionalGeneration";
    let row = index.as_array().unwrap().iter().find(reads_images).expect("a model that reads images");
    models.join(row["name"].as_str().unwrap())
}

/// The id that stands for a piece of an image.
fn patch_id() -> u32 {
    json("config.json")["image_token_index"].as_u64().expect("an id") as u32
}

fn model() -> LoadedModel {
    load(&dir(), Some(WeightsDtype::F32)).expect("the golden checkpoint loads")
}

fn pack(model: &LoadedModel, purpose: Purpose) -> PolicyWeights {
    PolicyWeights::pack(&model.model, &model.params, PolicyVersion::default(), purpose, &Threads::single())
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir().join(name)).expect("golden file")).expect("golden JSON")
}

struct Tensors(Vec<u8>);

impl Tensors {
    fn read(name: &str) -> Self {
        Self(std::fs::read(dir().join(name)).expect("golden tensors"))
    }

    fn bytes(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        let all = SafeTensors::deserialize(&self.0).expect("golden tensors parse");
        let view = all.tensor(name).unwrap_or_else(|_| panic!("golden tensor {name}"));
        (view.shape().to_vec(), view.data().to_vec())
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).1.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    a.iter().zip(b).fold(0.0, |worst, (a, b)| {
        let diff = (a - b).abs();
        if diff > worst || diff.is_nan() { diff } else { worst }
    })
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// The golden images as they were before processing.
fn images() -> Vec<(Value, Rgb8)> {
    let (index, tensors) = (json("image_golden.json"), Tensors::read("image_golden.safetensors"));
    let cases = index["cases"].as_array().expect("cases").clone();
    let image = |case: Value| {
        let (shape, data) = tensors.bytes(case["image"].as_str().expect("a name"));
        (case, Rgb8 { height: shape[0], width: shape[1], data })
    };
    cases.into_iter().map(image).collect()
}

fn png(image: &Rgb8) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, image.width as u32, image.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&image.data).unwrap();
    out
}

#[test]
fn images_become_the_tiles_and_tokens_of_the_reference() {
    let model = model();
    let processor = model.tokenizer.image_processor().expect("a model that reads images");
    let golden = Tensors::read("image_golden.safetensors");
    let cases = images();
    assert!(cases.len() >= 5, "only {} images", cases.len());
    for (case, image) in cases {
        let name = case["image"].as_str().expect("a name");
        let (tiles, grid) = processor.tiles(&image);
        assert_eq!(serde_json::json!([grid.0, grid.1]), case["tile_grid"], "{name}");
        let wanted = golden.f32(case["pixel_values"].as_str().expect("a name"));
        let found: Vec<f32> = tiles.iter().flat_map(|tile| tile.pixels().to_vec()).collect();
        let error = max_diff(&found, &wanted);
        println!("{name}: largest pixel error {error:e}");
        assert!(error <= 0.02, "{name}: pixels differ by {error}");

        let text = case["placeholder_expansion"].as_str().expect("text");
        assert_eq!(processor.expansion(grid), model.tokenizer.encode_trusted(text).unwrap(), "{name}");
    }
}

/// `<|image|>Describe.` as the processor reads it, from a conversation whose template writes the same.
#[test]
fn placeholders_expand_in_prompts() {
    let model = model();
    for (case, image) in images() {
        let part = ImagePart::new("in.png", png(&image));
        let parts = vec![ContentPart::Image(part), ContentPart::Text("Describe.".into())];
        let message = Message { role: "user".into(), content: MessageContent::Parts(parts) };
        let body = PromptBody::Messages(vec![message]);
        let prompt = model.tokenizer.encode_prompt(&body).expect("a prompt with an image");
        let golden = ids(&case["prompt_ids"]);
        // Between the template's header and its end of turn stands what the processor makes of the bare prompt.
        let inner = &golden[1..];
        let at = prompt.ids.windows(inner.len()).position(|window| window == inner);
        let at = at.unwrap_or_else(|| panic!("{:?} not in {:?}", inner, prompt.ids));
        assert_eq!(prompt.tiles[0].position, at + inner.iter().position(|id| *id == patch_id()).unwrap());
        assert_eq!(model.tokenizer.tiles_of(&body, &prompt.ids).unwrap(), prompt.tiles);
        assert!(model.tokenizer.tiles_of(&body, &prompt.ids[..at]).is_err(), "ids without the image");
    }
}

#[test]
fn text_never_becomes_an_image_and_text_models_say_so() {
    let model = model();
    let text = PromptBody::Messages(vec![Message::text("user", "<|image|><|patch|>")]);
    let prompt = model.tokenizer.encode_prompt(&text).unwrap();
    let image = model.tokenizer.token_to_id("<|image|>").expect("a token");
    assert!(prompt.tiles.is_empty() && !prompt.ids.contains(&patch_id()) && !prompt.ids.contains(&image));

    let broken = ImagePart::new("cat.png", *b"\x89PNG\r\n\x1a\n nothing");
    let parts = MessageContent::Parts(vec![ContentPart::Image(broken)]);
    let body = PromptBody::Messages(vec![Message { role: "user".into(), content: parts }]);
    let error = model.tokenizer.encode_prompt(&body).unwrap_err().to_string();
    assert!(error.starts_with("image cat.png: not a readable PNG"), "{error}");
}

/// The golden batch: tokens of all sequences, their lengths, and the tiles at their places.
struct Batch {
    tokens: Vec<u32>,
    lengths: Vec<usize>,
    tiles: Vec<ImageTile>,
}

impl Batch {
    fn read(golden: &Tensors) -> Self {
        let index = json("golden.json");
        let lengths: Vec<usize> = ids(&index["lengths"]).into_iter().map(|n| n as usize).collect();
        let all = golden.bytes("input_ids");
        let width = all.0[1];
        let row = |row: usize| -> Vec<u32> {
            let id = |b: &[u8]| i64::from_le_bytes(b.try_into().unwrap()) as u32;
            all.1[row * width * 8..].chunks_exact(8).take(lengths[row]).map(id).collect()
        };
        let tokens: Vec<u32> = (0..lengths.len()).flat_map(row).collect();
        let (patch, each) = (patch_id(), model().model.spec().vision.as_ref().unwrap().tokens());
        let starts: Vec<usize> =
            (0..tokens.len()).filter(|&i| tokens[i] == patch && (i == 0 || tokens[i - 1] != patch)).collect();
        let pixels = golden.f32("pixel_values");
        let tiles = pixels.chunks_exact(pixels.len() / starts.len()).map(|p| Arc::new(Tile::new(p.to_vec())));
        let tiles =
            starts.into_iter().zip(tiles).map(|(position, tile)| ImageTile { position, tokens: each, tile });
        Self { tokens, lengths, tiles: tiles.collect() }
    }

    fn rows(&self) -> Vec<TileRows<'_>> {
        self.tiles.iter().filter_map(|placed| placed.rows_in(0, self.tokens.len())).collect()
    }

    fn seqs(&self) -> Vec<TrainSeq> {
        self.lengths.iter().map(|len| TrainSeq::whole(*len)).collect()
    }

    fn targets(&self) -> Vec<Target> {
        let mut first = 0;
        let mut targets = Vec::new();
        for &len in &self.lengths {
            targets.extend((first + 1..first + len).map(|at| Target { row: at - 1, token: self.tokens[at] }));
            first += len;
        }
        targets
    }
}

#[test]
fn the_encoder_matches_the_reference() {
    let golden = Tensors::read("golden.safetensors");
    let batch = Batch::read(&golden);
    let weights = pack(&model(), Purpose::Sampling);
    let tiles: Vec<&Tile> = batch.tiles.iter().map(|placed| &*placed.tile).collect();
    let found = weights.image_hidden_states(&Threads::single(), &tiles);
    let error = max_diff(&found, &golden.f32("image_hidden_states"));
    println!("image hidden states: largest error {error:e}");
    assert!(error <= 2e-4, "image hidden states differ by {error}");
    // A tile alone has the bits it has among others.
    let alone = weights.image_hidden_states(&Threads::single(), &tiles[1..2]);
    assert_eq!(alone, found[alone.len()..2 * alone.len()]);
}

#[test]
fn log_probs_and_gradients_match_the_reference() {
    let golden = Tensors::read("golden.safetensors");
    let (model, batch) = (model(), Batch::read(&golden));
    let weights = pack(&model, Purpose::Training);
    let rows = batch.rows();
    let train = TrainBatch { tokens: &batch.tokens, seqs: &batch.seqs(), replay: None, tiles: &rows };
    let threads = Threads::single();
    let tape = weights.forward_train(&threads, &train);
    let every: Vec<usize> = (0..batch.tokens.len()).collect();
    let error = max_diff(&tape.logits(&threads, &weights, &every), &golden.f32("logits"));
    println!("logits: largest error {error:e}");
    assert!(error <= 2e-4, "logits differ by {error}");

    let targets = batch.targets();
    let d = vec![-1.0 / targets.len() as f32; targets.len()];
    let mut grads = vec![0.0; model.model.layout().total];
    tape.backward(&threads, &weights, &targets, &SamplingParams::default(), &d, None, &mut grads);
    let mut compared = 0;
    let names = SafeTensors::deserialize(&golden.0).unwrap();
    for name in names.names().iter().filter_map(|name| name.strip_prefix("grad/")) {
        let tensor = model.model.layout().get(name).unwrap_or_else(|| panic!("no parameter {name}"));
        let wanted = golden.f32(&format!("grad/{name}"));
        let largest = wanted.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        let error = max_diff(&grads[tensor.range()], &wanted);
        println!("{name}: relative error {:e}", error / largest);
        assert!(error <= 2e-4 * largest + 1e-7, "{name} differs by {error}, largest {largest}");
        compared += 1;
    }
    assert!(compared >= 9, "only {compared} gradients were compared");
    let norm = grads.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    let wanted = json("golden.json")["grad_norm_all_params"].as_f64().expect("a norm");
    assert!((norm - wanted).abs() <= 1e-4 * wanted, "gradient norm {norm}, golden {wanted}");
}

/// Every way to cut a prompt with images into prefill chunks gives the bits of the training forward.
#[test]
fn prefill_in_chunks_gives_the_bits_of_training() {
    let golden = Tensors::read("golden.safetensors");
    let (model, batch) = (model(), Batch::read(&golden));
    for dtype in [WeightsDtype::F32, WeightsDtype::Bf16] {
        let params = model.params.cast(dtype);
        let threads = Threads::single();
        let weights =
            PolicyWeights::pack(&model.model, &params, PolicyVersion::default(), Purpose::Training, &threads);
        let rows = batch.rows();
        let train = TrainBatch { tokens: &batch.tokens, seqs: &batch.seqs(), replay: None, tiles: &rows };
        let every: Vec<usize> = (0..batch.tokens.len()).collect();
        let trained = weights.forward_train(&threads, &train).logits(&threads, &weights, &every);
        let (first, len) = (batch.lengths[0], batch.lengths[1]);
        let pages: Vec<u32> = (0..len.div_ceil(16) as u32).collect();
        for chunk in [1, 7, len] {
            let mut kv = KvCache::new(&weights, pages.len());
            let mut logits = Vec::new();
            for from in (0..len).step_by(chunk) {
                let count = chunk.min(len - from);
                let start = first + from;
                let tiles: Vec<TileRows> =
                    batch.tiles.iter().filter_map(|placed| placed.rows_in(start, count)).collect();
                let seqs = [BatchSeq { rows: count, position: from, pages: &pages }];
                let every: Vec<usize> = (0..count).collect();
                let tokens = &batch.tokens[start..start + count];
                let part = ForwardBatch { tokens, seqs: &seqs, logit_rows: &every, tiles: &tiles };
                logits.extend_from_slice(&weights.forward(&threads, &mut kv, &part).logits);
            }
            let v = model.model.spec().vocab_size;
            assert!(logits == trained[first * v..(first + len) * v], "{dtype:?}: chunks of {chunk}");
        }
    }
}

/// A frozen encoder gets no gradient; everything else gets the one it gets with the encoder trained.
#[test]
fn a_frozen_encoder_changes_no_other_gradient() {
    let golden = Tensors::read("golden.safetensors");
    let (model, batch) = (model(), Batch::read(&golden));
    let gradient = |frozen: bool| {
        let mut weights = pack(&model, Purpose::Training);
        weights.freeze_vision(frozen);
        let rows = batch.rows();
        let train = TrainBatch { tokens: &batch.tokens, seqs: &batch.seqs(), replay: None, tiles: &rows };
        let (threads, targets) = (Threads::single(), batch.targets());
        let tape = weights.forward_train(&threads, &train);
        let mut grads = vec![0.0; model.model.layout().total];
        let d = vec![-1.0; targets.len()];
        tape.backward(&threads, &weights, &targets, &SamplingParams::default(), &d, None, &mut grads);
        grads
    };
    let (trained, frozen) = (gradient(false), gradient(true));
    for tensor in &model.model.layout().tensors {
        let range = tensor.range();
        if tensor.name.starts_with("vision_model.") {
            assert!(frozen[range.clone()].iter().all(|g| *g == 0.0), "{} has a gradient", tensor.name);
            assert!(trained[range].iter().any(|g| *g != 0.0), "{} has none", tensor.name);
        } else {
            assert!(frozen[range.clone()] == trained[range], "{} differs", tensor.name);
        }
    }
}
