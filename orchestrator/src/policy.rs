//! Models as the engine wants them: opened, packed, with their tokenizer.

use std::path::Path;
use std::sync::Arc;

use freewheel_actor::{CpuBackend, CpuLoader, Engine, EngineConfig};
use freewheel_kernels::Threads;
use freewheel_model::{LoadedModel, ModelError, PolicyWeights, Purpose};
use freewheel_types::{PolicyVersion, WeightsDtype};

use crate::cli::fail::Explain as _;
use crate::hub::HubName;

/// Opens a model: a folder in Hugging Face layout, a GGUF file, or a name on the hub.
///
/// # Errors
/// Whatever is wrong with the files or the download, as bad input (exit code 78).
pub fn open(path: &Path, dtype: Option<WeightsDtype>) -> anyhow::Result<LoadedModel> {
    open_with(path, dtype, freewheel_model::load)
}

/// As [`open`], whether the model writes or scores: to be converted.
///
/// # Errors
/// As [`open`].
pub fn open_any(path: &Path, dtype: Option<WeightsDtype>) -> anyhow::Result<LoadedModel> {
    open_with(path, dtype, freewheel_model::load_any)
}

type Load = fn(&Path, Option<WeightsDtype>) -> Result<LoadedModel, ModelError>;

fn open_with(path: &Path, dtype: Option<WeightsDtype>, load: Load) -> anyhow::Result<LoadedModel> {
    if path.exists() {
        return load(path, dtype).input();
    }
    match HubName::parse(path) {
        Some(name) => load(&name.fetch()?, dtype).input(),
        None => load(path, dtype).input_hint(
            "give a folder with config.json and *.safetensors, a .gguf file, or org/name on the hub",
        ),
    }
}

/// Compute threads for a count in a config or on a command line; 0 takes all cores.
pub fn threads(count: usize) -> Threads {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    Threads::new(if count == 0 { all() } else { count })
}

/// An engine over `loaded`, on `threads`.
///
/// # Errors
/// If the bounds cannot work with this model.
pub fn engine(
    loaded: &LoadedModel,
    threads: &Threads,
    config: EngineConfig,
) -> anyhow::Result<Engine<CpuBackend>> {
    let weights = PolicyWeights::pack(
        &loaded.model,
        &loaded.params,
        PolicyVersion::default(),
        Purpose::Sampling,
        threads,
    );
    let backend = CpuBackend::new(Arc::new(weights), threads.clone());
    Engine::new(backend, loaded.tokenizer.clone(), config).input()
}

/// What turns published payloads into weights for engines over `model`.
pub fn loader(model: &LoadedModel, threads: Threads) -> CpuLoader {
    CpuLoader::new(model.model.clone(), model.params.clone(), model.tokenizer.digest(), threads)
}
