//! From published payloads to weights an engine can use.

use std::sync::Arc;

use freewheel_model::vision::EncodedPrompt;
use freewheel_types::{PolicyVersion, PromptBody, WeightsPayload};

use crate::ActorError;
use crate::engine::{Backend, TextDecoder};

/// Turns payloads into weights. Holds a shadow copy of the newest version, which no engine reads.
pub trait PolicyLoader: Send + 'static {
    /// The backend the weights are for.
    type Backend: Backend;

    /// Applies one payload to the shadow copy and checks the result against the manifest. A payload without a base is
    /// a key frame and replaces everything.
    ///
    /// # Errors
    /// [`ActorError::BadWeights`]. The shadow copy is of no use then until a key frame is applied.
    fn apply(&mut self, payload: &WeightsPayload) -> Result<(), ActorError>;

    /// The shadow copy in the backend's layout; in the memory of `spare` if possible.
    fn pack(
        &mut self,
        version: PolicyVersion,
        spare: Option<Weights<Self>>,
    ) -> Result<Arc<Weights<Self>>, ActorError>;

    /// The backend, starting with `weights`. Called once.
    fn backend(&mut self, weights: Arc<Weights<Self>>) -> Self::Backend;
}

/// Weights of a loader's backend.
pub type Weights<L> = <<L as PolicyLoader>::Backend as Backend>::Weights;

/// Text to ids and back, as the model was trained.
pub trait PromptCodec: TextDecoder {
    /// Ids of a prompt, through the chat template or as plain text, and the tiles of its images.
    ///
    /// # Errors
    /// If the template or the tokenizer refuses it, or an image is broken.
    fn encode_prompt(&self, prompt: &PromptBody) -> Result<EncodedPrompt, ActorError>;
}
