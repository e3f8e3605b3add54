//! Shared helpers of the whole-system tests.

use std::path::PathBuf;

/// The folder of reference values called `name`: `$FREEWHEEL_ORACLES/<name>`, or the fixtures that ship.
pub fn fixtures(name: &str) -> PathBuf {
    match std::env::var_os("FREEWHEEL_ORACLES") {
        Some(root) => PathBuf::from(root).join(name),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name),
    }
}
