// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine whose guest does what it is told (`guest-images/vtd-check/checks/orders.c`).

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use twostage::patience::wait_until;

use crate::built::images;
use crate::child::{with_default_signals, Running, TWOSTAGE};

pub struct Guest {
    pub machine: Running,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    said: Arc<Mutex<String>>,
    listener: Option<JoinHandle<()>>,
}

/// The command of a machine in its jail.
pub fn command(arguments: &[&str]) -> Command {
    after(with_default_signals(TWOSTAGE), arguments)
}

/// The rest of a `command` that ends with the program.
pub fn after(mut command: Command, arguments: &[&str]) -> Command {
    command.args(["run", "--kernel"]).arg(images().join("vtd-check.elf"));
    command.args(["--cmdline", "virtio=5", "--memory", "size=256M", "--jail", "on"]);
    if !arguments.contains(&"--report") {
        command.args(["--report", "none"]);
    }
    command.args(arguments);
    command
}

impl Guest {
    /// A machine with devices, whose guest has found them.
    pub fn start(arguments: &[&str]) -> Self {
        Self::of(command(arguments))
    }

    pub fn of(command: Command) -> Self {
        Self::at(Stdio::piped(), command)
    }

    /// It gets its orders from `input`.
    pub fn at(input: Stdio, mut command: Command) -> Self {
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut machine = Running::new(&mut command);
        let input = machine.0.stdin.take();
        let output = BufReader::new(machine.0.stdout.take().unwrap());
        let mut stderr = BufReader::new(machine.0.stderr.take().unwrap());
        let said = Arc::<Mutex<String>>::default();
        let heard = said.clone();
        let listener = std::thread::spawn(move || {
            let mut line = String::new();
            while stderr.read_line(&mut line).is_ok_and(|length| length != 0) {
                heard.lock().unwrap().push_str(&std::mem::take(&mut line));
            }
        });
        let listener = Some(listener);
        let mut guest = Self { machine, input, output, said, listener };
        let line = guest.line();
        assert!(line.starts_with("ready: "), "{line}: {}", guest.said());
        guest
    }

    /// The guest's next line.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let length = self.output.read_line(&mut line).unwrap();
        assert_ne!(length, 0, "the guest's output ends: {}", self.said());
        line.trim_end().to_owned()
    }

    pub fn order(&mut self, order: &str) {
        writeln!(self.input.as_mut().unwrap(), "{order}").unwrap();
    }

    /// Orders something, and waits for the next line.
    pub fn ask(&mut self, order: &str) -> String {
        self.order(order);
        self.line()
    }

    /// What twostage has said so far.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// The identifiers of the machine's threads whose name starts with `name`.
    pub fn threads(&self, name: &str) -> Vec<(String, u32)> {
        self.machine.threads(name)
    }

    /// Waits for a line of twostage's.
    pub fn wait_for(&self, line: &str) {
        wait_until(line, || self.said().contains(line));
    }

    /// Ends the machine as its user does. Returns what it said.
    pub fn stop(&mut self) -> String {
        self.machine.signal("TERM");
        assert_eq!(self.machine.end().code(), Some(128 + 15), "{}", self.said());
        if let Some(listener) = self.listener.take() {
            listener.join().unwrap();
        }
        self.said()
    }

    /// The rest of the guest's output, after its end.
    pub fn rest(&mut self) -> String {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        rest
    }
}
