//! Metadata → `tokenizer.json` and `tokenizer_config.json`.
//!
//! Byte-level BPE (`tokenizer.ggml.model = "gpt2"`) here, SentencePiece's (`"llama"`) beside it. How text is cut before
//! merging is known by the name in `tokenizer.ggml.pre`; a name we do not know is refused, since a wrong guess gives other
//! ids without any error.

use serde_json::{Map, Value, json};

use super::File;
use super::config::{int, text};
use super::header::Meta;
use super::sentencepiece;
use crate::error::ModelError;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The files of the tokenizer in `file`.
pub(super) fn files(file: &File<'_>) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
    match text(file, "tokenizer.ggml.model") {
        Some("gpt2") => byte_level(file),
        Some("llama") => sentencepiece::files(file),
        other => Err(file.unsupported(
            format!("GGUF tokenizer `{}`", other.unwrap_or("none")),
            "; supported are gpt2 (byte-level BPE) and llama (SentencePiece), use the original checkpoint",
        )),
    }
}

fn byte_level(file: &File<'_>) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
    let tokens = strings(file, "tokenizer.ggml.tokens")?;
    let plain =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let post_processor = match beginning(file, &tokens, is_llama3(file))? {
        Some(template) => json!({"type": "Sequence", "processors": [plain, template]}),
        None => plain,
    };
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(file, &tokens, false)?,
        "normalizer": if pre(file) == "qwen2" { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre_tokenizer(file)?,
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": is_llama3(file),
            "vocab": vocab(file, &tokens)?, "merges": merges(file)?,
        },
    });
    both(json, config(file, &tokens)?)
}

/// The two files.
pub(super) fn both(json: Value, config: Map<String, Value>) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
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

/// What puts the beginning of a sequence before every text, where the file says so or else `default` does.
pub(super) fn beginning(
    file: &File<'_>,
    tokens: &[&str],
    default: bool,
) -> Result<Option<Value>, ModelError> {
    let add_bos = match file.header.meta.get("tokenizer.ggml.add_bos_token") {
        Some(Meta::Bool(flag)) => *flag,
        _ => default,
    };
    let Some(bos) = named(file, tokens, "bos")?.filter(|_| add_bos) else { return Ok(None) };
    let id = int(file, "tokenizer.ggml.bos_token_id");
    let special = |kind: u32| json!({"SpecialToken": {"id": bos, "type_id": kind}});
    let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    Ok(Some(json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    })))
}

/// Control tokens are special; user-defined ones are matched as a whole but are text.
///
/// Where spaces are written otherwise before merging (`normalized`), so are those in user-defined tokens.
pub(super) fn added_tokens(file: &File<'_>, tokens: &[&str], normalized: bool) -> Result<Value, ModelError> {
    let kinds = kinds(file, tokens)?;
    let named = kinds.iter().zip(tokens).enumerate().filter_map(|(id, (kind, token))| {
        let special = match kind {
            Some(2 | 3) => true,
            Some(4) => false,
            _ => return None,
        };
        Some(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": normalized && !special, "special": special}))
    });
    Ok(named.collect())
}

/// The kind of every token: 1 ordinary, 2 unknown, 3 control, 4 user-defined, 6 a byte.
pub(super) fn kinds(file: &File<'_>, tokens: &[&str]) -> Result<Vec<Option<i128>>, ModelError> {
    match file.header.meta.get("tokenizer.ggml.token_type") {
        Some(Meta::List(kinds)) if kinds.len() == tokens.len() => {
            Ok(kinds.iter().map(|kind| kind.int()).collect())
        }
        None => Ok(vec![Some(1); tokens.len()]),
        Some(_) => Err(file.invalid("tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens")),
    }
}

pub(super) fn vocab(file: &File<'_>, tokens: &[&str]) -> Result<Value, ModelError> {
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

pub(super) fn config(file: &File<'_>, tokens: &[&str]) -> Result<Map<String, Value>, ModelError> {
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
pub(super) fn named<'t>(
    file: &File<'_>,
    tokens: &[&'t str],
    name: &str,
) -> Result<Option<&'t str>, ModelError> {
    let Some(id) = int(file, &format!("tokenizer.ggml.{name}_token_id")) else { return Ok(None) };
    match usize::try_from(id).ok().and_then(|id| tokens.get(id)) {
        Some(token) => Ok(Some(token)),
        None => {
            Err(file.invalid(format!("tokenizer.ggml.{name}_token_id = {id} of {} tokens", tokens.len())))
        }
    }
}

pub(super) fn strings<'f>(file: &'f File<'_>, key: &str) -> Result<Vec<&'f str>, ModelError> {
    let list = match file.header.meta.get(key) {
        Some(Meta::List(items)) => items.iter().map(Meta::text).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    list.ok_or_else(|| file.invalid(format!("{key}: expected a list of texts")))
}
