//! What a schema cannot say: ranges that hang together, keys that exclude each other, values across sections.

use std::path::Path;

use freewheel_queue::Backend;
use freewheel_types::RunId;

use super::document::Node;
use super::problem::{Origin, Problem};
use crate::prompts::PoolParams;

use super::{EvalSection, ModelSection, PromptsSection, RunConfig};

/// Collects problems with the place of the key they are about.
pub struct Checks<'d> {
    document: &'d Node,
    problems: Vec<Problem>,
}

impl<'d> Checks<'d> {
    /// Nothing found yet.
    pub fn new(document: &'d Node) -> Self {
        Self { document, problems: Vec::new() }
    }

    /// Notes a problem at `key` unless `good`.
    pub fn require(&mut self, good: bool, key: &str, message: impl Into<String>, hint: Option<&str>) {
        if !good {
            self.note(key, message, hint);
        }
    }

    /// Notes a problem at `key`.
    pub fn note(&mut self, key: &str, message: impl Into<String>, hint: Option<&str>) {
        // An unset key has no place of its own: its section has.
        let origin = self.document.at(key).map_or(Origin::Default, |node| node.origin.clone());
        self.problems.push(Problem {
            origin,
            key: key.to_owned(),
            message: message.into(),
            hint: hint.map(str::to_owned),
        });
    }

    /// Notes a problem told as one line that starts with its dotted key: `learner.steps is 0, …`.
    pub fn told(&mut self, line: &str) {
        let (key, rest) = line.split_once(' ').unwrap_or(("", line));
        let is_key =
            key.contains('.') && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"._".contains(&b));
        if is_key { self.note(key, rest, None) } else { self.note("", line, None) }
    }

    /// What was found.
    pub fn finish(self) -> Vec<Problem> {
        self.problems
    }
}

/// The run's name: `run.name`, or the stem of the config file.
pub fn run_name(config: &RunConfig, path: &Path) -> Result<RunId, String> {
    match &config.run.name {
        Some(name) => name.parse::<RunId>().map_err(|error| error.to_string()),
        None => {
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            stem.parse::<RunId>()
                .map_err(|error| format!("is not set, and the file's name will not do: {error}"))
        }
    }
}

/// Everything about a run's config that needs neither the model nor the network.
pub fn run_config(config: &RunConfig, document: &Node, path: &Path) -> Vec<Problem> {
    let mut checks = Checks::new(document);
    if let Err(message) = run_name(config, path) {
        checks.note("run.name", message, None);
    }
    checks.require(
        !config.run.pin_cores || config.queue.backend == Backend::Redis,
        "run.pin_cores",
        "is set, but with queue.backend = \"memory\" actor and learner are one process",
        Some("set queue.backend = \"redis\""),
    );
    checks.require(
        !config.model.path.is_empty(),
        "model.path",
        "is not set",
        Some("model.path = \"assets/sprout\" (a folder in Hugging Face layout) or a .gguf file"),
    );
    model(&config.model, &mut checks);
    prompts(&config.prompts, &mut checks);
    eval(&config.eval, &config.prompts, &mut checks);
    queue(config, &mut checks);
    sections(config, path, &mut checks);
    let components: Vec<String> = config.reward.component.iter().map(|c| c.name.clone()).collect();
    crate::alarms::check(&config.alarms, &components, &mut checks);
    crate::redteam::check(&config.redteam, &components, &mut checks);
    checks.finish()
}

/// What hangs together in `[model]`, whatever it is for.
pub fn model(model: &ModelSection, checks: &mut Checks<'_>) {
    let group = model.quantise_group;
    checks.require(
        group.is_multiple_of(32),
        "model.quantise_group",
        format!("is {group}, must be a multiple of 32"),
        None,
    );
}

/// What the crates say about their own sections, and what hangs together across them.
fn sections(config: &RunConfig, path: &Path, checks: &mut Checks<'_>) {
    config.actor.problems().iter().for_each(|problem| checks.told(&problem.to_string()));
    config.learner.problems().iter().for_each(|problem| checks.told(problem));
    let reward = config.reward.with_paths(|file| super::resolve(file, path));
    if let Err(problems) = freewheel_reward::RewardStack::check(&reward) {
        problems.into_iter().for_each(|problem| checks.note(&problem.key, problem.message, None));
    }
    for (key, message) in pool_params(config).problems() {
        let key = match key {
            "group_size" => "prompts.group_size".to_owned(),
            "groups_per_step" => "learner.groups_per_step".to_owned(),
            key => format!("prompts.curriculum.{key}"),
        };
        checks.note(&key, message, None);
    }
    let group_size = config.prompts.group_size;
    let min_valid = config.learner.min_valid;
    checks.require(
        min_valid <= group_size,
        "learner.min_valid",
        format!("is {min_valid}, must be at most prompts.group_size ({group_size})"),
        None,
    );
    checks.require(
        !config.learner.loss.needs_greedy() || config.actor.temperature > 0.0,
        "actor.temperature",
        "is 0: with learner.advantage = \"remax\" drawn completions are compared with a greedy one"
            .to_owned(),
        Some("actor.temperature = 1.0"),
    );
}

/// What the prompt pool is built for.
pub fn pool_params(config: &RunConfig) -> PoolParams {
    // Beyond these numbers other checks have spoken already.
    let narrow = |x: u64| u32::try_from(x).unwrap_or(u32::MAX);
    PoolParams {
        group_size: config.prompts.group_size,
        baselines: u32::from(config.learner.loss.needs_greedy()),
        groups_per_step: narrow(config.learner.groups_per_step as u64),
        max_staleness: narrow(config.learner.max_staleness),
        seed: config.run.seed,
        steps: config.learner.steps,
        curriculum: config.prompts.curriculum.clone(),
    }
}

fn prompts(prompts: &PromptsSection, checks: &mut Checks<'_>) {
    match (&prompts.file, prompts.generator) {
        (None, None) => checks.note(
            "prompts.file",
            "there are no prompts: neither `prompts.file` nor `prompts.generator` is set",
            Some("prompts.file = \"prompts.jsonl\", or prompts.generator = \"arithmetic\""),
        ),
        (Some(_), Some(_)) => {
            checks.note("prompts.generator", "`prompts.file` is set too: give one of the two", None);
        }
        _ => {}
    }
    if prompts.generator.is_some() {
        checks.require(
            !prompts.levels.is_empty(),
            "prompts.levels",
            "is empty",
            Some("for example [1, 2, 3]"),
        );
        for level in prompts.levels.iter().filter(|level| !(1..=6).contains(*level)) {
            checks.note("prompts.levels", format!("holds {level}, must be 1 to 6 each"), None);
        }
    }
}

fn eval(eval: &EvalSection, prompts: &PromptsSection, checks: &mut Checks<'_>) {
    let plain = |name: &str| {
        !name.is_empty()
            && name.len() <= 40
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    checks.require(
        plain(&eval.name),
        "eval.name",
        format!("is {:?}, must be 1 to 40 of a-z A-Z 0-9 . _ -", eval.name),
        None,
    );
    checks.require(
        eval.samples == 1 || eval.temperature > 0.0,
        "eval.samples",
        format!("is {} at temperature 0: greedy completions are all the same", eval.samples),
        Some("set eval.temperature = 1.0, or eval.samples = 1"),
    );
    if let (Some(held_out), Some(train)) = (&eval.file, &prompts.file) {
        checks.require(held_out != train, "eval.file", "is the file the policy is trained on", None);
    }
}

fn queue(config: &RunConfig, checks: &mut Checks<'_>) {
    let queue = &config.queue;
    for (key, value) in [
        ("queue.lease_s", queue.lease_s),
        ("queue.learner_lease_s", queue.learner_lease_s),
        ("queue.timeout_s", queue.timeout_s),
    ] {
        checks.require(value > 0.0, key, format!("is {value}, must be above 0 (seconds)"), None);
    }
    checks.require(queue.max_deliveries >= 1, "queue.max_deliveries", "is 0, must be at least 1", None);
    checks.require(queue.keep_versions >= 1, "queue.keep_versions", "is 0, must be at least 1", None);
    if queue.backend == Backend::Redis {
        let url = queue.url.0.as_str();
        let known = ["redis://", "rediss://", "unix://", "redis+unix://"];
        checks.require(
            url == "managed" || known.iter().any(|scheme| url.starts_with(scheme)),
            "queue.url",
            format!("is \"{}\", which is no address of a Redis server", queue.url),
            Some("redis://host:6379/0, rediss://…, unix:///path/to.sock, or \"managed\" to start a private server"),
        );
    }
}
