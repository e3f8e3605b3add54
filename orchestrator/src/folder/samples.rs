//! `rollouts/`: a few samples of every step with everything that was said about them, in files of bounded size.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use freewheel_types::{ContentPart, GroupFate, MessageContent, PromptBody, ScoredRollout};
use serde_json::{Value, json};

use super::names;
use super::writer::keep_before;
use crate::cli::reward_json;
use crate::config::LogSection;

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
    /// Writes samples of each learner step to the run folder `run_dir`, as many and in files as large as `log` says.
    pub fn new(run_dir: &Path, log: &LogSection) -> Self {
        Self {
            dir: run_dir.join(names::ROLLOUTS),
            per_step: log.rollouts_per_step,
            file_bytes: log.rollouts_file_bytes,
            state: Mutex::default(),
        }
    }

    /// Offers a rollout that ended as `fate` says when the learner's weights were at `step`.
    pub fn offer(&self, step: u64, scored: &ScoredRollout, fate: GroupFate) {
        let mut state = self.state.lock().expect("no holder of the lock panics");
        if state.step.is_none()
            && let Err(error) = self.forget_from(step)
        {
            tracing::warn!(%error, dir = %self.dir.display(), "samples of steps that are made again stay");
        }
        if state.step != Some(step) {
            state.step = Some(step);
            state.written = 0;
        }
        if state.written >= self.per_step {
            return;
        }
        state.written += 1;
        if let Err(error) = self.write(&mut state, step, scored, fate) {
            tracing::warn!(%error, dir = %self.dir.display(), "sample not written");
            state.file = None;
        }
    }

    fn write(
        &self,
        state: &mut State,
        step: u64,
        scored: &ScoredRollout,
        fate: GroupFate,
    ) -> std::io::Result<()> {
        if state.file.is_none() || state.bytes >= self.file_bytes {
            let path = self.dir.join(format!("rollouts-{step:08}.jsonl"));
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            state.bytes = file.metadata()?.len();
            state.file = Some(BufWriter::new(file));
            self.rotate()?;
        }
        let line = sample(step, scored, fate).to_string() + "\n";
        state.bytes += line.len() as u64;
        if let Some(file) = &mut state.file {
            file.write_all(line.as_bytes())?;
            file.flush()?;
        }
        Ok(())
    }

    /// Files of samples, oldest first.
    fn files(&self) -> std::io::Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(&self.dir)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
            .collect();
        files.sort();
        Ok(files)
    }

    /// After a resume the learner makes some steps again: their old samples give way.
    fn forget_from(&self, step: u64) -> std::io::Result<()> {
        self.files()?.iter().try_for_each(|path| keep_before(path, step).map(drop))
    }

    fn rotate(&self) -> std::io::Result<()> {
        let files = self.files()?;
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

fn sample(step: u64, scored: &ScoredRollout, fate: GroupFate) -> Value {
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
        "fate": fate,
    });
    if let (Some(row), Value::Object(reward)) = (row.as_object_mut(), reward_json(&scored.reward)) {
        row.extend(reward);
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_steps_that_are_made_again_are_forgotten() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let log = SampleLog::new(run.path(), &LogSection::default());
        std::fs::create_dir(&log.dir).expect("the folder of samples");
        let file = |first: u64| log.dir.join(format!("rollouts-{first:08}.jsonl"));
        let lines =
            |steps: &[u64]| steps.iter().map(|step| format!("{{\"step\":{step}}}\n")).collect::<String>();
        std::fs::write(file(0), lines(&[0, 1, 2])).expect("samples");
        std::fs::write(file(2), lines(&[2, 3]) + "{\"step\":4,\"to").expect("samples");
        log.forget_from(3).expect("the files are there");
        let kept = |first| std::fs::read_to_string(file(first)).expect("a file");
        assert_eq!((kept(0), kept(2)), (lines(&[0, 1, 2]), lines(&[2])));
    }
}
