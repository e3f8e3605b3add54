//! One server, asked with care: deadline, retries, circuit breaker, rate limit, cache.
//!
//! Whatever the server does, a call ends within its deadline with a body that is small enough or with the reason why there is none. Redirects
//! are refused: a reward server that sends us elsewhere is not the one that was configured.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freewheel_types::Digest;
use serde_json::Value;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// Failed calls in a row that open the breaker, and how long it stays open.
const BREAKER_FAILURES: u32 = 5;
const BREAKER_OPEN: Duration = Duration::from_secs(5);
const BACKOFF: Duration = Duration::from_millis(50);
/// Less time than this is not worth an attempt.
const ATTEMPT_MIN: Duration = Duration::from_millis(5);

/// How a server is asked.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    /// One attempt may take this long.
    pub timeout: Duration,
    /// All of a call.
    pub deadline: Duration,
    pub retries: u32,
    /// After so long without an answer nothing more should be sent here to be judged.
    pub pause_after: Duration,
    /// Calls a second.
    pub rate: Option<f64>,
    /// Answers kept.
    pub cache: usize,
    /// Who may have signed certificates; if there are none, whom browsers trust.
    pub authorities: Vec<Certificate<'static>>,
    /// Value of the `Authorization` header.
    pub authorization: Option<String>,
}

/// A server behind a base address.
pub(crate) struct Client {
    agent: ureq::Agent,
    base: String,
    rules: Rules,
    breaker: Mutex<Breaker>,
    limiter: Mutex<Option<Instant>>,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Breaker {
    failures: u32,
    /// When it opened first since the last answer.
    since: Option<Instant>,
    /// Closed again from here on, for one attempt at first.
    open_until: Option<Instant>,
}

#[derive(Default)]
struct Cache {
    answers: BTreeMap<[u8; 32], Value>,
    order: VecDeque<[u8; 32]>,
}

/// Why an attempt failed.
enum Failure {
    /// Another attempt may do better.
    Passing(String),
    Lasting(String),
}

impl Client {
    pub(crate) fn new(base: &str, rules: Rules) -> Self {
        let roots = match rules.authorities.as_slice() {
            [] => RootCerts::WebPki,
            own => RootCerts::new_with_certs(own),
        };
        let config = ureq::Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .max_redirects(0)
            .http_status_as_error(false)
            .max_idle_connections_per_host(8)
            .build();
        Self {
            agent: config.into(),
            base: base.trim_end_matches('/').to_owned(),
            rules,
            breaker: Mutex::default(),
            limiter: Mutex::default(),
            cache: Mutex::default(),
        }
    }

    /// Posts `body` and gives the JSON answer.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value, String> {
        let text = body.to_string();
        let key = Digest::of(format!("{path}\n{text}").as_bytes()).0;
        if let Some(answer) = lock(&self.cache).answers.get(&key) {
            return Ok(answer.clone());
        }
        let until = Instant::now() + self.rules.deadline;
        let mut last = String::new();
        for attempt in 0..=self.rules.retries {
            if attempt > 0 {
                std::thread::sleep(left(until).min(BACKOFF * 2_u32.saturating_pow(attempt - 1)));
            }
            self.wait_for_turn(until)?;
            if left(until) < ATTEMPT_MIN {
                let why = if last.is_empty() { "no time was left".to_owned() } else { last };
                return Err(format!(
                    "{}: not done within {} ms ({why})",
                    self.base,
                    self.rules.deadline.as_millis()
                ));
            }
            self.admit()?;
            let result = self.attempt(path, &text, left(until).min(self.rules.timeout));
            self.note(result.is_ok());
            match result {
                Ok(answer) => {
                    self.keep(key, &answer);
                    return Ok(answer);
                }
                Err(Failure::Lasting(why)) => return Err(format!("{}: {why}", self.base)),
                Err(Failure::Passing(why)) => last = why,
            }
        }
        Err(format!("{}: {last}, {} attempts", self.base, self.rules.retries + 1))
    }

    fn attempt(&self, path: &str, text: &str, timeout: Duration) -> Result<Value, Failure> {
        let mut request = self
            .agent
            .post(format!("{}{path}", self.base))
            .config()
            .timeout_global(Some(timeout))
            .build()
            .header("content-type", "application/json");
        if let Some(authorization) = &self.rules.authorization {
            request = request.header("authorization", authorization);
        }
        let passing = |e: ureq::Error| Failure::Passing(e.to_string());
        let mut response = request.send(text).map_err(passing)?;
        let status = response.status().as_u16();
        match status {
            200..=299 => {}
            300..=399 => return Err(Failure::Lasting(format!("status {status}, redirects are refused"))),
            408 | 429 | 500..=599 => return Err(Failure::Passing(format!("status {status}"))),
            _ => return Err(Failure::Lasting(format!("status {status}"))),
        }
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
        let body = body.map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => {
                Failure::Lasting(format!("the answer is longer than {ANSWER_BYTES_MAX} bytes"))
            }
            error => passing(error),
        })?;
        serde_json::from_slice(&body).map_err(|e| Failure::Lasting(format!("the answer is not JSON: {e}")))
    }

    /// Refuses while the breaker is open.
    fn admit(&self) -> Result<(), String> {
        let mut breaker = lock(&self.breaker);
        match breaker.open_until {
            Some(until) if Instant::now() < until => Err(format!(
                "{}: failed {} times in a row, not asked again for {} ms",
                self.base,
                breaker.failures,
                left(until).as_millis()
            )),
            // One attempt goes through; until it is back, the others wait for the next.
            Some(_) => {
                breaker.open_until = Some(Instant::now() + BREAKER_OPEN);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn note(&self, fine: bool) {
        let mut breaker = lock(&self.breaker);
        if fine {
            *breaker = Breaker::default();
            return;
        }
        breaker.failures += 1;
        if breaker.failures >= BREAKER_FAILURES {
            breaker.since.get_or_insert_with(Instant::now);
            breaker.open_until = Some(Instant::now() + BREAKER_OPEN);
        }
    }

    /// For how long it is not worth being asked, once it has not answered for `Rules::pause_after`.
    pub(crate) fn away(&self) -> Option<Duration> {
        let breaker = lock(&self.breaker);
        let long = breaker.since.is_some_and(|since| since.elapsed() >= self.rules.pause_after);
        breaker.open_until.filter(|_| long).map(left).filter(|wait| !wait.is_zero())
    }

    /// Takes the next free place in time; an error if it lies beyond `until`.
    fn wait_for_turn(&self, until: Instant) -> Result<(), String> {
        let Some(rate) = self.rules.rate else { return Ok(()) };
        let gap = Duration::from_secs_f64(1.0 / rate);
        let turn = {
            let mut next = lock(&self.limiter);
            let turn = next.unwrap_or_else(Instant::now).max(Instant::now());
            if turn >= until {
                return Err(format!(
                    "{}: {rate} calls a second leave no turn before the deadline",
                    self.base
                ));
            }
            *next = Some(turn + gap);
            turn
        };
        std::thread::sleep(left(turn));
        Ok(())
    }

    fn keep(&self, key: [u8; 32], answer: &Value) {
        let mut cache = lock(&self.cache);
        if self.rules.cache == 0 || cache.answers.insert(key, answer.clone()).is_some() {
            return;
        }
        cache.order.push_back(key);
        if cache.order.len() > self.rules.cache
            && let Some(oldest) = cache.order.pop_front()
        {
            cache.answers.remove(&oldest);
        }
    }
}

fn left(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
