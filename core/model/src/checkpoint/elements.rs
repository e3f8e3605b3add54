//! From stored elements to the arena: one conversion, one check for values that are not numbers.

use std::path::Path;
use std::sync::Arc;

use freewheel_types::WeightsDtype;
use half::{bf16, f16};

use super::mxfp4::Mxfp4;
use crate::error::ModelError;
use crate::params::{ParamData, ParamLayout, Params, TensorSpec};

/// The elements of one tensor as a file holds them, little-endian.
pub(super) enum Elements<'a> {
    /// 32-bit floats.
    F32(&'a [u8]),
    /// IEEE half precision.
    F16(&'a [u8]),
    /// bfloat16.
    Bf16(&'a [u8]),
    /// Four-bit floats in blocks.
    Mxfp4(Mxfp4<'a>),
    /// Already decoded.
    Decoded(Vec<f32>),
}

/// An element type of the arena.
trait Store: Copy {
    fn narrow(value: f32) -> Self;
    fn finite(self) -> bool;
}

impl Store for f32 {
    fn narrow(value: f32) -> Self {
        value
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
}

impl Store for bf16 {
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
}

impl Elements<'_> {
    fn len(&self) -> usize {
        match self {
            Elements::F32(bytes) => bytes.len() / 4,
            Elements::F16(bytes) | Elements::Bf16(bytes) => bytes.len() / 2,
            Elements::Mxfp4(packed) => packed.len(),
            Elements::Decoded(values) => values.len(),
        }
    }

    /// All elements, decoded.
    pub(super) fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.copy_to(&mut out);
        out
    }

    /// Writes all elements to `out`; those that are not finite, if any.
    fn copy_to<T: Store>(&self, out: &mut [T]) -> Option<Unsound> {
        match self {
            Elements::F32(bytes) => store(out, bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
            Elements::F16(bytes) => {
                store(out, bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()))
            }
            Elements::Bf16(bytes) => {
                store(out, bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()))
            }
            Elements::Mxfp4(packed) => {
                packed.for_each(|at, value| out[at] = T::narrow(value));
                Unsound::of(out)
            }
            Elements::Decoded(values) => store(out, values.iter().copied()),
        }
    }
}

/// Elements that are not finite.
struct Unsound {
    first: usize,
    count: usize,
}

impl Unsound {
    fn of<T: Store>(values: &[T]) -> Option<Self> {
        let first = values.iter().position(|value| !value.finite())?;
        Some(Self { first, count: values.iter().filter(|value| !value.finite()).count() })
    }
}

fn store<T: Store>(out: &mut [T], values: impl Iterator<Item = f32>) -> Option<Unsound> {
    let mut all_finite = true;
    for (slot, value) in out.iter_mut().zip(values) {
        *slot = T::narrow(value);
        all_finite &= slot.finite();
    }
    if all_finite { None } else { Unsound::of(out) }
}

/// Fills an arena of `layout`, tensor by tensor, with what `read` returns for it.
///
/// # Errors
/// What `read` returns; [`ModelError::Invalid`] for a tensor of the wrong length, or one that holds NaN or infinity
/// (also one that becomes infinite in bfloat16): such a model would poison every rollout.
pub(super) fn fill<'a>(
    path: &Path,
    layout: &Arc<ParamLayout>,
    dtype: WeightsDtype,
    read: impl FnMut(&TensorSpec) -> Result<Elements<'a>, ModelError>,
) -> Result<Params, ModelError> {
    let data = match dtype {
        WeightsDtype::F32 => ParamData::F32(fill_arena(path, layout, 0.0, read)?),
        WeightsDtype::Bf16 => ParamData::Bf16(fill_arena(path, layout, bf16::ZERO, read)?),
    };
    Ok(Params { layout: layout.clone(), data })
}

fn fill_arena<'a, T: Store>(
    path: &Path,
    layout: &ParamLayout,
    zero: T,
    mut read: impl FnMut(&TensorSpec) -> Result<Elements<'a>, ModelError>,
) -> Result<Vec<T>, ModelError> {
    let mut arena = vec![zero; layout.total];
    for tensor in &layout.tensors {
        let elements = read(tensor)?;
        let invalid = |what| ModelError::Invalid { path: path.to_owned(), what };
        if elements.len() != tensor.len() {
            let what =
                format!("{}: {} elements where {} are expected", tensor.name, elements.len(), tensor.len());
            return Err(invalid(what));
        }
        if let Some(Unsound { first, count }) = elements.copy_to(&mut arena[tensor.range()]) {
            let what = format!(
                "{}: {count} of {} elements are NaN, infinite or too large for {}, the first is element {first}; \
                 the checkpoint is damaged",
                tensor.name,
                tensor.len(),
                if size_of::<T>() == 2 { "bfloat16 (load it as f32)" } else { "a finite float" }
            );
            return Err(invalid(what));
        }
    }
    Ok(arena)
}
