//! One model format into another: whatever [`load_any`] reads, as a folder in Hugging Face's layout.

use std::path::{Path, PathBuf};

use freewheel_types::WeightsDtype;

use super::{SaveOptions, load_any, save};
use crate::error::ModelError;

/// Reads the model at `from` and writes it to the folder `to`, in `dtype` or as stored. Returns the files written.
///
/// # Errors
/// Those of [`load_any`] and [`save`]; [`ModelError::Invalid`] if both are the same folder.
pub fn convert(
    from: &Path,
    to: &Path,
    dtype: Option<WeightsDtype>,
    options: &SaveOptions,
) -> Result<Vec<PathBuf>, ModelError> {
    if let (Ok(a), Ok(b)) = (from.canonicalize(), to.canonicalize())
        && a == b
    {
        return Err(ModelError::Invalid {
            path: to.to_owned(),
            what: "is the source too; give another folder".into(),
        });
    }
    let model = load_any(from, dtype)?;
    save(to, &model, &model.params, options)
}
