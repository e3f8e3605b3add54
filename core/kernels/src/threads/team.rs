//! Fork and join: a caller and its helpers claim the parts of one job after another.
//!
//! ```text
//!   ticket   epoch:32 | parts:16 | next:16     claimed by compare-and-swap, so a claim holds for that epoch's job alone
//!   finished parts done                        the caller returns once it equals parts: the job outlives every claim
//! ```
//!
//! A layer's operations follow each other within microseconds, while waking a sleeping thread costs tens of them. So an
//! idle helper first looks for work in a short loop, then lets others run, then sleeps.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, yield_now};
use std::time::{Duration, Instant};

/// How long one looks for work, or for others to be done, before one first gives way. Giving way takes a microsecond, and longer if
/// somebody takes it.
const SPINNING: Duration = Duration::from_micros(20);
/// Looks between looks at the clock.
const LOOKS: usize = 16;
/// Times that an idle helper gives way before it sleeps.
const YIELDS: usize = 256;
/// Most parts of a job in one epoch.
const MAX_PARTS: usize = u16::MAX as usize;

type Job<'a> = &'a (dyn Fn(usize) + Sync);

/// Helpers, and the lock that callers take turns by.
pub(super) struct Team {
    shared: Arc<Shared>,
    turn: Mutex<()>,
    helpers: Vec<JoinHandle<()>>,
}

struct Shared {
    ticket: AtomicU64,
    finished: AtomicUsize,
    job: UnsafeCell<Option<Job<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: Mutex<usize>,
    any_asleep: AtomicBool,
    wake: Condvar,
    closed: AtomicBool,
}

// SAFETY: `job` is written by the caller whose turn it is, while no part is claimed, and read only between a claim and
// its count in `finished`, for which that caller waits.
unsafe impl Sync for Shared {}
// SAFETY: as above; what it points to is `Sync`.
unsafe impl Send for Shared {}

thread_local! {
    /// Whether this thread is at a part of some job: what it starts then runs on itself.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
}

impl Team {
    /// Starts `helpers` threads.
    ///
    /// # Panics
    /// When the operating system refuses.
    pub fn new(helpers: usize) -> Self {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            finished: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleepers: Mutex::new(0),
            any_asleep: AtomicBool::new(false),
            wake: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        let start = |i: usize| {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("compute-{i}"));
            builder.spawn(move || shared.help()).expect("the operating system starts compute threads")
        };
        let helpers = (0..helpers).map(start).collect();
        Self { shared, turn: Mutex::new(()), helpers }
    }

    /// Calls `f` for every part in `0..parts`, on the caller and on whichever helper comes; returns when all are done.
    /// Where the helpers are another caller's, or the caller is at a part itself, it does them alone.
    ///
    /// # Panics
    /// With what `f` panicked with, after the other parts.
    pub fn run(&self, parts: usize, f: Job) {
        let turn = match self.turn.try_lock() {
            Ok(turn) if !AT_WORK.get() => turn,
            Err(std::sync::TryLockError::Poisoned(turn)) if !AT_WORK.get() => turn.into_inner(),
            _ => return (0..parts).for_each(f),
        };
        for first in (0..parts).step_by(MAX_PARTS) {
            let count = MAX_PARTS.min(parts - first);
            self.shared.run(count, &|part| f(first + part));
        }
        let panic = lock(&self.shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.closed.store(true, SeqCst);
        let sleepers = lock(&self.shared.sleepers);
        self.shared.wake.notify_all();
        drop(sleepers);
        for helper in self.helpers.drain(..) {
            // A helper catches what its parts panic with.
            let _ = helper.join();
        }
    }
}

impl Shared {
    fn run(&self, parts: usize, f: Job) {
        // SAFETY: the lifetime is the caller's stack frame, which outlives every use: see `Sync`.
        let job = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(f) };
        // SAFETY: no part of an earlier job is unfinished, and none of this one can be claimed yet.
        unsafe { *self.job.get() = Some(job) };
        self.finished.store(0, Relaxed);
        let epoch = (self.ticket.load(Relaxed) >> 32).wrapping_add(1);
        self.ticket.store(epoch << 32 | (parts as u64) << 16, SeqCst);
        if self.any_asleep.load(SeqCst) {
            let sleepers = lock(&self.sleepers);
            for _ in 0..(parts - 1).min(*sleepers) {
                self.wake.notify_one();
            }
        }
        while let Some(part) = self.claim() {
            self.work(part);
        }
        let mut idle = Idle::new();
        while self.finished.load(Acquire) < parts {
            idle.pass();
        }
    }

    /// Takes the next part of the job there is.
    fn claim(&self) -> Option<usize> {
        let mut ticket = self.ticket.load(Acquire);
        loop {
            let (parts, next) = ((ticket >> 16) as u16, ticket as u16);
            if next >= parts {
                return None;
            }
            match self.ticket.compare_exchange_weak(ticket, ticket + 1, AcqRel, Acquire) {
                Ok(_) => return Some(usize::from(next)),
                Err(now) => ticket = now,
            }
        }
    }

    /// Does a claimed part.
    fn work(&self, part: usize) {
        // SAFETY: claimed and not yet counted as finished, so the job is there and stays.
        let job = unsafe { (*self.job.get()).expect("a part of a job that is there") };
        AT_WORK.set(true);
        let done = catch_unwind(AssertUnwindSafe(|| job(part)));
        AT_WORK.set(false);
        if let Err(panic) = done {
            lock(&self.panic).get_or_insert(panic);
        }
        self.finished.fetch_add(1, Release);
    }

    /// What a helper does all its life.
    fn help(&self) {
        let mut idle = Idle::new();
        while !self.closed.load(Relaxed) {
            if let Some(part) = self.claim() {
                self.work(part);
                idle = Idle::new();
            } else if idle.yields < YIELDS {
                idle.pass();
            } else {
                self.sleep();
                idle = Idle::new();
            }
        }
    }

    /// Sleeps until there is a job.
    fn sleep(&self) {
        let mut sleepers = lock(&self.sleepers);
        *sleepers += 1;
        self.any_asleep.store(true, SeqCst);
        // A caller that did not see `any_asleep` published its ticket before this look at it.
        let idle = |ticket: u64| ticket as u16 >= (ticket >> 16) as u16;
        if idle(self.ticket.load(SeqCst)) && !self.closed.load(SeqCst) {
            sleepers = self.wake.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
        }
        *sleepers -= 1;
        self.any_asleep.store(*sleepers > 0, SeqCst);
    }
}

/// A thread without work.
struct Idle {
    since: Option<Instant>,
    looks: usize,
    yields: usize,
}

impl Idle {
    fn new() -> Self {
        Idle { since: None, looks: 0, yields: 0 }
    }

    /// Lets a moment pass.
    fn pass(&mut self) {
        self.looks += 1;
        if self.yields == 0 && !self.looks.is_multiple_of(LOOKS) {
            return spin_loop();
        }
        if self.since.get_or_insert_with(Instant::now).elapsed() >= SPINNING {
            self.yields += 1;
            yield_now();
        }
    }
}

/// Nothing that a lock here guards is left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_once_over_many_short_jobs() {
        let team = Team::new(3);
        for round in 0..2000 {
            let parts = round % 70;
            let seen: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
            team.run(parts, &|part| {
                seen[part].fetch_add(1, Relaxed);
            });
            assert!(seen.iter().all(|n| n.load(Relaxed) == 1), "{round}");
        }
    }

    #[test]
    fn a_job_may_have_more_parts_than_a_ticket_counts() {
        let sum = AtomicUsize::new(0);
        let parts = MAX_PARTS + 5;
        Team::new(1).run(parts, &|part| {
            sum.fetch_add(part, Relaxed);
        });
        assert_eq!(sum.into_inner(), parts * (parts - 1) / 2);
    }

    #[test]
    fn a_part_may_start_a_job_of_its_own() {
        let team = Team::new(2);
        let count = AtomicUsize::new(0);
        team.run(8, &|_| {
            team.run(5, &|_| {
                count.fetch_add(1, Relaxed);
            });
        });
        assert_eq!(count.into_inner(), 40);
    }

    #[test]
    fn callers_on_several_threads_do_not_mix_their_jobs() {
        let team = Team::new(2);
        std::thread::scope(|scope| {
            for caller in 0..4usize {
                let team = &team;
                scope.spawn(move || {
                    for _ in 0..300 {
                        let sum = AtomicUsize::new(0);
                        team.run(16, &|part| {
                            sum.fetch_add(part * (caller + 1), Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 120 * (caller + 1));
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_works_on() {
        let team = Team::new(1);
        for _ in 0..3 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.run(4, &|part| assert!(part != 2, "part two"));
            }));
            let panic = outcome.expect_err("part 2 panics");
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"part two"));
        }
        let count = AtomicUsize::new(0);
        team.run(4, &|_| {
            count.fetch_add(1, Relaxed);
        });
        assert_eq!(count.into_inner(), 4);
    }
}
