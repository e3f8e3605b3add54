//! `freewheel config check | show | reference`.

use clap::{Args, Subcommand};
use freewheel_model::{Tokenizer, Transformer};
use freewheel_types::WeightsDtype;
use serde_json::{Map, Value, json};

use super::{ConfigArgs, bytes};
use crate::config::{Loaded, RunConfig, reference};
use crate::cost::{Cost, Plan, Reach};

/// Check, show or document a config.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel config check configs/quickstart.toml\n  \
    freewheel config show configs/quickstart.toml --set prompts.group_size=16\n  \
    freewheel config reference > docs/config-reference.md")]
pub struct ConfigCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Validate a config: every problem at once, exit code 78 if there is one.
    Check(CheckArgs),
    /// Print the resolved config with the origin of every value.
    Show(ShowArgs),
    /// Document every key, with type, range and default.
    Reference(ReferenceArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel config check configs/quickstart.toml")]
struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the problems as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel config show configs/quickstart.toml --set run.seed=7")]
struct ShowArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print the values as JSON, without origins.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel config reference > docs/config-reference.md")]
struct ReferenceArgs {
    /// Print the JSON schema instead, for editors.
    #[arg(long)]
    json: bool,
}

impl ConfigCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.action {
            Action::Check(args) => args.run(),
            Action::Show(args) => args.run(),
            Action::Reference(args) => {
                print!(
                    "{}",
                    if args.json {
                        reference::json_schema::<RunConfig>() + "\n"
                    } else {
                        reference::markdown()
                    }
                );
                Ok(())
            }
        }
    }
}

impl CheckArgs {
    fn run(self) -> anyhow::Result<()> {
        let result = self.config.load();
        if self.json {
            let problems = result.as_ref().err().map(|error| error.problems.as_slice()).unwrap_or_default();
            let rows: Vec<_> = problems
                .iter()
                .map(|p| json!({"at": p.origin.to_string(), "key": p.key, "message": p.message, "hint": p.hint}))
                .collect();
            println!("{}", json!({"ok": rows.is_empty(), "problems": rows}));
        }
        let loaded = result?;
        if !self.json {
            println!("{}: good, run name {}", loaded.path.display(), loaded.run_id());
            match memory_plan(&loaded) {
                Some(line) => println!("{line}"),
                None => println!("memory: not planned, there is no config.json at model.path yet"),
            }
        }
        Ok(())
    }
}

/// What the run will hold in memory at its peak; `None` if the model's configuration is not at hand or not understood. Reads no
/// weights and touches no network.
fn memory_plan(loaded: &Loaded) -> Option<String> {
    let path = loaded.resolve(&loaded.config.model.path).join("config.json");
    let json: Map<String, Value> = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
    let spec = freewheel_model::spec_from_config(&path, &json).ok()?;
    let wide = ["dtype", "torch_dtype"].iter().any(|key| json.get(*key) == Some(&json!("float32")));
    let element = match loaded.config.model.dtype.requested() {
        Some(WeightsDtype::F32) => 4,
        None if wide => 4,
        _ => 2,
    };
    let tokenizer = path.parent().and_then(|dir| Tokenizer::from_folder(dir).ok());
    let reach = Reach::of(loaded, tokenizer.as_ref(), &spec);
    let plan = Plan::of(&loaded.config, &Cost::of(&Transformer::new(spec), element), element, reach);
    Some(format!(
        "memory: {} at the peak with prompts of up to {} tokens: actors {}, learner {}, activations {}, evaluation {}, queue {}",
        bytes(plan.total),
        reach.prompt,
        bytes(plan.actor),
        bytes(plan.learner),
        bytes(plan.activations),
        bytes(plan.evaluation),
        bytes(plan.queue)
    ))
}

impl ShowArgs {
    fn run(self) -> anyhow::Result<()> {
        let loaded = self.config.load()?;
        if self.json {
            let mut value = serde_json::to_value(&loaded.config)?;
            // The same rule as in text: a password never shows.
            value["queue"]["url"] = json!(loaded.config.queue.url.to_string());
            println!("{}", serde_json::to_string_pretty(&value)?);
        } else {
            print!("{}", reference::show(&loaded));
        }
        Ok(())
    }
}
