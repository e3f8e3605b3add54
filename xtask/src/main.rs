//! Chores: `cargo xtask check` is the gate, `cargo xtask reference` regenerates what is generated, `cargo xtask cross` compiles for
//! the other architecture.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::Parser;

#[derive(Parser)]
enum Chore {
    /// Format, lints, tests, docs, generated files: everything that must hold.
    Check,
    /// Compile for aarch64 Linux, where kernels are NEON; warnings fail.
    Cross,
    /// Write docs/config-reference.md from the doc comments of the config structs.
    Reference {
        /// Only compare; fail if it is stale.
        #[arg(long)]
        check: bool,
    },
}

fn main() -> anyhow::Result<()> {
    match Chore::parse() {
        Chore::Check => check(),
        Chore::Cross => cross(),
        Chore::Reference { check } => reference(check),
    }
}

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or_else(|| here.to_owned(), Path::to_owned)
}

fn check() -> anyhow::Result<()> {
    cargo(&["fmt", "--all", "--check"], &[])?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])?;
    // Off by default, and built without a toolkit.
    cargo(&["clippy", "--package", "freewheel", "--features", "cuda", "--", "-D", "warnings"], &[])?;
    cargo(&["clippy", "--package", "freewheel", "--no-default-features", "--", "-D", "warnings"], &[])?;
    cargo(&["test", "--workspace"], &[])?;
    cargo(&["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")])?;
    reference(true)
}

fn cross() -> anyhow::Result<()> {
    const TARGET: &str = "aarch64-unknown-linux-gnu";
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let printed = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output()?;
    let libraries = String::from_utf8(printed.stdout).context("the path of std is no text")?;
    if !Path::new(libraries.trim()).is_dir() {
        bail!("no std for {TARGET}\nhint: `rustup target add {TARGET}`");
    }
    let hint = "hint: where a C dependency fails, a cross compiler is missing: Debian's gcc-aarch64-linux-gnu";
    let args = ["check", "--workspace", "--all-targets", "--target", TARGET];
    cargo(&args, &[("RUSTFLAGS", "-D warnings")]).context(hint)
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> anyhow::Result<()> {
    eprintln!("cargo {}", args.join(" "));
    let binary = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(binary).args(args).envs(env.iter().copied()).current_dir(root()).status()?;
    if !status.success() {
        bail!("cargo {} failed", args.join(" "));
    }
    Ok(())
}

fn reference(check: bool) -> anyhow::Result<()> {
    let path = root().join("docs/config-reference.md");
    let wanted = freewheel::config::reference::markdown();
    if check {
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        if found != wanted {
            bail!("{} is stale; `cargo xtask reference` writes it", path.display());
        }
        return Ok(());
    }
    std::fs::write(&path, wanted).with_context(|| format!("{} cannot be written", path.display()))
}
