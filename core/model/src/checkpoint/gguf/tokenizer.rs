//! Metadata → `tokenizer.json` and `tokenizer_config.json`.
//!
//! Byte-level BPE only (`tokenizer.ggml.model = "gpt2"`). How text is cut before merging is known by the name in
//! `tokenizer.ggml.pre`; a name we do not know is refused, since a wrong guess gives other ids without any error.

use serde_json::{Map, Value, json};

use super::File;
use super::config::{int, text};
use super::header::Meta;
use crate::error::ModelError;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The files of the tokenizer in `file`.
pub(super) fn files(file: &File<'_>) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
    match text(file, "tokenizer.ggml.model") {
        Some("gpt2") => {}
        other => {
            return Err(file.unsupported(
                format!("GGUF tokenizer `{}`", other.unwrap_or("none")),
                "; only byte-level BPE (gpt2) is, use the original checkpoint",
            ));
        }
    }
    let tokens = strings(file, "tokenizer.ggml.tokens")?;
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(file, &tokens)?,
        "normalizer": if pre(file) == "qwen2" { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer(file)?,
        "post_processor": post_processor(file, &tokens)?,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": is_llama3(file),
            "vocab": vocab(file, &tokens)?, "merges": merges(file)?,
        },
    });
    let config = config(file, &tokens)?;
    Ok(vec![
        ("tokenizer.json".into(), json.to_string().into_bytes()),
        ("tokenizer_config.json".into(), Value::Object(config).to_string().into_bytes()),
    ])
}

fn pre<'f>(file: &'f File<'_>) -> &'f str {
    text(file, "tokenizer.ggml.pre").unwrap_or("default")
}

fn is_llama3(file: &File<'_>) -> bool {
    matches!(pre(file), "llama3" | "llama-v3" | "llama-bpe")
}

fn pre_tokenizer(file: &File<'_>) -> Result<Value, ModelError> {
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |regex: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}, bytes(false)
        ]})
    };
    match pre(file) {
        "smollm" | "starcoder" | "refact" => Ok(json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, bytes(true)
        ]})),
        _ if is_llama3(file) => Ok(split(LLAMA3)),
        "smaug-bpe" => Ok(split(LLAMA3)),
        "qwen2" => Ok(split(QWEN2)),
        "gpt-2" | "olmo" | "default" => Ok(bytes(true)),
        other => Err(file.unsupported(
            format!("tokenizer.ggml.pre `{other}`"),
            "; supported are smollm, llama-bpe, qwen2, gpt-2 and default",
        )),
    }
}

fn post_processor(file: &File<'_>, tokens: &[&str]) -> Result<Value, ModelError> {
    let add_bos = match file.header.meta.get("tokenizer.ggml.add_bos_token") {
        Some(Meta::Bool(flag)) => *flag,
        _ => is_llama3(file),
    };
    let plain =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let Some(bos) = named(file, tokens, "bos")?.filter(|_| add_bos) else { return Ok(plain) };
    let id = int(file, "tokenizer.ggml.bos_token_id");
    let special = |kind: u32| json!({"SpecialToken": {"id": bos, "type_id": kind}});
    let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    Ok(json!({"type": "Sequence", "processors": [plain, {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }]}))
}

/// Control tokens are special; user-defined ones are matched as a whole but are text.
fn added_tokens(file: &File<'_>, tokens: &[&str]) -> Result<Value, ModelError> {
    let kinds = match file.header.meta.get("tokenizer.ggml.token_type") {
        Some(Meta::List(kinds)) if kinds.len() == tokens.len() => {
            kinds.iter().map(|kind| kind.int()).collect()
        }
        None => vec![Some(1); tokens.len()],
        Some(_) => return Err(file.invalid("tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens")),
    };
    let named = kinds.iter().zip(tokens).enumerate().filter_map(|(id, (kind, token))| {
        let special = match kind {
            Some(2 | 3) => true,
            Some(4) => false,
            _ => return None,
        };
        Some(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special}))
    });
    Ok(named.collect())
}

fn vocab(file: &File<'_>, tokens: &[&str]) -> Result<Value, ModelError> {
    let map: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into())).collect();
    if map.len() == tokens.len() {
        Ok(map.into())
    } else {
        Err(file.invalid("tokenizer.ggml.tokens names a token twice"))
    }
}

fn merges(file: &File<'_>) -> Result<Value, ModelError> {
    strings(file, "tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) => Ok(json!([left, right])),
            None => Err(file.invalid(format!("tokenizer.ggml.merges: `{merge}` is not two tokens"))),
        })
        .collect()
}

fn config(file: &File<'_>, tokens: &[&str]) -> Result<Map<String, Value>, ModelError> {
    let mut config = Map::new();
    for (ours, theirs) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        config.extend(named(file, tokens, theirs)?.map(|token| (ours.to_owned(), token.into())));
    }
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    let template = text(file, "tokenizer.chat_template");
    config.extend(template.map(|template| ("chat_template".to_owned(), template.into())));
    Ok(config)
}

/// The token whose id `tokenizer.ggml.NAME_token_id` gives.
fn named<'t>(file: &File<'_>, tokens: &[&'t str], name: &str) -> Result<Option<&'t str>, ModelError> {
    let Some(id) = int(file, &format!("tokenizer.ggml.{name}_token_id")) else { return Ok(None) };
    match usize::try_from(id).ok().and_then(|id| tokens.get(id)) {
        Some(token) => Ok(Some(token)),
        None => {
            Err(file.invalid(format!("tokenizer.ggml.{name}_token_id = {id} of {} tokens", tokens.len())))
        }
    }
}

fn strings<'f>(file: &'f File<'_>, key: &str) -> Result<Vec<&'f str>, ModelError> {
    let list = match file.header.meta.get(key) {
        Some(Meta::List(items)) => items.iter().map(Meta::text).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    list.ok_or_else(|| file.invalid(format!("{key}: expected a list of texts")))
}
