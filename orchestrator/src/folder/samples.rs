//! `rollouts/`: a few samples of every step with everything that was said about them, in files of bounded size.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use freewheel_types::{ContentPart, MessageContent, PromptBody, ScoredRollout};
use serde_json::{Value, json};

use crate::cli::reward_json;

/// Files kept; the first one and the newest ones, so that a report can compare start and end.
const FILES_KEPT: usize = 64;

/// Writes samples. Shared by whoever sees rollouts; a full disk costs samples, never the run.
#[derive(Debug)]
pub struct SampleLog {
    dir: PathBuf,
    per_step: u32,
    file_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    step: Option<u64>,
    written: u32,
    bytes: u64,
    file: Option<BufWriter<File>>,
}

impl SampleLog {
    /// Writes up to `per_step` samples of each learner step to files of about `file_bytes` in `dir`.
    pub fn new(dir: &Path, per_step: u32, file_bytes: u64) -> Self {
        Self { dir: dir.to_owned(), per_step, file_bytes, state: Mutex::default() }
    }

    /// Offers a rollout that the learner took in while its weights were at `step`.
    pub fn offer(&self, step: u64, scored: &ScoredRollout) {
        let mut state = self.state.lock().expect("no holder of the lock panics");
        if state.step != Some(step) {
            state.step = Some(step);
            state.written = 0;
        }
        if state.written >= self.per_step {
            return;
        }
        state.written += 1;
        if let Err(error) = self.write(&mut state, step, scored) {
            tracing::warn!(%error, dir = %self.dir.display(), "sample not written");
            state.file = None;
        }
    }

    fn write(&self, state: &mut State, step: u64, scored: &ScoredRollout) -> std::io::Result<()> {
        if state.file.is_none() || state.bytes >= self.file_bytes {
            let path = self.dir.join(format!("rollouts-{step:08}.jsonl"));
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            state.bytes = file.metadata()?.len();
            state.file = Some(BufWriter::new(file));
            self.rotate()?;
        }
        let line = sample(step, scored).to_string() + "\n";
        state.bytes += line.len() as u64;
        if let Some(file) = &mut state.file {
            file.write_all(line.as_bytes())?;
            file.flush()?;
        }
        Ok(())
    }

    fn rotate(&self) -> std::io::Result<()> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(&self.dir)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
            .collect();
        files.sort();
        let surplus = files.len().saturating_sub(FILES_KEPT);
        files.iter().skip(1).take(surplus).try_for_each(std::fs::remove_file)
    }
}

fn part(part: &ContentPart) -> Value {
    match part {
        ContentPart::Text(text) => json!({"type": "text", "text": text}),
        ContentPart::Image(image) => json!({"type": "image", "path": image.path()}),
    }
}

fn sample(step: u64, scored: &ScoredRollout) -> Value {
    let rollout = &scored.rollout;
    let prompt = match &rollout.prompt.body {
        PromptBody::Text(text) => json!(text),
        PromptBody::Messages(turns) => turns
            .iter()
            .map(|turn| {
                let content = match &turn.content {
                    MessageContent::Text(text) => json!(text),
                    MessageContent::Parts(parts) => parts.iter().map(part).collect(),
                };
                json!({"role": turn.role, "content": content})
            })
            .collect(),
    };
    let answer = rollout.prompt.answer.as_ref().and_then(|answer| serde_json::from_str::<Value>(answer).ok());
    let version = |version: Option<freewheel_types::PolicyVersion>| version.map(|v| v.step);
    let mut row = json!({
        "step": step,
        "id": rollout.id.to_string(),
        "group": rollout.id.task().0,
        "prompt": prompt,
        "question": rollout.prompt.question(),
        "answer": answer,
        "tags": rollout.prompt.tags,
        "text": rollout.text,
        "tokens": rollout.len(),
        "finish_reason": rollout.finish_reason,
        "version_oldest": version(rollout.version_oldest()),
        "version_newest": version(rollout.version_newest()),
        "logprob_mean": rollout.behaviour_logprobs.iter().map(|x| f64::from(*x)).sum::<f64>() / rollout.len().max(1) as f64,
        "actor": rollout.actor.to_string(),
    });
    if let (Some(row), Value::Object(reward)) = (row.as_object_mut(), reward_json(&scored.reward)) {
        row.extend(reward);
    }
    row
}
