//! Matrix products with packed weights.
//!
//! ```text
//!   W [n,k] ──pack──► PackedMatrix ─┐        column panels of 16, one 64-byte line a step of k
//!                                   ├─► out [m,n]
//!   x [m,k] ──(bf16: round)─────────┘        threads split n (or m), never k
//! ```
//!
//! **Order of operations**, the same for every m, thread count and instruction set:
//! - [`Precision::F32`]: each output element is one chain of fused multiply-adds over k ascending, from 0.0.
//! - [`Precision::Bf16`]: subnormals of x and W become zeros of their sign, then both are rounded to bf16 (nearest even).
//!   k is padded with zeros to a multiple of 32. For each block of 32: one FMA chain over the 16 even k from 0, one over
//!   the 16 odd k from 0, their sum, which is added to the f32 accumulator. Every f32 result that is subnormal becomes
//!   a zero of its sign. That is what the AMX instruction TDPBF16PS does (Intel SDM, volume 2); machines without AMX
//!   follow the same order, but for those that have VDPBF16PS (AVX512-BF16), which would take twice as long in it. Theirs is one
//!   chain over pairs of k ascending from 0.0, of each the odd, then the even, flushed as above.
//!
//! A quantised W (`quant`) takes the order of its precision over the weights that its codes stand for.
//!
//! Batch-invariant: a row of `out` depends on its row of `x` and on W alone.

mod bf16;
mod f32;
mod few;
mod pack;
mod quant;
#[cfg(test)]
mod tests;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tiles;
/// Elsewhere nothing comes here: no instruction set has tiles.
#[cfg(not(target_arch = "x86_64"))]
mod tiles {
    use super::{Gate, Group, Matrix, Output, Threads};

    type Gated = (Gate, Option<Matrix>);

    pub(super) fn mlp(_: &Threads, _: &[f32], _: &[Group], _: Gated, _: &[Group], _: &Output) {
        unreachable!("this architecture has no tiles");
    }
}

pub use pack::{PackedMatrix, Precision};
pub use quant::{CodeBits, Quantisation, Weight};

use crate::Threads;
use crate::activation::Activation;
use crate::isa;
use crate::simd::LANES;
use std::cell::RefCell;
use std::ops::Range;
use tile::{Gate, Matrix, Output};

/// Computes `out = x·Wᵀ` for `x [m,k]`, `out [m,n]`.
///
/// # Panics
/// When a length does not fit the shapes.
pub fn matmul(threads: &Threads, x: &[f32], m: usize, w: &PackedMatrix, out: &mut [f32]) {
    product(threads, x, m, w, out, Store::Set);
}

/// Computes `out += x·Wᵀ`: the product is computed in full, then added once.
///
/// # Panics
/// When a length does not fit the shapes.
pub fn matmul_add(threads: &Threads, x: &[f32], m: usize, w: &PackedMatrix, out: &mut [f32]) {
    product(threads, x, m, w, out, Store::Add);
}

/// Computes `dw += dyᵀ·x` for `dy [t,n]`, `x [t,k]`, `dw [n,k]`: the gradient of a weight `W [n,k]` in `y = x·Wᵀ`.
///
/// The sum over t has the order that the module gives for k, in the given precision; it is added to `dw` once.
///
/// # Panics
/// When a length does not fit the shapes.
#[expect(clippy::too_many_arguments, reason = "the operands of one op")]
pub fn weight_grad(
    threads: &Threads,
    precision: Precision,
    dy: &[f32],
    x: &[f32],
    t: usize,
    n: usize,
    k: usize,
    dw: &mut [f32],
) {
    assert_eq!(dy.len(), t * n, "weight_grad: dy is [t,n] = [{t},{n}]");
    assert_eq!(x.len(), t * k, "weight_grad: x is [t,k] = [{t},{k}]");
    assert_eq!(dw.len(), n * k, "weight_grad: dw is [n,k] = [{n},{k}]");
    let mut scratch = GRAD_SCRATCH.take();
    let packed = scratch.packed.get_or_insert_with(|| PackedMatrix::empty(precision));
    packed.reshape(precision, k, t);
    packed.fill_transposed(threads, x);
    match (precision, isa::current()) {
        #[cfg(target_arch = "x86_64")]
        (Precision::Bf16, isa) if isa.has_tiles() => {
            let out = Output::new(dw, k, Store::Add);
            tiles::product_transposed(threads, dy, n, packed, &out);
        }
        _ => {
            pack::transpose(threads, dy, t, n, &mut scratch.dy_nt);
            product(threads, &scratch.dy_nt, n, packed, dw, Store::Add);
        }
    }
    GRAD_SCRATCH.set(scratch);
}

/// Buffers of [`weight_grad`], kept by the calling thread; taken while in use, so that nested calls only allocate.
#[derive(Default)]
struct GradScratch {
    packed: Option<PackedMatrix>,
    dy_nt: Vec<f32>,
}

thread_local!(static GRAD_SCRATCH: RefCell<GradScratch> = RefCell::default());

/// Products below this many multiply-adds per thread are not worth waking another thread for.
const MIN_WORK_PER_THREAD: usize = 1 << 20;

/// Weights below this many bytes per thread are not worth it either, where it is their reading that takes the time.
const MIN_BYTES_PER_THREAD: usize = 1 << 17;

/// Row-blocks that threads or caches split m by; a multiple of every kernel's row count.
const ROW_BLOCK: usize = 240;

/// Neighbouring rows of x that meet a weight of their own.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// The rows.
    pub rows: Range<usize>,
    /// Their weight.
    pub w: &'a PackedMatrix,
}

/// Computes `out[rows] = x[rows]·Wᵀ` for each group, `x [m,k]`, `out [m,n]`: the experts of a layer, each with the rows
/// routed to it. Rows of no group are left as they are.
///
/// # Panics
/// When a length does not fit the shapes, weights differ in shape or precision, or groups do not ascend.
pub fn grouped_matmul(threads: &Threads, x: &[f32], groups: &[Group], out: &mut [f32]) {
    grouped_product(threads, x, groups, out, Store::Set);
}

/// As [`grouped_matmul`], added to `out`: each product is computed in full, then added once.
///
/// # Panics
/// As [`grouped_matmul`].
pub fn grouped_matmul_add(threads: &Threads, x: &[f32], groups: &[Group], out: &mut [f32]) {
    grouped_product(threads, x, groups, out, Store::Add);
}

/// What becomes of the product of a gated MLP's last weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `out = product`
    Set,
    /// `out += product`
    Add,
}

/// A gated MLP (Shazeer 2020): `down(act(gate) · up)`, `[gate | up] = x·Wᵀ`, W `[2F,k]`. Experts have as many groups of rows as there are,
/// the same in both weights.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the two products and what is between them")]
pub struct GatedMlp<'a> {
    pub gate_up: &'a [Group<'a>],
    pub activation: Activation,
    pub down: &'a [Group<'a>],
}

impl GatedMlp<'_> {
    /// Computes `out[rows] (+)= mlp(x[rows])`, `x [m,k]`, `out [m,n]`: the bits of [`grouped_matmul`], [`crate::activation::gated`]
    /// and [`grouped_matmul`] (or [`grouped_matmul_add`]), but what is between the products is never a matrix. `[gate | up]` goes to
    /// `kept [m,2F]`, where there is one. Returns `false`, and leaves both as they are, where it cannot: without matrix tiles, for
    /// an F that is no multiple of 16, and for an activation that takes its operands alternating.
    ///
    /// # Panics
    /// As [`grouped_matmul`], or when the groups of both weights differ.
    pub fn forward(
        &self,
        threads: &Threads,
        x: &[f32],
        out: &mut [f32],
        store: Store,
        kept: Option<&mut [f32]>,
    ) -> bool {
        let gate = match self.activation {
            Activation::Silu => Gate::Silu,
            Activation::GeluTanh => Gate::GeluTanh,
            Activation::ClampedSwiglu { .. } => return false,
        };
        let (Some(Group { w: gate_up, .. }), Some(Group { w: down, .. })) =
            (self.gate_up.first(), self.down.first())
        else {
            return true;
        };
        let on_tiles = |w: &PackedMatrix| w.precision() == Precision::Bf16 && isa::current().has_tiles();
        let (width, n) = (down.inner(), down.rows());
        if !(on_tiles(gate_up) && on_tiles(down) && width.is_multiple_of(LANES)) {
            return false;
        }
        let m = check_groups(x, self.gate_up);
        let rows = |groups: &[Group]| groups.iter().map(|group| group.rows.clone()).collect::<Vec<_>>();
        assert_eq!(rows(self.gate_up), rows(self.down), "gated mlp: both weights have the same groups");
        assert!(alike(self.down), "gated mlp: weights of one shape");
        assert_eq!(gate_up.rows(), 2 * width, "gated mlp: gate and up are as wide as what down takes");
        assert!(out.len() >= m * n, "gated mlp: out is [m,n]");
        let fits = kept.as_ref().is_none_or(|kept| kept.len() >= 2 * m * width);
        assert!(fits, "gated mlp: kept is [m,2F]");
        let kept = kept.map(|kept| Matrix::new(kept, 2 * width));
        let out = Output::new(out, n, store);
        tiles::mlp(threads, x, self.gate_up, (gate, kept), self.down, &out);
        true
    }
}

/// Whether all weights have one shape and precision.
fn alike(groups: &[Group]) -> bool {
    let shape = |group: &Group| (group.w.rows(), group.w.inner(), group.w.precision());
    groups.windows(2).all(|pair| shape(&pair[0]) == shape(&pair[1]))
}

/// The number of rows, of groups that fit.
fn check_groups(x: &[f32], groups: &[Group]) -> usize {
    let Some(Group { w: first, .. }) = groups.first() else { return 0 };
    let k = first.inner();
    assert!(alike(groups), "grouped_matmul: weights of one shape");
    let ends = groups.iter().scan(0, |end, group| Some((std::mem::replace(end, group.rows.end), group)));
    let mut ends = ends.map(|(end, group)| end <= group.rows.start && group.rows.start <= group.rows.end);
    assert!(ends.all(|ascends| ascends), "grouped_matmul: groups ascend");
    let m = groups.last().map_or(0, |group| group.rows.end);
    assert!(x.len() >= m * k, "grouped_matmul: x is [m,k]");
    m
}

fn grouped_product(threads: &Threads, x: &[f32], groups: &[Group], out: &mut [f32], store: Store) {
    let Some(Group { w: first, .. }) = groups.first() else { return };
    let (n, k) = (first.rows(), first.inner());
    assert!(out.len() >= check_groups(x, groups) * n, "grouped_matmul: out is [m,n]");
    match (first.precision(), isa::current()) {
        #[cfg(target_arch = "x86_64")]
        (Precision::Bf16, isa) if isa.has_tiles() => {
            tiles::product(threads, x, k, groups, &Output::new(out, n, store));
        }
        _ => {
            for Group { rows, w } in groups {
                let (x, out) = (&x[rows.start * k..rows.end * k], &mut out[rows.start * n..rows.end * n]);
                product(threads, x, rows.len(), w, out, store);
            }
        }
    }
}

fn product(threads: &Threads, x: &[f32], m: usize, w: &PackedMatrix, out: &mut [f32], store: Store) {
    let (n, k) = (w.rows(), w.inner());
    assert_eq!(x.len(), m * k, "matmul: x is [m,k] = [{m},{k}]");
    assert_eq!(out.len(), m * n, "matmul: out is [m,n] = [{m},{n}]");
    if m == 0 || n == 0 {
        return;
    }
    let out = Output::new(out, n, store);
    match (w.precision(), isa::current()) {
        (Precision::F32, _) => {
            split(threads, m, n, k, &|rows, panels| {
                quant::in_full(w, panels, &mut |w, panels, first| {
                    f32::block(x, rows.clone(), w, panels, &out.starting_at(first));
                });
            });
        }
        #[cfg(target_arch = "x86_64")]
        (Precision::Bf16, isa) if isa.has_tiles() => {
            tiles::product(threads, x, k, &[Group { rows: 0..m, w }], &out);
        }
        (Precision::Bf16, _) if few::may_take(m, w) && few::plain(x) => {
            bf16::with_rounded(threads, x, m, k, |x| {
                let panels = n.div_ceil(LANES);
                let least = MIN_BYTES_PER_THREAD * panels / w.bytes().max(1);
                threads.for_each_chunk(panels, least.next_multiple_of(4), &|panels| {
                    few::block(x, m, w, panels, &out);
                });
            })
        }
        (Precision::Bf16, _) => bf16::with_rounded(threads, x, m, k, |x| {
            split(threads, m, n, k, &|rows, panels| {
                quant::in_full(w, panels, &mut |w, panels, first| {
                    bf16::block(x, rows.clone(), w, panels, &out.starting_at(first));
                });
            });
        }),
    }
}

/// Splits the output over threads: by column panels where there are enough, else by row blocks; each part goes through
/// its rows in blocks that a cache holds.
fn split(threads: &Threads, m: usize, n: usize, k: usize, f: &(dyn Fn(Range<usize>, Range<usize>) + Sync)) {
    let panels = n.div_ceil(LANES);
    let work_of_panel = (m * k * LANES).max(1);
    if panels >= 4 * threads.count() || m < 2 * ROW_BLOCK {
        threads.for_each_chunk(panels, (MIN_WORK_PER_THREAD / work_of_panel).max(2), &|panels| {
            for start in (0..m).step_by(ROW_BLOCK) {
                f(start..m.min(start + ROW_BLOCK), panels.clone());
            }
        });
    } else {
        let blocks = m.div_ceil(ROW_BLOCK);
        threads.for_each_chunk(blocks, 1, &|range| {
            for block in range {
                f(block * ROW_BLOCK..m.min((block + 1) * ROW_BLOCK), 0..panels);
            }
        });
    }
}
