// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that is stopped and goes on, as a whole or a thread of it, under load; and a stop of
//! the machine that a thread in the host holds up.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::event::{eventfd, EventfdFlags};
use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};
use tempfile::NamedTempFile;
use twostage::patience::wait_until;
use twostage::skips::not_tested;
use twostage_vmm::exit_code::OS_ERROR;

use crate::child::{kvm, with_default_signals, Running, TWOSTAGE};
use crate::fuse::FaultyDisk;
use crate::guest::{after, command, Guest};
use crate::world::{alone, IN_MEMORY};

const SHORT: Duration = Duration::from_millis(30);

fn memory_disk() -> NamedTempFile {
    let file = NamedTempFile::new_in(IN_MEMORY).unwrap();
    file.as_file().set_len(8 << 20).unwrap();
    file
}

/// Numbered writes come to their end, in order.
fn writes_end(guest: &mut Guest, from: u32, count: u32) {
    for number in from..from + count {
        assert_eq!(guest.line(), format!("k {number}"));
    }
}

#[test]
fn a_process_that_is_stopped_under_load_goes_on_where_it_was() {
    if !kvm() {
        return;
    }
    let disk = memory_disk();
    let option = format!("path={}", disk.path().display());
    let mut guest = Guest::start(&["--disk", &option, "--iommu", "vtd", "--cpus", "boot=2"]);
    const WRITES: u32 = 3000;
    guest.order(&format!("k 0 {WRITES}"));
    for _ in 0..20 {
        guest.machine.signal("STOP");
        wait_until("a stop", || guest.machine.status_line("State").starts_with('T'));
        sleep(SHORT);
        guest.machine.signal("CONT");
        sleep(SHORT);
    }
    writes_end(&mut guest, 1, WRITES);
    assert_eq!(guest.ask("p on"), "p on");
    assert_eq!(guest.stop(), "");
}

/// A terminal that gives nothing until somebody types.
fn silent() -> (OwnedFd, String) {
    let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&user).unwrap();
    unlockpt(&user).unwrap();
    let path = ptsname(&user, Vec::new()).unwrap().into_string().unwrap();
    (user, path)
}

#[test]
fn a_signal_or_a_stop_ends_no_read_of_a_source() {
    if !kvm() {
        return;
    }
    let (user, path) = silent();
    let mut guest = Guest::start(&["--rng", &format!("src={path}")]);
    guest.order("g");
    let thread = guest.machine.thread("00:01.0 rng");
    let waits = || {
        let path = format!("/proc/{}/task/{thread}/syscall", guest.machine.0.id());
        // read(2), on x86.
        std::fs::read_to_string(path).is_ok_and(|call| call.starts_with("0 "))
    };
    wait_until("a read", waits);
    for name in ["USR1", "STOP", "CONT", "USR1"] {
        // This thread's first of all, if it takes it.
        assert!(Command::new("kill")
            .args(["-s", name, &thread.to_string()])
            .status()
            .unwrap()
            .success());
        sleep(SHORT);
    }
    assert_eq!(guest.ask("s"), "s 15");
    rustix::io::write(&user, b"enough\n").unwrap();
    assert_eq!(guest.line(), "g 7");
    guest.stop();
}

/// A thread that makes no system call until this is dropped: it is traced by a process that is
/// stopped.
struct Frozen(Child);

impl Frozen {
    fn new(thread: u32) -> Option<Self> {
        let mut tracer = Command::new("strace");
        tracer.args(["-qq", "-o", "/dev/null", "-p", &thread.to_string()]);
        tracer.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(tracer) = tracer.spawn() else {
            not_tested("no strace");
            return None;
        };
        let mut frozen = Self(tracer);
        let traced = || {
            let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap();
            status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        };
        let mut ended = false;
        wait_until("a tracer", || {
            ended = frozen.0.try_wait().unwrap().is_some();
            ended || traced()
        });
        if ended {
            not_tested("threads cannot be traced here (is this root?)");
            return None;
        }
        frozen.signal("STOP");
        Some(frozen)
    }

    fn signal(&self, name: &str) {
        let id = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.signal("CONT");
        self.signal("INT");
        self.0.wait().unwrap();
    }
}

#[test]
fn a_thread_that_stands_still_under_load_goes_on_where_it_was() {
    if !kvm() {
        return;
    }
    let disk = memory_disk();
    let option = format!("path={}", disk.path().display());
    let rng = ["--rng", "src=/dev/urandom"];
    let devices =
        ["--disk", &option, "--iommu", "vtd,ats=on,pri=on", "--device", "edu,ats=on,pri=on"];
    let mut guest = Guest::start(&[&devices[..], &rng].concat());
    let mut written = 0;
    for (name, thread) in guest.threads("") {
        guest.order("k 0 200");
        let Some(frozen) = Frozen::new(thread) else { return };
        sleep(SHORT * 5);
        drop(frozen);
        writes_end(&mut guest, written + 1, 200);
        written += 200;
        assert_eq!(guest.ask("g"), "g 4096", "{name}");
    }
    assert_eq!(guest.stop(), "");
}

#[test]
fn the_others_go_on_while_a_device_stands_still() {
    if !kvm() {
        return;
    }
    let disk = memory_disk();
    let option = format!("path={}", disk.path().display());
    let mut guest = Guest::start(&["--disk", &option, "--rng", "src=/dev/urandom"]);
    let thread = guest.machine.thread("00:01.0 blk");
    let Some(frozen) = Frozen::new(thread) else { return };
    guest.order("r 0 0 1");
    for _ in 0..10 {
        assert_eq!(guest.ask("g"), "g 4096");
        assert_eq!(guest.ask("p on"), "p on");
    }
    drop(frozen);
    assert_eq!(guest.line(), "r 0 0 ok 0");
    assert_eq!(guest.stop(), "");
}

#[test]
fn a_stop_that_the_host_holds_up_ends_with_what_it_waits_for() {
    if !kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace").display().to_string();
    let mut guest = Guest::start(&["--trace", &trace]);
    let thread = guest.machine.thread("vcpu0");
    let Some(frozen) = Frozen::new(thread) else { return };
    // The second one, unless it comes at once.
    wait_until("a line", || {
        guest.machine.signal("TERM");
        sleep(SHORT * 5);
        guest.said().contains("; it ends now")
    });
    let said = guest.said();
    let line = said.strip_prefix("twostage: error: signal 15 came ").unwrap_or(&said);
    let (seconds, rest) = line.split_at(1);
    assert!(seconds.parse::<u8>().is_ok_and(|seconds| seconds != 0), "{said}");
    let end = " s ago, and a signal now, and the machine has not ended: it waits for a vCPU, \
               in a call of the host (a trace, an assigned device, memory); it ends now\n";
    assert_eq!(rest, end);
    // Whoever traces a thread hears of its end first.
    drop(frozen);
    assert_eq!(guest.machine.end().code(), Some(128 + 15));
    drop(File::open(trace).unwrap());
}

/// Whatever the parent has left: no signal of the system's clock is needed.
#[test]
fn a_signal_ends_a_machine_whose_main_thread_the_host_holds() {
    if !kvm() || !alone() {
        return;
    }
    let end =
        "the machine has not ended: it waits for the file of the report, which is not written; it \
         ends now\n";
    for blocked in [false, true] {
        let file = FaultyDisk::new(true);
        let mut env = with_default_signals(if blocked { "--block-signal=TERM" } else { TWOSTAGE });
        if blocked {
            env.args(["--block-signal=ALRM", "--ignore-signal=ALRM", TWOSTAGE]);
        }
        let report = format!("json,file={}", file.path().display());
        let mut guest = Guest::of(after(env, &["--report", &report]));
        file.hold();
        guest.machine.signal("USR1");
        file.wait_for_held(1);
        guest.machine.signal("TERM");
        if blocked {
            guest.wait_for(&format!("twostage: error: signal 15 came 10 s ago, and {end}"));
        } else {
            wait_until("a line", || {
                guest.machine.signal("TERM");
                sleep(SHORT * 5);
                guest.said().contains(end)
            });
        }
        file.let_go();
        assert_eq!(guest.machine.end().code(), Some(128 + 15));
    }
}

#[test]
fn what_is_typed_ends_a_machine_that_the_host_holds_up() {
    if !kvm() {
        return;
    }
    let (user, path) = silent();
    let terminal = File::options().read(true).write(true).open(path).unwrap();
    let mut guest = Guest::at(terminal.into(), command(&[]));
    let thread = guest.machine.thread("vcpu0");
    let Some(frozen) = Frozen::new(thread) else { return };
    rustix::io::write(&user, b"\x01x").unwrap();
    guest.wait_for(
        "twostage: error: Ctrl-A x was typed 10 s ago, and the machine has not ended: it waits for \
         a vCPU, in a call of the host (a trace, an assigned device, memory); it ends now\n",
    );
    drop(frozen);
    assert_eq!(guest.machine.end().code(), Some(OS_ERROR.into()));
}

/// Nobody reads what is said, and whoever says it never comes back.
#[test]
fn a_stop_waits_for_no_line_that_nobody_takes() {
    if !kvm() {
        return;
    }
    // It is ready, and adds what is written to a counter that has no room for it.
    let stuck = eventfd(0, EventfdFlags::empty()).unwrap();
    rustix::io::write(&stuck, &(u64::MAX - 1 - (1 << 60)).to_ne_bytes()).unwrap();
    let mut command = command(&[]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stuck);
    let mut machine = Running::new(&mut command);
    let mut ready = [0; 6];
    machine.0.stdout.take().unwrap().read_exact(&mut ready).unwrap();
    let thread = machine.thread("vcpu0");
    let Some(frozen) = Frozen::new(thread) else { return };
    // The main thread has ended, whatever its tracer is still to hear of another one.
    wait_until("the end of the machine", || {
        machine.signal("TERM");
        sleep(SHORT * 5);
        machine.status_line("State").starts_with('Z')
    });
    drop(frozen);
    assert_eq!(machine.end().code(), Some(128 + 15));
}

/// A vCPU that cannot be kicked never leaves a guest that waits, and who may be stopped for access
/// to the terminal does not end when it is to.
#[test]
fn every_thread_can_be_kicked_and_none_is_stopped_by_the_terminal() {
    if !kvm() {
        return;
    }
    let (kick, of_terminal) = (34, [21, 22]);
    let mut env = with_default_signals(&format!("--block-signal={kick}"));
    env.arg(TWOSTAGE);
    let mut guest = Guest::of(after(env, &[]));
    let threads = guest.threads("");
    assert!(threads.len() > 3, "{threads:?}");
    // The kernel has some of its own in a process, which block everything.
    let is_ours = |name: &str| !["kvm-", "iou-"].iter().any(|kernel| name.starts_with(kernel));
    for (name, id) in threads.into_iter().filter(|(name, _)| is_ours(name)) {
        // A thread may have ended meanwhile.
        let Ok(status) = std::fs::read_to_string(format!("/proc/{id}/status")) else { continue };
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t")).unwrap();
        let blocked = u64::from_str_radix(blocked, 16).unwrap();
        let is_blocked = |signal: u32| blocked >> (signal - 1) & 1 != 0;
        assert!(!is_blocked(kick) && of_terminal.into_iter().all(is_blocked), "{name} {blocked:x}");
    }
    guest.stop();
}
