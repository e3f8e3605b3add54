//! The command line: one file a command, each with an example in its `--help`.

mod ablation;
mod audit;
mod bench;
mod config;
pub mod distill;
mod doctor;
pub mod dpo;
mod eval;
mod explain;
mod export;
pub mod fail;
mod filter;
mod generate;
mod guard;
mod jobs;
mod logprobs;
mod measure;
mod model;
mod models;
pub mod recipe;
mod redteam;
mod replay;
mod reward_bench;
mod reward_check;
pub mod reward_model;
mod run;
mod score;
pub mod sft;
mod status;
mod table;
mod tokenize;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{ConfigError, Loaded};

pub use score::reward_json;
pub use table::{bytes, table};

/// Asynchronous online RL post-training of language models.
///
/// prompt pool → actors → reward → learner → weights → actors: one command on one machine, or one role a process on many.
#[derive(Debug, Parser)]
#[command(name = "freewheel", version, propagate_version = true, max_term_width = 110)]
#[command(
    after_help = "Example:\n  freewheel run configs/quickstart.toml\n\nExit codes: 0 done, 1 the work failed, \
    2 wrong usage, 78 bad config or input, 130 interrupted."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::RunArgs),
    Actor(run::ActorArgs),
    Reward(run::RewardArgs),
    Learner(run::LearnerArgs),
    Prompts(run::PromptsArgs),
    Status(status::StatusArgs),
    Stop(status::StopArgs),
    Report(status::ReportArgs),
    Replay(replay::ReplayArgs),
    Explain(explain::ExplainArgs),
    Audit(audit::AuditArgs),
    Sft(sft::SftArgs),
    Dpo(dpo::DpoArgs),
    Distill(distill::DistillArgs),
    RewardModel(reward_model::RewardModelArgs),
    Eval(eval::EvalArgs),
    Filter(filter::FilterArgs),
    Measure(measure::MeasureArgs),
    Export(export::ExportArgs),
    Redteam(redteam::RedteamArgs),
    Generate(generate::GenerateArgs),
    Logprobs(logprobs::LogprobsArgs),
    Tokenize(tokenize::TokenizeArgs),
    Score(score::ScoreArgs),
    Guard(guard::GuardArgs),
    InitModel(models::InitModelArgs),
    Upcycle(models::UpcycleArgs),
    Convert(models::ConvertArgs),
    Config(config::ConfigCommand),
    Doctor(doctor::DoctorArgs),
    Bench(bench::BenchCommand),
}

/// A config file and changes to it.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Config file (TOML).
    pub config: PathBuf,
    /// Change one value: `--set learner.learning_rate=1e-4`. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

impl ConfigArgs {
    /// Reads and checks the config.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        crate::config::load(&self.config, &self.overrides)
    }
}

/// Parses the command line, runs the command, reports.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(args) => args.run(),
        Command::Actor(args) => args.run(),
        Command::Reward(args) => args.run(),
        Command::Learner(args) => args.run(),
        Command::Prompts(args) => args.run(),
        Command::Status(args) => args.run(),
        Command::Stop(args) => args.run(),
        Command::Report(args) => args.run(),
        Command::Replay(args) => args.run(),
        Command::Explain(args) => args.run(),
        Command::Audit(args) => args.run(),
        Command::Sft(args) => args.run(),
        Command::Dpo(args) => args.run(),
        Command::Distill(args) => args.run(),
        Command::RewardModel(args) => args.run(),
        Command::Eval(args) => args.run(),
        Command::Filter(args) => args.run(),
        Command::Measure(args) => args.run(),
        Command::Export(args) => args.run(),
        Command::Redteam(args) => args.run(),
        Command::InitModel(args) => args.run(),
        Command::Upcycle(args) => args.run(),
        Command::Convert(args) => args.run(),
        Command::Generate(args) => args.run(),
        Command::Logprobs(args) => args.run(),
        Command::Tokenize(args) => args.run(),
        Command::Score(args) => args.run(),
        Command::Guard(args) => args.run(),
        Command::Config(command) => command.run(),
        Command::Doctor(args) => args.run(),
        Command::Bench(command) => command.run(),
    };
    fail::finish(result)
}

/// The command line's definition, for snapshots and generated pages.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}
