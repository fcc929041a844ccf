// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hostile threads: a program in each kind of thread tries what an attacker would, in a process of
//! its own. Each attempt is refused with one line and the exit code for it, and leaves nothing
//! behind; where that is otherwise, it is as docs/security.md says.
#![allow(unsafe_code)]

use std::env;
use std::ffi::CString;
use std::fs::{self, File};
use std::net::UdpSocket;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{self, Child, Command, Output, Stdio};

use rustix::process::{kill_process, Pid, Signal};
use tempfile::TempDir;
use twostage::skips::not_tested;
use vm_memory::mmap::MmapRegion;

use super::*;

/// Says in a child what it does: its jail, the kind of its thread, an attempt, and what that needs.
const HOSTILE: &str = "TWOSTAGE_TEST_HOSTILE";

/// What an attacker tries, and the system call that it takes on this machine.
const ATTEMPTS: &[(&str, &[&str])] = &[
    ("open", &["openat"]),
    ("create", &["openat"]),
    ("socket", &["socket"]),
    ("ptrace", &["ptrace"]),
    ("execve", &["execve"]),
    ("fork", &["clone", "fork"]),
    ("clone3", &["clone3", "clone"]),
    ("kill", &["kill"]),
    ("code", &["mmap"]),
    ("ioctl", &["ioctl 0x541b"]),
    ("privileges", &["prctl"]),
    ("silence", &["rt_sigaction"]),
    #[cfg(target_arch = "x86_64")]
    ("foreign", &["system call of another architecture"]),
];

/// Exit code of a child whose attempt succeeded, which some say.
const DONE: u8 = 3;

/// Returns whether it succeeded, if that is of interest.
fn attempt(what: &str, with: &str) -> bool {
    match what {
        "open" => return File::open("/etc/passwd").is_ok(),
        "create" => return File::create(with).is_ok(),
        "socket" => return UdpSocket::bind("127.0.0.1:0").is_ok(),
        "foreign" => return foreign() >= 0,
        "deaf" => {
            vmm_sys_util::signal::block_signal(libc::SIGSYS).unwrap();
            return UdpSocket::bind("127.0.0.1:0").is_ok();
        }
        // SAFETY: it refers to no memory.
        "ptrace" => drop(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) }),
        "execve" => drop(Command::new("/bin/touch").arg(with).exec()),
        "fork" => fork(),
        "clone3" => {
            // `struct clone_args` as it was at first: the signal is its fifth word.
            let mut words = [0u64; 8];
            words[4] = libc::SIGCHLD as u64;
            let size = std::mem::size_of_val(&words);
            // SAFETY: the words live until the call returns; the child, if there is one, only ends.
            let child = unsafe {
                let child = libc::syscall(libc::SYS_clone3, &words, size);
                if child == 0 {
                    libc::_exit(0);
                }
                child
            };
            // As the C library does.
            if child == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) {
                fork();
            }
        }
        "kill" => {
            let other = with.parse().ok().and_then(Pid::from_raw).unwrap();
            let _ = kill_process(other, Signal::KILL);
        }
        "code" => {
            let executable = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            drop(MmapRegion::<()>::build(None, 4096, executable, flags));
        }
        "ioctl" => drop(rustix::io::ioctl_fionread(io::stdin())),
        // SAFETY: it refers to no memory.
        "privileges" => drop(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }),
        // SAFETY: to ignore a signal needs no handler.
        "silence" => drop(unsafe { libc::signal(libc::SIGSYS, libc::SIG_IGN) }),
        _ => panic!("an attempt called {what}"),
    }
    false
}

/// `getpid` by the 32-bit interface of x86.
#[cfg(target_arch = "x86_64")]
fn foreign() -> i32 {
    let result: i32;
    // SAFETY: the call has no arguments, and changes no register but that of the result; the
    // kernel clears some others, which are named.
    unsafe {
        std::arch::asm!(
            "int 0x80", inlateout("eax") 20 => result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result
}

#[cfg(not(target_arch = "x86_64"))]
fn foreign() -> i32 {
    panic!("no attempt on this machine")
}

fn fork() {
    // SAFETY: the child, if there is one, only ends.
    unsafe {
        if libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) == 0 {
            libc::_exit(0);
        }
    }
}

/// Does `work` on a thread of that kind, which is started as in a machine.
fn on_a_thread(kind: Kind, early: bool, work: Box<dyn FnOnce() + Send>) {
    let start = |kind: Kind, work: Box<dyn FnOnce() + Send>| {
        super::start(&format!("{kind:?}"), kind, work).unwrap().join().unwrap();
    };
    match kind {
        Kind::Main => work(),
        Kind::Device if !early => start(Kind::Vcpu, Box::new(move || start(kind, work))),
        Kind::Disk => on_a_thread(Kind::Device, false, Box::new(move || start(kind, work))),
        _ => start(kind, work),
    }
}

/// The child; nothing in an ordinary run of the tests.
#[test]
fn hostile() {
    let Ok(text) = env::var(HOSTILE) else { return };
    let mut words = text.splitn(5, ' ').map(str::to_owned);
    let mut word = || words.next().unwrap();
    let (jail, kind, early, what, with) = (word(), word(), word() == "true", word(), word());
    let kind = Kind::ALL.into_iter().find(|known| format!("{known:?}") == kind).unwrap();
    let name = CString::new(format!("{kind:?}")).unwrap();
    rustix::thread::set_name(&name).unwrap();
    let user = rustix::process::geteuid().is_root().then_some(User { uid: 65534, gid: 65534 });
    let settings = match jail.as_str() {
        "log" => Settings { mode: Mode::Log, ..Settings::default() },
        "restart" => Settings { mode: Mode::On, user: None, reopened: Some(Vec::new()) },
        _ => Settings { mode: Mode::On, user, reopened: None },
    };
    prepare(settings).unwrap();
    // Those that are started before and after the main thread is in the jail.
    if !early {
        lock().unwrap();
    }
    let exit = move || process::exit(if attempt(&what, &with) { DONE.into() } else { 0 });
    on_a_thread(kind, early, Box::new(exit));
}

/// Kinds of threads, and whether they are started before the main thread is in the jail: those of
/// virtio devices are not, that of an edu is.
fn threads() -> impl Iterator<Item = (Kind, bool)> {
    let is_early = |kind| matches!(kind, Kind::Output | Kind::Events | Kind::Queue | Kind::Signals);
    Kind::ALL.into_iter().map(move |kind| (kind, is_early(kind))).chain([(Kind::Device, true)])
}

fn run(jail: &str, (kind, early): (Kind, bool), what: &str, with: &str) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "process::jail::tests::hostile", "--nocapture", "--test-threads=1"]);
    command.env(HOSTILE, format!("{jail} {kind:?} {early} {what} {with}")).stdin(Stdio::null());
    command.output().unwrap()
}

/// Whether the kernel has no calls of other architectures (`ia32_emulation=off`): then there is
/// nothing to refuse.
fn is_no_call(what: &str, output: &Output) -> bool {
    let none = what == "foreign" && output.status.signal() == Some(libc::SIGSEGV);
    if none {
        not_tested("the kernel has no 32-bit system calls");
    }
    none
}

/// A process that is killed with its test.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn what_a_hostile_thread_tries_is_refused_with_one_line_and_leaves_nothing_behind() {
    let mut victim = Victim(Command::new("sleep").arg("600").spawn().unwrap());
    let folder = TempDir::new().unwrap();
    // Anybody could create files there.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(folder.path(), open).unwrap();
    let file = folder.path().join("file");
    for (kind, early) in threads() {
        for (what, calls) in ATTEMPTS {
            let with = match *what {
                "kill" => victim.0.id().to_string(),
                _ => file.display().to_string(),
            };
            let output = run("on", (kind, early), what, &with);
            if is_no_call(what, &output) {
                continue;
            }
            let errors = String::from_utf8_lossy(&output.stderr);
            let context = format!("{kind:?} ({early}), {what}: {:?}: {errors}", output.status);
            assert_eq!(output.status.code(), Some(exit_code::REFUSED.into()), "{context}");
            assert_eq!(errors.lines().count(), 1, "{context}");
            let said = |call: &&str| errors.contains(&format!("thread {kind:?}: {call} ("));
            assert!(calls.iter().any(said), "{context}");
            assert!(!file.exists(), "{context}");
            assert_eq!(victim.0.try_wait().unwrap(), None, "{context}");
        }
    }
}

/// A signal that is blocked cannot be answered: the kernel ends the process by it.
#[test]
fn who_blocks_the_signal_of_refusals_is_ended_by_it() {
    for of in threads() {
        let output = run("on", of, "deaf", "-");
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{of:?}: {output:?}");
    }
}

/// As files may be opened then, Landlock refuses the others, by an error.
#[test]
fn a_main_thread_that_builds_machines_again_opens_nothing_else() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file").display().to_string();
    let main = (Kind::Main, false);
    let can = run("restart", main, "open", &file);
    if String::from_utf8_lossy(&can.stderr).contains("Landlock") {
        return not_tested("no Landlock");
    }
    for what in ["open", "create"] {
        let output = run("restart", main, what, &file);
        assert_eq!(output.status.code(), Some(0), "{what}: {output:?}");
    }
    for (what, _) in ATTEMPTS.iter().filter(|(what, _)| !["open", "create"].contains(what)) {
        let with = if *what == "kill" { "1" } else { &file };
        let output = run("restart", main, what, with);
        if is_no_call(what, &output) {
            continue;
        }
        assert_eq!(output.status.code(), Some(exit_code::REFUSED.into()), "{what}: {output:?}");
    }
    assert!(!fs::exists(&file).unwrap());
}

#[test]
fn a_log_refuses_nothing() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file").display().to_string();
    for of in threads() {
        let calls = ["open", "create", "socket", "foreign"];
        for (what, _) in ATTEMPTS.iter().filter(|(what, _)| calls.contains(what)) {
            let output = run("log", of, what, &file);
            if is_no_call(what, &output) {
                continue;
            }
            assert_eq!(output.status.code(), Some(DONE.into()), "{of:?}, {what}: {output:?}");
        }
    }
}

#[test]
fn a_panic_in_the_jail_is_told_with_what_there_is_of_a_backtrace() {
    for (kind, early) in threads() {
        let output = run("on", (kind, early), "panic", "-");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("panicked at"), "{kind:?}: {errors}");
        assert!(!errors.contains("--jail"), "{kind:?}: {errors}");
    }
}
