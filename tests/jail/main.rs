// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tables of `twostage::jail` are true. Both virtual IOMMUs live in machines in which each kind
//! of thread is watched (which verbs it calls), and may be locked up: by a seccomp filter that is
//! built from its table. A system call that is not in the table ends the process with its number.
//!
//! On a kernel's host these are the calls of a product; `kernel` needs one, and QEMU's edu device
//! there. The preload library stands in for it here; what it does itself is allowed, too.
#![allow(unsafe_code)]

mod filter;
mod lives;
#[allow(dead_code)] // shared with programs that use more of it
#[path = "../preload/program/uapi.rs"]
mod uapi;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::hint;
use std::io::{self, Write};
use std::path::Path;
use std::process::{self, Command};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use seccompiler::{apply_filter, SeccompAction};
use tempfile::NamedTempFile;
use twostage::iommufd::{HostIommu, HwInfoData, KernelHost, Verb};
use twostage::jail::{self, Ioctl, ThreadKind, EVENTS, GUEST, KINDS, QUEUE, REMOVE, SETUP};
use twostage::nesting::vtd::Nesting;
use twostage::threads::{NewThread, ThreadStart};
use vmm_sys_util::signal::register_signal_handler;

use filter::filter;
use lives::{asking_life, asking_vt_d, smmu, smmu_life, vt_d, vtd_life, Load, World};

/// Entries that no life here uses: the kind, the ioctl, and why it is in the table.
const UNSEEN: &[(&ThreadKind, &str, &str)] = &[
    (&SETUP, "IOMMU_HWPT_INVALIDATE", "a stream is added while a flush of the TLB is due"),
    (&REMOVE, "IOMMU_IOAS_UNMAP", "a kernel's host unmaps what is left when it is dropped"),
];

const MIRRORED: Nesting = Nesting::Off { pieces: 100 };

thread_local! {
    /// What this thread does.
    static KIND: Cell<Option<&'static ThreadKind>> = const { Cell::new(None) };
}

/// The system call that a filter stopped, plus 1.
static STOPPED: AtomicI32 = AtomicI32::new(0);

/// Runs on the thread that made the call. It makes none, as they may be stopped, too.
extern "C" fn stopped(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t of SIGSYS, with the number as its seventh int.
    let number = unsafe { *info.cast::<i32>().add(6) };
    STOPPED.store(number + 1, Ordering::SeqCst);
    loop {
        hint::spin_loop();
    }
}

/// Ends the process when a system call was stopped.
fn watch_for_stops() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        register_signal_handler(libc::SIGSYS, stopped).unwrap();
        thread::spawn(|| loop {
            let number = STOPPED.load(Ordering::SeqCst) - 1;
            if number >= 0 {
                let name = name_of(number);
                say(&format!("a jailed thread made the system call {name}, not in its table"));
                for entry in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
                    let read = |file| fs::read_to_string(entry.path().join(file));
                    if read("status").is_ok_and(|status| status.contains("Seccomp:\t2")) {
                        say(&format!("jailed: {}", read("comm").unwrap_or_default().trim()));
                    }
                }
                process::exit(99);
            }
            thread::sleep(Duration::from_millis(1));
        });
    });
}

/// Bypasses the harness, which only shows the output of failed tests.
fn say(text: &str) {
    writeln!(io::stderr(), "{text}").expect("standard error");
}

/// The name of a system call.
fn name_of(number: i32) -> String {
    macro_rules! names {
        ($($name:ident)*) => { [$((libc::$name, stringify!($name))),*] };
    }
    let known = names! {
        SYS_accept4 SYS_bind SYS_clone SYS_clone3 SYS_close SYS_connect SYS_dup SYS_dup3
        SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_eventfd2 SYS_exit SYS_exit_group
        SYS_faccessat SYS_fallocate SYS_fcntl SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate
        SYS_futex SYS_getcwd SYS_getdents64 SYS_getpid SYS_getrandom SYS_getsockopt SYS_gettid
        SYS_ioctl SYS_kill SYS_lseek SYS_madvise SYS_membarrier SYS_memfd_create SYS_mlock
        SYS_mmap SYS_mprotect SYS_mremap SYS_munmap SYS_nanosleep SYS_clock_nanosleep
        SYS_newfstatat SYS_openat SYS_pipe2 SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv
        SYS_prlimit64 SYS_process_vm_readv SYS_pwrite64 SYS_pwritev SYS_read SYS_readlinkat
        SYS_readv SYS_recvfrom SYS_recvmsg SYS_rseq SYS_rt_sigaction SYS_rt_sigprocmask
        SYS_sched_getaffinity SYS_sched_yield SYS_seccomp SYS_sendmsg SYS_sendto
        SYS_set_robust_list SYS_sigaltstack SYS_socket SYS_socketpair SYS_statx SYS_tgkill
        SYS_timerfd_create SYS_uname SYS_write SYS_writev
    };
    let found = known.iter().find(|(known, _)| *known == i64::from(number));
    found.map_or_else(|| format!("number {number}"), |(_, name)| (*name)[4..].to_owned())
}

/// Starts threads as what they are.
#[derive(Debug, Clone, Default)]
struct Jail {
    locked: bool,
    /// System calls of the preload library.
    own: &'static [libc::c_long],
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    started: Arc<Mutex<BTreeSet<&'static str>>>,
}

impl Jail {
    /// From now on this thread is of that kind.
    fn enter(&self, kind: &'static ThreadKind) {
        KIND.set(Some(kind));
        if !self.locked || env::var_os("TWOSTAGE_JAIL_OPEN").is_some() {
            return;
        }
        watch_for_stops();
        let mut own = self.own.to_vec();
        if std::ptr::eq(kind, &SETUP) {
            // Its threads get a filter each, besides its own.
            own.extend([libc::SYS_seccomp, libc::SYS_prctl]);
        }
        apply_filter(&filter(kind, &own, SeccompAction::Trap).unwrap()).unwrap();
    }

    /// Does `work` on a new thread of that kind.
    fn run<T: Send>(&self, kind: &'static ThreadKind, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let named = thread::Builder::new().name(kind.name.to_owned());
            let jailed = || {
                self.enter(kind);
                work()
            };
            named.spawn_scoped(scope, jailed).unwrap().join().unwrap()
        })
    }

    /// Waits for the library's threads, which are told to end; returns their kinds.
    fn end(&self) -> BTreeSet<&'static str> {
        self.threads.lock().unwrap().drain(..).for_each(|thread| thread.join().unwrap());
        self.started.lock().unwrap().clone()
    }
}

impl ThreadStart for Jail {
    fn start(&self, thread: NewThread) -> io::Result<()> {
        let (jail, name) = (self.clone(), thread.name().to_owned());
        self.started.lock().unwrap().insert(thread.kind().name);
        let run = move || {
            jail.enter(thread.kind());
            thread.run();
        };
        let named = thread::Builder::new().name(name);
        self.threads.lock().unwrap().push(named.spawn(run)?);
        Ok(())
    }
}

/// The ioctls of verbs that a kind of thread has called.
fn ioctls(kind: &ThreadKind, seen: &BTreeSet<(&'static str, Verb)>) -> BTreeSet<Ioctl> {
    let verbs = seen.iter().filter(|(name, _)| *name == kind.name);
    verbs.flat_map(|(_, verb)| verb.ioctls()).copied().collect()
}

#[test]
fn the_tables_have_the_ioctls_of_every_kind_and_no_others() {
    let (one, other) = (World::emulated(false, smmu), World::emulated(false, vt_d));
    smmu_life(&one);
    vtd_life(&other, true, Nesting::On);
    let mirrored = World::emulated(false, vt_d);
    vtd_life(&mirrored, true, MIRRORED);
    let ((started, mut seen), (none, of_vtd)) = (one.end(), other.end());
    seen.extend(of_vtd);
    seen.extend(mirrored.end().1);
    let asking = World::emulated(false, asking_vt_d);
    asking_life(&asking);
    seen.extend(asking.end().1);
    assert_eq!((started, none), (BTreeSet::from(["events"]), BTreeSet::new()));
    let mut wrong = Vec::new();
    for kind in KINDS {
        let listed: BTreeSet<_> = kind.ioctls.iter().copied().collect();
        let seen = ioctls(kind, &seen);
        let not_listed = seen.difference(&listed).map(|ioctl| ("not listed", ioctl.name));
        let unseen = |name| UNSEEN.iter().any(|(of, it, _)| of.name == kind.name && *it == name);
        let not_seen = listed.difference(&seen).filter(|ioctl| !unseen(ioctl.name));
        let not_seen = not_seen.map(|ioctl| ("not seen", ioctl.name));
        wrong.extend(not_listed.chain(not_seen).map(|(what, name)| (kind.name, what, name)));
        let seen_though = listed.intersection(&seen).filter(|ioctl| unseen(ioctl.name));
        wrong.extend(seen_though.map(|ioctl| (kind.name, "seen", ioctl.name)));
    }
    assert_eq!(wrong, []);
}

#[test]
fn lives_in_jails() {
    let (one, other) = (World::emulated(true, smmu), World::emulated(true, vt_d));
    smmu_life(&one);
    vtd_life(&other, true, Nesting::On);
    vtd_life(&World::emulated(true, vt_d), true, MIRRORED);
    assert_eq!(one.end().0, BTreeSet::from(["events"]));
    let asking = World::emulated(true, asking_vt_d);
    asking_life(&asking);
    assert_eq!(asking.end().0, BTreeSet::from(["events"]));
}

/// System calls of the preload library, on the threads of its program.
const OF_THE_LIBRARY: &[libc::c_long] = &[
    libc::SYS_bind,
    libc::SYS_capget,
    libc::SYS_fstat,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_ppoll,
    libc::SYS_prlimit64,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_socketpair,
];

/// The same on a kernel's host, with the edu device `TWOSTAGE_CONTRACT_DEVICE`.
#[test]
fn kernel() {
    let Ok(device) = env::var("TWOSTAGE_CONTRACT_DEVICE") else {
        return say("skipped: TWOSTAGE_CONTRACT_DEVICE names no edu behind vfio-pci");
    };
    let preloaded = env::var_os("LD_PRELOAD").is_some();
    let opened = Arc::new(Mutex::new(None::<Arc<KernelHost>>));
    let last = opened.clone();
    let open = move |jail: &Jail| -> Arc<dyn HostIommu> {
        let host = KernelHost::open(Path::new("/dev/iommu")).unwrap();
        let host = Arc::new(host.with_threads(Arc::new(jail.clone())));
        *opened.lock().unwrap() = Some(host.clone());
        host
    };
    let engine = move |dev| -> Load {
        // Taken out: the last owner of the host is in a jail.
        let file: Arc<File> = last.lock().unwrap().take().unwrap().device_file(dev).unwrap();
        let mut device = uapi::Device::from(file.try_clone().unwrap());
        device.start().unwrap();
        Box::new(move |iova| {
            let _bound = &file;
            device.fetch(iova, 8);
        })
    };
    let own = if preloaded { OF_THE_LIBRARY } else { &[] };
    let world = World {
        jail: Jail { locked: true, own, ..Jail::default() },
        watch: Arc::default(),
        device: device.clone(),
        open: Box::new(open),
        engine: Box::new(engine),
        // The device is not in this process.
        during_dma: Box::new(|work| work()),
    };
    let info = {
        let host = KernelHost::open(Path::new("/dev/iommu")).unwrap();
        let dev = host.device_bind(&device).unwrap();
        host.get_hw_info(dev).unwrap()
    };
    let smmu = matches!(info.data, HwInfoData::ArmSmmuV3(_));
    match smmu {
        true => smmu_life(&world),
        false => vtd_life(&world, info.max_pasid_log2 != 0, Nesting::On),
    }
    let (started, seen) = world.end();
    let expected = if smmu { &["events", "queue"][..] } else { &[] };
    assert_eq!(started, expected.iter().copied().collect());
    for kind in KINDS {
        println!("{}: {} ioctls", kind.name, ioctls(kind, &seen).len());
    }
}

/// A machine of the preload library: a device behind an IOMMU of that model.
fn machine(model: &str) -> NamedTempFile {
    let text = format!(
        "[[iommu]]\nname = 'iommu'\nmodel = '{model}'\n\
         [[device]]\nvfio = 3\niommu = 'iommu'\naddress = '00:04.0'\n"
    );
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

/// Runs the test `kernel` of this program under the preload library, on that machine, or
/// `lives_in_jails` without both. With a file for the trace, nothing is locked, but traced.
fn run(machine: Option<&NamedTempFile>, trace: Option<&Path>) {
    let program = env::current_exe().unwrap();
    // A run that hangs fails instead of blocking.
    let mut command = Command::new("timeout");
    command.arg("300");
    if let Some(trace) = trace {
        command.args(["strace", "-f", "--decode-pids=comm", "-o"]).arg(trace);
        command.env("TWOSTAGE_JAIL_OPEN", "1");
    }
    command.arg("env");
    if let Some(machine) = machine {
        let library = program.with_file_name("libtwostage_iommufd.so");
        assert!(library.exists(), "no {}", library.display());
        command.arg(format!("LD_PRELOAD={}", library.display()));
        command.env("TWOSTAGE_CONTRACT_DEVICE", "/dev/vfio/devices/vfio3");
        command.env("TWOSTAGE_IOMMUFD", machine.path());
    }
    let test = if machine.is_some() { "kernel" } else { "lives_in_jails" };
    let output = command.arg(program).args(["--exact", test, "--nocapture"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let passed = output.status.success() && text.contains("1 passed");
    assert!(passed, "{}\n{text}\n{errors}", output.status);
}

#[test]
fn lives_in_jails_on_a_kernels_host() {
    run(Some(&machine("smmuv3")), None);
    run(Some(&machine("vtd")), None);
}

/// System calls that no life here makes, on any kind of thread or only on one, and why they are in
/// the tables.
const UNSEEN_CALLS: &[(Option<&ThreadKind>, &str, &str)] = &[
    (None, "nanosleep", "musl"),
    (None, "clock_gettime", "the vDSO does it, if the clock allows"),
    (None, "mremap", "a table of many entries that grows"),
    (None, "brk", "the main thread's memory"),
    (None, "rt_sigreturn", "the VMM's signals"),
    (None, "restart_syscall", "a stopped process that goes on"),
    (None, "epoll_pwait", "arm64, and musl"),
    (Some(&SETUP), "open", "musl"),
    (Some(&SETUP), "stat", "musl"),
    (Some(&SETUP), "clone", "musl"),
    (Some(&SETUP), "newfstatat", "glibc, for the folder of a device in sysfs"),
    (Some(&SETUP), "getdents64", "a device by its folder in sysfs"),
    (Some(&SETUP), "readlink", "which driver a device has that is not VFIO's"),
    (Some(&SETUP), "readlinkat", "the same on arm64"),
    (Some(&SETUP), "write", "a thread of a queue is told to end when adding a device fails"),
    (Some(&SETUP), "rt_sigaction", "glibc, in another program: `first`"),
    (Some(&GUEST), "write", "a response to a page request, of which these lives have none"),
    (Some(&EVENTS), "read", "the preload library receives from a socket"),
    (Some(&QUEUE), "write", "a watcher drops its queue"),
    (Some(&REMOVE), "write", "a page request queue of the VMM is dropped"),
];

/// The system calls of a trace, each with the kind of the thread that made it.
fn read_trace(trace: &Path, seen: &mut BTreeSet<(&'static str, String)>) {
    for line in fs::read_to_string(trace).unwrap().lines() {
        let Some((thread, call)) = line.split_once("> ") else { continue };
        let comm = thread.split_once('<').map_or("", |(_, comm)| comm);
        let kind = KINDS.iter().find(|kind| match kind.name {
            "events" => ["smmu-events", "page-requests"].contains(&comm),
            "queue" => comm.starts_with("queue "),
            name => comm == name,
        });
        let call = call.trim_start().split_once('(').map_or("", |(name, _)| name);
        seen.extend(kind.map(|kind| (kind.name, call.to_owned())));
    }
}

#[test]
fn no_system_call_is_in_the_tables_in_vain() {
    if Command::new("strace").arg("-V").output().is_err() {
        return say("skipped: there is no strace to see which system calls are made (apt install)");
    }
    let mut seen = BTreeSet::new();
    for machine in [None, Some(machine("smmuv3")), Some(machine("vtd"))] {
        let trace = NamedTempFile::new().unwrap();
        run(machine.as_ref(), Some(trace.path()));
        read_trace(trace.path(), &mut seen);
    }
    let is_unseen = |kind: &ThreadKind, name: &str| {
        let of = |only: Option<&ThreadKind>| only.is_none_or(|only| only.name == kind.name);
        UNSEEN_CALLS.iter().any(|(only, unseen, _)| of(*only) && *unseen == name)
    };
    let made = |kind: &ThreadKind, name: &str| seen.contains(&(kind.name, name.to_owned()));
    let mut wrong = Vec::new();
    for kind in KINDS {
        let own = kind.own.iter().filter(|call| call.number().is_some());
        let both_or_none = own.filter(|call| made(kind, call.name) == is_unseen(kind, call.name));
        wrong.extend(both_or_none.map(|call| (kind.name, call.name)));
    }
    for call in &jail::COMMON {
        if KINDS.iter().any(|kind| made(kind, call.name)) == is_unseen(&GUEST, call.name) {
            wrong.push(("common", call.name));
        }
    }
    assert_eq!(wrong, [], "each is made, or listed with the reason why it is not");
}
