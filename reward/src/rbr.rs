//! Rule-based rewards: statements about an answer, each found true or false, and a weight for each (Mu et al., arXiv 2411.01111).
//!
//! ```text
//! completion ─┬─ statements with a `pattern` ─► regular expressions ──────────────────────────┬─► true or false for each ─► sum of weights
//!             └─ statements with a `text` ─► one question to a chat model, JSON under a schema ─┘
//! ```
//!
//! The weights are fitted to ranked answers by `freewheel guard rules`. A statement that the model leaves out costs the rollout its reward, never a wrong one.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::ComponentConfig;
use crate::json_file;
use crate::model::holds_image;
use crate::remote::{Client, ask_judge};
use crate::stack::{Completion, Component, Judgement, Unscored};
use crate::verifiers::{compile, tail};

const STATEMENTS_MAX: usize = 64;
/// A name, a truth value and punctuation, for each statement.
const TOKENS_EACH: u32 = 24;

/// Statements with their weights: a JSON file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleFile {
    /// The statements.
    pub statements: Vec<Statement>,
}

/// One statement about an answer: `text`, which a model finds true or false, or `pattern`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// Name: letters, digits, `_`.
    pub name: String,
    /// What a model finds true or false of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// A regular expression; the statement is true where it matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// What it adds to the reward where it is true.
    #[serde(default)]
    pub weight: f32,
}

impl RuleFile {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// If it cannot be read, is no list of statements, or a statement has not one of text and pattern, a pattern that does not compile, a name that is used
    /// twice or a weight that is not finite.
    pub fn read(path: &Path) -> Result<Self, String> {
        let rules: Self = json_file::read(path, "freewheel guard rules")?;
        rules.check().map_err(|why| format!("{}: {why}", path.display()))?;
        Ok(rules)
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=STATEMENTS_MAX).contains(&self.statements.len()) {
            return Err(format!("must have 1 to {STATEMENTS_MAX} statements, has {}", self.statements.len()));
        }
        let mut names = BTreeSet::new();
        for statement in &self.statements {
            let name = &statement.name;
            let fine = (1..=63).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            if !fine || !names.insert(name) {
                return Err(format!(
                    "the name {name:?} is used twice, or is not 1 to 63 letters, digits or '_'"
                ));
            }
            match (&statement.text, &statement.pattern) {
                (Some(text), None) if !text.trim().is_empty() => {}
                (None, Some(pattern)) => {
                    compile(pattern).map(drop).map_err(|why| format!("{name}: {why}"))?
                }
                _ => return Err(format!("{name}: needs one of `text` (not empty) and `pattern`")),
            }
            if !statement.weight.is_finite() {
                return Err(format!("{name}: the weight must be finite"));
            }
        }
        Ok(())
    }

    fn needs_model(&self) -> bool {
        self.statements.iter().any(|statement| statement.text.is_some())
    }
}

/// A chat model that finds statements true or false.
struct Grader {
    client: Client,
    model: String,
}

/// The component.
pub struct RuleBased {
    rules: RuleFile,
    /// One a statement; `None` where the model decides.
    patterns: Vec<Option<Regex>>,
    /// Where there are statements that are not patterns.
    grader: Option<Grader>,
    version: String,
}

impl RuleBased {
    /// Checks the settings; problems as (key, message). Asks nobody.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn new(c: &ComponentConfig, deadline: Duration) -> Result<Self, Vec<(&'static str, String)>> {
        let mut problems = Vec::new();
        let rules = match c.rules.as_deref() {
            None => Err("is not set; give a JSON file with statements".to_owned()),
            Some(path) => RuleFile::read(Path::new(path)),
        };
        let rules = rules.map_err(|message| problems.push(("rules", message))).ok();
        let grader = c.remote.as_ref().and_then(|remote| {
            problems.extend(remote.problems_of_one());
            let how = remote.rules(deadline).map_err(|problem| problems.push(problem)).ok()?;
            Some(Grader { client: Client::new(remote.urls.first()?, how), model: remote.model.clone() })
        });
        if let Some(rules) = &rules {
            let message = match (rules.needs_model(), &c.remote) {
                (true, None) => Some("statements with a `text` need the url and name of a chat model"),
                (false, Some(_)) => Some("every statement is a pattern, nobody is asked; remove it"),
                _ => None,
            };
            problems.extend(message.map(|message| ("remote", message.to_owned())));
        }
        let Some(rules) = rules.filter(|_| problems.is_empty()) else { return Err(problems) };
        let compiled = |s: &Statement| s.pattern.as_deref().and_then(|pattern| compile(pattern).ok());
        let model = grader.as_ref().map_or("patterns", |grader| &grader.model);
        Ok(Self {
            version: format!("rbr:{model}:{}", digest(&rules)),
            patterns: rules.statements.iter().map(compiled).collect(),
            rules,
            grader,
        })
    }

    /// Its statements.
    pub fn rules(&self) -> &RuleFile {
        &self.rules
    }

    /// Which statements are true of a completion, in order.
    ///
    /// # Errors
    /// If the model does not answer for every statement it is asked about, or the prompt holds an image, which it is not sent.
    pub fn grade(&self, completion: &Completion<'_>) -> Result<Vec<bool>, String> {
        let found = match &self.grader {
            None => Value::Null,
            Some(_) if holds_image(completion.prompt) => {
                return Err("the prompt holds an image, which this model is not sent".into());
            }
            Some(grader) => self.ask(grader, completion)?,
        };
        let truth = |(statement, pattern): (&Statement, &Option<Regex>)| match pattern {
            Some(pattern) => Ok(pattern.is_match(tail(completion.text))),
            None => found[statement.name.as_str()]
                .as_bool()
                .ok_or_else(|| format!("the model's answer does not say whether {} is true", statement.name)),
        };
        self.rules.statements.iter().zip(&self.patterns).map(truth).collect()
    }

    /// What the model says of the statements that are not patterns.
    fn ask(&self, grader: &Grader, completion: &Completion<'_>) -> Result<Value, String> {
        let mut question = "For each statement say whether it is true of the answer.\n".to_owned();
        let (mut properties, mut names) = (Map::new(), Vec::new());
        for Statement { name, text, .. } in &self.rules.statements {
            let Some(text) = text else { continue };
            question += &format!("\n{name}: {text}");
            properties.insert(name.clone(), json!({"type": "boolean"}));
            names.push(name.as_str());
        }
        question += "\n\nAnswer as JSON: an object with true or false for each name.";
        let tokens = TOKENS_EACH * (1 + names.len() as u32);
        let schema = json!({"type": "object", "additionalProperties": false, "required": names, "properties": properties});
        let format = json!({"type": "json_schema", "json_schema": {"name": "statements", "strict": true, "schema": schema}});
        let text = ask_judge(&grader.client, &grader.model, &question, completion, tokens, format)?;
        serde_json::from_str(text.trim())
            .map_err(|_| "the model did not answer with the JSON it was asked for".to_owned())
    }
}

fn digest(rules: &RuleFile) -> String {
    let text = serde_json::to_string(rules).unwrap_or_default();
    freewheel_types::Digest::of(text.as_bytes()).to_string()[..16].to_owned()
}

impl Component for RuleBased {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        let truths = self.grade(completion).map_err(Unscored)?;
        let held = || self.rules.statements.iter().zip(&truths).filter(|(_, truth)| **truth).map(|(s, _)| s);
        let value = held().map(|statement| f64::from(statement.weight)).sum::<f64>() as f32;
        let names: Vec<&str> = held().map(|statement| statement.name.as_str()).collect();
        let detail = (!names.is_empty()).then(|| names.join(","));
        Ok(Judgement { value, detail, ..Judgement::default() })
    }

    fn away(&self) -> Option<Duration> {
        self.grader.as_ref().and_then(|grader| grader.client.away())
    }

    fn version(&self) -> Option<&str> {
        Some(&self.version)
    }
}
