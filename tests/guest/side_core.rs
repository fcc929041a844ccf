// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The same guest with a side core that serves its invalidations.

use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use twostage::patience::wait_until;

use super::child::{with_default_signals, Running, TWOSTAGE};
use super::{
    assert_nested, assert_remapped, groups, images, kvm, number, Machine, Value, EITHER_OR,
    MACHINE, TWO_UNITS,
};

const SIDE_CORE: &str = "vtd,aw=57,pasid-bits=20,side-core=on";

#[test]
fn every_check_holds_with_a_side_core() {
    if !kvm() {
        return;
    }
    let outcome = Machine { iommus: &[SIDE_CORE], ..MACHINE }.run();
    let skipped = groups(&EITHER_OR);
    assert_eq!(outcome.skipped, &skipped | &groups(&["malformed_tables"]));
    assert!(outcome.passed > 160, "{} checks", outcome.passed);
    assert_nested(&outcome, 1, 2);
    assert_ne!(number(&outcome.report, "/side_core/tails_coalesced"), 0);
}

#[test]
fn every_check_holds_with_one_side_core_for_two_units() {
    if !kvm() {
        return;
    }
    let iommus =
        &["vtd,id=a,pasid-bits=20,side-core=auto", "vtd,id=b,pasid-bits=20,side-core=auto"];
    let outcome = Machine { iommus, ..TWO_UNITS }.run();
    assert!(outcome.passed > 2 * 160, "{} checks", outcome.passed);
    assert_nested(&outcome, 2, 2);
    assert_eq!(outcome.report["side_core"]["mode"], "auto");
}

/// Interrupts that move, those of MSI-X in KVM's table, are moved by the side core.
#[test]
fn every_check_holds_with_a_side_core_in_the_jail() {
    if !kvm() {
        return;
    }
    let outcome = Machine { iommus: &[SIDE_CORE], options: &["--jail", "on"], ..MACHINE }.run();
    assert_eq!(outcome.skipped, &groups(&EITHER_OR) | &groups(&["malformed_tables"]));
    assert_ne!(number(&outcome.report, "/side_core/tails_coalesced"), 0);
    assert_remapped(&outcome);
    assert!(number(&outcome.report, "/interrupts/route_updates") >= 3, "{:#}", outcome.report);
}

/// Counts, not times: exits of a guest that unmaps one page after the other.
#[test]
fn an_unmap_costs_no_exit_to_this_process() {
    const UNMAPS: u64 = 2000;
    if !kvm() {
        return;
    }
    let cmdline = &format!("unmaps={UNMAPS}");
    let writes = |iommu: &str| {
        let outcome = Machine { cmdline, iommus: &[iommu], ..MACHINE }.run();
        let exits = |kind: &str| number(&outcome.report, &format!("/exits/{kind}"));
        (exits("mmio-write"), exits("mmio-read"), outcome)
    };
    let (without, reads, _) = writes("vtd,aw=57,pasid-bits=20");
    assert!(without > UNMAPS && reads > 0, "{without} {reads}");
    let (with, reads, outcome) = writes(SIDE_CORE);
    // Reads exit while a page comes and goes, more of them on a busy machine.
    assert!(with < UNMAPS / 10 && reads < UNMAPS / 2, "{with} {reads}");
    let of = |counter: &str| number(&outcome.report, &format!("/side_core/{counter}"));
    assert!(of("tails_coalesced") + of("tails_in_memory") > UNMAPS / 10 * 9);
    if outcome.report["side_core"]["lends"] == true {
        assert_ne!(of("lent"), 0);
    }
}

/// Each run of unmaps is long enough for the page to be lent, and worth it: the side core goes on
/// lending it.
#[test]
fn what_memory_cannot_express_holds_with_pages_that_are_lent() {
    if !kvm() {
        return;
    }
    let (cmdline, rounds) = ("unmaps=900 loans=1", 12);
    let plain = Machine { cmdline, ..MACHINE }.run();
    let outcome = Machine { cmdline, iommus: &[SIDE_CORE], ..MACHINE }.run();
    assert_eq!((outcome.passed, &outcome.skipped), (plain.passed, &plain.skipped));
    if outcome.report["side_core"]["lends"] == true {
        let lent = number(&outcome.report, "/side_core/lent");
        assert!(lent >= rounds / 2, "lent {lent} times: {:#}", outcome.report["side_core"]);
    }
}

#[test]
fn a_processor_that_is_not_there_is_refused() {
    if !kvm() {
        return;
    }
    let mut command = Command::new(TWOSTAGE);
    command.args(["run", "--kernel"]).arg(images().join(MACHINE.image));
    command.args(["--iommu", "vtd,side-core=on,side-cpu=99999", "--serial", "null"]);
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{error}");
    assert!(error.contains("side-cpu=99999: this process may use"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

#[test]
fn one_processor_is_told_what_it_costs() {
    if !kvm() {
        return;
    }
    let polls = |choice: &str| {
        let mut command = Command::new("taskset");
        command.args(["-c", "0", TWOSTAGE, "run", "--kernel"]).arg(images().join(MACHINE.image));
        command.args(["--cmdline", "unmaps=100", "--memory", "size=256M", "--serial", "null"]);
        command.args(["--iommu", &format!("vtd,side-core={choice}"), "--device", "edu"]);
        let output = command.args(["--report", "json"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        let report: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
        let warned = text.contains("side-core=on, but this process has one processor");
        (warned, number(&report, "/side_core/polls") > 0)
    };
    assert_eq!((polls("on"), polls("auto")), ((true, true), (false, false)));
}

/// A guest that does nothing takes at most a hundredth of a processor, after it has been busy: of
/// all threads, by the clock of the kernel, so that a busy machine makes it no more.
#[test]
fn an_idle_guest_costs_nothing() {
    ["on", "auto"].into_iter().for_each(idles);
}

fn idles(choice: &str) {
    const SECONDS: u64 = 10;
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let serial = directory.path().join("serial");
    let mut command = with_default_signals(TWOSTAGE);
    command.args(["run", "--kernel"]).arg(images().join(MACHINE.image));
    command.args(["--cmdline", "unmaps=500 idle=1", "--memory", "size=256M"]);
    command.args(["--iommu", &format!("vtd,side-core={choice}"), "--device", "edu"]);
    command.args(["--report", "none"]);
    command.arg("--serial").arg(format!("file={}", serial.display()));
    let running = Running::new(&mut command);
    wait_until("the guest's unmaps", || {
        std::fs::read_to_string(&serial).is_ok_and(|text| text.contains(" unmaps, "))
    });
    // For a while it polls on.
    let busy = running.ticks();
    let mut before = busy;
    wait_until("the side core's rest", || {
        sleep(Duration::from_secs(1));
        let ticks = running.ticks();
        std::mem::replace(&mut before, ticks) == ticks
    });
    sleep(Duration::from_secs(SECONDS));
    let used = running.ticks() - before;
    assert!(used <= SECONDS, "{choice}: {used} ticks of 10 ms in {SECONDS} s; {busy} before");
}
