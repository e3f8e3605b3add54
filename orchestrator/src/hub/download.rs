//! From a name to a folder in the cache.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::{HubName, select};
use crate::cli::fail::Explain as _;

const ENDPOINT: &str = "https://huggingface.co";
/// Tries again after a broken connection; what came before is kept.
const RETRIES: usize = 3;

/// See [`HubName::fetch`].
pub fn fetch(name: &HubName) -> anyhow::Result<PathBuf> {
    let cache = cache()?;
    let cached = || in_cache(&cache, name);
    if set("HF_HUB_OFFLINE")
        .is_some_and(|value| !["0", "false", "no"].contains(&value.to_lowercase().as_str()))
    {
        return cached()
            .ok_or_else(|| {
                anyhow!("{} is not in {}, and HF_HUB_OFFLINE is set", shown(name), cache.path().display())
            })
            .input_hint(format!("unset HF_HUB_OFFLINE; {}", name.by_hand()));
    }
    if is_commit(&name.revision)
        && let Some(folder) = cached()
    {
        return Ok(folder);
    }
    let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
    let api = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(endpoint.trim_end_matches('/').to_owned())
        .with_token(set("HF_TOKEN").or_else(|| cache.token()))
        .with_retries(RETRIES)
        .with_progress(std::io::stderr().is_terminal())
        .with_user_agent("freewheel", env!("CARGO_PKG_VERSION"))
        .build()
        .input()?;
    let info = match api.repo(repo(name, &name.revision)).info() {
        Ok(info) => info,
        Err(error) => {
            if let (None, Some(folder)) = (status(&error), cached()) {
                tracing::warn!(model = shown(name), %error, "the hub does not answer, using what the cache holds");
                return Ok(folder);
            }
            return Err(explain(error, name, &endpoint));
        }
    };
    if !is_commit(&info.sha) {
        return Err(anyhow!("{endpoint} gave {:?} as the commit of {}", info.sha, shown(name))).input();
    }
    let files: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    let unusable = |what: String| anyhow!("{} {what}", shown(name));
    let pinned = api.repo(repo(name, &info.sha));
    let folder = cache.repo(repo(name, &info.sha)).pointer_path(&info.sha);
    let get =
        |file: &str| fetch_file(&pinned, &folder, file).map_err(|error| explain(error, name, &endpoint));
    for file in select::first(&files).map_err(unusable).input()? {
        get(file)?;
    }
    let index = folder.join(select::INDEX);
    if index.is_file() {
        let shards = select::shards(&index).map_err(unusable).input()?;
        if let Some(missing) = shards.iter().find(|shard| !files.contains(shard)) {
            return Err(unusable(format!("lacks {missing}, which its index names"))).input();
        }
        shards.iter().try_for_each(|shard| get(shard))?;
    }
    // Only now: whoever finds the reference finds all files.
    cache
        .repo(repo(name, &name.revision))
        .create_ref(&info.sha)
        .with_context(|| format!("{} cannot be written", cache.path().display()))?;
    Ok(folder)
}

fn fetch_file(pinned: &ApiRepo, folder: &Path, file: &str) -> Result<(), ApiError> {
    let path = folder.join(file);
    if path.is_file() {
        return Ok(());
    }
    tracing::info!(file, "downloading");
    pinned.download(file)?;
    if path.is_file() {
        return Ok(());
    }
    // The repository changed its mind about which commit this is.
    Err(ApiError::InvalidHeader("x-repo-commit"))
}

/// The snapshot the cache holds of `name`, if it is whole.
fn in_cache(cache: &Cache, name: &HubName) -> Option<PathBuf> {
    let repo = repo(name, &name.revision);
    let refs = cache.path().join(repo.folder_name()).join("refs").join(&name.revision);
    let commit = match std::fs::read_to_string(refs) {
        Ok(commit) => commit.trim().to_owned(),
        Err(_) => name.revision.clone(),
    };
    let folder = cache.repo(repo).pointer_path(&commit);
    (is_commit(&commit) && select::is_complete(&folder)).then_some(folder)
}

fn repo(name: &HubName, revision: &str) -> Repo {
    Repo::with_revision(name.repo.clone(), RepoType::Model, revision.to_owned())
}

fn shown(name: &HubName) -> String {
    match name.revision.as_str() {
        "main" => name.repo.clone(),
        revision => format!("{}@{revision}", name.repo),
    }
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

fn set(variable: &str) -> Option<String> {
    std::env::var(variable).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// The cache that `huggingface_hub` would use.
fn cache() -> anyhow::Result<Cache> {
    let under = |variable: &str, rest: &str| Some(Path::new(&set(variable)?).join(rest));
    under("HF_HUB_CACHE", "")
        .or_else(|| under("HF_HOME", "hub"))
        .or_else(|| under("XDG_CACHE_HOME", "huggingface/hub"))
        .or_else(|| under("HOME", ".cache/huggingface/hub"))
        .map(std::path::absolute)
        .transpose()?
        .map(Cache::new)
        .ok_or_else(|| anyhow!("there is no place for downloads: neither HF_HOME nor HOME is set"))
        .input()
}

/// The status a hub answered with, if it answered.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

fn explain(error: ApiError, name: &HubName, endpoint: &str) -> anyhow::Error {
    let (repo, access) = (&name.repo, set("HF_TOKEN").is_some());
    let hint = match status(&error) {
        Some(401 | 403) if access => format!("HF_TOKEN may not read it: ask for access at {endpoint}/{repo}"),
        Some(401 | 403) => {
            format!(
                "the name is wrong, or the model is private or gated: set HF_TOKEN ({endpoint}/settings/tokens)"
            )
        }
        Some(404) => {
            format!("there is no such model or revision at {endpoint}; a local model is given by its folder")
        }
        Some(_) => format!("{endpoint} refused; try again later. {}", name.by_hand()),
        None if matches!(error, ApiError::IoError(_)) => {
            format!("is there room in the cache? {}", name.by_hand())
        }
        None => format!("{endpoint} cannot be reached. {}", name.by_hand()),
    };
    let failed = Err::<(), _>(error).with_context(|| format!("{} cannot be downloaded", shown(name)));
    failed.input_hint(hint).expect_err("it is an error")
}
