//! Text ↔ token ids.
//!
//! Two rules. Text that comes from people never becomes a special token: `<|eot_id|>` in a prompt is twelve or so
//! ordinary tokens, and only the chat template may end a turn. And the ids of ordinary text are exactly those of the
//! reference library, because a policy that reads other ids than it was trained on is another policy.
//! (Added tokens that the tokenizer itself declares as not special, such as `<think>`, are ordinary text.)

mod frame;
mod stream;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use freewheel_types::{Digest, ImagePart, Message, PromptBody};
use serde_json::{Map, Value};

use crate::checkpoint::read_text;
use crate::error::ModelError;
use crate::template::{ChatTemplate, RenderOptions, Rendered, Shield, messages_json};

use crate::spec::VisionSpec;
use crate::vision::{EncodedPrompt, ImageProcessor, ImageTile};
pub use frame::Framed;
pub use stream::DecodeStream;

/// The largest released tokenizers have 35 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// Files that make up a tokenizer in Hugging Face's layout; kept as they are, to be saved as they were.
const FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    PREPROCESSOR,
    PROCESSOR,
];
/// How a model cuts up images; newer checkpoints keep it inside the second file.
pub(crate) const PREPROCESSOR: &str = "preprocessor_config.json";
const PROCESSOR: &str = "processor_config.json";
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// First byte and end of what a token covers.
type Offsets = (usize, usize);

/// A tokenizer with its chat template.
pub struct Tokenizer {
    /// Sees special tokens in text.
    interpreting: Arc<tokenizers::Tokenizer>,
    /// Does not.
    plain: tokenizers::Tokenizer,
    special_ids: BTreeSet<u32>,
    /// Their texts, for the shield.
    special_texts: Vec<String>,
    /// `bos_token` and so on, as the configuration names them.
    names: BTreeMap<String, String>,
    /// Ids put before a raw text (usually BOS or nothing).
    prefix: Vec<u32>,
    template: Option<ChatTemplate>,
    images: Option<ImageProcessor>,
    files: Vec<(String, Vec<u8>)>,
    digest: Digest,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("digest", &self.digest)
            .finish()
    }
}

impl Tokenizer {
    /// Reads the tokenizer files in `dir`.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing or any of the files is broken.
    pub fn from_folder(dir: &Path) -> Result<Self, ModelError> {
        let mut files = Vec::new();
        for name in FILES {
            let path = dir.join(name);
            if path.is_file() {
                files.push((name.to_owned(), read_text(&path, MAX_FILE_BYTES)?.into_bytes()));
            }
        }
        Self::from_files(dir, files)
    }

    /// The tokenizer that `files` (names as in a folder, and their contents) make up; `dir` is for messages.
    ///
    /// # Errors
    /// As [`Self::from_folder`].
    pub fn from_files(dir: &Path, files: Vec<(String, Vec<u8>)>) -> Result<Self, ModelError> {
        let find =
            |name: &str| files.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.as_slice());
        let invalid = |name: &str, what: String| ModelError::Invalid { path: dir.join(name), what };
        let json = find("tokenizer.json").ok_or_else(|| ModelError::File {
            path: dir.join("tokenizer.json"),
            what: "not there; save the tokenizer in the fast format (tokenizer.json)".into(),
            source: None,
        })?;
        let mut interpreting = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| invalid("tokenizer.json", format!("not a tokenizer: {e}")))?;
        // Both would change ids behind our back: lengths are the engine's business.
        interpreting.with_padding(None);
        interpreting.with_truncation(None).map_err(|e| invalid("tokenizer.json", e.to_string()))?;
        let mut plain = interpreting.clone();
        plain.set_encode_special_tokens(true);

        let config = object(find("tokenizer_config.json"))
            .map_err(|what| invalid("tokenizer_config.json", what))?
            .unwrap_or_default();
        let map = object(find("special_tokens_map.json"))
            .map_err(|what| invalid("special_tokens_map.json", what))?
            .unwrap_or_default();
        let template = template_source(&config, &find)
            .map_err(|(name, what)| invalid(name, what))?
            .map(|source| ChatTemplate::new(&source))
            .transpose()?;
        let added = interpreting.get_added_tokens_decoder();
        let specials: BTreeMap<u32, String> = added
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (*id, token.content.clone()))
            .collect();
        let template_text = template.as_ref().map_or("", ChatTemplate::source);
        let digest = Digest::of(&[json, b"\0", template_text.as_bytes()].concat());
        let prefix = prefix_ids(&interpreting)?;
        Ok(Self {
            interpreting: Arc::new(interpreting),
            plain,
            special_ids: specials.keys().copied().collect(),
            special_texts: specials.into_values().collect(),
            names: special_names(&config, &map),
            prefix,
            template,
            images: None,
            files,
            digest,
        })
    }

    /// Ids of `text` as plain text: nothing added, special tokens in it not interpreted.
    ///
    /// # Errors
    /// If the tokenizer fails, or has no way to spell the text without a special token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        Ok(self.encode_plain(text)?.0)
    }

    /// As [`Self::encode`], with the bytes of `text` that every id covers.
    fn encode_plain(&self, text: &str) -> Result<(Vec<u32>, Vec<Offsets>), ModelError> {
        let encoding = encode(&self.plain, text)?;
        if !self.has_special(encoding.get_ids()) {
            return Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()));
        }
        // Models without a pre-tokenizer may find a special token's own spelling in their vocabulary: break it up.
        let (mut ids, mut offsets, mut base) = (Vec::new(), Vec::new(), 0);
        for piece in self.break_specials(text) {
            let encoding = encode(&self.plain, piece)?;
            ids.extend_from_slice(encoding.get_ids());
            offsets.extend(encoding.get_offsets().iter().map(|(start, stop)| (start + base, stop + base)));
            base += piece.len();
        }
        // What a vocabulary cannot spell is honestly unknown, and says nothing to the model but that.
        let unknown = self.special("unk_token").and_then(|text| self.token_to_id(text));
        if ids.iter().any(|id| self.special_ids.contains(id) && Some(*id) != unknown) {
            return Err(ModelError::Tokenizer("this text cannot be encoded without special tokens".into()));
        }
        Ok((ids, offsets))
    }

    /// Ids of `text` in which special tokens *are* interpreted. For text this program wrote, never for input.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode_trusted(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        Ok(encode(&self.interpreting, text)?.get_ids().to_vec())
    }

    /// Ids of a prompt: a conversation through the chat template with the generation prompt, a text as it is after the
    /// ids that the tokenizer puts first (BOS, for most).
    ///
    /// # Errors
    /// If there is no chat template and one is needed, or it refuses the conversation.
    pub fn encode_prompt(&self, prompt: &PromptBody) -> Result<EncodedPrompt, ModelError> {
        let images = prompt.images();
        // Text models say so themselves: their chat templates stumble in other words.
        let processor = if images.is_empty() { None } else { Some(self.image_processor()?) };
        let ids = match prompt {
            PromptBody::Text(text) => {
                let mut ids = self.prefix.clone();
                ids.extend(self.encode(text)?);
                ids
            }
            PromptBody::Messages(messages) => {
                self.encode_chat(&messages_json(messages), &RenderOptions::default())?.ids
            }
        };
        match processor {
            None => Ok(EncodedPrompt { ids, tiles: Vec::new() }),
            Some(processor) => processor.encode(&ids, &images),
        }
    }

    /// Renders and encodes a conversation in JSON with the images that its parts of type `image` stand for, in order.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_chat_with_images(
        &self,
        messages: &[Value],
        options: &RenderOptions,
        images: &[ImagePart],
    ) -> Result<EncodedPrompt, ModelError> {
        let processor = if images.is_empty() { None } else { Some(self.image_processor()?) };
        let ids = self.encode_chat(messages, options)?.ids;
        match processor {
            None => Ok(EncodedPrompt { ids, tiles: Vec::new() }),
            Some(processor) => processor.encode(&ids, &images.iter().collect::<Vec<_>>()),
        }
    }

    /// The tiles of a prompt's images at their places in `ids`, which [`Self::encode_prompt`] made of it.
    ///
    /// # Errors
    /// If the model reads no images, an image is broken, or the ids are of another prompt.
    pub fn tiles_of(&self, prompt: &PromptBody, ids: &[u32]) -> Result<Vec<ImageTile>, ModelError> {
        match prompt.images().as_slice() {
            [] => Ok(Vec::new()),
            images => self.image_processor()?.tiles_in(ids, images),
        }
    }

    /// Adds a file to be saved with the tokenizer.
    pub(crate) fn add_file(&mut self, name: &str, content: &Value) {
        self.files.push((name.to_owned(), format!("{content:#}\n").into_bytes()));
    }

    /// Reads how images are cut up, for a model with encoder `vision`; `dir` is for messages.
    ///
    /// # Errors
    /// If the files ask for what this build does not do, or the tokenizer lacks a token that images need.
    pub(crate) fn read_images(&mut self, dir: &Path, vision: &VisionSpec) -> Result<(), ModelError> {
        let file = |name: &str| {
            let bytes = self.files.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.as_slice());
            object(bytes).map_err(|what| ModelError::Invalid { path: dir.join(name), what })
        };
        let inner = |config: Map<String, Value>| match config.get("image_processor") {
            Some(Value::Object(inner)) => Some(inner.clone()),
            _ => None,
        };
        let (name, config) = match file(PREPROCESSOR)? {
            Some(config) => (PREPROCESSOR, config),
            None => (PROCESSOR, file(PROCESSOR)?.and_then(inner).unwrap_or_default()),
        };
        let id_of = |token: &str| self.token_to_id(token);
        self.images = Some(ImageProcessor::new(&dir.join(name), &config, vision, &id_of)?);
        Ok(())
    }

    /// How images are cut up.
    ///
    /// # Errors
    /// If the model reads no images.
    pub fn image_processor(&self) -> Result<&ImageProcessor, ModelError> {
        self.images.as_ref().ok_or_else(|| {
            ModelError::Template("the prompt holds an image, but the model reads text only".into())
        })
    }

    /// Ids of a conversation, as `options` say.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_messages(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<ChatIds, ModelError> {
        self.encode_chat(&messages_json(messages), options)
    }

    /// The chat template's text for `messages`, for people to look at. Encode with [`Self::encode_chat`] instead, which
    /// knows which parts the user wrote.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, ModelError> {
        Ok(self.chat_template()?.render(&messages_json(messages), &self.names, options, None)?.text)
    }

    /// As [`Self::render`], for messages as JSON (with tool calls and whatever else the template knows).
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn render_json(&self, messages: &[Value], options: &RenderOptions) -> Result<String, ModelError> {
        Ok(self.chat_template()?.render(messages, &self.names, options, None)?.text)
    }

    /// Renders and encodes a conversation. Special tokens come from the template alone.
    ///
    /// # Errors
    /// As [`Self::encode_prompt`].
    pub fn encode_chat(&self, messages: &[Value], options: &RenderOptions) -> Result<ChatIds, ModelError> {
        let mut shield = Shield::new(&self.special_texts);
        let rendered = self.chat_template()?.render(messages, &self.names, options, Some(&mut shield))?;
        let encoding = encode(&self.interpreting, &rendered.text)?;
        let mut out = ChatIds::default();
        if shield.is_empty() {
            out.extend(&rendered, encoding.get_ids(), encoding.get_offsets());
            return Ok(out);
        }
        // Between the template's own special tokens: plain text, with what was shielded put back.
        let mut from = 0;
        for (&id, &(start, stop)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            if self.special_ids.contains(&id) {
                self.push_plain(&mut out, &rendered, &shield, from..start.max(from))?;
                out.extend(&rendered, &[id], &[(start, stop)]);
                from = stop;
            }
        }
        self.push_plain(&mut out, &rendered, &shield, from..rendered.text.len())?;
        Ok(out)
    }

    fn push_plain(
        &self,
        out: &mut ChatIds,
        rendered: &Rendered,
        shield: &Shield<'_>,
        range: std::ops::Range<usize>,
    ) -> Result<(), ModelError> {
        let (text, origin) = shield.restore(&rendered.text[range.clone()]);
        let (ids, offsets) = self.encode_plain(&text)?;
        let place = |at: usize| range.start + origin[at.min(text.len())];
        let offsets: Vec<Offsets> =
            offsets.iter().map(|&(start, stop)| (place(start), place(stop))).collect();
        out.extend(rendered, &ids, &offsets);
        Ok(())
    }

    /// Text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.interpreting.decode(ids, true).unwrap_or_default()
    }

    /// Text of `ids`, special tokens and all.
    pub fn decode_all(&self, ids: &[u32]) -> String {
        self.interpreting.decode(ids, false).unwrap_or_default()
    }

    /// A decoder that is fed one id at a time.
    pub fn stream(&self) -> DecodeStream {
        DecodeStream::new(self.interpreting.clone())
    }

    /// Number of ids, added tokens included: one more than the highest.
    pub fn vocab_size(&self) -> usize {
        let added =
            self.interpreting.get_added_tokens_decoder().keys().max().map_or(0, |id| *id as usize + 1);
        added.max(self.interpreting.get_vocab_size(false))
    }

    /// Identity of the tokenizer and its template: the same digest means the same ids.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Whether conversations can be encoded.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The id of a token, by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.interpreting.token_to_id(token)
    }

    /// The text of a token as the vocabulary spells it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.interpreting.id_to_token(id)
    }

    /// The text of `bos_token`, `eos_token`, `pad_token` …, if the tokenizer names it.
    pub fn special(&self, name: &str) -> Option<&str> {
        self.names.get(name).map(String::as_str)
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The files that make up this tokenizer, names and contents.
    pub fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }

    /// Refuses a tokenizer that can produce ids the model has no embedding for.
    pub(crate) fn check_fits(&self, vocab_size: usize) -> Result<(), ModelError> {
        if self.vocab_size() <= vocab_size {
            return Ok(());
        }
        Err(ModelError::Tokenizer(format!(
            "ids up to {}, but the model has embeddings for {vocab_size} only; this tokenizer belongs to another model",
            self.vocab_size() - 1
        )))
    }

    fn chat_template(&self) -> Result<&ChatTemplate, ModelError> {
        self.template.as_ref().ok_or_else(|| {
            ModelError::Template(
                "the model has none; give prompts as text, or put a chat_template.jinja into its folder"
                    .into(),
            )
        })
    }

    fn has_special(&self, ids: &[u32]) -> bool {
        ids.iter().any(|id| self.special_ids.contains(id))
    }

    /// Cuts `text` after the first character of every special token's text in it.
    fn break_specials<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut cuts: BTreeSet<usize> = [text.len()].into();
        for special in &self.special_texts {
            let first = special.chars().next().map_or(0, char::len_utf8);
            cuts.extend(text.match_indices(special.as_str()).map(|(at, _)| at + first));
        }
        let mut from = 0;
        cuts.into_iter().map(|cut| &text[std::mem::replace(&mut from, cut)..cut]).collect()
    }
}

/// An encoded conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatIds {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Which of them the template marks as generated by the assistant (`{% generation %}`); `None` if it marks nothing.
    pub assistant_mask: Option<Vec<bool>>,
}

impl ChatIds {
    fn extend(&mut self, rendered: &Rendered, ids: &[u32], offsets: &[Offsets]) {
        self.ids.extend_from_slice(ids);
        if rendered.generated.is_empty() {
            return;
        }
        let mask = self.assistant_mask.get_or_insert_default();
        mask.extend(offsets.iter().map(|&(start, stop)| {
            rendered.generated.iter().any(|span| start < span.end && span.start < stop)
        }));
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<tokenizers::Encoding, ModelError> {
    tokenizer.encode(text, false).map_err(|e| ModelError::Tokenizer(e.to_string()))
}

/// What the post-processor puts before a text. What it would put behind (an EOS) is left out: a prompt goes on.
fn prefix_ids(tokenizer: &tokenizers::Tokenizer) -> Result<Vec<u32>, ModelError> {
    let with = tokenizer.encode("a", true).map_err(|e| ModelError::Tokenizer(e.to_string()))?;
    let marks = with.get_special_tokens_mask();
    Ok(with.get_ids().iter().zip(marks).take_while(|(_, mark)| **mark == 1).map(|(id, _)| *id).collect())
}

fn object(bytes: Option<&[u8]>) -> Result<Option<Map<String, Value>>, String> {
    bytes
        .map(|bytes| serde_json::from_slice(bytes).map_err(|e| format!("not a JSON object: {e}")))
        .transpose()
}

/// Special tokens come as text, or as an object with their text in `content`.
fn special_names(config: &Map<String, Value>, map: &Map<String, Value>) -> BTreeMap<String, String> {
    SPECIAL_NAMES
        .iter()
        .filter_map(|name| {
            let value = config.get(*name).filter(|v| !v.is_null()).or_else(|| map.get(*name))?;
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some(((*name).to_owned(), text.to_owned()))
        })
        .collect()
}

/// The chat template: a file of its own, or in the configuration, there as text or as a list with one `default`.
fn template_source<'f>(
    config: &Map<String, Value>,
    find: &impl Fn(&str) -> Option<&'f [u8]>,
) -> Result<Option<String>, (&'static str, String)> {
    if let Some(bytes) = find("chat_template.jinja") {
        let text = std::str::from_utf8(bytes).map_err(|e| ("chat_template.jinja", e.to_string()))?;
        return Ok(Some(text.to_owned()));
    }
    let side = object(find("chat_template.json")).map_err(|what| ("chat_template.json", what))?;
    let value = config.get("chat_template").or_else(|| side.as_ref()?.get("chat_template"));
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(list)) => {
            let named = |name: &str| list.iter().find(|entry| entry.get("name").is_some_and(|n| n == name));
            let entry = named("default").or(list.first());
            Ok(entry.and_then(|entry| entry.get("template")?.as_str()).map(str::to_owned))
        }
        Some(_) => {
            Err(("tokenizer_config.json", "chat_template: expected text or a list of named templates".into()))
        }
    }
}
