//! `freewheel bench objectives`: the same run with every objective, at several bounds of staleness, with several seeds.
//!
//! Each cell is a `freewheel run` of its own process. What is done is in `results.jsonl` and not done again, so that the whole can
//! be stopped and taken up; table and plot are made of that file.

mod plot;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use freewheel_learner::objective::RECIPES;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::bench::median;
use super::fail::Explain as _;

/// Train with every objective, at several bounds of staleness, with several seeds.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  freewheel bench objectives configs/quickstart.toml --out runs/objectives\n  \
    freewheel bench objectives configs/quickstart.toml --objectives aipo,gspo --staleness 0,64 --seeds 1"
)]
pub struct AblationArgs {
    /// Config of the run that is repeated.
    config: PathBuf,
    /// Objectives, separated by commas. Default: all.
    #[arg(long, value_delimiter = ',')]
    objectives: Vec<String>,
    /// Values of `learner.max_staleness`, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [0u64, 4, 16, 64])]
    staleness: Vec<u64>,
    /// Seeds, 1 to this.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Held-out accuracy whose first step is reported.
    #[arg(long, default_value_t = 0.9)]
    goal: f64,
    /// Folder for runs, results, table and plot.
    #[arg(long, default_value = "runs/objectives")]
    out: PathBuf,
    /// Change one value of every run. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

/// What one run came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Cell {
    objective: String,
    max_staleness: u64,
    seed: u64,
    /// Held-out accuracy at the end; `None` if the run failed.
    accuracy: Option<f64>,
    /// First evaluated step at the goal.
    steps_to_goal: Option<u64>,
    /// Wall time of the process, seconds.
    wall_s: f64,
    /// Mean staleness of what was trained on in the second half of the steps.
    #[serde(default)]
    staleness: Option<f64>,
    /// Why it failed.
    error: Option<String>,
}

impl AblationArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let objectives = self.objectives()?;
        let runs = self.out.join("runs");
        fs::create_dir_all(&runs).with_context(|| format!("{} cannot be made", runs.display()))?;
        let results = self.out.join("results.jsonl");
        let mut cells = read(&results)?;
        for cell in cells.iter_mut().filter(|cell| cell.staleness.is_none()) {
            let name = run_name(&cell.objective, cell.max_staleness, cell.seed);
            cell.staleness = mean_staleness(&runs.join(name).join("metrics.jsonl"));
        }
        let total = objectives.len() * self.staleness.len() * self.seeds as usize;
        for seed in 1..=self.seeds {
            for objective in &objectives {
                for &staleness in &self.staleness {
                    let known = |c: &Cell| {
                        (c.objective.as_str(), c.max_staleness, c.seed) == (objective, staleness, seed)
                    };
                    if cells.iter().any(known) {
                        continue;
                    }
                    let cell = self.cell(&runs, objective, staleness, seed)?;
                    append(&results, &cell)?;
                    cells.push(cell);
                    eprintln!("{} of {total}: {}", cells.len(), told(cells.last().expect("just pushed")));
                }
            }
        }
        let text = table(&cells, self.goal);
        fs::write(self.out.join("table.md"), &text)?;
        fs::write(self.out.join("plot.svg"), plot::svg(&cells))?;
        print!("{text}");
        println!("\n{}", self.out.join("plot.svg").display());
        Ok(())
    }

    fn objectives(&self) -> anyhow::Result<Vec<String>> {
        let all: Vec<&str> = RECIPES.iter().map(|recipe| recipe.name).collect();
        if let Some(unknown) = self.objectives.iter().find(|name| !all.contains(&name.as_str())) {
            return Err(anyhow::anyhow!("--objectives names `{unknown}`, which is none"))
                .input_hint(all.join(", "));
        }
        Ok(if self.objectives.is_empty() {
            all.into_iter().map(str::to_owned).collect()
        } else {
            self.objectives.clone()
        })
    }

    fn cell(&self, runs: &Path, objective: &str, staleness: u64, seed: u64) -> anyhow::Result<Cell> {
        let name = run_name(objective, staleness, seed);
        let log = File::create(runs.join(format!("{name}.log")))?;
        let began = Instant::now();
        let mut run = Command::new(std::env::current_exe()?);
        run.arg("run").arg(&self.config).arg("--force");
        let own = [
            format!("learner.objective=\"{objective}\""),
            format!("learner.max_staleness={staleness}"),
            format!("run.seed={seed}"),
            format!("run.dir={:?}", runs.display().to_string()),
            format!("run.name=\"{name}\""),
        ];
        own.iter().chain(&self.overrides).for_each(|set| {
            run.args(["--set", set]);
        });
        let status = run.stdout(Stdio::null()).stderr(log).status()?;
        let failed = (!status.success())
            .then(|| format!("{status}, see {}", runs.join(format!("{name}.log")).display()));
        let evals = accuracies(&runs.join(&name).join("eval.jsonl"));
        Ok(Cell {
            objective: objective.to_owned(),
            max_staleness: staleness,
            seed,
            accuracy: evals.last().map(|(_, accuracy)| *accuracy).filter(|_| failed.is_none()),
            steps_to_goal: evals.iter().find(|(_, accuracy)| *accuracy >= self.goal).map(|(step, _)| *step),
            wall_s: began.elapsed().as_secs_f64(),
            staleness: mean_staleness(&runs.join(&name).join("metrics.jsonl")),
            error: failed,
        })
    }
}

fn run_name(objective: &str, staleness: u64, seed: u64) -> String {
    format!("{}-s{staleness}-{seed}", objective.replace('_', "-"))
}

/// How old the rollouts were that the second half of a run's updates was made of.
fn mean_staleness(metrics: &Path) -> Option<f64> {
    let text = fs::read_to_string(metrics).ok()?;
    let one = |line: &str| serde_json::from_str::<Value>(line).ok()?.get("staleness/mean")?.as_f64();
    let all: Vec<f64> = text.lines().filter_map(one).collect();
    let later = &all[all.len() / 2..];
    (!later.is_empty()).then(|| mean(later))
}

/// (step, accuracy) of every evaluation; nothing if there was none.
fn accuracies(path: &Path) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let one = |line: &str| {
        let line: Value = serde_json::from_str(line).ok()?;
        let step = line.get("step")?.as_u64()?;
        let fields = line.as_object()?.iter();
        let accuracy = |(key, value): (&String, &Value)| {
            (key.starts_with("eval/") && key.ends_with("/accuracy")).then(|| value.as_f64())?
        };
        Some((step, fields.into_iter().find_map(accuracy)?))
    };
    text.lines().filter_map(one).collect()
}

fn read(path: &Path) -> anyhow::Result<Vec<Cell>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text.with_context(|| format!("{} cannot be read", path.display()))?,
    };
    let cell = |(at, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}:{}: not a result", path.display(), at + 1))
    };
    text.lines().enumerate().map(cell).collect()
}

fn append(path: &Path, cell: &Cell) -> anyhow::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    writeln!(file, "{}", serde_json::to_string(cell)?)?;
    Ok(())
}

fn told(cell: &Cell) -> String {
    let result = match (&cell.error, cell.accuracy) {
        (Some(error), _) => error.clone(),
        (None, Some(accuracy)) => format!("accuracy {accuracy:.3}"),
        (None, None) => "no evaluation".into(),
    };
    format!(
        "{}, staleness {}, seed {}: {result}, {:.0} s",
        cell.objective, cell.max_staleness, cell.seed, cell.wall_s
    )
}

/// Cells by objective and staleness, objectives in table order.
fn grouped(cells: &[Cell]) -> Vec<(String, BTreeMap<u64, Vec<&Cell>>)> {
    let mut all: Vec<(String, BTreeMap<u64, Vec<&Cell>>)> = Vec::new();
    for recipe in RECIPES {
        let mut by_staleness: BTreeMap<u64, Vec<&Cell>> = BTreeMap::new();
        for cell in cells.iter().filter(|cell| cell.objective == recipe.name) {
            by_staleness.entry(cell.max_staleness).or_default().push(cell);
        }
        if !by_staleness.is_empty() {
            all.push((recipe.name.to_owned(), by_staleness));
        }
    }
    all
}

/// A Markdown table: the staleness that there was, final accuracy (lowest to highest of the seeds), mean steps to the goal, median
/// wall time.
fn table(cells: &[Cell], goal: f64) -> String {
    let mut out = format!(
        "| objective | max_staleness | staleness | seeds | accuracy | lowest–highest | steps to {goal} | wall s |\n|---|---|---|---|---|---|---|---|\n"
    );
    for (objective, by_staleness) in grouped(cells) {
        for (staleness, cells) in by_staleness {
            let accuracies: Vec<f64> = cells.iter().filter_map(|cell| cell.accuracy).collect();
            let reached: Vec<f64> = cells.iter().filter_map(|c| c.steps_to_goal).map(|s| s as f64).collect();
            let mut walls: Vec<f64> = cells.iter().map(|cell| cell.wall_s).collect();
            walls.sort_by(f64::total_cmp);
            let range = match accuracies.len() {
                0 => "failed".to_owned(),
                _ => format!(
                    "{:.3}–{:.3}",
                    accuracies.iter().copied().fold(f64::INFINITY, f64::min),
                    accuracies.iter().copied().fold(f64::NEG_INFINITY, f64::max)
                ),
            };
            let goal = match reached.len() {
                0 => "-".to_owned(),
                n if n < cells.len() => format!("{:.0} ({n} of {})", mean(&reached), cells.len()),
                _ => format!("{:.0}", mean(&reached)),
            };
            let accuracy =
                if accuracies.is_empty() { "-".into() } else { format!("{:.3}", mean(&accuracies)) };
            let measured: Vec<f64> = cells.iter().filter_map(|cell| cell.staleness).collect();
            let lag = if measured.is_empty() { "-".into() } else { format!("{:.1}", mean(&measured)) };
            let _ = writeln!(
                out,
                "| {objective} | {staleness} | {lag} | {} | {accuracy} | {range} | {goal} | {:.0} |",
                cells.len(),
                median(&walls)
            );
        }
    }
    out
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(objective: &str, max_staleness: u64, seed: u64, accuracy: Option<f64>) -> Cell {
        Cell {
            objective: objective.into(),
            max_staleness,
            seed,
            accuracy,
            steps_to_goal: accuracy.filter(|a| *a >= 0.9).map(|_| 30),
            wall_s: 60.0,
            staleness: accuracy.map(|_| max_staleness as f64 / 2.0),
            error: accuracy.is_none().then(|| "exit status: 1".into()),
        }
    }

    #[test]
    fn the_table_averages_over_seeds_and_says_what_failed() {
        let cells = [
            cell("grpo", 4, 1, Some(0.9)),
            cell("grpo", 4, 2, Some(0.7)),
            cell("aipo", 0, 1, Some(0.95)),
            cell("grpo", 64, 1, None),
        ];
        let text = table(&cells, 0.9);
        let rows: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| aipo | 0 | 0.0 | 1 | 0.950 | 0.950–0.950 | 30 | 60 |",
                "| grpo | 4 | 2.0 | 2 | 0.800 | 0.700–0.900 | 30 (1 of 2) | 60 |",
                "| grpo | 64 | - | 1 | - | failed | - | 60 |",
            ]
        );
    }

    #[test]
    fn results_are_read_back_and_a_torn_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        assert_eq!(read(&path).unwrap(), []);
        let cells = [cell("grpo", 4, 1, Some(0.9)), cell("aipo", 0, 1, None)];
        cells.iter().for_each(|cell| append(&path, cell).unwrap());
        assert_eq!(read(&path).unwrap(), cells);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"objective\"").unwrap();
        assert!(format!("{:#}", read(&path).unwrap_err()).contains("results.jsonl:3"));
    }

    #[test]
    fn staleness_is_that_of_the_second_half() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, [0, 1, 3, 5].map(|x| format!("{{\"staleness/mean\":{x}}}\n")).concat()).unwrap();
        assert_eq!(mean_staleness(&path), Some(4.0));
        assert_eq!(mean_staleness(&dir.path().join("none")), None);
    }

    #[test]
    fn accuracies_are_found_whatever_the_set_is_called() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("eval.jsonl");
        fs::write(
            &path,
            "{\"step\":0,\"eval/held_out/accuracy\":0.4,\"eval/held_out/length_mean\":3}\n{\"step\":10}\n",
        )
        .unwrap();
        assert_eq!(accuracies(&path), [(0, 0.4)]);
    }
}
