//! Where log lines go: a run's go to its file, everybody's warnings to standard error.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Mutex;

use anyhow::Context as _;
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::cli::fail::Explain as _;

/// Warnings to standard error; for commands that belong to no run.
pub fn to_terminal() {
    let terminal = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let _ = tracing_subscriber::registry().with(terminal.with_filter(LevelFilter::WARN)).try_init();
}

/// Everything that passes `filter` to `file`; errors to standard error too.
///
/// # Errors
/// If the filter makes no sense or the file cannot be opened.
pub fn to_file(file: &Path, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .with_context(|| format!("log.level is {filter:?}, which is no filter"))
        .input_hint("for example \"info\" or \"info,freewheel_actor=debug\"")?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .with_context(|| format!("{} cannot be opened", file.display()))?;
    let to_file =
        tracing_subscriber::fmt::layer().with_ansi(false).with_writer(Mutex::new(log)).with_filter(filter);
    let terminal =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).without_time();
    let _ = tracing_subscriber::registry()
        .with(to_file)
        .with(terminal.with_filter(LevelFilter::ERROR))
        .try_init();
    Ok(())
}
