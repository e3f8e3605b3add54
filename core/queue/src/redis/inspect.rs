//! Looks at a server's settings, for people who ask whether it will do.

use std::collections::BTreeMap;
use std::time::Duration;

use redis::RedisError;
use serde::Serialize;

use super::CONNECT;
use super::link::{Failure, Link, Request};
use crate::{QueueError, QueueSecret};

/// The oldest server whose scripts and streams do what is needed.
const VERSION_MIN: (u32, u32) = (7, 0);

/// What a server is and how it is set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServerReport {
    /// The address, without a password.
    pub address: String,
    /// "redis" or "valkey".
    pub server: String,
    /// Its version.
    pub version: String,
    /// Memory limit in bytes; 0 = none. `None` where the server does not tell.
    pub maxmemory: Option<u64>,
    /// What it does when the limit is reached.
    pub maxmemory_policy: Option<String>,
    /// Whether it keeps an append-only file.
    pub appendonly: Option<bool>,
    /// What is wrong or unwise, each with its cure.
    pub warnings: Vec<String>,
}

/// Reads version and settings of the server at `url`.
///
/// # Errors
/// [`QueueError::Unavailable`] if it does not answer within a few seconds.
pub async fn inspect(url: &QueueSecret) -> Result<ServerReport, QueueError> {
    let link = Link::open(url, CONNECT)?;
    let failed = |failure: Failure| failure.into_error("", link.address(), 0);
    let info = info(&link, CONNECT).await.map_err(failed)?;
    let mut settings = BTreeMap::new();
    for name in ["maxmemory", "maxmemory-policy", "appendonly", "appendfsync", "proto-max-bulk-len"] {
        let mut command = redis::cmd("CONFIG");
        command.arg("GET").arg(name);
        // A user without the right to ask is normal; then the setting is unknown.
        if let Ok(found) =
            link.call::<BTreeMap<String, String>>(Request::Command(&command), 0, "reading settings").await
        {
            settings.extend(found);
        }
    }
    Ok(report(link.address(), &info, &settings))
}

fn report(
    address: &str,
    info: &BTreeMap<String, String>,
    settings: &BTreeMap<String, String>,
) -> ServerReport {
    let setting = |name: &str| settings.get(name).cloned();
    let (server, version) = version_of(info);
    let report = ServerReport {
        address: address.to_owned(),
        server,
        version,
        maxmemory: setting("maxmemory").and_then(|bytes| bytes.parse().ok()),
        maxmemory_policy: setting("maxmemory-policy"),
        appendonly: setting("appendonly").map(|value| value == "yes"),
        warnings: Vec::new(),
    };
    let bulk: Option<u64> = setting("proto-max-bulk-len").and_then(|bytes| bytes.parse().ok());
    let checks = [
        (
            too_old(info),
            format!("{} {} is too old: install Redis 7.0+ or Valkey 7.2+", report.server, report.version),
        ),
        (
            report.maxmemory == Some(0),
            "maxmemory is unlimited: set it to twice queue.max_bytes plus the weights".into(),
        ),
        (
            report.maxmemory_policy.as_ref().is_some_and(|policy| policy != "noeviction"),
            "maxmemory-policy may throw rollouts away: set it to noeviction".into(),
        ),
        (
            report.appendonly == Some(false),
            "appendonly is off: a restart loses what is in flight; set it to yes".into(),
        ),
        (
            setting("appendfsync").is_some_and(|value| value != "everysec"),
            "appendfsync is not everysec: always stops the server when its disk is full, no may lose more"
                .into(),
        ),
        (
            bulk.is_some_and(|bulk| bulk < 16 << 20),
            "proto-max-bulk-len is below 16mb: large rollouts cannot pass".into(),
        ),
        (settings.is_empty(), "the settings may not be read by this user: check them on the server".into()),
    ];
    let warnings = checks.into_iter().filter(|(wrong, _)| *wrong).map(|(_, text)| text).collect();
    ServerReport { warnings, ..report }
}

/// Refuses servers that are too old to run the scripts.
pub(super) async fn check_version(link: &Link, limit: Duration) -> Result<(), Failure> {
    let info = match info(link, limit).await {
        Ok(info) => info,
        // An actor's user need not be allowed to ask.
        Err(failure) if failure.code() == "NOPERM" => return Ok(()),
        Err(failure) => return Err(failure),
    };
    if !too_old(&info) {
        return Ok(());
    }
    let (server, version) = version_of(&info);
    let detail = format!("{server} {version}; install Redis 7.0+ or Valkey 7.2+");
    let error = RedisError::from((redis::ErrorKind::Client, "the server is too old", detail));
    Err(Failure::Refused { error, what: "to run the scripts" })
}

async fn info(link: &Link, limit: Duration) -> Result<BTreeMap<String, String>, Failure> {
    let mut command = redis::cmd("INFO");
    command.arg("server");
    let text: String = link.call_within(limit, Request::Command(&command), 0, "connecting").await?;
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    Ok(pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

fn version_of(info: &BTreeMap<String, String>) -> (String, String) {
    let get = |name: &str| info.get(name).cloned();
    match get("valkey_version") {
        Some(version) => ("valkey".into(), version),
        None => ("redis".into(), get("redis_version").unwrap_or_else(|| "unknown".into())),
    }
}

/// `redis_version` is the level of compatibility, also on Valkey. An unknown version gets the benefit of the doubt.
fn too_old(info: &BTreeMap<String, String>) -> bool {
    let mut numbers =
        info.get("redis_version").into_iter().flat_map(|v| v.split('.')).map_while(|n| n.parse().ok());
    numbers.next().is_some_and(|major: u32| (major, numbers.next().unwrap_or(0)) < VERSION_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn unwise_settings_are_named_and_wise_ones_are_not() {
        let bad = report(
            "x",
            &map(&[("redis_version", "6.2.1")]),
            &map(&[("maxmemory", "0"), ("maxmemory-policy", "allkeys-lru"), ("appendonly", "no")]),
        );
        assert_eq!(bad.warnings.len(), 4, "{:?}", bad.warnings);
        let good = report(
            "x",
            &map(&[("redis_version", "7.2.4"), ("valkey_version", "9.1.2")]),
            &map(&[("maxmemory", "1000"), ("maxmemory-policy", "noeviction"), ("appendonly", "yes")]),
        );
        assert_eq!((good.server.as_str(), good.warnings.len()), ("valkey", 0), "{:?}", good.warnings);
    }
}
