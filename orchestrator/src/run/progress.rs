//! What a person sees while a run goes on: a bar on a terminal, a line now and then otherwise.
//!
//! Reads `metrics.jsonl` and `eval.jsonl` as they grow, so it is the same for roles in this process and in others.

use std::io::{IsTerminal as _, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::folder::{StepLine, names};

const POLL: Duration = Duration::from_millis(200);
/// Without a terminal: at least this long between two lines.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Shows progress of the run in `dir` until `done`, and everything there is at that moment.
pub async fn follow(dir: PathBuf, steps: u64, done: CancellationToken) {
    let mut view = View::new(&dir, steps);
    while !done.is_cancelled() {
        tokio::select! {
            () = done.cancelled() => {}
            () = tokio::time::sleep(POLL) => {}
        }
        view.update();
    }
    view.finish();
}

struct View {
    metrics: Tail,
    eval: Tail,
    bar: Option<ProgressBar>,
    steps: u64,
    last: Option<StepLine>,
    accuracy: Option<f64>,
    printed: Option<Instant>,
    begun: Instant,
    first_step: Option<u64>,
}

impl View {
    fn new(dir: &Path, steps: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(&format!(
                "{{bar:{}.cyan/dim}} {{pos}}/{{len}}  {{wide_msg}}",
                bar_width()
            ))
            .expect("the template is fixed")
            .progress_chars("━╸─");
            let bar = ProgressBar::new(steps).with_style(style);
            bar.set_message("first rollouts are on their way");
            bar
        });
        Self {
            metrics: Tail::at_end(dir.join(names::METRICS)),
            eval: Tail::at_end(dir.join(names::EVAL)),
            bar,
            steps,
            last: None,
            accuracy: None,
            printed: None,
            begun: Instant::now(),
            first_step: None,
        }
    }

    fn update(&mut self) {
        for line in self.eval.lines() {
            let number = |key: &str| {
                line.iter()
                    .find(|(k, _)| k.ends_with(key) && !k.contains("/tag/"))
                    .and_then(|(_, x)| x.as_f64())
            };
            if let Some(accuracy) = number("/accuracy") {
                self.accuracy = Some(accuracy);
                let (low, high) =
                    (number("/accuracy_low").unwrap_or(0.0), number("/accuracy_high").unwrap_or(1.0));
                let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
                self.say(&format!("step {step:>5}  held-out accuracy {accuracy:.3}  [{low:.3}, {high:.3}]"));
            }
        }
        let lines = self.metrics.lines();
        let Some(line) = lines.into_iter().last() else { return };
        let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
        let first = *self.first_step.get_or_insert(step.saturating_sub(1));
        let done = step.saturating_sub(first).max(1);
        let left = self.begun.elapsed().mul_f64(self.steps.saturating_sub(step) as f64 / done as f64);
        let mut parts = summary(&line, self.accuracy);
        parts.insert(0, format!("{} left", clock(left)));
        match &self.bar {
            Some(bar) => {
                let counted = 2 * self.steps.to_string().len() + 1;
                let room = terminal_width().saturating_sub(bar_width() + counted + 4);
                bar.set_position(step);
                bar.set_message(fitting(&parts, room));
            }
            None if self.printed.is_none_or(|at| at.elapsed() >= PLAIN_EVERY) || step == self.steps => {
                eprintln!("step {step:>5}/{}  {}", self.steps, parts.join("  "));
                self.printed = Some(Instant::now());
            }
            None => {}
        }
        self.last = Some(line);
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    fn finish(&mut self) {
        self.update();
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// Columns of the terminal that standard error goes to.
fn terminal_width() -> usize {
    usize::from(console::Term::stderr().size().1)
}

/// Columns of the bar: a narrow terminal keeps the words.
fn bar_width() -> usize {
    (terminal_width() / 5).clamp(6, 28)
}

/// As many whole parts as fit into `room` columns; the first always.
fn fitting(parts: &[String], room: usize) -> String {
    let mut text = String::new();
    for part in parts {
        let needed = text.chars().count() + 2 + part.chars().count();
        if !text.is_empty() && needed > room {
            break;
        }
        if !text.is_empty() {
            text.push_str("  ");
        }
        text.push_str(part);
    }
    text
}

/// The numbers of one step that say whether all is well, the most telling first.
fn summary(line: &StepLine, accuracy: Option<f64>) -> Vec<String> {
    let number = |key: &str| line.get(key).and_then(Value::as_f64);
    let mut parts = Vec::new();
    let mut part = |name: &str, value: Option<f64>, digits: usize| {
        if let Some(value) = value {
            parts.push(format!("{name} {value:.digits$}"));
        }
    };
    part("reward", number("reward/mean"), 3);
    part("accuracy", accuracy, 3);
    part("length", number("rollout/length_mean"), 1);
    part("staleness", number("staleness/mean"), 1);
    part("zero-signal", number("prompts/zero_signal"), 2);
    if let Some(rate) = number("rollout/tokens_per_s") {
        parts.push(format!("{} tok/s", thousands(rate)));
    }
    parts
}

fn thousands(x: f64) -> String {
    let digits = format!("{x:.0}");
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// `1:02:03` or `2:03`.
pub fn clock(duration: Duration) -> String {
    let s = duration.as_secs();
    if s >= 3600 {
        format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
    } else {
        format!("{}:{:02}", s / 60, s % 60)
    }
}

/// Whole new lines of a growing JSONL file.
struct Tail {
    path: PathBuf,
    offset: u64,
    partial: String,
}

impl Tail {
    fn at_end(path: PathBuf) -> Self {
        let offset = std::fs::metadata(&path).map_or(0, |meta| meta.len());
        Self { path, offset, partial: String::new() }
    }

    fn lines(&mut self) -> Vec<StepLine> {
        let Ok(mut file) = std::fs::File::open(&self.path) else { return Vec::new() };
        // A resume rewrites the file; what is shorter now is read from its new end.
        let length = file.metadata().map_or(0, |meta| meta.len());
        if length < self.offset {
            self.offset = length;
            self.partial.clear();
        }
        let mut bytes = Vec::new();
        if file.seek(SeekFrom::Start(self.offset)).is_err() || file.read_to_end(&mut bytes).is_err() {
            return Vec::new();
        }
        self.offset += bytes.len() as u64;
        self.partial.push_str(&String::from_utf8_lossy(&bytes));
        let Some(end) = self.partial.rfind('\n') else { return Vec::new() };
        let rest = self.partial.split_off(end + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        whole.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_tail_gives_whole_lines_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let mut tail = Tail::at_end(path.clone());
        assert!(tail.lines().is_empty());
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(b"{\"step\":1}\n{\"st").unwrap();
        assert_eq!(tail.lines().len(), 1);
        file.write_all(b"ep\":2}\n").unwrap();
        assert_eq!(tail.lines()[0]["step"], 2);
        assert!(tail.lines().is_empty());
    }

    #[test]
    fn a_narrow_terminal_shows_fewer_numbers_and_cuts_none() {
        let parts = ["0:41 left", "reward 0.500", "accuracy 0.423"].map(str::to_owned);
        assert_eq!(fitting(&parts, 200), "0:41 left  reward 0.500  accuracy 0.423");
        assert_eq!(fitting(&parts, 38), "0:41 left  reward 0.500");
        assert_eq!(fitting(&parts, 39), "0:41 left  reward 0.500  accuracy 0.423");
        assert_eq!(fitting(&parts, 0), "0:41 left");
    }

    #[test]
    fn numbers_and_times_read_well() {
        assert_eq!(
            [thousands(12.4), thousands(1234.0), thousands(1_234_567.0)].join(" "),
            "12 1,234 1,234,567"
        );
        assert_eq!(
            (clock(Duration::from_secs(125)), clock(Duration::from_secs(3725))),
            ("2:05".into(), "1:02:05".into())
        );
    }
}
