//! A whole encoder, packed for the kernels, and its forward passes.

use freewheel_kernels::Threads;
use freewheel_kernels::optim::add_assign;
use std::ops::Range;
use std::sync::Arc;

use super::Encoder;
use super::layer::{Layer, LayerWeights, Saved, activate};
use super::layout::LinearAt;
use super::linear::{Linear, Norm};
use crate::params::Params;
use crate::transformer::Purpose;

/// Sequences to run, packed without padding.
#[derive(Clone, Copy, Debug)]
pub struct EncoderBatch<'a> {
    /// Tokens of all sequences, one after the other `[T]`.
    pub tokens: &'a [u32],
    /// Segment of every token `[T]`; `None`: all in the first.
    pub token_types: Option<&'a [u32]>,
    /// Length of each sequence, at least 1; they add up to T.
    pub lengths: &'a [usize],
}

/// An encoder's weights in the layout the kernels want; they compute in f32 whatever they were stored in.
#[derive(Debug)]
pub struct EncoderWeights {
    pub(super) encoder: Arc<Encoder>,
    words: Vec<f32>,
    positions: Option<Vec<f32>>,
    token_types: Option<Vec<f32>>,
    pub(super) embedding_norm: Norm,
    distances: Option<Vec<f32>>,
    pub(super) distance_norm: Option<Norm>,
    layers: Vec<LayerWeights>,
    pub(super) pooler: Option<Linear>,
    pub(super) classifier: Option<Linear>,
}

/// What a forward pass leaves for the backward, when asked to.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Sum of the embeddings, before their norm.
    pub embedded: Vec<f32>,
    pub layers: Vec<Saved>,
}

impl EncoderWeights {
    /// Packs `params`.
    ///
    /// # Panics
    /// If `params` do not have the layout of `encoder`.
    pub fn pack(encoder: &Arc<Encoder>, params: &Params, purpose: Purpose, threads: &Threads) -> Self {
        assert_eq!(params.layout.total, encoder.layout.total, "parameters of another model");
        let (at, eps) = (&encoder.at, encoder.spec.norm_eps);
        let values = |range: &Range<usize>| params.range_f32(range.clone());
        let linear = |at: &LinearAt| Linear::pack(params, at, purpose, threads);
        let mut weights = Self {
            words: values(&at.words),
            positions: at.positions.as_ref().map(values),
            token_types: at.token_types.as_ref().map(values),
            embedding_norm: Norm::pack(params, &at.embedding_norm, eps),
            distances: at.distances.as_ref().map(values),
            distance_norm: at.distance_norm.as_ref().map(|at| Norm::pack(params, at, eps)),
            layers: at
                .layers
                .iter()
                .map(|at| LayerWeights::pack(params, at, eps, purpose, threads))
                .collect(),
            pooler: at.pooler.as_ref().map(linear),
            classifier: at.classifier.as_ref().map(linear),
            encoder: encoder.clone(),
        };
        if purpose == Purpose::Sampling {
            let table = weights.table(threads);
            let each = 0..weights.layers.len();
            let tables: Vec<_> =
                each.map(|i| weights.layer(i, &[], table.as_deref()).tables(threads)).collect();
            weights.layers.iter_mut().zip(tables).for_each(|(layer, tables)| layer.keep(tables));
        }
        weights
    }

    /// The structure they fit.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// Final hidden states `[T, D]`.
    ///
    /// # Panics
    /// If the batch does not fit the vocabulary, the positions or the token types.
    pub fn forward(&self, threads: &Threads, batch: &EncoderBatch) -> Vec<f32> {
        self.run(threads, batch, None)
    }

    /// One score for each label `[sequences, labels]`, from final hidden states.
    ///
    /// # Panics
    /// If the encoder has no classifier.
    pub fn scores(&self, threads: &Threads, hidden_td: &[f32], lengths: &[usize]) -> Vec<f32> {
        let first = self.first_rows(hidden_td, lengths);
        self.classify(threads, &first).0
    }

    /// Scores `[B, labels]` of first rows `[B, D]`; also the pooler's output before its activation.
    pub(super) fn classify(&self, threads: &Threads, first: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (Some(pooler), Some(classifier), Some(spec)) =
            (&self.pooler, &self.classifier, self.encoder.spec.pooler)
        else {
            panic!("this encoder has no classifier");
        };
        let dense = pooler.forward(threads, first);
        (classifier.forward(threads, &activate(spec.activation, &dense)), dense)
    }

    /// First row of each sequence `[B, D]`.
    pub(super) fn first_rows(&self, hidden_td: &[f32], lengths: &[usize]) -> Vec<f32> {
        let d = self.encoder.spec.hidden;
        let mut out = Vec::with_capacity(lengths.len() * d);
        let mut row = 0;
        for len in lengths {
            out.extend_from_slice(&hidden_td[row * d..][..d]);
            row += len;
        }
        out
    }

    pub(super) fn run(
        &self,
        threads: &Threads,
        batch: &EncoderBatch,
        mut kept: Option<&mut Kept>,
    ) -> Vec<f32> {
        let embedded = self.embed(batch);
        let mut x = self.embedding_norm.forward(threads, &embedded);
        if let Some(kept) = &mut kept {
            kept.embedded = embedded;
        }
        let table = self.table(threads);
        for index in 0..self.layers.len() {
            let layer = self.layer(index, batch.lengths, table.as_deref());
            let (y, saved) = layer.forward(threads, x, kept.is_some());
            x = y;
            if let (Some(kept), Some(saved)) = (&mut kept, saved) {
                kept.layers.push(saved);
            }
        }
        x
    }

    pub(super) fn layer<'a>(
        &'a self,
        index: usize,
        lengths: &'a [usize],
        table: Option<&'a [f32]>,
    ) -> Layer<'a> {
        Layer {
            spec: &self.encoder.spec,
            at: &self.encoder.at.layers[index],
            weights: &self.layers[index],
            lengths,
            table: self.encoder.distances.as_ref().zip(table),
        }
    }

    /// DeBERTa's table as stored `[2S, D]`.
    pub(super) fn raw_table(&self) -> Option<&[f32]> {
        self.distances.as_deref()
    }

    /// DeBERTa's table as layers see it `[2S, D]`.
    pub(super) fn table(&self, threads: &Threads) -> Option<Vec<f32>> {
        let raw = self.distances.as_deref()?;
        Some(match &self.distance_norm {
            Some(norm) => norm.forward(threads, raw),
            None => raw.to_vec(),
        })
    }

    /// Words plus positions plus token types `[T, D]`.
    fn embed(&self, batch: &EncoderBatch) -> Vec<f32> {
        let (spec, d) = (&self.encoder.spec, self.encoder.spec.hidden);
        let rows = batch.tokens.len();
        assert_eq!(batch.lengths.iter().sum::<usize>(), rows, "lengths must add up to the tokens");
        for &len in batch.lengths {
            assert!(
                (1..=spec.max_positions).contains(&len),
                "a sequence of {len} of 1 to {}",
                spec.max_positions
            );
        }
        if let Some(types) = batch.token_types {
            assert_eq!(types.len(), rows, "one type for each token");
        }
        let positions = batch.lengths.iter().flat_map(|&len| 0..len);
        let mut x = vec![0.0; rows * d];
        for (row, (x, position)) in x.chunks_exact_mut(d).zip(positions).enumerate() {
            x.copy_from_slice(&self.words[batch.tokens[row] as usize * d..][..d]);
            if let Some(table) = &self.positions {
                add_assign(x, &table[position * d..][..d]);
            }
            if let Some(table) = &self.token_types {
                let kind = batch.token_types.map_or(0, |types| types[row] as usize);
                add_assign(x, &table[kind * d..][..d]);
            }
        }
        x
    }
}

/// Sentence embeddings `[sequences, D]`: the mean of each sequence's rows, scaled to length 1 (sentence-transformers).
///
/// # Panics
/// If the lengths do not add up to the rows.
pub fn mean_pooled(hidden_td: &[f32], lengths: &[usize], d: usize) -> Vec<f32> {
    assert_eq!(lengths.iter().sum::<usize>() * d, hidden_td.len(), "lengths must add up to the rows");
    let mut out = vec![0.0; lengths.len() * d];
    let mut rows = hidden_td.chunks_exact(d);
    for (out, &len) in out.chunks_exact_mut(d).zip(lengths) {
        rows.by_ref().take(len).for_each(|row| add_assign(out, row));
        out.iter_mut().for_each(|x| *x /= len.max(1) as f32);
        let norm = out.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-12) as f32;
        out.iter_mut().for_each(|x| *x /= norm);
    }
    out
}
