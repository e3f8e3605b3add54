//! Training-side forward: packed sequences, with what the backward needs kept layer by layer.
//!
//! The same layer functions as in sampling run here; only the metadata differs (keys and values live in pages of the
//! batch). Hence a token's log-prob has the bits the sampler reported. A prompt is computed once for its whole group here
//! too: its other rollouts are branches of the first.

use std::ops::Range;
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::attention::{KV_BLOCK, KvPages, KvPagesMut, kv_words};
use freewheel_kernels::norm::{NormScale, rms_norm};
use freewheel_kernels::optim::{add_assign, axpy};
use freewheel_types::SamplingParams;

use super::attention::{Rows, Saved as SavedAttention, norm_backward};
use super::bindings::FfnBinding;
use super::buffers::Buf;
use super::head::{HeadRows, chunk_rows};
use super::inference::interleave;
use super::mlp::{self, Context, MIN_VALUES, Part};
use super::moe::{RouterLosses, Saved as SavedMoe};
use super::places::Places;
use super::residual::{add_block, add_block_backward};
use super::vision::{ShownTiles, TileRows};
use super::weights::{FfnWeights, PolicyWeights};
use crate::sampling::{self, SampleScratch, TokenStats};
use crate::spec::OutputHead;

/// One sequence of a batch, or what one adds to the sequence it branches off from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainSeq {
    /// Position of its first row: 0, or for a branch the number of rows it takes from the last sequence before it that
    /// starts at 0.
    pub position: usize,
    /// Rows of its own, at least 1.
    pub rows: usize,
}

impl TrainSeq {
    /// A sequence that stands by itself.
    pub fn whole(rows: usize) -> Self {
        Self { position: 0, rows }
    }
}

/// Sequences to train on, packed without padding.
#[derive(Clone, Copy, Debug)]
pub struct TrainBatch<'a> {
    /// Tokens of all rows, one sequence after the other `[T]`.
    pub tokens: &'a [u32],
    /// The sequences; their rows add up to T.
    pub seqs: &'a [TrainSeq],
    /// Experts to use instead of the router's choice `[T, MoE layers, K]` (router replay).
    pub replay: Option<&'a [u16]>,
    /// Rows that show tiles of images instead of their token's embedding.
    pub tiles: &'a [TileRows<'a>],
}

/// A token whose log-prob is wanted: `row` is the position *before* it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row of the packed batch whose logits predict the token.
    pub row: usize,
    /// The token.
    pub token: u32,
}

/// A batch's part in an update that is made of several: losses of routers are means over the whole update, however it is split.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UpdatePart {
    /// Rows of the whole update, each counted once.
    pub rows: usize,
    /// Where they went: choices of each expert `[MoE layers, E]`. Empty: those of this batch stand for all.
    pub choices: Arc<[u64]>,
    /// Rows of this batch that another one of the update counts, as a prompt that both compute; rising.
    pub repeats: Vec<Range<usize>>,
}

/// One value for each target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogProbs {
    /// Log-probs, nats.
    pub logprobs: Vec<f32>,
    /// Entropies of the distributions, nats.
    pub entropies: Vec<f32>,
}

/// What a training forward leaves for the backward.
#[derive(Debug)]
pub struct Tape {
    tokens: Vec<u32>,
    places: Places,
    layers: Vec<KeptLayer>,
    /// Tiles of images among the rows.
    tiles: Option<ShownTiles>,
    /// Residual stream after the last layer `[T, D]`.
    x_td: Buf,
    /// Experts each token went to `[T, MoE layers, K]`.
    experts: Vec<u16>,
    /// What the losses of routers are taken over; `None`: this batch is the whole update.
    part: Option<UpdatePart>,
}

/// What is kept of a layer between forward and backward.
#[derive(Debug)]
enum KeptLayer {
    /// All that its backward reads.
    Whole(Box<SavedLayer>),
    /// The residual stream as it enters `[T, D]`: the rest is computed again, with the same experts, to the same bits.
    Input(Buf),
}

#[derive(Debug)]
struct SavedLayer {
    attention: SavedAttention,
    /// Keys and values, as in sampling's cache: in words of f32, under bf16 two to a word.
    k_pages: Buf,
    v_pages: Buf,
    /// Residual stream between attention and feed-forward `[T, D]`.
    x_mid_td: Buf,
    ffn: SavedFfn,
    /// The feed-forward's output before its sandwich norm `[T, D]`, where the layer has one.
    raw_td: Option<Buf>,
}

#[derive(Debug)]
enum SavedFfn {
    Dense(Buf),
    Moe(Box<SavedMoe>),
}

impl PolicyWeights {
    /// Runs whole sequences and keeps what the backward needs.
    ///
    /// # Panics
    /// If the sequences do not add up to the tokens, a branch takes rows that are not there, or a token is outside the
    /// vocabulary.
    pub fn forward_train(&self, threads: &Threads, batch: &TrainBatch) -> Tape {
        let cx = self.context(threads);
        let mut tape = Tape {
            tokens: batch.tokens.to_vec(),
            places: Places::new(batch.seqs, batch.tokens.len()),
            layers: Vec::with_capacity(self.layers.len()),
            tiles: None,
            x_td: self.embed(batch.tokens),
            experts: Vec::new(),
            part: None,
        };
        tape.tiles = self.show_tiles(&cx, batch.tiles, &mut tape.x_td, true);
        let (rows, moe_layers) = (tape.tokens.len(), self.model.spec().moe_layers());
        let mut routed: Vec<Vec<u16>> = Vec::with_capacity(moe_layers);
        for layer in 0..self.layers.len() {
            let replay = batch.replay.map(|all| experts_of_layer(all, rows, moe_layers, routed.len()));
            let entering = self.train_options.recompute_layers.then(|| cx.pool.copy(&tape.x_td));
            let saved = self.layer_forward(&cx, &tape.places, &mut tape.x_td, layer, replay.as_deref());
            routed.extend(saved.routing().map(|routing| routing.ids.clone()));
            tape.layers.push(match entering {
                Some(x_td) => KeptLayer::Input(x_td),
                None => KeptLayer::Whole(Box::new(saved)),
            });
        }
        tape.experts = interleave(&routed.iter().map(Vec::as_slice).collect::<Vec<_>>(), rows);
        tape
    }

    /// One layer on the residual stream `x_td`; `replay` fixes its experts `[T, K]`.
    fn layer_forward(
        &self,
        cx: &Context,
        places: &Places,
        x_td: &mut Buf,
        layer: usize,
        replay: Option<&[u16]>,
    ) -> SavedLayer {
        let rows = places.positions.len();
        let spec = &self.model.spec().layers[layer].0;
        let slots = places.page_count * KV_BLOCK;
        let words = |width: usize| kv_words(cx.precision, slots * width);
        // Unwritten slots of a last page are masked, but 0 · NaN is NaN: they must hold numbers.
        let mut k_pages = cx.pool.zeros(words(spec.key_width()));
        let mut v_pages = cx.pool.zeros(words(spec.value_width()));
        let pages = KvPagesMut::of(cx.precision, &mut k_pages, &mut v_pages);
        let (seqs, copies) = places.seqs();
        let at = Rows { positions: &places.positions, seqs: &seqs, copies: &copies };
        let attention =
            self.attention_layer(layer).forward(cx, x_td, &at, pages, true).expect("asked to save");
        let x_mid_td = cx.pool.copy(x_td);
        let normed_td = self.post_norm(cx, layer, &x_mid_td);
        let block = |x_td: &mut [f32]| match (&self.model.bindings.layers[layer].ffn, &self.layers[layer].ffn)
        {
            (FfnBinding::Dense(at), FfnWeights::Dense(weights)) => {
                let part = Part::whole(at, weights, rows);
                let gate_up = mlp::forward(cx, &part, &normed_td, x_td, true, true);
                SavedFfn::Dense(gate_up.expect("asked to save"))
            }
            _ => {
                let moe = self.moe_layer(layer).expect("weights are made from the same bindings");
                let (routing, parts) = moe.forward(cx, &normed_td, x_td, rows, replay, true);
                SavedFfn::Moe(Box::new(SavedMoe::new(routing, parts.expect("asked to save"))))
            }
        };
        let (ffn, raw_td) = add_block(cx, self.ffn_out_norm(layer), x_td, block);
        SavedLayer { attention, k_pages, v_pages, x_mid_td, ffn, raw_td }
    }

    /// Norm before the feed-forward `[T, D]`.
    pub(super) fn post_norm(&self, cx: &Context, layer: usize, x_td: &[f32]) -> Buf {
        let mut normed_td = cx.pool.take(x_td.len());
        let gain = &self.layers[layer].post_norm;
        let eps = self.model.spec().norm_eps;
        rms_norm(cx.threads, x_td, gain.len(), NormScale::Weight(gain), eps, &mut normed_td);
        normed_td
    }
}

impl Tape {
    /// Chosen experts `[T, MoE layers, K]`; empty for dense models.
    pub fn experts(&self) -> &[u16] {
        &self.experts
    }

    /// Activations that wait for the backward pass, f32 values.
    pub fn held_values(&self) -> usize {
        let layers = self.layers.iter().map(|layer| match layer {
            KeptLayer::Input(x_td) => x_td.len(),
            KeptLayer::Whole(saved) => saved.held_values(),
        });
        self.x_td.len() + layers.sum::<usize>()
    }

    /// Root mean square of the residual stream as it enters each layer, and as it leaves the last.
    pub fn residual_rms(&self) -> Vec<f64> {
        let rms = |x: &[f32]| {
            (x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / x.len().max(1) as f64).sqrt()
        };
        let entering = self.layers.iter().map(|layer| match layer {
            KeptLayer::Input(x_td) => rms(x_td),
            KeptLayer::Whole(saved) => rms(saved.attention.input()),
        });
        entering.chain([rms(&self.x_td)]).collect()
    }

    /// Says of what update this batch is a part; unless told it is the whole of one.
    ///
    /// # Panics
    /// If the choices are those of another model, or the rows of no update.
    pub fn set_part(&mut self, part: UpdatePart) {
        assert!(part.rows > 0, "an update has rows");
        self.part = Some(part);
    }

    /// Log-probs and entropies of `targets` under `sampling`.
    ///
    /// # Panics
    /// If a target's row or token is out of range.
    pub fn log_probs(
        &self,
        threads: &Threads,
        weights: &PolicyWeights,
        targets: &[Target],
        sampling: &SamplingParams,
    ) -> LogProbs {
        let cx = weights.context(threads);
        let v = vocabulary(weights);
        let mut result = LogProbs::default();
        for chunk in targets.chunks(chunk_rows(v)) {
            let rows = HeadRows::gather(weights, &cx, &self.x_td, chunk.iter().map(|t| t.row));
            let mut logits = cx.pool.take(chunk.len() * v);
            rows.logits(weights, &cx, &mut logits);
            let mut stats = vec![TokenStats { logprob: 0.0, entropy: 0.0 }; chunk.len()];
            threads.for_each_row_chunk(&mut stats, 1, MIN_VALUES / v + 1, |first, stats| {
                let mut scratch = SampleScratch::default();
                for (row, stats) in (first..).zip(stats) {
                    let logits = &logits[row * v..][..v];
                    *stats = sampling::log_prob_of(logits, sampling, chunk[row].token, &mut scratch);
                }
            });
            result.logprobs.extend(stats.iter().map(|stats| stats.logprob));
            result.entropies.extend(stats.iter().map(|stats| stats.entropy));
        }
        result
    }

    /// Logits of chosen rows `[rows, V]`; of a classifier, scores `[rows, labels]`.
    pub fn logits(&self, threads: &Threads, weights: &PolicyWeights, rows: &[usize]) -> Vec<f32> {
        let mut logits = vec![0.0; rows.len() * weights.model.spec().head_width()];
        super::head::logits_of_rows(weights, &weights.context(threads), &self.x_td, rows, &mut logits);
        logits
    }

    /// Adds the gradient of `Σ d_logprobs[i]·log p_i + d_entropies[i]·H_i` to `grads`, an arena of the model's layout.
    ///
    /// # Panics
    /// If the lengths disagree, or the weights were packed for sampling only.
    #[expect(clippy::too_many_arguments, reason = "log_probs, with a gradient for each of its results")]
    pub fn backward(
        self,
        threads: &Threads,
        weights: &PolicyWeights,
        targets: &[Target],
        sampling: &SamplingParams,
        d_logprobs: &[f32],
        d_entropies: Option<&[f32]>,
        grads: &mut [f32],
    ) {
        assert_eq!(targets.len(), d_logprobs.len(), "one gradient for each target");
        assert_eq!(grads.len(), weights.model.layout.total, "gradients of another model");
        let cx = weights.context(threads);
        let wanted: Vec<_> = targets
            .iter()
            .enumerate()
            .map(|(i, target)| (*target, d_logprobs[i], d_entropies.map_or(0.0, |d| d[i])))
            .filter(|(_, d_logprob, d_entropy)| *d_logprob != 0.0 || *d_entropy != 0.0)
            .collect();
        let mut dx_td = cx.pool.zeros(self.x_td.len());
        for chunk in wanted.chunks(chunk_rows(vocabulary(weights))) {
            self.head_backward(&cx, weights, chunk, sampling, &mut dx_td, grads);
        }
        self.body_backward(&cx, weights, dx_td, grads);
    }

    /// Adds the gradient of `Σ d_logits · logits(rows)` to `grads`, an arena of the model's layout; `d_logits` is
    /// `[rows, V]`, or `[rows, labels]` for a classifier's scores. Rows must differ.
    ///
    /// # Panics
    /// If the lengths disagree, or the weights were packed for sampling only.
    pub fn backward_logits(
        self,
        threads: &Threads,
        weights: &PolicyWeights,
        rows: &[usize],
        d_logits: &[f32],
        grads: &mut [f32],
    ) {
        let (n, d) = (weights.model.spec().head_width(), weights.model.spec().hidden);
        assert_eq!(rows.len() * n, d_logits.len(), "one gradient for each logit");
        assert_eq!(grads.len(), weights.model.layout.total, "gradients of another model");
        let cx = weights.context(threads);
        let mut dx_td = cx.pool.zeros(self.x_td.len());
        let most = chunk_rows(n);
        for (rows, d_logits) in rows.chunks(most).zip(d_logits.chunks(most * n)) {
            let gathered = HeadRows::gather(weights, &cx, &self.x_td, rows.iter().copied());
            let dx = gathered.backward(weights, &cx, d_logits, grads);
            for (&row, dx) in rows.iter().zip(dx.chunks_exact(d)) {
                add_assign(&mut dx_td[row * d..][..d], dx);
            }
        }
        self.body_backward(&cx, weights, dx_td, grads);
    }

    /// From the gradient of the last layer's output down to the embedding.
    fn body_backward(self, cx: &Context, weights: &PolicyWeights, mut dx_td: Buf, grads: &mut [f32]) {
        let Self { tokens, places, layers, tiles, experts, part, .. } = self;
        let part = part.unwrap_or_else(|| UpdatePart { rows: tokens.len(), ..Default::default() });
        let (seqs, copies) = places.seqs();
        let rows = Rows { positions: &places.positions, seqs: &seqs, copies: &copies };
        let mut moe_layer = weights.model.spec().moe_layers();
        for (layer, kept) in layers.into_iter().enumerate().rev() {
            let routes = weights.moe_layer(layer).is_some();
            moe_layer -= usize::from(routes);
            let saved = match kept {
                KeptLayer::Whole(saved) => *saved,
                KeptLayer::Input(mut x_td) => {
                    let layers = weights.model.spec().moe_layers();
                    let same = routes.then(|| experts_of_layer(&experts, tokens.len(), layers, moe_layer));
                    weights.layer_forward(cx, &places, &mut x_td, layer, same.as_deref())
                }
            };
            let losses = weights.router_losses(&part, &experts, (layer, moe_layer));
            weights.layer_backward(cx, layer, saved, &rows, losses.as_ref(), &mut dx_td, grads);
        }
        let d = weights.model.spec().hidden;
        let shows_tile = |row: usize| tiles.as_ref().is_some_and(|tiles| tiles.covers(row));
        let embedding = &mut grads[weights.model.bindings.embedding.clone()];
        for (row, (dx, &token)) in dx_td.chunks_exact(d).zip(&tokens).enumerate() {
            if shows_tile(row) {
                continue;
            }
            let row = &mut embedding[token as usize * d..][..d];
            axpy(cx.threads, weights.embedding_scale(), dx, row);
        }
        if let Some(tiles) = tiles {
            weights.tiles_backward(cx, tiles, &dx_td, grads);
        }
    }

    fn head_backward(
        &self,
        cx: &Context,
        weights: &PolicyWeights,
        chunk: &[(Target, f32, f32)],
        sampling: &SamplingParams,
        dx_td: &mut [f32],
        grads: &mut [f32],
    ) {
        let (v, d) = (vocabulary(weights), weights.model.spec().hidden);
        let rows = HeadRows::gather(weights, cx, &self.x_td, chunk.iter().map(|(t, ..)| t.row));
        let mut logits = cx.pool.take(chunk.len() * v);
        rows.logits(weights, cx, &mut logits);
        // In place: they are read once more, and by nobody else.
        cx.threads.for_each_row_chunk(&mut logits, v, MIN_VALUES / v + 1, |first, logits| {
            let mut scratch = SampleScratch::default();
            for (row, logits) in (first..).zip(logits.chunks_exact_mut(v)) {
                let (target, d_logprob, d_entropy) = &chunk[row];
                let token = target.token;
                sampling::backward(logits, sampling, token, *d_logprob, *d_entropy, &mut scratch);
            }
        });
        let dx = rows.backward(weights, cx, &logits, grads);
        for ((target, ..), dx) in chunk.iter().zip(dx.chunks_exact(d)) {
            let row = &mut dx_td[target.row * d..][..d];
            add_assign(row, dx);
        }
    }
}

impl PolicyWeights {
    #[expect(clippy::too_many_arguments, reason = "one step of the backward, called from one place")]
    fn layer_backward(
        &self,
        cx: &Context,
        layer: usize,
        saved: SavedLayer,
        rows: &Rows,
        losses: Option<&RouterLosses>,
        dx_td: &mut [f32],
        grads: &mut [f32],
    ) {
        let t = rows.positions.len();
        let binding = &self.model.bindings.layers[layer];
        let normed_td = self.post_norm(cx, layer, &saved.x_mid_td);
        let d_raw_td = add_block_backward(cx, self.ffn_out_norm(layer), saved.raw_td.as_ref(), dx_td, grads);
        let dy_td: &[f32] = d_raw_td.as_deref().unwrap_or(dx_td);
        let d_normed_td = match (&binding.ffn, &self.layers[layer].ffn, &saved.ffn) {
            (FfnBinding::Dense(at), FfnWeights::Dense(weights), SavedFfn::Dense(gate_up)) => {
                mlp::backward(cx, &Part::whole(at, weights, t), &normed_td, gate_up, dy_td, grads)
            }
            (_, _, SavedFfn::Moe(moe)) => {
                let layer = self.moe_layer(layer).expect("weights are made from the same bindings");
                layer.backward(cx, moe, &normed_td, dy_td, t, losses.expect("the layer routes"), grads)
            }
            _ => unreachable!("a dense layer saved what a MoE layer needs"),
        };
        let gain = Some((&self.layers[layer].post_norm, &mut grads[binding.post_norm.clone()]));
        let d = self.model.spec().hidden;
        norm_backward(cx, &saved.x_mid_td, d, gain, self.model.spec().norm_eps, &d_normed_td, dx_td);
        let attention = self.attention_layer(layer);
        let pages = KvPages::of(cx.precision, &saved.k_pages, &saved.v_pages);
        attention.backward(cx, saved.attention, rows, pages, dx_td, grads);
    }
}

impl SavedLayer {
    /// Values of its buffers.
    fn held_values(&self) -> usize {
        let ffn = match &self.ffn {
            SavedFfn::Dense(gate_up) => gate_up.len(),
            SavedFfn::Moe(moe) => moe.held_values(),
        };
        let raw = self.raw_td.as_ref().map_or(0, |raw_td| raw_td.len());
        self.attention.held_values()
            + self.k_pages.len()
            + self.v_pages.len()
            + self.x_mid_td.len()
            + ffn
            + raw
    }

    fn routing(&self) -> Option<&super::moe::Routing> {
        match &self.ffn {
            SavedFfn::Moe(moe) => Some(&moe.routing),
            SavedFfn::Dense(_) => None,
        }
    }
}

/// V of a language model.
///
/// # Panics
/// If the model is a classifier: its scores are no distribution over tokens.
fn vocabulary(weights: &PolicyWeights) -> usize {
    let spec = weights.model.spec();
    assert_eq!(spec.head, OutputHead::LanguageModel, "a classifier has no log-probs");
    spec.vocab_size
}

/// One layer's part `[T, K]` of `[T, MoE layers, K]`.
fn experts_of_layer(all: &[u16], rows: usize, layers: usize, layer: usize) -> Vec<u16> {
    // A dense layer has no part; the model may have none at all.
    if layer >= layers {
        return Vec::new();
    }
    let k = all.len() / (rows * layers);
    assert_eq!(all.len(), rows * layers * k, "replay is [T, MoE layers, K]");
    all.chunks_exact(layers * k).flat_map(|row| &row[layer * k..][..k]).copied().collect()
}
