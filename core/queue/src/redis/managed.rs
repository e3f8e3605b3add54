//! A private server: found on the PATH, reachable by a unix socket only, ended with its owner.
//!
//! Its files lie in the folder it was given, so that a run that is resumed finds its streams again.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{QueueError, QueueSecret};

/// Servers to look for, best first.
const BINARIES: [&str; 2] = ["valkey-server", "redis-server"];
/// How long a server may take to answer, or to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// A socket's path must fit into 108 bytes.
const SOCKET_PATH_MAX: usize = 100;
/// Memory limit unless another is given.
const MAXMEMORY: u64 = 4 << 30;

/// A running private server.
#[derive(Debug)]
pub struct ManagedServer {
    child: Child,
    socket: PathBuf,
}

impl ManagedServer {
    /// Whether there is a server binary to start.
    pub fn available() -> bool {
        find_binary().is_some()
    }

    /// Starts a server whose files lie in `dir` and waits until it answers. Blocks for a moment.
    ///
    /// A server that a killed process left behind in `dir` is ended first; its data are taken over.
    ///
    /// # Errors
    /// [`QueueError::Config`] if there is no server binary or the folder cannot be used,
    /// [`QueueError::Unavailable`] if the server does not start, with the end of its log.
    pub fn start(dir: &Path) -> Result<Self, QueueError> {
        Self::start_with_memory(dir, MAXMEMORY)
    }

    /// As [`start`](Self::start), with a memory limit in bytes: at least twice `queue.max_bytes`, and room for the
    /// published weights.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with_memory(dir: &Path, maxmemory: u64) -> Result<Self, QueueError> {
        let binary = find_binary().ok_or_else(|| {
            QueueError::Config(format!(
                "queue.url = \"managed\" needs {} on the PATH: install one (Debian: apt-get install redis-server), \
                 give the url of a running server, or use queue.backend = \"memory\"",
                BINARIES.join(" or ")
            ))
        })?;
        let unusable = |error: io::Error| {
            QueueError::Config(format!("folder {} of the managed server: {error}", dir.display()))
        };
        let dir = private_dir(dir).map_err(unusable)?;
        let socket = socket_path(&dir).map_err(unusable)?;
        end_left_behind(&socket);
        let child = spawn(&binary, &dir, &socket, maxmemory).map_err(unusable)?;
        let mut server = Self { child, socket };
        server.wait_until_ready(&dir.join("server.log"))?;
        Ok(server)
    }

    /// Where it can be reached.
    pub fn url(&self) -> QueueSecret {
        QueueSecret(format!("unix://{}", self.socket.display()))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the server at once, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn wait_until_ready(&mut self, log: &Path) -> Result<(), QueueError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if ask(&self.socket, "PING").is_ok_and(|reply| reply.starts_with("+PONG")) {
                return Ok(());
            }
            let ended = self.child.try_wait().ok().flatten();
            if ended.is_some() || Instant::now() > deadline {
                let text = fs::read_to_string(log).unwrap_or_default();
                let last: Vec<&str> = text.lines().rev().take(3).collect();
                return Err(QueueError::Unavailable {
                    backend: format!("managed server in {}", log.parent().unwrap_or(log).display()),
                    what: format!(
                        "it did not start ({}); its log ends with: {}. If its data are damaged, remove the folder: \
                         nothing in it is needed to resume",
                        ended.map_or("no answer".into(), |status| status.to_string()),
                        last.into_iter().rev().collect::<Vec<_>>().join(" / "),
                    ),
                    source: None,
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for ManagedServer {
    fn drop(&mut self) {
        // A clean end writes its data; a server that does not end in time is ended by its process id.
        let _ = ask(&self.socket, "SHUTDOWN");
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill();
        let _ = fs::remove_file(&self.socket);
    }
}

fn find_binary() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let candidates = BINARIES.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    candidates.into_iter().find(|candidate| candidate.is_file())
}

/// Creates `dir` for its owner only and gives its full path.
fn private_dir(dir: &Path) -> io::Result<PathBuf> {
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    dir.canonicalize()
}

/// A path short enough for a socket: in `dir`, or in a temporary folder named after it.
fn socket_path(dir: &Path) -> io::Result<PathBuf> {
    let here = dir.join("q.sock");
    if here.as_os_str().len() <= SOCKET_PATH_MAX {
        return Ok(here);
    }
    let name = freewheel_types::PromptId::of(dir.as_os_str().as_encoded_bytes());
    // Fails if somebody else owns a folder of that name.
    Ok(private_dir(&std::env::temp_dir().join(format!("freewheel-{name}")))?.join("q.sock"))
}

/// Ends a server that still listens on `socket` although whoever started it is gone.
fn end_left_behind(socket: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while ask(socket, "SHUTDOWN").is_ok() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = fs::remove_file(socket);
}

fn spawn(binary: &Path, dir: &Path, socket: &Path, maxmemory: u64) -> io::Result<Child> {
    let mut command = Command::new(binary);
    let settings = [
        ("port", "0"),
        ("unixsocketperm", "700"),
        ("daemonize", "no"),
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("save", ""),
        ("maxmemory", &maxmemory.to_string()),
        ("maxmemory-policy", "noeviction"),
        ("proto-max-bulk-len", "17mb"),
        ("enable-debug-command", "no"),
        ("logfile", "server.log"),
    ];
    for (name, value) in settings {
        command.arg(format!("--{name}")).arg(value);
    }
    command.arg("--unixsocket").arg(socket).arg("--dir").arg(dir);
    command.current_dir(dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

/// One command without arguments, answered by one line.
fn ask(socket: &Path, command: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{command}\r\n").as_bytes())?;
    let mut reply = [0; 64];
    let n = stream.read(&mut reply)?;
    Ok(String::from_utf8_lossy(&reply[..n]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_folder_gets_a_short_socket() {
        let root = tempfile::tempdir().unwrap();
        let short = socket_path(root.path()).unwrap();
        assert!(short.starts_with(root.path()));
        let long = root.path().join("x".repeat(120));
        let socket = socket_path(&long).unwrap();
        assert!(socket.as_os_str().len() <= SOCKET_PATH_MAX, "{}", socket.display());
        assert_eq!(socket, socket_path(&long).unwrap(), "a second start must find a server left behind");
        fs::remove_dir_all(socket.parent().unwrap()).unwrap();
    }
}
