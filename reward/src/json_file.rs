//! Small JSON files that a command of ours wrote.

use std::path::Path;

use serde::de::DeserializeOwned;

/// Largest file that is read.
const BYTES_MAX: u64 = 256 << 20;

/// Reads what `command` wrote.
///
/// # Errors
/// If the file cannot be read, is too large, or is something else.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, command: &str) -> Result<T, String> {
    let shown = path.display();
    let unreadable = |e: std::io::Error| format!("{shown} cannot be read: {e}");
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > BYTES_MAX {
        return Err(format!("{shown} has {size} bytes, the limit is {BYTES_MAX}"));
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    serde_json::from_slice(&bytes).map_err(|e| format!("{shown} is no file of `{command}`: {e}"))
}
