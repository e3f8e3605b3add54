//! `freewheel filter`: how hard each prompt is, before any training.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use freewheel_types::Prompt;
use serde_json::{Value, json};

use super::ConfigArgs;
use super::fail::Explain as _;
use super::table::table;
use crate::config::Loaded;
use crate::evaluation::{EvalSet, Tally, judge, pass_at};
use crate::prompts::line_of;
use crate::run::prepare;

/// Prompts sampled at a time.
const AT_ONCE: usize = 256;

/// Sample every training prompt and write those that can teach: an annotated, filtered prompt file.
///
/// Each line gets `meta` "avg@K", the share of right answers among its K samples, which a run that trains on the file starts
/// its beliefs from. Kept are prompts with a share above --min and below --max, so by default those solved sometimes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel filter configs/quickstart.toml --out medium.jsonl\n  \
    freewheel filter run.toml --samples 32 --min 0.1 --max 0.8 --out hard.jsonl\n  \
    freewheel filter run.toml --all --out annotated.jsonl")]
pub struct FilterArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Completions per prompt.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=64))]
    samples: u32,
    /// Keep prompts solved more often than this.
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    min: f64,
    /// Keep prompts solved less often than this.
    #[arg(long, default_value_t = 1.0, value_name = "SHARE")]
    max: f64,
    /// Keep all that could be judged, only annotate.
    #[arg(long, conflicts_with_all = ["min", "max"])]
    all: bool,
    /// Prompts to sample, from the first. Default: all.
    #[arg(long)]
    count: Option<usize>,
    /// Overwrite the output file.
    #[arg(long)]
    force: bool,
    /// Compute threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// A prompt with what its samples showed.
struct Sampled {
    line: Value,
    tally: Tally,
    kept: bool,
}

impl FilterArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.out.exists() && !self.force {
            return Err(anyhow::anyhow!("{} exists", self.out.display())).input_hint("--force overwrites it");
        }
        let loaded = self.config.load()?;
        let mut prompts = prepare::training_prompts(&loaded)?;
        prompts.truncate(self.count.unwrap_or(usize::MAX));
        let lines = lines_of(&loaded, &prompts)?;
        let tallies = self.sample(&loaded, prompts)?;
        let sampled: Vec<Sampled> =
            lines.into_iter().zip(tallies).map(|(line, tally)| self.annotated(line, tally)).collect();
        write(&self.out, &sampled)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&self.summary(&sampled))?);
        } else {
            print!("{}", self.text(&sampled));
        }
        Ok(())
    }

    /// A tally a prompt: all samples drawn and judged, some prompts at a time.
    fn sample(&self, loaded: &Loaded, prompts: Vec<Prompt>) -> anyhow::Result<Vec<Tally>> {
        let model = prepare::model(loaded)?;
        prepare::check_lengths(loaded, &model, &prompts)?;
        let stack = prepare::reward_stack(loaded)?;
        let threads = crate::policy::threads(self.threads);
        let mut engine = crate::policy::engine(&model, &threads, loaded.config.actor.engine())?;
        let total = prompts.len();
        let mut tallies = Vec::with_capacity(total);
        for (part, prompts) in prompts.chunks(AT_ONCE).enumerate() {
            let Some(set) = prepare::eval_set(loaded, &model, prompts.to_vec())? else { break };
            let set = EvalSet {
                samples: self.samples,
                sampling: loaded.config.actor.sampling(),
                // Parts must not share their draws.
                seed: loaded.config.run.seed.wrapping_add(part as u64),
                ..set
            };
            tallies.extend(judge(&mut engine, &stack, &set).input()?.tallies);
            eprintln!("{}/{total} prompts", tallies.len());
        }
        Ok(tallies)
    }

    fn annotated(&self, mut line: Value, tally: Tally) -> Sampled {
        let share = share(&tally);
        if let (Some(share), Some(line)) = (share, line.as_object_mut()) {
            let name = format!("avg@{}", tally.judged);
            line.retain(|key, _| !key.starts_with("avg@"));
            match line.get_mut("meta").and_then(Value::as_object_mut) {
                Some(meta) => {
                    meta.retain(|key, _| !key.starts_with("avg@"));
                    meta.insert(name, json!(share));
                }
                None => drop(line.insert("meta".into(), json!({name: share}))),
            }
        }
        let kept = share.is_some_and(|share| self.all || (share > self.min && share < self.max));
        Sampled { line, tally, kept }
    }

    fn summary(&self, sampled: &[Sampled]) -> Value {
        let all = Summary::of(sampled.iter());
        let tags: serde_json::Map<String, Value> =
            by_tag(sampled).into_iter().map(|(tag, of)| (tag.to_owned(), of.json())).collect();
        json!({"out": self.out, "samples": self.samples, "all": all.json(), "tags": tags, "histogram": histogram(sampled)})
    }

    fn text(&self, sampled: &[Sampled]) -> String {
        let all = Summary::of(sampled.iter());
        let mut rows = vec![all.row("all")];
        rows.extend(by_tag(sampled).into_iter().map(|(tag, of)| of.row(&format!("  {tag}"))));
        let mut out = table(&["prompts", "n", "avg", "never", "always", "unscored", "kept"], &rows);
        let judged: Vec<Tally> = sampled.iter().map(|s| s.tally.clone()).collect();
        for (k, value) in pass_at(&judged, self.samples) {
            out.push_str(&format!("pass@{k}  {value:.4}\n"));
        }
        out.push_str(&format!("{} of {} prompts in {}\n", all.kept, all.prompts, self.out.display()));
        out
    }
}

/// Share of right answers; `None` if none could be judged.
fn share(tally: &Tally) -> Option<f64> {
    (tally.judged > 0).then(|| f64::from(tally.right) / f64::from(tally.judged))
}

/// The lines that the prompts came from, with every field; a built-in source has none, so they are written.
fn lines_of(loaded: &Loaded, prompts: &[Prompt]) -> anyhow::Result<Vec<Value>> {
    let Some(file) = &loaded.config.prompts.file else {
        return prompts.iter().map(|prompt| line_of(prompt).map_err(anyhow::Error::msg).input()).collect();
    };
    let read = crate::lines::read(&loaded.resolve(file), |_: &Value| Ok(()))?;
    Ok(read.into_iter().map(|(_, line)| line).take(prompts.len()).collect())
}

/// Writes the kept lines, whole or not at all.
fn write(path: &Path, sampled: &[Sampled]) -> anyhow::Result<()> {
    let mut text = Vec::new();
    for line in sampled.iter().filter(|s| s.kept).map(|s| &s.line) {
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
    }
    let new = path.with_extension("tmp");
    let written = std::fs::File::create(&new).and_then(|mut file| {
        file.write_all(&text)?;
        file.sync_all()
    });
    written
        .and_then(|()| std::fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn by_tag(sampled: &[Sampled]) -> BTreeMap<&str, Summary> {
    let mut tags: BTreeMap<&str, Vec<&Sampled>> = BTreeMap::new();
    for one in sampled {
        for tag in &one.tally.tags {
            tags.entry(tag).or_default().push(one);
        }
    }
    tags.into_iter().map(|(tag, of)| (tag, Summary::of(of.into_iter()))).collect()
}

/// Prompts by tenths of their share; those solved never and always are the ends.
fn histogram(sampled: &[Sampled]) -> [usize; 10] {
    let mut bins = [0; 10];
    for share in sampled.iter().filter_map(|s| share(&s.tally)) {
        bins[((share * 10.0) as usize).min(9)] += 1;
    }
    bins
}

#[derive(Default)]
struct Summary {
    prompts: usize,
    judged: usize,
    sum: f64,
    never: usize,
    always: usize,
    kept: usize,
}

impl Summary {
    fn of<'a>(sampled: impl Iterator<Item = &'a Sampled>) -> Self {
        let mut summary = Self::default();
        for one in sampled {
            summary.prompts += 1;
            summary.kept += usize::from(one.kept);
            let Some(share) = share(&one.tally) else { continue };
            summary.judged += 1;
            summary.sum += share;
            summary.never += usize::from(one.tally.right == 0);
            summary.always += usize::from(one.tally.right == one.tally.judged);
        }
        summary
    }

    fn mean(&self) -> Option<f64> {
        (self.judged > 0).then(|| self.sum / self.judged as f64)
    }

    fn row(&self, name: &str) -> Vec<String> {
        let mean = self.mean().map_or_else(|| "-".into(), |mean| format!("{mean:.4}"));
        let unscored = self.prompts - self.judged;
        let counts = [self.never, self.always, unscored, self.kept].map(|n| n.to_string());
        [vec![name.to_owned(), self.prompts.to_string(), mean], counts.to_vec()].concat()
    }

    fn json(&self) -> Value {
        json!({
            "prompts": self.prompts, "avg": self.mean(), "never": self.never, "always": self.always,
            "unscored": self.prompts - self.judged, "kept": self.kept,
        })
    }
}
