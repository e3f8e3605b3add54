//! Weights as candle tensors, for programs that embed this crate.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use freewheel_types::WeightsDtype;

use super::elements::{Elements, fill};
use crate::error::ModelError;
use crate::params::{ParamData, ParamLayout, Params};

impl Params {
    /// The tensor called `name`, on the CPU, in the arena's element type; `None` if the model has none of that name.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] if candle cannot hold it.
    pub fn candle_tensor(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        let Some(tensor) = self.layout.get(name) else { return Ok(None) };
        let (range, shape) = (tensor.range(), tensor.shape.as_slice());
        let made = match &self.data {
            ParamData::F32(values) => Tensor::from_slice(&values[range], shape, &Device::Cpu),
            ParamData::Bf16(values) => Tensor::from_slice(&values[range], shape, &Device::Cpu),
        };
        made.map(Some).map_err(|e| invalid(name, &e))
    }

    /// Parameters of `layout` from tensors by checkpoint name, in any float type and on any device; others are ignored.
    ///
    /// # Errors
    /// [`ModelError::Invalid`] for a tensor that is missing, of another shape, or not finite.
    pub fn from_candle(
        layout: &Arc<ParamLayout>,
        tensors: &HashMap<String, Tensor>,
        dtype: WeightsDtype,
    ) -> Result<Self, ModelError> {
        fill(Path::new("tensors"), layout, dtype, |spec| {
            let missing =
                || ModelError::Invalid { path: (&spec.name).into(), what: "this tensor is missing".into() };
            let tensor = tensors.get(&spec.name).ok_or_else(missing)?;
            if tensor.dims() != spec.shape.as_slice() {
                let what = format!("shape {:?} where {:?} is due", tensor.dims(), spec.shape);
                return Err(ModelError::Invalid { path: (&spec.name).into(), what });
            }
            let values =
                tensor.to_device(&Device::Cpu).and_then(|t| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1());
            values.map(Elements::Decoded).map_err(|e| invalid(&spec.name, &e))
        })
    }
}

fn invalid(name: &str, error: &candle_core::Error) -> ModelError {
    ModelError::Invalid { path: name.into(), what: error.to_string() }
}
