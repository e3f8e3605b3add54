//! The helper's second half, pid 1 in the new namespaces: makes the root, confines itself, runs the program, reports.

use std::io::{Read, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike as _;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{Finished, Job, Outcome, Plan, Report, SandboxConfig, confine, root};

/// Longest plan.
const PLAN_BYTES_MAX: u64 = 64 << 20;
/// How long output that is written already may take to be read.
const DRAINING: Duration = Duration::from_secs(2);
/// How long ending what was left running may take.
const CLEARING: Duration = Duration::from_secs(2);
/// Watchers need little stack, and address space is limited.
const STACK: usize = 128 << 10;

/// Reads the plan, runs it, reports. Returning ends every process in the namespace.
pub(super) fn main() -> Result<(), String> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| format!("pdeathsig: {e}"))?;
    let mut text = Vec::new();
    std::io::stdin().take(PLAN_BYTES_MAX).read_to_end(&mut text).map_err(|e| format!("no plan: {e}"))?;
    let plan: Plan = serde_json::from_slice(&text).map_err(|e| format!("the plan is unreadable: {e}"))?;
    let Plan { job, config } = plan;
    let proc = root::enter(&config)?;
    root::write_files(&job.files)?;
    nix::unistd::sethostname("sandbox").map_err(|e| format!("hostname: {e}"))?;
    nix::unistd::setsid().map_err(|e| format!("session: {e}"))?;
    confine::confine(&config, &proc)?;
    drop(proc);
    let crew = Crew::new()?;
    let mut finished = Vec::new();
    for input in &job.inputs {
        let one = run(&job, &config, &crew, input)?;
        let last = one.outcome != Outcome::Exit(0);
        finished.push(one);
        if last {
            break;
        }
    }
    super::report(&Report::Done(finished));
    Ok(())
}

/// Ends whatever the program left running, and says whether nothing is left. From pid 1, the signal reaches everything in the namespace but pid 1 itself.
fn cleared() -> bool {
    let until = Instant::now() + CLEARING;
    while Instant::now() < until {
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) => {}
                Err(_) => return true,
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

enum Event {
    Ended(std::io::Result<ExitStatus>),
    /// A stream was closed, or more than the limit was written.
    Closed {
        over: bool,
    },
}

type Captured = Arc<Mutex<Vec<u8>>>;
type Task = Box<dyn FnOnce() + Send>;

/// Threads that feed, read and watch the program. They are there before it is: it cannot use up what they need to start.
struct Crew([Sender<Task>; 4]);

impl Crew {
    fn new() -> Result<Self, String> {
        let start = |name: &str| {
            let (sender, tasks) = channel::<Task>();
            let body = move || tasks.into_iter().for_each(|task| task());
            let started = std::thread::Builder::new().name(name.into()).stack_size(STACK).spawn(body);
            started.map(|_| sender).map_err(|e| format!("cannot start a thread of init: {e}"))
        };
        Ok(Self([start("feed")?, start("stdout")?, start("stderr")?, start("watch")?]))
    }

    fn give(&self, thread: usize, task: impl FnOnce() + Send + 'static) -> Result<(), String> {
        self.0[thread].send(Box::new(task)).map_err(|_| "a thread of init ended".to_owned())
    }
}

fn run(job: &Job, config: &SandboxConfig, crew: &Crew, input: &str) -> Result<Finished, String> {
    let [program, args @ ..] = job.command.as_slice() else {
        return Err("there is no program to run".into());
    };
    let cpu_before = cpu_ms();
    let begin = Instant::now();
    let spawned = Command::new(program)
        .args(args)
        .current_dir(root::WORK)
        .env_clear()
        .envs(ENVIRONMENT)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|e| format!("cannot start {program} in the sandbox: {e}"))?;
    let (mut stdin, input) = (child.stdin.take().expect("piped"), input.to_owned());
    // A program that does not read its input ends the pipe; that is no error.
    crew.give(0, move || drop(stdin.write_all(input.as_bytes())))?;
    let limit = usize::try_from(config.output_kib << 10).unwrap_or(usize::MAX);
    let (sender, events) = channel();
    let (stdout, task) = capture(child.stdout.take().expect("piped"), limit, sender.clone());
    crew.give(1, task)?;
    let (stderr, task) = capture(child.stderr.take().expect("piped"), limit, sender.clone());
    crew.give(2, task)?;
    crew.give(3, move || drop(sender.send(Event::Ended(child.wait()))))?;
    let mut watched = Watched { events, ended: None, open: 2, over: false };
    watched.until(begin + config.wall(), |seen| seen.ended.is_some() || seen.over);
    // What ends from here on ends because it is cleared away.
    let in_time = watched.ended.is_some();
    // With everything it started gone, its output ends, and all of it is here.
    let cleared = cleared();
    watched.until(Instant::now() + DRAINING, |seen| seen.open == 0 || seen.over);
    let outcome = match watched.ended {
        _ if watched.over => Outcome::Output,
        Some(status) if in_time && cleared && watched.open == 0 => {
            typed(status, cpu_ms().saturating_sub(cpu_before), config, &stderr)
        }
        _ => Outcome::Wall,
    };
    let text = |captured: &Captured| {
        String::from_utf8_lossy(&captured.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    };
    Ok(Finished {
        outcome,
        stdout: text(&stdout),
        stderr: text(&stderr),
        wall_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}

/// What a program sees of its surroundings: always the same.
const ENVIRONMENT: [(&str, &str); 9] = [
    ("PATH", "/usr/local/bin:/usr/bin:/bin"),
    ("HOME", root::WORK),
    ("TMPDIR", "/tmp"),
    ("LANG", "C.UTF-8"),
    ("TZ", "UTC"),
    ("PYTHONHASHSEED", "0"),
    ("PYTHONDONTWRITEBYTECODE", "1"),
    ("OMP_NUM_THREADS", "1"),
    ("OPENBLAS_NUM_THREADS", "1"),
];

/// Keeps what is written, up to the limit, and says when it is exceeded.
fn capture(
    mut from: impl Read + Send + 'static,
    limit: usize,
    sender: Sender<Event>,
) -> (Captured, impl FnOnce() + Send + 'static) {
    let captured = Captured::default();
    let kept = Arc::clone(&captured);
    let task = move || {
        let mut buffer = [0; 4096];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) | Err(_) => {
                    let _ = sender.send(Event::Closed { over: false });
                    return;
                }
                Ok(n) => n,
            };
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            let room = limit - kept.len();
            kept.extend_from_slice(&buffer[..n.min(room)]);
            if n > room {
                let _ = sender.send(Event::Closed { over: true });
                return;
            }
        }
    };
    (captured, task)
}

/// What is known of a run.
struct Watched {
    events: Receiver<Event>,
    ended: Option<ExitStatus>,
    /// Streams not at their end.
    open: u32,
    /// More was written than may be.
    over: bool,
}

impl Watched {
    /// Takes in events until `enough` or the time has come.
    fn until(&mut self, time: Instant, enough: impl Fn(&Self) -> bool) {
        while !enough(self) {
            match self.events.recv_timeout(time.saturating_duration_since(Instant::now())) {
                Ok(Event::Closed { over }) => {
                    self.open -= 1;
                    self.over |= over;
                }
                Ok(Event::Ended(Ok(status))) => self.ended = Some(status),
                // Its status was lost: as if it had not ended.
                Ok(Event::Ended(Err(_))) => {}
                Err(_) => return,
            }
        }
    }
}

/// Milliseconds of processor time of children that ended.
fn cpu_ms() -> u64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else { return 0 };
    let spent = usage.user_time().num_milliseconds() + usage.system_time().num_milliseconds();
    u64::try_from(spent).unwrap_or(0)
}

fn typed(status: ExitStatus, cpu_ms: u64, config: &SandboxConfig, stderr: &Captured) -> Outcome {
    if let Some(signal) = status.signal() {
        let used_up = signal == Signal::SIGXCPU as i32
            || (signal == Signal::SIGKILL as i32 && cpu_ms + 50 >= config.cpu_s * 1000);
        return if used_up { Outcome::Cpu } else { Outcome::Signal(signal) };
    }
    let code = status.code().unwrap_or(-1);
    if code != 0 {
        let stderr = stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&stderr);
        let last = text.trim_end().lines().next_back().unwrap_or("");
        let memory =
            ["MemoryError", "out of memory", "Cannot allocate memory", "bad_alloc", "memory allocation of"];
        if memory.iter().any(|word| last.contains(word)) {
            return Outcome::Memory;
        }
    }
    Outcome::Exit(code)
}
