// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Substreams (PASIDs): each goes where its own context descriptor says. The host has the guest's
//! table of descriptors, so nothing is attached for one: the guest attaches, replaces and detaches
//! it by a change of its descriptor and CMD_CFGI_CD (§3.3.2, §4.3.3).

use std::collections::BTreeMap;

use proptest::prelude::*;
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::event::EventId;
use twostage::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use twostage_emulated::{DmaAttributes, DmaError};

use super::guest::Completion;
use super::machine::Machine;
use crate::common::{A, B};
use crate::conformance::{Stack as _, IOVA};

/// Context descriptors of a page, as a power of two.
const BITS: u8 = 6;
/// Bytes of one.
const SIZE: u64 = 64;

/// A machine whose device [`A`] has a table of context descriptors, all of them invalid.
struct Rig {
    machine: Machine,
    contexts: u64,
}

impl Rig {
    fn new() -> Self {
        let machine = Machine::new();
        let contexts = machine.guest.page();
        let low = Ste0::new().with_v(true).with_config(StreamConfig::Stage1.into_bits());
        let low = low.with_s1contextptr(contexts >> 6).with_s1cdmax(BITS);
        // Requests without a substream use descriptor 0.
        let high = Ste1::new().with_s1dss(2).with_s1cir(1).with_s1cor(1).with_s1csh(3);
        machine.guest.set_raw_entry(A.into(), [low.into_bits(), high.with_shcfg(1).into_bits()]);
        machine.guest.enable();
        Self { machine, contexts }
    }

    /// New tables that map [`IOVA`] to a page with `word`.
    fn table(&self, word: u64) -> u64 {
        let guest = &self.machine.guest;
        let (table, page) = (guest.page(), guest.page());
        guest.store(page, word);
        guest.map(table, IOVA, page, 3, true);
        table
    }

    /// Writes the descriptor of `substream`: of these tables and ASID, or of nothing. Nobody is
    /// told.
    fn write(&self, substream: u32, tables: Option<(u64, u16)>) {
        let (guest, at) = (&self.machine.guest, self.contexts + u64::from(substream) * SIZE);
        match tables {
            Some((table, asid)) => guest.write_context(at, table, asid),
            None => guest.store(at, 0),
        }
    }

    fn submit(&self, commands: &[Command]) {
        assert_eq!(self.machine.guest.submit(commands), Completion::Done);
    }

    /// The same, and whoever has it forgets what was there, of `asid`.
    fn set(&self, substream: u32, tables: Option<(u64, u16)>, asid: u16) {
        self.write(substream, tables);
        self.submit(&[cfgi(substream), Command::TlbiNhAsid { vmid: 0, asid }]);
    }

    /// What the device reads at [`IOVA`].
    fn read(&self, substream: Option<u32>) -> Result<u64, DmaError> {
        let attributes = DmaAttributes { pasid: substream, ..DmaAttributes::default() };
        let mut bytes = [0; 8];
        self.machine.port(A).read(attributes, IOVA, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The last request of `substream` found no descriptor.
    fn expect_bad(&self, substream: u32) {
        let event = self.machine.event();
        assert_eq!((event.id(), event.stream()), (Some(EventId::BadCd), A.into()));
        assert_eq!(event.substream(), Pasid::new(substream));
    }
}

fn cfgi(substream: u32) -> Command {
    let substream = Pasid::new(substream).unwrap();
    Command::CfgiCd { stream: A.into(), substream, leaf: true }
}

#[test]
fn each_substream_is_attached_replaced_and_detached_by_itself() {
    let rig = Rig::new();
    let tables = [1, 2, 3, 4].map(|word| rig.table(word));
    let before = rig.machine.nesting.counters();
    // Attached: descriptor 0, which is that of requests without a substream, and two others.
    for (substream, asid) in [(0, 10), (5, 11), (6, 12)] {
        rig.set(substream, Some((tables[usize::from(asid) - 10], asid)), asid);
    }
    let read = || [None, Some(5), Some(6)].map(|substream| rig.read(substream).ok());
    assert_eq!(read(), [Some(1), Some(2), Some(3)]);
    rig.read(Some(7)).unwrap_err();
    rig.expect_bad(7);
    // Not even one with a descriptor reaches what another device may.
    rig.machine.port(B).read(DmaAttributes::default(), IOVA, &mut [0; 8]).unwrap_err();

    // Replaced: only what was invalidated is, and only for its own substream.
    rig.write(5, Some((tables[3], 13)));
    rig.submit(&[cfgi(6), Command::TlbiNhAsid { vmid: 0, asid: 11 }]);
    assert_eq!(read(), [Some(1), Some(2), Some(3)], "the descriptor is still cached");
    rig.submit(&[cfgi(5)]);
    assert_eq!(read(), [Some(1), Some(4), Some(3)]);

    // Detached.
    rig.write(6, None);
    assert_eq!(read(), [Some(1), Some(4), Some(3)], "nobody was told");
    rig.submit(&[cfgi(6), Command::TlbiNhAsid { vmid: 0, asid: 12 }]);
    assert_eq!(read(), [Some(1), Some(4), None]);
    rig.expect_bad(6);
    rig.set(0, None, 10);
    assert_eq!(read(), [None, Some(4), None]);

    // All of it in the host's own tables, to which the guest's commands went.
    let after = rig.machine.nesting.counters();
    let attached = |counters: &twostage::nesting::smmuv3::SmmuNestingCounters| {
        (counters.nested_allocs, counters.replaces)
    };
    assert_eq!(attached(&after), attached(&before));
    assert_eq!(rig.machine.end(), 0);
}

/// Of a stream whose entry goes, so do the substreams.
#[test]
fn substreams_end_with_their_stream() {
    let rig = Rig::new();
    rig.set(5, Some((rig.table(1), 11)), 11);
    assert_eq!(rig.read(Some(5)), Ok(1));
    rig.machine.guest.registers.remove_device(A);
    rig.read(Some(5)).unwrap_err();
    assert_eq!(rig.machine.end(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Attached, replaced and detached at random: what each reads is what is there by the last
    /// change that it was told of.
    #[test]
    fn what_a_substream_reads_is_of_its_own_tables(
        steps in prop::collection::vec((0u32..4, 0usize..4), 1..60)
    ) {
        let rig = Rig::new();
        let tables = [1, 2, 3].map(|word| rig.table(word));
        let mut on = BTreeMap::new();
        for (substream, table) in steps {
            // Each has an ASID of its own, which comes again with other tables.
            let asid = 10 + substream as u16;
            rig.set(substream, tables.get(table).map(|table| (*table, asid)), asid);
            on.insert(substream, tables.get(table).map(|_| table as u64 + 1));
            for substream in 0..4 {
                // Number 0 is that of requests without one.
                let with = (substream > 0).then_some(substream);
                let expected = on.get(&substream).copied().flatten();
                prop_assert_eq!(rig.read(with).ok(), expected, "substream {}", substream);
            }
        }
        prop_assert_eq!(rig.machine.end(), 0);
    }
}
