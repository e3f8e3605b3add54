//! Metrics to disk: JSON Lines first, TensorBoard beside it.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use freewheel_learner::assembly::Group;
use freewheel_learner::metrics::MetricsSink;
use freewheel_types::{GroupFate, PolicyVersion};
use serde_json::{Map, Value, json};

use super::audit::{AuditLog, group_record};
use super::{EventWriter, SampleLog, names};
use crate::alarms::{AlarmAction, AlarmConfig, Alarms, Raised};

/// One line of metrics.
pub type StepLine = Map<String, Value>;

/// Adds what the learner cannot know (actors, prompt pool) to its line.
pub type Extras = Box<dyn Fn(&mut StepLine) + Send + Sync>;

/// Samples of one group: two show how its answers differ, and leave room for other prompts.
const SAMPLES_OF_GROUP: usize = 2;

/// Writes `metrics.jsonl`, `eval.jsonl`, TensorBoard events and rollout samples.
pub struct RunMetrics {
    dir: PathBuf,
    samples: Option<SampleLog>,
    extras: Extras,
    state: Mutex<State>,
}

struct State {
    metrics: Option<File>,
    /// `None` once it could not be written.
    audit: Option<AuditLog>,
    alarms: Alarms,
    /// Seconds of learning before this process began.
    wall_before: f64,
    events: Option<EventWriter>,
}

impl RunMetrics {
    /// Metrics of the run in `dir`.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn new(dir: &Path, tensorboard: bool, extras: Extras) -> std::io::Result<Self> {
        let events = if tensorboard { Some(EventWriter::create(dir)?) } else { None };
        let audit = AuditLog::open(&dir.join(names::AUDIT)).map_err(std::io::Error::other)?;
        let state = Mutex::new(State {
            metrics: None,
            audit: Some(audit),
            alarms: Alarms::default(),
            wall_before: 0.0,
            events,
        });
        Ok(Self { dir: dir.to_owned(), samples: None, extras, state })
    }

    /// Adds samples of what the learner was given.
    #[must_use]
    pub fn with_samples(self, samples: SampleLog) -> Self {
        Self { samples: Some(samples), ..self }
    }

    /// Watches the steps from here on.
    #[must_use]
    pub fn with_alarms(self, alarms: &[AlarmConfig]) -> Self {
        self.state.lock().expect("no holder of the lock panics").alarms = Alarms::new(alarms);
        self
    }

    /// Tells of an alarm everywhere, and asks the run to drain if that is what it does.
    fn raise(&self, state: &mut State, raised: &Raised) {
        tracing::warn!(step = raised.step, alarm = raised.alarm, action = ?raised.action, "{}", raised.what);
        let told = json!(raised).as_object().cloned().unwrap_or_default();
        let written = append(&self.dir.join(names::ALARMS)).and_then(|mut file| write_line(&mut file, &told));
        report(written, names::ALARMS);
        state.audit("alarm", Value::Object(told), true);
        if raised.action > AlarmAction::Log {
            report(fs::write(self.dir.join(names::CONTROL), "drain"), names::CONTROL);
        }
    }

    /// One evaluation.
    pub fn eval(&self, step: u64, line: &StepLine) {
        let mut state = self.state.lock().expect("no holder of the lock panics");
        let written = append(&self.dir.join(names::EVAL)).and_then(|mut file| write_line(&mut file, line));
        report(written, names::EVAL);
        state.scalars(step, line);
    }
}

impl MetricsSink for RunMetrics {
    fn step(&self, line: &StepLine) {
        let mut line = line.clone();
        (self.extras)(&mut line);
        let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
        let mut state = self.state.lock().expect("no holder of the lock panics");
        let path = self.dir.join(names::METRICS);
        if state.metrics.is_none() {
            // After a resume the learner makes some steps again: their old lines give way.
            match keep_before(&path, step) {
                Ok(last) => state.wall_before = last.as_ref().and_then(wall).unwrap_or(0.0),
                Err(error) => report(Err(error), names::METRICS),
            }
            state.metrics = append(&path).map_err(|error| report(Err(error), names::METRICS)).ok();
        }
        if let Some(seconds) = wall(&line) {
            line.insert(WALL.into(), json!(state.wall_before + seconds));
        }
        let raised = state.alarms.step(&mut line);
        if let Some(file) = &mut state.metrics {
            report(write_line(file, &line), names::METRICS);
        }
        state.scalars(step, &line);
        state.audit("step", Value::Object(line), true);
        raised.iter().for_each(|raised| self.raise(&mut state, raised));
    }

    fn made_again(&self, line: &StepLine) {
        let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
        if !has_step(&self.dir.join(names::METRICS), step) {
            self.step(line);
        }
    }

    fn group(&self, version: PolicyVersion, group: &Group, fate: GroupFate) {
        let record = group_record(version, group, fate);
        self.state.lock().expect("no holder of the lock panics").audit("group", record, false);
        let Some(samples) = &self.samples else { return };
        group.judged().take(SAMPLES_OF_GROUP).for_each(|scored| samples.offer(version.step, scored, fate));
    }
}

impl State {
    fn audit(&mut self, kind: &str, body: Value, sync: bool) {
        let Some(log) = &mut self.audit else { return };
        if let Err(error) = log.append(kind, body).and_then(|()| if sync { log.sync() } else { Ok(()) }) {
            tracing::error!(%error, "the audit log ends here");
            self.audit = None;
        }
    }

    fn scalars(&mut self, step: u64, line: &StepLine) {
        let Some(events) = &mut self.events else { return };
        let scalars = line
            .iter()
            .filter(|(key, _)| key.contains('/'))
            .filter_map(|(key, x)| Some((key.as_str(), x.as_f64()?)));
        if let Err(error) = events.scalars(step, scalars) {
            tracing::warn!(%error, "TensorBoard events end here");
            self.events = None;
        }
    }
}

fn append(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// One write call a line, so that a reader never sees half of one.
fn write_line(file: &mut File, line: &StepLine) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)
}

fn report(result: std::io::Result<()>, what: &str) {
    if let Err(error) = result {
        tracing::error!(%error, what, "metrics cannot be written");
    }
}

/// Whether `path` has the line of `step`, whole.
fn has_step(path: &Path, step: u64) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let parsed = |line: String| serde_json::from_str::<StepLine>(&line).ok();
    let lines = BufReader::new(file).lines().map_while(Result::ok).filter_map(parsed);
    lines.filter_map(|line| line.get("step")?.as_u64()).any(|of_line| of_line == step)
}

const WALL: &str = "time/wall_s";

fn wall(line: &StepLine) -> Option<f64> {
    line.get(WALL)?.as_f64()
}

/// Keeps the lines of `path` whose step is below `step`, and gives the last of them; a torn last line goes too.
pub(super) fn keep_before(path: &Path, step: u64) -> std::io::Result<Option<StepLine>> {
    let Ok(file) = File::open(path) else { return Ok(None) };
    let (mut kept, mut last) = (Vec::new(), None);
    for line in BufReader::new(file).lines() {
        let line = line?;
        let parsed = serde_json::from_str::<StepLine>(&line).ok();
        let of_line = parsed.as_ref().and_then(|line| line.get("step")?.as_u64());
        if of_line.is_some_and(|of_line| of_line < step) {
            last = parsed;
            kept.extend_from_slice(line.as_bytes());
            kept.push(b'\n');
        }
    }
    let tmp = path.with_extension("jsonl.tmp");
    fs::write(&tmp, kept)?;
    fs::rename(tmp, path)?;
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> StepLine {
        json!({"step": step, "reward/mean": 0.5, "time/wall_s": 2.0}).as_object().cloned().unwrap()
    }

    #[test]
    fn an_alarm_is_in_the_metrics_the_alarms_and_the_audit_and_asks_the_run_to_drain() {
        let dir = tempfile::tempdir().unwrap();
        let alarm = AlarmConfig { action: AlarmAction::Pause, window: 1, steps: 1, ..AlarmConfig::default() };
        let metrics = RunMetrics::new(dir.path(), false, Box::new(|_| ())).unwrap().with_alarms(&[alarm]);
        let of = |step: u64, length: f64| {
            let mut line = line(step);
            line.insert("rollout/length_mean".into(), json!(length));
            line
        };
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap_or_default();
        metrics.step(&of(1, 10.0));
        metrics.step(&of(2, 12.0));
        assert_eq!((read(names::ALARMS), read(names::CONTROL)), (String::new(), String::new()));
        metrics.step(&of(3, 14.0));
        let raised: Raised = serde_json::from_str(read(names::ALARMS).trim()).unwrap();
        assert_eq!((raised.step, raised.alarm.as_str(), raised.action), (3, "length", AlarmAction::Pause));
        assert_eq!(read(names::CONTROL), "drain");
        assert!(read(names::METRICS).lines().last().unwrap().contains("\"alarm/length\":1.33"));
        assert!(read(names::AUDIT).contains("\"kind\":\"alarm\""));
    }

    #[test]
    fn steps_made_again_after_a_resume_replace_their_lines() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            RunMetrics::new(dir.path(), true, Box::new(|line| drop(line.insert("x".into(), json!(1)))))
                .unwrap()
        };
        let first = open();
        (1..=5).for_each(|step| first.step(&line(step)));
        drop(first);
        // The process died while it wrote.
        append(&dir.path().join(names::METRICS)).unwrap().write_all(b"{\"step\": 6, \"rew").unwrap();
        let second = open();
        // Step 5 is told already; step 6 was lost.
        (5..=6).for_each(|step| second.made_again(&line(step)));
        drop(second);
        let second = open();
        (4..=6).for_each(|step| second.step(&line(step)));
        let text = fs::read_to_string(dir.path().join(names::METRICS)).unwrap();
        let lines: Vec<StepLine> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
        assert!(lines.iter().all(|line| line["x"] == 1));
        let seconds: Vec<f64> = lines.iter().map(|line| wall(line).unwrap()).collect();
        assert_eq!(seconds, [2.0, 2.0, 2.0, 4.0, 4.0, 4.0], "the time before the resume counts");
    }
}
