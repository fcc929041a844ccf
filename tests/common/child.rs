// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A `twostage` that runs, and that no failed test leaves behind.
#![allow(dead_code)]

use std::io::Write;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};
use tempfile::NamedTempFile;

pub const TWOSTAGE: &str = env!("CARGO_BIN_EXE_twostage");

/// Nothing here takes so long, even on a machine with much else to do.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Whether guests can run here.
pub fn kvm() -> bool {
    let there = kvm_ioctls::Kvm::new().is_ok();
    if !there {
        eprintln!("no /dev/kvm: not tested");
    }
    there
}

/// A file with the kernel `image`.
pub fn kernel(image: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    file
}

/// Comes back when `done`; panics with `what` when it never is.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Starts `program` with no signal ignored: those that were when the tests were started (nohup, a
/// shell's background) would stay so.
pub fn with_default_signals(program: &str) -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal", program]);
    command
}

/// Starts `command`, which has ended when it takes too long: who reads from it, or waits for it,
/// does not do so for ever.
pub fn spawn(command: &mut Command) -> Child {
    let child = command.spawn().unwrap();
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    std::thread::spawn(move || {
        std::thread::sleep(LIMIT * 2);
        // Fails when it has ended long since.
        let _ = pidfd_send_signal(process, Signal::KILL);
    });
    child
}

/// A process that ends with its test.
pub struct Running(pub Child);

impl Running {
    pub fn new(command: &mut Command) -> Self {
        Self(spawn(command))
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.0.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    pub fn end(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the end of the machine", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// SIGUSR1 does not end it any more.
    pub fn wait_until_reports_can_be_had(&self) {
        wait_for("a handler of SIGUSR1", || {
            let caught = u64::from_str_radix(&self.status_line("SigCgt"), 16);
            caught.is_ok_and(|caught| caught & (1 << 9) != 0)
        });
    }

    /// A line of `/proc/PID/status`, without its name.
    pub fn status_line(&self, name: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    }

    /// Processor time that it used, in ticks of 10 ms.
    pub fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
