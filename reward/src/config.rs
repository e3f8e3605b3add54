//! `[reward]`: which components judge, and how their values become one reward.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::combine_config::CombineConfig;
use crate::guard::categories::CategoryWeight;
use crate::remote::RemoteConfig;
use crate::sandbox::SandboxConfig;

/// The `[reward]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// What judges, in order. Default: one verifier, the one each prompt names ("math" where it names none).
    pub component: Vec<ComponentConfig>,
    /// How the values become one reward.
    pub combine: CombineConfig,
    /// What happens to a rollout that could not be scored. Only "drop_sample": it leaves its group.
    pub on_unscored: OnUnscored,
    /// Time one rollout may take to score; what is not there by then is unscored. Milliseconds, 1 to 600000,
    /// default 10000.
    pub deadline_ms: u64,
    /// Range the composed reward is clipped to, `[low, high]`. Default [-3.0, 3.0].
    pub clip: [f32; 2],
    /// A label of your own; hashed with the rest of this section into the reward version of every rollout.
    pub version: String,
    /// Threads that score. 1 to 256, default 1.
    pub workers: usize,
    /// What programs may use that are judged by running them.
    pub sandbox: SandboxConfig,
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self {
            component: vec![ComponentConfig { name: "answer".into(), ..Default::default() }],
            combine: CombineConfig::default(),
            on_unscored: OnUnscored::DropSample,
            deadline_ms: 10_000,
            clip: [-3.0, 3.0],
            version: String::new(),
            workers: 1,
            sandbox: SandboxConfig::default(),
        }
    }
}

impl RewardConfig {
    /// The same with every path as `resolve` has it.
    pub fn with_paths(&self, resolve: impl Fn(&str) -> PathBuf) -> Self {
        let mut config = self.clone();
        for path in config.component.iter_mut().flat_map(ComponentConfig::paths) {
            *path = resolve(path).to_string_lossy().into_owned();
        }
        config
    }
}

/// What happens to a rollout without a reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnUnscored {
    /// It leaves its group; the others stay.
    #[default]
    DropSample,
}

/// One `[[reward.component]]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ComponentConfig {
    /// Name, unique; used in `combine.weights`, in metrics (`reward/<name>/mean`) and in records.
    pub name: String,
    /// "verifier" (default), "guard", "refusal", "rule", "model", "remote" or "rbr" (rule-based: weighted statements about the answer, `rules`; the
    /// value is the sum of the weights of the true ones).
    pub kind: ComponentKind,
    /// Prompts it applies to: "tag:math", several as "tag:math|physics". Default: all.
    pub when: Option<String>,
    /// Factor of its value in the weighted sum; 0 measures without optimising. Default 1. A guard's value is
    /// the probability of harm and is subtracted.
    pub weight: Option<f32>,
    /// File of `freewheel guard calibrate`: makes a probability of its score. Everything that reads the component sees the probability. Default:
    /// the score as it is.
    pub calibrate: Option<String>,
    /// Log-odds that are added to its probability, so that answers near the threshold count as beyond it; 0 to 20, default 0. Guards, and whatever is
    /// calibrated.
    pub margin: f32,
    /// A judge that is never optimised, to hold the reward against: it has no weight and no condition, gate or cost may read it; what it finds is
    /// in records and metrics. A rollout that it cannot judge is none the worse. Default false.
    pub holdout: bool,
    /// Hold-out: share of the rollouts that it judges, chosen by their text. Above 0, up to 1; default 1.
    pub share: Option<f64>,
    /// Normalisation of its value in the sum: `(value - norm_mean) / norm_std`, within -3 and 3. Constants of the run, so that
    /// a reward never depends on what was judged before; `freewheel score` prints them for a file of completions.
    /// Default: the value as it is.
    pub norm_mean: Option<f32>,
    /// The deviation that goes with `norm_mean`. Above 0, default 1.
    pub norm_std: Option<f32>,
    /// How much of its value is owed to length: `norm_length * ln(1 + tokens)` is subtracted before `norm_mean`, so that a reward model that likes long answers
    /// does not make them longer. `freewheel score` prints the slope, and mean and deviation of the rest. Default 0.
    pub norm_length: Option<f32>,

    /// Verifier: "math", "number", "exact", "choice" (options A to J), "regex", "format", "schema" (JSON Schema), "instructions" (the
    /// checks of IFEval), "code" (runs it in `reward.sandbox`), or "auto" (default): the one the prompt names,
    /// "math" where it names none.
    pub verifier: VerifierKind,
    /// Exact: compare without regard to case. Default false.
    pub ignore_case: bool,
    /// Exact: treat runs of white space as one space, and ignore it at both ends. Default true.
    pub ignore_space: Option<bool>,
    /// Number: largest difference that still counts as right. Absolute, default 0.
    pub tolerance: f64,
    /// Regex: the pattern. With a capture group, the last match's group 1 must equal the reference answer;
    /// without, the completion must match. Format: the whole completion must match.
    pub pattern: Option<String>,
    /// Format: strings that must occur.
    pub contains: Vec<String>,
    /// Format: strings that must not occur.
    pub excludes: Vec<String>,
    /// Schema: the JSON Schema, as JSON text. Default: the reference answer is the schema.
    pub schema: Option<String>,
    /// Code, instructions: the share of test cases that pass is the value, instead of 1 for all of them and 0 for fewer. Default false.
    pub partial: bool,
    /// Format: fewest characters. Default 0.
    pub length_min: usize,
    /// Format: most characters. Default: no limit.
    pub length_max: Option<usize>,

    /// Guard: whose words it reads: "response" (default), "prompt" or "both".
    pub role: GuardRole,
    /// Guard: what it is: "words" (default; words and patterns), "embedding" (a sentence encoder, `model`, with a `head` that `freewheel guard fit` makes
    /// from labelled examples), "llama_guard_3" or "llama_guard_4" (the folder of one in `model`, or its server in `remote`), "prompt_guard" (Prompt Guard 2 or
    /// another classifier of attacks, read in windows).
    pub family: GuardFamily,
    /// Guard of words: what it looks for.
    pub category: Vec<GuardCategory>,
    /// Guard, embedding: file of `freewheel guard fit`.
    pub head: Option<String>,
    /// Guard, embedding or Llama Guard: what a label (S1 to S14) is worth: a factor of its probability, 0 to 1, or "hard" (1, and the guard's class is "hard" above the threshold); "default" is for the rest.
    /// Default: 1. Classes are "safe", "unsafe" and "hard".
    pub categories: BTreeMap<String, CategoryWeight>,
    /// Guard as a gate: fails above this probability of harm; 0 to 1, default 0.5. Verifier or model as a gate:
    /// fails below this value, default 0.5.
    pub threshold: Option<f32>,

    /// Rbr: JSON file with `{"statements": [{"name": …, "text": …, "weight": …}]}`: what a chat model (`remote`) finds true or false of the answer; or,
    /// instead of `text`, a `pattern`, true where it matches. `freewheel guard rules` fits the weights.
    pub rules: Option<String>,

    /// Rule: "overlong" (default), the soft length penalty of DAPO (arXiv 2503.14476, eq. 13); "repetition", minus the share of runs of
    /// `ngram` words that occurred before in the completion.
    pub rule: RuleKind,
    /// Repetition: words in a run. 1 to 64, default 4.
    pub ngram: Option<usize>,
    /// Prompt Guard: tokens of a window; default 512. Overlong: length at which the penalty reaches -1. Tokens; required by the rule. Model: longest input; default
    /// and most: what the model was made for.
    pub max_tokens: Option<u32>,
    /// Overlong: the penalty grows over this many tokens before `max_tokens`. Tokens; default a fifth of it.
    pub buffer_tokens: Option<u32>,

    /// Guard, embedding: folder of a BERT or DeBERTa-v2 encoder. Guard, Llama or Prompt Guard: its folder. Model: folder of a reward model or classifier in Hugging Face layout: Llama, Mistral, Qwen2, Qwen3, Mixtral,
    /// Qwen3-MoE, BERT or DeBERTa-v2 `...ForSequenceClassification`. Runs on this machine's processors, with as many
    /// threads as `reward.workers`.
    pub model: Option<String>,
    /// Model: what it reads. "chat": the conversation with the completion as the assistant's turn, through the
    /// model's chat template (a text prompt becomes the user's turn); "pair": prompt and completion as two
    /// segments; "response"; "prompt". Default "auto": "response" for BERT and DeBERTa, else "chat".
    pub input: ModelInput,
    /// Model: the label whose score counts, by name or index; needed where the model has several. Prompt Guard: default the last.
    pub label: Option<String>,
    /// Model: "logit", the score as it is, or "probability", softmax over the labels (sigmoid for a single one).
    /// Default "auto": "logit" for a single label, else "probability".
    pub output: ModelOutput,
    /// Model: what happens to an input longer than `max_tokens`. "unscored" (default), or "cut": its start is left
    /// out (of the prompt first) and the record says how much.
    pub overlong: OverlongInput,
    /// Model: most completions in one forward pass. 1 to 1024, default 8. No score depends on it.
    pub batch: Option<usize>,

    /// Remote: the servers, and how they are asked. Llama Guard, rbr: the server, one address and `model`; `backend` is not read.
    pub remote: Option<RemoteConfig>,
}

impl ComponentConfig {
    /// Whether it sorts completions into classes, which conditions can name.
    pub(crate) fn has_classes(&self) -> bool {
        match self.kind {
            ComponentKind::Refusal => true,
            ComponentKind::Guard => self.family != GuardFamily::Words,
            _ => false,
        }
    }

    /// Every path it names.
    fn paths(&mut self) -> impl Iterator<Item = &mut String> {
        let own =
            [&mut self.model, &mut self.head, &mut self.calibrate, &mut self.rules].into_iter().flatten();
        own.chain(self.remote.as_mut().and_then(|remote| remote.ca_file.as_mut()))
    }
}

/// The kinds of component.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ComponentKind {
    /// Compares the completion with a reference answer or a form; 0 or 1.
    #[default]
    Verifier,
    /// Looks for harm; 0 (none) to 1.
    Guard,
    /// Whether the completion answers: class "comply" (0), "partial" (0.5) or "refuse" (1), by rules.
    Refusal,
    /// A fixed formula over the rollout itself.
    Rule,
    /// A reward model or classifier, here.
    Model,
    /// A reward model or judge behind HTTP.
    Remote,
    /// Weighted statements that a model finds true or false.
    Rbr,
}

/// What a model reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelInput {
    /// "response" for encoders, else "chat".
    #[default]
    Auto,
    /// Prompt and completion through the chat template.
    Chat,
    /// Prompt and completion as two segments.
    Pair,
    /// The completion.
    Response,
    /// The prompt.
    Prompt,
}

/// What a model's score becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelOutput {
    /// "logit" for a single label, else "probability".
    #[default]
    Auto,
    /// As it is.
    Logit,
    /// Softmax over labels, sigmoid for a single one.
    Probability,
}

/// What happens to an input that is too long for a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OverlongInput {
    /// No score.
    #[default]
    Unscored,
    /// Its start is left out; the record says so.
    Cut,
}

/// The verifiers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerifierKind {
    /// The one the prompt names; "math" where it names none.
    #[default]
    Auto,
    /// Equality of mathematical answers, LaTeX or plain.
    Math,
    /// The last number of the completion.
    Number,
    /// The whole completion.
    Exact,
    /// A pattern.
    Regex,
    /// The form of the completion; needs no reference answer.
    Format,
    /// A program, run on test cases.
    Code,
    /// The option that is chosen.
    Choice,
    /// JSON of a given form.
    Schema,
    /// Checkable instructions.
    Instructions,
}

/// The kinds of guard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuardFamily {
    /// Words and patterns.
    #[default]
    Words,
    /// A sentence encoder with heads fitted to labelled examples.
    Embedding,
    /// Llama Guard 3.
    #[serde(rename = "llama_guard_3")]
    LlamaGuard3,
    /// Llama Guard 4.
    #[serde(rename = "llama_guard_4")]
    LlamaGuard4,
    /// Prompt Guard 2, or another classifier of attacks.
    PromptGuard,
}

/// Whose words a guard reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuardRole {
    /// The completion.
    #[default]
    Response,
    /// The prompt.
    Prompt,
    /// Prompt and completion.
    Both,
}

impl GuardRole {
    /// As the config spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Response => "response",
            Self::Prompt => "prompt",
            Self::Both => "both",
        }
    }
}

impl std::str::FromStr for GuardRole {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Response, Self::Prompt, Self::Both]
            .into_iter()
            .find(|role| role.name() == text)
            .ok_or_else(|| "expected \"response\", \"prompt\" or \"both\"".into())
    }
}

/// One `[[reward.component.category]]` of a guard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GuardCategory {
    /// Name, shown in records.
    pub name: String,
    /// Words or phrases; whole words, without regard to case, hidden characters or look-alike letters.
    pub words: Vec<String>,
    /// Patterns (linear-time: no look-around, no back-references), applied to the normalised text.
    pub patterns: Vec<String>,
    /// Probability of harm when it is hit. 0 to 1, default 1.
    pub score: f32,
}

impl Default for GuardCategory {
    fn default() -> Self {
        Self { name: String::new(), words: Vec::new(), patterns: Vec::new(), score: 1.0 }
    }
}

/// The rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RuleKind {
    /// 0 up to `max_tokens - buffer_tokens`, then falling to -1 at `max_tokens`, -1 beyond.
    #[default]
    Overlong,
    /// 0 where no run of words comes twice, near -1 where hardly one is new.
    Repetition,
}
