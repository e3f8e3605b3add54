//! Models that all stacks of a process share: weights are large.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use freewheel_model::ModelError;

/// A folder as it was when its newest file changed.
type Key = (PathBuf, Option<SystemTime>);

/// What is loaded, by folder.
pub(crate) struct Shared<T>(Mutex<BTreeMap<Key, Weak<T>>>);

impl<T> Shared<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// What lies in `dir`; loaded if nobody holds it, or if its files changed since.
    pub(crate) fn load(
        &self,
        dir: &Path,
        load: impl FnOnce(&Path) -> Result<T, ModelError>,
    ) -> Result<Arc<T>, ModelError> {
        let changed = std::fs::read_dir(dir)
            .ok()
            .and_then(|entries| entries.flatten().filter_map(|e| e.metadata().ok()?.modified().ok()).max());
        let key = (dir.canonicalize().unwrap_or_else(|_| dir.to_owned()), changed);
        // Held while loading, so that two stacks do not load the same model at once.
        let mut loaded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = loaded.get(&key).and_then(Weak::upgrade) {
            return Ok(held);
        }
        let fresh = Arc::new(load(dir)?);
        loaded.retain(|_, weak| weak.strong_count() > 0);
        loaded.insert(key, Arc::downgrade(&fresh));
        Ok(fresh)
    }
}

/// An error with its cause.
pub(crate) fn chain(error: &ModelError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
