//! Products with weights, of all rows and of the experts of a layer.

use super::{Contest, Price, Setting, values};
use crate::gemm::{Group, PackedMatrix, Precision, grouped_matmul, matmul};
#[cfg(target_arch = "x86_64")]
use crate::measure::free;
use crate::optim::axpy;
use crate::{Quantisation, Threads};
use std::hint::black_box;
use std::ops::Range;

/// Weights of one kind.
pub(super) struct Weights {
    pub n: usize,
    pub k: usize,
    pub precision: Precision,
    pub quantisation: Option<Quantisation>,
}

impl Weights {
    fn packed(&self, precision: Precision) -> PackedMatrix {
        let mut w = match self.quantisation {
            Some(quantisation) => PackedMatrix::quantised(quantisation, precision, self.n, self.k),
            None => PackedMatrix::zeros(precision, self.n, self.k),
        };
        w.repack_from_f32(&Threads::single(), &values(self.n * self.k));
        w
    }

    /// As many copies, in whole sets of `set`, as make up `bytes`: those are met in turn.
    fn copies(&self, precision: Precision, set: usize, bytes: usize) -> Vec<PackedMatrix> {
        let w = self.packed(precision);
        let sets = (bytes / (set * w.bytes()).max(1)).max(1);
        vec![w; sets * set]
    }
}

/// Hands out sets of weights in turn.
struct Turn(std::cell::Cell<usize>);

impl Turn {
    fn next<'a>(&self, weights: &'a [PackedMatrix], set: usize) -> &'a [PackedMatrix] {
        let at = self.0.get() % weights.len();
        self.0.set(at + set);
        &weights[at..at + set]
    }
}

pub(super) fn product(
    setting: &Setting,
    kind: &Weights,
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "only others try it"))]
    bf16_would_do: bool,
) -> Price {
    let &Setting { threads, rows, held_bytes, .. } = setting;
    let weights = kind.copies(kind.precision, 1, held_bytes);
    #[cfg(target_arch = "x86_64")]
    let rounded = bf16_would_do.then(|| kind.copies(Precision::Bf16, 1, held_bytes / 2));
    #[cfg(target_arch = "x86_64")]
    let bf16 = rounded.as_ref().or((kind.precision == Precision::Bf16).then_some(&weights));
    let x = values(rows * kind.k);
    let turn = Turn(Default::default());
    let (weights, x, turn) = (&weights, &x, &turn);
    let next = || &turn.next(weights, 1)[0];
    let room = || vec![0.0f32; rows * kind.n];
    let mut out = room();
    let contest = Contest::of(move || matmul(threads, x, rows, next(), black_box(&mut out)));
    #[cfg(target_arch = "x86_64")]
    let contest = contest.beside(|contest| {
        if kind.quantisation.is_some() {
            return;
        }
        if let Some(bf16) = bf16 {
            let next = move || &turn.next(bf16, 1)[0];
            let columns = move |products: &mut free::Products, threads: &Threads, out: &mut [f32]| {
                products.columns(threads, x, &[Group { rows: 0..rows, w: next() }], out);
            };
            let (mut products, mut out) = (free::Products::default(), room());
            contest.free("dot", move || columns(&mut products, threads, black_box(&mut out)));
            let (mut products, mut out, single) = (free::Products::default(), room(), Threads::single());
            contest.free("dot, one thread", move || columns(&mut products, &single, black_box(&mut out)));
            let (mut products, mut out) = (free::Products::default(), room());
            contest.free("dot, k shared out", move || {
                products.parts_of_k(threads, x, next(), black_box(&mut out));
            });
        }
        if kind.precision == Precision::F32 {
            let mut out = room();
            contest.exact("f32, four sums", move || free::product_f32(x, next(), black_box(&mut out)));
        }
    });
    contest.decide(setting.rounds)
}

/// Which rows go to which experts, at random.
pub(super) struct Routing {
    /// Rows of each expert's slots.
    rows: Vec<u32>,
    /// Experts that have slots, with those.
    parts: Vec<(usize, Range<usize>)>,
    /// Slots of each row, in the order of the router.
    slots: Vec<Vec<usize>>,
}

impl Routing {
    fn new(rows: usize, experts: usize, top_k: usize) -> Self {
        assert!(top_k <= experts, "{top_k} of {experts} experts");
        let mut chosen = values(rows * experts).into_iter();
        let mut of_expert = vec![Vec::new(); experts];
        for row in 0..rows {
            let mut order: Vec<(f32, usize)> =
                (0..experts).map(|e| (chosen.next().unwrap_or(0.0), e)).collect();
            order.sort_by(|a, b| a.0.total_cmp(&b.0));
            order[..top_k].iter().enumerate().for_each(|(rank, (_, e))| of_expert[*e].push((row, rank)));
        }
        let mut found = Self { rows: Vec::new(), parts: Vec::new(), slots: vec![vec![0; top_k]; rows] };
        for (expert, of_expert) in of_expert.iter().enumerate().filter(|(_, slots)| !slots.is_empty()) {
            let first = found.rows.len();
            for &(row, rank) in of_expert {
                found.slots[row][rank] = found.rows.len();
                found.rows.push(row as u32);
            }
            found.parts.push((expert, first..found.rows.len()));
        }
        found
    }

    fn groups<'a>(&self, weights: &'a [PackedMatrix]) -> Vec<Group<'a>> {
        self.parts.iter().map(|(expert, rows)| Group { rows: rows.clone(), w: &weights[*expert] }).collect()
    }
}

pub(super) fn experts_of_layer(
    setting: &Setting,
    kind: &Weights,
    (experts, top_k): (usize, usize),
    add: bool,
) -> Price {
    let &Setting { threads, rows, held_bytes, .. } = setting;
    let routing = Routing::new(rows, experts, top_k);
    let weights = kind.copies(kind.precision, experts, held_bytes);
    let slots = routing.rows.len();
    let (x, shares) = (values(slots * kind.k), values(slots));
    let turn = Turn(Default::default());
    let (weights, x, shares, routing, turn) = (&weights, &x, &shares, &routing, &turn);
    let next = || routing.groups(turn.next(weights, experts));
    let room = |rows: usize| vec![0.0f32; rows * kind.n];
    let (mut each, mut out) = (room(slots), room(rows));
    let contest = Contest::of(move || {
        grouped_matmul(threads, x, &next(), black_box(&mut each));
        if add {
            let single = Threads::single();
            threads.for_each_row_chunk(&mut out, kind.n, (1 << 15) / (kind.n * top_k) + 1, |first, out| {
                for (out, slots) in out.chunks_exact_mut(kind.n).zip(&routing.slots[first..]) {
                    for &slot in slots {
                        axpy(&single, shares[slot], &each[slot * kind.n..][..kind.n], out);
                    }
                }
            });
        }
    });
    #[cfg(target_arch = "x86_64")]
    let contest = contest.beside(|contest| {
        if kind.quantisation.is_some() || kind.precision != Precision::Bf16 {
            return;
        }
        let (mut products, mut out) = (free::Products::default(), room(if add { rows } else { slots }));
        contest.free(if add { "dot, added as done" } else { "dot" }, move || {
            let groups = next();
            match add {
                true => {
                    let add = free::Add { rows: &routing.rows, weights: shares };
                    products.columns_added(threads, x, &groups, add, black_box(&mut out));
                }
                false => products.columns(threads, x, &groups, black_box(&mut out)),
            }
        });
    });
    contest.decide(setting.rounds)
}

#[cfg(test)]
mod tests {
    use super::Routing;

    #[test]
    fn every_row_goes_to_its_number_of_experts() {
        let routing = Routing::new(7, 5, 3);
        assert_eq!(routing.rows.len(), 21);
        let mut of_rows = vec![Vec::new(); 7];
        for (expert, slots) in &routing.parts {
            slots.clone().for_each(|slot| of_rows[routing.rows[slot] as usize].push((slot, *expert)));
        }
        for (row, found) in of_rows.into_iter().enumerate() {
            let mut slots = routing.slots[row].clone();
            slots.sort();
            assert_eq!(found.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), slots);
            assert!(found.windows(2).all(|pair| pair[0].1 < pair[1].1), "different experts: {found:?}");
        }
    }
}
