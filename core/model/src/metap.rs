//! A parametrisation under which a learning rate found on a small model suits larger ones of the same shape.
//!
//! Maximal update parametrisation (Yang et al., arXiv 2203.03466, table 8) with CompleteP's depth rule (Dey et al., arXiv
//! 2505.01618), for Adam, without multipliers in the model: they are folded into starts and rates. n is the width over the base's, d
//! the depth over the base's; at n = d = 1 it is `InitScale::FanIn`.
//!
//! | tensor | deviation at the start | rate |
//! |---|---|---|
//! | embedding, positions | that of the base | 1 |
//! | norms, biases | – | 1 |
//! | hidden matrices, experts | 1/√inputs | 1/n |
//! | those that write to the residual stream | 1/√inputs · (2·base depth)^−½ / d | 1/(n·d) |
//! | router, head | that of the base / n | 1/n |
//!
//! The number of experts has no part in it as long as the share of experts that a token uses stays (arXiv 2601.20205), nor has the
//! width of a head: wider models have more heads. Decoupled decay keeps rate · decay as it is at the base. A tied head would need a
//! multiplier of its own and is refused; image encoders are left as they are.

use crate::params::{ParamLayout, TensorKind, TensorSpec};

/// The model that rates were found on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaP {
    /// Its residual width.
    pub width: usize,
    /// Its layers.
    pub layers: usize,
}

/// A model's size over the base's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    width: f64,
    depth: f64,
    base: MetaP,
}

impl MetaP {
    /// How much larger the model of `layout` is. `None` if its head is tied to the embedding.
    pub fn growth(self, layout: &ParamLayout) -> Option<Growth> {
        let embedding = layout.tensors.iter().find(|tensor| tensor.kind == TensorKind::Embedding)?;
        layout.tensors.iter().find(|tensor| tensor.kind == TensorKind::Head)?;
        let layer = |tensor: &TensorSpec| -> Option<usize> {
            if is_vision(tensor) {
                return None;
            }
            tensor.name.split_once(".layers.")?.1.split('.').next()?.parse().ok()
        };
        let layers = layout.tensors.iter().filter_map(layer).max()? + 1;
        Some(Growth {
            width: embedding.shape[1] as f64 / self.width as f64,
            depth: layers as f64 / self.layers as f64,
            base: self,
        })
    }
}

impl Growth {
    /// Standard deviation of the random start; `None` for norms and biases, and for what is left as it is.
    pub fn deviation(&self, tensor: &TensorSpec) -> Option<f64> {
        if is_vision(tensor) {
            return None;
        }
        let inputs = tensor.shape.get(1).copied().unwrap_or(1) as f64;
        let base = (self.base.width as f64).sqrt().recip();
        match tensor.kind {
            TensorKind::Embedding => Some(base),
            TensorKind::Head | TensorKind::Router => Some(base / self.width),
            TensorKind::Attention | TensorKind::Mlp | TensorKind::Expert if writes_residual(tensor) => {
                Some((inputs * 2.0 * self.base.layers as f64).sqrt().recip() / self.depth)
            }
            TensorKind::Attention | TensorKind::Mlp | TensorKind::Expert => Some(inputs.sqrt().recip()),
            TensorKind::Norm | TensorKind::Bias | TensorKind::Position | TensorKind::RouterBias => None,
        }
    }

    /// Factor on the learning rate.
    pub fn rate(&self, tensor: &TensorSpec) -> f64 {
        if is_vision(tensor) {
            return 1.0;
        }
        match tensor.kind {
            TensorKind::Attention | TensorKind::Mlp | TensorKind::Expert if writes_residual(tensor) => {
                1.0 / (self.width * self.depth)
            }
            TensorKind::Attention
            | TensorKind::Mlp
            | TensorKind::Expert
            | TensorKind::Head
            | TensorKind::Router => 1.0 / self.width,
            TensorKind::Embedding
            | TensorKind::Norm
            | TensorKind::Bias
            | TensorKind::Position
            | TensorKind::RouterBias => 1.0,
        }
    }
}

fn is_vision(tensor: &TensorSpec) -> bool {
    tensor.name.starts_with("vision_model.") || tensor.name.starts_with("multi_modal_projector.")
}

/// Whether a projection's output is added to the residual stream.
pub(crate) fn writes_residual(tensor: &TensorSpec) -> bool {
    let ends = ["o_proj.weight", "down_proj.weight", "w2.weight", "experts.down_proj"];
    ends.iter().any(|end| tensor.name.ends_with(end))
}
