//! `[actor]`: how rollouts are generated.

use freewheel_types::SamplingParams;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ActorError;
use crate::engine::EngineConfig;

/// What running samples do when new weights arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InFlight {
    /// They go on with the keys and values the old weights computed; nothing waits.
    #[default]
    Keep,
    /// Their keys and values are computed again with the new weights before they go on.
    Recompute,
    /// They end on the old weights; prompts not begun wait for the swap.
    Finish,
}

/// The `[actor]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ActorConfig {
    /// Actors to run on this machine, each with its own engine and copy of the weights; processes of their own with
    /// `queue.backend = "redis"`. 1 to 64, default 1.
    pub processes: usize,
    /// Compute threads of one actor; 0 shares the cores of the machine among actors and learner. Default 0.
    pub threads: usize,
    /// Most samples decoded at once by one actor: its token slots. At least 1, default 32.
    pub max_live: usize,
    /// Memory for keys and values of one actor. Bytes, default 512 MiB. When it is full, the youngest samples give
    /// theirs up and are computed again later; nothing fails and no drawn token changes.
    pub kv_bytes: u64,
    /// Most prompt tokens computed in one step beside the running samples; smaller keeps them smoother, larger starts
    /// prompts sooner. Tokens, at least 1, default 512.
    pub prefill_tokens: usize,
    /// Keep the keys and values of finished sequences while there is room, for prompts that begin alike: a system prompt,
    /// earlier turns. New weights empty it. No drawn token changes. Default true.
    pub prefix_cache: bool,
    /// Most tokens guessed for a sample in one step, from what it or its prompt said before (speculative decoding by
    /// prompt lookup). Guesses are made only while few samples run and only where they prove right; no drawn token
    /// changes. 0 to 15, 0 turns it off. Default 4.
    pub draft_tokens: usize,
    /// Longest completion. Tokens, at least 1, default 256; prompt and completion together never exceed the context of
    /// the model.
    pub max_new_tokens: usize,
    /// Softmax temperature of sampling; 0 is greedy. 0 to 100, default 1.
    pub temperature: f32,
    /// Sample among the k most likely tokens; 0 means all. Default 0.
    pub top_k: u32,
    /// Sample among the most likely tokens that together have this probability. Above 0, up to 1, default 1 (all).
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one. 0 to 1, default 0 (none).
    pub min_p: f32,
    /// Strings that end a completion; the text is cut before them. Default none.
    pub stop: Vec<String>,
    /// Token ids that end a completion, beside those the model's `generation_config.json` names. Default none.
    pub stop_token_ids: Vec<u32>,
    /// What running samples do when new weights arrive: "keep" (go on at once), "recompute" (rebuild their keys and
    /// values first) or "finish" (end on the old weights). Default "keep".
    pub in_flight: InFlight,
    /// How long running samples may go on after the actor was told to end; then they are left to other actors.
    /// Seconds, 0 or more, default 10.
    pub drain_s: f64,
}

impl Default for ActorConfig {
    fn default() -> Self {
        Self {
            processes: 1,
            threads: 0,
            max_live: 32,
            kv_bytes: 512 << 20,
            prefill_tokens: 512,
            prefix_cache: true,
            draft_tokens: 4,
            max_new_tokens: 256,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            in_flight: InFlight::Keep,
            drain_s: 10.0,
        }
    }
}

impl ActorConfig {
    /// The transform tokens are drawn with.
    pub fn sampling(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
        }
    }

    /// The bounds of the engine.
    pub fn engine(&self) -> EngineConfig {
        EngineConfig {
            max_live: self.max_live,
            kv_bytes: self.kv_bytes,
            prefill_tokens: self.prefill_tokens,
            in_flight: self.in_flight,
            prefix_cache: self.prefix_cache,
            draft_tokens: self.draft_tokens,
        }
    }

    /// Every value out of range.
    pub fn problems(&self) -> Vec<ActorError> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, key, value: String, limit: &str| {
            if !ok {
                problems.push(ActorError::Config { key, value, limit: limit.to_owned() });
            }
        };
        check(
            (1..=64).contains(&self.processes),
            "processes",
            self.processes.to_string(),
            "1 to 64 are allowed",
        );
        check(self.threads <= 1024, "threads", self.threads.to_string(), "0 (automatic) to 1024 are allowed");
        let counts = [
            ("max_live", self.max_live),
            ("prefill_tokens", self.prefill_tokens),
            ("max_new_tokens", self.max_new_tokens),
        ];
        for (key, value) in counts {
            check((1..=1 << 20).contains(&value), key, value.to_string(), "1 to 1048576 are allowed");
        }
        check(self.draft_tokens <= 15, "draft_tokens", self.draft_tokens.to_string(), "0 to 15 are allowed");
        check(self.kv_bytes > 0, "kv_bytes", self.kv_bytes.to_string(), "it must hold at least two pages");
        let t = self.temperature;
        check((0.0..=100.0).contains(&t), "temperature", t.to_string(), "0 (greedy) to 100 are allowed");
        check(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top_p",
            self.top_p.to_string(),
            "above 0, up to 1 is allowed",
        );
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p.to_string(), "0 to 1 are allowed");
        let empty = self.stop.iter().any(String::is_empty);
        check(!empty, "stop", "\"\"".to_owned(), "an empty string would end every completion: remove it");
        let drain = self.drain_s;
        check(
            (0.0..=86_400.0).contains(&drain),
            "drain_s",
            drain.to_string(),
            "0 to 86400 seconds are allowed",
        );
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_are_told_at_once_with_key_value_and_limit() {
        assert!(ActorConfig::default().problems().is_empty());
        let bad = ActorConfig {
            max_live: 0,
            temperature: f32::NAN,
            top_p: 0.0,
            stop: vec![String::new()],
            ..Default::default()
        };
        let texts: Vec<String> = bad.problems().iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), 4, "{texts:?}");
        assert_eq!(texts[0], "actor.max_live is 0; 1 to 1048576 are allowed");
    }
}
