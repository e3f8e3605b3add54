//! Reward models and judges behind HTTP.
//!
//! ```text
//! completion ─► request of the backend ─► every server of `urls`, at once ─► scores ─► mean − k·deviation
//! ```
//!
//! A server that is slow, gone, redirecting, too talkative or wrong costs the rollout its reward, never a wrong one, and never more than the deadline. One
//! server of an ensemble that fails leaves the rollout unscored: a mean over fewer models is another reward.

mod client;
mod judge;
mod protocol;
mod texts;

use std::time::Duration;

use crate::config::ComponentConfig;
use crate::stack::{Completion, Component, Judgement, Unscored};
use client::{Client, Rules};

pub use config::{Backend, Ensemble, JudgeMode, RemoteConfig};

mod config;

/// How a judge is asked.
#[derive(Clone, Debug)]
struct Judging {
    mode: JudgeMode,
    rubric: String,
    low: u32,
    high: u32,
}

/// The component.
pub(crate) struct Remote {
    config: RemoteConfig,
    label: Option<String>,
    judging: Judging,
    clients: Vec<Client>,
    version: String,
}

impl Remote {
    /// Checks the settings; problems as (key, message). Asks no server.
    pub(crate) fn new(c: &ComponentConfig, deadline: Duration) -> Result<Self, Vec<(&'static str, String)>> {
        let Some(config) = &c.remote else {
            return Err(vec![("remote", "kind = \"remote\" needs backend and urls under it".into())]);
        };
        let mut problems = config.problems();
        let key = match config.api_key_env.as_deref().map(std::env::var) {
            None => None,
            Some(Ok(key)) => Some(format!("Bearer {key}")),
            Some(Err(_)) => {
                let name = config.api_key_env.as_deref().unwrap_or_default();
                problems.push(("remote.api_key_env", format!("the variable {name} is not set here")));
                None
            }
        };
        if !problems.is_empty() {
            return Err(problems);
        }
        let rules = Rules {
            timeout: Duration::from_millis(config.timeout_ms),
            // What is late at the stack's own deadline is lost; stay below it.
            deadline: deadline.mul_f64(0.9),
            retries: config.retries,
            rate: config.rate_per_s,
            cache: config.cache,
            authorization: key,
        };
        let [low, high] = config.scale;
        Ok(Self {
            label: c.label.clone(),
            judging: Judging { mode: config.judge, rubric: config.rubric.clone(), low, high },
            clients: config.urls.iter().map(|url| Client::new(url, rules.clone())).collect(),
            version: format!("{}:{}", config.backend.name(), config.model),
            config: config.clone(),
        })
    }

    fn ask(&self, client: &Client, completion: &Completion<'_>) -> Result<(f32, Option<String>), String> {
        let config = &self.config;
        if config.backend == Backend::Judge {
            return judge::judge(client, &config.model, &self.judging, completion);
        }
        let (path, body) =
            protocol::request(config.backend, &config.model, config.format.as_deref(), completion);
        let answer = client.post(path, &body)?;
        Ok((protocol::score(config.backend, &answer, self.label.as_deref())?, None))
    }
}

impl Component for Remote {
    fn judge(&self, completion: &Completion<'_>) -> Result<Judgement, Unscored> {
        if texts::holds_image(completion.prompt) {
            return Err(Unscored("the prompt holds an image, which this server is not sent".into()));
        }
        let answers: Vec<Result<(f32, Option<String>), String>> = match self.clients.as_slice() {
            [one] => vec![self.ask(one, completion)],
            several => std::thread::scope(|scope| {
                let asked: Vec<_> =
                    several.iter().map(|client| scope.spawn(|| self.ask(client, completion))).collect();
                let panicked = || Err("asking the server panicked".to_owned());
                asked.into_iter().map(|thread| thread.join().unwrap_or_else(|_| panicked())).collect()
            }),
        };
        let mut scores = Vec::new();
        let mut detail = None;
        for answer in answers {
            let (score, said) = answer.map_err(Unscored)?;
            scores.push(score);
            detail = detail.or(said);
        }
        if scores.len() > 1 {
            detail = Some(format!("{scores:?}"));
        }
        Ok(Judgement { value: self.config.ensemble.of(&scores, self.config.ensemble_k), detail, label: None })
    }

    fn version(&self) -> Option<&str> {
        Some(&self.version)
    }
}
