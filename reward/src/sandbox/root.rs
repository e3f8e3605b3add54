//! A root of its own: a small tmpfs, read-only system folders, a working folder; nothing else of this machine.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::pivot_root;

use super::SandboxConfig;

/// Where the program works; the only place it can write, with /tmp.
pub(super) const WORK: &str = "/box";
const OLD: &str = "/oldroot";
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];

/// Makes the new root the root; gives the old `/proc`, which is out of reach by name afterwards.
pub(super) fn enter(config: &SandboxConfig) -> Result<File, String> {
    let nothing: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("no mount namespace: {e}"))?;
    mount(nothing, "/", nothing, MsFlags::MS_PRIVATE | MsFlags::MS_REC, nothing)
        .map_err(|e| format!("cannot make mounts private: {e}"))?;
    tmpfs("/tmp", "mode=0755,size=1m")?;
    fs::create_dir("/tmp/oldroot").map_err(|e| format!("cannot make the old root's folder: {e}"))?;
    pivot_root("/tmp", "/tmp/oldroot").map_err(|e| format!("cannot change the root: {e}"))?;
    std::env::set_current_dir("/").map_err(|e| format!("cannot enter the root: {e}"))?;
    for path in &config.read_only {
        show(Path::new(path))?;
    }
    for device in DEVICES {
        let path = PathBuf::from("/dev").join(device);
        bind(&old(&path), &path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    for folder in [WORK, "/tmp"] {
        make_dir(Path::new(folder))?;
        tmpfs(folder, &format!("mode=0777,size={}m", config.file_mib))?;
    }
    let proc = File::open(old(Path::new("/proc"))).map_err(|e| format!("cannot open /proc: {e}"))?;
    umount2(OLD, MntFlags::MNT_DETACH).map_err(|e| format!("cannot let go of the old root: {e}"))?;
    fs::remove_dir(OLD).map_err(|e| format!("cannot remove the old root's folder: {e}"))?;
    let flags =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(nothing, "/", nothing, flags, nothing)
        .map_err(|e| format!("cannot make the root read-only: {e}"))?;
    Ok(proc)
}

fn old(path: &Path) -> PathBuf {
    Path::new(OLD).join(path.strip_prefix("/").unwrap_or(path))
}

fn tmpfs(at: &str, options: &str) -> Result<(), String> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options))
        .map_err(|e| format!("no tmpfs at {at}: {e}"))
}

/// Shows a file or folder of the machine, read-only; links as the links they are. What does not exist is left out.
fn show(path: &Path) -> Result<(), String> {
    let source = old(path);
    let Ok(found) = fs::symlink_metadata(&source) else { return Ok(()) };
    let failed = |e: String| format!("cannot show {} in the sandbox: {e}", path.display());
    if path.symlink_metadata().is_ok() {
        return Ok(()); // below a folder that is shown already
    }
    if found.is_symlink() {
        if let Some(parent) = path.parent() {
            make_dir(parent)?;
        }
        let target = fs::read_link(&source).map_err(|e| failed(e.to_string()))?;
        return symlink(target, path).map_err(|e| failed(e.to_string()));
    }
    bind(&source, path).map_err(failed)?;
    let flags =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let nothing: Option<&str> = None;
    mount(nothing, path, nothing, flags, nothing).map_err(|e| failed(format!("not read-only: {e}")))
}

fn bind(source: &Path, target: &Path) -> Result<(), String> {
    let is_dir = fs::metadata(source).map_err(|e| e.to_string())?.is_dir();
    if is_dir {
        make_dir(target)?;
    } else {
        if let Some(parent) = target.parent() {
            make_dir(parent)?;
        }
        File::create(target).map_err(|e| e.to_string())?;
    }
    let nothing: Option<&str> = None;
    mount(Some(source), target, nothing, MsFlags::MS_BIND, nothing).map_err(|e| e.to_string())
}

fn make_dir(path: &Path) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|e| format!("cannot make {}: {e}", path.display()))
}

/// Writes the job's files into the working folder.
pub(super) fn write_files(files: &[(String, String)]) -> Result<(), String> {
    for (name, text) in files {
        let plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
        if !plain {
            return Err(format!("{name:?} is no plain file name"));
        }
        let path = Path::new(WORK).join(name);
        fs::write(&path, text).map_err(|e| format!("cannot write {name}: {e}"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(|e| format!("{name}: {e}"))?;
    }
    Ok(())
}
