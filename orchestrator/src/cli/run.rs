//! `freewheel run`, and the single roles of a run for a cluster.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use freewheel_actor::ActorMetrics;
use freewheel_queue::QueueSecret;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::ConfigArgs;
use super::fail::Explain as _;
use super::recipe::Recipe;
use super::reward_bench::RewardBenchArgs;
use super::reward_check::RewardCheckArgs;
use crate::config::Loaded;
use crate::folder::{IfExists, names};
use crate::prompts::PoolMetrics;
use crate::run::redis::{connect, learner_metrics};
use crate::run::roles::{self, Links};
use crate::run::stats::{ActorStat, PoolStat, to_file};
use crate::run::{cores, prepare};
use crate::signals::Signals;

/// Run the whole job on this machine: all roles, live progress, final summary and report.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel run configs/quickstart.toml\n  \
    freewheel run configs/quickstart.toml --set learner.steps=50 --set run.name=short\n  \
    freewheel run configs/quickstart.toml --set queue.backend=redis --set actor.processes=2\n  \
    freewheel run configs/quickstart.toml --resume\n  \
    freewheel run my-recipe.toml          # several [[stage]]s, each with a job: \"sft\", \"run\" or \"dpo\"")]
pub struct RunArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Go on with a run that was stopped or killed.
    #[arg(long, conflicts_with = "force")]
    resume: bool,
    /// Delete an earlier run of this name first.
    #[arg(long)]
    force: bool,
    /// Print the final summary as JSON.
    #[arg(long)]
    json: bool,
}

impl RunArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let if_exists = match (self.resume, self.force) {
            (true, _) => IfExists::Resume,
            (_, true) => IfExists::Replace,
            _ => IfExists::Refuse,
        };
        if let Some(recipe) = Recipe::read(&self.config)? {
            return recipe.run(if_exists, self.json);
        }
        let loaded = self.config.load()?;
        runtime()?.block_on(crate::run::run(loaded, if_exists, self.json))
    }
}

/// The runtime of everything asynchronous: I/O only, computing has threads of its own.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// A role's place in a run.
#[derive(Debug, Args)]
pub struct RoleArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    place: PlaceArgs,
}

/// How a role reaches its run.
#[derive(Debug, Args)]
struct PlaceArgs {
    /// Redis of the run. Default: `queue.url` of the config, or the variable FREEWHEEL_QUEUE_URL.
    #[arg(long, value_name = "URL")]
    queue: Option<String>,
    /// Name of this process within the run; two processes of a run must not share one. Default: role and process id.
    #[arg(long)]
    name: Option<String>,
    /// End when this process is no longer the parent (given by `freewheel run`).
    #[arg(long, hide = true)]
    parent: Option<u32>,
}

/// One actor of a run: leases prompts, generates rollouts, follows the weights. Join and leave at will.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel actor configs/quickstart.toml --queue redis://10.0.0.1:6379/0 --name actor-7"
)]
pub struct ActorArgs {
    #[command(flatten)]
    role: RoleArgs,
}

/// One reward worker of a run: scores rollouts. Join and leave at will.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:\n  freewheel reward configs/quickstart.toml --queue redis://10.0.0.1:6379/0\n  \
        freewheel reward check configs/quickstart.toml cases.jsonl"
)]
pub struct RewardArgs {
    #[command(subcommand)]
    tool: Option<RewardTool>,
    /// Config file (TOML).
    #[arg(required = true)]
    config: Option<PathBuf>,
    /// Change one value: `--set learner.learning_rate=1e-4`. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Tools around rewards that need no run.
#[derive(Debug, Subcommand)]
enum RewardTool {
    Check(RewardCheckArgs),
    Bench(RewardBenchArgs),
}

/// The learner of a run: one at a time; a second waits until the first is gone.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel learner configs/quickstart.toml --queue redis://10.0.0.1:6379/0"
)]
pub struct LearnerArgs {
    #[command(flatten)]
    role: RoleArgs,
}

/// The prompt pool of a run: chooses prompts and issues tasks. One per run.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  freewheel prompts configs/quickstart.toml --queue redis://10.0.0.1:6379/0"
)]
pub struct PromptsArgs {
    #[command(flatten)]
    role: RoleArgs,
}

/// A role process, ready to work.
struct Joined {
    loaded: Loaded,
    links: Links,
    name: String,
    /// SIGTERM, Ctrl-C, or a parent that is gone.
    shutdown: CancellationToken,
}

impl RoleArgs {
    async fn join(self, role: &str) -> anyhow::Result<Joined> {
        let mut loaded = self.config.load()?;
        if let Some(url) = self.place.queue {
            loaded.config.queue.url = QueueSecret(url);
        }
        let url = loaded.config.queue.url.clone();
        if url.0 == "managed" {
            return Err(anyhow::anyhow!("a role that joins a run needs the address of its queue"))
                .input_hint("--queue redis://host:6379/0 (a managed server belongs to the `freewheel run` that started it)");
        }
        let dir = loaded.run_dir();
        std::fs::create_dir_all(&dir)?;
        crate::logging::to_file(&dir.join(names::LOG), &loaded.config.log.level)?;
        let links = connect(&url, &loaded.run_id(), &loaded.config.queue).await?;
        let shutdown = Signals::listen()?.drain;
        if let Some(parent) = self.place.parent {
            end_with(parent, shutdown.clone());
        }
        let name = self.place.name.unwrap_or_else(|| format!("{role}-{}", std::process::id()));
        tracing::info!(role, name, pid = std::process::id(), "joined");
        Ok(Joined { loaded, links, name, shutdown })
    }
}

/// Cancels `shutdown` when this process has another parent: the supervisor died and nobody would end us.
fn end_with(parent: u32, shutdown: CancellationToken) {
    tokio::spawn(async move {
        while nix::unistd::getppid().as_raw() == parent as i32 {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        tracing::warn!(parent, "the supervisor is gone");
        shutdown.cancel();
    });
}

impl ActorArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        runtime()?.block_on(async {
            let Joined { loaded, links, name, shutdown } = self.role.join("actor").await?;
            let model = prepare::model(&loaded)?;
            let (threads, _) = cores::share(&loaded);
            let index = name.rsplit('-').next().and_then(|index| index.parse().ok());
            let index = index.filter(|&index: &usize| index < loaded.config.actor.processes).unwrap_or(0);
            cores::pin(&loaded, index * threads, threads);
            let (sender, view) = watch::channel(ActorMetrics::default());
            tokio::spawn(to_file::<ActorMetrics, ActorStat>(loaded.run_dir(), name.clone(), view));
            roles::actor(&loaded, &model, links, name, threads, sender, shutdown).await.map(drop)
        })
    }
}

impl RewardArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = match (self.tool, self.config) {
            (Some(RewardTool::Check(args)), _) => return args.run(),
            (Some(RewardTool::Bench(args)), _) => return args.run(),
            (None, Some(config)) => ConfigArgs { config, overrides: self.overrides },
            (None, None) => {
                return Err(anyhow::anyhow!("no config is given")).input_hint("freewheel reward CONFIG");
            }
        };
        let role = RoleArgs { config, place: self.place };
        runtime()?.block_on(async {
            let Joined { loaded, links, name, shutdown } = role.join("reward").await?;
            roles::reward(&loaded, links, name, shutdown).await.map(drop)
        })
    }
}

impl LearnerArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        runtime()?.block_on(async {
            let Joined { loaded, links, shutdown, .. } = self.role.join("learner").await?;
            let model = prepare::model(&loaded)?;
            let (actor_threads, threads) = cores::share(&loaded);
            cores::pin(&loaded, loaded.config.actor.processes * actor_threads, threads);
            std::fs::create_dir_all(loaded.run_dir().join(names::ROLLOUTS))?;
            let metrics = learner_metrics(&loaded)?;
            let dir = loaded.run_dir();
            roles::learner(&loaded, model, links, Path::new(&dir), threads, metrics, shutdown).await.map(drop)
        })
    }
}

impl PromptsArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        runtime()?.block_on(async {
            let Joined { loaded, links, shutdown, .. } = self.role.join("prompts").await?;
            let prompts = prepare::training_prompts(&loaded)?;
            let (sender, view) = watch::channel(PoolMetrics::default());
            tokio::spawn(to_file::<PoolMetrics, PoolStat>(loaded.run_dir(), "prompts".into(), view));
            let dir = loaded.run_dir();
            roles::prompts(&loaded, prompts, links, &dir, sender, shutdown).await.map(drop)
        })
    }
}
