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
mod startup;
mod texts;

use std::time::Duration;

use ureq::tls::{Certificate, PemItem, parse_pem};

use crate::config::ComponentConfig;
use crate::stack::{Completion, Component, Judgement, Unscored};
pub(crate) use client::{Client, Rules};
pub(crate) use judge::ask_judge;

pub use config::{Backend, Ensemble, JudgeMode, RemoteConfig};

mod config;

impl RemoteConfig {
    /// What is wrong with the settings of a component that asks one server in its own words.
    pub(crate) fn problems_of_one(&self) -> Vec<(&'static str, String)> {
        let mut problems = self.problems();
        if self.urls.len() > 1 {
            let message = "one component of this kind has one server; for several use several components";
            problems.push(("remote.urls", message.into()));
        }
        if self.format.is_some() {
            problems.push(("remote.format", "the server is asked in our own words; remove it".into()));
        }
        problems
    }

    /// How its servers are asked, for a component that has `deadline`; a problem as (key, message).
    pub(crate) fn rules(&self, deadline: Duration) -> Result<Rules, (&'static str, String)> {
        let authorization = match self.api_key_env.as_deref().map(|name| (name, std::env::var(name))) {
            None => None,
            Some((_, Ok(key))) => Some(format!("Bearer {key}")),
            Some((name, Err(_))) => {
                return Err(("remote.api_key_env", format!("the variable {name} is not set here")));
            }
        };
        let authorities = match self.ca_file.as_deref().map(authorities) {
            None => Vec::new(),
            Some(Ok(found)) => found,
            Some(Err(why)) => return Err(("remote.ca_file", why)),
        };
        Ok(Rules {
            authorities,
            timeout: Duration::from_millis(self.timeout_ms),
            // What is late at the stack's own deadline is lost; stay below it.
            deadline: deadline.mul_f64(0.9),
            retries: self.retries,
            pause_after: Duration::from_secs_f64(self.pause_after_s),
            rate: self.rate_per_s,
            cache: self.cache,
            authorization,
        })
    }
}

/// The certificates of a PEM file.
fn authorities(path: &str) -> Result<Vec<Certificate<'static>>, String> {
    let text = std::fs::read(path).map_err(|e| format!("{path} cannot be read: {e}"))?;
    let certificates = parse_pem(&text).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
        Ok(_) => None,
        Err(e) => Some(Err(format!("{path}: {e}"))),
    });
    let found: Vec<Certificate<'static>> = certificates.collect::<Result<_, _>>()?;
    if found.is_empty() { Err(format!("{path} holds no certificate")) } else { Ok(found) }
}

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
        let rules = match config.rules(deadline) {
            Ok(rules) if problems.is_empty() => rules,
            other => {
                problems.extend(other.err());
                return Err(problems);
            }
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
        Ok(Judgement {
            value: self.config.ensemble.of(&scores, self.config.ensemble_k),
            detail,
            label: None,
            odds: None,
        })
    }

    fn version(&self) -> Option<&str> {
        Some(&self.version)
    }

    fn away(&self) -> Option<Duration> {
        self.clients.iter().filter_map(Client::away).max()
    }

    fn check_at_start(&self) -> Result<(), (&'static str, String)> {
        if !self.config.startup_check {
            return Ok(());
        }
        Remote::check_at_start(self).map_err(|why| ("remote", why))
    }
}
