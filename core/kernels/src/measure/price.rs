//! What exactness costs: the kernels of a decode step beside others (`free`), in turn: some that break a rule, and some that
//! break none but have another order than ours. The price is what the first gain over the second and over ours.
//!
//! Weights are met as in a step of a model: after as many other bytes as the model has weights.

mod products;
mod rows;

use crate::attention::AttentionShape;
use crate::gemm::Precision;
use crate::{Quantisation, Threads};
use products::{Weights, experts_of_layer, product};
use rows::{choice, decode, log_prob, norm};
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

    /// Lets others in where this machine has what they need.
    #[cfg(target_arch = "x86_64")]
    fn beside(mut self, enter: impl FnOnce(&mut Self)) -> Self {
        if crate::measure::free::available() {
            enter(&mut self);
        }
        self
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::AttentionMask;
    #[cfg(target_arch = "x86_64")]
    use crate::measure::free;

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
