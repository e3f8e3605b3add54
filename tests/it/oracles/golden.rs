//! The golden folder: which models it lists, and the numbers of one.

use std::path::PathBuf;

use freewheel_model::ParamLayout;
use freewheel_tests::fixtures;
use safetensors::SafeTensors;
use serde_json::Value;

/// Absolute tolerance on logits, log-probs and hidden states (the oracles' README).
pub const TOLERANCE: f32 = 2e-4;
/// Absolute tolerance on scores, losses and mean log-likelihoods (the oracles' README).
pub const LOSS_TOLERANCE: f64 = 1e-4;

/// One model with its golden numbers.
pub struct Oracle {
    /// Its folder.
    pub dir: PathBuf,
    /// Its entry in the index.
    pub entry: Value,
    /// `golden.json`.
    pub golden: Value,
    tensors: Vec<u8>,
}

/// Largest errors of one model against its golden numbers.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Logits, or the scores of a classifier.
    pub logits: f32,
    /// Log-probs of the tokens that are there; `None` for classifiers.
    pub logprobs: Option<f32>,
    /// Gradients, as a share of the largest value of their tensor.
    pub gradients: f32,
}

/// Every model of the index. Of the fixtures some may be missing; of a folder named by hand none.
pub fn oracles() -> Vec<Oracle> {
    let root = fixtures("models");
    let index: Value =
        serde_json::from_slice(&std::fs::read(root.join("index.json")).expect("models/index.json"))
            .expect("models/index.json parses");
    let mut found = Vec::new();
    for entry in index.as_array().expect("a list") {
        let dir = root.join(entry["name"].as_str().expect("a name"));
        if !dir.exists() && std::env::var_os("FREEWHEEL_ORACLES").is_none() {
            println!("not among the fixtures: {}", entry["name"]);
            continue;
        }
        found.push(Oracle::read(dir, entry.clone()));
    }
    assert!(found.len() >= 4, "only {} models in {}", found.len(), root.display());
    found
}

/// The models of the index that write text.
pub fn writers() -> Vec<Oracle> {
    oracles().into_iter().filter(|oracle| !oracle.scores()).collect()
}

impl Oracle {
    /// The model in `dir` with its entry of the index.
    pub fn read(dir: PathBuf, entry: Value) -> Self {
        let golden = std::fs::read(dir.join("golden.json")).expect("golden.json");
        let tensors = std::fs::read(dir.join("golden.safetensors")).expect("golden.safetensors");
        Self { golden: serde_json::from_slice(&golden).expect("golden.json parses"), tensors, dir, entry }
    }

    pub fn name(&self) -> &str {
        self.entry["name"].as_str().expect("a name")
    }

    pub fn architecture(&self) -> &str {
        self.entry["architecture"].as_str().expect("an architecture")
    }

    /// Whether it gives scores instead of text.
    pub fn scores(&self) -> bool {
        self.architecture().ends_with("ForSequenceClassification")
    }

    pub fn is_bf16(&self) -> bool {
        self.entry["dtype"] == "bfloat16"
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.tensors).expect("golden.safetensors parses")
    }

    pub fn f32_if_there(&self, name: &str) -> Option<Vec<f32>> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).ok()?;
        match view.dtype() {
            safetensors::Dtype::F32 => {
                Some(view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
            }
            safetensors::Dtype::BF16 => {
                let wide = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                Some(view.data().as_chunks().0.iter().map(wide).collect())
            }
            other => panic!("{name} is {other:?}"),
        }
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.f32_if_there(name).unwrap_or_else(|| panic!("{}: golden tensor {name}", self.name()))
    }

    pub fn i64(&self, name: &str) -> Vec<i64> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).unwrap_or_else(|_| panic!("{}: golden tensor {name}", self.name()));
        view.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
    }

    /// The real tokens of every row of the right-padded batch.
    pub fn sequences(&self) -> Vec<Vec<u32>> {
        self.rows_of("input_ids")
    }

    /// The rows of the padded `[B, T]` tensor `name` without their padding.
    pub fn rows_of(&self, name: &str) -> Vec<Vec<u32>> {
        let lengths: Vec<usize> = usizes(&self.golden["lengths"]);
        let ids = self.i64(name);
        let width = ids.len() / lengths.len();
        let row =
            |(row, &len): (usize, &usize)| ids[row * width..][..len].iter().map(|&id| id as u32).collect();
        lengths.iter().enumerate().map(row).collect()
    }

    /// Checks every golden gradient against `grads`, an arena of `layout`: each below 2e-4 of the largest value of its
    /// tensor, and the norm of all of them. The largest error, as a share of the largest value of its tensor.
    pub fn check_gradients(&self, layout: &ParamLayout, grads: &[f32]) -> f32 {
        let names = self.golden["grads"].as_array().expect("names of gradients");
        assert!(names.len() >= 5, "{}: only {} golden gradients", self.name(), names.len());
        let mut worst = 0.0f32;
        for name in names.iter().map(|name| name.as_str().expect("a name")) {
            let golden = self.f32(&format!("grad/{name}"));
            let tensor =
                layout.get(name).unwrap_or_else(|| panic!("{}: the layout has no {name}", self.name()));
            let largest = golden.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            let error = max_diff(&grads[tensor.range()], &golden);
            let limit = 2e-4 * largest + 1e-7;
            assert!(error <= limit, "{}: {name} differs by {error}, largest {largest}", self.name());
            worst = worst.max(error / largest.max(f32::MIN_POSITIVE));
        }
        let norm = grads.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let golden = self.golden["grad_norm_all_params"].as_f64().expect("a norm");
        let name = self.name();
        assert!((norm - golden).abs() <= 1e-4 * golden, "{name}: gradient norm {norm}, golden {golden}");
        worst
    }
}

/// A list of counts or ids.
pub fn usizes(value: &Value) -> Vec<usize> {
    value.as_array().expect("a list").iter().map(|x| x.as_u64().expect("a count") as usize).collect()
}

/// The largest difference; NaN if one is.
pub fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    a.iter().zip(b).fold(0.0, |worst, (a, b)| {
        let diff = (a - b).abs();
        if diff > worst || diff.is_nan() { diff } else { worst }
    })
}

/// The mean difference.
pub fn mean_diff(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / a.len() as f64
}
