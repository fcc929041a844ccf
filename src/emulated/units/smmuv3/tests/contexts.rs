// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Context descriptors: where they are, which one a request uses, and how long it stays cached.

use super::*;
use twostage::spec::smmuv3::context::L1_DESCRIPTOR_SIZE;

const IOVA: u64 = 0x1234_5000;

/// A context descriptor with its own tables, which map [`IOVA`] to a page that holds `word`.
fn context(machine: &Machine, asid: u16, word: u64) -> Cd {
    let root = machine.table(0x1000);
    let granule = Granule::K4;
    let tables = Tables { machine, root, granule, input_bits: 39, upper: false };
    let page = HIGH + word * 0x1000;
    machine.poke(page, word);
    tables.map(IOVA, 3, page, RW);
    let cd = tables.cd();
    Cd { qw0: cd.qw0.with_asid(asid), ..cd }
}

#[test]
fn tables_of_context_descriptors_are_linear_or_of_two_levels() {
    for (format, leaf_bits) in
        [(S1Format::Linear, 12), (S1Format::TwoLevel4K, 6), (S1Format::TwoLevel64K, 10)]
    {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        let (low, high) = (context(&machine, 1, 1), context(&machine, 2, 2));
        let (number, s1cdmax) = (1500u64, 12);
        let place = |table: u64, index: u64| table + index * CD_SIZE;
        let leaf_size = CD_SIZE << leaf_bits;
        let table = if format == S1Format::Linear {
            let table = machine.table(leaf_size);
            machine.poke_cd(place(table, 3), &low);
            machine.poke_cd(place(table, number), &high);
            table
        } else {
            let table = machine.table(0x1000);
            let leaf = |index: u64, cd: &Cd| {
                let leaf = machine.table(leaf_size);
                let pointer = L1ContextDescriptor::new().with_v(true).with_l2ptr(leaf >> 12);
                let at = table + (index >> leaf_bits) * L1_DESCRIPTOR_SIZE;
                machine.poke(at, pointer.into_bits());
                machine.poke_cd(place(leaf, index % (1 << leaf_bits)), cd);
            };
            leaf(3, &low);
            leaf(number, &high);
            table
        };
        machine.install(None, VMID, Some(ste(table, s1cdmax, format, 0)));
        let mut port = machine.port();
        assert_eq!(machine.read(&mut port, pasid(3), IOVA), Ok(1), "{format:?}");
        assert_eq!(machine.read(&mut port, pasid(number as u32), IOVA), Ok(2), "{format:?}");
        let bad = |id| stage1_event(id);
        // Not valid; beyond S1CDMax; S1DSS.
        assert_eq!(machine.read(&mut port, pasid(4), IOVA), bad(EventId::BadCd), "{format:?}");
        let beyond = machine.read(&mut port, pasid(1 << 12), IOVA);
        assert_eq!(beyond, bad(EventId::BadSubstreamId), "{format:?}");
        let plain = machine.read(&mut port, PLAIN, IOVA);
        assert_eq!(plain, bad(EventId::StreamDisabled), "{format:?}");
        let missing = machine.read(&mut port, pasid(3000), IOVA);
        let expected = match format {
            S1Format::Linear => EventId::BadCd,
            _ => EventId::BadSubstreamId,
        };
        assert_eq!(missing, bad(expected), "{format:?}");
    }
}

#[test]
fn requests_without_pasid_go_by_s1dss() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let table = machine.table(0x1000);
    machine.poke_cd(table, &context(&machine, 1, 1));
    machine.poke(HIGH + 0x8000, 8);
    let mut port = machine.port();
    machine.install(None, VMID, Some(ste(table, 2, S1Format::Linear, 1)));
    assert_eq!(machine.read(&mut port, PLAIN, HIGH + 0x8000), Ok(8), "past stage 1");
    assert_eq!(machine.read(&mut port, PLAIN, NOWHERE), stage2_event(EventId::Translation));
    assert_eq!(machine.read(&mut port, PLAIN, 1 << 48), stage1_event(EventId::AddressSize));
    assert_eq!(machine.read(&mut port, pasid(0), IOVA), Ok(1));
    machine.install(None, VMID, Some(ste(table, 2, S1Format::Linear, 2)));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1), "substream 0");
    let disabled = stage1_event(EventId::StreamDisabled);
    assert_eq!(machine.read(&mut port, pasid(0), IOVA), disabled);
}

#[test]
fn a_context_descriptor_is_cached_until_a_command_names_it() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (one, two) = (context(&machine, 1, 1), context(&machine, 2, 2));
    let table = machine.table(0x1000);
    machine.install(None, VMID, Some(ste(table, 2, S1Format::Linear, 2)));
    let place = |number: u64| table + number * CD_SIZE;
    machine.poke_cd(place(0), &one);
    machine.poke_cd(place(3), &one);
    let mut port = machine.port();
    let context = |substream| Invalidation::Context { sid: SID, substream };
    for (attributes, number) in [(PLAIN, 0), (pasid(3), 3)] {
        assert_eq!(machine.read(&mut port, attributes, IOVA), Ok(1));
        machine.poke_cd(place(number), &two);
        for command in [context(1), Invalidation::Contexts { sid: SID + 1 }, ALL, va(IOVA, false)] {
            machine.invalidate(command);
            assert_eq!(machine.read(&mut port, attributes, IOVA), Ok(1), "{command:?}");
            let other = machine.read(&mut machine.port(), attributes, IOVA);
            assert_eq!(other, Ok(1), "of every thread");
        }
        machine.invalidate(context(number as u32));
        assert_eq!(machine.read(&mut port, attributes, IOVA), Ok(2));
        machine.poke_cd(place(number), &one);
        machine.invalidate(Invalidation::Contexts { sid: SID });
        assert_eq!(machine.read(&mut port, attributes, IOVA), Ok(1));
    }
    let counters = machine.unit.counters();
    assert!(counters.configuration_cache_hits > counters.configuration_cache_misses);
}

#[test]
fn a_stream_table_entry_may_be_illegal() {
    let machine = Machine::new(SmmuV3UnitConfig { two_level_cd: false, ..Default::default() });
    let table = machine.table(0x1000);
    let good = ste(table, 2, S1Format::Linear, 0);
    let stalls = [good[0], Ste1::new().with_s1stalld(true).into_bits()];
    for words in [
        ste(table, 17, S1Format::Linear, 0),
        ste(table, 2, S1Format::TwoLevel4K, 0),
        ste(1 << 48, 2, S1Format::Linear, 0),
        stalls,
    ] {
        machine.install(None, VMID, Some(words));
        let outcome = machine.read(&mut machine.port(), pasid(1), IOVA);
        assert_eq!(outcome, stage1_event(EventId::BadSte), "{words:x?}");
    }
    machine.install(None, VMID, Some(ste(table, 0, S1Format::TwoLevel4K, 0)));
    let outcome = machine.read(&mut machine.port(), PLAIN, IOVA);
    assert_eq!(outcome, stage1_event(EventId::BadCd), "the format of one descriptor is ignored");
}

#[test]
fn descriptors_are_read_through_stage_2() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    machine.install(None, VMID, Some(ste(NOWHERE, 0, S1Format::Linear, 0)));
    let sink = machine.sink();
    let outcome = machine.read(&mut machine.port(), PLAIN, IOVA);
    assert_eq!(outcome, stage2_event(EventId::Translation));
    let record = sink.take()[0];
    assert_eq!((record.qw1.class(), record.second_address), (0, NOWHERE), "CLASS is CD");
    machine.install(None, VMID, Some(ste(1 << 47, 2, S1Format::TwoLevel64K, 2)));
    let outcome = machine.read(&mut machine.port(), PLAIN, IOVA);
    assert_eq!(outcome, stage2_event(EventId::Translation));
}
