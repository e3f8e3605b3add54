//! Crashes anywhere: the same weights, every rollout once.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use freewheel_types::{GroupFate, RolloutId, TaskId};

use crate::LearnerError;
use crate::assembly::{Arrival, Ledger};
use crate::checkpoint::Checkpoints;
use crate::config::{KeepJournal, LearnerConfig};
use crate::core::{Learner, Recovery, checkpoint_dir, journal_dir};
use crate::disk::faults::{Fault, FaultyDisk};
use crate::disk::{Disk, SystemDisk};
use crate::journal::{self, BadRollout, Position, Record};
use crate::testing::{config, parts, script};

/// A disk that works; its syncs cost nothing.
fn whole() -> Arc<dyn Disk> {
    Arc::new(FaultyDisk::new(None))
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq)]
struct Outcome {
    weights: String,
    masters: Vec<f32>,
    ledger: Ledger,
}

/// Starts a learner in `dir`, as the role does.
fn start(
    config: &LearnerConfig,
    dir: &Path,
    disk: Arc<dyn Disk>,
) -> Result<(Learner, Recovery), LearnerError> {
    let checkpoints = Checkpoints::open(disk.clone(), &checkpoint_dir(dir), 2)?;
    let epoch = checkpoints.epoch_floor()? + 1;
    checkpoints.claim(epoch)?;
    checkpoints.clean()?;
    Learner::recover(parts(config, dir, disk), checkpoints, epoch)
}

/// Runs a learner in `dir` to its end on `script`, or to its crash. `trained` collects what was reported.
fn drive(
    config: &LearnerConfig,
    dir: &Path,
    disk: Arc<dyn Disk>,
    script: &[Arrival],
) -> Result<Outcome, LearnerError> {
    let (mut learner, _) = start(config, dir, disk)?;
    let journal = learner.journal();
    let mut seen = learner.seen().clone();
    let steps = |learner: &mut Learner| -> Result<(), LearnerError> {
        while !learner.finished() && learner.try_step()?.is_some() {
            learner.checkpoint(false)?;
        }
        Ok(())
    };
    steps(&mut learner)?;
    // Deliveries come several at once and are journalled together: the journal runs ahead of training.
    for fetched in script.chunks(7) {
        let mut placed = Vec::new();
        for arrival in fetched.iter().filter(|arrival| seen.insert(arrival.rollout().0)) {
            let record = match arrival.clone() {
                Arrival::Scored(scored) => Record::Consumed(scored),
                other => Record::Bad(BadRollout { rollout: other.rollout(), reason: "test".into() }),
            };
            placed.push((journal.lock().unwrap().append(&record)?, arrival.clone()));
        }
        journal.lock().unwrap().sync()?;
        for (at, arrival) in placed {
            learner.accept(arrival, at);
            steps(&mut learner)?;
        }
    }
    learner.checkpoint(true)?;
    assert!(learner.finished(), "the script holds enough groups");
    Ok(Outcome {
        weights: learner.policy().digest().to_string(),
        masters: learner.policy().optimizer().masters().to_vec(),
        ledger: *learner.ledger(),
    })
}

fn uninterrupted(config: &LearnerConfig, script: &[Arrival]) -> (Outcome, usize) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(FaultyDisk::new(None));
    let outcome = drive(config, dir.path(), disk.clone(), script).unwrap();
    (outcome, disk.operations())
}

/// Rollouts trained on, read back from the journal; no rollout may be there twice.
fn trained(dir: &Path) -> Vec<RolloutId> {
    let mut all = Vec::new();
    journal::read(&SystemDisk, &journal_dir(dir), Position::default(), &mut |_, record| {
        if let Record::StepFormed(formed) = record {
            all.extend(formed.rollouts);
        }
        Ok(())
    })
    .unwrap();
    all
}

#[test]
fn a_power_cut_at_any_file_operation_changes_no_bit_and_trains_nothing_twice() {
    let (config, script) = (config(7), script(22));
    let (expected, operations) = uninterrupted(&config, &script);
    assert!(operations > 100, "{operations} operations are too few to mean much");
    for at in 0..operations {
        let dir = tempfile::tempdir().unwrap();
        let cut = Arc::new(FaultyDisk::new(Some((at, Fault::Crash))));
        assert!(drive(&config, dir.path(), cut, &script).is_err(), "operation {at} did not fail");
        let resumed = drive(&config, dir.path(), whole(), &script)
            .unwrap_or_else(|error| panic!("after a cut at operation {at}: {error}"));
        assert_eq!(resumed, expected, "after a cut at operation {at}");
        let trained = trained(dir.path());
        let distinct: BTreeSet<_> = trained.iter().collect();
        assert_eq!(
            (trained.len() as u64, distinct.len()),
            (expected.ledger.trained, trained.len()),
            "cut at {at}"
        );
    }
}

#[test]
fn rollouts_journalled_but_not_yet_taken_at_a_checkpoint_are_not_forgotten() {
    let mut config = config(9);
    config.checkpoint_every = 1;
    let dir = tempfile::tempdir().unwrap();
    let (mut learner, _) = start(&config, dir.path(), whole()).unwrap();
    let mut placed = Vec::new();
    for arrival in (0..4).flat_map(|task| (0..3).map(move |index| crate::testing::arrival(task, index))) {
        let Arrival::Scored(scored) = arrival.clone() else { unreachable!("all are scored") };
        placed.push((learner.journal().lock().unwrap().append(&Record::Consumed(scored)).unwrap(), arrival));
    }
    learner.journal().lock().unwrap().sync().unwrap();
    placed.into_iter().take(6).for_each(|(at, arrival)| learner.accept(arrival, at));
    assert!(learner.try_step().unwrap().is_some());
    learner.checkpoint(false).unwrap();
    drop(learner);
    let (mut learner, recovery) = start(&config, dir.path(), whole()).unwrap();
    assert_eq!(recovery, Recovery { checkpoint_step: Some(1), replayed_steps: 0, held: 6 });
    assert!(learner.try_step().unwrap().is_some());
}

#[test]
fn a_journal_cut_back_to_what_checkpoints_need_is_enough_to_resume() {
    let (mut config, script) = (config(9), script(30));
    let (expected, operations) = uninterrupted(&config, &script);
    config.keep_journal = KeepJournal::Checkpoints;
    let mut shorter = 0;
    for seed in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        // Every start begins a segment.
        for stream in 0..4 {
            let at = freewheel_types::CounterRng::new(seed, stream).below(0, operations as u64) as usize;
            drive(&config, dir.path(), Arc::new(FaultyDisk::new(Some((at, Fault::Crash)))), &script).ok();
        }
        assert_eq!(drive(&config, dir.path(), whole(), &script).unwrap(), expected, "seed {seed}");
        let begin = journal::start(&SystemDisk, &journal_dir(dir.path())).unwrap();
        shorter += usize::from(begin > Position::default());
        // From the checkpoint before the last on all of it can still be made again; from the initial weights only if all of it is there.
        let replay = |until| Learner::repeat_run(parts(&config, dir.path(), whole()), until);
        assert_eq!(replay(Some(9)).unwrap().weights, expected.weights);
        assert_eq!(replay(None).is_ok(), begin == Position::default());
    }
    assert!(shorter > 9, "of 40 journals {shorter} were cut");
}

#[test]
fn two_power_cuts_are_no_worse_than_one() {
    let (config, script) = (config(7), script(22));
    let (expected, operations) = uninterrupted(&config, &script);
    for seed in 0..60 {
        let dir = tempfile::tempdir().unwrap();
        for stream in 0..2 {
            let at = freewheel_types::CounterRng::new(seed, stream).below(0, operations as u64) as usize;
            drive(&config, dir.path(), Arc::new(FaultyDisk::new(Some((at, Fault::Crash)))), &script).ok();
        }
        assert_eq!(drive(&config, dir.path(), whole(), &script).unwrap(), expected, "seed {seed}");
    }
}

#[test]
fn an_io_error_ends_the_learner_or_costs_a_checkpoint_but_never_a_rollout() {
    let (config, script) = (config(5), script(16));
    let (expected, operations) = uninterrupted(&config, &script);
    for at in 0..operations {
        let dir = tempfile::tempdir().unwrap();
        let faulty = Arc::new(FaultyDisk::new(Some((at, Fault::Eio))));
        if let Ok(outcome) = drive(&config, dir.path(), faulty, &script) {
            assert_eq!(outcome, expected);
        }
        assert_eq!(drive(&config, dir.path(), whole(), &script).unwrap(), expected, "EIO at {at}");
    }
}

#[test]
fn after_a_failed_fsync_the_journal_takes_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let record = || Record::Bad(BadRollout { rollout: RolloutId(1), reason: String::new() });
    // Operations: folder, segment, two syncs; then append and fsync.
    let disk = Arc::new(FaultyDisk::new(Some((5, Fault::Eio))));
    let mut journal = journal::Journal::open(disk, dir.path()).unwrap();
    journal.append(&record()).unwrap();
    assert!(journal.sync().unwrap_err().to_string().contains("fsync"));
    journal.append(&record()).unwrap();
    let again = journal.sync().unwrap_err();
    assert!(matches!(again, LearnerError::Disk { .. }), "the second fsync must not claim success");
}

#[test]
fn a_full_disk_costs_checkpoints_and_then_ends_the_run_with_the_old_ones_intact() {
    let (config, script) = (config(12), script(40));
    let dir = tempfile::tempdir().unwrap();
    drive(&self::config(2), dir.path(), whole(), &script).unwrap();
    let (mut learner, _) = start(&config, dir.path(), whole()).unwrap();
    drop(learner.take_outcomes());
    let checkpoints = Checkpoints::open(whole(), &checkpoint_dir(dir.path()), 2).unwrap();
    assert_eq!(checkpoints.newest().unwrap().unwrap().state.step, 2);
    // From some operation on nothing can be written: the journal fails, which ends the learner.
    let full = Arc::new(FaultyDisk::new(Some((30, Fault::Full))));
    let error = drive(&config, dir.path(), full, &script).unwrap_err();
    assert!(matches!(error, LearnerError::Disk { .. }), "{error}");
    assert!(checkpoints.newest().unwrap().unwrap().state.step >= 2);
}

#[test]
fn a_damaged_newest_checkpoint_gives_way_to_the_one_before() {
    let (config, script) = (config(7), script(22));
    let (expected, _) = uninterrupted(&config, &script);
    for file in ["state.json", "trainer.safetensors", "model.bin", "digests.json"] {
        let dir = tempfile::tempdir().unwrap();
        drive(&config, dir.path(), whole(), &script).unwrap();
        let checkpoints = Checkpoints::open(whole(), &checkpoint_dir(dir.path()), 2).unwrap();
        let (_, step, newest) = checkpoints.committed().unwrap().pop().unwrap();
        assert_eq!(step, 7);
        let path = newest.join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(&path, bytes).unwrap();
        let (learner, recovery) = start(&config, dir.path(), whole()).unwrap();
        assert_eq!((recovery.checkpoint_step, recovery.replayed_steps), (Some(6), 1), "{file}");
        assert_eq!(learner.policy().digest().to_string(), expected.weights, "{file}");
    }
}

#[test]
fn an_old_learner_that_wakes_up_is_fenced_and_its_writes_do_not_count() {
    let (config, script) = (config(7), script(22));
    let (expected, _) = uninterrupted(&config, &script);
    let dir = tempfile::tempdir().unwrap();
    let disk = whole();
    let (mut old, _) = start(&config, dir.path(), disk.clone()).unwrap();
    for arrival in &script[..18] {
        let Arrival::Scored(scored) = arrival.clone() else { continue };
        let at = old.journal().lock().unwrap().append(&Record::Consumed(scored)).unwrap();
        old.accept(arrival.clone(), at);
    }
    old.journal().lock().unwrap().sync().unwrap();
    let (new, _) = start(&config, dir.path(), disk.clone()).unwrap();
    let error = old.try_step().map(drop).unwrap_err();
    assert!(matches!(error, LearnerError::Fenced { epoch: 1, .. }), "{error}");
    assert!(matches!(old.checkpoint(true).unwrap_err(), LearnerError::Fenced { .. }));
    // Even if it gets a record past the check, it lands behind the seal.
    let stray = Record::Bad(BadRollout { rollout: TaskId(3).rollout(1), reason: "stray".into() });
    old.journal().lock().unwrap().append(&stray).unwrap();
    old.journal().lock().unwrap().sync().unwrap();
    drop((old, new));
    assert_eq!(drive(&config, dir.path(), disk, &script).unwrap(), expected);
}

#[test]
fn outcomes_of_replayed_groups_are_told_again() {
    let (config, script) = (config(7), script(22));
    let dir = tempfile::tempdir().unwrap();
    drive(&config, dir.path(), whole(), &script).unwrap();
    let (mut learner, _) = start(&config, dir.path(), whole()).unwrap();
    let told = learner.take_outcomes();
    let trained = told.iter().filter(|outcome| matches!(outcome.fate, GroupFate::Trained { .. })).count();
    assert_eq!(trained, 14, "seven steps of two groups");
}

#[test]
fn what_the_loss_keeps_beside_the_policy_comes_back_after_a_cut() {
    use crate::advantage::Advantage;
    use crate::objective::{KlPlacement, Objective, ObjectiveConfig};
    let script = script(22);
    let kept = [
        ObjectiveConfig { kl_coef: 0.2, reference_every: Some(3), ..Default::default() },
        ObjectiveConfig { kl_coef: 0.2, kl_placement: KlPlacement::Reward, ..Default::default() },
        ObjectiveConfig { entropy_target: Some(2.0), entropy_step: Some(0.5), ..Default::default() },
        ObjectiveConfig { advantage: Some(Advantage::Ema), ..Default::default() },
        ObjectiveConfig { objective: Objective::Ppo, ..Default::default() },
    ];
    let plain = uninterrupted(&config(7), &script).0;
    for loss in kept {
        let mut config = config(7);
        config.loss = loss;
        let (expected, operations) = uninterrupted(&config, &script);
        assert_ne!(expected.weights, plain.weights, "{:?} changes nothing", config.loss);
        for at in (0..operations).step_by(7) {
            let dir = tempfile::tempdir().unwrap();
            let cut = Arc::new(FaultyDisk::new(Some((at, Fault::Crash))));
            drive(&config, dir.path(), cut, &script).unwrap_err();
            let resumed = drive(&config, dir.path(), whole(), &script)
                .unwrap_or_else(|error| panic!("{:?}: after a cut at operation {at}: {error}", config.loss));
            assert_eq!(resumed, expected, "{:?}: after a cut at operation {at}", config.loss);
        }
    }
}

/// Groups `bad` have rewards so large that their gradient is infinite under `oapl`.
fn poisoned(tasks: u64, bad: std::ops::Range<u64>) -> Vec<Arrival> {
    let arrival = |task: u64, index: u32| {
        let reward = if bad.contains(&task) && index == 0 { f32::MAX } else { index as f32 };
        let rollout = crate::testing::scored(task, index, freewheel_types::PolicyVersion::default(), reward);
        Arrival::Scored(Box::new(rollout))
    };
    (0..tasks).flat_map(|task| (0..3).map(move |index| (task, index))).map(|(t, i)| arrival(t, i)).collect()
}

fn regression(steps: u64) -> LearnerConfig {
    let mut config = config(steps);
    config.loss.objective = crate::objective::Objective::Oapl;
    config.loss.loss_aggregation = Some(crate::objective::LossAggregation::SeqMeanTokenSum);
    config
}

fn rollbacks(dir: &Path) -> Vec<journal::RolledBack> {
    let mut all = Vec::new();
    journal::read(&SystemDisk, &journal_dir(dir), Position::default(), &mut |_, record| {
        if let Record::RolledBack(record) = record {
            all.push(record);
        }
        Ok(())
    })
    .unwrap();
    all
}

#[test]
fn one_bad_update_is_skipped_and_its_batch_is_kept() {
    // Groups 6 and 7 make the batch that would be the fourth update.
    let (config, dir) = (regression(5), tempfile::tempdir().unwrap());
    let outcome = drive(&config, dir.path(), whole(), &poisoned(12, 6..8)).unwrap();
    assert_eq!((outcome.ledger.trained, outcome.ledger.dropped.total()), (30, 6));
    let kept: Vec<_> = std::fs::read_dir(dir.path().join("bad-steps")).unwrap().collect();
    assert_eq!(kept.len(), 1);
    let lines = std::fs::read_to_string(kept[0].as_ref().unwrap().path()).unwrap();
    assert_eq!(lines.lines().count(), 6, "a line for each rollout of the batch");
    assert!(rollbacks(dir.path()).is_empty());
    // The updates around it are those of a run in which these groups could not be used.
    let gone = |arrival: Arrival| match arrival.rollout() {
        rollout if (6..8).contains(&rollout.task().0) => Arrival::Bad(rollout),
        _ => arrival,
    };
    let without: Vec<Arrival> = poisoned(12, 0..0).into_iter().map(gone).collect();
    let expected = drive(&config, tempfile::tempdir().unwrap().path(), whole(), &without).unwrap();
    assert_eq!(outcome.masters, expected.masters);
}

#[test]
fn the_third_bad_update_in_a_row_goes_back_once_and_the_run_goes_on() {
    // Updates 1 to 3 are good, three batches are not, then good ones again. Checkpoints at 2, 4, …
    let (config, script) = (regression(8), poisoned(24, 6..12));
    let dir = tempfile::tempdir().unwrap();
    let expected = drive(&config, dir.path(), whole(), &script).unwrap();
    let found = rollbacks(dir.path());
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].from_step, found[0].to_step), (3, 2));
    assert_eq!(expected.ledger.trained, 7 * 6, "the return is a step of its own and trains nothing");
    // Whatever is cut when, the same weights in the end; but where the cut took the checkpoint there is nothing to go back to. (It is written
    // beside the updates after it: how many cuts that are hangs on time.)
    let mut stopped = 0;
    let disk = Arc::new(FaultyDisk::new(None));
    drive(&config, tempfile::tempdir().unwrap().path(), disk.clone(), &script).unwrap();
    for at in (0..disk.operations()).step_by(3) {
        let dir = tempfile::tempdir().unwrap();
        drive(&config, dir.path(), Arc::new(FaultyDisk::new(Some((at, Fault::Crash)))), &script).unwrap_err();
        match drive(&config, dir.path(), whole(), &script) {
            Ok(resumed) => assert_eq!(resumed, expected, "after a cut at operation {at}"),
            Err(LearnerError::Diverged { .. }) => stopped += 1,
            Err(error) => panic!("after a cut at operation {at}: {error}"),
        }
    }
    assert!(stopped * 2 < disk.operations() / 3, "{stopped} of {} stopped", disk.operations() / 3);
    // The journal repeats it from the first weights on, long after that checkpoint would have been removed.
    let replayed = Learner::repeat_run(parts(&config, dir.path(), whole()), None).unwrap();
    assert_eq!(replayed.weights, expected.weights);
    let kept = checkpoint_dir(dir.path()).join("step-2-e1");
    assert!(kept.is_dir(), "the journal refers to it");
}

#[test]
fn going_back_twice_is_refused() {
    let (config, script) = (regression(20), poisoned(40, 6..30));
    let dir = tempfile::tempdir().unwrap();
    let error = drive(&config, dir.path(), whole(), &script).unwrap_err();
    assert!(matches!(error, LearnerError::Diverged { count: 3, .. }), "{error}");
    assert_eq!(rollbacks(dir.path()).len(), 1);
    // It stays refused: a restart does not train on.
    let again = drive(&config, dir.path(), whole(), &script).unwrap_err();
    assert!(matches!(again, LearnerError::Diverged { .. }), "{again}");
}

#[test]
fn with_no_checkpoint_to_go_back_to_the_run_ends() {
    let (config, script) = (regression(20), poisoned(40, 0..12));
    let dir = tempfile::tempdir().unwrap();
    let error = drive(&config, dir.path(), whole(), &script).unwrap_err();
    assert!(matches!(error, LearnerError::Diverged { step: 0, .. }), "{error}");
}

#[test]
fn a_run_taken_up_with_another_model_is_refused() {
    let (config, script) = (config(3), script(22));
    let dir = tempfile::tempdir().unwrap();
    drive(&config, dir.path(), whole(), &script).unwrap();
    for entry in std::fs::read_dir(checkpoint_dir(dir.path())).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
    let disk = whole();
    let mut parts = parts(&config, dir.path(), disk.clone());
    let params = crate::testing::params(freewheel_types::WeightsDtype::F32);
    let trainer = Box::new(crate::testing::Bigram::new(&params));
    parts.policy = crate::policy::Policy::new(
        trainer,
        params,
        config.optimizer_settings(),
        freewheel_kernels::Threads::single(),
    );
    let checkpoints = Checkpoints::open(disk, &checkpoint_dir(dir.path()), 2).unwrap();
    let error = Learner::recover(parts, checkpoints, 9).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("model.path"), "{error}");
}
