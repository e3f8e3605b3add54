//! One connection that mends itself.
//!
//! Every call has a time limit, after which the connection is given up (a half-open one never answers) and the
//! call is tried once more on a new one while time is left. That is safe because every script is idempotent or
//! leaves at worst a lease that runs out.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, RedisError, ScriptInvocation};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::{QueueError, QueueSecret};

/// First pause between tries; doubles up to [`BACK_OFF_MAX`].
const BACK_OFF: Duration = Duration::from_millis(25);
const BACK_OFF_MAX: Duration = Duration::from_millis(500);
/// The slowest link on which a payload still gets through, bytes per second.
const SLOWEST_LINK: f64 = 100_000.0;

/// What is sent.
pub(super) enum Request<'a> {
    Script(&'a ScriptInvocation<'a>),
    Command(&'a Cmd),
}

/// A self-mending connection to one server.
pub(super) struct Link {
    client: Client,
    address: String,
    timeout: Duration,
    slot: Mutex<Option<MultiplexedConnection>>,
}

impl Link {
    /// Prepares a link; nothing is sent yet.
    pub fn open(url: &QueueSecret, limit: Duration) -> Result<Arc<Self>, QueueError> {
        if url.0 == "managed" {
            return Err(QueueError::Config(
                "queue.url \"managed\" must be started before it is connected to".into(),
            ));
        }
        // Somebody else may have chosen a provider already; theirs will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::open(url.0.as_str()).map_err(|error| {
            QueueError::Config(format!(
                "queue.url {url} is not understood ({}); use redis://host:6379/0, rediss://… or unix:///path/to.sock",
                error.category()
            ))
        })?;
        Ok(Arc::new(Self { client, address: url.to_string(), timeout: limit, slot: Mutex::default() }))
    }

    /// The address, without a password.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Sends a request whose payload has `bytes` bytes.
    pub async fn call<T: FromRedisValue>(
        &self,
        request: Request<'_>,
        bytes: u64,
        what: &'static str,
    ) -> Result<T, Failure> {
        self.call_within(self.timeout, request, bytes, what).await
    }

    /// Sends a request; gives up when `limit` (and time for the payload) is over.
    pub async fn call_within<T: FromRedisValue>(
        &self,
        limit: Duration,
        request: Request<'_>,
        bytes: u64,
        what: &'static str,
    ) -> Result<T, Failure> {
        let mut retry = Retry::new(self, limit + Duration::from_secs_f64(bytes as f64 / SLOWEST_LINK));
        loop {
            match retry.once(&request, what).await {
                Ok(value) => return Ok(value),
                Err(failure) => retry.pause(failure).await?,
            }
        }
    }

    /// The tries of a call that must be put together anew each time.
    pub fn retry(&self) -> Retry<'_> {
        Retry::new(self, self.timeout)
    }

    async fn attempt<T: FromRedisValue>(&self, request: &Request<'_>) -> Result<T, RedisError> {
        let mut connection = self.connection().await?;
        match request {
            Request::Script(script) => script.invoke_async(&mut connection).await,
            Request::Command(command) => command.query_async(&mut connection).await,
        }
    }

    async fn connection(&self) -> Result<MultiplexedConnection, RedisError> {
        let mut slot = self.slot.lock().await;
        if let Some(connection) = &*slot {
            return Ok(connection.clone());
        }
        // The limits are ours: they know how large the payload is.
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        let connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
        *slot = Some(connection.clone());
        Ok(connection)
    }

    async fn give_up(&self) {
        // Whoever holds the lock is connecting, which is what we want.
        if let Ok(mut slot) = self.slot.try_lock() {
            *slot = None;
        }
    }
}

/// The tries of one call.
pub(super) struct Retry<'a> {
    link: &'a Link,
    limit: Duration,
    deadline: Instant,
    pause: Duration,
}

impl<'a> Retry<'a> {
    fn new(link: &'a Link, limit: Duration) -> Self {
        Self { link, limit, deadline: Instant::now() + limit, pause: BACK_OFF }
    }

    /// One try. It may take most of the time, but leaves some for another one on a new connection.
    pub async fn once<T: FromRedisValue>(
        &self,
        request: &Request<'_>,
        what: &'static str,
    ) -> Result<T, Failure> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let error = match timeout(left.min(self.limit.mul_f64(0.6)), self.link.attempt(request)).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) if !is_transient(&error) => return Err(Failure::Refused { error, what }),
            Ok(Err(error)) => Some(error),
            Err(_elapsed) => None,
        };
        if error.as_ref().is_none_or(RedisError::is_unrecoverable_error) {
            self.link.give_up().await;
        }
        Err(Failure::Unreachable { address: self.link.address.clone(), what, limit: self.limit, error })
    }

    /// Waits before the next try; gives the failure back if there is to be none.
    pub async fn pause(&mut self, failure: Failure) -> Result<(), Failure> {
        let refused = matches!(failure, Failure::Refused { .. });
        if refused || self.deadline.saturating_duration_since(Instant::now()) <= self.pause {
            return Err(failure);
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(BACK_OFF_MAX);
        Ok(())
    }
}

/// Why a call has no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server did not answer, or is not ready.
    Unreachable { address: String, what: &'static str, limit: Duration, error: Option<RedisError> },
    /// The server answered with an error.
    Refused { error: RedisError, what: &'static str },
}

impl Failure {
    /// The first word of the server's error.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused { error, .. } => error.code().unwrap_or_default(),
            Self::Unreachable { .. } => "",
        }
    }

    /// As the caller of the queue sees it; `epoch` is theirs, if they are the learner.
    pub fn into_error(self, run: &str, address: &str, epoch: u64) -> QueueError {
        let (error, what) = match self {
            Self::Unreachable { address, what, limit, error } => {
                let cause = error.as_ref().map_or("no answer".to_owned(), ToString::to_string);
                return QueueError::Unavailable {
                    backend: format!("Redis at {address}"),
                    what: format!(
                        "{what} failed for {:.1} s ({cause}); is the server running?",
                        limit.as_secs_f64()
                    ),
                    source: error.map(|error| Box::new(error) as _),
                };
            }
            Self::Refused { error, what } => (error, what),
        };
        match error.code().unwrap_or_default() {
            "FENCED" => QueueError::Fenced { epoch, what },
            "DATALOST" | "NOGROUP" => QueueError::DataLost { run: run.to_owned() },
            "OOM" | "MISCONF" | "READONLY" | "NOREPLICAS" | "BUSY" => QueueError::Unavailable {
                backend: format!("Redis at {address}"),
                what: format!("{what} was refused: {error}"),
                source: Some(Box::new(error)),
            },
            _ => QueueError::Config(format!("Redis at {address} refused {what}: {error}")),
        }
    }
}

/// Whether the same call may succeed a moment later.
fn is_transient(error: &RedisError) -> bool {
    let loading = matches!(error.code(), Some("LOADING" | "TRYAGAIN" | "MASTERDOWN" | "CLUSTERDOWN"));
    let auth = error.kind() == ErrorKind::AuthenticationFailed;
    !auth && (loading || error.is_io_error() || error.is_connection_dropped() || error.is_timeout())
}
