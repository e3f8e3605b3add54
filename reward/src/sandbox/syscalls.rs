//! The system calls that are left: what interpreters and compilers need. Everything else is refused with EPERM.

use std::collections::BTreeMap;

use nix::libc::{self, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Namespace flags of `clone`: user, pid, net, mount, ipc, uts, cgroup.
const NAMESPACES: u64 = 0x7E02_0000;

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const ARCH: TargetArch = TargetArch::aarch64;

/// Calls that are free whatever their arguments.
#[rustfmt::skip]
const FREE: &[c_long] = &[
    // files
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev, libc::SYS_pread64, libc::SYS_pwrite64,
    libc::SYS_preadv, libc::SYS_pwritev, libc::SYS_openat, libc::SYS_openat2, libc::SYS_close, libc::SYS_close_range, libc::SYS_lseek,
    libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_statfs, libc::SYS_fstatfs, libc::SYS_faccessat, libc::SYS_faccessat2,
    libc::SYS_getdents64, libc::SYS_readlinkat, libc::SYS_mkdirat, libc::SYS_unlinkat, libc::SYS_renameat, libc::SYS_renameat2,
    libc::SYS_linkat, libc::SYS_symlinkat, libc::SYS_ftruncate, libc::SYS_truncate, libc::SYS_fallocate, libc::SYS_fsync,
    libc::SYS_fdatasync, libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_utimensat, libc::SYS_umask, libc::SYS_chdir, libc::SYS_fchdir,
    libc::SYS_getcwd, libc::SYS_dup, libc::SYS_dup3, libc::SYS_fcntl, libc::SYS_flock, libc::SYS_pipe2, libc::SYS_copy_file_range,
    libc::SYS_sendfile, libc::SYS_fadvise64, libc::SYS_memfd_create,
    // memory
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mprotect, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_brk, libc::SYS_msync,
    libc::SYS_mincore, libc::SYS_membarrier, libc::SYS_rseq,
    // waiting
    libc::SYS_ppoll, libc::SYS_pselect6, libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_eventfd2,
    libc::SYS_futex, libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_sched_yield, libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime, libc::SYS_timerfd_gettime, libc::SYS_signalfd4,
    // time
    libc::SYS_clock_gettime, libc::SYS_clock_getres, libc::SYS_gettimeofday, libc::SYS_times, libc::SYS_getitimer, libc::SYS_setitimer,
    libc::SYS_timer_create, libc::SYS_timer_settime, libc::SYS_timer_gettime, libc::SYS_timer_delete,
    // processes and threads; `clone` below
    libc::SYS_clone3, libc::SYS_execve, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_wait4, libc::SYS_waitid, libc::SYS_kill,
    libc::SYS_tgkill, libc::SYS_tkill, libc::SYS_pidfd_open, libc::SYS_pidfd_send_signal, libc::SYS_set_tid_address,
    libc::SYS_set_robust_list, libc::SYS_get_robust_list, libc::SYS_getpid, libc::SYS_getppid, libc::SYS_gettid, libc::SYS_getpgid,
    libc::SYS_setpgid, libc::SYS_getsid, libc::SYS_setsid, libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid,
    libc::SYS_getresuid, libc::SYS_getresgid, libc::SYS_getgroups, libc::SYS_getrlimit, libc::SYS_getrusage,
    libc::SYS_sched_getaffinity, libc::SYS_sched_setaffinity, libc::SYS_sched_getparam, libc::SYS_sched_getscheduler,
    libc::SYS_getpriority, libc::SYS_getcpu, libc::SYS_capget,
    // signals
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_rt_sigpending, libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigsuspend, libc::SYS_sigaltstack, libc::SYS_restart_syscall,
    // sockets within the sandbox; `socket` below
    libc::SYS_socketpair, libc::SYS_bind, libc::SYS_connect, libc::SYS_listen, libc::SYS_accept4, libc::SYS_getsockname,
    libc::SYS_getpeername, libc::SYS_sendto, libc::SYS_recvfrom, libc::SYS_sendmsg, libc::SYS_recvmsg, libc::SYS_shutdown,
    libc::SYS_setsockopt, libc::SYS_getsockopt,
    // the machine
    libc::SYS_uname, libc::SYS_sysinfo, libc::SYS_getrandom,
];

/// Older spellings that only this architecture has.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const OLD: &[c_long] = &[
    libc::SYS_open, libc::SYS_creat, libc::SYS_stat, libc::SYS_lstat, libc::SYS_access, libc::SYS_poll, libc::SYS_select, libc::SYS_pipe,
    libc::SYS_dup2, libc::SYS_fork, libc::SYS_vfork, libc::SYS_mkdir, libc::SYS_rmdir, libc::SYS_unlink, libc::SYS_rename,
    libc::SYS_readlink, libc::SYS_link, libc::SYS_symlink, libc::SYS_chmod, libc::SYS_getpgrp, libc::SYS_time, libc::SYS_epoll_wait,
    libc::SYS_epoll_create, libc::SYS_eventfd, libc::SYS_accept, libc::SYS_pause, libc::SYS_alarm, libc::SYS_arch_prctl,
    libc::SYS_getdents, libc::SYS_utime, libc::SYS_utimes, libc::SYS_futimesat,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[c_long] = &[];

/// Bounds this process and all it starts, for good.
pub(super) fn filter() -> Result<(), String> {
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let allowed = compile(rules()?, refuse, SeccompAction::Allow)?;
    // Its flags lie in memory, where a filter cannot look; the C library falls back to `clone`.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let absent = compile(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    // This order: the first call of the second filter's kind is refused once the list of allowed ones holds.
    for program in [absent, allowed] {
        seccompiler::apply_filter(&program).map_err(|e| format!("no system call filter: {e}"))?;
    }
    Ok(())
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn compile(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> Result<BpfProgram, String> {
    let filter = SeccompFilter::new(rules.into_iter().collect(), otherwise, matched, ARCH);
    let program = filter.and_then(BpfProgram::try_from);
    program.map_err(|e| format!("no system call filter: {e}"))
}

fn rules() -> Result<Rules, String> {
    let mut rules: Rules = FREE.iter().chain(OLD).map(|call| (*call, Vec::new())).collect();
    let is = |argument: u8, value: u64| {
        condition(argument, SeccompCmpOp::Eq, value)
            .and_then(|c| SeccompRule::new(vec![c]).map_err(|e| e.to_string()))
    };
    let any = |argument: u8, values: &[u64]| -> Result<Vec<SeccompRule>, String> {
        values.iter().map(|value| is(argument, *value)).collect()
    };
    let plain = condition(0, SeccompCmpOp::MaskedEq(NAMESPACES), 0)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![plain]).map_err(|e| e.to_string())?]);
    rules.insert(libc::SYS_socket, any(0, &[libc::AF_UNIX as u64])?);
    let ioctls =
        [libc::TCGETS, libc::FIONBIO, libc::FIOCLEX, libc::FIONCLEX, libc::FIONREAD, libc::TIOCGWINSZ];
    rules.insert(libc::SYS_ioctl, any(1, &ioctls)?);
    let prctls = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_PDEATHSIG, libc::PR_GET_DUMPABLE];
    rules.insert(libc::SYS_prctl, any(0, &prctls.map(|option| option as u64))?);
    // Reading limits, not setting them.
    let unset = condition(2, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![unset]).map_err(|e| e.to_string())?]);
    Ok(rules)
}

fn condition(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, String> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, op, value).map_err(|e| e.to_string())
}
