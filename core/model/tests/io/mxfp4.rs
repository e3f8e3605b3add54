//! gpt-oss as it is released: experts in MXFP4, decoded on loading, saved decoded.

use std::path::Path;

use freewheel_model::{
    InitRequest, InitScale, SaveOptions, TensorKind, TokenizerChoice, init_model, load, save,
};
use freewheel_types::{CounterRng, WeightsDtype};
use serde_json::{Map, Value, json};

use super::support::json as read_json;

/// The magnitudes of four-bit floats; code i + 8 is minus code i.
const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

fn write_tensors(path: &Path, tensors: &[(String, &str, Vec<usize>, Vec<u8>)]) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let at = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": at}));
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length[..], header.as_bytes(), &data].concat()).expect("weights");
}

/// A random gpt-oss in bf16 with experts in MXFP4, written to `dir`; all its parameters, by an encoding of our own.
fn packed_model(dir: &Path) -> Vec<f32> {
    let set = |key: &str, value: Value| (key.to_owned(), value);
    let model = init_model(&InitRequest {
        arch: "gpt_oss".into(),
        overrides: vec![
            set("hidden_size", json!(64)),
            set("head_dim", json!(16)),
            set("intermediate_size", json!(32)),
            set("num_hidden_layers", json!(2)),
        ],
        seed: 3,
        scale: InitScale::FanIn,
        dtype: WeightsDtype::Bf16,
        tokenizer: TokenizerChoice::Bytes,
    })
    .expect("a gpt-oss");
    save(dir, &model, &model.params, &SaveOptions::default()).expect("saved");
    let mut config = read_json(&dir.join("config.json"));
    config["quantization_config"] = json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]});
    std::fs::write(dir.join("config.json"), config.to_string()).expect("config");

    let mut wanted = model.params.to_f32();
    let mut tensors = Vec::new();
    for (stream, tensor) in model.params.layout.tensors.iter().enumerate() {
        if tensor.kind != TensorKind::Expert {
            let bytes = &model.params.as_bytes()[2 * tensor.offset..2 * tensor.range().end];
            tensors.push((tensor.name.clone(), "BF16", tensor.shape.clone(), bytes.to_vec()));
            continue;
        }
        let (e, k, n) = (tensor.shape[0], tensor.shape[1], tensor.shape[2]);
        let random = CounterRng::new(9, stream as u64);
        let codes: Vec<u8> = (0..tensor.len() as u64).map(|i| random.below(i, 16) as u8).collect();
        let scales: Vec<u8> =
            (0..tensor.len() as u64 / 32).map(|i| 120 + random.below(1 << 40 | i, 5) as u8).collect();
        for (i, value) in wanted[tensor.range()].iter_mut().enumerate() {
            // Ours is [E, in, out], theirs [E, out, in].
            let (expert, input, output) = (i / (k * n), i / n % k, i % n);
            let stored = (expert * n + output) * k + input;
            let magnitude = VALUES[usize::from(codes[stored] % 8)];
            let signed = if codes[stored] < 8 { magnitude } else { -magnitude };
            *value = signed * 2f32.powi(i32::from(scales[stored / 32]) - 127);
        }
        let blocks = codes.chunks_exact(2).map(|pair| pair[0] | pair[1] << 4).collect();
        tensors.push((format!("{}_blocks", tensor.name), "U8", vec![e, n, k / 32, 16], blocks));
        tensors.push((format!("{}_scales", tensor.name), "U8", vec![e, n, k / 32], scales));
    }
    write_tensors(&dir.join("model.safetensors"), &tensors);
    wanted
}

#[test]
fn mxfp4_experts_are_decoded_and_saved_decoded() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let wanted = packed_model(dir.path());
    let loaded = load(dir.path(), None).expect("a packed gpt-oss");
    assert_eq!(loaded.params.dtype(), WeightsDtype::Bf16, "nothing is lost in bf16");
    assert!(loaded.params.to_f32() == wanted, "decoded values");
    let wide = load(dir.path(), Some(WeightsDtype::F32)).expect("a packed gpt-oss");
    assert!(wide.params.to_f32() == wanted, "decoded values in f32");

    let again = tempfile::tempdir().expect("a temporary folder");
    save(again.path(), &loaded, &loaded.params, &SaveOptions::default()).expect("saved");
    assert!(read_json(&again.path().join("config.json")).get("quantization_config").is_none());
    assert_eq!(load(again.path(), None).expect("the saved model").params, loaded.params);
}

#[test]
fn damaged_mxfp4_is_refused_by_name() {
    type Damage<'a> = &'a dyn Fn(&mut Map<String, Value>, &mut [u8]);
    let refused = |damage: Damage<'_>, needles: &[&str]| {
        let dir = tempfile::tempdir().expect("a temporary folder");
        packed_model(dir.path());
        let file = dir.path().join("model.safetensors");
        let bytes = std::fs::read(&file).expect("weights");
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let Value::Object(mut header) = serde_json::from_slice(&bytes[8..8 + length]).expect("a header")
        else {
            panic!("a header is an object");
        };
        let mut data = bytes[8 + length..].to_vec();
        damage(&mut header, &mut data);
        let header = Value::Object(header).to_string();
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(&file, [&length[..], header.as_bytes(), &data].concat()).expect("weights");
        let error = load(dir.path(), None).expect_err(needles[0]).to_string();
        for needle in needles {
            assert!(error.contains(needle), "{needle:?} is not in: {error}");
        }
    };
    const SCALES: &str = "model.layers.1.mlp.experts.down_proj_scales";
    refused(
        &|header, _| {
            let scales = header.remove(SCALES).expect("scales");
            header.insert("model.layers.1.mlp.experts.down_proj_scale".into(), scales);
        },
        &["1 tensors are missing", "model.layers.1.mlp.experts.down_proj"],
    );
    refused(
        &|header, _| {
            let shape = header[SCALES]["shape"].as_array_mut().expect("a shape");
            shape.swap(0, 1);
        },
        &[SCALES, "shape"],
    );
    refused(&|header, _| header[SCALES]["dtype"] = json!("I8"), &[SCALES, "I8", "U8"]);
    refused(
        &|header, data| {
            let at = header[SCALES]["data_offsets"][0].as_u64().expect("an offset");
            data[at as usize] = 255;
        },
        &["model.layers.1.mlp.experts.down_proj", "NaN"],
    );
}

#[test]
fn other_quantisation_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    packed_model(dir.path());
    let mut config = read_json(&dir.path().join("config.json"));
    config["quantization_config"] = json!({"quant_method": "fp8"});
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("config");
    let error = load(dir.path(), None).expect_err("fp8").to_string();
    assert!(error.contains("fp8") && error.contains("quantised"), "{error}");
}
