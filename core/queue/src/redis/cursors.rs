//! Where a client stands in the streams it reads: what it must remember between two calls.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;

use super::entries::Fields;

/// When a waiting call last looked for abandoned entries. Only a pace: the server's clock says what is abandoned.
#[derive(Default)]
pub(super) struct Reaper {
    last: Option<Instant>,
}

/// What the learner of an epoch has in hand.
#[derive(Default)]
pub(super) struct Fetching {
    epoch: u64,
    /// Where the claim of left-behind entries stands; `None` when it is complete.
    cursor: Option<String>,
    /// A reply may have been lost: entries it held are pending without having been handed out.
    unsure: bool,
    /// Handed out, not acknowledged.
    pub handed: HashSet<String>,
}

impl Reaper {
    /// Whether to look now: on the `first` look of a call always, then at this pace.
    pub fn due(&mut self, pace: Duration, first: bool) -> bool {
        let now = Instant::now();
        let due = first || self.last.is_none_or(|last| now - last >= pace);
        if due {
            self.last = Some(now);
        }
        due
    }
}

impl Fetching {
    /// The cursor of the next fetch, "" when nothing is left behind.
    pub fn begin(&mut self, epoch: u64) -> String {
        if epoch < self.epoch {
            // Will be fenced; must not disturb the newer one.
            return String::new();
        }
        if epoch > self.epoch {
            *self = Self { epoch, cursor: Some("0-0".into()), ..Self::default() };
        }
        if std::mem::replace(&mut self.unsure, true) {
            self.cursor = Some("0-0".into());
        }
        self.cursor.clone().unwrap_or_default()
    }

    /// Takes note of a reply; gives the entries that had not been handed out yet.
    pub fn arrived(&mut self, next: String, entries: Vec<(String, Fields)>) -> Vec<(String, Fields)> {
        self.unsure = false;
        self.cursor = Some(next).filter(|next| !next.is_empty());
        entries.into_iter().filter(|(id, _)| self.handed.insert(id.clone())).collect()
    }
}
