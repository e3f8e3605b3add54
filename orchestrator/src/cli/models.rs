//! `freewheel init-model`, `upcycle`, `convert`: models in, models out.

use std::path::PathBuf;

use clap::Args;
use freewheel_model::{
    Adapter, InitRequest, InitScale, LoadedModel, MetaP, SaveOptions, TokenizerChoice, UpcycleOptions,
    supported_architectures,
};
use freewheel_types::WeightsDtype;
use serde_json::Value;

use super::fail::Explain as _;
use super::model::DtypeArg;
use super::table::bytes;

/// Make a model with random weights, Hugging Face layout, any supported architecture.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel init-model llama --set hidden_size=128 --set num_hidden_layers=4 --out models/tiny"
)]
pub struct InitModelArgs {
    /// Architecture: `LlamaForCausalLM` or its model type `llama`.
    arch: String,
    /// Set a key of the model's config.json; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Folder to write.
    #[arg(long, short)]
    out: PathBuf,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Take the tokenizer of this model instead of making a byte-level one.
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Learn merges for the byte-level tokenizer from this text file.
    #[arg(long, value_name = "FILE", requires = "vocab_size", conflicts_with = "tokenizer")]
    train_tokenizer: Option<PathBuf>,
    /// Tokens of a trained tokenizer, special ones included.
    #[arg(long)]
    vocab_size: Option<usize>,
    /// Weights start as MetaP says, for training with `metap_base_width`: the width of the model that rates were found on.
    #[arg(long, value_name = "WIDTH", requires = "metap_base_layers", value_parser = clap::value_parser!(u32).range(1..))]
    metap_base_width: Option<u32>,
    /// Layers of the model that rates were found on.
    #[arg(long, value_name = "LAYERS", requires = "metap_base_width", value_parser = clap::value_parser!(u32).range(1..))]
    metap_base_layers: Option<u32>,
    /// Element type of the weights.
    #[arg(long, value_enum, default_value_t = DtypeArg::Bf16)]
    dtype: DtypeArg,
}

impl InitModelArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let overrides = self.set.iter().map(|flag| pair(flag)).collect::<anyhow::Result<_>>()?;
        let tokenizer = match (&self.tokenizer, &self.train_tokenizer) {
            (Some(dir), _) => TokenizerChoice::Folder(dir.clone()),
            (None, Some(file)) => TokenizerChoice::Trained {
                text: std::fs::read_to_string(file)
                    .map_err(|error| {
                        anyhow::Error::from(error).context(format!("{} cannot be read", file.display()))
                    })
                    .input()?,
                vocab_size: self.vocab_size.unwrap_or(512),
            },
            (None, None) => TokenizerChoice::Bytes,
        };
        let request = InitRequest {
            arch: self.arch,
            overrides,
            seed: self.seed,
            scale: match (self.metap_base_width, self.metap_base_layers) {
                (Some(width), Some(layers)) => {
                    InitScale::MetaP(MetaP { width: width as usize, layers: layers as usize })
                }
                _ => InitScale::FanIn,
            },
            dtype: self.dtype.requested().unwrap_or(WeightsDtype::Bf16),
            tokenizer,
        };
        let model = freewheel_model::init_model(&request)
            .input_hint(format!("supported architectures: {}", supported_architectures()))?;
        write(&self.out, &model, SaveOptions::default())
    }
}

fn pair(flag: &str) -> anyhow::Result<(String, Value)> {
    let Some((key, value)) = flag.split_once('=') else {
        return Err(anyhow::anyhow!("--set {flag:?} is not KEY=VALUE")).input();
    };
    Ok((key.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()))))
}

fn write(out: &std::path::Path, model: &LoadedModel, options: SaveOptions) -> anyhow::Result<()> {
    let files = freewheel_model::save(out, model, &model.params, &options)?;
    let size: u64 = files.iter().filter_map(|file| Some(std::fs::metadata(file).ok()?.len())).sum();
    println!(
        "{}: {:.2} M parameters, {} files, {}",
        out.display(),
        model.model.layout().total as f64 / 1e6,
        files.len(),
        bytes(size)
    );
    Ok(())
}

/// Turn a dense model into a mixture of experts whose outputs equal the dense model's.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel upcycle --model models/smollm2 --experts 4 --top-k 2 --out models/smollm2-moe"
)]
pub struct UpcycleArgs {
    /// Dense model: folder or .gguf file.
    #[arg(long, short)]
    model: PathBuf,
    /// Folder to write.
    #[arg(long, short)]
    out: PathBuf,
    /// Experts per layer, each a copy of the dense MLP.
    #[arg(long, default_value_t = 4)]
    experts: usize,
    /// Experts a token goes to.
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// Deviation of the new router weights.
    #[arg(long, default_value_t = 0.02)]
    router_std: f64,
    /// Deviation of noise on the experts, relative to their weights; 0 keeps outputs equal.
    #[arg(long, default_value_t = 0.0)]
    noise: f64,
    /// Seed of router and noise.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Element type of the result.
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    dtype: DtypeArg,
}

impl UpcycleArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let dense = crate::policy::open(&self.model, self.dtype.requested())?;
        let options = UpcycleOptions {
            experts: self.experts,
            top_k: self.top_k,
            router_std: self.router_std,
            noise: self.noise,
            seed: self.seed,
        };
        let moe = freewheel_model::upcycle(&dense, &options).input()?;
        write(&self.out, &moe, SaveOptions::default())
    }
}

/// Convert a model: GGUF or Hugging Face in, Hugging Face out; element type, shards, adapters merged.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  freewheel convert --model smollm2.gguf --out models/smollm2 --dtype bf16\n  \
        freewheel convert --model models/smollm2 --adapter my-adapter --out models/merged"
)]
pub struct ConvertArgs {
    /// Model: folder or .gguf file.
    #[arg(long, short)]
    model: PathBuf,
    /// Folder to write.
    #[arg(long, short)]
    out: PathBuf,
    /// Element type of the result.
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    dtype: DtypeArg,
    /// Merge this LoRA adapter, a folder as PEFT writes it; may be repeated.
    #[arg(long, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Most MiB of weights in one file.
    #[arg(long, default_value_t = 4768, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    shard_mib: u64,
}

impl ConvertArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mut model = crate::policy::open_any(&self.model, self.dtype.requested())?;
        for dir in &self.adapter {
            model.params = Adapter::load(dir).and_then(|a| a.merge(&model.params, dir)).input()?;
        }
        if let (Ok(from), Ok(to)) = (self.model.canonicalize(), self.out.canonicalize())
            && from == to
        {
            return Err(anyhow::anyhow!("{} is the source too", to.display()))
                .input_hint("give another --out");
        }
        write(&self.out, &model, SaveOptions { shard_bytes: self.shard_mib << 20 })
    }
}
