//! Names and shapes of an encoder's tensors, and where each part of it finds its own.

use std::ops::Range;

use super::spec::{EncoderFamily, EncoderSpec, Positions};
use crate::params::{ParamLayout, TensorKind, TensorSpec};

/// A projection `[n, k]` with its bias `[n]`.
#[derive(Clone, Debug)]
pub(super) struct LinearAt {
    pub weight: Range<usize>,
    pub bias: Range<usize>,
    pub n: usize,
    pub k: usize,
}

/// A layer norm.
#[derive(Clone, Debug)]
pub(super) struct NormAt {
    pub weight: Range<usize>,
    pub bias: Range<usize>,
}

#[derive(Clone, Debug)]
pub(super) struct LayerAt {
    pub query: LinearAt,
    pub key: LinearAt,
    pub value: LinearAt,
    /// DeBERTa's own projections of positions: of keys, of queries.
    pub position_key: Option<LinearAt>,
    pub position_query: Option<LinearAt>,
    pub out: LinearAt,
    pub attention_norm: NormAt,
    pub up: LinearAt,
    pub down: LinearAt,
    pub ffn_norm: NormAt,
}

#[derive(Clone, Debug)]
pub(super) struct EncoderBinding {
    pub words: Range<usize>,
    pub positions: Option<Range<usize>>,
    pub token_types: Option<Range<usize>>,
    pub embedding_norm: NormAt,
    /// DeBERTa's table of distances `[2S, D]`.
    pub distances: Option<Range<usize>>,
    pub distance_norm: Option<NormAt>,
    pub layers: Vec<LayerAt>,
    pub pooler: Option<LinearAt>,
    pub classifier: Option<LinearAt>,
}

/// The layout of `spec` and its parts.
pub(super) fn bind(spec: &EncoderSpec) -> (ParamLayout, EncoderBinding) {
    let mut table = Table { layout: ParamLayout { tensors: Vec::new(), total: 0 } };
    let body = match (spec.family, spec.labels) {
        (_, None) => "",
        (EncoderFamily::Bert, Some(_)) => "bert.",
        (EncoderFamily::DebertaV2, Some(_)) => "deberta.",
    };
    let d = spec.hidden;
    let embeddings = format!("{body}embeddings");
    let words = table.embedding(&format!("{embeddings}.word_embeddings"), spec.vocab_size, d);
    let positions = (spec.positions == Positions::Absolute)
        .then(|| table.embedding(&format!("{embeddings}.position_embeddings"), spec.max_positions, d));
    let token_types = (spec.token_types > 0)
        .then(|| table.embedding(&format!("{embeddings}.token_type_embeddings"), spec.token_types, d));
    let embedding_norm = table.norm(&format!("{embeddings}.LayerNorm"), d);
    let relative = spec.relative.as_ref();
    let distances =
        relative.map(|r| table.embedding(&format!("{body}encoder.rel_embeddings"), 2 * r.span(), d));
    let distance_norm =
        relative.filter(|r| r.normalised).map(|_| table.norm(&format!("{body}encoder.LayerNorm"), d));
    let layers = (0..spec.layers).map(|i| table.layer(spec, &format!("{body}encoder.layer.{i}"))).collect();
    let pooler = spec.pooler.map(|pooler| {
        let at = if spec.family == EncoderFamily::Bert { body } else { "" };
        table.linear(&format!("{at}pooler.dense"), pooler.width, d)
    });
    let classifier = spec.labels.map(|labels| table.linear("classifier", labels, d));
    let binding = EncoderBinding {
        words,
        positions,
        token_types,
        embedding_norm,
        distances,
        distance_norm,
        layers,
        pooler,
        classifier,
    };
    (table.layout, binding)
}

struct Table {
    layout: ParamLayout,
}

impl Table {
    fn push(&mut self, name: String, shape: &[usize], kind: TensorKind) -> Range<usize> {
        let tensor = TensorSpec { name, shape: shape.to_vec(), offset: self.layout.total, kind };
        let range = tensor.range();
        self.layout.total = range.end;
        self.layout.tensors.push(tensor);
        range
    }

    fn embedding(&mut self, name: &str, rows: usize, width: usize) -> Range<usize> {
        self.push(format!("{name}.weight"), &[rows, width], TensorKind::Embedding)
    }

    fn norm(&mut self, name: &str, width: usize) -> NormAt {
        NormAt {
            weight: self.push(format!("{name}.weight"), &[width], TensorKind::Norm),
            bias: self.push(format!("{name}.bias"), &[width], TensorKind::Bias),
        }
    }

    fn linear(&mut self, name: &str, n: usize, k: usize) -> LinearAt {
        let kind = if name.contains(".attention.") { TensorKind::Attention } else { TensorKind::Mlp };
        LinearAt {
            weight: self.push(format!("{name}.weight"), &[n, k], kind),
            bias: self.push(format!("{name}.bias"), &[n], TensorKind::Bias),
            n,
            k,
        }
    }

    fn layer(&mut self, spec: &EncoderSpec, at: &str) -> LayerAt {
        let (d, f) = (spec.hidden, spec.ffn_width);
        let suffix = if spec.family == EncoderFamily::DebertaV2 { "_proj" } else { "" };
        let mut projection = |name: &str| self.linear(&format!("{at}.attention.self.{name}{suffix}"), d, d);
        let (query, key, value) = (projection("query"), projection("key"), projection("value"));
        let own = spec.relative.as_ref().filter(|r| !r.shared_projections);
        LayerAt {
            query,
            key,
            value,
            position_key: own.filter(|r| r.content_to_position).map(|_| projection("pos_key")),
            position_query: own.filter(|r| r.position_to_content).map(|_| projection("pos_query")),
            out: self.linear(&format!("{at}.attention.output.dense"), d, d),
            attention_norm: self.norm(&format!("{at}.attention.output.LayerNorm"), d),
            up: self.linear(&format!("{at}.intermediate.dense"), f, d),
            down: self.linear(&format!("{at}.output.dense"), d, f),
            ffn_norm: self.norm(&format!("{at}.output.LayerNorm"), d),
        }
    }
}
