//! A prompt: what the policy is asked, and what its answer is checked against.

use serde::{Deserialize, Serialize};

use crate::PromptId;

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
    /// Path of an image file, relative to the prompt file.
    Image(String),
}

impl Message {
    /// A plain text turn.
    pub fn text(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: MessageContent::Text(content.into()) }
    }
}

impl Prompt {
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
