//! `--model` and what goes with it, shared by the commands that open one.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use freewheel_kernels::Threads;
use freewheel_model::LoadedModel;
use freewheel_types::{SamplingParams, WeightsDtype};

use super::fail::Explain as _;
use crate::config::{ModelSection, Quantise};

/// Which model, how it computes.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model: a folder in Hugging Face layout, a .gguf file, or org/name on the hub.
    #[arg(long, short)]
    pub model: PathBuf,
    /// Element type to compute with.
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    pub dtype: DtypeArg,
    /// Numbers to store the projections in: `model.quantise`, in groups of 32.
    #[arg(long, value_enum, default_value_t = Quantise::None)]
    pub quantise: Quantise,
    /// Compute threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

/// Element type on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// As stored.
    Auto,
    /// bfloat16.
    Bf16,
    /// 32-bit floats.
    F32,
}

impl DtypeArg {
    /// What the loader is asked for.
    pub fn requested(self) -> Option<WeightsDtype> {
        match self {
            Self::Auto => None,
            Self::Bf16 => Some(WeightsDtype::Bf16),
            Self::F32 => Some(WeightsDtype::F32),
        }
    }
}

impl ModelArgs {
    /// Opens the model.
    pub fn open(&self) -> anyhow::Result<LoadedModel> {
        let section = ModelSection { quantise: self.quantise, ..ModelSection::default() };
        Ok(section.quantised(crate::policy::open(&self.model, self.dtype.requested())?))
    }

    /// The threads to compute on.
    pub fn threads(&self) -> Threads {
        crate::policy::threads(self.threads)
    }
}

/// How tokens are drawn.
#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// Always the most likely token: the same as `--temperature 0`.
    #[arg(long, conflicts_with = "temperature")]
    pub greedy: bool,
    /// Softmax temperature. Default: what the model recommends, else 1.
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Sample among the k most likely tokens; 0 means all.
    #[arg(long)]
    pub top_k: Option<u32>,
    /// Sample among the most likely tokens that together have this probability.
    #[arg(long)]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this times the most likely one.
    #[arg(long)]
    pub min_p: Option<f32>,
}

impl SamplingArgs {
    /// The transform: the command line first, then what the model recommends, then plain sampling.
    ///
    /// # Errors
    /// If a value is out of range.
    pub fn params(&self, loaded: &LoadedModel) -> anyhow::Result<SamplingParams> {
        if self.greedy {
            return Ok(SamplingParams::GREEDY);
        }
        let advice = &loaded.generation;
        let plain = SamplingParams::default();
        let params = SamplingParams {
            temperature: self.temperature.or(advice.temperature).unwrap_or(plain.temperature),
            top_k: self.top_k.or(advice.top_k).unwrap_or(plain.top_k),
            top_p: self.top_p.or(advice.top_p).unwrap_or(plain.top_p),
            min_p: self.min_p.or(advice.min_p).unwrap_or(plain.min_p),
        };
        params.validate().input()?;
        Ok(params)
    }
}
