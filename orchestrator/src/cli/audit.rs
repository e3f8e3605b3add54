//! `freewheel audit`: is a run's audit log as it was written?

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::fail::Explain as _;
use crate::folder::{RunFolder, audit, names};

/// The audit log of a run.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel audit verify runs/quickstart")]
pub struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    Verify(VerifyArgs),
}

/// Check every record of the chain; exit code 1 at the first that was changed, left out, put in or moved.
///
/// A tail that was cut off shows only against an earlier result: keep the hash that is printed.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  freewheel audit verify runs/quickstart")]
struct VerifyArgs {
    /// The run's folder, or its name below runs/.
    run: PathBuf,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

impl AuditArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let AuditCommand::Verify(VerifyArgs { run, json }) = self.command;
        let folder = RunFolder::open(&run)?;
        let path = folder.file(names::AUDIT);
        if !path.exists() {
            return Err(anyhow::anyhow!("{} holds no audit log", folder.path().display())).input();
        }
        let verified = audit::verify(&path)?;
        if json {
            println!("{}", json!({"records": verified.records, "last": verified.last}));
        } else {
            println!("{} records, the chain holds; the last hash is {}", verified.records, verified.last);
        }
        Ok(())
    }
}
