//! A Llama Guard behind an OpenAI-compatible server. The server applies the chat template; we see the likeliest tokens of each place.

use std::time::Duration;

use serde_json::{Value, json};

use super::Verdict;
use super::prompt::Turn;
use crate::remote::{Client, RemoteConfig};

const TOP_LOGPROBS: u32 = 20;
/// A blank line and a word, and one to spare.
const VERDICT_TOKENS: u32 = 3;
const ANSWER_TOKENS: u32 = 64;

/// The server.
pub(super) struct Served {
    client: Client,
    model: String,
    version: String,
}

impl Served {
    /// Checks the settings; problems as (key, message). Asks nobody.
    pub(super) fn new(
        config: &RemoteConfig,
        deadline: Duration,
    ) -> Result<Self, Vec<(&'static str, String)>> {
        let mut problems = config.problems_of_one();
        let rules = config.rules(deadline).map_err(|problem| problems.push(problem)).ok();
        match (rules, config.urls.first()) {
            (Some(rules), Some(url)) if problems.is_empty() => Ok(Self {
                client: Client::new(url, rules),
                model: config.model.clone(),
                version: format!("llama_guard:{}", config.model),
            }),
            _ => Err(problems),
        }
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    pub(super) fn away(&self) -> Option<Duration> {
        self.client.away()
    }

    fn ask(&self, turns: &[Turn], max_tokens: u32, logprobs: bool) -> Result<Value, String> {
        let messages: Vec<Value> =
            turns.iter().map(|turn| json!({"role": turn.role, "content": turn.text})).collect();
        let mut body =
            json!({"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens});
        if logprobs {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(TOP_LOGPROBS);
        }
        self.client.post("/v1/chat/completions", &body)
    }

    pub(super) fn verdict(&self, turns: &[Turn]) -> Result<Verdict, String> {
        let answer = self.ask(turns, VERDICT_TOKENS, true)?;
        let places = answer.pointer("/choices/0/logprobs/content").and_then(Value::as_array);
        let places = places.ok_or("the guard's server gave no log-probs; does it have them?")?;
        read(places)
    }

    /// The whole answer, greedily.
    pub(super) fn categories(&self, turns: &[Turn]) -> Result<String, String> {
        let answer = self.ask(turns, ANSWER_TOKENS, false)?;
        let text = answer.pointer("/choices/0/message/content").and_then(Value::as_str);
        text.map(str::to_owned).ok_or_else(|| "the guard's server gave no answer".into())
    }
}

/// What one place of the answer may hold.
struct Place {
    verdict: Verdict,
    /// Whether either word is among the likeliest.
    found: bool,
    /// Probability of the token that was drawn, if it is white space.
    blank: Option<f64>,
}

fn place(entry: &Value) -> Result<Place, String> {
    let top = entry["top_logprobs"].as_array().ok_or("the guard's server gave no top_logprobs")?;
    let (mut safe, mut harmful, mut least) = (None, None, f64::INFINITY);
    for token in top {
        let (Some(text), Some(logprob)) = (token["token"].as_str(), token["logprob"].as_f64()) else {
            continue;
        };
        let p = logprob.min(0.0).exp();
        least = least.min(p);
        let sum = match text.trim() {
            "safe" => &mut safe,
            "unsafe" => &mut harmful,
            _ => continue,
        };
        *sum = Some(sum.unwrap_or(0.0) + p);
    }
    let found = safe.is_some() || harmful.is_some();
    // What is not listed is at most as likely as the least that is.
    let verdict = Verdict { safe: safe.unwrap_or(least), harmful: harmful.unwrap_or(least) };
    let drawn = entry["token"].as_str().unwrap_or_default();
    let is_blank = !drawn.is_empty() && drawn.chars().all(char::is_whitespace);
    let blank = entry["logprob"].as_f64().filter(|_| is_blank).map(|logprob| logprob.min(0.0).exp());
    Ok(Place { verdict: if found { verdict } else { Verdict::default() }, found, blank })
}

fn read(places: &[Value]) -> Result<Verdict, String> {
    let first = place(places.first().ok_or("the guard's server gave no token")?)?;
    let mut verdict = first.verdict;
    let mut found = first.found;
    if let (Some(blank), Some(second)) = (first.blank, places.get(1)) {
        let second = place(second)?;
        // Once the verdict comes after a blank line, what stands in the first place only adds what it lists.
        if second.found {
            verdict = if found { verdict } else { Verdict::default() }.after_blank(blank, second.verdict);
            found = true;
        }
    }
    if found {
        Ok(verdict)
    } else {
        Err("neither \"safe\" nor \"unsafe\" is among the guard's likeliest first words".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(drawn: (&str, f64), top: &[(&str, f64)]) -> Value {
        let top: Vec<Value> =
            top.iter().map(|(token, p)| json!({"token": token, "logprob": p.ln()})).collect();
        json!({"token": drawn.0, "logprob": drawn.1.ln(), "top_logprobs": top})
    }

    fn close(found: Result<Verdict, String>, safe: f64, harmful: f64) {
        let found = found.unwrap();
        assert!((found.safe - safe).abs() <= 1e-12 && (found.harmful - harmful).abs() <= 1e-12, "{found:?}");
    }

    #[test]
    fn verdicts_stand_first_or_after_a_blank_line() {
        close(read(&[entry(("safe", 0.8), &[("safe", 0.8), ("unsafe", 0.15), ("x", 0.01)])]), 0.8, 0.15);
        let blank = entry(("\n\n", 0.9), &[("\n\n", 0.9), ("x", 0.01)]);
        let second = entry(("unsafe", 0.7), &[("unsafe", 0.7), ("safe", 0.25), (" safe", 0.05)]);
        close(read(&[blank.clone(), second]), 0.27, 0.63);
        // One word alone: the other is at most as likely as the least listed.
        close(read(&[blank.clone(), entry(("safe", 0.99), &[("safe", 0.99), ("x", 1e-6)])]), 0.891, 0.9e-6);
        let neither = entry(("I", 0.9), &[("I", 0.9), ("x", 0.05)]);
        assert!(read(std::slice::from_ref(&neither)).unwrap_err().contains("neither"));
        assert!(read(&[blank, neither]).unwrap_err().contains("neither"));
        assert!(read(&[json!({"token": "safe"})]).unwrap_err().contains("top_logprobs"));
        assert!(read(&[]).is_err());
    }
}
