// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A running `twostage` that no failed test leaves behind.
#![allow(dead_code)]

use std::io::Write;
use std::process::{Child, Command, ExitStatus};

use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};
use tempfile::NamedTempFile;
use twostage::patience::{wait_until, PATIENCE};
use twostage::skips::not_tested;

pub const TWOSTAGE: &str = env!("CARGO_BIN_EXE_twostage");

/// Whether guests can run here.
pub fn kvm() -> bool {
    let there = kvm_ioctls::Kvm::new().is_ok();
    if !there {
        not_tested("no /dev/kvm");
    }
    there
}

/// A file with the kernel `image`.
pub fn kernel(image: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    file
}

/// Starts `program` with default signal dispositions: signals ignored when the tests were started
/// (nohup, a shell's background) would stay ignored.
pub fn with_default_signals(program: &str) -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal", program]);
    command
}

/// Starts `command` with a time limit, so that nobody who reads from it or waits for it hangs.
pub fn spawn(command: &mut Command) -> Child {
    let child = command.spawn().unwrap();
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    std::thread::spawn(move || {
        std::thread::sleep(PATIENCE * 2);
        // Fails if it has already ended.
        let _ = pidfd_send_signal(process, Signal::KILL);
    });
    child
}

/// Sends `child` the signal called `name`.
pub fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

/// A process that is killed with its test.
pub struct Running(pub Child);

impl Running {
    pub fn new(command: &mut Command) -> Self {
        Self(spawn(command))
    }

    pub fn signal(&self, name: &str) {
        signal(&self.0, name);
    }

    pub fn end(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the end of the machine", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// SIGUSR1 no longer kills it.
    pub fn wait_until_reports_can_be_had(&self) {
        wait_until("a handler of SIGUSR1", || {
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

    /// The identifiers of its threads whose name starts with `name`.
    pub fn threads(&self, name: &str) -> Vec<(String, u32)> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let threads = tasks.map(|task| {
            let path = task.unwrap().path();
            let id = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            (name.trim_end().to_owned(), id)
        });
        threads.filter(|(known, _)| known.starts_with(name)).collect()
    }

    /// The identifier of the first of those, which may only be about to start.
    pub fn thread(&self, name: &str) -> u32 {
        wait_until(name, || !self.threads(name).is_empty());
        self.threads(name)[0].1
    }

    /// Processor time used, in ticks of 10 ms.
    pub fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
