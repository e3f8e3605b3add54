//! `freewheel doctor`: this machine, and what a config needs of it.

use std::path::{Path, PathBuf};

use clap::Args;
use freewheel_kernels::gpu::{self, Gpus};
use freewheel_kernels::measure;
use freewheel_queue::Backend;
use freewheel_queue::redis::managed::ManagedServer;
use freewheel_reward::sandbox::{Job, Outcome, attempt_escapes};
use freewheel_reward::{Sandbox, SandboxConfig};
use freewheel_types::WeightsDtype;
use serde_json::{Map, Value, json};

use super::ConfigArgs;
use super::fail::Explain as _;
use super::run::runtime;
use super::table::{bytes, table};
use crate::config::Loaded;
use crate::cost::{Cost, Plan, Reach};
use crate::run::prepare;

/// Look at this machine: processor, memory, disk, Redis; with a config, what a run of it will need.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  freewheel doctor\n  freewheel doctor configs/quickstart.toml --json")]
pub struct DoctorArgs {
    /// Config file: plans its memory and checks its inputs.
    config: Option<PathBuf>,
    /// Change one value of the config. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    overrides: Vec<String>,
    /// Measure memory bandwidth and compute peak (a second each).
    #[arg(long)]
    measure: bool,
    /// Try the code sandbox with every program of the escape corpus, exit code 1 if one gets out; and tell how many short programs two threads judge a
    /// second.
    #[arg(long)]
    sandbox: bool,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// What was found: facts in order, and what is wrong or unwise.
#[derive(Default)]
struct Findings {
    facts: Map<String, Value>,
    warnings: Vec<String>,
}

impl DoctorArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mut found = Findings::default();
        let mut sandbox_config = SandboxConfig::default();
        machine(&mut found, self.measure);
        if let Some(config) = self.config {
            let loaded = ConfigArgs { config, overrides: self.overrides }.load()?;
            disk(&mut found, &loaded.run_dir());
            queue(&mut found, &loaded)?;
            plan(&mut found, &loaded)?;
            sandbox_config = loaded.config.reward.sandbox;
        } else {
            disk(&mut found, Path::new("."));
        }
        let escaped = if self.sandbox { sandbox(&mut found, &sandbox_config)? } else { 0 };
        if self.json {
            println!(
                "{}",
                serde_json::to_string_pretty(&json!({"facts": found.facts, "warnings": found.warnings}))?
            );
            return contained(escaped);
        }
        let rows: Vec<Vec<String>> = found
            .facts
            .iter()
            .map(|(name, value)| {
                let shown = match value {
                    Value::Number(n) if name.ends_with("_bytes") => {
                        n.as_u64().map_or_else(|| n.to_string(), bytes)
                    }
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                };
                vec![name.trim_end_matches("_bytes").to_owned(), shown]
            })
            .collect();
        print!("{}", table(&["what", "found"], &rows));
        found.warnings.iter().for_each(|warning| println!("warning: {warning}"));
        contained(escaped)
    }
}

fn contained(escaped: usize) -> anyhow::Result<()> {
    match escaped {
        0 => Ok(()),
        n => Err(anyhow::anyhow!("{n} programs got out of the sandbox")),
    }
}

/// Runs the escape corpus; gives how many got out.
fn sandbox(found: &mut Findings, config: &SandboxConfig) -> anyhow::Result<usize> {
    let sandbox = Sandbox::new(config.clone())?;
    sandbox.probe().hint("`freewheel doctor` without --sandbox looks at the rest of the machine")?;
    let attempts = attempt_escapes(&sandbox)?;
    let escaped: Vec<&str> = attempts.iter().filter(|a| a.escaped).map(|a| a.name).collect();
    found.facts.insert("sandbox_escapes_tried".into(), json!(attempts.len()));
    found.facts.insert("sandbox_escaped".into(), json!(escaped));
    if config.command == SandboxConfig::default().command {
        found.facts.insert("sandbox_programs_per_s".into(), json!((rate(&sandbox)? * 10.0).round() / 10.0));
    }
    Ok(escaped.len())
}

/// Short Python programs a second, each in a sandbox of its own, on two threads.
fn rate(sandbox: &Sandbox) -> anyhow::Result<f64> {
    const EACH: usize = 50;
    let mut command = sandbox.config().command.clone();
    command.push("main.py".into());
    let files = vec![("main.py".to_owned(), "print(int(input()) + 1)".to_owned())];
    let job = Job { command, files, inputs: vec!["1".into()] };
    let begin = std::time::Instant::now();
    let one = || -> anyhow::Result<()> {
        for _ in 0..EACH {
            let finished = sandbox.run(&job)?;
            anyhow::ensure!(
                matches!(finished.as_slice(), [one] if one.outcome == Outcome::Exit(0)),
                "{finished:?}"
            );
        }
        Ok(())
    };
    std::thread::scope(|scope| [scope.spawn(one), scope.spawn(one)].map(|thread| thread.join()))
        .into_iter()
        .try_for_each(|done| done.expect("judging a program does not panic"))?;
    Ok(2.0 * EACH as f64 / begin.elapsed().as_secs_f64())
}

fn machine(found: &mut Findings, measured: bool) {
    let features = measure::cpu_features();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    found.facts.insert("cores".into(), json!(cores));
    found.facts.insert("kernels".into(), json!(features.used));
    if features.used != features.detected {
        found
            .warnings
            .push(format!("{} is there, FREEWHEEL_KERNELS chose {}", features.detected, features.used));
    }
    if features.used == "portable" {
        found
            .warnings
            .push("no vector instructions that the kernels know: expect a tenth of the speed or less".into());
    }
    graphics(found);
    for (name, key) in [("memory_bytes", "MemTotal:"), ("memory_available_bytes", "MemAvailable:")] {
        if let Some(value) = memory(key) {
            found.facts.insert(name.into(), json!(value));
        }
    }
    if measured {
        let threads = crate::policy::threads(0);
        let read = measure::read_bandwidth(&threads, 256 << 20);
        found.facts.insert("read_gb_per_s".into(), json!((read / 1e8).round() / 10.0));
        let product = measure::gemm_flops(&threads, freewheel_kernels::Precision::Bf16);
        found.facts.insert("bf16_gflop_per_s".into(), json!((product / 1e9).round()));
    }
}

fn graphics(found: &mut Findings) {
    let (driver, gpus) = match gpu::find() {
        Gpus::NotBuilt => {
            found.facts.insert("gpu".into(), json!("not looked for: built without the `cuda` feature"));
            return;
        }
        Gpus::NoDriver => {
            found.facts.insert("gpu".into(), json!("none: there is no NVIDIA driver library"));
            return;
        }
        Gpus::Refused(why) => {
            found.facts.insert("gpu".into(), json!("none"));
            found.warnings.push(format!("the NVIDIA driver is there and refuses: {why}"));
            return;
        }
        Gpus::Found { driver, gpus } => (driver, gpus),
    };
    found.facts.insert("gpu_driver".into(), json!(format!("CUDA {}.{}", driver.0, driver.1)));
    for (index, gpu) in gpus.iter().enumerate() {
        let (major, minor) = gpu.compute_capability;
        let shown = format!("{}, {}, compute capability {major}.{minor}", gpu.name, bytes(gpu.memory_bytes));
        found.facts.insert(format!("gpu_{index}"), json!(shown));
    }
    let used = if gpus.is_empty() { "none" } else { "not used yet: all kernels run on the processor" };
    found.facts.insert("gpu".into(), json!(used));
}

fn memory(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Free space where `path` is or will be.
fn disk(found: &mut Findings, path: &Path) {
    let there = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("."));
    let there = if there.as_os_str().is_empty() { Path::new(".") } else { there };
    if let Ok(stat) = nix::sys::statvfs::statvfs(there) {
        let free = stat.blocks_available() * stat.fragment_size();
        found.facts.insert("disk_free_bytes".into(), json!(free));
        if free < 1 << 30 {
            found.warnings.push(format!("less than 1 GiB free at {}", there.display()));
        }
    }
}

fn queue(found: &mut Findings, loaded: &Loaded) -> anyhow::Result<()> {
    let queue = &loaded.config.queue;
    if queue.backend == Backend::Memory {
        found.facts.insert("queue".into(), json!("memory"));
        return Ok(());
    }
    if queue.url.0 == "managed" {
        found.facts.insert("queue".into(), json!("a private server, started with the run"));
        if !ManagedServer::available() {
            found.warnings.push(
                "no redis-server or valkey-server on the PATH (Debian: apt-get install redis-server)".into(),
            );
        }
        return Ok(());
    }
    match runtime()?.block_on(freewheel_queue::redis::inspect(&queue.url)) {
        Ok(report) => {
            found.facts.insert(
                "queue".into(),
                json!(format!("{} {} at {}", report.server, report.version, report.address)),
            );
            found.warnings.extend(report.warnings);
        }
        Err(error) => found.warnings.push(error.to_string()),
    }
    Ok(())
}

/// Memory of a run in one process at its peak, by what holds it.
fn plan(found: &mut Findings, loaded: &Loaded) -> anyhow::Result<()> {
    let model = prepare::model(loaded)?;
    let element = match model.params.dtype() {
        WeightsDtype::Bf16 => 2,
        WeightsDtype::F32 => 4,
    };
    let reach = Reach::of(loaded, Some(&model.tokenizer), model.model.spec());
    let plan = Plan::of(&loaded.config, &Cost::of(&model.model, element), element, reach);
    for (name, value) in [
        ("parameters", plan.parameters),
        ("plan_actor_bytes", plan.actor),
        ("plan_learner_bytes", plan.learner),
        ("plan_learner_activations_bytes", plan.activations),
        ("plan_evaluation_bytes", plan.evaluation),
        ("plan_queue_bytes", plan.queue),
        ("plan_total_bytes", plan.total),
    ] {
        found.facts.insert(name.into(), json!(value));
    }
    if let Some(free) = memory("MemAvailable:").filter(|free| plan.total > *free) {
        found.warnings.push(format!(
            "the plan needs {}, {} are free: lower learner.micro_batch_tokens, actor.kv_bytes, actor.max_live or actor.processes",
            bytes(plan.total),
            bytes(free)
        ));
    }
    Ok(())
}
