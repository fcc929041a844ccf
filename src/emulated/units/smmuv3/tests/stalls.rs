// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Transactions that would stall.

use super::*;
use crate::host::refusal::{refuse, Outcome as HostOutcome};
use crate::units::page_requests::{PageRequestSink, Waits};
use twostage::iommufd::{Errno, PageRequest};

/// What is attached has no fault queue, or no longer.
#[derive(Debug)]
struct Nobody;

impl PageRequestSink for Nobody {
    fn page_request(&self, _: PageRequest) -> HostOutcome<()> {
        refuse(Errno::EINVAL, "no HWPT of the device takes page requests")
    }
}

/// So does Linux end it. An event of it would be one that is terminated, which CD.S rules out.
#[test]
fn a_transaction_that_nobody_can_resume_ends_without_an_event() {
    let machine = Machine::new(SmmuV3UnitConfig::default().with_stalls(true));
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    let cd = tables.cd();
    machine.attach(&Cd { qw0: cd.qw0.with_s(true), ..cd });
    let events = machine.sink();
    for (waits, expected) in [(Waits::InStalls, 0), (Waits::ForPages, 1)] {
        machine.unit.stalled().unwrap().set_sink(SID, waits, Some(Arc::new(Nobody)));
        let faults = machine.unit.counters().faults;
        machine.read(&mut port, PLAIN, HIGH).unwrap_err();
        assert_eq!(events.take().len(), expected, "{waits:?}");
        assert_eq!(machine.unit.counters().faults, faults + 1);
    }
}
