//! `[reward.sandbox]`.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The `[reward.sandbox]` section: what code that is judged by running it may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxConfig {
    /// What runs the program: it gets the file's name as its last argument. Default ["/usr/bin/python3", "-I", "-S", "-B"].
    pub command: Vec<String>,
    /// Folders and files of this machine that a program may read, and run what is in them. Default /usr, /bin, /sbin, /lib,
    /// /lib64 and /etc/ld.so.cache. Those that do not exist are left out.
    pub read_only: Vec<String>,
    /// Processor time of each process. Seconds, 1 to 600, default 2.
    pub cpu_s: u64,
    /// Time of one run. Seconds, 1 to 600, default 4.
    pub wall_s: u64,
    /// Address space of each process. MiB, 16 to 1048576, default 512.
    pub memory_mib: u64,
    /// Processes and threads at a time. 4 to 4096, default 16.
    pub processes: u64,
    /// Largest file, and all files together. MiB, 1 to 65536, default 16.
    pub file_mib: u64,
    /// Open files of each process. 16 to 65536, default 64.
    pub open_files: u64,
    /// Most that is written to standard output, and to standard error. KiB, 1 to 16384, default 64.
    pub output_kib: u64,
    /// Go on without Landlock where the kernel has none. Namespaces and system call filters are still required. Default false:
    /// such a machine is refused.
    pub allow_without_landlock: bool,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect();
        Self {
            command: list(&["/usr/bin/python3", "-I", "-S", "-B"]),
            read_only: list(&["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache"]),
            cpu_s: 2,
            wall_s: 4,
            memory_mib: 512,
            processes: 16,
            file_mib: 16,
            open_files: 64,
            output_kib: 64,
            allow_without_landlock: false,
        }
    }
}

impl SandboxConfig {
    /// Time of one run.
    pub fn wall(&self) -> Duration {
        Duration::from_secs(self.wall_s)
    }

    /// Everything out of range, as (key, message).
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let ranges = [
            ("cpu_s", self.cpu_s, 1, 600),
            ("wall_s", self.wall_s, 1, 600),
            ("memory_mib", self.memory_mib, 16, 1 << 20),
            ("processes", self.processes, 4, 4096),
            ("file_mib", self.file_mib, 1, 1 << 16),
            ("open_files", self.open_files, 16, 1 << 16),
            ("output_kib", self.output_kib, 1, 1 << 14),
        ];
        let mut problems: Vec<_> = ranges
            .into_iter()
            .filter(|(_, value, low, high)| !(low..=high).contains(&value))
            .map(|(key, value, low, high)| (key, format!("must be {low} to {high}, is {value}")))
            .collect();
        if self.command.first().is_none_or(|program| !program.starts_with('/')) {
            problems.push(("command", "must begin with the whole path of a program".into()));
        }
        for path in &self.read_only {
            if !path.starts_with('/') || path == "/" || path.contains("..") {
                problems.push(("read_only", format!("{path:?} is no whole path below the root")));
            }
        }
        problems
    }
}
