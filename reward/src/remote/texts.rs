//! A completion as plain text and as a conversation.

use freewheel_types::{ContentPart, Message, MessageContent, Prompt, PromptBody};
use serde_json::{Value, json};

use crate::stack::Completion;

pub(super) use crate::guard::prompt_text;

/// The prompt's turns and the completion as the assistant's, as chat APIs spell them.
pub(super) fn conversation(completion: &Completion<'_>) -> Vec<Value> {
    let mut turns = match &completion.prompt.body {
        PromptBody::Text(text) => vec![json!({"role": "user", "content": text})],
        PromptBody::Messages(messages) => messages.iter().map(turn).collect(),
    };
    turns.push(json!({"role": "assistant", "content": completion.text}));
    turns
}

fn turn(message: &Message) -> Value {
    let text = match &message.content {
        MessageContent::Text(text) => text.clone(),
        MessageContent::Parts(parts) => parts
            .iter()
            .filter_map(|part| match part {
                ContentPart::Text(text) => Some(text.as_str()),
                ContentPart::Image(_) => None,
            })
            .collect::<Vec<_>>()
            .join("\n"),
    };
    json!({"role": message.role, "content": text})
}

/// Whether a prompt shows an image, which none of these servers is sent.
pub(super) fn holds_image(prompt: &Prompt) -> bool {
    !prompt.images().is_empty()
}
