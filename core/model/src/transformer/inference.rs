//! Sampling-side forward: rows of any mix of sequences over cached keys and values, to logits.

use freewheel_kernels::attention::AttentionSeq;
use freewheel_kernels::{Pages, Threads};
use half::bf16;

use super::attention::{AttentionLayer, Rows};
use super::bindings::FfnBinding;
use super::buffers::Buf;
use super::cache::KvCache;
use super::head;
use super::mlp::{self, Context, Part};
use super::moe::{MoeLayer, Routing};
use super::residual::{OutNorm, add_block};
use super::vision::TileRows;
use super::weights::{FfnWeights, PolicyWeights, Table};
use crate::spec::FfnSpec;

/// One sequence's rows in a batch.
#[derive(Clone, Copy, Debug)]
pub struct BatchSeq<'a> {
    /// Consecutive rows of this sequence in the batch.
    pub rows: usize,
    /// Absolute position of the first of them; the cache holds everything before it.
    pub position: usize,
    /// Pages of the sequence; page `i` holds positions `16 i .. 16 i + 16`. Covers `position + rows`.
    pub pages: &'a [u32],
}

/// Rows to compute: prefill chunks and decode steps, mixed at will.
#[derive(Clone, Copy, Debug)]
pub struct ForwardBatch<'a> {
    /// Token of every row `[T]`, sequence after sequence.
    pub tokens: &'a [u32],
    /// The sequences, in row order.
    pub seqs: &'a [BatchSeq<'a>],
    /// Rows whose next-token logits are wanted.
    pub logit_rows: &'a [usize],
    /// Rows that show tiles of images instead of their token's embedding.
    pub tiles: &'a [TileRows<'a>],
}

/// What a forward pass gives.
#[derive(Clone, Debug, Default)]
pub struct ForwardOutput {
    /// Logits `[logit_rows, V]`.
    pub logits: Pages<f32>,
    /// Chosen experts `[T, MoE layers, K]`; empty for dense models.
    pub experts: Vec<u16>,
}

impl PolicyWeights {
    pub(super) fn context<'a>(&'a self, threads: &'a Threads) -> Context<'a> {
        Context { threads, pool: &self.pool, precision: self.precision }
    }

    /// Factor on embeddings, rounded as the reference rounds it: to the table's element type.
    pub(super) fn embedding_scale(&self) -> f32 {
        let scale = self.model.spec().embedding_scale;
        match self.embedding {
            Table::F32(_) => scale,
            Table::Bf16(_) => bf16::from_f32(scale).to_f32(),
        }
    }

    /// The scaled embedding rows of `tokens` `[T, D]`, in the table's element type like the reference's.
    pub(super) fn embed(&self, tokens: &[u32]) -> Buf {
        let (d, scale) = (self.model.spec().hidden, self.embedding_scale());
        let mut x_td = self.pool.take(tokens.len() * d);
        for (x, &token) in x_td.chunks_exact_mut(d).zip(tokens) {
            let at = token as usize * d;
            match &self.embedding {
                Table::F32(table) => {
                    x.iter_mut().zip(&table[at..at + d]).for_each(|(x, value)| *x = value * scale);
                }
                Table::Bf16(table) => x
                    .iter_mut()
                    .zip(&table[at..at + d])
                    .for_each(|(x, value)| *x = bf16::from_f32(value.to_f32() * scale).to_f32()),
            }
        }
        x_td
    }

    pub(super) fn attention_layer(&self, layer: usize) -> AttentionLayer<'_> {
        AttentionLayer {
            spec: &self.model.spec().layers[layer].0,
            at: &self.model.bindings.layers[layer],
            weights: &self.layers[layer],
            rope: self.model.ropes[layer].as_deref(),
            norm_eps: self.model.spec().norm_eps,
        }
    }

    pub(super) fn moe_layer(&self, layer: usize) -> Option<MoeLayer<'_>> {
        let (FfnSpec::Moe(spec), FfnBinding::Moe(at), FfnWeights::Moe(weights)) = (
            &self.model.spec().layers[layer].1,
            &self.model.bindings.layers[layer].ffn,
            &self.layers[layer].ffn,
        ) else {
            return None;
        };
        Some(MoeLayer { spec, at, weights })
    }

    /// Runs `batch`: writes keys and values of all its rows into `kv` and returns the logits asked for.
    ///
    /// Each row's bits depend on its own sequence alone.
    ///
    /// # Panics
    /// If the batch does not fit the cache or the vocabulary: the caller admits only what fits.
    pub fn forward(&self, threads: &Threads, kv: &mut KvCache, batch: &ForwardBatch) -> ForwardOutput {
        self.forward_into(threads, kv, batch, Pages::new())
    }

    /// The same, with the logits in memory that an earlier pass left.
    pub fn forward_into(
        &self,
        threads: &Threads,
        kv: &mut KvCache,
        batch: &ForwardBatch,
        mut logits: Pages<f32>,
    ) -> ForwardOutput {
        let cx = self.context(threads);
        let placed = Placed::new(batch);
        let local_pages = kv.local_pages(&placed.seqs);
        let local_seqs = local_pages.as_ref().map(|pages| placed.with_pages(pages));
        let rows_of = |local: bool| {
            let seqs = local_seqs.as_ref().filter(|_| local).unwrap_or(&placed.seqs);
            Rows { positions: &placed.positions, seqs, copies: &[] }
        };
        let mut x_td = self.embed(batch.tokens);
        self.show_tiles(&cx, batch.tiles, &mut x_td, false);
        let mut routings = Vec::new();
        for layer in 0..self.layers.len() {
            let pages = &mut kv.layers[layer];
            let rows = rows_of(pages.is_local());
            self.attention_layer(layer).forward(&cx, &mut x_td, &rows, pages.kv(), false);
            routings.extend(self.feed_forward(&cx, layer, &mut x_td));
        }
        logits.reset(batch.logit_rows.len() * self.model.spec().head_width());
        head::logits_of_rows(self, &cx, &x_td, batch.logit_rows, &mut logits);
        ForwardOutput {
            logits,
            experts: interleave(
                &routings.iter().map(|routing| routing.ids.as_slice()).collect::<Vec<_>>(),
                batch.tokens.len(),
            ),
        }
    }

    fn feed_forward(&self, cx: &Context, layer: usize, x_td: &mut [f32]) -> Option<Routing> {
        let rows = x_td.len() / self.model.spec().hidden;
        let normed_td = self.post_norm(cx, layer, x_td);
        let block = |x_td: &mut [f32]| match (&self.model.bindings.layers[layer].ffn, &self.layers[layer].ffn)
        {
            (FfnBinding::Dense(at), FfnWeights::Dense(weights)) => {
                mlp::forward(cx, &Part::whole(at, weights, rows), &normed_td, x_td, true, false);
                None
            }
            _ => {
                let moe = self.moe_layer(layer).expect("weights are made from the same bindings");
                Some(moe.forward(cx, &normed_td, x_td, rows, None, false).0)
            }
        };
        add_block(cx, self.ffn_out_norm(layer), x_td, block).0
    }

    /// The sandwich norm of a layer's feed-forward, where the family has it.
    pub(super) fn ffn_out_norm(&self, layer: usize) -> Option<OutNorm<'_>> {
        let (weights, binding) = (&self.layers[layer], &self.model.bindings.layers[layer]);
        let (gain, at) = weights.ffn_out_norm.as_ref().zip(binding.ffn_out_norm.as_ref())?;
        Some(OutNorm { gain, at, eps: self.model.spec().norm_eps })
    }
}

/// Sequences of a batch with their first rows, and the position of every row.
struct Placed<'a> {
    seqs: Vec<AttentionSeq<'a>>,
    positions: Vec<u32>,
}

impl<'a> Placed<'a> {
    fn new(batch: &ForwardBatch<'a>) -> Self {
        let mut placed = Self { seqs: Vec::with_capacity(batch.seqs.len()), positions: Vec::new() };
        for seq in batch.seqs {
            let first_row = placed.positions.len();
            placed.seqs.push(AttentionSeq {
                first_row,
                rows: seq.rows,
                position: seq.position,
                pages: seq.pages,
            });
            placed.positions.extend((seq.position..seq.position + seq.rows).map(|p| p as u32));
        }
        assert_eq!(
            placed.positions.len(),
            batch.tokens.len(),
            "rows of the sequences must add up to the tokens"
        );
        placed
    }

    /// The same sequences over other pages.
    fn with_pages<'p>(&self, pages: &'p [Vec<u32>]) -> Vec<AttentionSeq<'p>> {
        let one = |(seq, pages): (&AttentionSeq, &'p Vec<u32>)| AttentionSeq {
            first_row: seq.first_row,
            rows: seq.rows,
            position: seq.position,
            pages,
        };
        self.seqs.iter().zip(pages).map(one).collect()
    }
}

/// `[T, MoE layers, K]` from one `[T, K]` per layer.
pub(super) fn interleave(routings: &[&[u16]], rows: usize) -> Vec<u16> {
    let mut experts = Vec::with_capacity(routings.iter().map(|ids| ids.len()).sum());
    for t in 0..rows {
        for ids in routings {
            let k = ids.len() / rows;
            experts.extend_from_slice(&ids[t * k..(t + 1) * k]);
        }
    }
    experts
}
