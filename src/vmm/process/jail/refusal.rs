// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens to a system call that a filter refuses: one line on standard error, and the end of
//! the process. A thread that panics goes on: a backtrace without files is shorter.

use std::fmt::{self, Write};
use std::thread;

use crate::process::disposition::{self, Refused};
use crate::process::exit_code;
use crate::process::last_line::Line;

/// From now on, refused calls are reported.
pub(super) fn report_refusals() {
    disposition::on_refusal(answer);
}

/// Runs in a signal handler, so it only makes system calls that every filter allows. Returns the
/// error for the caller.
fn answer(refused: &Refused) -> libc::c_int {
    let name = name(refused.number).filter(|_| !refused.foreign);
    if thread::panicking() && name.is_some_and(|name| OF_PATHS.contains(&name)) {
        return libc::EACCES;
    }
    let mut line = Line::new();
    // What does not fit is cut off.
    let _ = describe(&mut line, refused, name);
    line.end(exit_code::REFUSED)
}

fn describe(line: &mut Line, refused: &Refused, name: Option<&str>) -> fmt::Result {
    let Refused { number, foreign, second, thread } = refused;
    let end = thread.iter().position(|byte| *byte == 0).unwrap_or(thread.len());
    let thread = thread.get(..end).and_then(|name| std::str::from_utf8(name).ok());
    write!(line, "twostage: error: --jail: thread {}: ", thread.unwrap_or("?"))?;
    match name {
        _ if *foreign => write!(line, "system call of another architecture ({number})")?,
        Some("ioctl") => write!(line, "ioctl {second:#x} ({number})")?,
        Some(name) => write!(line, "{name} ({number})")?,
        None => write!(line, "system call {number}")?,
    }
    line.write_str(" was refused: the guest may have attacked this process, or this is a bug; ")?;
    line.write_str("please report this line (docs/security.md)\n")
}

/// What a backtrace does with files.
const OF_PATHS: [&str; 7] = ["openat", "open", "readlink", "readlinkat", "getcwd", "stat", "statx"];

macro_rules! names {
    ($($name:ident)*) => { &[$((libc::$name, stringify!($name))),*] };
}

/// Numbers, and the symbols that libc has for them.
type Names = &'static [(libc::c_long, &'static str)];

const KNOWN: Names = names! {
    SYS_accept SYS_accept4 SYS_add_key SYS_bind SYS_bpf SYS_brk SYS_capget SYS_capset
    SYS_chdir SYS_chroot SYS_clock_gettime SYS_clock_nanosleep SYS_clock_settime SYS_clone
    SYS_clone3 SYS_close SYS_close_range SYS_connect SYS_copy_file_range SYS_delete_module
    SYS_dup SYS_dup3 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_eventfd2 SYS_execve
    SYS_execveat SYS_exit SYS_exit_group SYS_faccessat SYS_faccessat2 SYS_fallocate
    SYS_fchdir SYS_fchmod SYS_fchmodat SYS_fchown SYS_fchownat SYS_fcntl SYS_fdatasync
    SYS_flock SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_futex SYS_getcwd
    SYS_getdents64 SYS_getegid SYS_geteuid SYS_getgid SYS_getpeername SYS_getpgid SYS_getpid
    SYS_getppid SYS_getrandom SYS_getrusage SYS_getsockname SYS_getsockopt
    SYS_gettid SYS_getuid SYS_init_module SYS_inotify_init1 SYS_io_uring_enter
    SYS_io_uring_register SYS_io_uring_setup SYS_ioctl SYS_kcmp SYS_kexec_load SYS_keyctl
    SYS_kill SYS_landlock_restrict_self SYS_linkat SYS_listen SYS_lseek SYS_madvise
    SYS_membarrier SYS_memfd_create SYS_mkdirat SYS_mknodat SYS_mlock SYS_mmap SYS_mount
    SYS_mprotect SYS_mremap SYS_msync SYS_munlock SYS_munmap SYS_nanosleep SYS_newfstatat
    SYS_open_by_handle_at SYS_openat SYS_openat2 SYS_perf_event_open SYS_personality
    SYS_pidfd_getfd SYS_pidfd_open SYS_pidfd_send_signal SYS_pipe2 SYS_pivot_root
    SYS_pkey_mprotect SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv SYS_preadv2 SYS_prlimit64
    SYS_process_vm_readv SYS_process_vm_writev SYS_ptrace SYS_pwrite64 SYS_pwritev
    SYS_pwritev2 SYS_read SYS_readlinkat SYS_readv SYS_reboot SYS_recvfrom SYS_recvmsg
    SYS_renameat2 SYS_restart_syscall SYS_rseq SYS_rt_sigaction SYS_rt_sigprocmask
    SYS_rt_sigqueueinfo SYS_rt_sigreturn SYS_rt_sigtimedwait SYS_rt_tgsigqueueinfo
    SYS_sched_getaffinity SYS_sched_setaffinity SYS_sched_setscheduler SYS_sched_yield
    SYS_seccomp SYS_sendfile SYS_sendmsg SYS_sendto SYS_set_robust_list SYS_setgid SYS_setitimer
    SYS_setgroups SYS_setns SYS_setpgid SYS_setresgid SYS_setresuid SYS_setsid SYS_setsockopt
    SYS_setuid SYS_shmat SYS_sigaltstack SYS_signalfd4 SYS_socket SYS_socketpair SYS_splice
    SYS_statfs SYS_statx SYS_swapon SYS_symlinkat SYS_sysinfo SYS_tgkill SYS_timer_create
    SYS_timerfd_create SYS_timerfd_gettime SYS_timerfd_settime SYS_tkill SYS_umask
    SYS_umount2 SYS_uname SYS_unlinkat SYS_unshare SYS_userfaultfd SYS_utimensat SYS_vmsplice
    SYS_wait4 SYS_waitid SYS_write SYS_writev
};

#[cfg(target_arch = "x86_64")]
const OLDER: Names = names! {
    SYS_access SYS_arch_prctl SYS_chmod SYS_chown SYS_creat SYS_dup2 SYS_epoll_wait
    SYS_eventfd SYS_fork SYS_getpgrp SYS_getrlimit SYS_inotify_init SYS_ioperm SYS_iopl SYS_link
    SYS_lstat SYS_mkdir SYS_mknod SYS_modify_ldt SYS_open SYS_pipe SYS_poll SYS_readlink
    SYS_rename SYS_rmdir SYS_select SYS_stat SYS_symlink SYS_unlink SYS_vfork
};
#[cfg(not(target_arch = "x86_64"))]
const OLDER: Names = &[];

/// The name of a system call, if it is a known one.
pub(super) fn name(number: libc::c_int) -> Option<&'static str> {
    let mut all = KNOWN.iter().chain(OLDER);
    let (_, symbol) = all.find(|(known, _)| *known == libc::c_long::from(number))?;
    symbol.strip_prefix("SYS_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: libc::c_long, of: &[u8]) -> String {
        let (number, mut thread) = (number as libc::c_int, [0; 16]);
        thread[..of.len()].copy_from_slice(of);
        let refused = Refused { number, foreign: false, second: 0xae80, thread };
        let mut line = Line::new();
        describe(&mut line, &refused, name(number)).unwrap();
        String::from_utf8(line.bytes().to_vec()).unwrap()
    }

    #[test]
    fn a_refusal_is_one_line_with_thread_call_and_number() {
        let text = line(libc::SYS_socket, b"vcpu0");
        let start = format!("thread vcpu0: socket ({}) was refused", libc::SYS_socket);
        assert!(text.contains(&start) && text.ends_with("(docs/security.md)\n"), "{text}");
        assert_eq!(text.lines().count(), 1);
        let text = line(libc::SYS_ioctl, b"0123456789abcdef");
        let start = format!("thread 0123456789abcdef: ioctl 0xae80 ({}) was", libc::SYS_ioctl);
        assert!(text.contains(&start), "{text}");
        assert!(line(99_999, b"\xff").contains("thread ?: system call 99999 was refused"));
    }
}
