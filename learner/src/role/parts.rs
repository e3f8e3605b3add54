//! A learner's parts from a loaded model, for a run and for its replay.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use freewheel_kernels::Threads;
use freewheel_model::{LoadedModel, Params, SaveOptions};

use crate::LearnerError;
use crate::checkpoint::ModelWriter;
use crate::config::LearnerConfig;
use crate::core::{Learner, LearnerParts, Replayed};
use crate::critic::{Critic, TransformerCritic};
use crate::disk::{Disk, SystemDisk};
use crate::dual::DualConfig;
use crate::fit::threads;
use crate::metrics::NoMetrics;
use crate::policy::Policy;
use crate::trainer::PolicyTrainer;
use crate::transformer::TransformerTrainer;

fn frozen(model: &LoadedModel, threads: Threads) -> Box<dyn PolicyTrainer> {
    Box::new(TransformerTrainer::new(&model.model, &model.params, threads))
}

fn critic(config: &LearnerConfig, model: &LoadedModel, threads: Threads) -> Critic {
    let (trainer, params) = TransformerCritic::new(model, threads.clone());
    Critic {
        model: Policy::new(Box::new(trainer), params, config.optimizer_settings(), threads),
        clip: Some(config.loss.value_clip.unwrap_or(0.2)),
    }
}

/// Writes checkpoints that every tool of the field can load.
struct HuggingFaceWriter {
    model: LoadedModel,
    options: SaveOptions,
    disk: Arc<dyn Disk>,
}

impl ModelWriter for HuggingFaceWriter {
    fn write(&self, dir: &Path, weights: &Params) -> Result<(), LearnerError> {
        let sink = &mut |name: &str, pieces: &[&[u8]]| {
            self.disk
                .write(&dir.join(name), &mut |out| pieces.iter().try_for_each(|piece| out.write_all(piece)))
        };
        freewheel_model::save_into(&self.model, weights, &self.options, sink)
            .map_err(LearnerError::disk(dir, "write the model"))
    }
}

/// The parts of a learner that trains the transformer of `model`.
pub(super) fn parts(
    config: LearnerConfig,
    model: LoadedModel,
    run_dir: PathBuf,
    disk: Arc<dyn Disk>,
) -> LearnerParts {
    let threads = threads(config.threads);
    let reference = (config.loss.kl_coef > 0.0).then(|| frozen(&model, threads.clone()));
    let critic = config.loss.needs_critic().then(|| critic(&config, &model, threads.clone()));
    let trainer =
        TransformerTrainer::new(&model.model, &model.params, threads.clone()).configured(&config.optimizer);
    let options = SaveOptions { shard_bytes: config.checkpoint_shard_mib << 20 };
    LearnerParts {
        policy: Policy::new(Box::new(trainer), model.params.clone(), config.optimizer_settings(), threads),
        config,
        reference,
        critic,
        group_size: 1,
        max_new_tokens: model.model.spec().max_positions as u64,
        tokenizer: model.tokenizer.digest(),
        images: model.tokenizer.clone(),
        base: model.source.display().to_string(),
        run_dir,
        writer: Arc::new(HuggingFaceWriter { model, options, disk: disk.clone() }),
        disk,
        curriculum: None,
        duals: DualConfig::default(),
        metrics: Arc::new(NoMetrics),
    }
}

/// Repeats the updates of the run in `run_dir` from its journal and compares the weights after each with those journalled; up to
/// step `until`, from the newest checkpoint before it, or all of them from the initial weights. Writes nothing.
///
/// # Errors
/// [`LearnerError::ReplayMismatch`] at the first step that differs.
pub fn replay(
    config: LearnerConfig,
    model: LoadedModel,
    run_dir: &Path,
    shape: RunShape,
    until: Option<u64>,
) -> Result<Replayed, LearnerError> {
    let mut parts = parts(config, model, run_dir.to_owned(), Arc::new(SystemDisk));
    (parts.group_size, parts.max_new_tokens) = (shape.group_size, shape.max_new_tokens);
    parts.duals = shape.duals;
    Learner::repeat_run(parts, until)
}

/// What of a run's config the learner needs besides its own section.
#[derive(Clone, Debug, PartialEq)]
pub struct RunShape {
    /// Rollouts in a group.
    pub group_size: u32,
    /// Longest completion the run allows, tokens.
    pub max_new_tokens: u64,
    /// Costs that are kept under limits.
    pub duals: DualConfig,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_over_the_limit_is_cut_into_shards_that_load() {
        let sprout = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/sprout");
        let model = freewheel_model::load(&sprout, None).unwrap();
        let params = model.params.clone();
        for (mib, cut) in [(1, true), (64, false)] {
            let dir = tempfile::tempdir().unwrap();
            let config = LearnerConfig::default();
            let config = LearnerConfig {
                training: crate::TrainingConfig { checkpoint_shard_mib: mib, ..config.training.clone() },
                ..config
            };
            let parts = parts(config, model.clone(), dir.path().to_owned(), Arc::new(SystemDisk));
            parts.writer.write(dir.path(), &params).unwrap();
            let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
            let shards = names.filter(|name| name.to_string_lossy().ends_with(".safetensors")).count();
            assert_eq!(shards > 1, cut, "{shards} files of at most {mib} MiB");
            assert_eq!(dir.path().join("model.safetensors.index.json").exists(), cut);
            assert!(freewheel_model::load(dir.path(), None).unwrap().params == params);
        }
    }
}
