//! Inputs of several threads in one forward pass.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use freewheel_model::Framed;

use crate::stack::Unscored;

/// Brings together inputs of several threads: whoever finds nobody leading leads a batch of what waits.
pub(crate) struct Batcher {
    state: Mutex<Waiting>,
    done: Condvar,
    max: usize,
}

#[derive(Default)]
struct Waiting {
    inputs: Vec<(u64, Framed)>,
    results: BTreeMap<u64, Result<Vec<f32>, Unscored>>,
    next_ticket: u64,
    led: bool,
}

impl Batcher {
    /// At most `max` inputs in one pass.
    pub(crate) fn new(max: usize) -> Self {
        Self { state: Mutex::default(), done: Condvar::new(), max }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The scores of `input`; `run` is called with some batch that may or may not hold it.
    pub(crate) fn score(
        &self,
        input: Framed,
        run: impl Fn(&[Framed]) -> Vec<Vec<f32>>,
    ) -> Result<Vec<f32>, Unscored> {
        Ok(self.score_all(vec![input], run)?.pop().unwrap_or_default())
    }

    /// The same for several inputs.
    pub(crate) fn score_all(
        &self,
        inputs: Vec<Framed>,
        run: impl Fn(&[Framed]) -> Vec<Vec<f32>>,
    ) -> Result<Vec<Vec<f32>>, Unscored> {
        let mut state = self.lock();
        let first = state.next_ticket;
        state.next_ticket += inputs.len() as u64;
        let tickets = first..state.next_ticket;
        state.inputs.extend(tickets.clone().zip(inputs));
        loop {
            if tickets.clone().all(|ticket| state.results.contains_key(&ticket)) {
                // All are taken, also where one failed: nobody else will.
                let results: Vec<_> = tickets.filter_map(|ticket| state.results.remove(&ticket)).collect();
                return results.into_iter().collect();
            }
            if state.led {
                state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.led = true;
            let count = state.inputs.len().min(self.max);
            let (tickets, inputs): (Vec<u64>, Vec<Framed>) = state.inputs.drain(..count).unzip();
            drop(state);
            // Whatever happens, those who wait must hear of it.
            let scores = catch_unwind(AssertUnwindSafe(|| run(&inputs)));
            state = self.lock();
            state.led = false;
            match scores {
                Ok(scores) => state.results.extend(tickets.into_iter().zip(scores.into_iter().map(Ok))),
                Err(_) => {
                    let failed = || Err(Unscored("the model panicked; please report this input".into()));
                    state.results.extend(tickets.into_iter().map(|ticket| (ticket, failed())));
                }
            }
            self.done.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn input(id: u32) -> Framed {
        Framed { ids: vec![id], token_types: vec![0] }
    }

    #[test]
    fn threads_share_passes_and_each_gets_its_own_score() {
        let (batcher, passes) = (Batcher::new(4), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for id in 0..16 {
                let (batcher, passes) = (&batcher, &passes);
                scope.spawn(move || {
                    let scores = batcher.score(input(id), |batch| {
                        passes.fetch_add(1, Ordering::Relaxed);
                        assert!((1..=4).contains(&batch.len()), "a batch of {}", batch.len());
                        std::thread::sleep(std::time::Duration::from_millis(30));
                        batch.iter().map(|input| vec![input.ids[0] as f32]).collect()
                    });
                    assert_eq!(scores.expect("scored"), [id as f32]);
                });
            }
        });
        let passes = passes.into_inner();
        assert!((4..16).contains(&passes), "{passes} passes for 16 inputs");
    }

    #[test]
    fn many_inputs_of_one_caller_come_back_in_order() {
        let batcher = Batcher::new(3);
        let echo = |batch: &[Framed]| batch.iter().map(|input| vec![input.ids[0] as f32]).collect();
        let scores = batcher.score_all((0..10).map(input).collect(), echo).expect("scored");
        assert_eq!(scores, (0..10).map(|id| vec![id as f32]).collect::<Vec<_>>());
    }

    #[test]
    fn a_panic_fails_its_batch_and_not_the_next() {
        let batcher = Batcher::new(1);
        let failed = batcher.score(input(1), |_| panic!("planted"));
        assert!(failed.expect_err("unscored").0.contains("panicked"));
        assert_eq!(batcher.score(input(2), |_| vec![vec![2.0]]).expect("scored"), [2.0]);
        let failed = batcher.score_all(vec![input(3), input(4)], |_| panic!("planted"));
        assert!(failed.is_err() && batcher.lock().results.is_empty(), "nothing is left behind");
    }
}
