//! A model as a judge: reward models and classifiers, scored on our own kernels.
//!
//! ```text
//! prompt, completion ─► ids (chat template, or segments) ─► batch with what other threads bring ─► label's score
//! ```
//!
//! Completions that arrive together share a forward pass: the thread that finds no pass under way leads one for all
//! that wait. A score does not depend on its batch, so neither does a reward. Special tokens in a prompt or completion are plain
//! text. An input that does not fit is unscored, or cut with a note in the record; never cut silently.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::activation::sigmoid;
use freewheel_kernels::softmax::softmax_row;
use freewheel_model::{Framed, ModelError, RenderOptions, Scorer, ScorerInfo, Tokenizer};
use freewheel_types::{ContentPart, Message, MessageContent, Prompt, PromptBody};

use crate::batcher::Batcher;
use crate::config::{ComponentConfig, ModelInput, ModelOutput, OverlongInput};
use crate::guard::prompt_text;
use crate::shared::{Shared, chain};
use crate::stack::{Completion, Component, Judgement, Unscored};

/// Completions in one forward pass, where the configuration says nothing.
const BATCH: usize = 8;
/// More than these would only hold memory.
pub(crate) const BATCH_MAX: usize = 1024;

/// What a component asks of its model; checked against the model's files.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    dir: PathBuf,
    input: ModelInput,
    label: usize,
    output: ModelOutput,
    max_tokens: usize,
    cut: bool,
    batch: usize,
}

impl Plan {
    /// Reads the model's configuration and tokenizer, not its weights; problems as (key, message).
    pub(crate) fn new(c: &ComponentConfig) -> Result<Self, Vec<(&'static str, String)>> {
        let Some(path) = c.model.as_deref().filter(|path| !path.is_empty()) else {
            return Err(vec![(
                "model",
                "is not set; give the folder of a reward model or classifier".into(),
            )]);
        };
        let info = ScorerInfo::read(Path::new(path)).map_err(|e| vec![("model", chain(&e))])?;
        let mut problems = Vec::new();
        let input = check_input(c.input, &info).unwrap_or_else(|message| {
            problems.push(("input", message));
            ModelInput::Response
        });
        let label = choose_label(c.label.as_deref(), &info.labels).unwrap_or_else(|message| {
            problems.push(("label", message));
            0
        });
        let max_tokens = c.max_tokens.map_or(info.max_tokens, |n| n as usize);
        if !(1..=info.max_tokens).contains(&max_tokens) {
            let message =
                format!("must be 1 to {} (what the model was made for), is {max_tokens}", info.max_tokens);
            problems.push(("max_tokens", message));
        }
        let batch = c.batch.unwrap_or(BATCH);
        if !(1..=BATCH_MAX).contains(&batch) {
            problems.push(("batch", format!("must be 1 to {BATCH_MAX}, is {batch}")));
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let output = match c.output {
            ModelOutput::Auto if info.labels.len() == 1 => ModelOutput::Logit,
            ModelOutput::Auto => ModelOutput::Probability,
            chosen => chosen,
        };
        let cut = c.overlong == OverlongInput::Cut;
        Ok(Self { dir: path.into(), input, label, output, max_tokens, cut, batch })
    }
}

fn check_input(asked: ModelInput, info: &ScorerInfo) -> Result<ModelInput, String> {
    let template = info.tokenizer.has_template();
    match asked {
        ModelInput::Auto if info.encoder => Ok(ModelInput::Response),
        ModelInput::Auto if template => Ok(ModelInput::Chat),
        ModelInput::Auto => Err(format!(
            "{} has no chat template; choose \"pair\", \"response\" or \"prompt\"",
            info.architecture
        )),
        ModelInput::Chat if !template => {
            Err("the model has no chat template; choose \"pair\", \"response\" or \"prompt\"".into())
        }
        other => Ok(other),
    }
}

/// A name of `labels`, or an index into them.
pub(crate) fn choose_label(asked: Option<&str>, labels: &[String]) -> Result<usize, String> {
    let known = || {
        let shown: Vec<_> =
            labels.iter().take(20).enumerate().map(|(i, name)| format!("{i} {name:?}")).collect();
        shown.join(", ")
    };
    match asked {
        None if labels.len() == 1 => Ok(0),
        None => Err(format!("the model has several labels; choose one of {}", known())),
        Some(asked) => labels
            .iter()
            .position(|name| name == asked)
            .or_else(|| asked.parse().ok().filter(|i| *i < labels.len()))
            .ok_or_else(|| format!("the model has no label {asked:?}; it has {}", known())),
    }
}

pub(crate) static SCORERS: Shared<Scorer> = Shared::new();

/// The component.
pub(crate) struct ModelJudge {
    plan: Plan,
    scorer: Arc<Scorer>,
    threads: Threads,
    batcher: Batcher,
}

impl ModelJudge {
    /// Loads the model.
    pub(crate) fn new(plan: Plan, threads: usize) -> Result<Self, String> {
        let threads = Threads::new(threads);
        let scorer = SCORERS.load(&plan.dir, |dir| Scorer::load(dir, &threads)).map_err(|e| chain(&e))?;
        Ok(Self { batcher: Batcher::new(plan.batch), plan, scorer, threads })
    }

    /// The input as ids, and a note where it was cut.
    fn encode(&self, completion: &Completion<'_>) -> Result<(Framed, Option<String>), Unscored> {
        let tokenizer = &self.scorer.info().tokenizer;
        let failed = |e: ModelError| Unscored(e.to_string());
        if self.plan.input != ModelInput::Response && holds_image(completion.prompt) {
            return Err(Unscored("the prompt holds an image, which this model cannot see".into()));
        }
        if self.plan.input == ModelInput::Chat {
            let options = RenderOptions { add_generation_prompt: false, ..RenderOptions::default() };
            let ids = tokenizer.encode_messages(&conversation(completion), &options).map_err(failed)?.ids;
            let note = self.excess(ids.len())?;
            let kept = ids[ids.len().saturating_sub(self.plan.max_tokens)..].to_vec();
            return Ok((Framed { token_types: vec![0; kept.len()], ids: kept }, note));
        }
        let prompt = || tokenizer.encode(prompt_text(completion.prompt).trim_end()).map_err(failed);
        let response = || tokenizer.encode(completion.text).map_err(failed);
        let (first, second) = match self.plan.input {
            ModelInput::Pair => (prompt()?, Some(response()?)),
            ModelInput::Prompt => (prompt()?, None),
            _ => (response()?, None),
        };
        self.segments(tokenizer, &first, second.as_deref())
    }

    /// Frames segments; cuts the start of the first, then of the second, where that is asked for.
    fn segments(
        &self,
        tokenizer: &Tokenizer,
        first: &[u32],
        second: Option<&[u32]>,
    ) -> Result<(Framed, Option<String>), Unscored> {
        let frame = |first: &[u32], second: Option<&[u32]>| {
            tokenizer.frame(first, second).map_err(|e| Unscored(e.to_string()))
        };
        let whole = frame(first, second)?;
        let Some(note) = self.excess(whole.ids.len())? else { return Ok((whole, None)) };
        let excess = whole.ids.len() - self.plan.max_tokens;
        let from_first = excess.min(first.len());
        let from_second = excess - from_first;
        if from_second > second.map_or(0, <[u32]>::len) {
            return Err(Unscored(format!("max_tokens = {} leaves no room for text", self.plan.max_tokens)));
        }
        let cut = frame(&first[from_first..], second.map(|second| &second[from_second..]))?;
        Ok((cut, Some(note)))
    }

    /// `None` if `tokens` fit, a note if they are to be cut.
    fn excess(&self, tokens: usize) -> Result<Option<String>, Unscored> {
        let limit = self.plan.max_tokens;
        match tokens {
            0 => Err(Unscored("there is nothing to score".into())),
            _ if tokens <= limit => Ok(None),
            _ if self.plan.cut => Ok(Some(format!("cut {} of {tokens} tokens", tokens - limit))),
            _ => Err(Unscored(format!("{tokens} tokens, more than max_tokens = {limit}"))),
        }
    }

    fn value(&self, mut scores: Vec<f32>) -> f32 {
        if self.plan.output == ModelOutput::Logit {
            return scores[self.plan.label];
        }
        if scores.len() == 1 {
            let mut probability = [0.0];
            sigmoid(&scores, &mut probability);
            return probability[0];
        }
        softmax_row(&mut scores);
        scores[self.plan.label]
    }
}

impl Component for ModelJudge {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        let (input, detail) = self.encode(completion)?;
        let scores = self.batcher.score(input, |batch| self.scorer.score(&self.threads, batch))?;
        Ok(Judgement { value: self.value(scores), detail, ..Judgement::default() })
    }

    fn version(&self) -> Option<&str> {
        Some(self.scorer.version())
    }
}

/// The prompt's turns and the completion as the assistant's; a text prompt is the user's only turn.
fn conversation(completion: &Completion<'_>) -> Vec<Message> {
    let mut messages = match &completion.prompt.body {
        PromptBody::Messages(messages) => messages.clone(),
        PromptBody::Text(text) => vec![Message::text("user", text)],
    };
    messages.push(Message::text("assistant", completion.text));
    messages
}

pub(crate) fn holds_image(prompt: &Prompt) -> bool {
    let PromptBody::Messages(messages) = &prompt.body else { return false };
    messages.iter().any(|message| match &message.content {
        MessageContent::Text(_) => false,
        MessageContent::Parts(parts) => parts.iter().any(|part| matches!(part, ContentPart::Image(_))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_chosen_by_name_or_index() {
        let labels = ["SAFE".to_owned(), "1".to_owned(), "0".to_owned()];
        assert_eq!(choose_label(Some("SAFE"), &labels), Ok(0));
        assert_eq!(choose_label(Some("0"), &labels), Ok(2), "a name comes before an index");
        assert_eq!(choose_label(Some("2"), &labels), Ok(2));
        assert!(choose_label(Some("3"), &labels).unwrap_err().contains("\"SAFE\""));
        assert!(choose_label(None, &labels).unwrap_err().contains("several labels"));
        assert_eq!(choose_label(None, &labels[..1]), Ok(0));
    }
}
