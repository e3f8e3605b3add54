//! `freewheel tokenize`: text or messages to ids, and back.

use std::path::{Path, PathBuf};

use clap::Args;
use freewheel_model::{RenderOptions, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};

use super::fail::Explain as _;
use crate::lines;

/// Text or messages to ids through the model's tokenizer and chat template, and back.
///
/// A line of input holds `text`, `messages` or `input_ids`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel tokenize --model assets/sprout --text '17+25=?'\n  \
    freewheel tokenize --model models/smollm2 --chat 'Hello' --render\n  \
    freewheel tokenize --model assets/sprout --ids 12,5,9")]
pub struct TokenizeArgs {
    /// Model folder (only its tokenizer is read) or .gguf file.
    #[arg(long, short)]
    model: PathBuf,
    /// JSONL file; `-` reads standard input.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["text", "chat", "ids"])]
    input: Option<PathBuf>,
    /// A text, as plain text: special tokens in it are not interpreted.
    #[arg(long, value_name = "TEXT")]
    text: Vec<String>,
    /// A user message that goes through the chat template.
    #[arg(long, value_name = "TEXT")]
    chat: Vec<String>,
    /// Ids to turn back into text: `12,5,9`.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    ids: Vec<u32>,
    /// Leave out the header of the assistant's turn that is put behind messages.
    #[arg(long)]
    no_generation_prompt: bool,
    /// Add `rendered`: the chat template's text.
    #[arg(long)]
    render: bool,
}

#[derive(Debug, Default, Deserialize)]
struct Line {
    id: Option<Value>,
    text: Option<String>,
    messages: Option<Vec<Value>>,
    input_ids: Option<Vec<u32>>,
}

impl Line {
    fn check(&self) -> Result<(), String> {
        match [self.input_ids.is_some(), self.text.is_some(), self.messages.is_some()]
            .iter()
            .filter(|x| **x)
            .count()
        {
            1 => Ok(()),
            _ => Err("must hold one of `text`, `messages`, `input_ids`".into()),
        }
    }
}

impl TokenizeArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        // How images are cut up hangs on the model's configuration, which `open` reads.
        let text_only = !self.model.join("preprocessor_config.json").exists();
        let tokenizer = if text_only && self.model.join("tokenizer.json").exists() {
            std::sync::Arc::new(Tokenizer::from_folder(&self.model).input()?)
        } else {
            crate::policy::open(&self.model, None)?.tokenizer
        };
        for (at, line) in self.lines()? {
            let row =
                self.row(&tokenizer, &line).map_err(|error| error.context(format!("line {at}"))).input()?;
            println!("{row}");
        }
        Ok(())
    }

    fn lines(&self) -> anyhow::Result<Vec<(usize, Line)>> {
        let mut lines = match &self.input {
            Some(path) => lines::read(path, Line::check)?,
            None => Vec::new(),
        };
        let texts = self.text.iter().map(|text| Line { text: Some(text.clone()), ..Line::default() });
        let chats = self.chat.iter().map(|text| Line {
            messages: Some(vec![json!({"role": "user", "content": text})]),
            ..Line::default()
        });
        let ids =
            (!self.ids.is_empty()).then(|| Line { input_ids: Some(self.ids.clone()), ..Line::default() });
        lines.extend(texts.chain(chats).chain(ids).enumerate().map(|(index, line)| (index + 1, line)));
        Ok(lines)
    }

    /// Where paths of images start.
    fn folder(&self) -> PathBuf {
        self.input.as_deref().and_then(Path::parent).map(Path::to_owned).unwrap_or_default()
    }

    fn row(&self, tokenizer: &Tokenizer, line: &Line) -> anyhow::Result<Value> {
        let mut row = serde_json::Map::new();
        if let Some(id) = &line.id {
            row.insert("id".into(), id.clone());
        }
        let ids = match (&line.messages, &line.input_ids) {
            (Some(messages), _) => {
                let options = RenderOptions {
                    add_generation_prompt: !self.no_generation_prompt,
                    ..RenderOptions::default()
                };
                if self.render {
                    row.insert("rendered".into(), json!(tokenizer.render_json(messages, &options)?));
                }
                let images =
                    crate::images::of_messages(messages, &self.folder()).map_err(anyhow::Error::msg)?;
                tokenizer.encode_chat_with_images(messages, &options, &images)?.ids
            }
            (None, Some(ids)) => {
                let size = tokenizer.vocab_size();
                if let Some(id) = ids.iter().find(|id| **id as usize >= size) {
                    anyhow::bail!("token id {id} is not in the vocabulary of {size}");
                }
                ids.clone()
            }
            (None, None) => tokenizer.encode(line.text.as_deref().unwrap_or_default())?,
        };
        row.insert("input_ids".into(), json!(ids));
        row.insert(
            "tokens".into(),
            json!(ids.iter().map(|id| tokenizer.id_to_token(*id)).collect::<Vec<_>>()),
        );
        row.insert("text".into(), json!(tokenizer.decode_all(&ids)));
        Ok(Value::Object(row))
    }
}
