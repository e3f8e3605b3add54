//! Golden values: JSON cases and tensors.

use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::Value;

/// One folder of golden values.
pub struct Oracle {
    bytes: Vec<u8>,
    /// `cases.json`.
    pub cases: Value,
}

/// `FREEWHEEL_ORACLES`, or the copy in the repository.
pub fn root() -> PathBuf {
    let fixtures = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    std::env::var_os("FREEWHEEL_ORACLES").map_or_else(fixtures, PathBuf::from)
}

impl Oracle {
    /// The folder `NAME/`, or the files `NAME.json` and `NAME.safetensors`, in `FREEWHEEL_ORACLES` or the copy in the repository.
    pub fn open(name: &str) -> Self {
        let folder = root();
        let read = |file: &str| {
            std::fs::read(folder.join(file))
                .unwrap_or_else(|error| panic!("{}/{file}: {error}", folder.display()))
        };
        let (cases, tensors) = match folder.join(name).is_dir() {
            true => (format!("{name}/cases.json"), format!("{name}/tensors.safetensors")),
            false => (format!("{name}.json"), format!("{name}.safetensors")),
        };
        Self { bytes: read(&tensors), cases: serde_json::from_slice(&read(&cases)).unwrap() }
    }

    /// A tensor as f64 with its shape.
    pub fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let data = view.data();
        let values = match view.dtype() {
            safetensors::Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            safetensors::Dtype::F32 => {
                data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
            }
            safetensors::Dtype::I64 => {
                data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect()
            }
            safetensors::Dtype::BF16 => {
                let wide = |b: &[u8; 2]| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16));
                data.as_chunks().0.iter().map(wide).collect()
            }
            other => panic!("{name} is {other:?}"),
        };
        (view.shape().to_vec(), values)
    }

    /// The values of a tensor.
    pub fn values(&self, name: &str) -> Vec<f64> {
        self.tensor(name).1
    }
}

/// Largest absolute difference; infinite if a value is NaN or the lengths differ.
pub fn max_diff(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let worst = |worst: f64, (a, b): (&f64, &f64)| {
        if (a - b).is_nan() { f64::INFINITY } else { worst.max((a - b).abs()) }
    };
    a.iter().zip(b).fold(0.0, worst)
}
