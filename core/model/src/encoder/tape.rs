//! Training: the same forward with what the backward needs kept, and the gradient of a loss on the scores.

use freewheel_kernels::Threads;
use freewheel_kernels::optim::add_assign;
use freewheel_kernels::pointwise::pointwise_backward;

use super::layer::activate;
use super::weights::{EncoderBatch, EncoderWeights, Kept};

/// What a training forward leaves for the backward.
#[derive(Debug)]
pub struct EncoderTape {
    tokens: Vec<u32>,
    token_types: Option<Vec<u32>>,
    lengths: Vec<usize>,
    kept: Kept,
    /// Final hidden states `[T, D]`.
    hidden_td: Vec<f32>,
}

impl EncoderWeights {
    /// Runs whole sequences and keeps what the backward needs.
    ///
    /// # Panics
    /// As [`EncoderWeights::forward`].
    pub fn forward_train(&self, threads: &Threads, batch: &EncoderBatch) -> EncoderTape {
        let mut kept = Kept::default();
        let hidden_td = self.run(threads, batch, Some(&mut kept));
        EncoderTape {
            tokens: batch.tokens.to_vec(),
            token_types: batch.token_types.map(<[u32]>::to_vec),
            lengths: batch.lengths.to_vec(),
            kept,
            hidden_td,
        }
    }
}

impl EncoderTape {
    /// Rows as they enter layer `index`, or the final ones for the number of layers; `[T, D]`.
    ///
    /// # Panics
    /// If there are fewer layers.
    pub fn hidden(&self, index: usize) -> &[f32] {
        match self.kept.layers.get(index) {
            Some(layer) => &layer.x,
            None if index == self.kept.layers.len() => &self.hidden_td,
            None => panic!("layer {index} of {}", self.kept.layers.len()),
        }
    }

    /// One score for each label `[sequences, labels]`.
    ///
    /// # Panics
    /// If the encoder has no classifier.
    pub fn scores(&self, threads: &Threads, weights: &EncoderWeights) -> Vec<f32> {
        weights.scores(threads, &self.hidden_td, &self.lengths)
    }

    /// Adds the gradient of `Σ d_scores · scores` to `grads`, an arena of the encoder's layout. `d_scores` is
    /// `[sequences, labels]`.
    ///
    /// # Panics
    /// If the lengths disagree, or the weights were not packed for training.
    pub fn backward(self, threads: &Threads, weights: &EncoderWeights, d_scores: &[f32], grads: &mut [f32]) {
        let encoder = &weights.encoder;
        assert_eq!(grads.len(), encoder.layout.total, "gradients of another model");
        let mut dx = self.head_backward(threads, weights, d_scores, grads);
        let table = weights.table(threads);
        let mut d_table = vec![0.0; table.as_ref().map_or(0, Vec::len)];
        for (index, saved) in self.kept.layers.iter().enumerate().rev() {
            let layer = weights.layer(index, &self.lengths, table.as_deref());
            dx = layer.backward(threads, saved, &dx, grads, &mut d_table);
        }
        self.table_backward(threads, weights, d_table, grads);
        let norm = &encoder.at.embedding_norm;
        let d_embedded = weights.embedding_norm.backward(threads, norm, &self.kept.embedded, &dx, grads);
        self.embedding_backward(weights, &d_embedded, grads);
    }

    /// Gradient of the final hidden states.
    fn head_backward(
        &self,
        threads: &Threads,
        weights: &EncoderWeights,
        d_scores: &[f32],
        grads: &mut [f32],
    ) -> Vec<f32> {
        let first = weights.first_rows(&self.hidden_td, &self.lengths);
        let (scores, dense) = weights.classify(threads, &first);
        assert_eq!(scores.len(), d_scores.len(), "one gradient for each score");
        let at = &weights.encoder.at;
        let (Some(pooler), Some(pooler_at), Some(classifier), Some(classifier_at), Some(spec)) =
            (&weights.pooler, &at.pooler, &weights.classifier, &at.classifier, weights.encoder.spec.pooler)
        else {
            unreachable!("classify() has used them")
        };
        let pooled = activate(spec.activation, &dense);
        let d_pooled = classifier.backward(threads, classifier_at, &pooled, d_scores, grads);
        let mut d_dense = vec![0.0; dense.len()];
        pointwise_backward(spec.activation, &dense, &d_pooled, &mut d_dense);
        let d_first = pooler.backward(threads, pooler_at, &first, &d_dense, grads);
        let d = weights.encoder.spec.hidden;
        let mut dx = vec![0.0; self.hidden_td.len()];
        let mut row = 0;
        for (len, d_first) in self.lengths.iter().zip(d_first.chunks_exact(d)) {
            dx[row * d..][..d].copy_from_slice(d_first);
            row += len;
        }
        dx
    }

    fn table_backward(
        &self,
        threads: &Threads,
        weights: &EncoderWeights,
        d_table: Vec<f32>,
        grads: &mut [f32],
    ) {
        let at = &weights.encoder.at;
        let (Some(range), Some(raw)) = (&at.distances, weights.raw_table()) else { return };
        let d_raw = match (&weights.distance_norm, &at.distance_norm) {
            (Some(norm), Some(norm_at)) => norm.backward(threads, norm_at, raw, &d_table, grads),
            _ => d_table,
        };
        add_assign(&mut grads[range.clone()], &d_raw);
    }

    fn embedding_backward(&self, weights: &EncoderWeights, d_embedded: &[f32], grads: &mut [f32]) {
        let (at, d) = (&weights.encoder.at, weights.encoder.spec.hidden);
        let positions = self.lengths.iter().flat_map(|&len| 0..len);
        for (row, (dx, position)) in d_embedded.chunks_exact(d).zip(positions).enumerate() {
            let mut add = |table: &std::ops::Range<usize>, index: usize| {
                add_assign(&mut grads[table.start + index * d..][..d], dx);
            };
            add(&at.words, self.tokens[row] as usize);
            if let Some(table) = &at.positions {
                add(table, position);
            }
            if let Some(table) = &at.token_types {
                add(table, self.token_types.as_ref().map_or(0, |types| types[row] as usize));
            }
        }
    }
}
