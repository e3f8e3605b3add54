//! Rollout streams and policy store: what lies between the roles.
//!
//! ```text
//! pool ─issue─► tasks ─lease─► actor ─put─► rollouts ─lease─► reward ─forward─► scored ─fetch─► learner
//!   ▲                                                                                             │
//!   └──────────────────────── outcomes ◄──────────────── report ──────────────────────────────────┘
//! ```
//!
//! Effectively-once = at-least-once delivery + deterministic rollout ids + dedupe owned by the
//! learner + one atomic commit point (its checkpoint). Nothing here is truth: whatever a backend
//! loses is issued again, so a failure costs time, never correctness. Leases say who tries, the
//! fencing epoch says whose write counts; no decision rests on a client's clock.
//!
//! Two backends implement the same two traits and pass the same tests: [`memory`] (one lock, everything
//! in one process) and [`redis`] (streams, scripts, digested chunks).

pub mod clock;
pub mod config;
mod error;
pub mod memory;
mod payload;
pub mod redis;
mod traits;
mod versions;
mod weights;

pub use config::{Backend, QueueConfig, QueueSecret};
pub use error::QueueError;
pub use payload::DeadLetter;
pub use traits::{
    Delivery, DeliveryBody, LeasedRollout, LeasedTask, PolicyStore, PutOutcome, QueueCounts, RolloutQueue,
    RunControl,
};
