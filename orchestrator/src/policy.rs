//! Models as the engine wants them: opened, packed, with their tokenizer.

use std::path::Path;
use std::sync::Arc;

use freewheel_actor::{ActorError, CpuBackend, Engine, EngineConfig, PolicyLoader, PromptCodec, TextDecoder};
use freewheel_kernels::Threads;
use freewheel_model::{LoadedModel, Params, PolicyWeights, Purpose, Tokenizer, Transformer};
use freewheel_types::{Digest, PolicyVersion, PromptBody, WeightsDtype, WeightsPayload};

use crate::cli::fail::Explain as _;

/// A tokenizer behind the actor's two interfaces.
#[derive(Clone, Debug)]
pub struct Codec(pub Arc<Tokenizer>);

impl TextDecoder for Codec {
    fn decode(&self, ids: &[u32]) -> String {
        self.0.decode(ids)
    }
}

impl PromptCodec for Codec {
    fn encode_prompt(&self, prompt: &PromptBody) -> Result<Vec<u32>, ActorError> {
        Ok(self.0.encode_prompt(prompt)?)
    }
}

/// Opens a model: a folder in Hugging Face layout or a GGUF file.
///
/// # Errors
/// Whatever is wrong with the files, as bad input (exit code 78).
pub fn open(path: &Path, dtype: Option<WeightsDtype>) -> anyhow::Result<LoadedModel> {
    let result = freewheel_model::load(path, dtype);
    if path.exists() {
        return result.input();
    }
    // `org/name` where there is no folder `org`.
    let parent_there = path.parent().is_some_and(Path::exists);
    let hub_like = path.components().count() == 2 && path.is_relative() && !parent_there;
    let cure = if hub_like {
        format!(
            "download it first, for example `hf download {0} --local-dir {0}`, or give the path of a folder",
            path.display()
        )
    } else {
        "give a folder with config.json and *.safetensors, or a .gguf file".to_owned()
    };
    result.input_hint(cure)
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
    Engine::new(backend, Arc::new(Codec(loaded.tokenizer.clone())), config).input()
}

/// Weights from the policy store, for engines on processor cores.
pub struct CpuLoader {
    model: Arc<Transformer>,
    shadow: Params,
    version: Option<PolicyVersion>,
    tokenizer: Digest,
    threads: Threads,
}

impl CpuLoader {
    /// A loader for the model `loaded`; its values do not matter, the first frame replaces them.
    pub fn new(loaded: &LoadedModel, threads: Threads) -> Self {
        Self {
            model: loaded.model.clone(),
            shadow: loaded.params.clone(),
            version: None,
            tokenizer: loaded.tokenizer.digest(),
            threads,
        }
    }

    /// The newest version applied.
    pub fn version(&self) -> Option<PolicyVersion> {
        self.version
    }
}

impl PolicyLoader for CpuLoader {
    type Backend = CpuBackend;

    fn apply(&mut self, payload: &WeightsPayload) -> Result<(), ActorError> {
        let version = payload.manifest.version;
        let bad = |what: String| ActorError::BadWeights { version, what };
        if payload.manifest.tokenizer_digest != self.tokenizer {
            return Err(bad("the learner's tokenizer is another one than model.path holds here".into()));
        }
        // If this fails half-way the shadow copy is of no use: the next fetch then starts from a key frame.
        let current = self.version.take();
        freewheel_model::delta::apply_frame(&mut self.shadow, current, payload)
            .map_err(|error| bad(error.to_string()))?;
        self.version = Some(version);
        Ok(())
    }

    fn pack(
        &mut self,
        version: PolicyVersion,
        spare: Option<PolicyWeights>,
    ) -> Result<Arc<PolicyWeights>, ActorError> {
        Ok(Arc::new(match spare {
            Some(mut weights) => {
                weights.repack(&self.shadow, version, &self.threads);
                weights
            }
            None => PolicyWeights::pack(&self.model, &self.shadow, version, Purpose::Sampling, &self.threads),
        }))
    }

    fn backend(&mut self, weights: Arc<PolicyWeights>) -> CpuBackend {
        CpuBackend::new(weights, self.threads.clone())
    }
}
