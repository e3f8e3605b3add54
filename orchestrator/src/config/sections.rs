//! The sections that belong to no other crate: `[run] [model] [prompts] [eval] [log]`.

use clap::ValueEnum;
use freewheel_kernels::CodeBits;
use freewheel_model::LoadedModel;
use freewheel_types::WeightsDtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::prompts::CurriculumConfig;

/// The `[run]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunSection {
    /// Name of the run: its folder and its queue keys. 1 to 63 of a-z 0-9 . _ -. Default: the config file's name.
    pub name: Option<String>,
    /// Folder that holds the run folders. Default "runs".
    pub dir: String,
    /// Seed of everything random: prompt choice, sampling, evaluation. Default 0.
    #[schemars(range(max = 9_223_372_036_854_775_807_u64))]
    pub seed: u64,
    /// Wall time after which the run drains and ends well. Minutes, above 0. Default: no limit.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub time_limit_min: Option<f64>,
    /// Whether actor and learner processes keep to cores of their own: actors to the first, the learner to those after them,
    /// as many as each has threads. Needs a Redis queue and as many cores as threads; else the operating system shares the
    /// cores out. Default false.
    pub pin_cores: bool,
}

impl Default for RunSection {
    fn default() -> Self {
        Self { name: None, dir: "runs".into(), seed: 0, time_limit_min: None, pin_cores: false }
    }
}

/// The `[model]` section: read by actor and learner alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// The policy to start from: a folder in Hugging Face layout, a `.gguf` file, or "org/name" (or "org/name@revision") on
    /// the Hugging Face hub. Relative paths start at the working directory, or at the config file's folder if there is
    /// nothing there. Required.
    pub path: String,
    /// Element type of the weights that are sampled, trained and published: "auto" (as stored), "bf16" or "f32".
    /// Default "auto".
    pub dtype: Dtype,
    /// Numbers the projections are sampled and trained with: "none" (as stored), "int8" or "int4". Rollouts then read a half
    /// or a quarter of the bytes of bf16, and the learner computes with the same rounded values, so its log-probs are
    /// the sampler's to the bit; the gradient goes straight through to the weights, which are kept and published in
    /// full. The output head takes 8 bits in either case; embedding, norms and routers are not rounded. Default "none".
    pub quantise: Quantise,
    /// Weights that share a scale when quantised: fewer are more exact, more take less memory. A multiple of 32, 32 to
    /// 1024. Default 32.
    #[schemars(range(min = 32, max = 1024))]
    pub quantise_group: usize,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self { path: String::new(), dtype: Dtype::Auto, quantise: Quantise::None, quantise_group: 32 }
    }
}

impl ModelSection {
    /// `model`, with its projections quantised if the config says so.
    pub fn quantised(&self, mut model: LoadedModel) -> LoadedModel {
        if let Some(bits) = self.quantise.bits() {
            model.model = model.model.quantised(bits, self.quantise_group);
        }
        model
    }
}

/// Numbers of a model's projections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Quantise {
    /// As stored.
    #[default]
    None,
    /// 8 bits.
    Int8,
    /// 4 bits.
    Int4,
}

impl Quantise {
    /// Bits of a code; `None` without codes.
    pub fn bits(self) -> Option<CodeBits> {
        match self {
            Self::None => None,
            Self::Int8 => Some(CodeBits::Eight),
            Self::Int4 => Some(CodeBits::Four),
        }
    }
}

/// Element type of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// As stored; f16 and quantised blocks become f32.
    #[default]
    Auto,
    /// bfloat16.
    Bf16,
    /// 32-bit floats.
    F32,
}

impl Dtype {
    /// What the loader is asked for.
    pub fn requested(self) -> Option<WeightsDtype> {
        match self {
            Self::Auto => None,
            Self::Bf16 => Some(WeightsDtype::Bf16),
            Self::F32 => Some(WeightsDtype::F32),
        }
    }
}

/// A built-in prompt source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GeneratorKind {
    /// Chains of additions and subtractions, `17+25-9=?`, in levels by the number of operations.
    #[default]
    Arithmetic,
    /// Images of squares and circles, `How many squares?`, in levels by the most there are. For models that read images.
    Shapes,
    /// Sums about a subject, `lunch bill 17+25=?`, of which those about a vault's code are to be refused; tags `harmful`,
    /// `borderline` and `benign`.
    Vault,
}

/// The `[prompts]` section: where prompts come from and how many rollouts each gets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PromptsSection {
    /// Prompt file (JSONL). Give this or `generator`.
    pub file: Option<String>,
    /// Built-in prompt source: "arithmetic", "shapes" (images) or "vault" (some to be refused). Give this or `file`.
    pub generator: Option<GeneratorKind>,
    /// Levels of the generator, each 1 to 6: operations a question, or shapes of each kind in an image. Default [1, 2, 3].
    pub levels: Vec<u32>,
    /// Questions the generator makes, all levels together. 1 to 1,000,000. Default 4000.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub count: usize,
    /// Seed of the generator. Default: `run.seed`.
    pub seed: Option<u32>,
    /// Rollouts per prompt: a prompt group. 2 to 64. Default 8.
    #[schemars(range(min = 2, max = 64))]
    pub group_size: u32,
    /// How the next prompt is chosen.
    pub curriculum: CurriculumConfig,
}

impl Default for PromptsSection {
    fn default() -> Self {
        Self {
            file: None,
            generator: None,
            levels: vec![1, 2, 3],
            count: 4000,
            seed: None,
            group_size: 8,
            curriculum: CurriculumConfig::default(),
        }
    }
}

/// The `[eval]` section: accuracy on prompts that are never trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSection {
    /// Evaluate every this many learner steps, besides start and end. 0 = never during the run. Default 20.
    pub every: u64,
    /// Name of the evaluation: `eval/<name>/accuracy`. Default "heldout".
    pub name: String,
    /// Prompt file (JSONL) of held-out prompts. Default: the generator's held-out set, or no evaluation with
    /// `prompts.file`.
    pub file: Option<String>,
    /// Held-out prompts used, the first ones of the file or generator. 1 to 100,000. Default 200.
    #[schemars(range(min = 1, max = 100_000))]
    pub count: usize,
    /// Completions per prompt; more than 1 gives pass@k. 1 to 64. Default 1.
    #[schemars(range(min = 1, max = 64))]
    pub samples: u32,
    /// Sampling temperature; 0 is greedy. 0 to 10. Default 0.
    #[schemars(range(min = 0, max = 10))]
    pub temperature: f32,
    /// Sampling seed, used when the temperature is above 0. Default 1.
    pub seed: u32,
}

impl Default for EvalSection {
    fn default() -> Self {
        Self {
            every: 20,
            name: "heldout".into(),
            file: None,
            count: 200,
            samples: 1,
            temperature: 0.0,
            seed: 1,
        }
    }
}

/// The `[log]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogSection {
    /// What goes to `freewheel.log`: "error", "warn", "info", "debug", "trace", or a filter such as
    /// "info,freewheel_actor=debug". Default "info".
    pub level: String,
    /// Write TensorBoard events beside `metrics.jsonl`. Default true.
    pub tensorboard: bool,
    /// Rollouts of every learner step written to `rollouts/`, with their reward breakdown. 0 to 1024. Default 4.
    #[schemars(range(max = 1024))]
    pub rollouts_per_step: u32,
    /// Size at which a file of `rollouts/` is closed and the next begun. Bytes, at least 65,536. Default 16 MiB.
    #[schemars(range(min = 65_536))]
    pub rollouts_file_bytes: u64,
}

impl Default for LogSection {
    fn default() -> Self {
        Self { level: "info".into(), tensorboard: true, rollouts_per_step: 4, rollouts_file_bytes: 16 << 20 }
    }
}
