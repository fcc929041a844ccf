// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtio devices in the middle of a request, and limits on a guest's log messages.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};
use tempfile::TempDir;
use twostage::patience::wait_until;

use super::child::{with_default_signals, Running, TWOSTAGE};
use super::{images, kvm, number, Value, LIMIT};

/// Size of the disk: no request of the guest's is longer.
const DISK: u64 = 4 << 30;
/// The guest's `virtio=` option.
const CHECKS: &str = "virtio=1";
const NEVER_DONE: &str = "virtio=2";
const FLOOD: &str = "virtio=3";
const RESET: &str = "virtio=4";

/// A machine with a disk of zeroes and more `arguments`, whose output goes to `directory`.
fn command(directory: &TempDir, cmdline: &str, arguments: &[&str]) -> Command {
    let mut command = with_default_signals("timeout");
    command.args([LIMIT, TWOSTAGE]);
    run(command, directory, cmdline, arguments)
}

/// The rest of `command`.
fn run(mut command: Command, directory: &TempDir, cmdline: &str, arguments: &[&str]) -> Command {
    let path = |name: &str| directory.path().join(name).display().to_string();
    File::create(path("disk")).unwrap().set_len(DISK).unwrap();
    command
        .args(["run", "--kernel"])
        .arg(images().join("vtd-check.elf"))
        .args(["--cmdline", cmdline]);
    command.args(["--memory", "size=256M", "--serial", &format!("file={}", path("serial"))]);
    command.args(["--disk", &format!("path={},iommu=off", path("disk"))]);
    command.args(["--report", &format!("json,file={}", path("report"))]);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn read(directory: &TempDir, name: &str) -> String {
    std::fs::read_to_string(directory.path().join(name)).unwrap_or_default()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_request_ends_with_bus_mastering_or_a_reset_and_a_refused_message_alone_is_left_out() {
    if !kvm() {
        return;
    }
    for iommu in [&[][..], &["--iommu", "vtd"]] {
        let directory = TempDir::new().unwrap();
        let output = command(&directory, CHECKS, iommu).output().unwrap();
        let serial = read(&directory, "serial");
        assert!(output.status.success(), "{}: {serial}\n{}", output.status, said(&output));
        assert!(serial.ends_with("3 passed, 0 failed, 0 skipped\n"), "{serial}");
        if !iommu.is_empty() {
            // KVM refuses such a message only beside APIC IDs of 32 bits.
            let report: Value = serde_json::from_str(&read(&directory, "report")).unwrap();
            assert!(number(&report, "/interrupts/routed") >= 100, "{report:#}");
            assert_eq!(said(&output).matches("which is left out").count(), 1, "{}", said(&output));
        }
    }
}

#[test]
fn what_a_guest_does_again_and_again_is_said_a_few_times() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let arguments = ["--iommu", "vtd", "--rng", "src=/dev/zero,iommu=off"];
    let start = Instant::now();
    let output = command(&directory, &format!("{FLOOD} times=500"), &arguments).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(read(&directory, "serial").lines().last(), Some("0 passed, 0 failed, 0 skipped"));
    // Two messages, ten times in five seconds each.
    let most = 2 * 10 * (start.elapsed().as_secs() as usize / 5 + 1);
    for line in ["notifications at", "is left out"] {
        assert!(said(&output).contains(line), "'{line}' is not said: {}", said(&output));
    }
    assert!(said(&output).lines().count() <= most, "{}", said(&output));
}

/// Two signals this far apart do not show what is served after the stop.
const AT_ONCE: Duration = Duration::from_millis(300);

/// Stops a machine whose devices are busy.
fn assert_stops(arguments: &[&str]) {
    // On a busy machine the two signals may arrive too far apart: try another machine then.
    wait_until("two signals at once", || stops(arguments));
}

/// Whether the test was conclusive and the machine stopped at once.
fn stops(arguments: &[&str]) -> bool {
    let directory = TempDir::new().unwrap();
    let mut command = run(with_default_signals(TWOSTAGE), &directory, NEVER_DONE, arguments);
    let mut child = Running(command.spawn().unwrap());
    wait_until("the guest's requests", || read(&directory, "serial").contains("busy"));
    let report = || serde_json::from_str::<Value>(&read(&directory, "report"));
    let served = |report: &Value| number(report, "/devices/0/queues/0/used");
    let asked = Instant::now();
    child.signal("USR1");
    let mut before = 0;
    wait_until("a report", || {
        report().is_ok_and(|report| {
            before = served(&report);
            true
        })
    });
    child.signal("TERM");
    let at_once = asked.elapsed() < AT_ONCE;
    // The guest's requests would take hours.
    let status = child.end();
    assert_eq!((status.code(), status.signal()), (Some(128 + 15), None), "{status}");
    // Each is 4 GB: one may have ended between the report and the signal.
    let after = served(&report().unwrap());
    assert!(
        !at_once || after <= before + 1,
        "{before} requests of 64 were served before the stop, {after} after"
    );
    at_once
}

#[test]
fn a_stop_does_not_wait_for_requests_or_for_the_host() {
    if !kvm() {
        return;
    }
    // A queue full of long requests.
    assert_stops(&[]);
    // And a source that never provides anything: a terminal whose other end is unused.
    assert!(Path::new("/dev/ptmx").exists());
    assert_stops(&["--rng", "src=/dev/ptmx"]);
}

#[test]
fn a_machine_starts_again_when_its_devices_are_through_with_the_host_and_not_before() {
    if !kvm() {
        return;
    }
    // A terminal gives nothing until somebody types.
    let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&user).unwrap();
    unlockpt(&user).unwrap();
    let source = format!("src={}", ptsname(&user, Vec::new()).unwrap().into_string().unwrap());
    let directory = TempDir::new().unwrap();
    let arguments = ["--rng", &source, "--on-reset", "restart"];
    let mut command = command(&directory, RESET, &arguments);
    command.stderr(File::create(directory.path().join("said")).unwrap());
    let mut child = Running(command.spawn().unwrap());
    let lives = || read(&directory, "serial").matches("busy").count();
    let waits = || read(&directory, "said").matches("the machine restarts when").count();
    for life in 1..=3 {
        // A life whose thread did not get to read the source ends without a wait.
        wait_until("a wait for the source", || waits() >= life);
        let before = lives();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(lives(), before, "{}", read(&directory, "said"));
        if life < 3 {
            rustix::io::write(&user, b"enough\n").unwrap();
        }
    }
    // A signal ends the wait, and the command.
    child.signal("TERM");
    assert_eq!(child.end().code(), Some(128 + 15), "{}", read(&directory, "said"));
}
