//! Mixtral: Mistral's attention, softmax top-k experts with weights that sum to 1.

use super::fields::Fields;
use super::llama::{Variant, assemble};
use crate::error::ModelError;
use crate::spec::{ExpertNames, FfnSpec, ModelSpec, MoeSpec, QkNorm, RouterKind, TensorNames};

const NAMES: TensorNames = TensorNames {
    moe: "block_sparse_moe",
    experts: ExpertNames::Each(["w1", "w3", "w2"]),
    ..TensorNames::LLAMA
};

/// MixtralForCausalLM.
pub(super) fn mixtral(fields: &Fields<'_>) -> Result<ModelSpec, ModelError> {
    let moe = MoeSpec {
        experts: fields.size_any(&["num_local_experts", "num_experts"], 8)?,
        top_k: fields.size_or("num_experts_per_tok", 2)?,
        width: fields.size("intermediate_size")?,
        router: RouterKind::Softmax { renormalise: true },
        shared_width: None,
        activation: fields.activation()?,
        bias: false,
    };
    let variant = Variant {
        names: NAMES,
        architecture: "MixtralForCausalLM",
        head_dim: None,
        qk_norm: QkNorm::None,
        bias: (false, false),
        rope_theta: 1e6,
        norm_eps: 1e-5,
        max_positions: 4096 * 32,
    };
    let window = fields.size_opt("sliding_window")?;
    assemble(fields, &variant, |_| Ok(window), |_| Ok(FfnSpec::Moe(moe.clone())))
}
