//! `[queue]`: which backend, and its bounds.

use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which backend carries rollouts and weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Channels in one process; needs nothing.
    #[default]
    Memory,
    /// Redis 7.0+ or Valkey 7.2+; roles are separate processes.
    Redis,
}

/// The `[queue]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct QueueConfig {
    /// "memory" (everything in one process) or "redis".
    pub backend: Backend,
    /// Where Redis is: `redis://host:port/db`, `rediss://…`, `unix:///path/to.sock`, or "managed" to start a
    /// private server found on the PATH. Only used with `backend = "redis"`.
    pub url: QueueSecret,
    /// Payload bytes the rollout streams may hold before actors are told to wait. Bytes, default 256 MiB.
    pub max_bytes: u64,
    /// Entries a rollout stream may hold before actors are told to wait. Default 65536.
    pub max_len: u64,
    /// How long a leased task or rollout stays with a worker that shows no life. Seconds, default 60.
    pub lease_s: f64,
    /// Deliveries of one task before it is given up and its prompt quarantined. Default 3.
    pub max_deliveries: u32,
    /// How long the learner's lease lasts without renewal. Seconds, default 15.
    pub learner_lease_s: f64,
    /// How long one command may take before it counts as failed. Seconds, default 10.
    pub timeout_s: f64,
    /// Published versions kept for late joiners. Default 3.
    pub keep_versions: u32,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            backend: Backend::Memory,
            url: QueueSecret("managed".into()),
            max_bytes: 256 << 20,
            max_len: 65_536,
            lease_s: 60.0,
            max_deliveries: 3,
            learner_lease_s: 15.0,
            timeout_s: 10.0,
            keep_versions: 3,
        }
    }
}

impl QueueConfig {
    /// Everything that is out of range, as `(key, what is wrong)`; empty if all is well.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let seconds = |key, value: f64| {
            let ok = (0.001..=1e6).contains(&value);
            (!ok).then(|| (key, format!("{value} seconds is outside 0.001 to 1000000")))
        };
        let at_least =
            |key, value: u64, min: u64| (value < min).then(|| (key, format!("{value} is below {min}")));
        let no_url = self.backend == Backend::Redis && self.url.0.is_empty();
        [
            seconds("lease_s", self.lease_s),
            seconds("learner_lease_s", self.learner_lease_s),
            seconds("timeout_s", self.timeout_s),
            at_least("max_bytes", self.max_bytes, 1 << 16),
            at_least("max_len", self.max_len, 1),
            at_least("max_deliveries", self.max_deliveries.into(), 1),
            at_least("keep_versions", self.keep_versions.into(), 1),
            no_url.then(|| {
                ("url", "is empty: give redis://host:port, unix:///path/to.sock or \"managed\"".into())
            }),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// How long a leased task or rollout is left alone.
    pub(crate) fn lease(&self) -> Duration {
        duration(self.lease_s)
    }

    /// How long the learner's lease lasts.
    pub(crate) fn learner_lease(&self) -> Duration {
        duration(self.learner_lease_s)
    }

    /// How long a command may take.
    pub(crate) fn timeout(&self) -> Duration {
        duration(self.timeout_s)
    }
}

/// Seconds as a duration; nonsense, which [`QueueConfig::problems`] names, becomes none at all.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.min(1e6)).unwrap_or_default()
}

/// An address that may hold a password: its `Debug` and `Display` leave the password out.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct QueueSecret(pub String);

impl fmt::Display for QueueSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.find("://"), self.0.rfind('@')) {
            (Some(scheme), Some(at)) if scheme + 3 <= at => {
                write!(f, "{}***{}", &self.0[..scheme + 3], &self.0[at..])
            }
            _ => f.write_str(&self.0),
        }
    }
}

impl fmt::Debug for QueueSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_is_named_and_none_panics() {
        assert_eq!(QueueConfig::default().problems(), []);
        let bad = QueueConfig {
            lease_s: f64::NAN,
            timeout_s: -1.0,
            learner_lease_s: 1e300,
            max_len: 0,
            ..Default::default()
        };
        let keys: Vec<&str> = bad.problems().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["lease_s", "learner_lease_s", "timeout_s", "max_len"]);
        assert_eq!((bad.timeout(), bad.learner_lease()), (Duration::ZERO, Duration::from_secs(1_000_000)));
        let _ = bad.lease();
    }

    #[test]
    fn a_password_never_shows() {
        let url = QueueSecret("redis://:canary@10.0.0.1:6379/0".into());
        assert_eq!(format!("{url}"), "redis://***@10.0.0.1:6379/0");
        assert!(!format!("{url:?}").contains("canary"));
    }
}
