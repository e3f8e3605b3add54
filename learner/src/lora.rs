//! Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): the base stays, a product of two narrow matrices is trained.
//!
//! ```text
//! masters of A and B ─► base + scale · B·A, rounded to the working type ─► sampling, training, publishing: as ever
//! gradient of W ─► dB = scale · dW·Aᵀ, dA = scale · Bᵀ·dW ─► the optimiser, which knows A and B only
//! ```
//!
//! The sum is made before anything computes with it, so sampling and training see the same weights, to the bit, and neither has an
//! adapter in its arithmetic. Any matrix may have one: attention, MLPs, experts, routers, heads. A starts random, B at zero. What it
//! saves is the optimiser's state; the gradient of the whole matrices is still formed.

use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::gemm::{PackedMatrix, Precision, matmul, weight_grad};
use freewheel_model::{Adapter, ParamData, ParamLayout, Params, TensorKind, TensorSpec, add_product};
use freewheel_types::CounterRng;

use crate::optim::{OptimizerConfig, Selector};

/// Key of the random start of A.
const START: u64 = 0x6c6f_7261_2d61_2121;

/// The base and where its adapters go.
#[derive(Debug)]
pub struct Lora {
    base: Vec<f32>,
    targets: Vec<Target>,
    layout: Arc<ParamLayout>,
    rank: usize,
    scale: f32,
    alpha: f64,
}

/// A matrix, or several in one tensor, `[rows, cols]` each.
#[derive(Debug)]
struct Target {
    /// Whether PEFT has a place for it.
    exported: bool,
    offset: usize,
    count: usize,
    rows: usize,
    cols: usize,
    /// Where A `[count, rank, cols]` and B `[count, rows, rank]` lie among the adapters' parameters.
    a: usize,
    b: usize,
}

impl Lora {
    /// The adapters that `config` asks for on `base`, and their start. `None` if it asks for none.
    pub fn new(config: &OptimizerConfig, base: &Params) -> Option<(Self, Params)> {
        let rank = config.lora_rank;
        if rank == 0 {
            return None;
        }
        let (mut targets, mut tensors, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let fits = |tensor: &TensorSpec| {
            let asked = config.lora_targets.iter().filter_map(|text| Selector::new(text).ok());
            asked.into_iter().any(|selector| selector.fits(tensor))
        };
        for (index, spec) in base.layout.tensors.iter().enumerate() {
            let (count, rows, cols) = match spec.shape[..] {
                [rows, cols] => (1, rows, cols),
                [count, rows, cols] => (count, rows, cols),
                _ => continue,
            };
            if !fits(spec) || matches!(spec.kind, TensorKind::Embedding | TensorKind::Position) {
                continue;
            }
            let [a_name, b_name] = Adapter::names(&spec.name);
            let mut shapes = [vec![rank, cols], vec![rows, rank]];
            if spec.shape.len() == 3 {
                shapes.iter_mut().for_each(|shape| shape.insert(0, count));
            }
            let mut offsets = [0; 2];
            for ((name, shape), at) in [a_name, b_name].into_iter().zip(shapes).zip(&mut offsets) {
                *at = values.len();
                let tensor = TensorSpec { name, shape, offset: *at, kind: spec.kind };
                values.resize(values.len() + tensor.len(), 0.0f32);
                tensors.push(tensor);
            }
            let [a, b] = offsets;
            // As PEFT: uniform in ±1/√inputs, so that A·x is about as long as x.
            let (random, bound) = (CounterRng::new(START, index as u64), 1.0 / (cols as f64).sqrt());
            for (i, value) in (0u64..).zip(&mut values[a..b]) {
                *value = ((2.0 * random.uniform(i) - 1.0) * bound) as f32;
            }
            let exported = Adapter::has_place(spec);
            targets.push(Target { exported, offset: spec.offset, count, rows, cols, a, b });
        }
        let layout = Arc::new(ParamLayout { tensors, total: values.len() });
        let alpha = config.lora_alpha.unwrap_or(2.0 * rank as f64);
        let scale = (alpha / rank as f64) as f32;
        let start = Params { layout: layout.clone(), data: ParamData::F32(values) };
        Some((Self { base: base.to_f32(), targets, layout, rank, scale, alpha }, start))
    }

    /// Writes base + scale · B·A into `weights`, rounded to nearest even where those are bf16. `adapters` are the masters.
    pub fn merge(&self, threads: &Threads, adapters: &[f32], weights: &mut Params) {
        for target in &self.targets {
            let size = target.rows * target.cols;
            let range = target.offset..target.offset + target.count * size;
            let mut values = self.base[range.clone()].to_vec();
            for (i, out) in values.chunks_exact_mut(size).enumerate() {
                let (a, b) = target.factors(adapters, i, self.rank);
                add_product(threads, self.scale, b, a, [target.rows, self.rank, target.cols], out);
            }
            match &mut weights.data {
                ParamData::F32(out) => out[range].copy_from_slice(&values),
                ParamData::Bf16(out) => freewheel_kernels::convert::f32_to_bf16(&values, &mut out[range]),
            }
        }
    }

    /// The adapters' gradient from that of the whole weights.
    pub fn project(&self, threads: &Threads, adapters: &[f32], grads: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.layout.total];
        for target in &self.targets {
            let (rank, rows, cols) = (self.rank, target.rows, target.cols);
            let size = rows * cols;
            for i in 0..target.count {
                let d_w = &grads[target.offset + i * size..][..size];
                let (a, b) = target.factors(adapters, i, rank);
                let packed = PackedMatrix::from_f32(Precision::F32, a, rank, cols);
                let d_b = &mut out[target.b + i * rows * rank..][..rows * rank];
                matmul(threads, d_w, rows, &packed, d_b);
                d_b.iter_mut().for_each(|x| *x *= self.scale);
                let d_a = &mut out[target.a + i * rank * cols..][..rank * cols];
                weight_grad(threads, Precision::F32, b, d_w, rows, rank, cols, d_a);
                d_a.iter_mut().for_each(|x| *x *= self.scale);
            }
        }
        out
    }

    /// The adapters as PEFT knows them. `None` if it has no place for one of them; the merged weights do.
    pub fn export(&self, adapters: &[f32]) -> Option<Adapter> {
        if !self.targets.iter().all(|target| target.exported) {
            return None;
        }
        let params = Params { layout: self.layout.clone(), data: ParamData::F32(adapters.to_vec()) };
        Some(Adapter { rank: self.rank, alpha: self.alpha, rslora: false, params })
    }
}

impl Target {
    /// A and B of matrix `i`.
    fn factors<'a>(&self, adapters: &'a [f32], i: usize, rank: usize) -> (&'a [f32], &'a [f32]) {
        let (a, b) = (rank * self.cols, self.rows * rank);
        (&adapters[self.a + i * a..][..a], &adapters[self.b + i * b..][..b])
    }
}

#[cfg(test)]
mod tests {
    use freewheel_types::WeightsDtype;

    use super::*;

    fn base() -> Params {
        let tensor = |name: &str, shape: &[usize], offset, kind| TensorSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            offset,
            kind,
        };
        let tensors = vec![
            tensor("embed.weight", &[3, 4], 0, TensorKind::Embedding),
            tensor("q.weight", &[4, 6], 12, TensorKind::Attention),
            tensor("norm.weight", &[4], 36, TensorKind::Norm),
            tensor("mlp.experts.down_proj", &[2, 3, 5], 40, TensorKind::Expert),
            tensor("gate.weight", &[2, 4], 70, TensorKind::Router),
        ];
        let layout = Arc::new(ParamLayout { tensors, total: 78 });
        Params { layout, data: ParamData::F32((0..78).map(|i| (i as f32 * 0.7).sin()).collect()) }
    }

    fn lora(targets: &[&str]) -> (Lora, Vec<f32>) {
        let config = OptimizerConfig {
            lora_rank: 2,
            lora_targets: targets.iter().map(|&text| text.to_owned()).collect(),
            ..Default::default()
        };
        let (lora, start) = Lora::new(&config, &base()).expect("a rank above 0");
        (lora, start.to_f32())
    }

    fn merged(lora: &Lora, adapters: &[f32]) -> Vec<f32> {
        let mut weights = base();
        lora.merge(&Threads::single(), adapters, &mut weights);
        weights.to_f32()
    }

    #[test]
    fn a_new_adapter_changes_nothing() {
        let (lora, start) = lora(&["attention", "expert", "router"]);
        assert_eq!(merged(&lora, &start), base().to_f32());
        let mut half = base().cast(WeightsDtype::Bf16);
        lora.merge(&Threads::single(), &start, &mut half);
        assert_eq!(half, base().cast(WeightsDtype::Bf16));
        assert!(start.iter().any(|&x| x != 0.0), "A is random");
    }

    #[test]
    fn gradients_are_those_of_the_merged_weights() {
        let (lora, mut adapters) = lora(&["attention", "expert", "router"]);
        adapters.iter_mut().enumerate().for_each(|(i, x)| *x += 0.1 * (i as f32 * 1.3).cos());
        // Loss: Σ w² c, so dW = 2 w c.
        let weight = |i: usize| 0.1 + (i % 7) as f64;
        let loss = |adapters: &[f32]| -> f64 {
            merged(&lora, adapters).iter().enumerate().map(|(i, &w)| f64::from(w).powi(2) * weight(i)).sum()
        };
        let w = merged(&lora, &adapters);
        let grads: Vec<f32> =
            w.iter().enumerate().map(|(i, &w)| (2.0 * f64::from(w) * weight(i)) as f32).collect();
        let got = lora.project(&Threads::single(), &adapters, &grads);
        assert_eq!(got.len(), (2 * 6 + 4 * 2) + 2 * (2 * 5 + 3 * 2) + (2 * 4 + 2 * 2));
        for (i, got) in got.iter().enumerate() {
            let h = 1e-2;
            let at = |by: f32| {
                let mut moved = adapters.clone();
                moved[i] += by;
                loss(&moved)
            };
            let want = (at(h) - at(-h)) / (2.0 * f64::from(h));
            assert!((f64::from(*got) - want).abs() <= 2e-3 * want.abs().max(1.0), "{i}: {got}, not {want}");
        }
    }

    #[test]
    fn what_is_exported_merges_to_the_same_weights() {
        let (lora, mut adapters) = lora(&["attention", "expert", "router"]);
        adapters.iter_mut().enumerate().for_each(|(i, x)| *x += 0.1 * (i as f32 * 1.3).cos());
        let adapter = lora.export(&adapters).expect("PEFT has a place for each");
        let folder = tempfile::tempdir().unwrap();
        adapter.save(folder.path(), "base").unwrap();
        let read = Adapter::load(folder.path()).unwrap();
        let merged_again = read.merge(&base(), folder.path()).unwrap();
        assert_eq!(merged_again.to_f32(), merged(&lora, &adapters));
    }

    #[test]
    fn a_damaged_adapter_is_refused() {
        let (lora, adapters) = lora(&["attention"]);
        let folder = tempfile::tempdir().unwrap();
        lora.export(&adapters).unwrap().save(folder.path(), "base").unwrap();
        let config = folder.path().join("adapter_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        for (from, to, wants) in [
            ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
            ("\"r\": 2", "\"r\": 3", "no factor of rank 3"),
            ("\"r\": 2", "\"r\": 0", "r = 0"),
        ] {
            std::fs::write(&config, text.replace(from, to)).unwrap();
            let error = Adapter::load(folder.path()).unwrap_err().to_string();
            assert!(error.contains(wants), "{error}");
        }
    }
}
