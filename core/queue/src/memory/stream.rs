//! A stream with one consumer group: entries in order, each leased to at most one owner.
//!
//! The same rules as a Redis stream: an entry is *new* until it is first handed out, then *pending* until
//! it is removed; a pending entry whose owner showed no life for the lease time may go to another.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// What is new, in a channel: whoever waits at its other end is woken by the item itself.
#[derive(Debug)]
pub(super) struct Feed<T> {
    sender: flume::Sender<T>,
    receiver: flume::Receiver<T>,
    /// Taken out by somebody who waited, and not used yet.
    at_hand: VecDeque<T>,
}

impl<T> Default for Feed<T> {
    fn default() -> Self {
        let (sender, receiver) = flume::unbounded();
        Self { sender, receiver, at_hand: VecDeque::new() }
    }
}

impl<T> Feed<T> {
    /// The end to wait at. What comes out of it must be given to [`hand_in`](Self::hand_in) before anything else is awaited.
    pub fn receiver(&self) -> flume::Receiver<T> {
        self.receiver.clone()
    }

    pub fn push(&mut self, item: T) {
        self.sender.send(item).expect("the feed holds a receiver itself");
    }

    /// Gives back what was received by waiting; it is the next to be popped.
    pub fn hand_in(&mut self, item: T) {
        self.at_hand.push_back(item);
    }

    pub fn pop(&mut self) -> Option<T> {
        self.at_hand.pop_front().or_else(|| self.receiver.try_recv().ok())
    }

    /// Whether something lies here that no channel will wake anybody for.
    pub fn has_leftovers(&self) -> bool {
        !self.at_hand.is_empty()
    }
}

/// Entries by sequence number; the numbers of new ones are in the feed.
#[derive(Debug)]
pub(super) struct Stream<T> {
    entries: BTreeMap<u64, Entry<T>>,
    next_id: u64,
    pub new: Feed<u64>,
}

/// One entry.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub item: T,
    /// Owner and the last time it showed life; `None` while new.
    pub lease: Option<(String, Duration)>,
    /// How often the entry has been handed out.
    pub deliveries: u32,
}

impl<T> Default for Stream<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), next_id: 1, new: Feed::default() }
    }
}

impl<T> Stream<T> {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Appends an entry and gives its id.
    pub fn push(&mut self, item: T) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.entries.insert(id, Entry { item, lease: None, deliveries: 0 });
        self.new.push(id);
        id
    }

    pub fn get(&self, id: u64) -> Option<&Entry<T>> {
        self.entries.get(&id)
    }

    pub fn remove(&mut self, id: u64) -> Option<T> {
        self.entries.remove(&id).map(|entry| entry.item)
    }

    /// Renews a lease; `false` unless `owner` still holds the entry.
    pub fn extend(&mut self, id: u64, owner: &str, now: Duration) -> bool {
        match self.entries.get_mut(&id).and_then(|entry| entry.lease.as_mut()) {
            Some((holder, since)) if holder == owner => {
                *since = now;
                true
            }
            _ => false,
        }
    }

    /// The longest time any owner of a pending entry has shown no life.
    pub fn silent_since(&self) -> Option<Duration> {
        self.entries.values().filter_map(|entry| entry.lease.as_ref().map(|(_, since)| *since)).min()
    }

    /// Hands up to `max` pending entries that satisfy `idle` to `owner`, oldest first.
    pub fn reclaim(
        &mut self,
        owner: &str,
        max: usize,
        now: Duration,
        idle: impl Fn(&str, Duration) -> bool,
    ) -> Vec<u64> {
        let is_idle =
            |entry: &Entry<T>| entry.lease.as_ref().is_some_and(|(holder, since)| idle(holder, *since));
        let ids: Vec<u64> =
            self.entries.iter().filter(|(_, entry)| is_idle(entry)).take(max).map(|(id, _)| *id).collect();
        ids.iter().for_each(|id| self.hand_out(*id, owner, now));
        ids
    }

    /// Hands up to `max` new entries to `owner`, oldest first.
    pub fn take_new(&mut self, owner: &str, max: usize, now: Duration) -> Vec<u64> {
        let mut ids = Vec::new();
        while ids.len() < max {
            let Some(id) = self.new.pop() else { break };
            // One that was ended before anybody took it is gone.
            if self.entries.contains_key(&id) {
                self.hand_out(id, owner, now);
                ids.push(id);
            }
        }
        ids
    }

    fn hand_out(&mut self, id: u64, owner: &str, now: Duration) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.lease = Some((owner.to_owned(), now));
            entry.deliveries += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_entries_leave_in_order_and_come_back_only_when_idle() {
        let mut stream = Stream::default();
        let ids: Vec<u64> = (0..3).map(|i| stream.push(i)).collect();
        let at = Duration::from_secs;
        assert_eq!(stream.take_new("a", 2, at(0)), ids[..2]);
        assert_eq!(stream.take_new("b", 5, at(0)), ids[2..]);
        assert!(stream.extend(ids[0], "a", at(9)) && !stream.extend(ids[1], "b", at(9)));
        let back = stream.reclaim("b", 5, at(10), |_, since| since + at(10) <= at(10));
        assert_eq!(back, ids[1..], "the extended one stays");
        assert_eq!(stream.get(ids[1]).map(|e| e.deliveries), Some(2));
    }
}
