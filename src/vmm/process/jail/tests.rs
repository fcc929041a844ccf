// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hostile threads: a program in each kind of thread tries what an attacker would, in a process of
//! its own. Each attempt is refused with one line and the exit code for it, and leaves nothing
//! behind.
#![allow(unsafe_code)]

use std::env;
use std::ffi::CString;
use std::fs::File;
use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::process::{self, Child, Command, Output, Stdio};

use rustix::process::{kill_process, Pid, Signal};
use tempfile::TempDir;
use vm_memory::mmap::MmapRegion;

use super::*;

/// Says in a child what it does: the kind of its thread, an attempt, and what that needs.
const HOSTILE: &str = "TWOSTAGE_TEST_HOSTILE";

/// What an attacker tries, and the system call that it takes on this machine.
const ATTEMPTS: [(&str, &[&str]); 12] = [
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
];

fn attempt(what: &str, with: &str) {
    match what {
        "open" => drop(File::open("/etc/passwd")),
        "create" => drop(File::create(with)),
        "socket" => drop(UdpSocket::bind("127.0.0.1:0")),
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
        let thread = thread::Builder::new().name(format!("{kind:?}"));
        thread.spawn(inside(kind, work)).unwrap().join().unwrap();
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
    let mut words = text.splitn(4, ' ').map(str::to_owned);
    let mut word = || words.next().unwrap();
    let (kind, early, what, with) = (word(), word() == "true", word(), word());
    let kind = Kind::ALL.into_iter().find(|known| format!("{known:?}") == kind).unwrap();
    let name = CString::new(format!("{kind:?}")).unwrap();
    rustix::thread::set_name(&name).unwrap();
    let user = rustix::process::geteuid().is_root().then_some(User { uid: 65534, gid: 65534 });
    let settings = Settings { mode: Mode::On, user, ..Settings::default() };
    prepare(settings).unwrap();
    // Those that are started before and after the main thread is in the jail.
    if !early {
        lock().unwrap();
    }
    on_a_thread(kind, early, Box::new(move || attempt(&what, &with)));
    // It was not refused.
    process::exit(0);
}

/// Kinds of threads, and whether they are started before the main thread is in the jail: those of
/// virtio devices are not, that of an edu is.
fn threads() -> impl Iterator<Item = (Kind, bool)> {
    let is_early = |kind| matches!(kind, Kind::Output | Kind::Events | Kind::Queue | Kind::Signals);
    Kind::ALL.into_iter().map(move |kind| (kind, is_early(kind))).chain([(Kind::Device, true)])
}

fn run((kind, early): (Kind, bool), what: &str, with: &str) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "process::jail::tests::hostile", "--nocapture", "--test-threads=1"]);
    command.env(HOSTILE, format!("{kind:?} {early} {what} {with}")).stdin(Stdio::null());
    command.output().unwrap()
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
            let with = match what {
                "kill" => victim.0.id().to_string(),
                _ => file.display().to_string(),
            };
            let output = run((kind, early), what, &with);
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

#[test]
fn a_panic_in_the_jail_is_told_with_what_there_is_of_a_backtrace() {
    for (kind, early) in threads() {
        let output = run((kind, early), "panic", "-");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains("panicked at"), "{kind:?}: {errors}");
        assert!(!errors.contains("--jail"), "{kind:?}: {errors}");
    }
}
