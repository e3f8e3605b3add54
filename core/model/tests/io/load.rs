//! Golden checkpoints load, and their tokenizers give the golden ids.

use freewheel_model::{ParamData, TensorKind, TensorSpec, load};
use freewheel_types::{PromptBody, WeightsDtype};
use safetensors::SafeTensors;

use super::support::{
    ids, json, largest_difference, logits, model_dir, model_names, stored_dtype, weight_files,
};

#[test]
fn golden_checkpoints_load_bit_for_bit() {
    for name in model_names() {
        let loaded = load(&model_dir(&name), None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(loaded.params.dtype(), stored_dtype(&name), "{name}");
        let golden = json(&model_dir(&name).join("golden.json"));
        let layout = &loaded.params.layout;
        // For the reference a correction of the routing is a buffer.
        let buffers = layout.tensors.iter().filter(|tensor| tensor.kind == TensorKind::RouterBias);
        let count = layout.total - buffers.map(TensorSpec::len).sum::<usize>();
        assert_eq!(count as u64, golden["n_params"].as_u64().expect("count"), "{name}");
        let bytes = weight_files(&name);
        let files: Vec<SafeTensors> =
            bytes.iter().map(|bytes| SafeTensors::deserialize(bytes).expect("safetensors")).collect();
        let count: usize = files.iter().map(|file| file.len()).sum();
        assert_eq!(count, loaded.params.layout.tensors.len(), "{name}");
        let width = loaded.params.dtype().size();
        for tensor in &loaded.params.layout.tensors {
            let range = tensor.range();
            let ours = &loaded.params.as_bytes()[range.start * width..range.end * width];
            let theirs = files.iter().find_map(|file| file.tensor(&tensor.name).ok()).expect("tensor");
            assert!(ours == theirs.data(), "{name}: {}", tensor.name);
        }
    }
}

#[test]
fn element_types_convert() {
    let narrow = load(&model_dir("llama3"), Some(WeightsDtype::Bf16)).expect("f32 as bf16");
    let wide = load(&model_dir("llama3"), None).expect("f32");
    assert_eq!(wide.params.cast(WeightsDtype::Bf16), narrow.params);
    assert!(matches!(narrow.params.data, ParamData::Bf16(_)));
    let stored = load(&model_dir("llama3_bf16"), None).expect("bf16");
    let widened = load(&model_dir("llama3_bf16"), Some(WeightsDtype::F32)).expect("bf16 as f32");
    assert_eq!(stored.params.to_f32(), widened.params.to_f32());
}

#[test]
fn ids_and_texts_are_the_reference_librarys() {
    for name in model_names() {
        let loaded = load(&model_dir(&name), None).expect("checkpoint");
        let tokenizer = &loaded.tokenizer;
        let golden = json(&model_dir(&name).join("golden.json"));
        let golden = &golden["tokenizer"];
        for case in golden["cases"].as_array().expect("cases") {
            let text = case["text"].as_str().expect("text");
            let special_in_text =
                tokenizer.encode_trusted(text).expect("ids") != tokenizer.encode(text).expect("ids");
            if special_in_text {
                assert_eq!(
                    tokenizer.encode_trusted(text).expect("ids"),
                    ids(&case["ids_no_special"]),
                    "{name}: {text:?}"
                );
                continue;
            }
            assert_eq!(
                tokenizer.encode(text).expect("ids"),
                ids(&case["ids_no_special"]),
                "{name}: {text:?}"
            );
            let prompt = tokenizer.encode_prompt(&PromptBody::Text(text.into())).expect("ids").ids;
            assert_eq!(prompt, ids(&case["ids"]), "{name}: {text:?}");
            assert_eq!(
                tokenizer.decode_all(&prompt),
                case["decoded"].as_str().expect("text"),
                "{name}: {text:?}"
            );
            assert_eq!(
                tokenizer.decode(&prompt),
                case["decoded_skip_special"].as_str().expect("text"),
                "{name}"
            );
        }
        assert_eq!(tokenizer.vocab_size() as u64, golden["size"].as_u64().expect("size"), "{name}");
        let eos = golden["eos_token_id"].as_u64().expect("eos") as u32;
        assert_eq!(loaded.generation.eos_ids, [eos], "{name}");
        assert_eq!(loaded.generation.pad_id, golden["pad_token_id"].as_u64().map(|id| id as u32), "{name}");
        assert_eq!(loaded.generation.bos_id, golden["bos_token_id"].as_u64().map(|id| id as u32), "{name}");
    }
}

#[test]
fn a_stream_says_what_decode_says() {
    for name in model_names() {
        let tokenizer = load(&model_dir(&name), None).expect("checkpoint").tokenizer;
        for text in
            ["Hello world, this is it.", "emoji 🙂🚀 and 你好，世界。", "  a\n\n b\u{0301} \u{FFFD} c"]
        {
            let ids = tokenizer.encode(text).expect("ids");
            let mut stream = tokenizer.stream();
            let mut said: Vec<String> = ids.iter().filter_map(|id| stream.push(*id)).collect();
            assert!(
                said.iter().all(|part| text.contains('\u{FFFD}') || !part.contains('\u{FFFD}')),
                "{name}: {said:?}"
            );
            said.extend(stream.finish());
            assert_eq!(said.concat(), tokenizer.decode(&ids), "{name}");
        }
        // A letter that no vocabulary here has whole: its four bytes are tokens.
        let ids = tokenizer.encode("𒀀").expect("ids");
        let mut stream = tokenizer.stream();
        let broken: Vec<String> = ids[..ids.len() - 1].iter().filter_map(|id| stream.push(*id)).collect();
        assert_eq!(broken.concat(), "", "{name}: half a character is not handed out");
        assert!(stream.finish().is_some_and(|rest| rest.contains('\u{FFFD}')), "{name}");
    }
}

#[test]
fn golden_logits() {
    for name in model_names() {
        let loaded = load(&model_dir(&name), Some(WeightsDtype::F32)).expect("checkpoint");
        if loaded.model.spec().vision.is_some() {
            continue; // Its golden batch shows images: tests/vision.rs.
        }
        let golden = json(&model_dir(&name).join("golden.json"));
        let bytes = std::fs::read(model_dir(&name).join("golden.safetensors")).expect("golden tensors");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        let floats = |name: &str| -> Vec<f32> {
            let data = tensors.tensor(name).expect("golden tensor");
            data.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
        };
        let input = tensors.tensor("input_ids").expect("golden ids");
        let width = input.shape()[1];
        let tokens: Vec<u32> = input
            .data()
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as u32)
            .collect();
        let expected = floats("logits");
        let mut ours = Vec::new();
        for (row, length) in golden["lengths"].as_array().expect("lengths").iter().enumerate() {
            let length = length.as_u64().expect("a length") as usize;
            ours.extend(logits(&loaded, &tokens[row * width..row * width + length]));
        }
        let worst = largest_difference(&expected, &ours);
        assert!(worst <= 2e-4, "{name}: off by {worst}");
    }
}
