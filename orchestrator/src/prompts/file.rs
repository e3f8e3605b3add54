//! Prompt files: JSON Lines, one prompt a line.
//!
//! `{"id"?, "prompt" | "messages", "answer"?, "tags"?, "verifier"?, "meta"?}`; a message may hold parts, `{"type":"text","text"}`
//! and `{"type":"image","path"}` with a PNG file beside the prompt file. Every bad line is reported as
//! `file:line: reason`. Nothing is repaired or guessed; text is data (special tokens in it stay text).

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::Path;

use freewheel_types::{ContentPart, Message, MessageContent, Prompt, PromptBody, PromptId};
use serde::Deserialize;
use serde_json::Value;

/// Longest line that is read.
pub const LINE_BYTES_MAX: usize = 16 << 20;
/// Problems listed by name; more are counted.
const LISTED_MAX: usize = 50;
/// A lenient read may skip this fraction of the lines.
const SKIPPED_MAX: f64 = 0.001;
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// A prompt as a line of a prompt file.
///
/// # Errors
/// If it holds an image: those lie in files of their own.
pub fn line_of(prompt: &Prompt) -> Result<Value, String> {
    if !prompt.images().is_empty() {
        return Err("a prompt with images cannot be written as a line".into());
    }
    let json =
        |text: &Option<String>| text.as_deref().and_then(|text| serde_json::from_str::<Value>(text).ok());
    let mut line = serde_json::Map::new();
    let mut put = |key: &str, value: Option<Value>| {
        line.extend(value.map(|value| (key.to_owned(), value)));
    };
    put("id", prompt.name.clone().map(Value::from));
    match &prompt.body {
        PromptBody::Text(text) => put("prompt", Some(text.clone().into())),
        PromptBody::Messages(messages) => {
            let turn = |m: &Message| serde_json::json!({"role": m.role, "content": content_of(&m.content)});
            put("messages", Some(messages.iter().map(turn).collect()));
        }
    }
    put("answer", json(&prompt.answer));
    put("tags", (!prompt.tags.is_empty()).then(|| prompt.tags.clone().into()));
    put("verifier", prompt.verifier.clone().map(Value::from));
    put("meta", json(&prompt.meta));
    Ok(line.into())
}

fn content_of(content: &MessageContent) -> Value {
    let part = |part: &ContentPart| match part {
        ContentPart::Text(text) => Some(serde_json::json!({"type": "text", "text": text})),
        ContentPart::Image(_) => None,
    };
    match content {
        MessageContent::Text(text) => text.clone().into(),
        MessageContent::Parts(parts) => parts.iter().filter_map(part).collect(),
    }
}

/// One bad line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineProblem {
    /// The file as it was named.
    pub file: String,
    /// Line number from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for LineProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.reason)
    }
}

/// What a prompt file held.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The prompts, in file order.
    pub prompts: Vec<Prompt>,
    /// Lines that were skipped; always empty when strict.
    pub skipped: Vec<LineProblem>,
}

/// A prompt file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromptFileError {
    /// It cannot be opened or read.
    #[error("cannot read the prompt file {path}")]
    Read {
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Lines are bad.
    #[error("{}", list(.problems, *.more))]
    Lines {
        /// The first ones.
        problems: Vec<LineProblem>,
        /// How many more there are.
        more: usize,
    },
    /// There is no prompt in it.
    #[error("{path} holds no prompt; it must have one JSON object a line")]
    Empty {
        /// The file.
        path: String,
    },
}

fn list(problems: &[LineProblem], more: usize) -> String {
    let mut out: Vec<String> = problems.iter().map(ToString::to_string).collect();
    if more > 0 {
        out.push(format!("… and {more} more bad lines"));
    }
    out.join("\n")
}

/// Reads a prompt file. `strict`: any bad line is an error; else up to 1 line in 1000 may be skipped.
///
/// # Errors
/// If it cannot be read, has (too many) bad lines, or no prompt.
pub fn load(path: &Path, strict: bool) -> Result<Loaded, PromptFileError> {
    let name = path.display().to_string();
    let read = |source| PromptFileError::Read { path: name.clone(), source };
    let file = std::fs::File::open(path).map_err(read)?;
    if file.metadata().map_err(read)?.is_dir() {
        return Err(read(std::io::ErrorKind::IsADirectory.into()));
    }
    parse(BufReader::new(file), &name, path.parent().unwrap_or(Path::new("")), strict)
}

/// Like [`load`], from any source; `name` stands for the file in messages, paths of images start at `folder`.
///
/// # Errors
/// As [`load`].
pub fn parse(
    mut reader: impl BufRead,
    name: &str,
    folder: &Path,
    strict: bool,
) -> Result<Loaded, PromptFileError> {
    let read = |source| PromptFileError::Read { path: name.to_owned(), source };
    let (mut prompts, mut problems, mut bad, mut lines) = (Vec::new(), Vec::new(), 0_usize, 0_usize);
    let mut seen: BTreeMap<PromptId, usize> = BTreeMap::new();
    let mut number = 0;
    while let Some(line) = next_line(&mut reader).map_err(read)? {
        number += 1;
        let parsed = match line {
            Line::TooLong(bytes) => Err(format!("the line has {bytes} bytes, more than {LINE_BYTES_MAX}")),
            Line::Bytes(bytes) if bytes.iter().all(u8::is_ascii_whitespace) => continue,
            Line::Bytes(bytes) => prompt_of(&bytes, number == 1, folder),
        };
        lines += 1;
        let checked = parsed.and_then(|prompt| match seen.insert(prompt.id, number) {
            None => Ok(prompt),
            Some(first) => {
                let what = prompt.name.map_or("the same prompt".to_owned(), |id| format!("the id {id:?}"));
                Err(format!("{what} was on line {first} already"))
            }
        });
        match checked {
            Ok(prompt) => prompts.push(prompt),
            Err(reason) => {
                bad += 1;
                if problems.len() < LISTED_MAX {
                    problems.push(LineProblem { file: name.to_owned(), line: number, reason });
                }
            }
        }
    }
    let allowed = if strict { 0 } else { (lines as f64 * SKIPPED_MAX) as usize };
    if bad > allowed {
        return Err(PromptFileError::Lines { more: bad - problems.len(), problems });
    }
    if prompts.is_empty() {
        return Err(PromptFileError::Empty { path: name.to_owned() });
    }
    Ok(Loaded { prompts, skipped: problems })
}

enum Line {
    Bytes(Vec<u8>),
    /// Its length; its bytes were not kept.
    TooLong(usize),
}

/// The next line without its end; never holds more than [`LINE_BYTES_MAX`] bytes.
fn next_line(reader: &mut impl BufRead) -> std::io::Result<Option<Line>> {
    let (mut bytes, mut length, mut any) = (Vec::new(), 0_usize, false);
    loop {
        let chunk = match reader.fill_buf() {
            Ok(chunk) => chunk,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if chunk.is_empty() {
            break;
        }
        any = true;
        let end = chunk.iter().position(|b| *b == b'\n');
        let part = &chunk[..end.unwrap_or(chunk.len())];
        length += part.len();
        if length <= LINE_BYTES_MAX {
            bytes.extend_from_slice(part);
        }
        let used = end.map_or(chunk.len(), |at| at + 1);
        reader.consume(used);
        if end.is_some() {
            break;
        }
    }
    Ok(any.then_some(if length > LINE_BYTES_MAX { Line::TooLong(length) } else { Line::Bytes(bytes) }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPrompt {
    id: Option<Value>,
    prompt: Option<Value>,
    messages: Option<Value>,
    answer: Option<Value>,
    tags: Option<Vec<String>>,
    verifier: Option<String>,
    meta: Option<Value>,
}

const FIELDS: [&str; 7] = ["id", "prompt", "messages", "answer", "tags", "verifier", "meta"];

fn prompt_of(bytes: &[u8], first: bool, folder: &Path) -> Result<Prompt, String> {
    if first && bytes.starts_with(b"\xEF\xBB\xBF") {
        return Err("the file starts with a byte order mark; save it as UTF-8 without BOM".into());
    }
    if bytes.starts_with(b"\xFF\xFE") || bytes.starts_with(b"\xFE\xFF") {
        return Err("the file is UTF-16; save it as UTF-8".into());
    }
    if let Some(at) = bytes.iter().position(|b| *b == 0) {
        return Err(format!("NUL byte at column {}", at + 1));
    }
    let text =
        std::str::from_utf8(bytes).map_err(|e| format!("invalid UTF-8 at column {}", e.valid_up_to() + 1))?;
    if !text.trim_start().starts_with('{') {
        return Err(format!(
            "expected a JSON object, found {:?}",
            text.trim().chars().take(20).collect::<String>()
        ));
    }
    let raw: RawPrompt = match with_columns_in_meta(text)? {
        Some(line) => serde_json::from_value(line).map_err(|error| error.to_string())?,
        None => serde_json::from_str(text).map_err(|error| describe(&error))?,
    };
    checked(raw, folder)
}

/// Measurements before the run, columns "avg@16" and the like, belong into `meta`; files of others have them beside it. `None`
/// where the line has none.
fn with_columns_in_meta(text: &str) -> Result<Option<Value>, String> {
    let column = |key: &str| key.strip_prefix("avg@").is_some_and(|n| n.parse::<u32>().is_ok());
    if !text.contains("\"avg@") {
        return Ok(None);
    }
    let mut line: serde_json::Map<String, Value> =
        serde_json::from_str(text).map_err(|error| describe(&error))?;
    let columns: Vec<String> = line.keys().filter(|key| column(key)).cloned().collect();
    if columns.is_empty() {
        return Ok(None);
    }
    let meta = line
        .remove("meta")
        .filter(|meta| !meta.is_null())
        .unwrap_or_else(|| Value::Object(Default::default()));
    let Value::Object(mut meta) = meta else {
        return Err(format!("`meta` must be an object beside {}, is {}", columns.join(", "), kind(&meta)));
    };
    for key in columns {
        let share = line.remove(&key).filter(|x| x.as_f64().is_some_and(|x| (0.0..=1.0).contains(&x)));
        let share = share.ok_or_else(|| format!("`{key}` must be a share of right answers, 0 to 1"))?;
        meta.insert(key, share);
    }
    line.insert("meta".into(), meta.into());
    Ok(Some(line.into()))
}

/// serde's message with the column, and the nearest field for an unknown one.
fn describe(error: &serde_json::Error) -> String {
    let full = error.to_string();
    let message = full.split(" at line ").next().unwrap_or(&full);
    let mut out = format!("{message} (column {})", error.column());
    if let Some(unknown) = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next()) {
        let nearest = FIELDS.iter().map(|f| (strsim::damerau_levenshtein(f, unknown), f)).min();
        out = format!("unknown field {unknown:?}; the fields are {}", FIELDS.join(", "));
        if let Some((distance, field)) = nearest.filter(|(d, _)| *d <= 2) {
            out = format!("unknown field {unknown:?}, did you mean {field:?}?");
            debug_assert!(distance <= 2);
        }
    }
    out
}

fn checked(raw: RawPrompt, folder: &Path) -> Result<Prompt, String> {
    let name = match raw.id {
        None | Some(Value::Null) => None,
        Some(Value::String(id)) if !id.is_empty() => Some(id),
        Some(Value::Number(id)) => Some(id.to_string()),
        Some(other) => return Err(format!("`id` must be text that is not empty, is {}", kind(&other))),
    };
    let body = match (raw.prompt, raw.messages) {
        (Some(Value::String(text)), None) if !text.is_empty() => PromptBody::Text(text),
        (Some(Value::String(_)), None) => return Err("`prompt` is empty".into()),
        (Some(other), None) => return Err(format!("`prompt` must be text, is {}", kind(&other))),
        (None, Some(messages)) => PromptBody::Messages(messages_of(messages, folder)?),
        (None, None) => return Err("neither `prompt` nor `messages` is there; give one".into()),
        (Some(_), Some(_)) => return Err("both `prompt` and `messages` are there; give one".into()),
    };
    let tags = raw.tags.unwrap_or_default();
    if tags.iter().any(|tag| tag.trim().is_empty()) {
        return Err("`tags` holds an empty tag".into());
    }
    if raw.verifier.as_deref() == Some("") {
        return Err("`verifier` is empty; name one or leave it out".into());
    }
    let answer = raw.answer.filter(|answer| !answer.is_null()).map(|answer| sorted(answer).to_string());
    let meta = raw.meta.filter(|meta| !meta.is_null()).map(|meta| meta.to_string());
    let mut prompt = Prompt { id: PromptId([0; 16]), name, body, answer, tags, verifier: raw.verifier, meta };
    prompt.id = identity(&prompt);
    Ok(prompt)
}

/// From the user's id, else from what is asked and how it is checked. Tags and meta may change without making
/// it another prompt.
fn identity(prompt: &Prompt) -> PromptId {
    if let Some(name) = &prompt.name {
        return PromptId::of(format!("id:{name}").as_bytes());
    }
    let canonical = serde_json::json!([prompt.body, prompt.answer, prompt.verifier]);
    PromptId::of(canonical.to_string().as_bytes())
}

/// Objects with their keys in order, so that the order in the file does not matter.
fn sorted(value: Value) -> Value {
    match value {
        Value::Array(items) => items.into_iter().map(sorted).collect(),
        Value::Object(map) => {
            let ordered: BTreeMap<String, Value> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            Value::Object(ordered.into_iter().collect())
        }
        other => other,
    }
}

/// A conversation. Images are read, their paths start at `folder`.
pub(crate) fn messages_of(value: Value, folder: &Path) -> Result<Vec<Message>, String> {
    let Value::Array(turns) = value else {
        return Err(format!("`messages` must be a list, is {}", kind(&value)));
    };
    if turns.is_empty() {
        return Err("`messages` is empty".into());
    }
    turns
        .into_iter()
        .enumerate()
        .map(|(i, turn)| message_of(turn, folder).map_err(|e| format!("`messages[{i}]`: {e}")))
        .collect()
}

fn message_of(value: Value, folder: &Path) -> Result<Message, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Raw {
        role: String,
        content: Value,
    }
    let raw: Raw = serde_json::from_value(value).map_err(|error| error.to_string())?;
    if !ROLES.contains(&raw.role.as_str()) {
        return Err(format!("unknown role {:?}; the roles are {}", raw.role, ROLES.join(", ")));
    }
    let content = match raw.content {
        Value::String(text) => MessageContent::Text(text),
        Value::Array(parts) => {
            let parts = parts.into_iter().map(|part| part_of(part, folder));
            MessageContent::Parts(parts.collect::<Result<_, _>>()?)
        }
        other => return Err(format!("`content` must be text or a list of parts, is {}", kind(&other))),
    };
    Ok(Message { role: raw.role, content })
}

fn part_of(value: Value, folder: &Path) -> Result<ContentPart, String> {
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
    enum Raw {
        Text { text: String },
        Image { path: String },
    }
    match serde_json::from_value(value) {
        Ok(Raw::Text { text }) => Ok(ContentPart::Text(text)),
        Ok(Raw::Image { path }) => Ok(ContentPart::Image(crate::images::read(&path, folder)?)),
        Err(error) => Err(format!(
            "a content part is {{\"type\":\"text\",\"text\"}} or {{\"type\":\"image\",\"path\"}}: {error}"
        )),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(text) if text.is_empty() => "empty",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::{Shape, ShapesItem};

    fn read(text: &[u8]) -> Result<Loaded, PromptFileError> {
        parse(text, "p.jsonl", Path::new("."), true)
    }

    #[test]
    fn a_good_file_keeps_every_field() {
        let text = r#"{"prompt":"1+1=?","answer":2,"tags":["math"],"verifier":"number","meta":{"b":1,"a":2}}

{"id":"chat-1","messages":[{"role":"user","content":"hi"},{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}],"answer":{"b":1,"a":[true]}}
{"id":7,"prompt":"<|eot|>\u001b[2J"}"#;
        let prompts = read(text.as_bytes()).unwrap().prompts;
        assert_eq!(prompts.len(), 3);
        assert_eq!(prompts[0].answer.as_deref(), Some("2"));
        assert_eq!(prompts[0].meta.as_deref(), Some(r#"{"b":1,"a":2}"#));
        assert_eq!(prompts[1].name.as_deref(), Some("chat-1"));
        assert_eq!(prompts[1].answer.as_deref(), Some(r#"{"a":[true],"b":1}"#));
        let PromptBody::Messages(turns) = &prompts[1].body else { panic!("a conversation") };
        assert!(matches!(&turns[1].content, MessageContent::Parts(parts) if parts.len() == 2));
        assert_eq!(prompts[2].body, PromptBody::Text("<|eot|>\u{1b}[2J".into()));
    }

    #[test]
    fn measurements_before_the_run_go_into_meta_and_lines_come_back_as_they_were() {
        let text = r#"{"id":"a","prompt":"1+1=?","answer":2,"tags":["math"],"avg@16":0.25,"meta":{"b":1}}"#;
        let prompts = read(text.as_bytes()).unwrap().prompts;
        assert_eq!(prompts[0].meta.as_deref(), Some(r#"{"b":1,"avg@16":0.25}"#));
        let again = read(line_of(&prompts[0]).unwrap().to_string().as_bytes()).unwrap().prompts;
        assert_eq!(again, prompts);
        let error = read(br#"{"prompt":"x","avg@16":2}"#).unwrap_err().to_string();
        assert_eq!(error, "p.jsonl:1: `avg@16` must be a share of right answers, 0 to 1");
        let error = read(br#"{"prompt":"x","avg@":0.5}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field \"avg@\""), "{error}");
    }

    #[test]
    fn images_are_read_from_beside_the_file_and_make_the_identity() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        let image = ShapesItem::new(&[Shape::Square; 3], Shape::Square).png();
        write("a.png", &image);
        write("same.png", &image);
        write("b.png", &ShapesItem::new(&[Shape::Square; 4], Shape::Square).png());
        write("cut.png", &image[..20]);
        write("huge.png", &vec![0; freewheel_types::MAX_IMAGE_BYTES + 1]);
        let read = |path: &str| {
            let part = serde_json::json!({"type": "image", "path": path});
            let line = serde_json::json!({"messages": [{"role": "user", "content": [part]}]});
            parse(line.to_string().as_bytes(), "p.jsonl", dir.path(), true)
        };
        let prompt = |path: &str| read(path).unwrap().prompts.remove(0);
        let PromptBody::Messages(turns) = &prompt("a.png").body else { panic!("a conversation") };
        let MessageContent::Parts(parts) = &turns[0].content else { panic!("parts") };
        assert!(
            matches!(&parts[0], ContentPart::Image(part) if part.bytes() == image && part.path() == "a.png")
        );
        assert_eq!(prompt("a.png").id, prompt("same.png").id);
        assert_ne!(prompt("a.png").id, prompt("b.png").id);
        for (path, reason) in [
            ("none.png", "image none.png: cannot be read"),
            ("cut.png", "image cut.png: not a readable PNG"),
            ("huge.png", "image huge.png: 4194305 bytes, more than the limit of 4194304"),
        ] {
            let error = read(path).unwrap_err().to_string();
            assert!(error.starts_with("p.jsonl:1: ") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn identity_follows_the_question_not_the_tags() {
        let id = |line: &str| read(line.as_bytes()).unwrap().prompts[0].id;
        let base = id(r#"{"prompt":"q","answer":{"x":1,"y":2}}"#);
        assert_eq!(base, id(r#"{"answer":{"y":2,"x":1},"tags":["t"],"prompt":"q"}"#));
        assert_ne!(base, id(r#"{"prompt":"q","answer":{"x":1,"y":3}}"#));
        assert_ne!(base, id(r#"{"prompt":"q","verifier":"exact","answer":{"x":1,"y":2}}"#));
        assert_eq!(id(r#"{"id":"a","prompt":"q"}"#), id(r#"{"id":"a","prompt":"other"}"#));
    }

    #[test]
    fn every_bad_line_says_where_and_why() {
        let cases: [(&[u8], &str); 20] = [
            (b"{\"prompt\":\"a\xff\"}", "invalid UTF-8 at column 13"),
            (b"\xEF\xBB\xBF{\"prompt\":\"a\"}", "byte order mark"),
            (b"\xFF\xFE{\0", "UTF-16"),
            (b"{\"prompt\":\"a\0b\"}", "NUL byte at column 13"),
            (b"[1]", "expected a JSON object"),
            (b"hello", "expected a JSON object, found \"hello\""),
            (b"{\"prompt\":\"a\"", "EOF while parsing"),
            (b"{\"prompt\":\"a\"} {}", "trailing characters"),
            (b"{\"promt\":\"a\"}", "unknown field \"promt\", did you mean \"prompt\"?"),
            (b"{\"prompt\":\"a\",\"zzzzzz\":1}", "the fields are id, prompt"),
            (b"{\"prompt\":\"a\",\"prompt\":\"b\"}", "duplicate field `prompt`"),
            (b"{\"prompt\":7}", "`prompt` must be text, is a number"),
            (b"{\"prompt\":\"\"}", "`prompt` is empty"),
            (b"{\"answer\":1}", "neither `prompt` nor `messages`"),
            (b"{\"prompt\":\"a\",\"messages\":[]}", "both `prompt` and `messages`"),
            (b"{\"messages\":[]}", "`messages` is empty"),
            (
                b"{\"messages\":[{\"role\":\"robot\",\"content\":\"a\"}]}",
                "`messages[0]`: unknown role \"robot\"",
            ),
            (b"{\"messages\":[{\"role\":\"user\"}]}", "missing field `content`"),
            (b"{\"prompt\":\"a\",\"tags\":\"math\"}", "expected a sequence"),
            (b"{\"id\":\"\",\"prompt\":\"a\"}", "`id` must be text that is not empty"),
        ];
        for (line, expected) in cases {
            let error = read(line).unwrap_err().to_string();
            assert!(
                error.starts_with("p.jsonl:1: ") && error.contains(expected),
                "{error:?} lacks {expected:?}"
            );
        }
    }

    #[test]
    fn all_problems_are_listed_up_to_a_limit() {
        let mut text = b"{\"prompt\":\"a\"}\n{\"prompt\":\"a\"}\n".to_vec();
        text.extend(b"x\n".repeat(LISTED_MAX + 5));
        let error = read(&text).unwrap_err().to_string();
        assert!(error.contains("p.jsonl:2: the same prompt was on line 1 already"), "{error}");
        assert!(
            error.contains("p.jsonl:51: expected")
                && !error.contains("p.jsonl:52:")
                && error.ends_with("… and 6 more bad lines"),
            "{error}"
        );
    }

    #[test]
    fn a_huge_line_is_refused_without_being_held() {
        let mut text = b"{\"prompt\":\"".to_vec();
        text.extend(std::iter::repeat_n(b'a', LINE_BYTES_MAX + 1));
        text.extend(b"\"}\n{\"prompt\":\"b\"}\n");
        let error = read(&text).unwrap_err().to_string();
        assert!(error.contains(&format!("p.jsonl:1: the line has {} bytes", text.len() - 16)), "{error}");
    }

    #[test]
    fn a_lenient_read_skips_one_in_a_thousand_and_no_more() {
        let good: String = (0..1999).map(|i| format!("{{\"prompt\":\"{i}\"}}\n")).collect();
        let loaded = parse(format!("{good}x\n").as_bytes(), "p", Path::new("."), false).unwrap();
        assert_eq!((loaded.prompts.len(), loaded.skipped.len()), (1999, 1));
        assert!(parse(format!("{good}x\n").as_bytes(), "p", Path::new("."), true).is_err());
        assert!(parse(format!("{good}x\ny\nz\n").as_bytes(), "p", Path::new("."), false).is_err());
    }

    #[test]
    fn a_file_without_prompts_or_without_existence_is_an_error() {
        assert!(matches!(read(b"\n \n"), Err(PromptFileError::Empty { .. })));
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(&dir.path().join("none"), true), Err(PromptFileError::Read { .. })));
        assert!(matches!(load(dir.path(), true), Err(PromptFileError::Read { .. })));
    }
}
