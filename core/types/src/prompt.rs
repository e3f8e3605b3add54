//! A prompt: what the policy is asked, and what its answer is checked against.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Digest, PromptId};

/// One line of a prompt file, checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Identity, derived from the content unless the file gives `id`.
    pub id: PromptId,
    /// What the user wrote as `id`, for people to recognise it.
    pub name: Option<String>,
    /// Text, or a conversation that goes through the chat template.
    pub body: PromptBody,
    /// Reference answer; its meaning belongs to the verifier.
    /// JSON text, so that every codec can carry it.
    pub answer: Option<String>,
    /// Tags: curriculum levels, reward routing, per-tag evaluation.
    pub tags: Vec<String>,
    /// Name of the verifier, if the prompt chooses one.
    pub verifier: Option<String>,
    /// Whatever else the line held under `meta`, as JSON text.
    pub meta: Option<String>,
}

/// The two ways to ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PromptBody {
    /// Raw text, tokenised as it is (special tokens in it are plain text).
    Text(String),
    /// A conversation, rendered by the model's chat template.
    Messages(Vec<Message>),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// What was said.
    pub content: MessageContent,
}

/// Text, or parts for multimodal models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum MessageContent {
    /// Plain text.
    Text(String),
    /// Text and image parts in order.
    Parts(Vec<ContentPart>),
}

/// One part of a multimodal message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ContentPart {
    /// Text.
    Text(String),
    /// An image.
    Image(ImagePart),
}

/// An image with its encoded bytes, so that a prompt is whole wherever it goes. Clones share the bytes.
///
/// In text formats it shows as its digest: what makes an image *that* image, wherever its file lies. It cannot be read
/// back from them.
#[derive(Clone, PartialEq, Eq)]
pub struct ImagePart {
    path: String,
    bytes: Arc<[u8]>,
}

/// Most bytes of one encoded image.
pub const MAX_IMAGE_BYTES: usize = 4 << 20;

impl ImagePart {
    /// The image in the file `path`, whose content is `bytes`.
    pub fn new(path: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { path: path.into(), bytes: bytes.into() }
    }

    /// Path of its file, for people.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The file's content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for ImagePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImagePart({}, {} bytes)", self.path, self.bytes.len())
    }
}

impl Serialize for ImagePart {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            Digest::of(&self.bytes).to_string().serialize(serializer)
        } else {
            (&self.path, &*self.bytes).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for ImagePart {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return Err(serde::de::Error::custom("an image is not carried in text; name its file"));
        }
        let (path, bytes): (String, Vec<u8>) = Deserialize::deserialize(deserializer)?;
        if bytes.len() > MAX_IMAGE_BYTES {
            let what = format!("an image of {} bytes, more than {MAX_IMAGE_BYTES}", bytes.len());
            return Err(serde::de::Error::custom(what));
        }
        Ok(Self::new(path, bytes))
    }
}

impl Message {
    /// A plain text turn.
    pub fn text(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: MessageContent::Text(content.into()) }
    }
}

impl PromptBody {
    /// The images in it, in order.
    pub fn images(&self) -> Vec<&ImagePart> {
        let PromptBody::Messages(messages) = self else { return Vec::new() };
        let parts = messages.iter().flat_map(|message| match &message.content {
            MessageContent::Parts(parts) => parts.as_slice(),
            MessageContent::Text(_) => &[],
        });
        parts
            .filter_map(|part| match part {
                ContentPart::Image(image) => Some(image),
                ContentPart::Text(_) => None,
            })
            .collect()
    }
}

impl Prompt {
    /// The images in it, in order.
    pub fn images(&self) -> Vec<&ImagePart> {
        self.body.images()
    }

    /// The last thing the user said, for logs and reports.
    pub fn question(&self) -> &str {
        match &self.body {
            PromptBody::Text(text) => text,
            PromptBody::Messages(turns) => {
                turns.iter().rev().find(|turn| turn.role == "user").map_or("", |turn| match &turn.content {
                    MessageContent::Text(text) => text,
                    MessageContent::Parts(parts) => parts
                        .iter()
                        .find_map(|part| match part {
                            ContentPart::Text(text) => Some(text.as_str()),
                            ContentPart::Image(_) => None,
                        })
                        .unwrap_or(""),
                })
            }
        }
    }
}
