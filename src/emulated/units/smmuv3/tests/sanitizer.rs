// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the sanitizer reports, and what it ignores.

use super::*;
use crate::{
    ContextInvalidation, DmaWay, InvalidatedPages, StaleContext, StaleUse, TlbInvalidation,
};
use twostage::spec::pci::Bdf;

const IOVA: u64 = 0x12_3440_0000;
const OLD: u64 = HIGH;
const NEW: u64 = HIGH + (4 << 20);

/// A machine with the sanitizer, with different words in two places.
fn machine() -> Machine {
    let machine = Machine::new(SmmuV3UnitConfig { sanitize: true, ..Default::default() });
    machine.poke(OLD, 1);
    machine.poke(NEW, 2);
    machine
}

/// Tables that map [`IOVA`] to `place`, others that map it to [`NEW`], and the address of the
/// device's context descriptor, which names the former.
fn two_contexts(machine: &Machine, place: u64) -> (Tables<'_>, Tables<'_>, u64) {
    let (old, new) = (machine.tables(Granule::K4), machine.tables(Granule::K4));
    old.map(IOVA, 3, place, RW);
    new.map(IOVA, 3, NEW, RW);
    let cd = machine.attach(&old.cd());
    (old, new, cd)
}

fn found(machine: &Machine) -> (Vec<StaleContext>, Vec<StaleUse>) {
    let SanitizerReport { contexts, stale, others } = machine.unit.sanitizer_report().unwrap();
    assert_eq!(others, 0);
    let uses: u64 = stale.iter().map(|found| found.uses).sum();
    let context_uses: u64 = contexts.iter().map(|found| found.uses).sum();
    assert_eq!(machine.unit.counters().stale_uses, uses + context_uses);
    (contexts, stale)
}

#[test]
fn a_forgotten_tlbi_is_caught_and_named() {
    for (granule, level) in
        [(Granule::K4, 3), (Granule::K16, 3), (Granule::K64, 3), (Granule::K4, 2)]
    {
        let machine = machine();
        let (tables, mut port) = (machine.tables(granule), machine.port());
        let leaf = tables.map(IOVA, level, OLD, RW);
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
        let size = granule.level_size(level);
        machine.invalidate(va(IOVA + size, true));
        // Of another guest, and of another address space.
        machine.invalidate(Invalidation::All { tag: CacheTag(9) });
        machine.invalidate(Invalidation::Asid { tag: VMID, asid: ASID + 1 });
        let old = machine.peek(leaf);
        tables.map(IOVA, level, NEW, RW);
        assert_eq!(found(&machine), (vec![], vec![]));
        // Still what was cached: the sanitizer does not change what a device sees.
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
        machine.write(&mut port, PLAIN, IOVA + 8, 3).unwrap();
        let pages = |address, pages| InvalidatedPages::Range { address, pages, leaf: true };
        let stale = StaleUse {
            rid: Bdf::from_raw(SID),
            pasid: None,
            iova: IOVA,
            write: false,
            second_stage: None,
            level: 4 - level,
            old: Some(old),
            new: Some(machine.peek(leaf)),
            invalidation: TlbInvalidation::SmmuV3TlbiNhVa { asid: ASID },
            needed: pages(IOVA, size >> 12),
            last: Some(pages(IOVA + size, 1)),
            uses: 2,
            invalidated_since: false,
        };
        assert_eq!(found(&machine), (vec![], vec![stale]), "{granule:?}");
        machine.invalidate(va(IOVA, true));
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(2));
        let since = StaleUse { invalidated_since: true, ..stale };
        assert_eq!(found(&machine), (vec![], vec![since]));
    }
}

#[test]
fn a_forgotten_cfgi_is_caught_and_named() {
    let machine = machine();
    let (old, new, cd) = two_contexts(&machine, OLD);
    let mut port = machine.port();
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    machine.poke_cd(cd, &new.cd());
    // Only the required command helps.
    machine.invalidate(ALL);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    let way = |root| DmaWay::AddressSpace { asid: ASID, tables: [Some(root), None] };
    let stale = StaleContext {
        rid: Bdf::from_raw(SID),
        pasid: None,
        old: way(old.root),
        new: way(new.root),
        needed: ContextInvalidation::SmmuV3CfgiCd { substream: 0 },
        uses: 1,
        invalidated_since: false,
    };
    assert_eq!(found(&machine), (vec![stale], vec![]));
    assert_eq!(
        stale.to_string(),
        format!(
            "00:03.0, DMA went through the tables of ASID 0x7, TTB0 {:#x}, and by context \
             descriptors goes through the tables of ASID 0x7, TTB0 {:#x} now; needed: CMD_CFGI_CD \
             with SubstreamID 0x0, then CMD_TLBI_NH_ASID with the old ASID",
            old.root, new.root
        )
    );
    machine.poke_cd(cd, &Cd::default());
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    machine.invalidate(Invalidation::Context { sid: SID, substream: 1 });
    let twice = StaleContext { uses: 2, ..stale };
    assert_eq!(found(&machine), (vec![twice], vec![]));
    machine.invalidate(Invalidation::Context { sid: SID, substream: 0 });
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), stage1_event(EventId::BadCd));
    let since = StaleContext { invalidated_since: true, ..twice };
    assert_eq!(found(&machine), (vec![since], vec![]));
}

#[test]
fn a_message_that_goes_by_a_stale_context_is_caught() {
    let config = SmmuV3UnitConfig {
        sanitize: true,
        msi_doorbell: Some(NOWHERE..=NOWHERE + 0xfff),
        ..Default::default()
    };
    let machine = Machine::new(config);
    let (_, new, cd) = two_contexts(&machine, NOWHERE);
    let mut port = machine.port();
    let mut send = || {
        let mut delivered = None;
        port.write_message(PLAIN, IOVA, 7, |address| delivered = Some(address)).unwrap();
        delivered
    };
    assert_eq!(send(), Some(NOWHERE));
    assert_eq!(found(&machine), (vec![], vec![]));
    machine.poke_cd(cd, &new.cd());
    assert_eq!(send(), Some(NOWHERE));
    let (contexts, stale) = found(&machine);
    assert_eq!((contexts.len(), stale.len()), (1, 0));
    machine.invalidate(Invalidation::Context { sid: SID, substream: 0 });
    assert_eq!((send(), machine.peek(NEW) as u32), (None, 7), "it is a write to memory");
    assert!(found(&machine).0[0].invalidated_since);
}

#[test]
fn a_context_that_is_invalidated_leaves_its_translations_behind() {
    let machine = machine();
    let (_, new, cd) = two_contexts(&machine, OLD);
    let mut port = machine.port();
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    machine.poke_cd(cd, &new.cd());
    machine.invalidate(Invalidation::Contexts { sid: SID });
    // The same ASID, and no CMD_TLBI.
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    let (contexts, stale) = found(&machine);
    assert_eq!((contexts.len(), stale.len()), (0, 1));
    let text = stale[0].to_string();
    assert!(text.contains("needed: CMD_TLBI_NH_VA with ASID 0x7 of "), "{text}");
    assert!(text.ends_with("last seen: none"), "{text}");
}

#[test]
fn a_guest_in_order_has_no_finding() {
    for granule in Granule::ALL {
        let machine = machine();
        let (tables, mut port) = (machine.tables(granule), machine.port());
        let mut leaf = tables.map(IOVA, 3, OLD, RW);
        for (place, value) in [(NEW, 2), (OLD, 1), (NEW, 2)] {
            machine.read(&mut port, PLAIN, IOVA).unwrap();
            machine.poke(leaf, 0);
            machine.invalidate(va(IOVA, true));
            assert_eq!(
                machine.read(&mut port, PLAIN, IOVA),
                stage1_event(EventId::Translation),
                "{granule:?}"
            );
            // What was absent needs no command.
            leaf = tables.map(IOVA, 3, place, RW);
            assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(value));
        }
        // Other tables for another ASID, in a new context descriptor.
        let other = machine.tables(granule);
        other.map(IOVA, 3, OLD, RW);
        let cd = machine.attach(&other.cd());
        let next = Cd { qw0: other.cd().qw0.with_asid(ASID + 1), ..other.cd() };
        machine.poke_cd(cd, &next);
        machine.invalidate(Invalidation::Context { sid: SID, substream: 0 });
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
        assert_eq!(found(&machine), (vec![], vec![]), "{granule:?}");
    }
}

#[test]
fn what_allows_more_is_no_finding_and_what_allows_less_is_one() {
    let machine = machine();
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    let read_only = RW.with_ap_read_only(true);
    tables.map(IOVA, 3, OLD, read_only);
    machine.read(&mut port, PLAIN, IOVA).unwrap();
    for leaf in [RW, RW.with_ng(true), read_only] {
        tables.map(IOVA, 3, OLD, leaf);
        machine.read(&mut port, PLAIN, IOVA).unwrap();
    }
    machine.invalidate(ALL);
    tables.map(IOVA, 3, OLD, RW);
    machine.write(&mut port, PLAIN, IOVA, 5).unwrap();
    tables.map(IOVA, 3, OLD, read_only);
    machine.read(&mut port, PLAIN, IOVA).unwrap();
    assert_eq!(found(&machine), (vec![], vec![]));
    machine.write(&mut port, PLAIN, IOVA, 5).unwrap();
    let (_, stale) = found(&machine);
    assert!(stale.len() == 1 && stale[0].write && stale[0].uses == 1);
}

#[test]
fn a_stale_global_page_is_known_whoever_walked() {
    let machine = machine();
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    let leaf = tables.map(IOVA, 3, OLD, RW.with_ng(false));
    let old = machine.peek(leaf);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    // Another address space, with the same tables.
    machine.attach(&Cd { qw0: tables.cd().qw0.with_asid(ASID + 1), ..tables.cd() });
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    assert_eq!(found(&machine), (vec![], vec![]));
    tables.map(IOVA, 3, NEW, RW.with_ng(false));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    let (contexts, stale) = found(&machine);
    assert_eq!((contexts.len(), stale.len()), (0, 1));
    assert_eq!((stale[0].old, stale[0].new), (Some(old), Some(machine.peek(leaf))));
    // By ASID global pages stay; by address any ASID works.
    machine.invalidate(Invalidation::Asid { tag: VMID, asid: ASID + 1 });
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    assert!(!found(&machine).1[0].invalidated_since);
    let range = AddressRange { leaf: true, ..AddressRange::at(IOVA) };
    machine.invalidate(Invalidation::Va { tag: VMID, asid: ASID + 5, range });
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(2));
    assert!(found(&machine).1[0].invalidated_since);
}

#[test]
fn a_changed_pointer_is_not_invalidated_by_leaf_alone() {
    let machine = machine();
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    let other = machine.tables(Granule::K4);
    tables.map(IOVA, 3, OLD, RW);
    other.map(IOVA, 3, NEW, RW);
    machine.attach(&tables.cd());
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    machine.poke(tables.entry(IOVA, 2), machine.peek(other.entry(IOVA, 2)));
    for leaf in [true, false] {
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
        let (_, stale) = found(&machine);
        assert_eq!((stale.len(), stale[0].level, stale[0].invalidated_since), (1, 2, false));
        machine.invalidate(va(IOVA, leaf));
    }
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(2));
    assert!(found(&machine).1[0].invalidated_since);
}

#[test]
fn a_unit_that_does_not_sanitize_says_so() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    assert_eq!(machine.unit.sanitizer_report(), None);
}
