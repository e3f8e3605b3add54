//! Adapters of experts that share a tensor, as PEFT lays them out (`target_parameters`; read from PEFT 0.21 with transformers 5.23).
//!
//! For a tensor `P [E, rows, columns]` of a module M, with factors A_e `[r, columns]` and B_e `[rows, r]`, PEFT holds two matrices for the
//! whole stack: `lora_A [E·r, in]` with A_e in rows e·r …, and `lora_B [out, r·E]` whose column k·E + e is column k of B_e. It takes rows for
//! `out` and columns for `in`, unless the module says `is_transposed`, as gpt-oss does: then it is the other way round, and the factors
//! change places. Several tensors of one module nest: the one that the module declares last is `M.lora_A`, the one before it
//! `M.base_layer.lora_A`.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::adapter::{A, B, PREFIX};
use crate::error::ModelError;
use crate::params::{ParamData, ParamLayout, Params, TensorSpec};

/// Tensors of experts in the order in which every family declares them.
const DECLARED: [&str; 2] = ["gate_up_proj", "down_proj"];

/// The expert tensors that an adapter is on.
pub(super) struct Fused {
    rank: usize,
    /// Module and tensor of each, as a model names them.
    tensors: Vec<(String, &'static str)>,
    /// Which tensors `target_parameters` names, by the end of their name.
    asked: Vec<String>,
}

/// Whether the module says `is_transposed`: among the families read here gpt-oss alone does, and it alone calls them so.
fn transposed(module: &str) -> bool {
    module.ends_with(".mlp.experts")
}

/// Whether `tensor` is one that PEFT knows by its parameter.
pub(super) fn is_declared(tensor: &str) -> bool {
    DECLARED.iter().any(|declared| tensor.ends_with(&format!("experts.{declared}")))
}

impl Fused {
    /// Those among the factors of an adapter.
    pub fn of(params: &Params, rank: usize) -> Self {
        let stacked = params.layout.tensors.iter().filter(|tensor| tensor.shape.len() == 3);
        let modules = stacked.filter_map(|tensor| tensor.name.strip_prefix(PREFIX)?.strip_suffix(A));
        let parts = modules.filter_map(|tensor| {
            let (module, name) = tensor.rsplit_once('.')?;
            Some((module.to_owned(), *DECLARED.iter().find(|declared| **declared == name)?))
        });
        let tensors: Vec<_> = parts.collect();
        let asked = tensors.iter().map(|(module, name)| format!("{module}.{name}")).collect();
        Self { rank, tensors, asked }
    }

    /// Those that an `adapter_config.json` names.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for a parameter that is none of these.
    pub fn read(path: &Path, config: &Map<String, Value>, rank: usize) -> Result<Self, ModelError> {
        let mut asked = Vec::new();
        for value in config.get("target_parameters").and_then(Value::as_array).into_iter().flatten() {
            let name = value.as_str().unwrap_or_default();
            if !is_declared(name) {
                let what = format!("an adapter on the parameter `{name}`");
                let hint = "; adapters of `experts.gate_up_proj` and `experts.down_proj` are".into();
                return Err(ModelError::Unsupported { path: path.to_owned(), what, hint });
            }
            asked.push(name.to_owned());
        }
        Ok(Self { rank, tensors: Vec::new(), asked })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.asked.is_empty()
    }

    /// Whether `module` is the name of one of the tensors.
    pub fn holds(&self, module: &str) -> bool {
        self.asked.iter().any(|asked| asked == module)
    }

    /// For `target_parameters`.
    pub fn parameters(&self) -> &[String] {
        &self.asked
    }

    /// Whether a tensor of PEFT's file is one of a stack.
    pub fn stacks(&self, name: &str) -> bool {
        self.parameter(name).is_some()
    }

    /// Module and tensor that `name`, a factor in PEFT's file, belongs to.
    fn parameter(&self, name: &str) -> Option<(String, &'static str)> {
        let at = name.strip_prefix(PREFIX)?;
        let at = at.strip_suffix(A).or_else(|| at.strip_suffix(B))?;
        let module = at.strip_suffix(".base_layer").unwrap_or(at);
        let on = |name: &&&str| {
            let full = format!("{module}.{name}");
            self.asked.iter().any(|asked| full == *asked || full.ends_with(&format!(".{asked}")))
        };
        // What the module declares last lies outermost.
        let mut targeted = DECLARED.iter().rev().filter(on);
        let tensor = targeted.nth(usize::from(at.len() > module.len()))?;
        Some((module.to_owned(), tensor))
    }

    /// PEFT's name of the module that has the factors of `tensor` in `module`.
    fn place(&self, module: &str, tensor: &str) -> String {
        let (at, last) = (self.tensors.iter().filter(|(m, _)| m == module), DECLARED[1]);
        match at.count() > 1 && tensor != last {
            true => format!("{PREFIX}{module}.base_layer"),
            false => format!("{PREFIX}{module}"),
        }
    }

    /// The factors as PEFT lays them out.
    pub fn pack(&self, params: &Params) -> Params {
        let mut out = Builder::default();
        for spec in &params.layout.tensors {
            let values = params.range_f32(spec.range());
            let stacked = spec.name.strip_prefix(PREFIX).and_then(|name| {
                let (name, a) = match name.strip_suffix(A) {
                    Some(name) => (name, true),
                    None => (name.strip_suffix(B)?, false),
                };
                let (module, tensor) = name.rsplit_once('.')?;
                self.holds(name).then_some((module, tensor, a))
            });
            let Some((module, tensor, a)) = stacked else {
                out.push(spec.name.clone(), spec.shape.clone(), spec, values);
                continue;
            };
            let (experts, place) = (spec.shape[0], self.place(module, tensor));
            let own = if a { [spec.shape[1], spec.shape[2]] } else { [spec.shape[2], spec.shape[1]] };
            let [rank, width] = own;
            // [E, r, width] either way.
            let by_rank = if a { values } else { transpose_each(&values, experts, width, rank) };
            // A stays A, unless in and out change places.
            match a != transposed(module) {
                true => out.push(format!("{place}{A}"), vec![experts * rank, width], spec, by_rank),
                false => {
                    let stack = transpose_each(&by_rank, 1, experts * rank, width);
                    let columns = stack.chunks_exact(experts * rank).flat_map(|row| {
                        let column = move |i: usize| row[i % experts * rank + i / experts];
                        (0..experts * rank).map(column)
                    });
                    out.push(format!("{place}{B}"), vec![width, rank * experts], spec, columns.collect());
                }
            }
        }
        out.finish()
    }

    /// From PEFT's layout to factors of each expert.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] if the two factors of a stack are of different lengths.
    pub fn unpack(&self, path: &Path, params: Params) -> Result<Params, ModelError> {
        let mut out = Builder::default();
        for spec in &params.layout.tensors {
            let values = params.range_f32(spec.range());
            let Some((module, tensor)) = self.parameter(&spec.name) else {
                out.push(spec.name.clone(), spec.shape.clone(), spec, values);
                continue;
            };
            let is_a = spec.name.ends_with(A);
            let (stack, width) =
                if is_a { (spec.shape[0], spec.shape[1]) } else { (spec.shape[1], spec.shape[0]) };
            let (rank, experts) = (self.rank, stack / self.rank);
            let by_rank = match is_a {
                true => values,
                // [width, r, E] to [E, r, width].
                false => (0..stack * width)
                    .map(|i| values[i % width * stack + i / width % rank * experts + i / width / rank])
                    .collect(),
            };
            let name = format!("{PREFIX}{module}.{tensor}");
            match is_a != transposed(&module) {
                true => out.push(format!("{name}{A}"), vec![experts, rank, width], spec, by_rank),
                false => {
                    let values = transpose_each(&by_rank, experts, rank, width);
                    out.push(format!("{name}{B}"), vec![experts, width, rank], spec, values);
                }
            }
        }
        let params = out.finish();
        for tensor in params.layout.tensors.iter().filter(|tensor| tensor.shape.len() == 3) {
            let other = match tensor.name.strip_suffix(A) {
                Some(name) => format!("{name}{B}"),
                None => format!("{}{A}", tensor.name.trim_end_matches(B)),
            };
            if params.layout.get(&other).is_none_or(|other| other.shape[0] != tensor.shape[0]) {
                let what = format!("{}: its two factors are not for as many experts", tensor.name);
                return Err(ModelError::Invalid { path: path.to_owned(), what });
            }
        }
        Ok(params)
    }
}

/// `[count, rows, cols]` to `[count, cols, rows]`.
fn transpose_each(values: &[f32], count: usize, rows: usize, cols: usize) -> Vec<f32> {
    let each = values.chunks_exact(rows * cols).take(count);
    each.flat_map(|matrix| (0..rows * cols).map(move |i| matrix[i % rows * cols + i / rows])).collect()
}

/// Tensors one after the other.
#[derive(Default)]
struct Builder {
    tensors: Vec<TensorSpec>,
    values: Vec<f32>,
}

impl Builder {
    fn push(&mut self, name: String, shape: Vec<usize>, like: &TensorSpec, values: Vec<f32>) {
        let offset = self.values.len();
        self.tensors.push(TensorSpec { name, shape, offset, kind: like.kind });
        self.values.extend(values);
    }

    fn finish(self) -> Params {
        let layout = ParamLayout { total: self.values.len(), tensors: self.tensors };
        Params { layout: Arc::new(layout), data: ParamData::F32(self.values) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::params::TensorKind;

    const EXPERTS: usize = 3;
    const RANK: usize = 2;

    /// Factors for both tensors of `module`, and for one matrix.
    fn factors(module: &str) -> Params {
        let mut out = Builder::default();
        let mut push = |name: String, shape: Vec<usize>| {
            let like = TensorSpec { name: String::new(), shape: vec![], offset: 0, kind: TensorKind::Expert };
            let values =
                (0..shape.iter().product()).map(|i: usize| ((i + name.len()) as f32).sin()).collect();
            out.push(name, shape, &like, values);
        };
        for (name, rows, cols) in [("gate_up_proj", 4, 6), ("down_proj", 5, 4)] {
            push(format!("{PREFIX}{module}.{name}{A}"), vec![EXPERTS, RANK, cols]);
            push(format!("{PREFIX}{module}.{name}{B}"), vec![EXPERTS, rows, RANK]);
        }
        push(format!("{PREFIX}q_proj{A}"), vec![RANK, 7]);
        push(format!("{PREFIX}q_proj{B}"), vec![3, RANK]);
        out.finish()
    }

    fn values(params: &Params, name: &str) -> (Vec<usize>, Vec<f32>) {
        let spec = params.layout.get(name).unwrap_or_else(|| panic!("no {name}"));
        (spec.shape.clone(), params.range_f32(spec.range()))
    }

    /// `get_delta_weight` of PEFT's `ParamWrapper`, without its scale: einsum "o r e, e r i -> e o i", or "-> e i o".
    fn delta(packed: &Params, place: &str, transposed: bool) -> Vec<f32> {
        let ((shape_a, a), (shape_b, b)) =
            (values(packed, &format!("{place}{A}")), values(packed, &format!("{place}{B}")));
        let (inputs, outputs) = (shape_a[1], shape_b[0]);
        assert_eq!((shape_a[0], shape_b[1]), (EXPERTS * RANK, EXPERTS * RANK));
        let at = |e: usize, o: usize, i: usize| -> f32 {
            let terms =
                (0..RANK).map(|r| b[o * RANK * EXPERTS + r * EXPERTS + e] * a[(e * RANK + r) * inputs + i]);
            terms.sum()
        };
        let (rows, cols) = if transposed { (inputs, outputs) } else { (outputs, inputs) };
        let cell = |i: usize| (i / (rows * cols), i / cols % rows, i % cols);
        let one = |(e, row, col)| if transposed { at(e, col, row) } else { at(e, row, col) };
        (0..EXPERTS * rows * cols).map(|i| one(cell(i))).collect()
    }

    #[test]
    fn peft_computes_the_same_update_from_the_packed_factors() {
        for (module, is_transposed) in [("m.1.feed_forward.experts", false), ("m.1.mlp.experts", true)] {
            let params = factors(module);
            let fused = Fused::of(&params, RANK);
            let packed = fused.pack(&params);
            assert_eq!(
                values(&packed, &format!("{PREFIX}q_proj{A}")),
                values(&params, &format!("{PREFIX}q_proj{A}"))
            );
            for (name, place, rows, cols) in [
                ("gate_up_proj", format!("{module}.base_layer"), 4, 6),
                ("down_proj", module.to_owned(), 5, 4),
            ] {
                let a = values(&params, &format!("{PREFIX}{module}.{name}{A}")).1;
                let b = values(&params, &format!("{PREFIX}{module}.{name}{B}")).1;
                let want = (0..EXPERTS * rows * cols).map(|i| {
                    let (e, row, col) = (i / (rows * cols), i / cols % rows, i % cols);
                    let term = |r: usize| b[(e * rows + row) * RANK + r] * a[(e * RANK + r) * cols + col];
                    (0..RANK).map(term).sum::<f32>()
                });
                let got = delta(&packed, &format!("{PREFIX}{place}"), is_transposed);
                assert_eq!(got, want.collect::<Vec<_>>(), "{module}.{name}");
            }
            // And back, by what a config says.
            let config = json!({ "target_parameters": ["experts.down_proj", "experts.gate_up_proj"] });
            let read = Fused::read(Path::new("c"), config.as_object().unwrap(), RANK).unwrap();
            let back = read.unpack(Path::new("f"), packed).unwrap();
            for tensor in &params.layout.tensors {
                assert_eq!(values(&back, &tensor.name), values(&params, &tensor.name), "{}", tensor.name);
            }
        }
    }

    #[test]
    fn other_parameters_are_refused_by_name() {
        let config = json!({ "target_parameters": ["mixer.weight"] });
        let Err(error) = Fused::read(Path::new("c"), config.as_object().unwrap(), RANK) else {
            panic!("read")
        };
        assert!(error.to_string().contains("mixer.weight"), "{error}");
    }
}
