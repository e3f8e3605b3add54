//! What exactness costs: the kernels of a decode step beside others (`free`), in turn: some that break a rule, and some that
//! break none but have another order than ours. The price is what the first gain over the second and over ours.
//!
//! Weights are met as in a step of a model: after as many other bytes as the model has weights.

#[cfg(target_arch = "x86_64")]
use super::free;
use crate::attention::{AttentionMask, AttentionSeq, AttentionShape, KV_BLOCK, KvPages, attention};
use crate::gemm::{Group, PackedMatrix, Precision, grouped_matmul, matmul};
use crate::norm::{NormScale, rms_norm};
use crate::optim::axpy;
use crate::{Quantisation, Threads, router, softmax};
use half::bf16;
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

/// An operation of a decode step that a rule of exactness bears on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// A product with a weight `[n,k]`: one order over k, for all numbers of rows and threads.
    Product {
        /// Output width.
        n: usize,
        /// Input width.
        k: usize,
        /// Numbers it is computed in.
        precision: Precision,
        /// Codes it is stored in, if it is.
        quantisation: Option<Quantisation>,
        /// Whether bf16 would do where it is computed in f32: a router's.
        bf16_would_do: bool,
    },
    /// The products of a layer's experts with the rows that chose them. With `add`, their results are then added to the rows
    /// in the order of the router.
    Experts {
        /// Output width.
        n: usize,
        /// Input width.
        k: usize,
        /// Numbers they are computed in.
        precision: Precision,
        /// Codes they are stored in, if they are.
        quantisation: Option<Quantisation>,
        /// Experts of the layer.
        experts: usize,
        /// Experts of a row.
        top_k: usize,
        /// Whether results are added to the rows.
        add: bool,
    },
    /// Which experts a row goes to: softmax, the best of it, renormalised.
    Choice {
        /// Experts of the layer.
        experts: usize,
        /// Experts of a row.
        top_k: usize,
    },
    /// An RMS norm, `per_row` of them a row.
    Norm {
        /// Values of a norm.
        width: usize,
        /// Norms of a row: heads, or 1.
        per_row: usize,
    },
    /// Attention of one row a sequence.
    Attention {
        /// Sizes; the mask is taken as causal.
        shape: AttentionShape,
        /// Numbers of keys and values.
        precision: Precision,
        /// Keys that each row sees, its own included.
        context: usize,
    },
    /// Maximum and log-sum-exp of a row of logits.
    LogProb {
        /// Logits of a row.
        vocabulary: usize,
    },
}

/// What an operation costs with its rule and without.
#[derive(Clone, Debug, PartialEq)]
pub struct Price {
    /// Seconds that ours takes: the median.
    pub seconds: f64,
    /// The kernels beside it. None where there is none, for codes and on machines that lack the instructions.
    pub others: Vec<Other>,
    /// Rounds.
    pub rounds: usize,
}

/// A kernel that gives other bits than ours.
#[derive(Clone, Debug, PartialEq)]
pub struct Other {
    /// What it does otherwise.
    pub name: &'static str,
    /// Seconds it takes: the median.
    pub seconds: f64,
    /// Whether a row's bits depend on that row alone all the same: it has another order of its own, but the same for every
    /// batch and every number of threads. What such a kernel gains is not the price of a rule.
    pub exact: bool,
}

impl Price {
    /// Name (`None`: ours) and seconds of the quickest kernel: of all, or of those that a rule allows.
    pub fn quickest(&self, only_exact: bool) -> (Option<&'static str>, f64) {
        let others =
            self.others.iter().filter(|other| (other.exact || !only_exact) && other.seconds < self.seconds);
        let best = others.min_by(|a, b| a.seconds.total_cmp(&b.seconds));
        best.map_or((None, self.seconds), |other| (Some(other.name), other.seconds))
    }
}

/// How an operation is met.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// Who computes.
    pub threads: &'a Threads,
    /// Rows: sequences that decode.
    pub rows: usize,
    /// Bytes of weights that pass by before one is met again.
    pub held_bytes: usize,
    /// Rounds at least; there are as many as fit in a third of a second.
    pub rounds: usize,
}

/// Kernels that do the same, in turn.
struct Contest<'a> {
    ours: Call<'a>,
    /// Names, whether they break no rule, and themselves.
    others: Vec<(&'static str, bool, Call<'a>)>,
}

/// A kernel with its operands.
type Call<'a> = Box<dyn FnMut() + 'a>;

/// A sample takes at least this long.
const SAMPLE: Duration = Duration::from_micros(100);
/// All rounds take about this long.
const TOTAL: Duration = Duration::from_millis(400);

impl<'a> Contest<'a> {
    fn of(ours: impl FnMut() + 'a) -> Self {
        Self { ours: Box::new(ours), others: Vec::new() }
    }

    /// A kernel that breaks a rule.
    #[cfg(target_arch = "x86_64")]
    fn free(&mut self, name: &'static str, call: impl FnMut() + 'a) {
        self.others.push((name, false, Box::new(call)));
    }

    /// A kernel of another order that breaks none.
    #[cfg(target_arch = "x86_64")]
    fn exact(&mut self, name: &'static str, call: impl FnMut() + 'a) {
        self.others.push((name, true, Box::new(call)));
    }

    fn decide(mut self, rounds: usize) -> Price {
        let mut calls: Vec<&mut dyn FnMut()> = vec![&mut *self.ours];
        calls.extend(self.others.iter_mut().map(|(_, _, call)| &mut **call as &mut dyn FnMut()));
        // Once to warm up, then as often as makes a sample.
        let seconds = |call: &mut dyn FnMut(), times: u32| {
            let began = Instant::now();
            (0..times).for_each(|_| call());
            began.elapsed().as_secs_f64() / f64::from(times)
        };
        let times: Vec<u32> = calls
            .iter_mut()
            .map(|call| {
                seconds(call, 1);
                (SAMPLE.as_secs_f64() / seconds(call, 3).max(1e-9)).clamp(1.0, 1e5) as u32
            })
            .collect();
        let mut samples = vec![Vec::new(); calls.len()];
        let began = Instant::now();
        while samples[0].len() < rounds.max(1) || began.elapsed() < TOTAL {
            // The first of a round changes from round to round.
            let first = samples[0].len() % calls.len();
            for i in (first..calls.len()).chain(0..first) {
                samples[i].push(seconds(calls[i], times[i]));
            }
        }
        let rounds = samples[0].len();
        let mut medians = samples.into_iter().map(|mut samples| {
            samples.sort_by(f64::total_cmp);
            samples[samples.len() / 2]
        });
        let seconds = medians.next().expect("there is ours");
        let others = self.others.iter().zip(medians);
        let others = others.map(|(&(name, exact, _), seconds)| Other { name, seconds, exact });
        Price { seconds, others: others.collect(), rounds }
    }
}

impl Op {
    /// Measures it.
    ///
    /// # Panics
    /// When a size is 0, or more experts are chosen than there are.
    pub fn price(&self, setting: &Setting) -> Price {
        match *self {
            Op::Product { n, k, precision, quantisation, bf16_would_do } => {
                product(setting, &Weights { n, k, precision, quantisation }, bf16_would_do)
            }
            Op::Experts { n, k, precision, quantisation, experts, top_k, add } => {
                let weights = Weights { n, k, precision, quantisation };
                experts_of_layer(setting, &weights, (experts, top_k), add)
            }
            Op::Choice { experts, top_k } => choice(setting, experts, top_k),
            Op::Norm { width, per_row } => norm(setting, width, per_row),
            Op::Attention { shape, precision, context } => decode(setting, shape, precision, context),
            Op::LogProb { vocabulary } => log_prob(setting, vocabulary),
        }
    }
}

/// Values without a pattern, from −1 to 1.
fn values(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Weights of one kind.
struct Weights {
    n: usize,
    k: usize,
    precision: Precision,
    quantisation: Option<Quantisation>,
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

fn product(setting: &Setting, kind: &Weights, bf16_would_do: bool) -> Price {
    let &Setting { threads, rows, held_bytes, .. } = setting;
    let weights = kind.copies(kind.precision, 1, held_bytes);
    let rounded = bf16_would_do.then(|| kind.copies(Precision::Bf16, 1, held_bytes / 2));
    let bf16 = rounded.as_ref().or((kind.precision == Precision::Bf16).then_some(&weights));
    let x = values(rows * kind.k);
    let turn = Turn(Default::default());
    let (weights, x, turn) = (&weights, &x, &turn);
    let next = || &turn.next(weights, 1)[0];
    let room = || vec![0.0f32; rows * kind.n];
    let mut out = room();
    let mut contest = Contest::of(move || matmul(threads, x, rows, next(), black_box(&mut out)));
    #[cfg(target_arch = "x86_64")]
    if free::available() && kind.quantisation.is_none() {
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
    }
    contest.decide(setting.rounds)
}

/// Which rows go to which experts, at random.
struct Routing {
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

fn experts_of_layer(setting: &Setting, kind: &Weights, (experts, top_k): (usize, usize), add: bool) -> Price {
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
    let mut contest = Contest::of(move || {
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
    if free::available() && kind.quantisation.is_none() && kind.precision == Precision::Bf16 {
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
    }
    contest.decide(setting.rounds)
}

fn choice(setting: &Setting, experts: usize, top_k: usize) -> Price {
    let logits = values(setting.rows * experts);
    let logits = &logits;
    let room = || (vec![0u16; setting.rows * top_k], vec![0.0f32; setting.rows * top_k]);
    let (mut ids, mut weights) = room();
    let mut contest = Contest::of(move || {
        router::softmax_top_k(logits, experts, top_k, true, &mut ids, black_box(&mut weights));
    });
    #[cfg(target_arch = "x86_64")]
    if free::available() {
        let (mut ids, mut weights) = room();
        contest.exact("exp of the chosen", move || {
            free::softmax_top_k(logits, experts, top_k, &mut ids, black_box(&mut weights));
        });
    }
    contest.decide(setting.rounds)
}

fn norm(setting: &Setting, width: usize, per_row: usize) -> Price {
    let (x, weight) = (values(setting.rows * per_row * width), values(width));
    let (x, weight) = (&x, &weight);
    let mut out = vec![0.0f32; x.len()];
    let mut contest = Contest::of(move || {
        rms_norm(setting.threads, x, width, NormScale::Weight(weight), 1e-5, black_box(&mut out));
    });
    #[cfg(target_arch = "x86_64")]
    if free::available() && width.is_multiple_of(16) {
        let mut out = vec![0.0f32; x.len()];
        contest.exact("four sums", move || free::norm_f32(x, weight, 1e-5, black_box(&mut out)));
        let rounded = |x: &[f32]| {
            let mut out = vec![0u16; x.len()];
            free::to_bf16(x, &mut out);
            out
        };
        let (x, weight, mut out) = (rounded(x), rounded(weight), vec![0u16; x.len()]);
        contest.free("bf16 rows", move || free::norm_bf16(&x, &weight, 1e-5, black_box(&mut out)));
    }
    contest.decide(setting.rounds)
}

fn decode(setting: &Setting, shape: AttentionShape, precision: Precision, context: usize) -> Price {
    let &Setting { threads, rows, .. } = setting;
    let shape = AttentionShape { mask: AttentionMask::Causal, ..shape };
    let blocks = context.div_ceil(KV_BLOCK);
    let pages: Vec<u32> = (0..(rows * blocks) as u32).collect();
    let q = values(rows * shape.heads * shape.head_dim);
    let seqs: Vec<AttentionSeq> = pages
        .chunks_exact(blocks)
        .enumerate()
        .map(|(row, pages)| AttentionSeq { first_row: row, rows: 1, position: context - 1, pages })
        .collect();
    let (k, v) = (values(pages.len() * shape.k_page_len()), values(pages.len() * shape.v_page_len()));
    let round = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let (k_rounded, v_rounded) = (round(&k), round(&v));
    let room = || vec![0.0f32; rows * shape.heads * shape.value_dim];
    let (mut out, q, seqs) = (room(), &q, &seqs);
    let kept = match precision {
        Precision::F32 => KvPages::F32 { k: &k, v: &v },
        Precision::Bf16 => KvPages::Bf16 { k: &k_rounded, v: &v_rounded },
    };
    let mut contest =
        Contest::of(move || attention(threads, &shape, q, kept, seqs, black_box(&mut out), None));
    #[cfg(target_arch = "x86_64")]
    if free::available() && free::can_decode(&shape) {
        match kept {
            KvPages::F32 { k, v } => decode_otherwise(&mut contest, setting, shape, (q, k, v), seqs),
            KvPages::Bf16 { k, v } => decode_otherwise(&mut contest, setting, shape, (q, k, v), seqs),
        }
    }
    contest.decide(setting.rounds)
}

#[cfg(target_arch = "x86_64")]
fn decode_otherwise<'a, C: free::Cell>(
    contest: &mut Contest<'a>,
    setting: &Setting<'a>,
    shape: AttentionShape,
    (q, k_pages, v_pages): (&'a [f32], &'a [C], &'a [C]),
    seqs: &'a [AttentionSeq<'a>],
) {
    let threads = setting.threads;
    let decode = move || free::Decode { shape, q, k_pages, v_pages, seqs };
    let room = || vec![0.0f32; setting.rows * shape.heads * shape.value_dim];
    let mut out = room();
    contest.exact("four pages", move || decode().run(threads, false, black_box(&mut out)));
    let mut out = room();
    contest.free("parts for threads", move || decode().run(threads, true, black_box(&mut out)));
    let (mut out, single) = (room(), Threads::single());
    contest.exact("four pages, one thread", move || decode().run(&single, false, black_box(&mut out)));
}

fn log_prob(setting: &Setting, vocabulary: usize) -> Price {
    let &Setting { threads, rows, .. } = setting;
    let logits: Vec<f32> = values(rows * vocabulary).iter().map(|x| 10.0 * x).collect();
    let logits = &logits;
    let mut contest = Contest::of(move || {
        threads.for_each(rows, &|row| {
            black_box(softmax::row_stats(&logits[row * vocabulary..][..vocabulary], 1.0));
        });
    });
    #[cfg(target_arch = "x86_64")]
    if free::available() {
        contest.exact("several sums", move || {
            threads.for_each(rows, &|row| {
                let logits = &logits[row * vocabulary..][..vocabulary];
                black_box(free::row_stats(&Threads::single(), logits, vocabulary, 1));
            });
        });
        let parts = (2 * threads.count()).div_ceil(rows);
        contest.free("several sums, shared out", move || {
            black_box(free::row_stats(threads, logits, vocabulary, parts));
        });
    }
    contest.decide(setting.rounds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_all_are_told_and_the_quickest_named() {
        let pause = |us| move || std::thread::sleep(Duration::from_micros(us));
        let mut contest = Contest::of(pause(4000));
        contest.others.push(("quick", false, Box::new(pause(300))));
        contest.others.push(("allowed", true, Box::new(pause(2000))));
        contest.others.push(("slow", true, Box::new(pause(9000))));
        let price = contest.decide(3);
        let (name, seconds) = price.quickest(false);
        assert!(price.rounds >= 3 && price.others.len() == 3);
        assert!(
            name == Some("quick") && seconds == price.others[0].seconds && seconds >= 300e-6,
            "{price:?}"
        );
        assert_eq!(price.quickest(true), (Some("allowed"), price.others[1].seconds));
        assert!(price.seconds >= 4000e-6 && price.others[2].seconds >= 9000e-6, "{price:?}");
        let slow = Other { name: "slow", seconds: 2.0, exact: true };
        let alone = Price { others: vec![slow], seconds: 1.0, rounds: 1 };
        assert_eq!(alone.quickest(false), (None, 1.0), "nothing is quicker");
    }

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

    #[test]
    fn every_operation_has_a_price() {
        let (n, k, precision, quantisation) = (32, 64, Precision::Bf16, None);
        let shape = AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            value_dim: 16,
            scale: 0.25,
            mask: AttentionMask::Sliding(3),
        };
        let setting = Setting { threads: &Threads::new(2), rows: 3, held_bytes: 1 << 16, rounds: 3 };
        let (experts, top_k) = (4, 2);
        for op in [
            Op::Product { n, k, precision, quantisation, bf16_would_do: false },
            Op::Product { n, k, precision: Precision::F32, quantisation, bf16_would_do: true },
            Op::Experts { n, k, precision, quantisation, experts, top_k, add: true },
            Op::Experts { n, k, precision, quantisation, experts, top_k, add: false },
            Op::Choice { experts, top_k },
            Op::Norm { width: 64, per_row: 2 },
            Op::Attention { shape, precision: Precision::F32, context: 40 },
            Op::Attention { shape, precision: Precision::Bf16, context: 40 },
            Op::LogProb { vocabulary: 300 },
        ] {
            let price = op.price(&setting);
            assert!(price.seconds > 0.0 && price.rounds >= 3, "{op:?}: {price:?}");
            assert!(price.others.iter().all(|other| other.seconds > 0.0), "{op:?}: {price:?}");
            #[cfg(target_arch = "x86_64")]
            assert_eq!(price.others.is_empty(), !free::available(), "{op:?}");
        }
    }
}
