// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks that hang: everything else of the machine goes on, the guest hears of a request when the
//! disk has answered and not before, and a stop ends in bounded time and says what it waits for.

use std::fs;

use tempfile::{NamedTempFile, TempDir};
use twostage::patience::wait_until;

use crate::child::kvm;
use crate::fuse::FaultyDisk;
use crate::guest::{command, Guest};
use crate::world::{alone, IN_MEMORY};

/// A machine with `disk`, one in memory, entropy, and a report at `report`.
fn machine(disk: &FaultyDisk, memory: &NamedTempFile, report: &str, more: &[&str]) -> Guest {
    memory.as_file().set_len(1 << 20).unwrap();
    let other = format!("path={}", memory.path().display());
    let (disk, report) = (disk.option(), format!("json,file={report}"));
    let devices = ["--disk", &disk, "--disk", &other, "--rng", "src=/dev/urandom"];
    let others = ["--iommu", "vtd", "--report", &report];
    Guest::of(command(&[&devices[..], &others, more].concat()))
}

/// The others do what they are asked for.
fn others_go_on(guest: &mut Guest, report: &str) {
    for n in 1..4 {
        assert_eq!(guest.ask("p on"), "p on");
        assert_eq!(guest.ask(&format!("w 1 {n} 8 {n}")), format!("w 1 {n} ok"));
        assert_eq!(guest.ask(&format!("r 1 {n} 8")), format!("r 1 {n} ok {n}"));
        assert_eq!(guest.ask("g"), "g 4096");
    }
    let file = fs::OpenOptions::new().write(true).open(report).unwrap();
    file.set_len(0).unwrap();
    guest.machine.signal("USR1");
    wait_until("a report", || fs::read(report).unwrap().ends_with(b"}\n"));
}

#[test]
fn what_hangs_is_heard_of_later_and_the_rest_goes_on() {
    if !kvm() || !alone() {
        return;
    }
    for direct in [false, true] {
        let folder = TempDir::new().unwrap();
        let report = folder.path().join("report").display().to_string();
        let (disk, memory) = (FaultyDisk::new(direct), NamedTempFile::new_in(IN_MEMORY).unwrap());
        let mut guest = machine(&disk, &memory, &report, &["--on-reset", "restart"]);
        for life in 0..2 {
            disk.hold();
            for n in 0..8 {
                guest.order(&format!("w 0 {} 8 5", 8 * n));
            }
            assert_eq!(guest.ask("p begun"), "p begun");
            disk.wait_for_held(1);
            others_go_on(&mut guest, &report);
            disk.let_go();
            let mut answers: Vec<_> = (0..8).map(|_| guest.line()).collect();
            answers.sort_by_key(|line| (line.len(), line.clone()));
            let expected: Vec<_> = (0..8).map(|n| format!("w 0 {} ok", 8 * n)).collect();
            assert_eq!(answers, expected);
            // A flush is one when the disk has said so.
            disk.hold();
            guest.order("f 0");
            disk.wait_for_held(1);
            others_go_on(&mut guest, &report);
            disk.let_go();
            assert_eq!(guest.line(), "f 0 0 ok");
            if life == 0 {
                assert_eq!(guest.ask("z"), "ready: 2 disks");
            }
        }
        guest.stop();
    }
}

fn left_behind(disk: &FaultyDisk) -> String {
    format!(
        "[WARN ] 00:01.0 blk: {} has not answered yet: the device's thread is left behind, and the \
         kernel may keep this process until it does\n",
        disk.path().display()
    )
}

#[test]
fn a_stop_does_not_wait_for_a_read_that_hangs() {
    if !kvm() || !alone() {
        return;
    }
    for lives in 1..=2 {
        let disk = FaultyDisk::new(false);
        let mut guest = Guest::start(&["--disk", &disk.option(), "--on-reset", "restart"]);
        if lives == 2 {
            assert_eq!(guest.ask("z"), "ready: 1 disks");
        }
        disk.hold();
        // Not what was read with the first bytes of the image.
        guest.order("r 0 1024 8");
        disk.wait_for_held(1);
        let said = guest.stop();
        assert!(said.contains(&left_behind(&disk)), "{said}");
    }
}

/// Whether the main thread of the machine has ended, whatever the kernel still waits for.
fn has_ended(guest: &Guest) -> bool {
    guest.machine.status_line("State").starts_with(['Z', 'X'])
}

#[test]
fn a_stop_says_which_disk_keeps_the_process_that_it_ends() {
    if !kvm() || !alone() {
        return;
    }
    for (order, lives) in [("f 0", 1), ("f 0", 2), ("w 0 0 8 5", 1), ("w 0 0 8 5", 2)] {
        let disk = FaultyDisk::new(true);
        let more = ["--disk", &disk.option(), "--on-reset", "restart"];
        let mut guest = Guest::start(&more);
        if lives == 2 {
            assert_eq!(guest.ask("z"), "ready: 1 disks");
        }
        disk.hold();
        guest.order(order);
        disk.wait_for_held(1);
        guest.machine.signal("TERM");
        guest.wait_for(&left_behind(&disk));
        wait_until("the end of the main thread", || has_ended(&guest));
        disk.let_go();
        assert_eq!(guest.machine.end().code(), Some(128 + 15), "{}", guest.said());
    }
}

#[test]
fn a_machine_with_a_disk_that_hangs_does_not_start_again_until_it_answers() {
    if !kvm() || !alone() {
        return;
    }
    let disk = FaultyDisk::new(true);
    let mut guest = Guest::start(&["--disk", &disk.option(), "--on-reset", "restart"]);
    disk.hold();
    guest.order("w 0 0 8 5");
    disk.wait_for_held(1);
    guest.order("z");
    guest.wait_for("device threads are waiting for the host: the machine restarts when they end");
    assert!(guest.said().contains(&left_behind(&disk)), "{}", guest.said());
    disk.let_go();
    assert_eq!(guest.line(), "ready: 1 disks");
    assert_eq!(guest.ask("r 0 0 8"), "r 0 0 ok 5");
    guest.stop();
}
