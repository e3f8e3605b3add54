//! Images that prompts name by their files: read whole and checked where they are named.

use std::path::Path;

use freewheel_types::{ImagePart, MAX_IMAGE_BYTES};
use serde_json::Value;

/// Reads the image `path`; relative paths start at `folder`.
///
/// # Errors
/// That it cannot be read, is too big or is no image, in words.
pub fn read(path: &str, folder: &Path) -> Result<ImagePart, String> {
    let file = folder.join(path);
    let failed = |error: std::io::Error| format!("image {path}: cannot be read ({error})");
    let size = std::fs::metadata(&file).map_err(failed)?.len();
    if size > MAX_IMAGE_BYTES as u64 {
        return Err(format!("image {path}: {size} bytes, more than the limit of {MAX_IMAGE_BYTES}"));
    }
    let bytes = std::fs::read(&file).map_err(failed)?;
    freewheel_model::vision::check_image(&bytes).map_err(|what| format!("image {path}: {what}"))?;
    Ok(ImagePart::new(path, bytes))
}

/// Reads the images that `messages` name as `{"type": "image", "path": …}`, in order.
///
/// # Errors
/// As [`read`], or that an image part has no path.
pub fn of_messages(messages: &[Value], folder: &Path) -> Result<Vec<ImagePart>, String> {
    let parts = messages.iter().filter_map(|message| message.get("content")?.as_array()).flatten();
    parts
        .filter(|part| part.get("type").and_then(Value::as_str) == Some("image"))
        .map(|part| match part.get("path").and_then(Value::as_str) {
            Some(path) => read(path, folder),
            None => Err("an image part needs the `path` of its file".into()),
        })
        .collect()
}
