//! Programs that try to get out. None may: `freewheel doctor --sandbox` and the tests run them all.
//!
//! Each prints ESCAPED if it got what it must not have. They are told, as JSON on standard input, what to try to reach: a `secret` file of
//! this machine, the `port` of a listener on its loopback, a `pid` of it.

use std::io::Read as _;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Finished, Job, Outcome, Sandbox, SandboxError};

/// A program and what it is after.
#[derive(Clone, Copy, Debug)]
pub struct Escape {
    /// What it tries.
    pub name: &'static str,
    body: &'static str,
}

/// How an attempt went.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// What it tried.
    pub name: &'static str,
    /// Whether it got out.
    pub escaped: bool,
    /// How it ended.
    pub finished: Finished,
}

const fn e(name: &'static str, body: &'static str) -> Escape {
    Escape { name, body }
}

/// All of them.
pub const ESCAPES: &[Escape] = &[
    // files of the machine
    e("read a secret file", "got(open(W['secret']).read())"),
    e("read /etc/passwd", "got(open('/etc/passwd').read())"),
    e("read /etc/shadow", "got(open('/etc/shadow').read())"),
    e("list the home folders", "got(os.listdir('/root') + os.listdir('/home'))"),
    e("climb out with ..", "os.chdir('/box'); got(open('../../../../..' + W['secret']).read())"),
    e("follow a link to the secret", "os.symlink(W['secret'], '/box/l'); got(open('/box/l').read())"),
    e(
        "hard-link a system file and write it",
        "os.link('/usr/bin/env', '/box/l'); open('/box/l', 'ab').write(b'x'); got(1)",
    ),
    e("write to /usr", "open('/usr/bin/planted', 'w').write('x'); got(1)"),
    e("write to the root", "open('/planted', 'w').write('x'); got(1)"),
    e("write to /dev/shm", "open('/dev/shm/planted', 'w').write('x'); got(1)"),
    e("overwrite an interpreter", "open('/usr/bin/python3', 'r+b').write(b'x'); got(1)"),
    e("delete a system file", "os.unlink('/usr/bin/env'); got(1)"),
    e("change modes of a system file", "os.chmod('/usr/bin/env', 0o777); got(1)"),
    e(
        "make a device node",
        "os.mknod('/box/d', 0o600 | stat.S_IFBLK, os.makedev(8, 0)); open('/box/d', 'rb').read(1); got(1)",
    ),
    e("open the disk", "got(open('/dev/vda', 'rb').read(1) or open('/dev/sda', 'rb').read(1))"),
    e("open kernel memory", "got(open('/dev/mem', 'rb').read(1))"),
    e(
        "make a setuid file and keep rights",
        "open('/box/s', 'w').write('#!/bin/sh\\nid -u'); os.chmod('/box/s', 0o4755); r = subprocess.run(['/box/s'], capture_output=True, text=True).stdout.strip(); got(r if r == '0' else None)",
    ),
    // the old root, mounts, namespaces
    e("find the old root", "got(os.listdir('/oldroot'))"),
    e(
        "chroot and climb out",
        "os.mkdir('/box/c'); os.chroot('/box/c'); [os.chdir('..') for _ in range(20)]; os.chroot('.'); got(open(W['secret']).read())",
    ),
    e("mount a tmpfs", "got(ok(libc.mount(b't', b'/box', b'tmpfs', 0, None)))"),
    e("mount proc", "os.mkdir('/box/p'); got(ok(libc.mount(b'p', b'/box/p', b'proc', 0, None)))"),
    e("unmount the working folder", "got(ok(libc.umount2(b'/box', 2)))"),
    e("make the root writable again", "got(ok(libc.mount(None, b'/', None, 0x1020, None)))"),
    e("enter a new user namespace", "got(ok(libc.unshare(0x10000000)))"),
    e("clone into a new user namespace", "got(child(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)))"),
    e(
        "clone3 into a new user namespace",
        "b = ctypes.create_string_buffer(struct.pack('=11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)); got(child(libc.syscall(435, b, 88)))",
    ),
    e("join a namespace by pid", "fd = libc.syscall(434, 1, 0); got(ok(libc.setns(fd, 0x20000)))"),
    e("pivot the root", "os.mkdir('/box/o'); got(ok(libc.syscall(155, b'/box', b'/box/o')))"),
    e("open a file by handle", "got(ok(libc.syscall(304, 3, b'x' * 64, 0)))"),
    // other processes
    e("list processes of the machine", "got([p for p in os.listdir('/proc') if p.isdigit()])"),
    e("signal a process of the machine", "os.kill(W['pid'], 0); got(1)"),
    e("signal everything as if alone", "os.kill(1, 9); time.sleep(0.2); got(None)"),
    e("trace init", "got(ok(libc.ptrace(16, 1, 0, 0)))"),
    e(
        "read memory of init",
        "b = ctypes.create_string_buffer(8); v = struct.pack('=QQ', ctypes.addressof(b), 8); w = struct.pack('=QQ', 0x400000, 8); got(ok(libc.syscall(310, 1, v, 1, w, 1, 0)))",
    ),
    e("take a file of init", "fd = libc.syscall(434, 1, 0); got(ok(libc.syscall(438, fd, 1, 0)))"),
    e("write init's report", "open('/proc/1/fd/1', 'w').write('{\"done\":[]}'); got(1)"),
    e(
        "forge a report through inherited files",
        "n = 0\nfor fd in range(3, 64):\n  try: os.write(fd, b'{\"done\":[{\"outcome\":{\"exit\":0},\"stdout\":\"FORGED\",\"stderr\":\"\",\"wall_ms\":0}]}'); n += 1\n  except OSError: pass\ngot(n)",
    ),
    // the network
    e(
        "connect to a listener of the machine",
        "socket.create_connection(('127.0.0.1', W['port']), 1); got(1)",
    ),
    e("listen on a port", "s = socket.socket(); s.bind(('0.0.0.0', 8080)); s.listen(); got(1)"),
    e(
        "send a packet",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('8.8.8.8', 53)); got(1)",
    ),
    e("open a raw socket", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW); got(1)"),
    e("open a netlink socket", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); got(1)"),
    e("open a vsock", "socket.socket(40, socket.SOCK_STREAM); got(1)"),
    e("look a name up", "got(socket.gethostbyname('example.com'))"),
    // the kernel's wider surface
    e("set up an io_uring", "b = ctypes.create_string_buffer(120); got(ok(libc.syscall(425, 4, b)))"),
    e("load a bpf program", "b = ctypes.create_string_buffer(128); got(ok(libc.syscall(321, 5, b, 128)))"),
    e(
        "open a perf event",
        "b = ctypes.create_string_buffer(128); got(ok(libc.syscall(298, b, 0, -1, -1, 0)))",
    ),
    e("watch page faults", "got(ok(libc.syscall(323, 0)))"),
    e("use the kernel keyring", "got(ok(libc.syscall(248, b'user', b'k', b'v', 1, -3)))"),
    e("load a module", "got(ok(libc.syscall(175, b'x', 1, b'')))"),
    e("restart the machine", "got(ok(libc.syscall(169, 0xfee1dead, 672274793, 0x89abcdef, 0)))"),
    e("set the clock", "time.clock_settime(time.CLOCK_REALTIME, 0); got(1)"),
    e("set the host name", "socket.sethostname('mine'); got(1)"),
    e("type into the terminal", "got(ok(libc.ioctl(0, 0x5412, b'x')))"),
    e("turn off address randomisation", "got(ok(libc.personality(0x0040000)))"),
    e("raise a limit", "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (10000, 10000)); got(1)"),
    e("become root", "os.setuid(0); got(1)"),
    e(
        "have rights left",
        "b = ctypes.create_string_buffer(24); h = struct.pack('=II', 0x20080522, 0); libc.capget(h, b); got(any(struct.unpack('=6I', b.raw)[0:5:3]))",
    ),
    // resources
    e(
        "have two hundred processes at a time",
        "n = 0\nfor _ in range(200):\n  if os.fork() == 0:\n    time.sleep(1)\n    os._exit(0)\n  n += 1\ngot(n == 200)",
    ),
    e("take a gigabyte", "b = bytearray(1 << 30); got(1)"),
    e("fill the disk", "f = open('/box/big', 'wb')\nfor _ in range(64): f.write(b'x' * (1 << 20))\ngot(1)"),
    e(
        "fill the disk with many files",
        "n = 0\nfor i in range(64):\n  open('/box/f%d' % i, 'wb').write(b'x' * (1 << 20)); n += 1\ngot(n == 64 or None)",
    ),
    e("open files without end", "f = [open('/dev/null') for _ in range(1000)]; got(1)"),
    e(
        "write without end",
        "[sys.stdout.write('y' * 65536) for _ in range(10000)]; sys.stdout.flush(); got(1)",
    ),
    e(
        "live on after the end",
        "p = os.fork()\nif p == 0:\n  os.setsid()\n  for _ in range(50):\n    time.sleep(0.1)\n  got(1)\nos._exit(0)",
    ),
    e(
        "read the helper's surroundings",
        "got([k for k in os.environ if 'FREEWHEEL' in k or 'TOKEN' in k or 'CARGO' in k])",
    ),
];

const PRELUDE: &str = r"
import sys
sys.path[:] = [p for p in sys.path if p]
import os, json, ctypes, socket, stat, struct, subprocess, time
W = json.loads(sys.stdin.read())
libc = ctypes.CDLL(None, use_errno=True)
def got(x):
    if x:
        print('ESCAPED', flush=True)
def ok(r):
    return r >= 0
def child(r):
    if r == 0:
        os._exit(0)
    return r > 0
try:
";

impl Escape {
    fn program(&self) -> String {
        let body: String = self.body.lines().map(|line| format!("    {line}\n")).collect();
        format!(
            "{PRELUDE}{body}except BaseException as error:\n    print('held:', type(error).__name__, error)\n"
        )
    }
}

/// Runs all of them against things of this machine made for it.
///
/// # Errors
/// If the sandbox itself fails, or the secret and the listener cannot be made.
pub fn attempt_escapes(sandbox: &Sandbox) -> Result<Vec<Attempt>, SandboxError> {
    let failed = |e: std::io::Error| SandboxError(format!("cannot prepare what to protect: {e}"));
    let secret = std::env::temp_dir().join(format!("freewheel-secret-{}", std::process::id()));
    std::fs::write(&secret, "the secret").map_err(failed)?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let reached = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&reached);
    // Lives as long as the process; counts whoever gets through.
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            counter.fetch_add(1, Ordering::Relaxed);
            let _ = stream.read(&mut [0; 1]);
        }
    });
    let told = serde_json::json!({"secret": secret, "port": port, "pid": std::process::id()}).to_string();
    let mut attempts = Vec::new();
    for escape in ESCAPES {
        let mut command = sandbox.config().command.clone();
        command.push("main.py".into());
        let files = vec![("main.py".to_owned(), escape.program())];
        let job = Job { command, files, inputs: vec![told.clone()] };
        let before = reached.load(Ordering::Relaxed);
        let named = |SandboxError(why)| SandboxError(format!("{}: {why}", escape.name));
        let finished = sandbox.run(&job).map_err(named)?.into_iter().next();
        let finished = finished.ok_or_else(|| named(SandboxError("no result".into())))?;
        let forged = finished.stdout.contains("FORGED");
        let through = reached.load(Ordering::Relaxed) != before;
        let escaped = finished.stdout.contains("ESCAPED") || forged || through;
        attempts.push(Attempt { name: escape.name, escaped, finished });
    }
    let intact = std::fs::read_to_string(&secret).is_ok_and(|text| text == "the secret");
    let _ = std::fs::remove_file(&secret);
    if !intact {
        let gone =
            Finished { outcome: Outcome::Exit(0), stdout: String::new(), stderr: String::new(), wall_ms: 0 };
        attempts.push(Attempt { name: "change the secret file", escaped: true, finished: gone });
    }
    Ok(attempts)
}
