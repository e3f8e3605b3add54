//! What a run's folder holds, read leniently: a torn line is counted, not fatal.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Map, Value};

use crate::alarms::Raised;
use crate::folder::names;

type Line = Map<String, Value>;

/// Everything the page shows.
#[derive(Debug, Default)]
pub(super) struct RunData {
    pub name: String,
    pub metrics: Vec<Line>,
    pub evals: Vec<Line>,
    /// Alarms that were raised, oldest first.
    pub alarms: Vec<Raised>,
    pub config: Option<String>,
    /// Samples of the first and of the last steps.
    pub first_samples: Vec<Line>,
    pub last_samples: Vec<Line>,
    pub skipped_lines: usize,
}

/// Accuracy of one held-out set over the run.
pub(super) struct HeldOut {
    pub name: String,
    /// Step, accuracy.
    pub points: Vec<(f64, f64)>,
    /// Step, lower and upper end of the interval.
    pub band: Vec<(f64, f64, f64)>,
}

/// Samples shown of each end of the run.
const SAMPLES: usize = 6;

impl RunData {
    pub(super) fn read(dir: &Path) -> anyhow::Result<Self> {
        anyhow::ensure!(dir.is_dir(), "{} is not a run's folder", dir.display());
        let full = dir.canonicalize().with_context(|| format!("cannot read {}", dir.display()))?;
        let mut data = Self {
            name: full
                .file_name()
                .map_or_else(|| "run".to_owned(), |name| name.to_string_lossy().into_owned()),
            config: fs::read_to_string(dir.join("config.toml")).ok(),
            ..Self::default()
        };
        data.metrics = data.lines(&dir.join("metrics.jsonl"))?;
        data.evals = data.lines(&dir.join("eval.jsonl"))?;
        let alarms = data.lines(&dir.join(names::ALARMS))?.into_iter();
        data.alarms = alarms.filter_map(|line| serde_json::from_value(line.into()).ok()).collect();
        let files = sample_files(&dir.join("rollouts"))?;
        if let [first, ..] = files.as_slice() {
            let lines = data.lines(first)?;
            data.first_samples = lines.into_iter().take(SAMPLES).collect();
        }
        if let [.., last] = files.as_slice() {
            let lines = data.lines(last)?;
            let from = lines.len().saturating_sub(SAMPLES);
            // A short run has one file: what is shown as first is not shown again as last.
            let from = if files.len() == 1 { from.max(data.first_samples.len()) } else { from };
            data.last_samples = lines.into_iter().skip(from).collect();
        }
        Ok(data)
    }

    /// The sound lines of a JSONL file; none if it is not there.
    fn lines(&mut self, path: &Path) -> anyhow::Result<Vec<Line>> {
        let file = match fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let mut lines = Vec::new();
        for line in BufReader::new(file).split(b'\n') {
            let line = line.with_context(|| format!("cannot read {}", path.display()))?;
            match serde_json::from_slice(&line) {
                Ok(Value::Object(line)) => lines.push(line),
                _ if line.trim_ascii().is_empty() => {}
                _ => self.skipped_lines += 1,
            }
        }
        Ok(lines)
    }

    /// (step, value) of a metric, finite values only.
    pub(super) fn series(&self, key: &str) -> Vec<(f64, f64)> {
        series(&self.metrics, key)
    }

    /// Metrics whose name starts with `prefix` and ends with `suffix`, with what is between.
    pub(super) fn matching(&self, prefix: &str, suffix: &str) -> Vec<(String, String)> {
        let mut found: Vec<(String, String)> = Vec::new();
        for key in self.metrics.iter().flat_map(Map::keys) {
            let middle = key.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(suffix));
            if let Some(middle) = middle.filter(|middle| !middle.is_empty())
                && !found.iter().any(|(known, _)| known == key)
            {
                found.push((key.clone(), middle.to_owned()));
            }
        }
        found
    }

    pub(super) fn last(&self, key: &str) -> Option<f64> {
        self.series(key).last().map(|point| point.1)
    }

    /// Every metric of the last line under `prefix`, without it.
    pub(super) fn last_with_prefix(&self, prefix: &str) -> Vec<(String, f64)> {
        let entries = self.metrics.last().into_iter().flatten();
        entries
            .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?.to_owned(), value.as_f64()?)))
            .collect()
    }

    pub(super) fn max(&self, key: &str) -> Option<f64> {
        self.series(key).into_iter().map(|point| point.1).reduce(f64::max)
    }

    pub(super) fn sum(&self, key: &str) -> Option<f64> {
        let series = self.series(key);
        (!series.is_empty()).then(|| series.iter().map(|point| point.1).sum())
    }

    /// Means over the first and the last tenth of a noisy metric.
    pub(super) fn ends(&self, key: &str) -> Option<(f64, f64)> {
        let series = self.series(key);
        let n = series.len().div_ceil(10);
        let mean = |part: &[(f64, f64)]| part.iter().map(|point| point.1).sum::<f64>() / part.len() as f64;
        (n > 0).then(|| (mean(&series[..n]), mean(&series[series.len() - n..])))
    }

    /// The held-out sets, `eval/NAME/accuracy`.
    pub(super) fn held_out(&self) -> Vec<HeldOut> {
        let mut names: Vec<String> = Vec::new();
        for key in self.evals.iter().flat_map(Map::keys) {
            let name = key.strip_prefix("eval/").and_then(|rest| rest.strip_suffix("/accuracy"));
            if let Some(name) =
                name.filter(|name| !name.contains('/') && !names.iter().any(|known| known == name))
            {
                names.push(name.to_owned());
            }
        }
        names.into_iter().map(|name| self.held_out_set(name)).collect()
    }

    fn held_out_set(&self, name: String) -> HeldOut {
        let of = |suffix: &str| series(&self.evals, &format!("eval/{name}/accuracy{suffix}"));
        let (low, high) = (of("_low"), of("_high"));
        let band = low.iter().zip(&high).filter(|(l, h)| l.0 == h.0).map(|(l, h)| (l.0, l.1, h.1)).collect();
        HeldOut { points: of(""), band, name }
    }
}

impl HeldOut {
    /// Name, first and last accuracy.
    pub(super) fn ends(&self) -> Option<(&str, f64, f64)> {
        Some((&self.name, self.points.first()?.1, self.points.last()?.1))
    }
}

fn series(lines: &[Line], key: &str) -> Vec<(f64, f64)> {
    let point = |(at, line): (usize, &Line)| {
        let value = line.get(key)?.as_f64().filter(|x| x.is_finite())?;
        let step = line.get("step").and_then(Value::as_f64).unwrap_or(at as f64);
        Some((step, value))
    };
    lines.iter().enumerate().filter_map(point).collect()
}

fn sample_files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(Vec::new()) };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
