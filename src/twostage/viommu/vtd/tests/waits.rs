// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Wait descriptors.

use super::*;
use crate::spec::vtd::regs::{Fsts, IqErrorInfo, Iqercd};

#[test]
fn a_wait_can_interrupt() {
    let guest = Guest::running();
    guest.write32(regs::IEDATA, 0x42);
    guest.write64(regs::IEADDR, 0x1_fee0_1000);
    let interrupting =
        Descriptor::Wait { status: None, interrupt: true, fence: true, drain_page_requests: false };
    guest.submit(&[interrupting]);
    // Masked after reset: pending.
    assert_eq!(guest.messages(), []);
    assert_eq!((guest.read32(regs::ICS), guest.read32(regs::IECTL)), (1, 3 << 30));
    guest.write32(regs::IECTL, 0);
    assert_eq!(guest.messages(), [(0x1_fee0_1000, 0x42)]);
    assert_eq!(guest.read32(regs::IECTL), 0);
    // IWC is still set: no new event.
    guest.submit(&[interrupting]);
    assert_eq!(guest.messages(), []);
    guest.write32(regs::ICS, 1);
    assert_eq!(guest.read32(regs::ICS), 0);
    guest.submit(&[interrupting]);
    assert_eq!(guest.messages().len(), 1);
}

#[test]
fn a_status_address_that_is_no_memory_is_no_hang() {
    let guest = Guest::running();
    let status = crate::spec::vtd::qi::StatusWrite { address: !3, data: 1 };
    let lost = Descriptor::Wait {
        status: Some(status),
        interrupt: false,
        fence: false,
        drain_page_requests: false,
    };
    guest.submit(&[lost, wait(2)]);
    assert_eq!((guest.status(), guest.read64(regs::IQH)), (2, 64));
    assert_eq!(guest.iommu.counters().guest_errors, 1);
}

/// Linux sets PD when it recovers from an error of the queue.
#[test]
fn a_wait_may_ask_to_drain_page_requests_of_which_there_are_none() {
    let drain = Descriptor::Wait {
        status: Some(crate::spec::vtd::qi::StatusWrite { address: STATUS, data: 7 }),
        interrupt: false,
        fence: true,
        drain_page_requests: true,
    };
    let guest = Guest::running();
    assert_eq!(guest.read64(regs::ECAP) >> 42 & 1, 1, "ECAP.PDS");
    guest.submit(&[drain]);
    assert_eq!((guest.status(), guest.read64(regs::IQH)), (7, 32));
    // If not offered, the bit is reserved.
    let legacy =
        VtdConfig { scalable_mode: false, second_stage: true, pasid_bits: 0, ..Default::default() };
    let guest = Guest::new(legacy);
    assert_eq!(guest.read64(regs::ECAP) >> 42 & 1, 0, "ECAP.PDS");
    guest.enable_queue(0);
    guest.write(QUEUE, &drain.encode()[..2]);
    guest.write64(regs::IQT, 16);
    assert!(Fsts::from_bits(guest.read32(regs::FSTS)).iqe());
    let code = Iqercd::from_bits(guest.read64(regs::IQERCD)).iqei();
    assert_eq!(IqErrorInfo::from_code(code), Some(IqErrorInfo::ReservedField));
    assert_eq!(guest.status(), 0);
}
