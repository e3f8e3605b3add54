//! Saving: what is saved loads as it was, in one file or in shards, and the configuration keeps what we do not know.

use freewheel_model::{Params, SaveOptions, convert, load, load_classifier, save, save_into};
use freewheel_types::WeightsDtype;
use serde_json::json as value;

use super::support::{copy_of, json, model_dir, model_names, stored_dtype};

#[test]
fn a_saved_model_is_the_same_model() {
    for name in model_names() {
        let original = load(&model_dir(&name), None).expect("golden checkpoint");
        for shard_bytes in [u64::MAX, 100_000] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let files =
                save(dir.path(), &original, &original.params, &SaveOptions { shard_bytes }).expect("saved");
            let shards =
                files.iter().filter(|f| f.extension().is_some_and(|end| end == "safetensors")).count();
            assert_eq!(shards > 1, shard_bytes == 100_000, "{name}");
            assert!(files.iter().all(|file| file.is_file()), "{name}");
            let back = load(dir.path(), None).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(back.params, original.params, "{name}");
            assert_eq!(back.model.spec(), original.model.spec(), "{name}");
            assert_eq!(back.tokenizer.digest(), original.tokenizer.digest(), "{name}");
            assert_eq!(back.generation, original.generation, "{name}");
            let mut config = json(&dir.path().join("config.json"));
            let dtype = if stored_dtype(&name) == WeightsDtype::F32 { "float32" } else { "bfloat16" };
            let before = json(&model_dir(&name).join("config.json"));
            for key in ["dtype", "torch_dtype"] {
                assert!(config.get(key).is_none_or(|kind| kind == dtype), "{name}");
                if before.get(key).is_none() {
                    config.as_object_mut().expect("object").remove(key);
                }
            }
            assert_eq!(config, before, "{name}: nothing else changes");
        }
    }
}

#[test]
fn unknown_keys_survive_and_other_types_are_written_down() {
    let dir = copy_of("llama3");
    let path = dir.path().join("config.json");
    let mut config = json(&path);
    config["x_experiment"] = value!({"nested": [1, 2, null]});
    std::fs::write(&path, config.to_string()).expect("write");
    let out = tempfile::tempdir().expect("a temporary folder");
    convert(dir.path(), out.path(), Some(WeightsDtype::Bf16), &SaveOptions::default()).expect("converted");
    let saved = json(&out.path().join("config.json"));
    assert_eq!(saved["x_experiment"], config["x_experiment"]);
    assert_eq!(saved["dtype"], "bfloat16");
    let narrow = load(out.path(), None).expect("saved model");
    assert_eq!(narrow.params.dtype(), WeightsDtype::Bf16);
    assert!(convert(dir.path(), dir.path(), None, &SaveOptions::default()).is_err(), "not onto itself");
}

#[test]
fn a_reward_model_is_converted_with_its_head() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let options = SaveOptions { shard_bytes: 100_000 };
    convert(&model_dir("qwen3_reward"), dir.path(), None, &options).expect("converted");
    let (before, after) =
        (load_classifier(&model_dir("qwen3_reward"), None), load_classifier(dir.path(), None));
    assert!(after.expect("converted").params == before.expect("golden checkpoint").params);
    assert!(load(dir.path(), None).is_err(), "it still scores");
}

#[test]
fn the_weights_saved_are_the_ones_given() {
    let model = load(&model_dir("llama3"), None).expect("golden checkpoint");
    let doubled: Vec<f32> = model.params.to_f32().iter().map(|x| 2.0 * x).collect();
    let params =
        Params { layout: model.params.layout.clone(), data: freewheel_model::ParamData::F32(doubled) };
    let dir = tempfile::tempdir().expect("a temporary folder");
    save(dir.path(), &model, &model.params, &SaveOptions { shard_bytes: 100_000 }).expect("shards");
    save(dir.path(), &model, &params, &SaveOptions::default()).expect("one file over shards");
    assert_eq!(load(dir.path(), None).expect("saved model").params, params);
    save(dir.path(), &model, &model.params, &SaveOptions { shard_bytes: 100_000 })
        .expect("shards over one file");
    assert_eq!(load(dir.path(), None).expect("saved model").params, model.params, "no stale file is read");
}

#[test]
fn a_sink_that_fails_stops_the_save() {
    let model = load(&model_dir("llama3"), None).expect("golden checkpoint");
    let mut names = Vec::new();
    let result = save_into(&model, &model.params, &SaveOptions::default(), &mut |name, pieces| {
        names.push(name.to_owned());
        assert!(pieces.iter().map(|piece| piece.len()).sum::<usize>() > 0, "{name}");
        if name == "tokenizer.json" { Err(std::io::Error::other("disk full")) } else { Ok(()) }
    });
    assert!(result.is_err_and(|e| e.to_string() == "disk full"));
    assert_eq!(names, ["config.json", "generation_config.json", "tokenizer.json"]);
}

#[test]
fn candle_sees_the_same_numbers() {
    let model = load(&model_dir("llama3_bf16"), None).expect("golden checkpoint");
    let mut tensors = std::collections::HashMap::new();
    for tensor in &model.params.layout.tensors {
        let candle = model.params.candle_tensor(&tensor.name).expect("candle").expect("known name");
        assert_eq!(candle.dims(), tensor.shape);
        tensors.insert(tensor.name.clone(), candle);
    }
    let back = Params::from_candle(&model.params.layout, &tensors, WeightsDtype::Bf16).expect("same layout");
    assert_eq!(back, model.params);
    assert!(model.params.candle_tensor("nowhere").expect("no error").is_none());
    tensors.remove("model.norm.weight");
    let missing = Params::from_candle(&model.params.layout, &tensors, WeightsDtype::F32);
    assert!(missing.is_err_and(|e| e.to_string().contains("model.norm.weight")));
}
