//! `freewheel replay`: a run's updates made again from its journal.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use freewheel_learner::{LearnerError, RunShape};
use serde_json::json;

use super::fail::Explain as _;
use super::table::table;
use crate::folder::{RunFolder, names};
use crate::run::{prepare, roles};

/// Make the updates of a run again from its journal and compare the weights after each; writes nothing.
///
/// Exit code 1 at the first update that comes out different.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  freewheel replay runs/quickstart\n  freewheel replay runs/quickstart --step 20 --json"
)]
pub struct ReplayArgs {
    /// The run's folder, or its name below runs/.
    run: PathBuf,
    /// Repeat up to this step only, from the newest checkpoint before it. Default: all steps from the initial weights.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    step: Option<u64>,
    /// Compute threads; 0 takes all cores. The result does not depend on it.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

impl ReplayArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let folder = RunFolder::open(&self.run)?;
        let loaded = crate::config::load(&folder.file(names::CONFIG), &[])?;
        if !freewheel_learner::core::journal_dir(folder.path()).is_dir() {
            return Err(anyhow::anyhow!("{} holds no journal", folder.path().display())).input();
        }
        let model = prepare::model(&loaded)?;
        let mut config = roles::learner_config(&loaded.config);
        config.threads = self.threads;
        let shape = RunShape {
            group_size: loaded.config.prompts.group_size,
            max_new_tokens: loaded.config.actor.max_new_tokens as u64,
            duals: roles::duals(&loaded.config.reward),
        };
        let began = Instant::now();
        let result = freewheel_learner::replay(config, model, folder.path(), shape, self.step);
        let seconds = began.elapsed().as_secs_f64();
        let run = folder.path();
        let replayed = match result {
            Ok(replayed) => replayed,
            Err(LearnerError::ReplayMismatch { step, computed, journalled }) => {
                if self.json {
                    let value = json!({
                        "run": run, "same": false, "step": step, "computed": computed, "journalled": journalled,
                        "seconds": seconds,
                    });
                    println!("{}", serde_json::to_string_pretty(&value)?);
                }
                return Err(LearnerError::ReplayMismatch { step, computed, journalled })
                    .hint("is it the binary, the model and the config.toml that the run was made with?");
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(step) = self.step.filter(|step| replayed.step < *step) {
            return Err(anyhow::anyhow!(
                "{} has no step {step}, its journal ends at {}",
                run.display(),
                replayed.step
            ))
            .input();
        }
        if self.json {
            let value = json!({
                "run": run, "same": true, "from_step": replayed.from_step, "steps": replayed.steps,
                "step": replayed.step, "weights": replayed.weights, "seconds": seconds,
            });
            println!("{}", serde_json::to_string_pretty(&value)?);
            return Ok(());
        }
        let rows = [
            ("result", format!("{} updates, each with the weights of the journal", replayed.steps)),
            ("steps", format!("{} to {}", replayed.from_step, replayed.step)),
            ("weights", replayed.weights),
            ("time", format!("{seconds:.1} s")),
        ];
        let rows: Vec<Vec<String>> =
            rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
        print!("{}", table(&["run", &run.display().to_string()], &rows));
        Ok(())
    }
}
