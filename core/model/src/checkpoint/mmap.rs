//! The one place outside the kernels that needs `unsafe`: mapping a checkpoint file.
#![expect(unsafe_code, reason = "memory mapping is unsafe by nature: another process may change the file")]

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::ModelError;

/// Maps `path` for reading.
///
/// The file must not shrink while it is mapped; that is why checkpoints are written beside their final name and renamed
/// in, never changed in place.
///
/// # Errors
/// [`ModelError::File`] if it cannot be opened or mapped.
pub(super) fn map(path: &Path) -> Result<Mmap, ModelError> {
    let error = |what: &str, source| ModelError::File {
        path: path.to_owned(),
        what: what.into(),
        source: Some(source),
    };
    let file = File::open(path).map_err(|e| error("cannot open the weights", e))?;
    // SAFETY: the map is read-only and private to this process. Bytes that another process changes under us would at
    // worst be read as other numbers: they are only ever viewed as `u8` and decoded by value.
    unsafe { Mmap::map(&file) }.map_err(|e| error("cannot map the weights", e))
}
