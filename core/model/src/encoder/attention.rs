//! Attention of every row to every row of its sequence, with DeBERTa's position terms: score(i, j) =
//! scale · (q_i·k_j + q_i·pk[δ(i,j)] + k_j·pq[δ(i,j)]), rows of the distance table picked by δ.
//!
//! Everything is laid out by head, `[H][T, hd]`, so that a head's rows of one sequence are one matrix and the products
//! are those of the packed kernels. Threads take heads. Within a sequence the order of operations is fixed by the kernels.

use freewheel_kernels::gemm::{matmul, matmul_add, weight_grad};
use freewheel_kernels::softmax::{softmax_row, softmax_row_backward};
use freewheel_kernels::{PackedMatrix, Precision, Threads};

use super::relative::Distances;

/// Shape of one attention call.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a> {
    pub heads: usize,
    pub head_dim: usize,
    /// Factor on scores.
    pub scale: f32,
    /// Rows of each sequence; they add up to T.
    pub lengths: &'a [usize],
    pub positions: Option<PositionTerms<'a>>,
}

/// DeBERTa's terms: projected tables by head, `[H][2S, hd]`.
#[derive(Clone, Copy)]
pub(super) struct PositionTerms<'a> {
    pub distances: &'a Distances,
    /// Keys of positions (c2p).
    pub keys: Option<&'a [f32]>,
    /// Queries of positions (p2c).
    pub queries: Option<&'a [f32]>,
}

/// Queries, keys and values, each `[H][T, hd]`.
#[derive(Debug)]
pub(super) struct Projected {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// Gradients of everything an attention call reads, laid out as it is.
pub(super) struct Gradients {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub position_keys: Vec<f32>,
    pub position_queries: Vec<f32>,
}

/// One head's rows of one sequence.
struct Part<'a> {
    head: usize,
    rows: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

fn packed(w: &[f32], n: usize, k: usize) -> PackedMatrix {
    PackedMatrix::from_f32(Precision::F32, w, n, k)
}

fn packed_transposed(w: &[f32], n: usize, k: usize) -> PackedMatrix {
    PackedMatrix::from_f32_transposed(Precision::F32, w, n, k)
}

impl Attention<'_> {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Probabilities of one head over all sequences.
    fn probability_count(&self) -> usize {
        self.lengths.iter().map(|n| n * n).sum()
    }

    /// The output `[H][T, hd]`; with `save`, also the probabilities `[H][Σ n²]`.
    pub fn forward(&self, threads: &Threads, x: &Projected, save: bool) -> (Vec<f32>, Option<Vec<f32>>) {
        let out_len = self.rows() * self.head_dim;
        let saved_len = if save { self.probability_count() } else { 0 };
        let mut both = vec![0.0; self.heads * (out_len + saved_len)];
        threads.for_each_row_chunk(&mut both, (out_len + saved_len).max(1), 1, |first, block| {
            for (i, both) in block.chunks_exact_mut(out_len + saved_len).enumerate() {
                let (out, saved) = both.split_at_mut(out_len);
                self.head_forward(first + i, x, out, save.then_some(saved));
            }
        });
        if !save {
            return (both, None);
        }
        let (mut out, mut probs) = (Vec::with_capacity(self.heads * out_len), Vec::new());
        for both in both.chunks_exact(out_len + saved_len) {
            out.extend_from_slice(&both[..out_len]);
            probs.extend_from_slice(&both[out_len..]);
        }
        (out, Some(probs))
    }

    fn head_forward(&self, head: usize, x: &Projected, out: &mut [f32], mut saved: Option<&mut [f32]>) {
        let single = Threads::single();
        let (mut first, mut first_probability) = (0, 0);
        let mut scratch = Vec::new();
        for &rows in self.lengths.iter().filter(|rows| **rows > 0) {
            let part = self.part(head, first, rows, x);
            let probs = match &mut saved {
                Some(saved) => &mut saved[first_probability..][..rows * rows],
                None => {
                    scratch.resize(rows * rows, 0.0);
                    &mut scratch[..]
                }
            };
            self.scores(&part, probs);
            probs.chunks_exact_mut(rows).for_each(softmax_row);
            let values = packed_transposed(part.v, self.head_dim, rows);
            let out = &mut out[first * self.head_dim..][..rows * self.head_dim];
            matmul(&single, probs, rows, &values, out);
            first += rows;
            first_probability += rows * rows;
        }
    }

    fn part<'x>(&self, head: usize, first: usize, rows: usize, x: &'x Projected) -> Part<'x> {
        let start = (head * self.rows() + first) * self.head_dim;
        let range = start..start + rows * self.head_dim;
        Part { head, rows, q: &x.q[range.clone()], k: &x.k[range.clone()], v: &x.v[range] }
    }

    /// Scores `[rows, rows]`, scaled.
    fn scores(&self, part: &Part, scores: &mut [f32]) {
        let (single, n) = (Threads::single(), part.rows);
        matmul(&single, part.q, n, &packed(part.k, n, self.head_dim), scores);
        if let Some(terms) = &self.positions {
            let width = terms.distances.table_rows;
            let mut by_row = vec![0.0; n * width];
            if let Some(keys) = terms.keys {
                matmul(
                    &single,
                    part.q,
                    n,
                    &packed(self.table(keys, part.head), width, self.head_dim),
                    &mut by_row,
                );
                for (i, scores) in scores.chunks_exact_mut(n).enumerate() {
                    let of_query = &by_row[i * width..][..width];
                    for (score, row) in scores.iter_mut().zip(terms.distances.of_query(i, n)) {
                        *score += of_query[row];
                    }
                }
            }
            if let Some(queries) = terms.queries {
                let queries = packed(self.table(queries, part.head), width, self.head_dim);
                matmul(&single, part.k, n, &queries, &mut by_row);
                for (i, scores) in scores.chunks_exact_mut(n).enumerate() {
                    for ((j, score), row) in scores.iter_mut().enumerate().zip(terms.distances.of_query(i, n))
                    {
                        *score += by_row[j * width + row];
                    }
                }
            }
        }
        scores.iter_mut().for_each(|score| *score *= self.scale);
    }

    /// One head of a projected table.
    fn table<'t>(&self, table: &'t [f32], head: usize) -> &'t [f32] {
        let len = table.len() / self.heads;
        &table[head * len..][..len]
    }

    /// Gradients of queries, keys, values and tables from that of the output, `d_out [H][T, hd]`.
    pub fn backward(&self, threads: &Threads, x: &Projected, probs: &[f32], d_out: &[f32]) -> Gradients {
        let len = self.rows() * self.head_dim;
        let table_len = self.positions.map_or(0, |terms| terms.distances.table_rows * self.head_dim);
        let of_head = 3 * len + 2 * table_len;
        let mut all = vec![0.0; self.heads * of_head];
        threads.for_each_row_chunk(&mut all, of_head.max(1), 1, |first, block| {
            for (i, all) in block.chunks_exact_mut(of_head).enumerate() {
                self.head_backward(first + i, x, probs, d_out, all);
            }
        });
        let gather = |from: usize, len: usize| {
            all.chunks_exact(of_head.max(1)).flat_map(|head| &head[from..from + len]).copied().collect()
        };
        Gradients {
            q: gather(0, len),
            k: gather(len, len),
            v: gather(2 * len, len),
            position_keys: gather(3 * len, table_len),
            position_queries: gather(3 * len + table_len, table_len),
        }
    }

    /// `all`: gradients of this head's queries, keys, values, position keys and position queries, one after another.
    fn head_backward(&self, head: usize, x: &Projected, probs: &[f32], d_out: &[f32], all: &mut [f32]) {
        let (total, hd) = (self.rows(), self.head_dim);
        let (dq, rest) = all.split_at_mut(total * hd);
        let (dk, rest) = rest.split_at_mut(total * hd);
        let (dv, d_tables) = rest.split_at_mut(total * hd);
        let (mut first, mut first_probability) = (0, head * self.probability_count());
        for &rows in self.lengths.iter().filter(|rows| **rows > 0) {
            let part = self.part(head, first, rows, x);
            let range = first * hd..(first + rows) * hd;
            let mut grads = PartGradients {
                q: &mut dq[range.clone()],
                k: &mut dk[range.clone()],
                v: &mut dv[range.clone()],
                tables: &mut *d_tables,
            };
            let d_out = &d_out[head * total * hd..][range];
            self.part_backward(&part, &probs[first_probability..][..rows * rows], d_out, &mut grads);
            first += rows;
            first_probability += rows * rows;
        }
    }

    fn part_backward(&self, part: &Part, probs: &[f32], d_out: &[f32], grads: &mut PartGradients) {
        let (single, n, hd) = (Threads::single(), part.rows, self.head_dim);
        weight_grad(&single, Precision::F32, probs, d_out, n, n, hd, grads.v);
        let mut d_scores = vec![0.0; n * n];
        matmul(&single, d_out, n, &packed(part.v, n, hd), &mut d_scores);
        for (probs, d) in probs.chunks_exact(n).zip(d_scores.chunks_exact_mut(n)) {
            softmax_row_backward(probs, d);
            d.iter_mut().for_each(|d| *d *= self.scale);
        }
        matmul_add(&single, &d_scores, n, &packed_transposed(part.k, hd, n), grads.q);
        weight_grad(&single, Precision::F32, &d_scores, part.q, n, n, hd, grads.k);
        if let Some(terms) = &self.positions {
            self.terms_backward(terms, part, &d_scores, grads);
        }
    }

    fn terms_backward(
        &self,
        terms: &PositionTerms,
        part: &Part,
        d_scores: &[f32],
        grads: &mut PartGradients,
    ) {
        let (single, n, hd) = (Threads::single(), part.rows, self.head_dim);
        let width = terms.distances.table_rows;
        let (d_keys, d_queries) = grads.tables.split_at_mut(width * hd);
        if let Some(keys) = terms.keys {
            let mut d_rows = vec![0.0; n * width];
            for (i, d) in d_scores.chunks_exact(n).enumerate() {
                let of_query = &mut d_rows[i * width..][..width];
                for (d, row) in d.iter().zip(terms.distances.of_query(i, n)) {
                    of_query[row] += d;
                }
            }
            let keys = packed_transposed(self.table(keys, part.head), hd, width);
            matmul_add(&single, &d_rows, n, &keys, grads.q);
            weight_grad(&single, Precision::F32, &d_rows, part.q, n, width, hd, d_keys);
        }
        if let Some(queries) = terms.queries {
            let mut d_rows = vec![0.0; n * width];
            for (i, d) in d_scores.chunks_exact(n).enumerate() {
                for ((j, d), row) in d.iter().enumerate().zip(terms.distances.of_query(i, n)) {
                    d_rows[j * width + row] += d;
                }
            }
            let queries = packed_transposed(self.table(queries, part.head), hd, width);
            matmul_add(&single, &d_rows, n, &queries, grads.k);
            weight_grad(&single, Precision::F32, &d_rows, part.k, n, width, hd, d_queries);
        }
    }
}

struct PartGradients<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    /// Of position keys, then of position queries.
    tables: &'a mut [f32],
}

/// `[T, H·hd]` → `[H][T, hd]`.
pub(super) fn by_head(x: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for head in 0..heads {
        for row in x.chunks_exact(heads * head_dim) {
            out.extend_from_slice(&row[head * head_dim..][..head_dim]);
        }
    }
    out
}

/// `[H][T, hd]` → `[T, H·hd]`.
pub(super) fn by_row(x: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let rows = x.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(x.len());
    for row in 0..rows {
        for head in 0..heads {
            out.extend_from_slice(&x[(head * rows + row) * head_dim..][..head_dim]);
        }
    }
    out
}
