// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Access flags and the dirty state in the guest's tables (HTTU, §3.13).

use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::context::Cd0;
use twostage::spec::smmuv3::event::EventId;
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::translation::{Descriptor, Granule};

use super::guest::{cfgi_cd, Completion};
use super::machine::Machine;
use crate::common::{A, PAGE};
use crate::conformance::{nested, IOVA, NAME};

/// GPA of the descriptor of the page at `iova`.
fn leaf(machine: &Machine, table: u64, iova: u64) -> u64 {
    let entry = |table: u64, level| table + Granule::K4.index(iova, level, 48) * 8;
    let below = |table, level| {
        Descriptor::from_bits(machine.guest.load(entry(table, level))).address_bits() * PAGE
    };
    entry((0..3).fold(table, below), 3)
}

#[test]
fn a_guest_finds_the_flags_that_its_context_descriptor_asks_for() {
    let (machine, table, page) = nested::<Machine>();
    let (guest, iova) = (&machine.guest, IOVA + PAGE);
    assert_eq!(guest.registers.capabilities().idr0.httu(), Httu::Dirty.into_bits());
    // Clean: read-only, but to be written.
    guest.map(table, iova, page, 3, false);
    let leaf = leaf(&machine, table, iova);
    let clean = Descriptor::from_bits(guest.load(leaf)).with_af(false).with_dbm(true);
    guest.store(leaf, clean.into_bits());

    // Without updates, software sets flags.
    machine.write(A, iova, 1).unwrap_err();
    assert_eq!(machine.event().id(), Some(EventId::Access));
    guest.store(leaf, clean.with_af(true).into_bits());
    machine.write(A, iova, 1).unwrap_err();
    assert_eq!(machine.event().id(), Some(EventId::Permission));

    guest.store(leaf, clean.into_bits());
    let cd = guest.context(table, NAME);
    let updating = Cd0::from_bits(guest.load(cd)).with_ha(true).with_hd(true);
    guest.store(cd, updating.into_bits());
    let flush = [cfgi_cd(A), Command::TlbiNhAsid { vmid: 0, asid: NAME }];
    assert_eq!(guest.submit(&flush), Completion::Done);
    machine.read(A, iova).unwrap();
    assert_eq!(guest.load(leaf), clean.with_af(true).into_bits());
    machine.write(A, iova, 7).unwrap();
    assert_eq!(guest.load(leaf), clean.with_af(true).with_ap_read_only(false).into_bits());
    assert_eq!(guest.load(page), 7);
    assert_eq!(machine.end(), 0);
}
