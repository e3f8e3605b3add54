//! `freewheel bench saved`: what the prefix cache and guessed tokens save, on workloads where they should and where they should not.
//!
//! Every workload runs with and without, in turn, and must give the same tokens both times.

use std::time::Instant;

use anyhow::ensure;
use clap::Args;
use freewheel_actor::{CpuBackend, Engine, EngineConfig, EngineStats, Request, SampleSpec, StopSpec};
use freewheel_kernels::Threads;
use freewheel_model::{LoadedModel, RenderOptions};
use freewheel_types::{CounterRng, PromptBody, SamplingParams, TaskId};
use serde_json::{Value, json};

use super::{Machine, Sampling, ids, median, number};
use crate::cli::fail::Explain as _;
use crate::cli::model::ModelArgs;
use crate::cli::table::table;

#[derive(Debug, Args)]
pub struct SavedArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Sequences at once; several sizes, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1usize, 8])]
    batch: Vec<usize>,
    /// Tokens of a completion.
    #[arg(long, default_value_t = 48)]
    length: usize,
    /// Tokens of the prompt that all of a workload share.
    #[arg(long, default_value_t = 256)]
    system: usize,
    #[command(flatten)]
    sampling: Sampling,
}

/// Prompts for each sequence at once, and turns of a conversation.
const WAVES: usize = 4;
/// Tokens of a prompt that are its own, and of a user's turn.
const OWN: usize = 24;
/// Room for the texts of prompts that are texts.
const TEXT: usize = 160;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Workload {
    /// Prompts that begin with the same long text.
    System,
    /// Conversations: each turn's prompt is all that was said before, and more.
    Turns,
    /// Prompts without a common token.
    Unlike,
    /// Words are to be repeated: greedy.
    Copy,
    /// A story at temperature 1, which hardly repeats.
    Story,
}

impl Workload {
    const ALL: [Self; 5] = [Self::System, Self::Turns, Self::Unlike, Self::Copy, Self::Story];

    fn name(self) -> &'static str {
        match self {
            Self::System => "prefix: one long system prompt",
            Self::Turns => "prefix: turns of conversations",
            Self::Unlike => "prefix: prompts all unlike",
            Self::Copy => "guesses: words to repeat, greedy",
            Self::Story => "guesses: a story, temperature 1",
        }
    }

    /// The engine with what this workload is about.
    fn with(self, without: EngineConfig) -> EngineConfig {
        match self {
            Self::System | Self::Turns | Self::Unlike => EngineConfig { prefix_cache: true, ..without },
            Self::Copy | Self::Story => {
                EngineConfig { draft_tokens: EngineConfig::default().draft_tokens, ..without }
            }
        }
    }
}

impl SavedArgs {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let loaded = self.model.open()?;
        let longest = loaded.model.spec().max_positions;
        let batches_fit = !self.batch.is_empty() && self.batch.iter().all(|b| (1..=512).contains(b));
        if !batches_fit || self.length == 0 || self.positions() > longest {
            let need = format!(
                "--length 1 or more, --batch 1 to 512, room for {} positions of {longest}",
                self.positions()
            );
            return Err(anyhow::anyhow!("--batch, --length or --system is out of range")).input_hint(need);
        }
        let threads = self.model.threads();
        let machine = Machine::measure(&loaded, &threads);
        let mut rows = Vec::new();
        for &batch in &self.batch {
            for workload in Workload::ALL {
                rows.push(Comparison { args: self, loaded: &loaded, batch, workload }.measure(&threads)?);
            }
        }
        machine.print("saved", &loaded, &rows, self.sampling.json, text)
    }

    /// Positions of the longest sequence.
    fn positions(&self) -> usize {
        let prompt = [self.system + OWN, WAVES * (OWN + self.length), TEXT].into_iter().max().unwrap_or(0);
        prompt.saturating_add(self.length)
    }
}

/// A workload with and without what it is about.
struct Comparison<'a> {
    args: &'a SavedArgs,
    loaded: &'a LoadedModel,
    batch: usize,
    workload: Workload,
}

/// A workload's run.
struct Ran {
    /// Of every completion, in the order of their requests.
    outputs: Vec<Vec<u32>>,
    seconds: f64,
}

impl Ran {
    fn tokens_per_s(&self) -> f64 {
        self.outputs.iter().map(Vec::len).sum::<usize>() as f64 / self.seconds
    }
}

impl Comparison<'_> {
    fn measure(&self, threads: &Threads) -> anyhow::Result<Value> {
        let without = EngineConfig {
            max_live: self.batch,
            kv_bytes: 2 << 30,
            prefill_tokens: 4096,
            prefix_cache: false,
            draft_tokens: 0,
            ..EngineConfig::default()
        };
        let mut plain = crate::policy::engine(self.loaded, threads, without)?;
        let mut saving = crate::policy::engine(self.loaded, threads, self.workload.with(without))?;
        let (mut rates, mut before) = ([Vec::new(), Vec::new()], EngineStats::default());
        // Round 0 warms up.
        for round in 0..=u64::from(self.args.sampling.rounds) {
            if round == 1 {
                before = saving.stats();
            }
            let runs = match round % 2 {
                0 => [self.run(&mut plain, round)?, self.run(&mut saving, round)?],
                _ => {
                    let second = self.run(&mut saving, round)?;
                    [self.run(&mut plain, round)?, second]
                }
            };
            ensure!(
                runs[0].outputs == runs[1].outputs,
                "{}: the tokens differ in round {round}",
                self.workload.name()
            );
            if round > 0 {
                rates.iter_mut().zip(&runs).for_each(|(rates, run)| rates.push(run.tokens_per_s()));
            }
        }
        Ok(self.row(rates, &before, &saving.stats()))
    }

    fn row(&self, mut rates: [Vec<f64>; 2], before: &EngineStats, after: &EngineStats) -> Value {
        rates.iter_mut().for_each(|rates| rates.sort_by(f64::total_cmp));
        let [without, with] = &rates;
        let extremes = |rates: &[f64]| [rates[0], rates[rates.len() - 1]];
        let (drafted, hits) = (after.drafted - before.drafted, after.draft_hits - before.draft_hits);
        let tokens = after.tokens - before.tokens;
        json!({
            "what": self.workload.name(), "batch": self.batch, "rounds": with.len(),
            "without_tokens_per_s": median(without), "without_extremes": extremes(without),
            "with_tokens_per_s": median(with), "with_extremes": extremes(with),
            "times": median(with) / median(without), "tokens": tokens,
            "prefix_tokens": after.prefix_tokens - before.prefix_tokens,
            "rows": after.rows - before.rows,
            "drafted": drafted, "drafted_a_token": drafted as f64 / tokens as f64,
            "draft_accepted": (drafted > 0).then(|| hits as f64 / drafted as f64),
            "same_tokens": true,
        })
    }

    fn run(&self, engine: &mut Engine<CpuBackend>, round: u64) -> anyhow::Result<Ran> {
        match self.workload {
            Workload::Turns => self.conversations(engine, round),
            _ => self.at_once(engine, self.prompts(round)?, round, 0),
        }
    }

    /// Conversations of several turns, all at the same turn.
    fn conversations(&self, engine: &mut Engine<CpuBackend>, round: u64) -> anyhow::Result<Ran> {
        let mut said: Vec<Vec<u32>> = vec![Vec::new(); self.batch];
        let mut all = Ran { outputs: Vec::new(), seconds: 0.0 };
        for turn in 0..WAVES as u64 {
            for (conversation, said) in said.iter_mut().enumerate() {
                said.extend(self.noise(round, turn * self.batch as u64 + conversation as u64, OWN));
            }
            let ran = self.at_once(engine, said.clone(), round, turn)?;
            said.iter_mut().zip(&ran.outputs).for_each(|(said, output)| said.extend(output));
            all.outputs.extend(ran.outputs);
            all.seconds += ran.seconds;
        }
        Ok(all)
    }

    /// Completes `prompts`, as many at once as the engine takes.
    fn at_once(
        &self,
        engine: &mut Engine<CpuBackend>,
        prompts: Vec<Vec<u32>>,
        round: u64,
        turn: u64,
    ) -> anyhow::Result<Ran> {
        let mut outputs = vec![Vec::new(); prompts.len()];
        let began = Instant::now();
        for (id, prompt_ids) in prompts.into_iter().enumerate() {
            let task = TaskId((round * WAVES as u64 + turn) * 4096 + id as u64);
            engine.submit(Request {
                id: id as u64,
                prompt_ids,
                tiles: Vec::new(),
                samples: vec![SampleSpec { rollout: task.rollout(0) }],
                seed: 0,
                sampling: if self.workload == Workload::Copy {
                    SamplingParams::GREEDY
                } else {
                    SamplingParams::default()
                },
                max_new_tokens: self.args.length,
                stop: StopSpec::default(),
            })?;
        }
        while !engine.is_idle() {
            for done in engine.step() {
                outputs[done.request as usize] = done.output_ids;
            }
        }
        Ok(Ran { outputs, seconds: began.elapsed().as_secs_f64() })
    }

    /// All prompts of a workload without turns.
    fn prompts(&self, round: u64) -> anyhow::Result<Vec<Vec<u32>>> {
        let count = (WAVES * self.batch) as u64;
        match self.workload {
            Workload::Copy | Workload::Story => {
                (0..self.batch as u64).map(|at| self.chat(&self.question(round, at))).collect()
            }
            Workload::Unlike => {
                Ok((0..count).map(|at| self.noise(round, at, self.args.system + OWN)).collect())
            }
            Workload::System | Workload::Turns => {
                let system = self.noise(round, u64::MAX, self.args.system);
                Ok((0..count).map(|at| [&system[..], &self.noise(round, at, OWN)].concat()).collect())
            }
        }
    }

    /// Tokens without meaning.
    fn noise(&self, round: u64, at: u64, len: usize) -> Vec<u32> {
        ids(self.loaded, CounterRng::new(round, at).u64(0), len)
    }

    fn question(&self, round: u64, at: u64) -> String {
        const WORDS: [&str; 32] = [
            "apple", "river", "stone", "cloud", "green", "table", "horse", "light", "paper", "glass",
            "bread", "chair", "ocean", "winter", "music", "garden", "silver", "window", "yellow", "bridge",
            "candle", "forest", "mirror", "pocket", "rabbit", "shadow", "ticket", "valley", "wagon", "zebra",
            "kitchen", "lantern",
        ];
        let rng = CounterRng::new(round, at + 2);
        let words: Vec<&str> = (0..24).map(|i| WORDS[rng.below(i, WORDS.len() as u64) as usize]).collect();
        match self.workload {
            Workload::Story => {
                format!("Tell a story about a {}, a {} and a {}.", words[0], words[1], words[2])
            }
            _ => format!("Repeat these words exactly, in the same order: {}", words.join(" ")),
        }
    }

    /// A user's message through the chat template, or as it is where there is none.
    fn chat(&self, text: &str) -> anyhow::Result<Vec<u32>> {
        let tokenizer = &self.loaded.tokenizer;
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        let message = json!({"role": "user", "content": text});
        let mut ids = match tokenizer.encode_chat(&[message], &options) {
            Ok(chat) => chat.ids,
            Err(_) => tokenizer.encode_prompt(&PromptBody::Text(text.to_owned()))?.ids,
        };
        ids.truncate(TEXT);
        Ok(ids)
    }
}

fn text(rows: &[Value]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row["what"].as_str().unwrap_or("-").to_owned(),
                number(row, "batch", 1.0, 0),
                number(row, "without_tokens_per_s", 1.0, 1),
                number(row, "with_tokens_per_s", 1.0, 1),
                number(row, "times", 1.0, 2),
                number(row, "prefix_tokens", 1.0, 0),
                number(row, "rows", 1.0, 0),
                number(row, "drafted_a_token", 1.0, 2),
                number(row, "draft_accepted", 100.0, 0),
            ]
        })
        .collect();
    let header = [
        "workload",
        "batch",
        "tokens/s without",
        "with",
        "times",
        "tokens found",
        "rows",
        "guesses a token",
        "% right",
    ];
    table(&header, &cells)
}

#[cfg(test)]
mod tests {
    use freewheel_model::{InitRequest, InitScale, TokenizerChoice};
    use freewheel_types::WeightsDtype;

    use super::*;

    fn args(system: usize) -> SavedArgs {
        let model = ModelArgs {
            model: std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/sprout"),
            dtype: crate::cli::model::DtypeArg::Auto,
            quantise: crate::config::Quantise::None,
            threads: 1,
        };
        SavedArgs { model, batch: vec![2], length: 6, system, sampling: Sampling { rounds: 2, json: true } }
    }

    /// A small model whose layers see everything: only such have a prefix cache.
    fn model() -> LoadedModel {
        let sizes = [
            ("hidden_size", 32),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
            ("intermediate_size", 48),
        ];
        let request = InitRequest {
            arch: "llama".into(),
            overrides: sizes.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect(),
            seed: 1,
            scale: InitScale::FanIn,
            dtype: WeightsDtype::Bf16,
            tokenizer: TokenizerChoice::Bytes,
        };
        freewheel_model::init_model(&request).unwrap()
    }

    #[test]
    fn every_workload_uses_what_it_is_about_and_no_token_changes() {
        let (args, loaded) = (args(40), model());
        for workload in Workload::ALL {
            let comparison = Comparison { args: &args, loaded: &loaded, batch: 2, workload };
            let row = comparison.measure(&Threads::single()).unwrap();
            let of = |key: &str| row[key].as_u64().unwrap();
            let alike = matches!(workload, Workload::System | Workload::Turns);
            assert_eq!(of("prefix_tokens") > 0, alike, "{row}");
            assert!(of("drafted") == 0 || matches!(workload, Workload::Copy | Workload::Story), "{row}");
            // Greedy words to repeat hold what guesses are made from.
            assert!(of("drafted") > 0 || workload != Workload::Copy, "{row}");
            assert!(row["times"].as_f64().unwrap() > 0.0 && row["rounds"] == 2, "{row}");
        }
    }

    #[test]
    fn a_sequence_longer_than_the_model_is_refused() {
        let error = args(1 << 20).run().unwrap_err();
        assert!(error.to_string().contains("--system"), "{error:#}");
    }
}
