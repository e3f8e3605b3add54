//! What a process gives up for good: rights, files, system calls, resources.

use std::fs::File;
use std::io::Write as _;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, Scope,
};
use nix::fcntl::{OFlag, openat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::Mode;

use super::{SandboxConfig, root, syscalls};

/// The user that programs run as, within the sandbox.
const USER: u32 = 1000;

/// Gives up everything but what the program needs. This process stays within the same bounds.
pub(super) fn confine(config: &SandboxConfig, proc: &File) -> Result<(), String> {
    limit(config)?;
    drop_rights(proc)?;
    prctl::set_no_new_privs().map_err(|e| format!("no_new_privs: {e}"))?;
    prctl::set_dumpable(false).map_err(|e| format!("dumpable: {e}"))?;
    match restrict_files(config) {
        Err(_) if config.allow_without_landlock => {}
        result => result.map_err(|e| {
            format!(
                "this kernel does not enforce Landlock at the level needed, 4 ({e}); \
                 reward.sandbox.allow_without_landlock = true goes on without it"
            )
        })?,
    }
    syscalls::filter()
}

fn limit(config: &SandboxConfig) -> Result<(), String> {
    let (mib, file) = (config.memory_mib << 20, config.file_mib << 20);
    let limits = [
        (Resource::RLIMIT_CPU, config.cpu_s, config.cpu_s + 1),
        (Resource::RLIMIT_AS, mib, mib),
        (Resource::RLIMIT_FSIZE, file, file),
        (Resource::RLIMIT_NOFILE, config.open_files, config.open_files),
        // Init itself: one thread, and four that feed, read and watch.
        (Resource::RLIMIT_NPROC, config.processes + 5, config.processes + 5),
        (Resource::RLIMIT_CORE, 0, 0),
        (Resource::RLIMIT_MEMLOCK, 0, 0),
        (Resource::RLIMIT_MSGQUEUE, 0, 0),
    ];
    for (resource, soft, hard) in limits {
        setrlimit(resource, soft, hard).map_err(|e| format!("{resource:?}: {e}"))?;
    }
    Ok(())
}

/// A user namespace in which this is an ordinary user; what it owned of the first one is out of reach.
fn drop_rights(proc: &File) -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|e| format!("no second user namespace: {e}"))?;
    let write = |name: &str, text: String| {
        let open = || openat(proc, name, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
        let mut file = File::from(open().map_err(|e| format!("cannot open {name}: {e}"))?);
        file.write_all(text.as_bytes()).map_err(|e| format!("cannot write {name}: {e}"))
    };
    write("self/setgroups", "deny".into())?;
    write("self/uid_map", format!("{USER} 0 1"))?;
    write("self/gid_map", format!("{USER} 0 1"))
}

fn restrict_files(config: &SandboxConfig) -> Result<(), landlock::RulesetError> {
    let abi = ABI::V4;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        // Newer kernels: device ioctls, signals and abstract sockets, too.
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .scope(Scope::from_all(ABI::V6))?;
    let mut created = ruleset.create()?.set_compatibility(CompatLevel::BestEffort);
    let readable = AccessFs::from_read(ABI::V5);
    for path in config.read_only.iter().map(String::as_str).chain(["/dev"]) {
        if let Ok(found) = PathFd::new(path) {
            let is_dir = std::fs::metadata(path).is_ok_and(|found| found.is_dir());
            let access = if is_dir { readable } else { readable & AccessFs::from_file(ABI::V5) };
            created = created.add_rule(PathBeneath::new(found, access))?;
        }
    }
    for path in [root::WORK, "/tmp"] {
        let access = AccessFs::from_all(ABI::V4) & !AccessFs::MakeChar & !AccessFs::MakeBlock;
        if let Ok(found) = PathFd::new(path) {
            created = created.add_rule(PathBeneath::new(found, access))?;
        }
    }
    for device in ["/dev/null", "/dev/zero", "/dev/full"] {
        if let Ok(found) = PathFd::new(device) {
            let access = AccessFs::ReadFile | AccessFs::WriteFile;
            created = created.add_rule(PathBeneath::new(found, access))?;
        }
    }
    created.restrict_self().map(drop)
}
