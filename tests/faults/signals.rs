// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals and limits of `twostage run`: none ends it silently, and none that was inherited as
//! ignored ends it at all.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::{NamedTempFile, TempDir};
use twostage::patience::wait_until;
use twostage_vmm::exit_code::{NO_INPUT, OS_ERROR};

use crate::child::{kernel, kvm, with_default_signals, Running, TWOSTAGE};
use crate::images::multiboot;
use crate::{code, run_after};

/// A guest that prints a line, and then idles.
fn idle() -> NamedTempFile {
    kernel(&multiboot(&[code::print("."), code::HALT.to_vec()].concat()))
}

/// Starts it, and waits until its guest runs.
fn started(command: &mut Command) -> Running {
    let mut machine = Running::new(command);
    machine.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    machine
}

fn said(machine: &mut Running) -> String {
    let mut said = String::new();
    machine.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    said
}

#[test]
fn what_the_parent_ignores_stays_ignored() {
    if !kvm() {
        return;
    }
    let image = idle();
    for name in ["HUP", "INT", "QUIT", "USR2"] {
        let mut machine = started(&mut run_after(&format!("trap '' {name}"), image.path(), &[]));
        machine.signal(name);
        machine.signal("TERM");
        assert_eq!(machine.end().code(), Some(143), "{name}");
        assert_eq!(said(&mut machine), "");
    }
}

#[test]
fn signals_of_limits_and_mistakes_end_the_machine_with_a_line() {
    if !kvm() {
        return;
    }
    let image = idle();
    for (name, code) in [("XCPU", 152), ("USR2", 140), ("ALRM", 142), ("PROF", 155), ("64", 192)] {
        let mut machine = started(&mut run_after("true", image.path(), &[]));
        machine.signal(name);
        assert_eq!(machine.end().code(), Some(code), "{name}");
        let line = said(&mut machine);
        let start = format!("twostage: error: signal {}", code - 128);
        assert!(line.starts_with(&start) && line.lines().count() == 1, "{line}");
    }
}

#[test]
fn a_file_that_may_not_grow_is_an_error_and_no_end() {
    if !kvm() {
        return;
    }
    let code = [code::flood(4), code::exit(5), code::HALT.to_vec()].concat();
    let (image, directory) = (kernel(&multiboot(&code)), TempDir::new().unwrap());
    let file = directory.path().join("serial");
    let serial = format!("file={}", file.display());
    let mut command = run_after("ulimit -f 8", image.path(), &["--serial", &serial]);
    let mut machine = Running::new(&mut command);
    assert_eq!(machine.end().code(), Some(5));
    let said = said(&mut machine);
    assert!(said.contains("dropped: File too large"), "{said}");
    assert!(std::fs::metadata(file).unwrap().len() <= 8 * 1024);
}

#[test]
fn a_report_that_is_asked_for_too_early_comes_when_there_is_one() {
    if !kvm() {
        return;
    }
    let (image, initramfs) = (idle(), NamedTempFile::new().unwrap());
    // Takes a while to load.
    initramfs.as_file().set_len(512 << 20).unwrap();
    let mut command = with_default_signals(TWOSTAGE);
    command.args(["run", "--memory", "size=1G", "--kernel"]).arg(image.path());
    command.arg("--initramfs").arg(initramfs.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut machine = Running::new(&mut command);
    wait_until("a start that is under way", || {
        let kib = machine.status_line("VmRSS");
        kib.trim_end_matches(" kB").parse().is_ok_and(|kib: u64| kib > 32 << 10)
    });
    machine.signal("USR1");
    let mut report = String::new();
    let mut lines = BufReader::new(machine.0.stderr.take().unwrap());
    while !report.contains("exits:") {
        assert_ne!(lines.read_line(&mut report).unwrap(), 0, "{report}");
    }
    machine.signal("TERM");
    assert_eq!(machine.end().code(), Some(143));
}

#[test]
fn a_report_that_cannot_be_written_is_said_whatever_the_end() {
    if !kvm() {
        return;
    }
    let lost = "twostage: error: --report: /dev/full: No space left on device (os error 28)\n";
    let report = ["--report", "json,file=/dev/full"];
    let seven = kernel(&multiboot(&[code::exit(7), code::HALT.to_vec()].concat()));
    let mut machine = Running::new(&mut run_after("true", seven.path(), &report));
    assert_eq!(machine.end().code(), Some(7));
    assert_eq!(said(&mut machine), lost);

    let image = idle();
    let mut machine = started(&mut run_after("true", image.path(), &report));
    machine.signal("USR1");
    let mut lines = BufReader::new(machine.0.stderr.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, lost);
    machine.signal("TERM");
    assert_eq!(machine.end().code(), Some(143));
}

#[test]
fn memory_that_the_system_refuses_is_no_mistake_of_the_command_line() {
    let image = idle();
    let more = ["--memory", "size=512M"];
    let mut command = run_after("ulimit -v 400000", image.path(), &more);
    let mut machine = Running::new(&mut command);
    let code = machine.end().code();
    let said = said(&mut machine);
    assert_eq!(code, Some(OS_ERROR.into()), "{said}");
    assert!(said.contains("--memory: cannot map 536870912 bytes"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_guest_that_resets_itself_at_once_starts_later_each_time() {
    if !kvm() {
        return;
    }
    let code = [code::out(0xcf9, 0x06), code::HALT.to_vec()].concat();
    let image = kernel(&multiboot(&code));
    let mut command = run_after("true", image.path(), &["--on-reset", "restart"]);
    let mut machine = Running::new(&mut command);
    let mut lines = BufReader::new(machine.0.stderr.take().unwrap()).lines();
    let mut waits = Vec::new();
    while waits.len() < 4 {
        let line = lines.next().unwrap().unwrap();
        let wait = line.rsplit(' ').nth(1).and_then(|wait| wait.parse::<u64>().ok());
        waits.push(wait.unwrap_or_else(|| panic!("{line}")));
    }
    // A life that takes long on a busy machine restarts the sequence.
    let follows = |pair: &[u64]| pair[1] == pair[0] * 2 || pair[1] == 125;
    assert!(waits[0] == 125 && waits.windows(2).all(follows), "{waits:?}");
    // It ends a wait, too.
    machine.signal("TERM");
    assert_eq!(machine.end().code(), Some(143));
}

#[test]
fn files_without_an_end_are_not_read_to_it() {
    let (image, endless) = (idle(), NamedTempFile::new().unwrap());
    endless.as_file().set_len(1 << 40).unwrap();
    let refused = |kernel: &Path, more: &[&str], hint: &str| {
        let mut machine = Running::new(&mut run_after("true", kernel, more));
        let status = machine.end();
        let said = said(&mut machine);
        assert_eq!(status.code(), Some(NO_INPUT.into()), "{more:?}: {said}");
        assert!(said.contains(hint) && said.lines().count() == 1, "{more:?}: {said}");
    };
    refused(endless.path(), &[], "neither a bzImage nor an ELF image");
    let path = endless.path().to_str().unwrap();
    let no_room = "1099511627776 bytes do not fit into guest memory";
    refused(image.path(), &["--initramfs", path], no_room);
    refused(image.path(), &["--module", &format!("path={path}")], no_room);
}
