//! SentencePiece vocabularies (`tokenizer.ggml.model = "llama"`: Llama 2, Mistral, Mixtral, Gemma) → `tokenizer.json`.
//!
//! Such a vocabulary has a score for every piece and no list of merges: neighbours that together are a piece merge, the
//! best score first. The list that says so is made as transformers makes it (`generate_merges`).

use std::collections::HashMap;

use serde_json::{Value, json};

use super::File;
use super::header::Meta;
use super::tokenizer::{added_tokens, beginning, both, config, kinds, named, strings, vocab};
use crate::error::ModelError;

/// No piece of a real vocabulary is so long; the number of ways to cut one goes with its length.
const MAX_PIECE_CHARS: usize = 256;
const BYTE: i128 = 6;

/// The files of the tokenizer in `file`.
pub(super) fn files(file: &File<'_>) -> Result<Vec<(String, Vec<u8>)>, ModelError> {
    let tokens = strings(file, "tokenizer.ggml.tokens")?;
    let prefix = match file.header.meta.get("tokenizer.ggml.add_space_prefix") {
        Some(Meta::Bool(flag)) => *flag,
        _ => true,
    };
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let normalizer = if prefix {
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, replace]})
    } else {
        replace
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let bytes = kinds(file, &tokens)?.contains(&Some(BYTE));
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens(file, &tokens, true)?,
        "normalizer": normalizer, "pre_tokenizer": null,
        "post_processor": beginning(file, &tokens, true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": named(file, &tokens, "unknown")?,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": bytes,
            "ignore_merges": false, "vocab": vocab(file, &tokens)?, "merges": merges(file, &tokens)?,
        },
    });
    both(json, config(file, &tokens)?)
}

/// Every way to make an ordinary piece of two others: by falling score, then as transformers breaks ties.
fn merges(file: &File<'_>, tokens: &[&str]) -> Result<Value, ModelError> {
    let scores = scores(file, tokens)?;
    let kinds = kinds(file, tokens)?;
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut merges = Vec::new();
    for (id, piece) in tokens.iter().enumerate().filter(|(id, _)| kinds[*id] == Some(1)) {
        let cuts: Vec<usize> = piece.char_indices().map(|(at, _)| at).skip(1).collect();
        if cuts.len() >= MAX_PIECE_CHARS {
            return Err(file.invalid(format!(
                "tokenizer.ggml.tokens: token {id} has {} characters, the limit is {MAX_PIECE_CHARS}",
                cuts.len() + 1
            )));
        }
        let mut ways: Vec<(usize, usize)> = cuts
            .into_iter()
            .filter_map(|at| Some((*ids.get(&piece[..at])?, *ids.get(&piece[at..])?)))
            .collect();
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|(left, right)| (scores[id], left, right)));
    }
    let chars = |id: usize| tokens[id].chars().count();
    // Falling; a stable sort keeps the order of equals.
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then_with(|| chars(b.1).cmp(&chars(a.1)))
            .then_with(|| chars(b.2).cmp(&chars(a.2)))
    });
    Ok(merges.into_iter().map(|(_, left, right)| json!([tokens[left], tokens[right]])).collect())
}

fn scores(file: &File<'_>, tokens: &[&str]) -> Result<Vec<f64>, ModelError> {
    let key = "tokenizer.ggml.scores";
    let wrong = || file.invalid(format!("{key}: expected a number for each of the {} tokens", tokens.len()));
    let Some(Meta::List(items)) = file.header.meta.get(key) else { return Err(wrong()) };
    if items.len() != tokens.len() {
        return Err(wrong());
    }
    let score = |item: &Meta| match item {
        Meta::Float(x) if x.is_finite() => Some(*x),
        _ => None,
    };
    items.iter().map(score).collect::<Option<Vec<_>>>().ok_or_else(wrong)
}
