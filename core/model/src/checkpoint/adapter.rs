//! LoRA adapters in PEFT's layout (Hu et al., arXiv 2106.09685): W + scale · B·A for some of the matrices W.
//!
//! A folder with `adapter_config.json` and `adapter_model.safetensors`, whose tensors are called
//! `base_model.model.MODULE.lora_A.weight [r, in]` and `….lora_B.weight [out, r]`. Adapters of experts that share a tensor (Llama 4,
//! gpt-oss) are `target_parameters` there, laid out by [`fused`](super::fused).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_kernels::gemm::{PackedMatrix, Precision, matmul};
use freewheel_types::WeightsDtype;
use serde_json::{Map, Value, json};

use super::fused::Fused;
use super::read_json;
use super::safetensors::Checkpoint;
use super::save::header;
use crate::error::ModelError;
use crate::params::{ParamData, ParamLayout, Params, TensorKind, TensorSpec};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
pub(super) const PREFIX: &str = "base_model.model.";
pub(super) const A: &str = ".lora_A.weight";
pub(super) const B: &str = ".lora_B.weight";

/// An adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Rank r of the update.
    pub rank: usize,
    /// α: B·A is multiplied with α/r.
    pub alpha: f64,
    /// Whether it is α/√r instead (rsLoRA).
    pub rslora: bool,
    /// The factors by the names of [`Adapter::names`]: A `[r, in]` and B `[out, r]`, or `[E, r, columns]` and `[E, rows, r]` for experts that
    /// share a tensor `[E, rows, columns]`.
    pub params: Params,
}

impl Adapter {
    /// Names of the two factors for the matrix called `tensor`: A, then B. PEFT's own, but for experts that share a tensor.
    pub fn names(tensor: &str) -> [String; 2] {
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        [A, B].map(|end| format!("{PREFIX}{module}{end}"))
    }

    /// Whether PEFT has a place for an adapter of `tensor`.
    pub fn has_place(tensor: &TensorSpec) -> bool {
        match tensor.shape.len() {
            2 => tensor.name.ends_with(".weight"),
            3 => super::fused::is_declared(&tensor.name),
            _ => false,
        }
    }

    /// Reads the folder `dir`.
    ///
    /// # Errors
    /// Whatever is wrong with its files; [`ModelError::Unsupported`] for what is not plain LoRA.
    pub fn load(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join(CONFIG);
        let config = read_json(&path)?;
        refuse(&path, &config)?;
        let invalid = |key: &str| ModelError::Invalid {
            path: path.clone(),
            what: format!("{key} = {}: expected a number above 0", config.get(key).unwrap_or(&Value::Null)),
        };
        let rank = config.get("r").and_then(Value::as_u64).filter(|r| *r > 0).ok_or_else(|| invalid("r"))?;
        let alpha = config
            .get("lora_alpha")
            .and_then(Value::as_f64)
            .filter(|alpha| alpha.is_finite() && *alpha > 0.0)
            .ok_or_else(|| invalid("lora_alpha"))?;
        let rslora = config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        let file = dir.join(WEIGHTS);
        let checkpoint = Checkpoint::file(&file)?;
        let fused = Fused::read(&path, &config, rank as usize)?;
        let layout = Arc::new(layout(&file, checkpoint.shapes(), rank as usize, &fused)?);
        checkpoint.check(&layout, |_| false)?;
        let params = fused.unpack(&file, checkpoint.read(&layout, Some(WeightsDtype::F32))?)?;
        Ok(Self { rank: rank as usize, alpha, rslora, params })
    }

    /// Writes it into the folder `dir`, which is created; `base` is the name of the model it belongs to.
    ///
    /// # Errors
    /// [`ModelError::File`] with the file that could not be written.
    pub fn save(&self, dir: &Path, base: &str) -> Result<(), ModelError> {
        let failed = |path: PathBuf| {
            move |source| ModelError::File { path, what: "cannot be written".into(), source: Some(source) }
        };
        std::fs::create_dir_all(dir).map_err(failed(dir.to_owned()))?;
        self.files(base).into_iter().try_for_each(|(name, bytes)| {
            let path = dir.join(name);
            std::fs::write(&path, bytes).map_err(failed(path.clone()))
        })
    }

    /// Its two files, name and contents.
    pub fn files(&self, base: &str) -> [(&'static str, Vec<u8>); 2] {
        let fused = Fused::of(&self.params, self.rank);
        let matrices = self.modules().filter(|module| !fused.holds(module));
        let modules: BTreeSet<&str> =
            matrices.map(|module| module.rsplit('.').next().unwrap_or(module)).collect();
        let mut config = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": self.rank,
            "lora_alpha": self.alpha, "use_rslora": self.rslora, "target_modules": modules, "lora_dropout": 0.0,
            "bias": "none", "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true,
            "modules_to_save": null, "use_dora": false, "alpha_pattern": {}, "rank_pattern": {},
        });
        if !fused.is_empty() {
            config["target_parameters"] = json!(fused.parameters());
        }
        let params = fused.pack(&self.params);
        let head = header(&params.layout.tensors, params.dtype());
        let weights = [&head, params.as_bytes()].concat();
        [(CONFIG, format!("{config:#}\n").into_bytes()), (WEIGHTS, weights)]
    }

    fn modules(&self) -> impl Iterator<Item = &str> {
        let tensors = self.params.layout.tensors.iter();
        tensors.filter_map(|tensor| tensor.name.strip_prefix(PREFIX)?.strip_suffix(A))
    }

    /// Factor on B·A.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// `base` with the adapter in it, in its own element type.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] if a matrix is not in `base` or has another shape; `source` names the adapter.
    pub fn merge(&self, base: &Params, source: &Path) -> Result<Params, ModelError> {
        let invalid = |what: String| ModelError::Invalid { path: source.to_owned(), what };
        let mut values = base.to_f32();
        for module in self.modules() {
            let [a, b] = Self::names(module).map(|name| {
                self.params.layout.get(&name).expect("A and B come together, checked in reading")
            });
            // Experts that share a tensor have one pair of factors each.
            let name = if a.shape.len() == 3 { module.to_owned() } else { format!("{module}.weight") };
            let Some(target) = base.layout.get(&name) else {
                return Err(invalid(format!("the model has no `{name}`")));
            };
            let (rows, cols) = (b.shape[b.shape.len() - 2], a.shape[a.shape.len() - 1]);
            let product = [&a.shape[..a.shape.len() - 2], &[rows, cols]].concat();
            if target.shape != product {
                let found = &target.shape;
                return Err(invalid(format!("{module}: B·A is {product:?}, the model has {found:?}")));
            }
            let (left, right) = (self.params.range_f32(b.range()), self.params.range_f32(a.range()));
            let (threads, scale, shape) = (Threads::single(), self.scale() as f32, [rows, self.rank, cols]);
            let factors = left.chunks_exact(rows * self.rank).zip(right.chunks_exact(self.rank * cols));
            for (out, (left, right)) in values[target.range()].chunks_exact_mut(rows * cols).zip(factors) {
                add_product(&threads, scale, left, right, shape, out);
            }
        }
        let wide = Params { layout: base.layout.clone(), data: ParamData::F32(values) };
        Ok(if base.dtype() == WeightsDtype::F32 { wide } else { wide.cast(base.dtype()) })
    }
}

/// `out += scale · left·right` for `left [rows, rank]`, `right [rank, cols]`, `out [rows, cols]`, in f32.
///
/// # Panics
/// When a length does not fit the shapes.
pub fn add_product(
    threads: &Threads,
    scale: f32,
    left: &[f32],
    right: &[f32],
    [rows, rank, cols]: [usize; 3],
    out: &mut [f32],
) {
    let mut product = vec![0.0; rows * cols];
    let columns = PackedMatrix::from_f32_transposed(Precision::F32, right, cols, rank);
    matmul(threads, left, rows, &columns, &mut product);
    freewheel_kernels::optim::axpy(threads, scale, &product, out);
}

/// Refuses what would change the arithmetic.
fn refuse(path: &Path, config: &Map<String, Value>) -> Result<(), ModelError> {
    let unsupported = |what: String| ModelError::Unsupported {
        path: path.to_owned(),
        what,
        hint: "; plain LoRA is".into(),
    };
    match config.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => return Err(unsupported(format!("peft_type {:?}", other.unwrap_or("")))),
    }
    let set = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(map) => !map.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::String(text) => text != "none",
        _ => true,
    };
    let keys = [
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "bias",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "use_qalora",
        "use_bdlora",
        "trainable_token_indices",
        "layer_replication",
    ];
    match keys.into_iter().find(|key| config.get(*key).is_some_and(set)) {
        Some(key) => Err(unsupported(format!("an adapter with `{key}`"))),
        None => Ok(()),
    }
}

/// Factors A and B of each module.
fn layout<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, &'a [usize])>,
    rank: usize,
    fused: &Fused,
) -> Result<ParamLayout, ModelError> {
    let invalid = |what: String| ModelError::Invalid { path: path.to_owned(), what };
    let mut found = ParamLayout { tensors: Vec::new(), total: 0 };
    for (name, shape) in tensors {
        let module = name.strip_prefix(PREFIX);
        let ranks = |r: usize| if fused.stacks(name) { r > 0 && r.is_multiple_of(rank) } else { r == rank };
        let fits =
            match (module.is_some_and(|m| m.ends_with(A)), module.is_some_and(|m| m.ends_with(B)), shape) {
                (true, _, [r, _]) | (_, true, [_, r]) => ranks(*r),
                _ => false,
            };
        let other = match name.strip_suffix(A) {
            Some(module) => format!("{module}{B}"),
            None => format!("{}{A}", name.strip_suffix(B).unwrap_or(name)),
        };
        if !fits {
            return Err(invalid(format!("{name} {shape:?} is no factor of rank {rank}")));
        }
        let tensor = TensorSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            offset: found.total,
            kind: TensorKind::Mlp,
        };
        found.total += tensor.len();
        found.tensors.push(tensor);
        // Names come sorted: the other factor of B is there by now, that of A is next.
        if name.ends_with(B) && found.get(&other).is_none() {
            return Err(invalid(format!("{other} is missing")));
        }
    }
    let [a, b] = [A, B].map(|end| found.tensors.iter().filter(|t| t.name.ends_with(end)).count());
    if a != b || a == 0 {
        return Err(invalid(format!("{a} factors A and {b} factors B")));
    }
    Ok(found)
}
