//! Which files of a repository make a model.

use std::path::Path;

use serde_json::Value;

/// Index of sharded weights.
pub const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const CONFIG: &str = "config.json";
/// Small files, fetched where they are.
const BESIDE: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
];
/// Indexes of the largest models have some MB.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// The files to fetch first: everything but shards.
///
/// # Errors
/// Why there is no model that can be read, if so.
pub fn first(files: &[String]) -> Result<Vec<&str>, String> {
    let there = |name: &str| files.iter().any(|file| file == name);
    let mut wanted: Vec<&str> = BESIDE.into_iter().filter(|name| there(name)).collect();
    let ggufs: Vec<&String> =
        files.iter().filter(|file| file.ends_with(".gguf") && !file.contains('/')).collect();
    match (there(CONFIG), there(INDEX), there(SINGLE), ggufs.as_slice()) {
        (true, _, true, _) => wanted.extend([CONFIG, SINGLE]),
        (true, true, false, _) => wanted.extend([CONFIG, INDEX]),
        (_, false, false, [one]) => return Ok(vec![one]),
        (_, false, false, [_, _, ..]) => {
            return Err(format!(
                "holds {} .gguf files and no safetensors: download one and give its path",
                ggufs.len()
            ));
        }
        (false, ..) => return Err(format!("has no {CONFIG}")),
        (true, ..) if files.iter().any(|file| file.ends_with(".bin") || file.ends_with(".pth")) => {
            return Err(
                "has its weights as pickles only, which are not read: find one with safetensors".into()
            );
        }
        (true, ..) => return Err(format!("has neither {SINGLE} nor {INDEX}")),
    }
    Ok(wanted)
}

/// The shards that the index at `path` names.
///
/// # Errors
/// What is wrong with it.
pub fn shards(path: &Path) -> Result<Vec<String>, String> {
    let size = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > INDEX_BYTES_MAX {
        return Err(format!("its {INDEX} has {size} bytes, more than {INDEX_BYTES_MAX}"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let json: Value =
        serde_json::from_str(&text).map_err(|error| format!("its {INDEX} is not JSON: {error}"))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| format!("its {INDEX} has no weight_map"))?;
    let mut files = Vec::new();
    for (tensor, file) in map {
        // A name from outside must not lead out of the folder.
        match file.as_str() {
            Some(file) if !file.contains(['/', '\\']) && file.ends_with(".safetensors") => {
                files.push(file.to_owned())
            }
            _ => return Err(format!("its {INDEX} says that {tensor} is in {file}, which is no file name")),
        }
    }
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

/// Whether `folder` holds a whole model.
pub fn is_complete(folder: &Path) -> bool {
    let there = |name: &str| folder.join(name).is_file();
    if !there(CONFIG) {
        let is_gguf = |entry: &std::fs::DirEntry| entry.path().extension().is_some_and(|end| end == "gguf");
        return std::fs::read_dir(folder).is_ok_and(|entries| entries.flatten().filter(is_gguf).count() == 1);
    }
    there(SINGLE) || shards(&folder.join(INDEX)).is_ok_and(|shards| shards.iter().all(|shard| there(shard)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_come_as_one_file_or_as_the_indexed_shards_or_as_one_gguf() {
        let first = |files: &[&str]| {
            let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
            first(&files).map(|wanted| wanted.join(" "))
        };
        assert_eq!(
            first(&["README.md", "config.json", "model.safetensors", "tokenizer.json", "x.gguf"]).unwrap(),
            "tokenizer.json config.json model.safetensors"
        );
        assert_eq!(
            first(&["config.json", INDEX, "model-1.safetensors"]).unwrap(),
            format!("config.json {INDEX}")
        );
        assert_eq!(first(&["README.md", "q8.gguf"]).unwrap(), "q8.gguf");
        assert!(first(&["a.gguf", "b.gguf"]).unwrap_err().contains("2 .gguf files"));
        assert!(first(&["config.json", "pytorch_model.bin"]).unwrap_err().contains("pickles"));
        assert!(first(&["config.json"]).unwrap_err().contains("neither"));
        assert!(first(&["README.md"]).unwrap_err().contains("no config.json"));
    }

    #[test]
    fn an_index_cannot_lead_out_of_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join(INDEX);
        let with = |text: &str| {
            std::fs::write(&index, text).unwrap();
            shards(&index)
        };
        assert_eq!(
            with(r#"{"weight_map": {"b": "2.safetensors", "a": "1.safetensors", "c": "2.safetensors"}}"#)
                .unwrap(),
            ["1.safetensors", "2.safetensors"]
        );
        for bad in ["../x.safetensors", "/x.safetensors", "x.bin"] {
            assert!(
                with(&format!(r#"{{"weight_map": {{"a": "{bad}"}}}}"#)).unwrap_err().contains("no file name")
            );
        }
        assert!(with("[]").unwrap_err().contains("no weight_map"));
        std::fs::write(dir.path().join(CONFIG), "{}").unwrap();
        with(r#"{"weight_map": {"a": "1.safetensors"}}"#).unwrap();
        assert!(!is_complete(dir.path()));
        std::fs::write(dir.path().join("1.safetensors"), "").unwrap();
        assert!(is_complete(dir.path()));
    }
}
