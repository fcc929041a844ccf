// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device TLBs (ATS): a device follows the guest's invalidations, and a wait is answered only after
//! the device has answered those of its TLB (§6.5.2.5, §6.5.2.6).

use super::machine::{pasid, vtd_config, Machine};
use super::pasid_pages;
use crate::common::A;
use twostage::spec::vtd::qi::{AddressMask, Descriptor, DeviceTlbRange};
use twostage::spec::vtd::regs::{self, Fsts, Iqercd};
use twostage_emulated::kit::vtd::{Completion, Entry};
use twostage_emulated::kit::Mmio;
use twostage_emulated::VtdUnitConfig;

const PASID: u32 = 9;
const DOMAIN: u16 = 3;
const IOVA: u64 = 0x7f12_3456_7000;
const RANGE: DeviceTlbRange = DeviceTlbRange { address: IOVA, size: false };

/// A machine whose device A has a TLB, of which the guest knows or not (DTE); `IOVA` of its
/// requests with [`PASID`] maps to a page that starts with 1. The table.
fn machine(known: bool) -> (Machine, u64) {
    let unit = VtdUnitConfig::default().with_device_tlb(true).with_sanitize(true);
    let machine = Machine::with(unit, vtd_config().with_device_iotlb(true));
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.store(page, 1);
    guest.map(table, IOVA, page, 1, true);
    guest.set_entry(A, PASID, Entry::FirstStage { table, domain: DOMAIN });
    guest.set_device_tlb(A, known);
    guest.enable();
    machine.port(A).control().set_device_tlb(true);
    assert_eq!(machine.read(A, Some(PASID), IOVA), Ok(1));
    (machine, table)
}

fn of_device(pasid_value: Option<u32>) -> Descriptor {
    let (source, physical_function, max_pending, range) = (A, 0, 0, RANGE);
    match pasid_value {
        None => Descriptor::DeviceTlb { source, physical_function, max_pending, range },
        Some(value) => Descriptor::PasidDeviceTlb {
            source,
            pasid: pasid(value),
            global: false,
            physical_function,
            max_pending,
            range,
        },
    }
}

#[test]
fn a_device_uses_what_it_has_until_the_guest_has_invalidated_it() {
    let page_of = AddressMask { address: IOVA, mask: 0, leaf: true };
    let of_iotlb = pasid_pages(DOMAIN, PASID, Some(page_of));
    let hits = |machine: &Machine| machine.unit.counters().device_tlb_hits;
    // The host is not told of DTE, so the device has a TLB whatever the guest says, and gets what
    // is sent to it; a guest that does not know of it needs to send nothing.
    let known = [of_device(Some(PASID)), of_device(None)].map(|last| (true, last));
    let unknown = [of_device(Some(PASID)), of_iotlb].map(|last| (false, last));
    for (known, last) in known.into_iter().chain(unknown) {
        let (machine, table) = machine(known);
        let guest = &machine.guest;
        let page = guest.page();
        guest.store(page, 2);
        guest.map(table, IOVA, page, 1, true);
        // The device alone asks the IOTLB again, which has the old one.
        for told in [None, Some(of_device(Some(PASID + 1))), Some(of_device(Some(PASID)))] {
            told.iter().for_each(|told| assert_eq!(guest.submit(&[*told]), Completion::Done));
            assert_eq!(machine.read(A, Some(PASID), IOVA), Ok(1), "{told:?}");
        }
        assert_eq!(hits(&machine), 2);
        assert_eq!(guest.submit(&[of_iotlb, last]), Completion::Done);
        assert_eq!(machine.read(A, Some(PASID), IOVA), Ok(2));
        assert_eq!(machine.read(A, Some(PASID), IOVA), Ok(2));
        assert_eq!(hits(&machine), 3);
        assert_eq!(machine.end(), 0);
    }
}

#[test]
fn a_wait_behind_a_device_that_does_not_answer_is_aborted() {
    let (machine, _) = machine(false);
    let guest = &machine.guest;
    machine.port(A).control().set_silent(true);
    for pasid in [None, Some(PASID)] {
        let stopped = Completion::Stopped(Fsts::new().with_ite(true));
        assert_eq!(guest.submit(&[of_device(pasid)]), stopped);
        let error = Iqercd::from_bits(guest.registers.read64(regs::IQERCD));
        assert_eq!(error.itesid(), A.raw());
        guest.registers.write32(regs::FSTS, Fsts::new().with_ite(true).into_bits());
    }
    machine.port(A).control().set_silent(false);
    assert_eq!(guest.submit(&[of_device(None)]), Completion::Done);
    assert_eq!(machine.end(), 0);
}
