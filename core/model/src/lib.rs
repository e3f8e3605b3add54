//! One definition of the transformer, used for sampling *and* training.
//!
//! ```text
//! config.json ─► ModelSpec ─► ParamLayout ─► Params (one flat arena: HF names, HF shapes)
//!                    │                          │ pack
//!                    ▼                          ▼
//!               Transformer ◄──────────── PolicyWeights (kernel layout, one version)
//!                    ├─ forward        packed tokens + KV pages → logits        (actor: prefill and decode)
//!                    └─ forward_train  packed sequences → Tape → log-probs → gradients   (learner)
//! ```
//!
//! Prefill, decode and the training forward run the same layer code with different metadata, so that a
//! token's log-prob has the same bits in all three. Knows nothing of sockets, batching policy or rewards.

mod checkpoint;
mod config;
pub mod delta;
mod embedder;
pub mod encoder;
mod error;
mod generation;
mod init;
mod metap;
mod params;
mod rehead;
pub mod sampling;
mod scorer;
mod spec;
mod template;
mod tokenizer;
mod transformer;
mod upcycle;
pub mod vision;

pub use checkpoint::{
    Adapter, FileSink, LoadedEncoder, LoadedModel, SaveOptions, add_product, convert, load, load_any,
    load_classifier, load_encoder, save, save_into,
};
pub use config::{
    ARCHITECTURES, Architecture, CLASSIFIERS, ENCODERS, encoder_spec_from_config, spec_from_config,
    supported_architectures,
};
pub use embedder::{Embedder, EmbedderInfo};
pub use error::ModelError;
pub use generation::GenerationConfig;
pub use init::{ChatStyle, InitRequest, InitScale, TokenizerChoice, build_tokenizer, init_model};
pub use metap::{Growth, MetaP};
pub use params::{ParamData, ParamLayout, Params, TensorKind, TensorSpec};
pub use rehead::classifier_from;
pub use scorer::{Scorer, ScorerInfo, score_row};
pub use spec::{
    Activation, AttentionSpec, ExpertNames, FfnSpec, LatentSpec, ModelSpec, MoeSpec, OutputHead, QkNorm,
    RopeScaling, RopeSpec, RopeStyle, RouterKind, TemperatureTuning, TensorNames, VisionSpec,
};
pub use template::RenderOptions;
pub use tokenizer::{ChatIds, DecodeStream, Framed, Tokenizer};
pub use transformer::{
    BatchSeq, ForwardBatch, ForwardOutput, KvCache, LogProbs, PolicyWeights, ProductShape, Purpose, Tape,
    Target, TileRows, TrainBatch, TrainOptions, TrainSeq, Transformer, UpdatePart, logits_chunk_rows,
};
pub use upcycle::{UpcycleOptions, upcycle};
