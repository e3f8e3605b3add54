//! What a model costs: parameters, bytes and operations, from its specification alone.

use freewheel_model::{FfnSpec, KvCache, ParamLayout, TensorKind, Transformer};

/// Sizes of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// All parameters.
    pub parameters: u64,
    /// Parameters read whole at every decode step: everything but routed experts and an untied embedding table.
    pub dense: u64,
    /// Parameters of all routed experts.
    pub experts: u64,
    /// Routed experts a token uses, of all, as a share.
    pub routed_share: f64,
    /// Bytes of keys and values of one position, all layers.
    pub kv_bytes: u64,
}

impl Cost {
    /// The sizes of `model`.
    pub fn of(model: &Transformer) -> Self {
        let (layout, spec): (&ParamLayout, _) = (model.layout(), model.spec());
        let sum = |kind: TensorKind| {
            layout.tensors.iter().filter(|t| t.kind == kind).map(|t| t.len() as u64).sum::<u64>()
        };
        let experts = sum(TensorKind::Expert);
        // A table whose rows are only looked up is not read; a tied one is the head too.
        let looked_up = if spec.tied_embeddings { 0 } else { sum(TensorKind::Embedding) };
        let routed = spec.layers.iter().find_map(|(_, ffn)| match ffn {
            FfnSpec::Moe(moe) => Some(moe.top_k as f64 / moe.experts as f64),
            FfnSpec::Dense { .. } => None,
        });
        Self {
            parameters: layout.total as u64,
            dense: layout.total as u64 - experts - looked_up,
            experts,
            routed_share: routed.unwrap_or(0.0),
            kv_bytes: (KvCache::page_bytes(model) / freewheel_kernels::attention::KV_BLOCK) as u64,
        }
    }

    /// Operations of one token's forward pass, without attention over the context (a multiply-add counts two).
    pub fn forward_flops(&self) -> f64 {
        2.0 * (self.dense as f64 + self.experts as f64 * self.routed_share)
    }

    /// Bytes read for one decode step of `batch` sequences of `context` tokens, `coverage` of the experts touched.
    pub fn decode_bytes(&self, element: usize, batch: usize, context: f64, coverage: f64) -> f64 {
        (self.dense as f64 + self.experts as f64 * coverage) * element as f64
            + batch as f64 * context * self.kv_bytes as f64
    }
}
