//! Mixture of experts: route, gather rows by expert, run each expert on its rows, combine.
//!
//! A *slot* is one (token, rank) pair; slots are sorted by expert, then by token, then by rank, so every expert sees
//! one contiguous block of rows. The combination adds a token's experts in the order of their rank, never in the order of
//! arrival, so a row's bits do not depend on the batch.

use std::ops::Range;

use freewheel_kernels::gemm::matmul;
use freewheel_kernels::optim::{add_assign, axpy, dot};
use freewheel_kernels::softmax::{row_stats, softmax_row};
use freewheel_kernels::{Precision, Threads, router};

use super::bindings::MoeBinding;
use super::buffers::Buf;
use super::mlp::{self, Context, MIN_VALUES};
use super::weights::MoeWeights;
use crate::spec::{MoeSpec, RouterKind};

/// One MoE layer with everything it reads but the rows.
pub(super) struct MoeLayer<'a> {
    pub spec: &'a MoeSpec,
    pub at: &'a MoeBinding,
    pub weights: &'a MoeWeights,
}

/// Which experts each token chose, and the slots sorted by expert.
#[derive(Debug)]
pub(super) struct Routing {
    /// Expert ids `[T, K]`, in the order of the router's ranking.
    pub ids: Vec<u16>,
    /// Weights `[T, K]`.
    pub weights: Vec<f32>,
    /// `t * K + rank` of each sorted slot.
    order: Vec<u32>,
    /// Inverse of `order`: sorted place of `t * K + rank`.
    place: Vec<u32>,
    /// First sorted slot of each expert, and the end `[E + 1]`.
    starts: Vec<usize>,
}

/// What the backward needs of one MoE layer.
#[derive(Debug)]
pub(super) struct Saved {
    pub routing: Routing,
    logits_te: Buf,
    /// Gate and up of every sorted slot `[T·K, 2F]`.
    gate_up: Buf,
    shared_gate_up: Option<Buf>,
    /// Expert outputs per sorted slot `[T·K, D]`.
    y_sd: Buf,
}

impl Routing {
    fn new(ids: Vec<u16>, weights: Vec<f32>, experts: usize) -> Self {
        let mut starts = vec![0usize; experts + 1];
        for &id in &ids {
            starts[usize::from(id) + 1] += 1;
        }
        for e in 0..experts {
            starts[e + 1] += starts[e];
        }
        let mut next = starts.clone();
        let mut order = vec![0u32; ids.len()];
        let mut place = vec![0u32; ids.len()];
        for (slot, &id) in ids.iter().enumerate() {
            let at = &mut next[usize::from(id)];
            order[*at] = slot as u32;
            place[slot] = *at as u32;
            *at += 1;
        }
        Self { ids, weights, order, place, starts }
    }
}

impl MoeLayer<'_> {
    /// `x += moe(normed)`. `replay` fixes the chosen experts `[T, K]`; their weights still come from these logits.
    pub fn forward(
        &self,
        cx: &Context,
        normed_td: &[f32],
        x_td: &mut [f32],
        rows: usize,
        replay: Option<&[u16]>,
        save: bool,
    ) -> (Routing, Option<Parts>) {
        let d = self.at.router.k;
        let (routing, logits_te) = self.route(cx, normed_td, rows, replay);
        let xs_sd = self.gather(cx, normed_td, &routing, d);
        let mut y_sd = cx.pool.take(xs_sd.len());
        let gate_up = mlp::forward(cx, &self.parts(&routing), &xs_sd, &mut y_sd, false, save);
        let shared = self.shared(rows);
        let shared_gate_up = shared.and_then(|part| mlp::forward(cx, &part, normed_td, x_td, true, save));
        let on_input = self.spec.router == RouterKind::SigmoidOnInput;
        self.add_by_rank(
            cx,
            &routing,
            &y_sd,
            x_td,
            |slot| if on_input { 1.0 } else { routing.weights[slot] },
        );
        let parts = gate_up.map(|gate_up| Parts { logits_te, gate_up, shared_gate_up, y_sd });
        (routing, parts)
    }

    /// The experts that have rows, with their slots.
    fn parts(&self, routing: &Routing) -> Vec<mlp::Part<'_>> {
        let experts = self.at.experts.iter().zip(&self.weights.experts).enumerate();
        let parts = experts.map(|(e, (at, weights))| mlp::Part {
            at,
            weights,
            rows: routing.starts[e]..routing.starts[e + 1],
        });
        parts.filter(|part| !part.rows.is_empty()).collect()
    }

    /// The shared expert with all rows, where there is one.
    fn shared(&self, rows: usize) -> Option<[mlp::Part<'_>; 1]> {
        let (at, weights) = self.at.shared.as_ref().zip(self.weights.shared.as_ref())?;
        Some(mlp::Part::whole(at, weights, rows))
    }

    /// Adds the values of each token's slots to the token, in the order of their rank.
    fn add_by_rank(
        &self,
        cx: &Context,
        routing: &Routing,
        values_sd: &[f32],
        x_td: &mut [f32],
        weight: impl Fn(usize) -> f32 + Sync,
    ) {
        let (d, k, single) = (self.at.router.k, self.spec.top_k, Threads::single());
        cx.threads.for_each_row_chunk(x_td, d, MIN_VALUES / (d * k) + 1, |first, x_td| {
            for (t, x) in x_td.chunks_exact_mut(d).enumerate() {
                for slot in (first + t) * k..(first + t + 1) * k {
                    axpy(&single, weight(slot), &values_sd[routing.place[slot] as usize * d..][..d], x);
                }
            }
        });
    }

    fn route(&self, cx: &Context, normed_td: &[f32], rows: usize, replay: Option<&[u16]>) -> (Routing, Buf) {
        let (experts, k) = (self.spec.experts, self.spec.top_k);
        let mut logits_te = cx.pool.take(rows * experts);
        matmul(cx.threads, normed_td, rows, &self.weights.router.forward, &mut logits_te);
        mlp::add_bias(&mut logits_te, self.weights.router_bias.as_deref());
        let (mut ids, mut weights) = (vec![0; rows * k], vec![0.0; rows * k]);
        match (self.spec.router, replay) {
            (RouterKind::Softmax { renormalise }, None) => {
                router::softmax_top_k(&logits_te, experts, k, renormalise, &mut ids, &mut weights);
            }
            (RouterKind::Softmax { renormalise }, Some(given)) => {
                ids.copy_from_slice(given);
                router::softmax_given(&logits_te, experts, k, renormalise, &ids, &mut weights);
            }
            (RouterKind::SigmoidOnInput, None) => {
                router::sigmoid_top_k(&logits_te, experts, k, &mut ids, &mut weights);
            }
            (RouterKind::SigmoidOnInput, Some(given)) => {
                ids.copy_from_slice(given);
                router::sigmoid_given(&logits_te, experts, k, &ids, &mut weights);
            }
            (RouterKind::SigmoidGrouped { .. }, None) => {
                let correction = self.weights.correction.as_ref().expect("a grouped router has corrections");
                router::grouped_top_k(&logits_te, correction, &self.rules(), k, &mut ids, &mut weights);
            }
            (RouterKind::SigmoidGrouped { .. }, Some(given)) => {
                ids.copy_from_slice(given);
                router::grouped_given(&logits_te, experts, &self.rules(), k, &ids, &mut weights);
            }
        }
        (Routing::new(ids, weights, experts), logits_te)
    }

    /// How a grouped router chooses.
    fn rules(&self) -> router::Grouped {
        match self.spec.router {
            RouterKind::SigmoidGrouped { groups, groups_kept, renormalise, scale } => {
                router::Grouped { groups, groups_kept, renormalise, scale }
            }
            other => unreachable!("{other:?} has no groups"),
        }
    }

    /// The experts' input rows in slot order `[T·K, D]`.
    fn gather(&self, cx: &Context, normed_td: &[f32], routing: &Routing, d: usize) -> Buf {
        let mut xs_sd = cx.pool.take(routing.order.len() * d);
        let on_input = self.spec.router == RouterKind::SigmoidOnInput;
        cx.threads.for_each_row_chunk(&mut xs_sd, d, MIN_VALUES / d + 1, |first, xs_sd| {
            for (xs, &slot) in xs_sd.chunks_exact_mut(d).zip(&routing.order[first..]) {
                let slot = slot as usize;
                let x = &normed_td[slot / self.spec.top_k * d..][..d];
                if on_input {
                    let weight = routing.weights[slot];
                    xs.iter_mut().zip(x).for_each(|(xs, x)| *xs = x * weight);
                } else {
                    xs.copy_from_slice(x);
                }
            }
        });
        xs_sd
    }

    /// Adds the weight gradients and returns the gradient with respect to `normed`. `dy` is that of the output `[T, D]`.
    #[expect(clippy::too_many_arguments, reason = "one step of the backward, called from one place")]
    pub fn backward(
        &self,
        cx: &Context,
        saved: &Saved,
        normed_td: &[f32],
        dy_td: &[f32],
        rows: usize,
        losses: &RouterLosses,
        grads: &mut [f32],
    ) -> Buf {
        let d = self.at.router.k;
        let routing = &saved.routing;
        let mut dx_td = match (self.shared(rows), &saved.shared_gate_up) {
            (Some(part), Some(gate_up)) => mlp::backward(cx, &part, normed_td, gate_up, dy_td, grads),
            _ => cx.pool.zeros(rows * d),
        };
        let on_input = self.spec.router == RouterKind::SigmoidOnInput;
        let dys_sd = self.scatter_gradient(cx, routing, dy_td, d);
        let xs_sd = self.gather(cx, normed_td, routing, d);
        let dxs_sd = mlp::backward(cx, &self.parts(routing), &xs_sd, &saved.gate_up, &dys_sd, grads);
        self.add_by_rank(cx, routing, &dxs_sd, &mut dx_td, |slot| {
            if on_input { routing.weights[slot] } else { 1.0 }
        });
        let d_weights = match on_input {
            true => self.dots_of_slots(cx, routing, normed_td, &dxs_sd),
            false => self.dots_of_slots(cx, routing, dy_td, &saved.y_sd),
        };
        self.router_backward(cx, saved, normed_td, &d_weights, rows, losses, &mut dx_td, grads);
        dx_td
    }

    /// Gradient at each expert's output `[T·K, D]`.
    fn scatter_gradient(&self, cx: &Context, routing: &Routing, dy_td: &[f32], d: usize) -> Buf {
        let mut dys_sd = cx.pool.take(routing.order.len() * d);
        let on_input = self.spec.router == RouterKind::SigmoidOnInput;
        cx.threads.for_each_row_chunk(&mut dys_sd, d, MIN_VALUES / d + 1, |first, dys_sd| {
            for (dys, &slot) in dys_sd.chunks_exact_mut(d).zip(&routing.order[first..]) {
                let slot = slot as usize;
                let dy = &dy_td[slot / self.spec.top_k * d..][..d];
                if on_input {
                    dys.copy_from_slice(dy);
                } else {
                    let weight = routing.weights[slot];
                    dys.iter_mut().zip(dy).for_each(|(dys, dy)| *dys = dy * weight);
                }
            }
        });
        dys_sd
    }

    /// Gradient at the router's weights `[T, K]`: each slot's values times its token's.
    fn dots_of_slots(
        &self,
        cx: &Context,
        routing: &Routing,
        tokens_td: &[f32],
        slots_sd: &[f32],
    ) -> Vec<f32> {
        let (d, k) = (self.at.router.k, self.spec.top_k);
        let mut dots = vec![0.0; routing.ids.len()];
        cx.threads.for_each_row_chunk(&mut dots, 1, MIN_VALUES / d + 1, |first, dots| {
            for (slot, value) in (first..).zip(dots) {
                let of_slot = &slots_sd[routing.place[slot] as usize * d..][..d];
                *value = dot(&tokens_td[slot / k * d..][..d], of_slot);
            }
        });
        dots
    }

    #[expect(clippy::too_many_arguments, reason = "one step of the backward, called from one place")]
    fn router_backward(
        &self,
        cx: &Context,
        saved: &Saved,
        normed_td: &[f32],
        d_weights: &[f32],
        rows: usize,
        losses: &RouterLosses,
        dx_td: &mut [f32],
        grads: &mut [f32],
    ) {
        let (experts, k) = (self.spec.experts, self.spec.top_k);
        let routing = &saved.routing;
        let mut d_logits_te = cx.pool.zeros(rows * experts);
        match self.spec.router {
            RouterKind::Softmax { renormalise } => router::softmax_top_k_backward(
                &saved.logits_te,
                experts,
                k,
                renormalise,
                &routing.ids,
                &routing.weights,
                d_weights,
                &mut d_logits_te,
            ),
            RouterKind::SigmoidOnInput => {
                router::sigmoid_top_k_backward(
                    experts,
                    k,
                    &routing.ids,
                    &routing.weights,
                    d_weights,
                    &mut d_logits_te,
                );
            }
            RouterKind::SigmoidGrouped { .. } => router::grouped_top_k_backward(
                &saved.logits_te,
                experts,
                &self.rules(),
                k,
                &routing.ids,
                &routing.weights,
                d_weights,
                &mut d_logits_te,
            ),
        }
        losses.add_gradient(&saved.logits_te, &mut d_logits_te);
        cx.accumulate(Precision::F32, &self.at.router, &d_logits_te, normed_td, rows, grads);
        mlp::add_bias_grad(&d_logits_te, &self.at.router_bias, grads);
        let mut d = cx.pool.take(dx_td.len());
        matmul(cx.threads, &d_logits_te, rows, self.weights.router.transpose(), &mut d);
        add_assign(dx_td, &d);
    }
}

/// The saved tensors of a forward, before they meet their routing.
#[derive(Debug)]
pub(super) struct Parts {
    logits_te: Buf,
    /// Gate and up of every sorted slot `[T·K, 2F]`.
    gate_up: Buf,
    shared_gate_up: Option<Buf>,
    y_sd: Buf,
}

impl Saved {
    pub fn new(routing: Routing, parts: Parts) -> Self {
        let Parts { logits_te, gate_up, shared_gate_up, y_sd } = parts;
        Self { routing, logits_te, gate_up, shared_gate_up, y_sd }
    }

    /// Values of its buffers.
    pub fn held_values(&self) -> usize {
        let shared = self.shared_gate_up.as_ref().map_or(0, |buf| buf.len());
        self.logits_te.len() + self.y_sd.len() + self.gate_up.len() + shared
    }
}

/// A router's own losses, means over an update of which a batch may be a part.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RouterLosses<'p> {
    /// Weight of E·Σ f·P.
    pub balance: f32,
    /// Weight of the mean (log Σ exp)².
    pub z: f32,
    /// Rows of the update.
    pub rows: usize,
    /// f: share of the update's choices that went to each expert `[E]`, a constant.
    pub shares: Vec<f32>,
    /// Rows of the batch that count elsewhere.
    pub repeats: &'p [Range<usize>],
}

impl RouterLosses<'_> {
    /// Adds their gradient at the logits `[T, E]` of a batch.
    ///
    /// With p = softmax(z) and N rows in the update: d/dz_e of E·Σ f·P is E/N · p_e (f_e − Σ f·p), of the mean (log Σ exp z)² it is
    /// 2/N · log Σ exp z · p_e. A row's part depends on nothing else in its batch.
    fn add_gradient(&self, logits_te: &[f32], d_logits_te: &mut [f32]) {
        if (self.balance, self.z) == (0.0, 0.0) {
            return;
        }
        let (experts, rows) = (self.shares.len(), self.rows as f32);
        let (balance, z) = (self.balance * experts as f32 / rows, 2.0 * self.z / rows);
        let mut p = vec![0.0; experts];
        let pairs = logits_te.chunks_exact(experts).zip(d_logits_te.chunks_exact_mut(experts));
        let counts = |row: &usize| !self.repeats.iter().any(|repeat| repeat.contains(row));
        for (_, (logits, d_logits)) in pairs.enumerate().filter(|(row, _)| counts(row)) {
            p.copy_from_slice(logits);
            softmax_row(&mut p);
            let log_sum = row_stats(logits, 1.0).log_sum_exp;
            let mean = dot(&self.shares, &p);
            for ((d, &p), &share) in d_logits.iter_mut().zip(&p).zip(&self.shares) {
                *d += p * (balance * (share - mean) + z * log_sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_of_the_routers_losses_are_those_of_their_formulas() {
        let (experts, ids) = (4, [0u16, 1, 0, 3, 0, 2]);
        let logits: Vec<f32> = (0..12).map(|i| (i as f32 * 1.7).sin() * 2.0).collect();
        let shares = vec![0.5, 1.0 / 6.0, 1.0 / 6.0, 1.0 / 6.0];
        let losses = RouterLosses { balance: 0.3, z: 0.2, rows: 3, shares, repeats: &[] };
        let of = |logits: &[f32]| -> f64 {
            let mut p_mean = vec![0.0f64; experts];
            let mut z = 0.0;
            for row in logits.chunks(experts) {
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                z += sum.ln().powi(2) / 3.0;
                p_mean.iter_mut().zip(row).for_each(|(p, &x)| *p += f64::from(x).exp() / sum / 3.0);
            }
            let count = |e: usize| ids.iter().filter(|&&id| usize::from(id) == e).count() as f64;
            let balance: f64 = (0..experts).map(|e| count(e) / 6.0 * p_mean[e]).sum();
            0.3 * experts as f64 * balance + 0.2 * z
        };
        let mut got = vec![0.0; 12];
        losses.add_gradient(&logits, &mut got);
        for i in 0..12 {
            let at = |by: f32| {
                let mut moved = logits.clone();
                moved[i] += by;
                of(&moved)
            };
            let want = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((f64::from(got[i]) - want).abs() <= 1e-4, "{i}: {}, not {want}", got[i]);
        }
        // The second row counts elsewhere.
        let mut part = vec![0.0; 12];
        let without = RouterLosses { repeats: std::slice::from_ref(&(1..2)), ..losses };
        without.add_gradient(&logits, &mut part);
        got[4..8].fill(0.0);
        assert_eq!(part, got);
    }

    #[test]
    fn slots_are_sorted_by_expert_then_token_then_rank() {
        let routing = Routing::new(vec![2, 0, 0, 2, 2, 1], vec![0.0; 6], 4);
        assert_eq!(routing.order, [1, 2, 5, 0, 3, 4]);
        assert_eq!(routing.starts, [0, 2, 3, 6, 6]);
        for (at, &slot) in routing.order.iter().enumerate() {
            assert_eq!(routing.place[slot as usize] as usize, at);
        }
    }
}
