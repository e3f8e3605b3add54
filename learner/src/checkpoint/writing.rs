//! Checkpoints written beside training, one at a time.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::{Checkpoints, Commit, ModelWriter};
use crate::LearnerError;

/// The checkpoint being written, if one is.
#[derive(Default)]
pub struct Writing {
    now: Option<Now>,
}

struct Now {
    step: u64,
    thread: JoinHandle<Result<PathBuf, LearnerError>>,
}

/// A checkpoint that is over.
pub struct Written {
    /// Its step.
    pub step: u64,
    /// Where it is, or why it is not.
    pub result: Result<PathBuf, LearnerError>,
}

impl Writing {
    /// Begins one.
    ///
    /// # Errors
    /// If there are no more threads.
    ///
    /// # Panics
    /// If one is being written: [`end`](Self::end) it first.
    pub fn begin(
        &mut self,
        checkpoints: &Checkpoints,
        commit: Commit,
        model: Arc<dyn ModelWriter>,
    ) -> Result<(), LearnerError> {
        assert!(self.now.is_none(), "one checkpoint at a time");
        let (step, own) = (commit.state.step, checkpoints.clone());
        let thread = std::thread::Builder::new()
            .name("checkpoint".into())
            .spawn(move || own.commit(commit, &*model))
            .map_err(LearnerError::disk(
                &checkpoints.folder,
                "start the thread that writes the checkpoint",
            ))?;
        self.now = Some(Now { step, thread });
        Ok(())
    }

    /// Step of the one being written.
    pub fn step(&self) -> Option<u64> {
        self.now.as_ref().map(|now| now.step)
    }

    /// Waits for the one being written, if one is.
    pub fn end(&mut self) -> Option<Written> {
        let Now { step, thread } = self.now.take()?;
        let result = thread.join().expect("a thread that writes a checkpoint does not panic");
        Some(Written { step, result })
    }

    /// What became of it, if it is over.
    pub fn ended(&mut self) -> Option<Written> {
        self.now.as_ref()?.thread.is_finished().then(|| self.end())?
    }
}

impl Drop for Writing {
    /// Nobody writes to a run's folder once its learner is gone.
    fn drop(&mut self) {
        let Some(Now { step, thread }) = self.now.take() else { return };
        match thread.join() {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(step, %error, "the last checkpoint begun could not be written"),
            Err(_) => tracing::warn!(step, "the last checkpoint begun could not be written"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Mutex, mpsc};
    use std::time::Duration;

    use freewheel_model::Params;

    use super::*;
    use crate::assembly::Arrival;
    use crate::core::{Learner, LearnerParts, Recovery, checkpoint_dir};
    use crate::disk::SystemDisk;
    use crate::journal::Record;
    use crate::testing::{PlainWriter, arrival, config, parts};

    const LONG: Duration = Duration::from_secs(60);

    /// A writer that says when it is asked, and waits for a word.
    struct Held {
        asked: Mutex<mpsc::Sender<()>>,
        word: Mutex<mpsc::Receiver<()>>,
    }

    impl ModelWriter for Held {
        fn write(&self, dir: &Path, weights: &Params) -> Result<(), LearnerError> {
            self.asked.lock().unwrap().send(()).ok();
            self.word.lock().unwrap().recv_timeout(LONG).expect("somebody lets it go");
            PlainWriter(Arc::new(SystemDisk)).write(dir, weights)
        }
    }

    fn learner(dir: &Path, writer: Arc<dyn ModelWriter>, epoch: u64) -> (Learner, Recovery, Checkpoints) {
        let mut config = config(9);
        config.checkpoint_every = 1;
        let disk = Arc::new(SystemDisk);
        let checkpoints = Checkpoints::open(disk.clone(), &checkpoint_dir(dir), 2).unwrap();
        checkpoints.claim(epoch).unwrap();
        let parts = LearnerParts { writer, ..parts(&config, dir, disk) };
        let (learner, recovery) = Learner::recover(parts, checkpoints.clone(), epoch).unwrap();
        (learner, recovery, checkpoints)
    }

    fn take(learner: &mut Learner, task: u64) {
        for index in 0..3 {
            let arrival = arrival(task, index);
            let Arrival::Scored(scored) = arrival.clone() else { unreachable!("all are scored") };
            let journal = learner.journal();
            let at = journal.lock().unwrap().append(&Record::Consumed(scored)).unwrap();
            journal.lock().unwrap().sync().unwrap();
            learner.accept(arrival, at);
        }
    }

    #[test]
    fn training_goes_on_beside_a_checkpoint_and_an_update_waits_until_its_weights_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let ((asked, questions), (word, words)) = (mpsc::channel(), mpsc::channel());
        let held = Arc::new(Held { asked: Mutex::new(asked), word: Mutex::new(words) });
        let (mut learner, _, checkpoints) = learner(dir.path(), held, 1);
        (0..2).for_each(|task| take(&mut learner, task));
        let first = learner.try_step().unwrap().expect("two groups make a batch");
        assert!(!first.line.contains_key("learner/checkpoint_pause_s"));
        // It returns though nothing can be written yet, and training takes what comes.
        learner.checkpoint(false).unwrap();
        questions.recv_timeout(LONG).unwrap();
        (2..4).for_each(|task| take(&mut learner, task));
        assert!(checkpoints.committed().unwrap().is_empty());
        let written = learner.policy().digest().to_string();
        let waiting = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(80));
            word.send(()).unwrap();
            word
        });
        let second = learner.try_step().unwrap().expect("two more groups");
        let pause = second.line["learner/checkpoint_pause_s"].as_f64().unwrap();
        assert!(pause > 0.04, "the update waited {pause} s");
        let word = waiting.join().unwrap();
        // A second one waits for the first.
        word.send(()).unwrap();
        learner.checkpoint(true).unwrap();
        let steps: Vec<u64> = checkpoints.committed().unwrap().iter().map(|(_, step, _)| *step).collect();
        assert_eq!(steps, [1, 2]);
        let loaded = checkpoints.load(&checkpoints.path(1, 1)).unwrap();
        assert_eq!(loaded.state.weights, written, "what was lent did not move");
        let after = learner.policy().digest();
        drop(learner);
        // From the first of them the second update comes out again, to the bit.
        std::fs::remove_dir_all(checkpoints.path(2, 1)).unwrap();
        let (again, recovery, _) = self::learner(dir.path(), Arc::new(PlainWriter(Arc::new(SystemDisk))), 2);
        assert_eq!((recovery.checkpoint_step, recovery.replayed_steps), (Some(1), 1));
        assert_eq!(again.policy().digest(), after);
    }

    #[test]
    fn what_goes_wrong_beside_training_is_told_at_the_next_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let (mut learner, _, checkpoints) =
            learner(dir.path(), Arc::new(PlainWriter(Arc::new(SystemDisk))), 1);
        (0..2).for_each(|task| take(&mut learner, task));
        learner.try_step().unwrap().expect("a batch");
        // Somebody else takes the run over; the folder is theirs.
        checkpoints.claim(2).unwrap();
        learner.checkpoint(false).unwrap();
        assert!(matches!(learner.checkpoint(true), Err(LearnerError::Fenced { epoch: 1, .. })));
        assert!(checkpoints.committed().unwrap().is_empty());
    }
}
