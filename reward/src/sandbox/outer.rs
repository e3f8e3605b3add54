//! The helper's first half: into new namespaces, then start init in them.

use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, getegid, geteuid, getuid, setgid, setgroups, setuid};

/// Second argument that makes the helper init.
pub(super) const INIT_ARG: &str = "init";

/// The user that root becomes: limits on processes do not hold for root, not even in a namespace of its own.
const NOBODY: u32 = 65534;

fn drop_root() -> Result<(), String> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let failed = |what: &'static str| move |e: nix::Error| format!("cannot stop being root: {what}: {e}");
    setgroups(&[]).map_err(failed("groups"))?;
    setgid(Gid::from_raw(NOBODY)).map_err(failed("group"))?;
    setuid(Uid::from_raw(NOBODY)).map_err(failed("user"))?;
    // Another user's process cannot write the maps of its own namespace otherwise.
    prctl::set_dumpable(true).map_err(failed("dumpable"))?;
    match getuid().is_root() || geteuid().is_root() {
        true => Err("still root, for whom limits on processes do not hold".into()),
        false => Ok(()),
    }
}

/// Enters the namespaces and runs init to its end; the plan and the report pass through untouched.
pub(super) fn main() -> Result<(), String> {
    drop_root()?;
    let (uid, gid) = (geteuid(), getegid());
    let flags = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(flags).map_err(|e| {
        format!("this kernel gives no new namespaces ({e}); are unprivileged user namespaces switched off?")
    })?;
    let map = |file: &str, text: String| {
        std::fs::write(format!("/proc/self/{file}"), text).map_err(|e| format!("cannot write {file}: {e}"))
    };
    map("setgroups", "deny".into())?;
    map("uid_map", format!("0 {uid} 1"))?;
    map("gid_map", format!("0 {gid} 1"))?;
    let status = Command::new("/proc/self/exe")
        .args([super::HELPER_ARG, INIT_ARG])
        .env_clear()
        .stdin(Stdio::inherit())
        .stdout(Stdio::inherit())
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("init ended with {status}")),
        Err(error) => Err(format!("cannot start init: {error}")),
    }
}
