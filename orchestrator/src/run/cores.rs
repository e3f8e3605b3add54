//! How roles share the cores of a machine.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::config::Loaded;

/// Threads of one actor, and of the learner.
pub fn share(loaded: &Loaded) -> (usize, usize) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let actors = loaded.config.actor.processes;
    let actor = match loaded.config.actor.threads {
        0 => (cores / (actors + 1)).max(1),
        given => given,
    };
    let learner = match loaded.config.learner.threads {
        0 => cores.saturating_sub(actor * actors).max(1),
        given => given,
    };
    (actor, learner)
}

/// With `run.pin_cores`: keeps this thread, and what it starts from now on, to `count` of the cores from the `first` on.
/// A machine that has fewer is told so in the log, and shares them out itself.
pub fn pin(loaded: &Loaded, first: usize, count: usize) {
    if !loaded.config.run.pin_cores {
        return;
    }
    match keep_to(first, count) {
        Ok(Some(cores)) => tracing::info!(?cores, "pinned"),
        Ok(None) => tracing::warn!(first, count, "not pinned: run.pin_cores wants more cores than there are"),
        Err(error) => tracing::warn!(%error, "not pinned"),
    }
}

/// The cores that this thread is now kept to; none where there are too few of those that it may use.
fn keep_to(first: usize, count: usize) -> nix::Result<Option<Vec<usize>>> {
    let this_thread = Pid::from_raw(0);
    let allowed = sched_getaffinity(this_thread)?;
    let cores = (0..CpuSet::count()).filter(|&core| allowed.is_set(core) == Ok(true));
    let cores: Vec<_> = cores.skip(first).take(count).collect();
    if cores.len() < count {
        return Ok(None);
    }
    let mut kept = CpuSet::new();
    cores.iter().try_for_each(|&core| kept.set(core))?;
    sched_setaffinity(this_thread, &kept).map(|()| Some(cores))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_and_what_it_starts_stay_on_their_cores() {
        // A thread of its own: where it may run is not undone.
        let test = || {
            assert_eq!(keep_to(0, CpuSet::count() + 1), Ok(None), "more than there are");
            let kept = keep_to(0, 1).unwrap().expect("there is a core");
            let child = std::thread::spawn(|| sched_getaffinity(Pid::from_raw(0)).unwrap());
            let child = child.join().unwrap();
            let may: Vec<_> = (0..CpuSet::count()).filter(|&core| child.is_set(core) == Ok(true)).collect();
            assert_eq!(may, kept);
            assert_eq!(keep_to(1, 1), Ok(None), "one core is left");
        };
        std::thread::spawn(test).join().unwrap();
    }
}
