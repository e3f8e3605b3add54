//! `remote = { … }` of a component.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A server, or several that judge together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RemoteConfig {
    /// What answers there: "vllm_classify" (default; vLLM's /classify), "sglang" (/v1/embeddings), "openrlhf" (/get_reward), "tei" (Text
    /// Embeddings Inference, /predict), or "judge" (a chat model, /v1/chat/completions).
    pub backend: Backend,
    /// Base addresses, "http://host:port" or "https://host"; several are an ensemble, of different models.
    pub urls: Vec<String>,
    /// Name of the model, as the server knows it.
    pub model: String,
    /// Text that is sent, with {prompt} and {response} in it. Default: the conversation where the server takes one (vLLM), else the
    /// prompt and the completion one after the other.
    pub format: Option<String>,
    /// How an ensemble's scores become one: "mean_minus_std" (default), "min" or "mean".
    pub ensemble: Ensemble,
    /// Deviations that are subtracted. 0 to 10, default 1.
    pub ensemble_k: f32,
    /// Time one attempt may take. Milliseconds, 1 to 600000, default 5000. `reward.deadline_ms` bounds all of them.
    pub timeout_ms: u64,
    /// Attempts after the first one, where the server is away or overloaded. 0 to 10, default 2.
    pub retries: u32,
    /// Where a server has not answered for so long, workers take no rollouts but one every few seconds, to see whether it is back: those that
    /// are not taken wait in the queue, instead of being lost unscored. Seconds, 0 to 86400, default 60.
    pub pause_after_s: f64,
    /// Most calls a second to each server. Above 0. Default: no limit.
    pub rate_per_s: Option<f64>,
    /// Answers kept for the same question again. Default 10000.
    pub cache: usize,
    /// Environment variable that holds the key sent as `Authorization: Bearer`. Default: none.
    pub api_key_env: Option<String>,
    /// PEM file of the authorities that may have signed the certificates of https addresses. Default: those that browsers trust.
    pub ca_file: Option<String>,
    /// Whether a run (and `freewheel reward check`) starts by asking its servers something: a judge must not reward answers that say nothing, a vLLM server
    /// must heed `use_activation`. Default true.
    pub startup_check: bool,
    /// Judge: "score" (default; a grade as JSON), "logprobs" (mean grade under the first token's probabilities) or "pair" (against the
    /// prompt's reference answer, in both orders).
    pub judge: JudgeMode,
    /// Judge: what it is to look for.
    pub rubric: String,
    /// Judge: lowest and highest grade; they become 0 and 1. Default [1, 9].
    pub scale: [u32; 2],
}

impl Default for RemoteConfig {
    fn default() -> Self {
        Self {
            backend: Backend::default(),
            urls: Vec::new(),
            model: String::new(),
            format: None,
            ensemble: Ensemble::default(),
            ensemble_k: 1.0,
            timeout_ms: 5000,
            retries: 2,
            pause_after_s: 60.0,
            rate_per_s: None,
            cache: 10_000,
            api_key_env: None,
            ca_file: None,
            startup_check: true,
            judge: JudgeMode::default(),
            rubric: String::new(),
            scale: [1, 9],
        }
    }
}

/// The kinds of server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// vLLM, /classify.
    #[default]
    VllmClassify,
    /// SGLang, /v1/embeddings.
    Sglang,
    /// OpenRLHF, /get_reward.
    Openrlhf,
    /// Text Embeddings Inference, /predict.
    Tei,
    /// OpenAI-compatible chat model.
    Judge,
}

impl Backend {
    /// As the config spells it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::VllmClassify => "vllm_classify",
            Self::Sglang => "sglang",
            Self::Openrlhf => "openrlhf",
            Self::Tei => "tei",
            Self::Judge => "judge",
        }
    }
}

/// From several scores to one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ensemble {
    /// Mean less `ensemble_k` deviations (n in the denominator): disagreement costs (arXiv 2312.09244).
    #[default]
    MeanMinusStd,
    /// The lowest.
    Min,
    /// The mean.
    Mean,
}

impl Ensemble {
    /// The score of `scores`, which are not empty.
    pub(super) fn of(self, scores: &[f32], k: f32) -> f32 {
        let n = scores.len() as f64;
        let mean = scores.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        match self {
            Self::Min => scores.iter().copied().fold(f32::INFINITY, f32::min),
            Self::Mean => mean as f32,
            Self::MeanMinusStd => {
                let variance = scores.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
                (mean - f64::from(k) * variance.sqrt()) as f32
            }
        }
    }
}

/// How a judge judges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JudgeMode {
    /// A grade as JSON.
    #[default]
    Score,
    /// The mean grade under the first token's probabilities.
    Logprobs,
    /// Better than the reference answer?
    Pair,
}

impl RemoteConfig {
    /// Everything out of range, as (key, message).
    pub(crate) fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut check = |good: bool, key: &'static str, message: String| {
            if !good {
                problems.push((key, message));
            }
        };
        check(
            (1..=16).contains(&self.urls.len()),
            "remote.urls",
            format!("must be 1 to 16 addresses, are {}", self.urls.len()),
        );
        for url in &self.urls {
            let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
            let host = rest.is_some_and(|rest| !rest.trim_end_matches('/').is_empty());
            check(host, "remote.urls", format!("{url:?} must be http://HOST:PORT or https://HOST"));
        }
        let needs_model = !matches!(self.backend, Backend::Openrlhf | Backend::Tei);
        check(
            !needs_model || !self.model.is_empty(),
            "remote.model",
            "is not set; give the name the server knows".into(),
        );
        check(
            (1..=600_000).contains(&self.timeout_ms),
            "remote.timeout_ms",
            format!("must be 1 to 600000, is {}", self.timeout_ms),
        );
        check(
            (0.0..=86_400.0).contains(&self.pause_after_s),
            "remote.pause_after_s",
            format!("must be 0 to 86400, is {}", self.pause_after_s),
        );
        check(self.retries <= 10, "remote.retries", format!("must be 0 to 10, is {}", self.retries));
        check(
            (0.0..=10.0).contains(&self.ensemble_k),
            "remote.ensemble_k",
            format!("must be 0 to 10, is {}", self.ensemble_k),
        );
        if let Some(rate) = self.rate_per_s {
            check(
                rate > 0.0 && rate <= 1e6,
                "remote.rate_per_s",
                format!("must be above 0, up to 1000000, is {rate}"),
            );
        }
        if let Some(format) = &self.format {
            check(format.contains("{response}"), "remote.format", "must hold {response}".into());
        }
        let judge = self.backend == Backend::Judge;
        check(
            judge || self.rubric.is_empty(),
            "remote.rubric",
            "only read with backend = \"judge\"; remove it".into(),
        );
        check(
            !judge || !self.rubric.is_empty(),
            "remote.rubric",
            "is not set; say what the judge is to look for".into(),
        );
        check(
            !judge || self.format.is_none(),
            "remote.format",
            "a judge is asked in its own words; remove it".into(),
        );
        let [low, high] = self.scale;
        check(
            low < high && high <= 100,
            "remote.scale",
            format!("must be [low, high], up to 100, is [{low}, {high}]"),
        );
        if judge && self.judge == JudgeMode::Logprobs {
            check(high <= 9, "remote.scale", "grades must be single digits with judge = \"logprobs\"".into());
        }
        problems
    }
}
