//! Chat templates: Jinja, as `apply_chat_template` runs it.
//!
//! A template is code that came with a checkpoint. It runs in an interpreter without I/O, sees no clock (a date is
//! given to it, the same one every time, so that a run replays), and its errors are the user's to read.
//! User text is shielded before it gets here, see [`Shield`].

mod python;
mod shield;

use std::collections::BTreeMap;
use std::ops::Range;

use freewheel_types::{ContentPart, Message, MessageContent};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind};
use serde_json::{Map, Value, json};

pub(crate) use shield::Shield;

use crate::error::ModelError;

/// Brackets around generated spans and the end of a message to be continued: no text may contain them unshielded.
const GENERATION_START: char = '\u{10FF00}';
const GENERATION_END: char = '\u{10FF01}';
const CONTINUE: char = '\u{10FF02}';

/// What a template is asked for, beside the messages.
#[derive(Clone, Debug, PartialEq)]
pub struct RenderOptions {
    /// End with the header of an assistant's turn.
    pub add_generation_prompt: bool,
    /// Leave the last message open, for the model to go on with it. Excludes `add_generation_prompt`.
    pub continue_final_message: bool,
    /// Tools, as JSON schemas.
    pub tools: Option<Vec<Value>>,
    /// Documents for retrieval templates.
    pub documents: Option<Vec<Value>>,
    /// Further variables (`enable_thinking`, `date_string` …).
    pub variables: Map<String, Value>,
    /// What `strftime_now` takes for now: seconds since 1970, UTC. Fixed by default.
    pub now: i64,
}

/// 2024-07-26, the date that Llama's templates use when they are told none.
const DEFAULT_NOW: i64 = 1_721_952_000;

impl Default for RenderOptions {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: None,
            documents: None,
            variables: Map::new(),
            now: DEFAULT_NOW,
        }
    }
}

/// A compiled chat template.
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

/// Rendered text.
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// Byte ranges that the template marks as written by the assistant.
    pub(crate) generated: Vec<Range<usize>>,
}

/// Messages as templates see them: parts become `{"type": "text", "text": …}` and `{"type": "image"}`.
pub(crate) fn messages_json(messages: &[Message]) -> Vec<Value> {
    let part = |part: &ContentPart| match part {
        ContentPart::Text(text) => json!({"type": "text", "text": text}),
        ContentPart::Image(_) => json!({"type": "image"}),
    };
    let content = |content: &MessageContent| match content {
        MessageContent::Text(text) => Value::from(text.as_str()),
        MessageContent::Parts(parts) => parts.iter().map(part).collect(),
    };
    messages.iter().map(|m| json!({"role": m.role, "content": content(&m.content)})).collect()
}

impl ChatTemplate {
    /// Compiles `source`.
    pub(crate) fn new(source: &str) -> Result<Self, ModelError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| error(&e))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(python::format_value);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let add = |environment: &mut Environment<'static>, name: &'static str, text: String| {
            environment.add_template_owned(name, text).map_err(|e| error(&e))
        };
        add(&mut environment, "generation_start", GENERATION_START.into())?;
        add(&mut environment, "generation_end", GENERATION_END.into())?;
        add(&mut environment, "chat", mark_generation(source))?;
        Ok(Self { environment, source: source.to_owned() })
    }

    /// The text it was compiled from.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Runs the template. `names` are the special tokens by name; with a `shield`, strings from outside go through it.
    pub(crate) fn render(
        &self,
        messages: &[Value],
        names: &BTreeMap<String, String>,
        options: &RenderOptions,
        mut shield: Option<&mut Shield<'_>>,
    ) -> Result<Rendered, ModelError> {
        let mut protect = |value: &Value| match shield.as_deref_mut() {
            Some(shield) => shield.protect_json(value),
            None => value.clone(),
        };
        let mut messages: Vec<Value> = messages.iter().map(|m| protect(&without_nulls(m))).collect();
        check_messages(&messages)?;
        if options.continue_final_message {
            if options.add_generation_prompt {
                return Err(ModelError::Template(
                    "continue_final_message and add_generation_prompt exclude each other".into(),
                ));
            }
            mark_final(&mut messages)?;
        }
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, value) in &options.variables {
            context.insert(name, protect(value));
        }
        let mut list = |items: &Option<Vec<Value>>| match items {
            Some(items) => items.iter().map(&mut protect).collect(),
            None => Value::Null,
        };
        context.insert("tools", list(&options.tools));
        context.insert("documents", list(&options.documents));
        context.insert("add_generation_prompt", options.add_generation_prompt.into());
        context.extend(names.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))));
        context.insert("messages", messages.into());

        let now = options.now;
        let template = self.environment.get_template("chat").map_err(|e| error(&e))?;
        let strftime = minijinja::Value::from_function(move |format: String| python::strftime(now, &format));
        let context =
            minijinja::context! { strftime_now => strftime, ..minijinja::Value::from(Serde(&context)) };
        let text = template.render(context).map_err(|e| error(&e))?;
        let text = if options.continue_final_message { cut_at_mark(text)? } else { text };
        Ok(split_generated(&text))
    }
}

fn error(error: &Error) -> ModelError {
    let place = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    match error.kind() {
        // raise_exception: the template's own words.
        ErrorKind::InvalidOperation => {
            ModelError::Template(format!("{}{place}", error.detail().unwrap_or("invalid operation")))
        }
        _ => ModelError::Template(format!("{error}{place}")),
    }
}

/// Keys of a message whose value is null count as absent.
fn without_nulls(message: &Value) -> Value {
    match message {
        Value::Object(map) => map
            .iter()
            .filter(|(_, v)| !v.is_null())
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect::<Map<_, _>>()
            .into(),
        other => other.clone(),
    }
}

/// Some templates build special tokens out of role names, so a role is a plain word.
fn check_messages(messages: &[Value]) -> Result<(), ModelError> {
    for (index, message) in messages.iter().enumerate() {
        let role = message
            .get("role")
            .and_then(Value::as_str)
            .ok_or_else(|| ModelError::Template(format!("message {index} has no role")))?;
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if role.is_empty() || role.len() > 64 || !role.chars().all(word) {
            return Err(ModelError::Template(format!("message {index}: role {role:?} is not a word")));
        }
    }
    Ok(())
}

/// Replaces the `generation` tags of Hugging Face's extension, which mark what the assistant wrote, by tags that leave
/// a bracket in the output. They stay tags, so white space around them is trimmed the same.
fn mark_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let Some(end) = rest[at..].find("%}").map(|n| at + n) else { break };
        let inner = &rest[at + 2..end];
        let include = match inner.trim_matches(['-', '+']).trim() {
            "generation" => "generation_start",
            "endgeneration" => "generation_end",
            _ => {
                out.push_str(&rest[..end + 2]);
                rest = &rest[end + 2..];
                continue;
            }
        };
        let sign =
            |c: Option<char>| c.filter(|c| matches!(c, '-' | '+')).map(String::from).unwrap_or_default();
        let (before, after) = (sign(inner.chars().next()), sign(inner.chars().next_back()));
        out.push_str(&rest[..at]);
        out.push_str(&format!("{{%{before} include \"{include}\" {after}%}}"));
        rest = &rest[end + 2..];
    }
    out.push_str(rest);
    out
}

/// Takes the brackets out again and says what was between them.
fn split_generated(marked: &str) -> Rendered {
    let (mut text, mut generated, mut open) = (String::with_capacity(marked.len()), Vec::new(), None);
    for c in marked.chars() {
        match c {
            GENERATION_START => open = Some(text.len()),
            GENERATION_END => generated.extend(open.take().map(|start| start..text.len())),
            c => text.push(c),
        }
    }
    Rendered { text, generated }
}

/// Puts a mark at the end of the last message. The space after it tells whether the template trims.
fn mark_final(messages: &mut [Value]) -> Result<(), ModelError> {
    let fail =
        || ModelError::Template("continue_final_message: the last message has no text to continue".into());
    let content = messages.last_mut().and_then(|m| m.get_mut("content")).ok_or_else(fail)?;
    let text = match content {
        Value::String(_) => content,
        Value::Array(parts) => parts.last_mut().and_then(|part| part.get_mut("text")).ok_or_else(fail)?,
        _ => return Err(fail()),
    };
    *text = format!("{}{CONTINUE} ", text.as_str().ok_or_else(fail)?).into();
    Ok(())
}

fn cut_at_mark(text: String) -> Result<String, ModelError> {
    let at = text.rfind(CONTINUE).ok_or_else(|| {
        ModelError::Template(
            "continue_final_message: the template does not write the last message as it is".into(),
        )
    })?;
    let kept = &text[..at];
    let trimmed = !text[at + CONTINUE.len_utf8()..].starts_with(' ');
    Ok(if trimmed { kept.trim_end().to_owned() } else { kept.to_owned() })
}
