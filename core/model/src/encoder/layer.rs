//! One layer: attention, norm behind it, feed-forward, norm behind it; and the backward that mirrors it.

use freewheel_kernels::Threads;
use freewheel_kernels::optim::add_assign;
use freewheel_kernels::pointwise::{Pointwise, pointwise, pointwise_backward};

use super::attention::{Attention, PositionTerms, Projected, by_head, by_row};
use super::layout::{LayerAt, LinearAt};
use super::linear::{Linear, Norm};
use super::relative::Distances;
use super::spec::EncoderSpec;
use crate::params::Params;
use crate::transformer::Purpose;

/// The weights of one layer.
#[derive(Debug)]
pub(super) struct LayerWeights {
    query: Linear,
    key: Linear,
    value: Linear,
    position_key: Option<Linear>,
    position_query: Option<Linear>,
    out: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    ffn_norm: Norm,
    /// DeBERTa's tables, projected once where weights stay as they are.
    tables: Option<Tables>,
}

/// A layer with everything it reads but the rows.
pub(super) struct Layer<'a> {
    pub spec: &'a EncoderSpec,
    pub at: &'a LayerAt,
    pub weights: &'a LayerWeights,
    /// Rows of each sequence.
    pub lengths: &'a [usize],
    /// DeBERTa's table, as layers see it `[2S, D]`.
    pub table: Option<(&'a Distances, &'a [f32])>,
}

/// What the backward needs of one layer.
#[derive(Debug)]
pub(super) struct Saved {
    /// Input `[T, D]`.
    pub x: Vec<f32>,
    projected: Projected,
    tables: Tables,
    probs: Vec<f32>,
    /// Attention output before its projection `[T, D]`.
    attended: Vec<f32>,
    /// Inputs of the two norms `[T, D]`.
    before_norm: Vec<f32>,
    before_ffn_norm: Vec<f32>,
    /// Input of the activation `[T, F]`.
    up: Vec<f32>,
}

/// DeBERTa's projected tables, `[H][2S, hd]`.
#[derive(Debug, Default)]
pub(super) struct Tables {
    keys: Option<Vec<f32>>,
    queries: Option<Vec<f32>>,
}

impl LayerWeights {
    pub fn pack(params: &Params, at: &LayerAt, eps: f32, purpose: Purpose, threads: &Threads) -> Self {
        let linear = |at| Linear::pack(params, at, purpose, threads);
        Self {
            query: linear(&at.query),
            key: linear(&at.key),
            value: linear(&at.value),
            position_key: at.position_key.as_ref().map(linear),
            position_query: at.position_query.as_ref().map(linear),
            out: linear(&at.out),
            attention_norm: Norm::pack(params, &at.attention_norm, eps),
            up: linear(&at.up),
            down: linear(&at.down),
            ffn_norm: Norm::pack(params, &at.ffn_norm, eps),
            tables: None,
        }
    }

    /// Keeps projected tables for all forward passes to come.
    pub fn keep(&mut self, tables: Tables) {
        self.tables = Some(tables);
    }
}

impl Layer<'_> {
    /// The layer's output, and with `save` what the backward needs.
    pub fn forward(&self, threads: &Threads, x: Vec<f32>, save: bool) -> (Vec<f32>, Option<Saved>) {
        let w = self.weights;
        let split = |linear: &Linear| self.by_head(&linear.forward(threads, &x));
        let projected = Projected { q: split(&w.query), k: split(&w.key), v: split(&w.value) };
        let fresh = (save || w.tables.is_none()).then(|| self.tables(threads));
        let tables = fresh.as_ref().or(w.tables.as_ref()).expect("made where none are kept");
        let (out, probs) = self.attention(tables).forward(threads, &projected, save);
        let attended = by_row(&out, self.spec.heads, self.spec.head_dim());
        let mut before_norm = w.out.forward(threads, &attended);
        add_assign(&mut before_norm, &x);
        let middle = w.attention_norm.forward(threads, &before_norm);
        let up = w.up.forward(threads, &middle);
        let mut before_ffn_norm = w.down.forward(threads, &self.activate(&up));
        add_assign(&mut before_ffn_norm, &middle);
        let y = w.ffn_norm.forward(threads, &before_ffn_norm);
        let saved = probs.map(|probs| Saved {
            x,
            projected,
            tables: fresh.unwrap_or_default(),
            probs,
            attended,
            before_norm,
            before_ffn_norm,
            up,
        });
        (y, saved)
    }

    /// The gradient of the input from that of the output. Adds the weights' gradients to `grads` and the table's to
    /// `d_table`.
    pub fn backward(
        &self,
        threads: &Threads,
        saved: &Saved,
        dy: &[f32],
        grads: &mut [f32],
        d_table: &mut [f32],
    ) -> Vec<f32> {
        let (w, at) = (self.weights, self.at);
        let d_sum = w.ffn_norm.backward(threads, &at.ffn_norm, &saved.before_ffn_norm, dy, grads);
        let d_act = w.down.backward(threads, &at.down, &self.activate(&saved.up), &d_sum, grads);
        let mut d_up = vec![0.0; d_act.len()];
        pointwise_backward(self.spec.activation, &saved.up, &d_act, &mut d_up);
        let middle = w.attention_norm.forward(threads, &saved.before_norm);
        let mut d_middle = w.up.backward(threads, &at.up, &middle, &d_up, grads);
        add_assign(&mut d_middle, &d_sum);
        let mut dx =
            w.attention_norm.backward(threads, &at.attention_norm, &saved.before_norm, &d_middle, grads);
        let d_attended = w.out.backward(threads, &at.out, &saved.attended, &dx, grads);
        let d_out = self.by_head(&d_attended);
        let attention = self.attention(&saved.tables);
        let d = attention.backward(threads, &saved.projected, &saved.probs, &d_out);
        for (linear, at, d) in
            [(&w.query, &at.query, &d.q), (&w.key, &at.key, &d.k), (&w.value, &at.value, &d.v)]
        {
            let d = by_row(d, self.spec.heads, self.spec.head_dim());
            add_assign(&mut dx, &linear.backward(threads, at, &saved.x, &d, grads));
        }
        let Some((_, table)) = self.table else { return dx };
        let keys = saved.tables.keys.as_ref().map(|_| (self.key_projection(), &d.position_keys));
        let queries = saved.tables.queries.as_ref().map(|_| (self.query_projection(), &d.position_queries));
        for ((linear, at), d) in [keys, queries].into_iter().flatten() {
            let d = by_row(d, self.spec.heads, self.spec.head_dim());
            add_assign(d_table, &linear.backward(threads, at, table, &d, grads));
        }
        dx
    }

    fn attention<'t>(&'t self, tables: &'t Tables) -> Attention<'t> {
        Attention {
            heads: self.spec.heads,
            head_dim: self.spec.head_dim(),
            scale: self.spec.scale(),
            lengths: self.lengths,
            positions: self.table.map(|(distances, _)| PositionTerms {
                distances,
                keys: tables.keys.as_deref(),
                queries: tables.queries.as_deref(),
            }),
        }
    }

    /// DeBERTa's table through this layer's projections.
    pub fn tables(&self, threads: &Threads) -> Tables {
        let (Some((_, table)), Some(relative)) = (self.table, &self.spec.relative) else {
            return Tables::default();
        };
        let project = |(linear, _): (&Linear, _)| self.by_head(&linear.forward(threads, table));
        Tables {
            keys: relative.content_to_position.then(|| project(self.key_projection())),
            queries: relative.position_to_content.then(|| project(self.query_projection())),
        }
    }

    fn key_projection(&self) -> (&Linear, &LinearAt) {
        match (&self.weights.position_key, &self.at.position_key) {
            (Some(linear), Some(at)) => (linear, at),
            _ => (&self.weights.key, &self.at.key),
        }
    }

    fn query_projection(&self) -> (&Linear, &LinearAt) {
        match (&self.weights.position_query, &self.at.position_query) {
            (Some(linear), Some(at)) => (linear, at),
            _ => (&self.weights.query, &self.at.query),
        }
    }

    fn by_head(&self, x: &[f32]) -> Vec<f32> {
        by_head(x, self.spec.heads, self.spec.head_dim())
    }

    fn activate(&self, up: &[f32]) -> Vec<f32> {
        activate(self.spec.activation, up)
    }
}

/// `act(x)` as a new vector.
pub(super) fn activate(act: Pointwise, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    pointwise(act, x, &mut y);
    y
}
