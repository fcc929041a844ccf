// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The unit against a walker as plain as the architecture's description: no caches, no shared code,
//! bits by their numbers (DDI 0487, D8; IHI 0070 §3.4, §3.13, §7.3.22).

use proptest::prelude::*;

use super::*;
use crate::DmaAccess;

/// A request.
#[derive(Debug, Clone, Copy)]
struct Want {
    write: bool,
    privileged: bool,
    execute: bool,
}

/// How a walk is set up.
#[derive(Debug, Clone, Copy)]
struct Setup {
    /// log2 of the granule.
    granule: u32,
    /// Bits of address.
    bits: u32,
    /// Bits of output addresses.
    output: u32,
    affd: bool,
    wxn: bool,
    pan: bool,
    ha: bool,
    hd: bool,
}

/// Where the reference sends `iova` from the table at `root`: the GPA, the leaf's address, and the
/// leaf afterwards; or the event.
fn walk(
    machine: &Machine,
    setup: Setup,
    root: u64,
    iova: u64,
    want: Want,
) -> Result<(u64, u64, u64), Outcome> {
    let fault = |id| Err(stage1_event(id));
    if iova >> setup.bits != 0 {
        return fault(EventId::Translation);
    }
    let stride = setup.granule - 3;
    // Number of levels needed to cover all bits above the page.
    let count = (setup.bits - setup.granule).div_ceil(stride);
    let (mut table, mut no_write, mut no_user) = (root, false, false);
    let (mut no_user_execute, mut no_privileged_execute) = (false, false);
    for below in (0..count).rev() {
        let shift = setup.granule + below * stride;
        let index =
            if below == count - 1 { iova >> shift } else { iova >> shift & ((1 << stride) - 1) };
        let at = table + index * 8;
        match machine.stage2.lookup(at) {
            Some(mapping) if mapping.protection.read => {}
            Some(_) => return Err(stage2_event(EventId::Permission)),
            None => return Err(stage2_event(EventId::Translation)),
        }
        let word = machine.peek(at);
        let bit = |number: u32| word >> number & 1 != 0;
        let block = match setup.granule {
            12 => below == 1 || below == 2,
            _ => below == 1,
        };
        let leaf = match (bit(0), bit(1), below) {
            (false, _, _) => return fault(EventId::Translation),
            (true, true, 0) => true,
            (true, true, _) => false,
            (true, false, _) if block => true,
            (true, false, _) => return fault(EventId::Translation),
        };
        let size = if leaf { shift } else { setup.granule };
        let mut address = word & 0x0000_ffff_ffff_f000;
        if setup.granule == 16 {
            address = address & !0xf000 | (word >> 12 & 0xf) << 48;
        }
        address = address >> size << size;
        if address >> setup.output != 0 {
            return fault(EventId::AddressSize);
        }
        if !leaf {
            no_privileged_execute |= bit(59);
            no_user_execute |= bit(60);
            no_user |= bit(61);
            no_write |= bit(62);
            table = address;
            continue;
        }
        if !bit(10) && !setup.affd && !setup.ha {
            return fault(EventId::Access);
        }
        // HD means nothing without HA.
        let clean = setup.ha && setup.hd && bit(51) && bit(7);
        let writable = !no_write && (clean || !bit(7));
        let user = !no_user && bit(6);
        let execute_user = !no_user_execute && !bit(54);
        let execute_privileged = !no_privileged_execute && !bit(53);
        let allowed = if want.privileged {
            if want.write {
                writable && !(setup.pan && user)
            } else if want.execute {
                execute_privileged && !(writable && user) && !(setup.wxn && writable)
            } else {
                !(setup.pan && user)
            }
        } else if want.write {
            user && writable
        } else if want.execute {
            execute_user && !(setup.wxn && writable && user)
        } else {
            user
        };
        if !allowed {
            return fault(EventId::Permission);
        }
        let gpa = address | iova & ((1 << shift) - 1);
        return match machine.stage2.lookup(gpa) {
            Some(mapping) if want.write && !mapping.protection.write => {
                Err(stage2_event(EventId::Permission))
            }
            Some(_) => {
                let accessed = if setup.ha { word | 1 << 10 } else { word };
                let dirty = if clean && want.write { accessed & !(1 << 7) } else { accessed };
                Ok((gpa, at, dirty))
            }
            None => Err(stage2_event(EventId::Translation)),
        };
    }
    unreachable!("the last level has leaves only")
}

/// One mapping of a guest's.
#[derive(Debug, Clone, Copy)]
struct Mapped {
    /// Which of the IOVAs.
    place: usize,
    level: u8,
    gpa: u64,
    /// Bits of the leaf that may be set or clear.
    attributes: u64,
    /// Bits of the pointer above.
    limits: u64,
}

const IOVAS: [u64; 6] =
    [0, 0x1_0000, 0x123_4567_8000, 0x123_4fff_0000, 0xfff_ffff_f000, 0x7fff_ffff_0000];

fn mapped() -> impl Strategy<Value = Mapped> {
    let gpa = prop::sample::select(vec![HIGH, HIGH + 0x1_0000, READ_ONLY, NOWHERE, LOW, 1 << 44]);
    // AP, AF, nG, DBM, PXN, UXN, and the valid bit: mostly valid.
    let attributes = (any::<u64>(), 0u32..8).prop_map(|(bits, much)| {
        let good = RW.into_bits();
        let changed = 1 | 3 << 6 | 1 << 10 | 1 << 11 | 1 << 51 | 3 << 53;
        match much {
            0 => bits & changed,
            1..=3 => good ^ bits & (1 << 7 | 1 << 10 | 1 << 51 | 3 << 53),
            _ => good,
        }
    });
    let limits = prop_oneof![3 => Just(0u64), 1 => any::<u64>().prop_map(|bits| bits & 0xf << 59)];
    (0..IOVAS.len(), 1u8..=3, gpa, attributes, limits).prop_map(
        |(place, level, gpa, attributes, limits)| Mapped { place, level, gpa, attributes, limits },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_unit_goes_where_the_reference_goes(
        granule in prop::sample::select(&Granule::ALL),
        bits in prop::sample::select(vec![39u32, 42, 47, 48]),
        output in prop::sample::select(vec![(5u8, 48u32), (2, 40)]),
        flags in any::<[bool; 5]>(),
        maps in prop::collection::vec(mapped(), 1..12),
        requests in prop::collection::vec(
            (0..IOVAS.len(), 0u64..0x2_0000, any::<(bool, bool, bool)>()),
            1..24,
        ),
        small in any::<bool>(),
    ) {
        let entries = if small { 8 } else { 4096 };
        let config = SmmuV3UnitConfig {
            iotlb_entries: entries,
            paging_structure_entries: entries,
            stage2_entries: entries,
            ..Default::default()
        };
        let machine = Machine::new(config);
        let [affd, wxn, pan, ha, hd] = flags;
        let tables = machine.tables_of(granule, bits, false);
        let cd = tables.cd();
        let qw0 = cd.qw0.with_ips(output.0).with_affd(affd).with_wxn(wxn).with_pan(pan);
        let qw0 = qw0.with_ha(ha).with_hd(hd);
        let table = machine.table(0x1000);
        machine.poke_cd(table + CD_SIZE, &Cd { qw0, ..cd });
        machine.install(None, VMID, Some(ste(table, 1, S1Format::Linear, 0)));
        for Mapped { place, level, gpa, attributes, limits } in maps {
            let iova = IOVAS[place] & ((1 << bits) - 1);
            let level = level.max(granule.start_level(bits));
            // Where an earlier block is in the way, nothing changes.
            let free = (granule.start_level(bits)..level).all(|above| {
                let word = machine.peek(entry_above(&tables, iova, above));
                word == 0 || word & 3 == 3
            });
            if !free {
                continue;
            }
            tables.map(iova, level, gpa, Descriptor::from_bits(attributes));
            if level > granule.start_level(bits) {
                let pointer = tables.entry(iova, level - 1);
                machine.poke(pointer, machine.peek(pointer) | limits);
            }
        }
        let (granule, output) = (granule.shift(), output.1);
        let setup = Setup { granule, bits, output, affd, wxn, pan, ha, hd };
        let mut port = machine.port();
        for (place, offset, (write, privileged, execute)) in requests {
            let iova = IOVAS[place] + offset;
            let want = Want { write, privileged, execute };
            let attributes = DmaAttributes { pasid: Some(1), privileged, execute };
            let access = if write { DmaAccess::Write } else { DmaAccess::Read };
            let expected = walk(&machine, setup, tables.root, iova, want);
            let found = port.translate(attributes, iova, 1, access);
            match (found, expected) {
                (Ok(found), Ok((gpa, leaf, word))) => {
                    let place = found.slice().ptr_guard().as_ptr().addr();
                    prop_assert_eq!(place, machine.address(gpa), "{:#x}", iova);
                    prop_assert_eq!(machine.peek(leaf), word, "{:#x} {:?}", iova, want);
                }
                (Err(error), Err(expected)) => {
                    prop_assert_eq!(Err(event(error)), expected, "{:#x} {:?}", iova, want);
                }
                (found, expected) => {
                    prop_assert!(false, "{iova:#x} {want:?}: {found:?}, not {expected:x?}");
                }
            }
        }
    }
}

/// GPA of the descriptor of `level` on the way to `iova`, as far as there are tables; of an empty
/// descriptor beyond that.
fn entry_above(tables: &Tables<'_>, iova: u64, level: u8) -> u64 {
    for above in tables.granule.start_level(tables.input_bits)..level {
        let entry = tables.entry(iova, above);
        if tables.machine.peek(entry) & 3 != 3 {
            return entry;
        }
    }
    tables.entry(iova, level)
}
