//! Models by name: `org/name` or `org/name@revision`, from the Hugging Face hub.
//!
//! ```text
//! org/name ─► what main is now (a commit) ─► files that are not in the cache yet ─► the snapshot's folder
//!               │ no network, or HF_HUB_OFFLINE=1
//!               └► the commit the cache last saw as main, if all its files are there
//! ```
//!
//! All files come from one commit, and the cache is the one that Python's `huggingface_hub` uses: `HF_HUB_CACHE`, else
//! `HF_HOME/hub`, else `~/.cache/huggingface/hub`. `HF_ENDPOINT` names another hub, `HF_TOKEN` opens gated models. Only
//! safetensors, or a repository's single GGUF file, are fetched; nothing that is fetched is ever executed.

#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod select;

use std::path::{Path, PathBuf};

/// A model on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit; `main` if none was given.
    pub revision: String,
}

impl HubName {
    /// The name that `path` is, if it can be one: two parts and perhaps a revision, and no folder of the first part's name (a
    /// mistyped path must not reach out to the network).
    pub fn parse(path: &Path) -> Option<Self> {
        let text = path.to_str()?;
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = repo.split_once('/')?;
        let plain = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let known = [org, name, revision].into_iter().all(plain) && !text.contains("..");
        (known && !Path::new(org).exists())
            .then(|| Self { repo: repo.to_owned(), revision: revision.to_owned() })
    }

    /// The model's folder in the cache, its missing files fetched.
    ///
    /// # Errors
    /// As bad input (exit code 78): no network, no such model, no access, no weights that can be read.
    #[cfg(feature = "hub")]
    pub fn fetch(&self) -> anyhow::Result<PathBuf> {
        download::fetch(self)
    }

    /// Says that this build cannot download.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "hub"))]
    pub fn fetch(&self) -> anyhow::Result<PathBuf> {
        use crate::cli::fail::Explain as _;
        Err(anyhow::anyhow!("{} is no folder, and this build has no `hub` feature to download it", self.repo))
            .input_hint(self.by_hand())
    }

    /// How to get the model without this program.
    fn by_hand(&self) -> String {
        format!(
            "without network: `hf download {0} --local-dir {0}` on another machine, copy the folder here, and give its path",
            self.repo
        )
    }
}

/// `path` with the commit that was loaded from `source`, if it is a name on the hub: every role and every resumption of a run
/// must get the same files.
pub fn pinned(path: &str, source: &Path) -> Option<String> {
    let name = HubName::parse(Path::new(path))?;
    let commit = source.file_name()?.to_str()?;
    let is_commit = commit.len() >= 7 && commit.bytes().all(|b| b.is_ascii_hexdigit());
    let in_cache = source.parent()?.file_name()? == "snapshots";
    (is_commit && in_cache).then(|| format!("{}@{commit}", name.repo))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_plain_parts_are_a_name() {
        let parse = |text: &str| HubName::parse(Path::new(text)).map(|name| (name.repo, name.revision));
        let name = |repo: &str, revision: &str| Some((repo.to_owned(), revision.to_owned()));
        assert_eq!(parse("org/name-1.5B"), name("org/name-1.5B", "main"));
        assert_eq!(parse("org/name@0a1b2c3"), name("org/name", "0a1b2c3"));
        let bad = [
            "name", "a/b/c", "/a/b", "./a", "../a", "a/..", "a/b@", "a/b@../x", "a b/c", "a/b?x", "", "a/",
            "src/none",
        ];
        for bad in bad {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_run_is_pinned_to_the_commit_it_loaded() {
        let source = Path::new("/cache/models--org--m/snapshots/0123456789abcdef");
        assert_eq!(pinned("org/m", source), Some("org/m@0123456789abcdef".into()));
        assert_eq!(pinned("org/m@v1", source), Some("org/m@0123456789abcdef".into()));
        assert_eq!(pinned("/models/m", Path::new("/models/m")), None);
        assert_eq!(pinned("org/m", Path::new("org/m")), None);
    }
}
