// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Taps that are switched off or removed: frames are lost, a line says so, and nobody is busy with
//! what is not there.

use std::fs;
use std::process::Command;
use std::time::Duration;

use twostage::skips::not_tested;

use crate::child::kvm;
use crate::guest::Guest;
use crate::world::alone;

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|status| status.success())
}

/// A tap `faulty0` of this test's.
fn tap() -> bool {
    let made = alone() && ip("tuntap add mode tap name faulty0") && ip("link set faulty0 up");
    if !made {
        not_tested("no tap interface is to be had");
    }
    made
}

/// Processor time of a thread, in nanoseconds.
fn time(guest: &Guest, thread: u32) -> u64 {
    let path = format!("/proc/{}/task/{thread}/schedstat", guest.machine.0.id());
    fs::read_to_string(path).unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_tap_that_is_removed_is_said_once_and_costs_nothing() {
    if !kvm() || !tap() {
        return;
    }
    let arguments = ["--net", "tap=faulty0", "--rng", "src=/dev/urandom"];
    let mut guest = Guest::start(&arguments);
    assert_eq!(guest.ask("n"), "n ok");
    assert!(ip("link del faulty0"));
    let line = "[WARN ] net: tap=faulty0: the interface is gone: the guest's frames are lost, and \
                it gets none, until the machine is started again\n";
    guest.wait_for(line);
    for _ in 0..100 {
        assert_eq!(guest.ask("n"), "n ok");
    }
    // All but the vCPU, whose guest polls.
    let mut threads = guest.threads("00:01.0 net");
    threads.extend(guest.threads("twostage"));
    assert_eq!(threads.len(), 2, "{threads:?}");
    let times = || threads.iter().map(|(_, thread)| time(&guest, *thread)).sum::<u64>();
    let before = times();
    std::thread::sleep(Duration::from_secs(1));
    let used = Duration::from_nanos(times() - before);
    assert!(used < Duration::from_millis(10), "{used:?} of a second");
    assert_eq!(guest.ask("g"), "g 4096");
    assert_eq!(guest.ask("s"), "s 15 15");
    assert_eq!(guest.stop(), line);
}

#[test]
fn a_tap_that_is_switched_off_loses_frames_until_it_is_on_again() {
    if !kvm() || !tap() {
        return;
    }
    let mut guest = Guest::start(&["--net", "tap=faulty0"]);
    assert!(ip("link set faulty0 down"));
    assert_eq!(guest.ask("n"), "n ok");
    let line =
        "[WARN ] net: tap=faulty0: a frame is lost: Input/output error (os error 5); is the \
                interface up?\n";
    guest.wait_for(line);
    assert!(ip("link set faulty0 up"));
    assert_eq!(guest.ask("n"), "n ok");
    assert_eq!(guest.stop(), line);
}

#[test]
fn a_tap_that_is_not_there_for_the_next_life_is_named() {
    if !kvm() || !tap() {
        return;
    }
    let mut guest = Guest::start(&["--net", "tap=faulty0", "--on-reset", "restart"]);
    assert!(ip("link del faulty0"));
    guest.order("z");
    assert_eq!(guest.machine.end().code(), Some(71), "{}", guest.said());
    guest.wait_for(
        "twostage: error: --net: tap=faulty0: no such interface; make it with: ip tuntap add mode \
         tap name faulty0\n",
    );
}
