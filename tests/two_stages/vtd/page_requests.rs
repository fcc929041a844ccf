// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests: a device asks for a page that is not there, the guest brings it and responds, and
//! the device goes on (§7.4 to §7.6, §7.10).

use std::thread::{self, ScopedJoinHandle};

use super::machine::{pasid, vtd_config, Machine};
use crate::common::{A, B};
use twostage::patience::wait_for;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::page_request::{PageRequest, PageResponse};
use twostage::spec::vtd::regs::{self, Prs};
use twostage_emulated::kit::vtd::{Completion, Entry};
use twostage_emulated::kit::Mmio;
use twostage_emulated::{DmaError, VtdUnitConfig};

const PASID: u32 = 9;
const DOMAIN: u16 = 3;
const IOVA: u64 = 0x7f12_3456_7000;

/// A machine whose guest serves page requests of both devices; `PASID` of A is on the returned
/// table, which maps nothing.
fn machine() -> (Machine, u64) {
    let unit = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
    let machine =
        Machine::with(unit, vtd_config().with_device_iotlb(true).with_page_requests(true));
    let guest = &machine.guest;
    let table = guest.page();
    guest.set_entry(A, PASID, Entry::FirstStage { table, domain: DOMAIN });
    guest.set_entry(B, PASID, Entry::FirstStage { table, domain: DOMAIN });
    guest.set_page_requests(A, true);
    guest.set_page_requests(B, true);
    guest.start_page_queue();
    guest.enable();
    (machine, table)
}

type Reading<'a> = ScopedJoinHandle<'a, Result<u64, DmaError>>;

/// Has `rid` read at `iova` with PASID while `guest` serves it; returns what it has read.
fn while_reading(
    machine: &Machine,
    rid: Bdf,
    iova: u64,
    guest: impl FnOnce(&Reading<'_>),
) -> Result<u64, DmaError> {
    thread::scope(|scope| {
        let dma = scope.spawn(|| machine.read(rid, Some(PASID), iova));
        guest(&dma);
        dma.join().unwrap()
    })
}

/// Waits for a request in the queue.
fn asked(machine: &Machine) -> PageRequest {
    wait_for("a page request", || machine.guest.take_page_request())
}

#[test]
fn a_device_asks_for_a_page_and_reads_what_the_guest_brings() {
    let (machine, table) = machine();
    let guest = &machine.guest;
    let event = (0xfee0_2000, 0x55);
    guest.registers.write32(regs::PEDATA, event.1);
    guest.registers.write32(regs::PEADDR, event.0 as u32);
    guest.registers.write32(regs::PECTL, 0);
    let page = guest.page();
    guest.store(page + 8, 0x1234);
    let read = while_reading(&machine, A, IOVA + 8, |dma| {
        let request = asked(&machine);
        let group = request.group;
        assert_eq!(
            request,
            PageRequest {
                rid: A,
                pasid: Some(pasid(PASID)),
                group,
                last: true,
                address: IOVA,
                read: true,
                write: false,
                execute: false,
                privileged: false,
            }
        );
        assert_eq!(machine.interrupts.take(), [event]);
        assert_eq!(guest.registers.read32(regs::PRS), Prs::new().with_ppr(true).into_bits());
        guest.registers.write32(regs::PRS, Prs::new().with_ppr(true).into_bits());
        assert_eq!(guest.registers.read32(regs::PRS), 0);
        // Nobody asked for these: another device, another PASID, another group.
        for other in [
            PageRequest { rid: B, ..request },
            PageRequest { pasid: None, ..request },
            PageRequest { pasid: Some(pasid(PASID + 1)), ..request },
            PageRequest { group: group + 1, ..request },
        ] {
            let none = guest.respond(&other, PageResponse::InvalidRequest);
            assert_eq!(none, Completion::Done);
        }
        guest.map(table, IOVA, page, 1, true);
        assert!(!dma.is_finished(), "it waits");
        assert_eq!(guest.respond(&request, PageResponse::Success), Completion::Done);
    });
    assert_eq!(read, Ok(0x1234));
    assert_eq!(machine.read(A, Some(PASID), IOVA), Ok(0));
    let counters = machine.iommu.counters();
    assert_eq!((counters.page_requests, counters.page_requests_refused), (1, 0));
    assert_eq!(guest.take_fault(), None);
    assert_eq!(machine.end(), 0);
}

#[test]
fn an_access_fails_if_the_guest_has_no_page_for_it() {
    for response in [PageResponse::InvalidRequest, PageResponse::Failure] {
        let (machine, _) = machine();
        let read = while_reading(&machine, A, IOVA, |_| {
            let request = asked(&machine);
            assert_eq!(machine.guest.respond(&request, response), Completion::Done);
        });
        assert!(read.is_err());
        // The device knows, and nothing else is a fault of the IOMMU's.
        assert_eq!(machine.guest.take_fault(), None);
        assert_eq!(machine.end(), 0);
    }
}
