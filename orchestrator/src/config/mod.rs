//! One typed tree for a whole run: what was written becomes what will run, or every problem at once.
//!
//! ```text
//! defaults ◄─ file ◄─ environment ◄─ --set        document   values with their places
//!        └──────► schema walk ──► serde ──► checks           all problems, then one error
//! ```
//!
//! Section structs live in the crate they configure; their doc comments are the documentation (`reference`).

mod aliases;
mod checks;
mod document;
mod problem;
pub mod reference;
mod schema;
mod sections;

use std::path::{Path, PathBuf};

use freewheel_actor::ActorConfig;
use freewheel_learner::LearnerConfig;
use freewheel_queue::QueueConfig;
use freewheel_reward::RewardConfig;
use freewheel_types::RunId;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::alarms::AlarmConfig;
use crate::redteam::RedteamSection;

pub use checks::{Checks, model as check_model, pool_params};
pub use document::{Node, Value};
pub use problem::{ConfigError, Origin, Problem};
pub use sections::{
    Dtype, EvalSection, GeneratorKind, LogSection, ModelSection, PromptsSection, Quantise, RunSection,
};

/// Everything a run reads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Name, folder, seed, time limit.
    pub run: RunSection,
    /// The policy to start from.
    pub model: ModelSection,
    /// What carries rollouts and weights between the roles.
    pub queue: QueueConfig,
    /// Where prompts come from.
    pub prompts: PromptsSection,
    /// How rollouts are generated.
    pub actor: ActorConfig,
    /// How completions are scored.
    pub reward: RewardConfig,
    /// How the policy is trained.
    pub learner: LearnerConfig,
    /// Held-out accuracy.
    pub eval: EvalSection,
    /// What is written beside the metrics.
    pub log: LogSection,
    /// Signs that a reward is being gamed, and what is done about them. Default: none.
    pub alarms: Vec<AlarmConfig>,
    /// A second model that attacks the policy (`freewheel redteam`). Off unless enabled.
    pub redteam: RedteamSection,
}

/// The environment variables that set a key; there are no others that do.
pub const ENVIRONMENT: [(&str, &str); 3] =
    [("FREEWHEEL_QUEUE_URL", "queue.url"), ("FREEWHEEL_RUN_DIR", "run.dir"), ("FREEWHEEL_LOG", "log.level")];

/// A checked config with what is derived from it.
#[derive(Clone, Debug)]
pub struct Loaded<C = RunConfig> {
    /// The values.
    pub config: C,
    /// The file it was read from.
    pub path: PathBuf,
    /// All values with their origins, for `config show`.
    pub document: Node,
    /// The `--set` flags, to be handed on to role processes.
    pub overrides: Vec<String>,
}

/// Reads and checks a run's config: file, environment, `--set` flags. Needs no model and touches no network.
///
/// # Errors
/// All problems together.
pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, ConfigError> {
    load_as(path, overrides, &environment(), checks::run_config).map(Loaded::with_paths)
}

/// Reads a config of type `C` (a run's, or that of another job).
///
/// # Errors
/// All problems together.
pub fn load_as<C>(
    path: &Path,
    overrides: &[String],
    environment: &[(&'static str, &'static str, String)],
    checks: impl Fn(&C, &Node, &Path) -> Vec<Problem>,
) -> Result<Loaded<C>, ConfigError>
where
    C: Default + Serialize + DeserializeOwned + JsonSchema,
{
    let name = path.display().to_string();
    let fail = |problems| ConfigError { what: name.clone(), problems };
    let text = std::fs::read(path).map_err(|error| fail(vec![unreadable(path, &error)]))?;
    let text = String::from_utf8(text).map_err(|error| fail(vec![not_utf8(&name, &error)]))?;
    parse(path, &text, overrides, environment, checks)
}

/// Reads a config of type `C` from `text`, a part of the file `path` with everything else blank, so that lines keep their numbers.
///
/// # Errors
/// All problems together.
pub fn load_part<C>(
    path: &Path,
    text: &str,
    overrides: &[String],
    checks: impl Fn(&C, &Node, &Path) -> Vec<Problem>,
) -> Result<Loaded<C>, ConfigError>
where
    C: Default + Serialize + DeserializeOwned + JsonSchema,
{
    parse(path, text, overrides, &[], checks)
}

/// A run's config, the same way.
///
/// # Errors
/// All problems together.
pub fn load_run_part(path: &Path, text: &str, overrides: &[String]) -> Result<Loaded, ConfigError> {
    load_part(path, text, overrides, checks::run_config).map(Loaded::with_paths)
}

/// A run's config from text and `--set` flags, where there is no file; `name` stands for it in messages.
///
/// # Errors
/// All problems together.
pub fn load_text(name: &str, text: &str, overrides: &[String]) -> Result<Loaded, ConfigError> {
    parse(Path::new(name), text, overrides, &environment(), checks::run_config)
}

fn parse<C>(
    path: &Path,
    text: &str,
    overrides: &[String],
    environment: &[(&'static str, &'static str, String)],
    checks: impl Fn(&C, &Node, &Path) -> Vec<Problem>,
) -> Result<Loaded<C>, ConfigError>
where
    C: Default + Serialize + DeserializeOwned + JsonSchema,
{
    let name = path.display().to_string();
    let fail = |problems| ConfigError { what: name.clone(), problems };
    let written = layers(&name, text, overrides, environment).map_err(&fail)?;
    let schema = schema_of::<C>();
    let mut found = Vec::new();
    schema::check(&schema, &schema, &written, "", &mut found);
    // What fits the schema is checked further even if something else does not, so that one pass shows everything.
    let mut sound = written.clone();
    found.iter().for_each(|problem| sound.remove(&problem.key));
    let (config, document) = match typed::<C>(&sound) {
        Ok(typed) => typed,
        Err(error) if found.is_empty() => return Err(fail(vec![leftover(&error)])),
        Err(_) => return Err(fail(found)),
    };
    let caused = |problem: &Problem| found.iter().any(|cause| cause.explains(&problem.key));
    let further: Vec<Problem> = checks(&config, &document, path).into_iter().filter(|p| !caused(p)).collect();
    found.extend(further);
    if !found.is_empty() {
        return Err(fail(found));
    }
    Ok(Loaded { config, path: path.to_owned(), document, overrides: overrides.to_vec() })
}

/// The typed config, and the document with defaults filled in.
fn typed<C: Serialize + DeserializeOwned>(written: &Node) -> Result<(C, Node), serde_json::Error> {
    let config: C = serde_json::from_value(written.to_json())?;
    let mut document = Node::from_json(&serde_json::to_value(&config)?).unwrap_or_else(Node::table);
    document.overlay(written.clone());
    Ok((config, document))
}

/// Aliases whose target is no key of a run's config; a test wants none.
pub fn unknown_alias_targets() -> Vec<&'static str> {
    let keys = schema::all_keys(&schema_of::<RunConfig>());
    aliases::ALIASES
        .iter()
        .map(|(ours, _)| *ours)
        .filter(|ours| !keys.iter().any(|key| key == ours))
        .collect()
}

/// The schema of a config type, as JSON.
pub fn schema_of<C: JsonSchema>() -> Json {
    schemars::schema_for!(C).to_value()
}

impl Loaded {
    /// Paths of reward components as the config means them.
    fn with_paths(mut self) -> Self {
        self.config.reward = self.config.reward.with_paths(|file| resolve(file, &self.path));
        self
    }

    /// The run's name: `run.name`, or the config file's stem.
    pub fn run_id(&self) -> RunId {
        checks::run_name(&self.config, &self.path).expect("checked when the config was loaded")
    }

    /// The run's folder.
    pub fn run_dir(&self) -> PathBuf {
        Path::new(&self.config.run.dir).join(self.run_id().as_str())
    }

    /// `path` as the config means it: as given if that exists, else beside the config file.
    pub fn resolve(&self, path: &str) -> PathBuf {
        resolve(path, &self.path)
    }
}

/// `path` as the file `config` means it: as given if that exists, else beside `config`.
pub fn resolve(path: &str, config: &Path) -> PathBuf {
    let plain = PathBuf::from(path);
    let beside = config.parent().map(|parent| parent.join(path));
    match beside {
        Some(beside) if plain.is_relative() && !plain.exists() && beside.exists() => beside,
        _ => plain,
    }
}

/// The variables of [`ENVIRONMENT`] that are set.
fn environment() -> Vec<(&'static str, &'static str, String)> {
    ENVIRONMENT
        .iter()
        .filter_map(|(variable, key)| Some((*variable, *key, std::env::var(variable).ok()?)))
        .collect()
}

fn layers(
    name: &str,
    text: &str,
    overrides: &[String],
    environment: &[(&'static str, &'static str, String)],
) -> Result<Node, Vec<Problem>> {
    let mut node = Node::parse(name, text)?;
    for (variable, key, value) in environment {
        node.overlay(Node::nested(key, Value::String(value.clone()), &Origin::Env(variable)));
    }
    let mut problems = Vec::new();
    for flag in overrides {
        match flag.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() => {
                let value = Node::parse_value(value.trim(), &Origin::Flag);
                node.overlay(Node::nested(key.trim(), value, &Origin::Flag));
            }
            _ => problems.push(Problem {
                origin: Origin::Flag,
                key: String::new(),
                message: format!("{flag:?} is not KEY=VALUE"),
                hint: Some("for example --set learner.learning_rate=1e-4".into()),
            }),
        }
    }
    if problems.is_empty() { Ok(node) } else { Err(problems) }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Problem {
    Problem {
        origin: Origin::Default,
        key: String::new(),
        message: format!("cannot be read: {error}"),
        hint: (error.kind() == std::io::ErrorKind::NotFound && path.extension().is_none())
            .then(|| format!("is it {}.toml?", path.display())),
    }
}

fn not_utf8(name: &str, error: &std::string::FromUtf8Error) -> Problem {
    let good = error.utf8_error().valid_up_to();
    let line = error.as_bytes()[..good].iter().filter(|byte| **byte == b'\n').count() + 1;
    Problem {
        origin: Origin::File { path: name.to_owned(), line, column: 1 },
        key: String::new(),
        message: format!("is not UTF-8 (byte {good})"),
        hint: None,
    }
}

/// What the schema could not express and serde refuses.
fn leftover(error: &serde_json::Error) -> Problem {
    Problem { origin: Origin::Default, key: String::new(), message: error.to_string(), hint: None }
}
