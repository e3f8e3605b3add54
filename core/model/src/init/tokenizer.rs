//! A byte-level BPE tokenizer made on the spot: every byte, merges learnt from a text if there is one, special tokens.
//!
//! Learning is deterministic: the most frequent pair is merged, of equally frequent ones the one whose ids are lower.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use crate::error::ModelError;
use crate::tokenizer::Tokenizer;

/// The tokenizer of a new model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerChoice {
    /// One token a byte, and the special tokens.
    Bytes,
    /// Bytes, merges learnt from `text` up to `vocab_size` tokens in all, and the special tokens.
    Trained {
        /// What to learn from.
        text: String,
        /// Tokens wanted, special ones included; fewer if the text has no more to teach.
        vocab_size: usize,
    },
    /// That of another model.
    Folder(PathBuf),
}

/// Special tokens and chat template of a new tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatStyle {
    /// `<|im_start|>role … <|im_end|>`.
    ChatMl,
    /// `<|header_start|>role<|header_end|> … <|eot|>` after `<|begin_of_text|>`.
    Llama4,
    /// The same, for messages that may hold images.
    Llama4Images,
}

const CHATML: &str = "{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

const LLAMA4: &str = "{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|eot|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
";

const LLAMA4_IMAGES: &str = "{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|eot|>' }}{%- endgeneration %}
    {%- elif message['content'] is string %}
        {{- message['content'] + '<|eot|>' }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- else %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
        {{- '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
";

impl ChatStyle {
    /// Special tokens in the order of their ids.
    fn specials(self) -> &'static [&'static str] {
        match self {
            Self::ChatMl => &["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            Self::Llama4 => &[
                "<|begin_of_text|>",
                "<|header_start|>",
                "<|header_end|>",
                "<|eot|>",
                "<|finetune_right_pad|>",
            ],
            Self::Llama4Images => &[
                "<|begin_of_text|>",
                "<|header_start|>",
                "<|header_end|>",
                "<|eot|>",
                "<|finetune_right_pad|>",
                "<|image_start|>",
                "<|image_end|>",
                "<|tile_x_separator|>",
                "<|tile_y_separator|>",
                "<|image|>",
                "<|patch|>",
            ],
        }
    }

    /// BOS, EOS and padding.
    fn names(self) -> (Option<&'static str>, &'static str, &'static str) {
        match self {
            Self::ChatMl => (None, "<|im_end|>", "<|endoftext|>"),
            Self::Llama4 | Self::Llama4Images => {
                (Some("<|begin_of_text|>"), "<|eot|>", "<|finetune_right_pad|>")
            }
        }
    }
}

/// Builds (or reads) the tokenizer of `choice`, with the chat format `style` if it is a new one.
///
/// # Errors
/// [`ModelError::Tokenizer`] if `vocab_size` has no room for bytes and special tokens; errors of reading a folder.
pub fn build_tokenizer(choice: &TokenizerChoice, style: ChatStyle) -> Result<Tokenizer, ModelError> {
    let merges = match choice {
        TokenizerChoice::Folder(dir) => return Tokenizer::from_folder(dir),
        TokenizerChoice::Bytes => Vec::new(),
        TokenizerChoice::Trained { text, vocab_size } => {
            let fixed = 256 + style.specials().len();
            let wanted = vocab_size.checked_sub(fixed).ok_or_else(|| {
                ModelError::Tokenizer(format!(
                    "vocab_size = {vocab_size}: bytes and special tokens alone are {fixed}"
                ))
            })?;
            learn(&words(text)?, wanted)
        }
    };
    Tokenizer::from_files("new tokenizer".as_ref(), files(&merges, style))
}

/// The stand-in character of every byte in byte-level vocabularies (GPT-2's table): printable ones stand for
/// themselves, the others for characters from U+0100 on.
fn byte_chars() -> Vec<char> {
    let mut next = 256;
    (0..=255u32)
        .map(|byte| {
            let code = match byte {
                0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => byte,
                _ => {
                    next += 1;
                    next - 1
                }
            };
            char::from_u32(code).unwrap_or_default()
        })
        .collect()
}

fn files(merges: &[(String, String)], style: ChatStyle) -> Vec<(String, Vec<u8>)> {
    let mut vocab: Map<String, Value> = Map::new();
    for c in byte_chars() {
        vocab.insert(c.to_string(), vocab.len().into());
    }
    for (left, right) in merges {
        let id = vocab.len();
        vocab.entry(format!("{left}{right}")).or_insert(id.into());
    }
    let first = vocab.len();
    let added: Vec<Value> = style
        .specials()
        .iter()
        .enumerate()
        .map(|(i, token)| {
            json!({"id": first + i, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let (bos, eos, pad) = style.names();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let post_processor = match bos {
        None => bytes,
        Some(bos) => {
            let special = |kind: u32| json!({"SpecialToken": {"id": bos, "type_id": kind}});
            let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
            json!({"type": "Sequence", "processors": [bytes, {
                "type": "TemplateProcessing",
                "single": [special(0), sequence("A", 0)],
                "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
                // BOS is the first special token.
                "special_tokens": {bos: {"id": bos, "ids": [first], "tokens": [bos]}},
            }]})
        }
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": pre_tokenizer(), "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    });
    let config = json!({"bos_token": bos, "eos_token": eos, "pad_token": pad, "clean_up_tokenization_spaces": false,
        "tokenizer_class": "PreTrainedTokenizerFast"});
    let template = match style {
        ChatStyle::ChatMl => CHATML,
        ChatStyle::Llama4 => LLAMA4,
        ChatStyle::Llama4Images => LLAMA4_IMAGES,
    };
    vec![
        ("tokenizer.json".into(), tokenizer.to_string().into_bytes()),
        ("tokenizer_config.json".into(), config.to_string().into_bytes()),
        ("chat_template.jinja".into(), template.into()),
    ]
}

/// Digits one by one (arithmetic is learnt better so), the rest by GPT-2's rules.
fn pre_tokenizer() -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
    ]})
}

/// The words of `text` in byte-level spelling, with their counts.
fn words(text: &str) -> Result<BTreeMap<String, u64>, ModelError> {
    let error = |e: &dyn std::fmt::Display| ModelError::Tokenizer(format!("learning merges: {e}"));
    let splitter: tokenizers::PreTokenizerWrapper =
        serde_json::from_value(pre_tokenizer()).map_err(|e| error(&e))?;
    let mut pieces = PreTokenizedString::from(text);
    splitter.pre_tokenize(&mut pieces).map_err(|e| error(&e))?;
    let mut counts = BTreeMap::new();
    for (word, ..) in pieces.get_splits(OffsetReferential::Original, OffsetType::Byte) {
        *counts.entry(word.to_owned()).or_insert(0) += 1;
    }
    Ok(counts)
}

/// Up to `wanted` merges (Sennrich et al. 2016), most frequent first.
fn learn(words: &BTreeMap<String, u64>, wanted: usize) -> Vec<(String, String)> {
    let mut tokens: Vec<String> = byte_chars().into_iter().map(String::from).collect();
    let ids: BTreeMap<char, usize> = byte_chars().into_iter().enumerate().map(|(id, c)| (c, id)).collect();
    let mut words: Vec<(Vec<usize>, u64)> = words
        .iter()
        .map(|(word, count)| (word.chars().filter_map(|c| ids.get(&c).copied()).collect(), *count))
        .collect();
    let mut merges = Vec::new();
    while merges.len() < wanted {
        let mut pairs: BTreeMap<(usize, usize), u64> = BTreeMap::new();
        for (word, count) in &words {
            word.windows(2).for_each(|pair| *pairs.entry((pair[0], pair[1])).or_insert(0) += count);
        }
        // Two different pairs may spell the same token; the second would have no id of its own.
        let fresh = |pair: &(usize, usize)| {
            let text = format!("{}{}", tokens[pair.0], tokens[pair.1]);
            !tokens.contains(&text)
        };
        let mut best: Option<((usize, usize), u64)> = None;
        for (pair, count) in pairs {
            if count > 1 && best.is_none_or(|(_, most)| count > most) && fresh(&pair) {
                best = Some((pair, count));
            }
        }
        let Some((pair, _)) = best else { break };
        let id = tokens.len();
        merges.push((tokens[pair.0].clone(), tokens[pair.1].clone()));
        tokens.push(format!("{}{}", tokens[pair.0], tokens[pair.1]));
        words.iter_mut().for_each(|(word, _)| merge(word, pair, id));
    }
    merges
}

fn merge(word: &mut Vec<usize>, pair: (usize, usize), id: usize) {
    let (mut read, mut write) = (0, 0);
    while read < word.len() {
        let matches = read + 1 < word.len() && (word[read], word[read + 1]) == pair;
        word[write] = if matches { id } else { word[read] };
        read += if matches { 2 } else { 1 };
        write += 1;
    }
    word.truncate(write);
}
