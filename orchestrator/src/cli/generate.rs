//! `freewheel generate`: prompts in, completions out, on the actor's engine.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use freewheel_actor::{EngineConfig, Finished, Request, SampleSpec, StopSpec};
use freewheel_model::vision::EncodedPrompt;
use freewheel_model::{LoadedModel, RenderOptions};
use freewheel_types::{MAX_GROUP_SIZE, PromptBody, TaskId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::fail::Explain as _;
use super::model::{ModelArgs, SamplingArgs};
use crate::lines;

/// Generate completions: JSONL in, JSONL out.
///
/// A line holds `prompt` (text as it is), `messages` (through the chat template) or `input_ids`; optionally `id` and
/// `max_new_tokens`. Messages may hold images, `{"type":"image","path":…}`, with paths from the input file's folder. Out comes a line for each completion with `output_ids`, `text`, `logprobs`, `finish_reason`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  freewheel generate --model assets/sprout --prompt '17+25-9=?' --greedy\n  \
    freewheel generate --model models/smollm2 --chat 'Name three trees.' --max-new-tokens 64 --text\n  \
    freewheel generate --model assets/sprout --input prompts.jsonl --samples 8 > completions.jsonl"
)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// JSONL file of prompts; `-` reads standard input.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["prompt", "chat"])]
    input: Option<PathBuf>,
    /// A prompt as plain text; may be repeated.
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// A user message that goes through the chat template; may be repeated.
    #[arg(long, value_name = "TEXT")]
    chat: Vec<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Longest completion, tokens.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Completions per prompt.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_GROUP_SIZE)))]
    samples: u32,
    /// Sampling seed: the same seed draws the same tokens, whatever else is in the batch.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A string that ends a completion; may be repeated.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past end-of-sequence tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// Completions decoded at once.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Memory for keys and values, MiB.
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    kv_mib: u64,
    /// Print only the texts, not JSON lines.
    #[arg(long)]
    text: bool,
    /// Write to this file instead of standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// One line of input. Other keys (`answer`, `tags` …) are carried by prompt files and mean nothing here.
#[derive(Debug, Default, Deserialize)]
struct Line {
    id: Option<Value>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    input_ids: Option<Vec<u32>>,
    max_new_tokens: Option<usize>,
}

impl Line {
    fn check(&self) -> Result<(), String> {
        let given = [self.prompt.is_some(), self.messages.is_some(), self.input_ids.is_some()];
        match given.iter().filter(|given| **given).count() {
            1 => Ok(()),
            0 => Err("holds none of `prompt`, `messages`, `input_ids`".into()),
            _ => Err("holds more than one of `prompt`, `messages`, `input_ids`".into()),
        }
    }

    /// Ids and image tiles; paths of images start at `folder`.
    fn encode(&self, loaded: &LoadedModel, folder: &Path) -> anyhow::Result<EncodedPrompt> {
        if let Some(ids) = &self.input_ids {
            return Ok(EncodedPrompt { ids: ids.clone(), tiles: Vec::new() });
        }
        if let Some(messages) = &self.messages {
            let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
            let images = crate::images::of_messages(messages, folder).map_err(anyhow::Error::msg)?;
            return Ok(loaded.tokenizer.encode_chat_with_images(messages, &options, &images)?);
        }
        let text = self.prompt.clone().unwrap_or_default();
        Ok(loaded.tokenizer.encode_prompt(&PromptBody::Text(text))?)
    }
}

impl GenerateArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let lines = self.lines()?;
        let loaded = self.model.open()?;
        let sampling = self.sampling.params(&loaded)?;
        let config = EngineConfig {
            max_live: self.batch as usize,
            kv_bytes: self.kv_mib << 20,
            ..EngineConfig::default()
        };
        let mut engine = crate::policy::engine(&loaded, &self.model.threads(), config)?;
        let eos = if self.ignore_eos { Vec::new() } else { loaded.generation.eos_ids.clone() };
        let stop = StopSpec { ids: eos.into(), strings: self.stop.clone().into() };
        let folder = self.input.as_deref().and_then(Path::parent).unwrap_or(Path::new(""));
        for (index, (at, line)) in lines.iter().enumerate() {
            let prompt =
                line.encode(&loaded, folder).map_err(|error| error.context(format!("line {at}"))).input()?;
            let task = TaskId(index as u64);
            let request = Request {
                id: index as u64,
                prompt_ids: prompt.ids,
                tiles: prompt.tiles,
                samples: (0..self.samples).map(|k| SampleSpec { rollout: task.rollout(k) }).collect(),
                seed: self.seed,
                sampling,
                max_new_tokens: line.max_new_tokens.unwrap_or(self.max_new_tokens as usize),
                stop: stop.clone(),
            };
            engine
                .submit(request)
                .map_err(|error| anyhow::Error::from(error).context(format!("line {at}")))
                .input()?;
        }
        let mut out = self.writer()?;
        // Completions end in any order; lines come out in the order of the input.
        let mut waiting: BTreeMap<(u64, u32), Finished> = BTreeMap::new();
        let mut next = (0, 0);
        while !engine.is_idle() {
            for done in engine.step() {
                waiting.insert((done.request, done.rollout.index()), done);
            }
            while let Some(done) = waiting.remove(&next) {
                self.write(&mut out, &lines[next.0 as usize].1, &done)?;
                next = if next.1 + 1 < self.samples { (next.0, next.1 + 1) } else { (next.0 + 1, 0) };
            }
        }
        out.flush()?;
        Ok(())
    }

    fn lines(&self) -> anyhow::Result<Vec<(usize, Line)>> {
        let mut lines = match &self.input {
            Some(path) => lines::read(path, Line::check)?,
            None => Vec::new(),
        };
        let texts = self.prompt.iter().map(|text| Line { prompt: Some(text.clone()), ..Line::default() });
        let chats = self.chat.iter().map(|text| Line {
            messages: Some(vec![json!({"role": "user", "content": text})]),
            ..Line::default()
        });
        lines.extend(texts.chain(chats).enumerate().map(|(index, line)| (index + 1, line)));
        Ok(lines)
    }

    fn writer(&self) -> anyhow::Result<Box<dyn std::io::Write>> {
        Ok(match &self.output {
            Some(path) => Box::new(std::io::BufWriter::new(
                std::fs::File::create(path)
                    .map_err(|error| {
                        anyhow::Error::from(error).context(format!("{} cannot be written", path.display()))
                    })
                    .input()?,
            )),
            None => Box::new(std::io::BufWriter::new(std::io::stdout())),
        })
    }

    fn write(&self, out: &mut impl std::io::Write, line: &Line, done: &Finished) -> std::io::Result<()> {
        if self.text {
            return writeln!(out, "{}", done.text);
        }
        let mut row = serde_json::Map::new();
        if let Some(id) = &line.id {
            row.insert("id".into(), id.clone());
        }
        row.insert("index".into(), json!(done.request));
        row.insert("sample".into(), json!(done.rollout.index()));
        row.insert("input_ids".into(), json!(&*done.prompt_ids));
        row.insert("output_ids".into(), json!(done.output_ids));
        row.insert("text".into(), json!(done.text));
        row.insert("logprobs".into(), json!(done.behaviour_logprobs));
        row.insert("finish_reason".into(), json!(done.finish_reason));
        writeln!(out, "{}", Value::Object(row))
    }
}
