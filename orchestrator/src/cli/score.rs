//! `freewheel score`: the reward stack on recorded completions, with nothing else running.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use freewheel_reward::{Completion, RewardError, RewardStack};
use freewheel_types::{Message, MessageContent, Prompt, PromptBody, PromptId, RewardRecord, Verdict};
use serde::Deserialize;
use serde_json::{Value, json};

use super::ConfigArgs;
use super::fail::Explain as _;
use super::table::table;
use crate::lines;

/// Run the reward stack offline: every component's value, the verdict, the total.
///
/// A line holds `completion` (or `text`) and what a prompt file holds: `prompt` or `messages`, `answer`, `tags`, `verifier`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel score configs/quickstart.toml --input completions.jsonl --json"
)]
pub struct ScoreArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// JSONL file; `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Print JSON lines instead of a table.
    #[arg(long)]
    json: bool,
}

/// A completion with its prompt.
#[derive(Debug, Deserialize)]
pub(super) struct Line {
    pub(super) id: Option<Value>,
    completion: Option<String>,
    text: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Turn>>,
    answer: Option<Value>,
    #[serde(default)]
    tags: Vec<String>,
    verifier: Option<String>,
    tokens: Option<usize>,
    output_ids: Option<Vec<u32>>,
    #[serde(default)]
    truncated: bool,
}

#[derive(Debug, Deserialize)]
struct Turn {
    role: String,
    content: String,
}

impl Line {
    pub(super) fn check(&self) -> Result<(), String> {
        match (&self.completion, &self.text) {
            (None, None) => Err("holds neither `completion` nor `text`".into()),
            (Some(_), Some(_)) => Err("holds both `completion` and `text`".into()),
            _ => Ok(()),
        }
    }

    pub(super) fn score(&self, stack: &RewardStack) -> RewardRecord {
        self.judged(|completion| stack.score(completion))
    }

    /// What `judge` says of it.
    pub(super) fn judged<T>(&self, judge: impl FnOnce(&Completion<'_>) -> T) -> T {
        let prompt = self.prompt();
        let (text, tokens) = (self.completion(), self.tokens());
        judge(&Completion { prompt: &prompt, text, tokens, truncated: self.truncated })
    }

    fn tokens(&self) -> usize {
        self.tokens.or(self.output_ids.as_ref().map(Vec::len)).unwrap_or(0)
    }

    fn completion(&self) -> &str {
        self.completion.as_deref().or(self.text.as_deref()).unwrap_or_default()
    }

    fn prompt(&self) -> Prompt {
        let body = match &self.messages {
            Some(turns) => PromptBody::Messages(
                turns
                    .iter()
                    .map(|turn| Message {
                        role: turn.role.clone(),
                        content: MessageContent::Text(turn.content.clone()),
                    })
                    .collect(),
            ),
            None => PromptBody::Text(self.prompt.clone().unwrap_or_default()),
        };
        Prompt {
            id: PromptId([0; 16]),
            name: None,
            body,
            answer: self.answer.as_ref().map(Value::to_string),
            tags: self.tags.clone(),
            verifier: self.verifier.clone(),
            meta: None,
        }
    }
}

impl ScoreArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let loaded = self.config.load()?;
        let stack = RewardStack::new(&loaded.config.reward).map_err(RewardError::Config).input()?;
        let lines = lines::read(&self.input, Line::check)?;
        let mut out = std::io::BufWriter::new(std::io::stdout());
        let (mut rows, mut spread) = (Vec::new(), Spread::default());
        for (at, line) in &lines {
            let record = line.score(&stack);
            spread.add(&record, line.tokens());
            if self.json {
                writeln!(out, "{}", json_row(*at, line, &record))?;
            } else {
                rows.push(table_row(*at, &record));
            }
        }
        if !self.json {
            let mut header = vec!["line", "reward", "correct", "why"];
            header.extend(stack.component_names());
            write!(out, "{}", table(&header, &rows))?;
            write!(out, "\n{}", spread.table())?;
        }
        out.flush()?;
        Ok(())
    }
}

/// Mean and deviation of every component's value, what `norm_mean` and `norm_std` take; and how it goes with length, for `norm_length`.
#[derive(Default)]
struct Spread(BTreeMap<String, Vec<(f64, f64)>>);

impl Spread {
    /// Notes every value with the logarithm of the completion's length.
    fn add(&mut self, record: &RewardRecord, tokens: usize) {
        let log_length = (tokens as f64).ln_1p();
        for part in &record.components {
            let value = part.value.map(|value| (f64::from(value), log_length));
            self.0.entry(part.name.clone()).or_default().extend(value);
        }
    }

    fn table(&self) -> String {
        let row = |(name, values): (&String, &Vec<(f64, f64)>)| {
            let mean_of =
                |of: &dyn Fn(&(f64, f64)) -> f64| values.iter().map(of).sum::<f64>() / values.len() as f64;
            let (mean, length) = (mean_of(&|v| v.0), mean_of(&|v| v.1));
            let std = mean_of(&|v| (v.0 - mean).powi(2)).sqrt();
            // Least squares; completions of one length say nothing about it.
            let slope = mean_of(&|v| (v.0 - mean) * (v.1 - length)) / mean_of(&|v| (v.1 - length).powi(2));
            let shown = |x: f64| if x.is_finite() { format!("{x:.4}") } else { "-".to_owned() };
            let rest = mean - slope * length;
            let rest_std = mean_of(&|v| (v.0 - slope * v.1 - rest).powi(2)).sqrt();
            let mut row = vec![name.clone(), values.len().to_string()];
            row.extend([mean, std, slope, rest, rest_std].map(shown));
            row
        };
        let header = ["component", "values", "mean", "std", "length", "mean without", "std without"];
        table(&header, &self.0.iter().map(row).collect::<Vec<_>>())
    }
}

fn json_row(at: usize, line: &Line, record: &RewardRecord) -> Value {
    let mut row = reward_json(record);
    if let Some(map) = row.as_object_mut() {
        map.insert("line".into(), json!(at));
        if let Some(id) = &line.id {
            map.insert("id".into(), id.clone());
        }
    }
    row
}

/// A reward record as every command and file of ours spells it.
pub fn reward_json(record: &RewardRecord) -> Value {
    let components: serde_json::Map<String, Value> = record
        .components
        .iter()
        .map(|part| {
            (
                part.name.clone(),
                json!({
                    "value": part.value, "label": part.label, "detail": part.detail,
                    "version": part.version, "latency_ms": part.latency_ms,
                }),
            )
        })
        .collect();
    let costs: serde_json::Map<String, Value> =
        record.costs.iter().map(|cost| (cost.name.clone(), json!(cost.value))).collect();
    let (gated_by, unscored) = match &record.verdict {
        Verdict::Scored { gated_by, .. } => (gated_by.clone(), None),
        Verdict::Unscored { reason } => (None, Some(reason.clone())),
    };
    json!({
        "reward": record.reward(),
        "correct": record.correct(),
        "gated_by": gated_by,
        "unscored": unscored,
        "tier": record.tier.as_ref().map(|hit| &hit.name),
        "costs": costs,
        "components": components,
        "reward_version": record.reward_version,
    })
}

fn table_row(at: usize, record: &RewardRecord) -> Vec<String> {
    let number = |x: Option<f32>| x.map_or_else(|| "-".into(), |x| format!("{x:.4}"));
    let why = match &record.verdict {
        Verdict::Unscored { reason } => format!("unscored: {reason}"),
        Verdict::Scored { gated_by: Some(gate), .. } => format!("gate {gate}"),
        Verdict::Scored { .. } => {
            record.tier.as_ref().map_or_else(String::new, |hit| format!("tier {}", hit.name))
        }
    };
    let correct = record.correct().map_or("-", |yes| if yes { "yes" } else { "no" });
    let mut row = vec![at.to_string(), number(record.reward()), correct.to_owned(), why];
    row.extend(record.components.iter().map(|part| number(part.value)));
    row
}
