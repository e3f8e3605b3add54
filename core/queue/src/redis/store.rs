//! Published weights in Redis: pieces first, then one script makes them current.
//!
//! A piece is a string of at most 8 MiB that expires by itself until the flip; its key carries a random name of the
//! upload, so that no half-finished or repeated upload can touch what readers see.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use freewheel_types::{ActorId, Manifest, PolicyVersion, RunId, WeightsPayload};
use redis::FromRedisValue;

use super::entries::{control_of, frame, unframe};
use super::inspect;
use super::keys::Keys;
use super::link::{Failure, Link, Request};
use super::scripts::SCRIPTS;
use super::{CONNECT, Poll, random_name};
use crate::versions::{self, Published};
use crate::weights::{self, HEARTBEAT};
use crate::{PolicyStore, QueueConfig, QueueError, QueueSecret, RunControl};

/// Bytes of one string in Redis.
const PIECE: usize = 8 << 20;
/// How long a piece lives that no published version names.
const HALF_UPLOAD_MS: u64 = 600_000;
/// Times a fetch starts again because a version was collected or a piece was damaged.
const FETCH_TRIES: u32 = 3;

/// Published weights of one run, in Redis.
pub struct RedisStore {
    link: Arc<Link>,
    keys: Keys,
    run: RunId,
    keep_versions: usize,
}

/// One line of the list of published versions.
struct Listed {
    published: Published,
    nonce: String,
    line: String,
}

impl RedisStore {
    /// Connects. The connection is its own: weights do not hold up the streams.
    ///
    /// # Errors
    /// [`QueueError::Unavailable`] if no server answers within a few seconds, [`QueueError::Config`] if it is the
    /// wrong one.
    pub async fn connect(
        url: &QueueSecret,
        run: &RunId,
        config: &QueueConfig,
    ) -> Result<Arc<Self>, QueueError> {
        let limit = config.timeout();
        let (keys, keep_versions) = (Keys::new(run), config.keep_versions as usize);
        let store = Self { link: Link::open(url, limit)?, keys, run: run.clone(), keep_versions };
        inspect::check_version(&store.link, limit.min(CONNECT))
            .await
            .map_err(|failure| store.error(failure, 0))?;
        Ok(Arc::new(store))
    }

    fn error(&self, failure: Failure, epoch: u64) -> QueueError {
        failure.into_error(self.run.as_str(), self.link.address(), epoch)
    }

    async fn call<T: FromRedisValue>(
        &self,
        request: Request<'_>,
        bytes: u64,
        what: &'static str,
    ) -> Result<T, QueueError> {
        self.link.call(request, bytes, what).await.map_err(|failure| self.error(failure, 0))
    }

    /// Current version, the run's control, the learner's epoch.
    async fn head(&self) -> Result<(Option<PolicyVersion>, RunControl, Option<u64>), QueueError> {
        let mut call = SCRIPTS.latest.key(self.keys.key("wcur"));
        call.key(self.keys.key("ctl")).key(self.keys.key("epoch"));
        let (epoch, step, control, fence): (String, String, String, String) =
            self.call(Request::Script(&call), 0, "reading the current version").await?;
        Ok((version_of(&format!("{epoch} {step}")), control_of(&control), fence.parse().ok()))
    }

    /// Published versions, oldest first.
    async fn list(&self) -> Result<Vec<Listed>, QueueError> {
        let mut command = redis::cmd("LRANGE");
        command.arg(self.keys.key("wver")).arg(0).arg(-1);
        let lines: Vec<String> = self.call(Request::Command(&command), 0, "listing versions").await?;
        Ok(lines.into_iter().filter_map(Listed::parse).collect())
    }

    /// Fails early where [`publish`](PolicyStore::publish) would fail after the upload.
    async fn check_publish(&self, epoch: u64, version: PolicyVersion) -> Result<(), QueueError> {
        let (current, _, fence) = self.head().await?;
        match fence {
            None => Err(QueueError::DataLost { run: self.run.to_string() }),
            Some(fence) if fence < epoch => Err(QueueError::DataLost { run: self.run.to_string() }),
            Some(fence) if fence != epoch => Err(QueueError::Fenced { epoch, what: "publishing weights" }),
            Some(_) if current.is_some_and(|current| version < current) => {
                Err(QueueError::StaleVersion { version })
            }
            Some(_) => Ok(()),
        }
    }

    async fn upload(&self, key: &str, bytes: &[u8]) -> Result<(), QueueError> {
        let mut command = redis::cmd("SET");
        command.arg(key).arg(bytes).arg("PX").arg(HALF_UPLOAD_MS);
        self.call(Request::Command(&command), bytes.len() as u64, "uploading weights").await
    }

    /// Deletes what nobody needs. What it misses, the next publication collects.
    async fn collect(&self) -> Result<(), QueueError> {
        let list = self.list().await?;
        let published: Vec<Published> = list.iter().map(|listed| listed.published).collect();
        let in_use: Vec<PolicyVersion> =
            self.actors().await?.into_iter().map(|(_, version)| version).collect();
        for old in versions::collect(&published, self.keep_versions, &in_use) {
            let Some(listed) = list.iter().find(|listed| listed.published.version == old) else { continue };
            let manifest = self.manifest(listed).await;
            let mut call = SCRIPTS.collect.key(self.keys.manifest(old));
            call.key(self.keys.key("wver")).arg(&listed.line);
            if let Ok(Some(manifest)) = &manifest {
                call.key(self.pieces(manifest, &listed.nonce).map(|(key, _)| key).collect::<Vec<_>>());
            }
            self.call::<u64>(Request::Script(&call), 0, "collecting a version").await?;
        }
        Ok(())
    }

    /// Key and length of every piece, in order.
    fn pieces<'a>(
        &'a self,
        manifest: &'a Manifest,
        nonce: &'a str,
    ) -> impl Iterator<Item = (String, usize)> + 'a {
        manifest.chunks.iter().enumerate().flat_map(move |(i, chunk)| {
            let len = chunk.len as usize;
            (0..len.div_ceil(PIECE))
                .map(move |j| (self.keys.piece(manifest.version, nonce, i, j), PIECE.min(len - j * PIECE)))
        })
    }

    /// The manifest of a version, `None` if it has been collected.
    async fn manifest(&self, listed: &Listed) -> Result<Option<Manifest>, QueueError> {
        let version = listed.published.version;
        let mut command = redis::cmd("HGET");
        command.arg(self.keys.manifest(version)).arg("manifest");
        let bytes: Option<Vec<u8>> = self.call(Request::Command(&command), 0, "reading a manifest").await?;
        let Some(bytes) = bytes else { return Ok(None) };
        let manifest: Manifest = unframe(&bytes)
            .map_err(|error| QueueError::BadWeights { version, what: format!("manifest: {error}") })?;
        if manifest.version != version {
            let what = format!("the manifest is that of {}", manifest.version);
            return Err(QueueError::BadWeights { version, what });
        }
        Ok(Some(manifest))
    }

    /// One version with all its bytes, verified.
    async fn download(&self, listed: &Listed) -> Result<WeightsPayload, QueueError> {
        let version = listed.published.version;
        let missing = |what: &str| QueueError::BadWeights { version, what: format!("{what} is missing") };
        let manifest = self.manifest(listed).await?.ok_or_else(|| missing("the manifest"))?;
        let mut chunks = Vec::with_capacity(manifest.chunks.len());
        let mut pieces = self.pieces(&manifest, &listed.nonce);
        for (index, expected) in manifest.chunks.iter().enumerate() {
            let mut chunk = Vec::new();
            for (key, len) in pieces.by_ref().take((expected.len as usize).div_ceil(PIECE)) {
                let mut command = redis::cmd("GET");
                command.arg(key);
                let piece: Option<Vec<u8>> =
                    self.call(Request::Command(&command), len as u64, "downloading weights").await?;
                chunk.extend(piece.ok_or_else(|| missing(&format!("a piece of chunk {index}")))?);
            }
            chunks.push(chunk);
        }
        drop(pieces);
        let payload = WeightsPayload { manifest, chunks };
        weights::verify(&payload)?;
        Ok(payload)
    }

    async fn fetch_once(&self, have: Option<PolicyVersion>) -> Result<Vec<WeightsPayload>, QueueError> {
        let list = self.list().await?;
        let published: Vec<Published> = list.iter().map(|listed| listed.published).collect();
        let Some(newest) = published.last() else { return Ok(Vec::new()) };
        let path = versions::chain(&published, have).ok_or_else(|| weights::no_way(newest.version, have))?;
        let mut payloads = Vec::with_capacity(path.len());
        for listed in list.iter().filter(|listed| path.contains(&listed.published.version)) {
            payloads.push(self.download(listed).await?);
        }
        Ok(payloads)
    }
}

impl Listed {
    /// `e v | base e v or nothing | nonce`.
    fn line(version: PolicyVersion, base: Option<PolicyVersion>, nonce: &str) -> String {
        let text = |version: PolicyVersion| format!("{} {}", version.epoch, version.step);
        format!("{}|{}|{nonce}", text(version), base.map_or(String::new(), text))
    }

    fn parse(line: String) -> Option<Self> {
        let mut parts = line.split('|');
        let version = version_of(parts.next()?)?;
        let base = match parts.next()? {
            "" => None,
            base => Some(version_of(base)?),
        };
        let nonce = parts.next()?.to_owned();
        Some(Self { published: Published { version, base }, nonce, line })
    }
}

/// `"e v"` or `"e v whatever"`.
pub(super) fn version_of(text: &str) -> Option<PolicyVersion> {
    let mut numbers = text.split(' ').map(|number| number.parse().ok());
    Some(PolicyVersion::new(numbers.next()??, numbers.next()??))
}

#[async_trait]
impl PolicyStore for RedisStore {
    async fn publish(&self, epoch: u64, payload: &WeightsPayload) -> Result<(), QueueError> {
        weights::check_offer(epoch, payload)?;
        let manifest = &payload.manifest;
        let version = manifest.version;
        self.check_publish(epoch, version).await?;
        let nonce = random_name();
        let keys: Vec<(String, usize)> = self.pieces(manifest, &nonce).collect();
        let pieces = payload.chunks.iter().flat_map(|chunk| chunk.chunks(PIECE));
        for ((key, _), piece) in keys.iter().zip(pieces) {
            self.upload(key, piece).await?;
        }
        let mut call = SCRIPTS.publish.key(self.keys.key("epoch"));
        call.key(self.keys.key("wcur")).key(self.keys.manifest(version));
        call.key(self.keys.key("wver")).key(self.keys.key("wann"));
        keys.iter().for_each(|(key, _)| {
            call.key(key);
        });
        let framed = frame(manifest)?;
        call.arg(epoch).arg(version.epoch).arg(version.step).arg(&framed).arg(&nonce);
        call.arg(Listed::line(version, manifest.base, &nonce));
        let flip =
            self.link.call::<String>(Request::Script(&call), framed.len() as u64, "publishing weights");
        flip.await.map_err(|failure| match failure.code() {
            "STALE" => QueueError::StaleVersion { version },
            "INCOMPLETE" => {
                QueueError::BadWeights { version, what: "a piece expired before all were there".into() }
            }
            _ => self.error(failure, epoch),
        })?;
        if let Err(error) = self.collect().await {
            tracing::warn!(%error, "old weights were not collected; the next publication tries again");
        }
        Ok(())
    }

    async fn latest(&self) -> Result<Option<PolicyVersion>, QueueError> {
        Ok(self.head().await?.0)
    }

    async fn wait_newer(
        &self,
        than: Option<PolicyVersion>,
        wait: Duration,
    ) -> Result<Option<PolicyVersion>, QueueError> {
        let mut poll = Poll::new(wait);
        loop {
            let (newest, control, _) = self.head().await?;
            let newer = newest.filter(|newest| than.is_none_or(|than| *newest > than));
            if newer.is_some() || !poll.again(control == RunControl::Finished).await? {
                return Ok(newer);
            }
        }
    }

    async fn fetch(&self, have: Option<PolicyVersion>) -> Result<Vec<WeightsPayload>, QueueError> {
        let mut tries = 1;
        loop {
            match self.fetch_once(have).await {
                Err(QueueError::BadWeights { version, what }) if tries < FETCH_TRIES => {
                    tracing::warn!(%version, what, tries, "weights fetched again");
                    tries += 1;
                }
                result => return result,
            }
        }
    }

    async fn heartbeat(&self, actor: &ActorId, version: PolicyVersion) -> Result<(), QueueError> {
        let mut call = SCRIPTS.heartbeat.key(self.keys.key("wuse"));
        call.arg(&actor.0).arg(version.epoch).arg(version.step);
        self.call::<u64>(Request::Script(&call), 0, "saying which version is served").await.map(drop)
    }

    async fn actors(&self) -> Result<Vec<(ActorId, PolicyVersion)>, QueueError> {
        let mut call = SCRIPTS.actors.key(self.keys.key("wuse"));
        call.arg(HEARTBEAT.as_secs());
        let pairs: Vec<(String, String)> = self.call(Request::Script(&call), 0, "listing actors").await?;
        let mut actors: Vec<_> = pairs
            .into_iter()
            .filter_map(|(actor, text)| Some((ActorId(actor), version_of(&text)?)))
            .collect();
        actors.sort();
        Ok(actors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_version_comes_back() {
        let (version, base) = (PolicyVersion::new(2, 7), PolicyVersion::new(1, 9));
        for base in [None, Some(base)] {
            let listed = Listed::parse(Listed::line(version, base, "ab")).unwrap();
            assert_eq!((listed.published, listed.nonce.as_str()), (Published { version, base }, "ab"));
        }
        assert!(Listed::parse("1|2|x".into()).is_none() && Listed::parse(String::new()).is_none());
    }
}
