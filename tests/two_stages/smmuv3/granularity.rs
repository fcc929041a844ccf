// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each invalidation command drops, from the guest's command queue to the host's caches:
//! compared after every step with naive caches of translations, and with everything that may be
//! cached of stream table entries and context descriptors.

use std::cell::RefCell;

use proptest::prelude::*;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::smmuv3::command::{AddressRange, Command, RANGE_ALL};
use twostage::spec::smmuv3::translation::{Descriptor, DescriptorKind, Granule};
use twostage::spec::smmuv3::StreamId;

use super::guest::{Completion, Entry};
use super::machine::Machine;
use crate::caches::{self, overlaps, write, Caches, Format, Next, Space, Write, SLOTS};
use crate::common::{A, B, PAGE};
use crate::conformance::Stack as _;

/// Tables of the 4 KiB granule; level 3 is the lowest.
struct Stage1;

fn level(height: u8) -> u8 {
    4 - height
}

impl Format for Stage1 {
    fn pointer(&self, gpa: u64) -> u64 {
        let table = Descriptor::new().with_valid(true).with_table(true);
        table.with_address(Granule::K4, gpa).into_bits()
    }

    fn leaf(&self, gpa: u64, height: u8, global: bool) -> u64 {
        let leaf = Descriptor::new().with_valid(true).with_table(height == 1).with_ng(!global);
        let leaf = leaf.with_sh(3).with_af(true).with_ap_unprivileged(true);
        leaf.with_address(Granule::K4, gpa).into_bits()
    }

    fn decode(&self, word: u64, height: u8) -> Option<Next> {
        let (descriptor, level) = (Descriptor::from_bits(word), level(height));
        let kind = descriptor.kind(Granule::K4, level, 48);
        let leaf = kind == DescriptorKind::Leaf;
        let gpa = descriptor.address(Granule::K4, level, kind);
        (kind != DescriptorKind::Invalid).then_some(Next { gpa, leaf, global: !descriptor.ng() })
    }
}

/// The tag of a cached translation; all have one VMID.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Tag {
    Asid(u16),
    Global,
}

/// Drops what `command` requires (§4.4).
fn forget(caches: &mut Caches<Tag>, command: &Command) {
    let (names, range): (Box<dyn Fn(Tag) -> bool>, _) = match *command {
        Command::TlbiNhAll { .. } | Command::TlbiNsnhAll => (Box::new(|_| true), None),
        Command::TlbiNhAsid { asid, .. } => (Box::new(move |tag| tag == Tag::Asid(asid)), None),
        Command::TlbiNhVa { asid, range, .. } => {
            (Box::new(move |tag| [Tag::Asid(asid), Tag::Global].contains(&tag)), Some(range))
        }
        Command::TlbiNhVaa { range, .. } => (Box::new(|_| true), Some(range)),
        _ => return,
    };
    let Some(AddressRange { address, leaf, tg, ttl, num, scale }) = range else {
        caches.pages.retain(|page| !names(page.tag));
        caches.tables.retain(|table| !names(table.tag));
        return;
    };
    let pages = if tg == 0 { 1 } else { (u64::from(num) + 1) << scale };
    let last = address + pages * PAGE - 1;
    // If TTL gives the level of the leaves, others need not be dropped.
    let of_level = |height| tg == 0 || ttl == 0 || level(height) == ttl;
    caches.pages.retain(|page| {
        let hit = names(page.tag) && overlaps(page.iova, page.shift(), address, last);
        !(hit && of_level(page.height))
    });
    caches.tables.retain(|table| {
        leaf || !(names(table.tag) && overlaps(table.iova, table.shift(), address, last))
    });
}

fn range() -> impl Strategy<Value = AddressRange> {
    let exact = Just((0, 0, 0, 0));
    let ranged = (Just(1u8), 0u8..4, 0u8..4, prop::sample::select(vec![0u8, 1, 9, 18]));
    let range = (0..SLOTS, any::<bool>(), prop_oneof![exact, ranged]).prop_map(
        |(slot, leaf, (tg, ttl, num, scale))| AddressRange {
            address: caches::iova(slot),
            leaf,
            tg,
            ttl,
            num,
            scale,
        },
    );
    range.prop_filter("the specification reserves it", |range| !range.is_reserved())
}

/// Of VMIDs, which are the guest's and ignored, and ASIDs, one of which is unused.
fn tlbi() -> impl Strategy<Value = Command> {
    let (vmid, asid) = (prop_oneof![Just(0u16), Just(9)], 1u16..4);
    prop_oneof![
        1 => vmid.clone().prop_map(|vmid| Command::TlbiNhAll { vmid }),
        1 => Just(Command::TlbiNsnhAll),
        2 => (vmid.clone(), asid.clone())
            .prop_map(|(vmid, asid)| Command::TlbiNhAsid { vmid, asid }),
        8 => (vmid.clone(), asid, range())
            .prop_map(|(vmid, asid, range)| Command::TlbiNhVa { vmid, asid, range }),
        3 => (vmid, range()).prop_map(|(vmid, range)| Command::TlbiNhVaa { vmid, range }),
    ]
}

/// Of both devices' streams and others around them.
fn cfgi() -> impl Strategy<Value = Command> {
    let stream = prop::sample::select(vec![0x20u32, 0x28, 0x21, 0x2f, 0x30]).prop_map(StreamId);
    prop_oneof![
        (stream.clone(), any::<bool>())
            .prop_map(|(stream, leaf)| Command::CfgiSte { stream, leaf }),
        (stream.clone(), prop_oneof![0u8..6, Just(RANGE_ALL)])
            .prop_map(|(stream, range)| Command::CfgiSteRange { stream, range }),
        (stream.clone(), 0u32..2, any::<bool>()).prop_map(|(stream, substream, leaf)| {
            let substream = Pasid::new(substream).unwrap();
            Command::CfgiCd { stream, substream, leaf }
        }),
        stream.prop_map(|stream| Command::CfgiCdAll { stream }),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    /// Writes an entry of this space's tables.
    Write(usize, Write),
    /// The guest invalidates.
    Forget(Vec<Command>),
}

/// Steps, each with the pages to read after it.
fn steps() -> impl Strategy<Value = Vec<(Step, u64)>> {
    // Configuration commands do not affect translations.
    let command = prop_oneof![8 => tlbi(), 1 => cfgi()];
    let step = prop_oneof![
        (0..2usize, write()).prop_map(|(space, write)| Step::Write(space, write)),
        prop::collection::vec(command, 1..4).prop_map(Step::Forget),
    ];
    let reads = prop_oneof![Just(u64::MAX), any::<u64>()];
    prop::collection::vec((step, reads), 1..24)
}

/// Devices, each with the number of its tables and its ASID: separate, shared, and the same tables
/// under two names.
const LAYOUTS: [[(Bdf, usize, u16); 2]; 3] =
    [[(A, 0, 1), (B, 1, 2)], [(A, 0, 1), (B, 0, 1)], [(A, 0, 1), (B, 0, 2)]];

/// The devices' reads, and those of the model.
fn compare(
    machine: &Machine,
    users: &[(Bdf, usize, u16)],
    spaces: &[Space],
    caches: &RefCell<Caches<Tag>>,
    reads: u64,
) -> Result<(), TestCaseError> {
    for slot in (0..SLOTS).filter(|slot| reads >> slot & 1 != 0) {
        let iova = caches::iova(slot);
        for (rid, space, asid) in users {
            let tags = (Tag::Asid(*asid), Some(Tag::Global));
            let model = caches.borrow_mut().read(&machine.guest, &spaces[*space], tags, iova);
            let read = machine.read(*rid, iova).ok();
            prop_assert_eq!(read, model, "{} at {:#x}", rid, iova);
        }
    }
    Ok(())
}

/// A stream table entry.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ste {
    Abort,
    Bypass,
    /// With this one of the stream's context descriptors.
    Context(usize),
}

#[derive(Debug, Clone)]
enum Change {
    Ste(usize, Ste),
    /// A context descriptor of a stream gets the tables of this number, each with an ASID.
    Cd(usize, usize, usize),
    Forget(Vec<Command>),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let ste = prop_oneof![
        1 => Just(Ste::Abort),
        1 => Just(Ste::Bypass),
        4 => (0usize..2).prop_map(Ste::Context),
    ];
    let change = prop_oneof![
        2 => (0usize..2, ste).prop_map(|(stream, ste)| Change::Ste(stream, ste)),
        3 => (0usize..2, 0usize..2, 0..TABLES)
            .prop_map(|(stream, cd, to)| Change::Cd(stream, cd, to)),
        4 => prop::collection::vec(cfgi(), 1..4).prop_map(Change::Forget),
    ];
    prop::collection::vec(change, 1..40)
}

const TABLES: usize = 3;
/// A GPA, which every table maps.
const IOVA: u64 = 0xc0_0000;

/// A stream with two context descriptors: what is in memory, and what else may be cached.
struct Stream {
    rid: Bdf,
    descriptors: [u64; 2],
    entry: Ste,
    entries_before: Vec<Ste>,
    contexts: [usize; 2],
    contexts_before: [Vec<usize>; 2],
}

impl Stream {
    /// Drops what `command` requires (§4.3). An entry's context descriptors are dropped with it.
    fn forget(&mut self, command: &Command) {
        let this = StreamId::from(self.rid);
        let (entries, contexts) = match *command {
            Command::CfgiSte { stream, .. } => (stream == this, stream == this),
            Command::CfgiSteRange { stream, range } => {
                let named = u64::from(stream.raw() ^ this.raw()) >> (u32::from(range) + 1) == 0;
                (named, named)
            }
            Command::CfgiCd { stream, substream, .. } => {
                (false, stream == this && substream.raw() == 0)
            }
            Command::CfgiCdAll { stream } => (false, stream == this),
            _ => (false, false),
        };
        if entries {
            self.entries_before.clear();
        }
        if contexts {
            self.contexts_before.iter_mut().for_each(Vec::clear);
        }
    }

    /// Whether a read at [`IOVA`] may give `read`.
    fn may_read(&self, read: Option<u64>) -> bool {
        self.entries_before.iter().chain([&self.entry]).any(|entry| match *entry {
            Ste::Abort => read.is_none(),
            Ste::Bypass => read == Some(1),
            Ste::Context(number) => self.contexts_before[number]
                .iter()
                .chain([&self.contexts[number]])
                .any(|table| read == Some(10 + *table as u64)),
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn translations_go_as_the_text_says(
        layout in prop::sample::select(&LAYOUTS),
        steps in steps(),
    ) {
        let machine = Machine::new();
        let guest = &machine.guest;
        caches::number_pages(guest);
        let spaces = [(); 2].map(|()| Space::new(guest, &Stage1));
        for (rid, space, asid) in layout {
            let cd = guest.context(spaces[space].top, asid);
            guest.set_entry(rid.into(), Entry::Stage1 { cd });
        }
        guest.enable();
        let caches = RefCell::default();
        let compare = |reads| compare(&machine, &layout, &spaces, &caches, reads);
        compare(u64::MAX)?;
        for (step, reads) in &steps {
            match step {
                Step::Write(space, write) => spaces[*space].write(guest, *write),
                Step::Forget(batch) => {
                    prop_assert_eq!(guest.submit(batch), Completion::Done);
                    batch.iter().for_each(|command| forget(&mut caches.borrow_mut(), command));
                }
            }
            compare(*reads)?;
        }
        compare(u64::MAX)?;
    }

    #[test]
    fn entries_and_context_descriptors_go_as_the_text_says(changes in changes()) {
        let machine = Machine::new();
        let guest = &machine.guest;
        guest.store(IOVA, 1);
        let tables: Vec<_> = (0..TABLES as u64).map(|number| {
            let (table, page) = (guest.page(), guest.page());
            guest.store(page, 10 + number);
            guest.map(table, IOVA, page, 3, true);
            table
        }).collect();
        let asid = |table: usize| 1 + table as u16;
        let mut streams = [A, B].map(|rid| {
            let descriptors = [(); 2].map(|()| guest.page());
            descriptors.iter().for_each(|at| guest.write_context(*at, tables[0], asid(0)));
            let (entries_before, contexts_before) = Default::default();
            let (entry, contexts) = (Ste::Abort, [0; 2]);
            Stream { rid, descriptors, entry, entries_before, contexts, contexts_before }
        });
        guest.enable();
        for change in &changes {
            match change {
                Change::Ste(stream, ste) => {
                    let stream = &mut streams[*stream];
                    stream.entries_before.push(stream.entry);
                    stream.entry = *ste;
                    let entry = match *ste {
                        Ste::Abort => Entry::Abort,
                        Ste::Bypass => Entry::Bypass,
                        Ste::Context(number) => Entry::Stage1 { cd: stream.descriptors[number] },
                    };
                    guest.set_entry(stream.rid.into(), entry);
                }
                Change::Cd(stream, number, table) => {
                    let stream = &mut streams[*stream];
                    stream.contexts_before[*number].push(stream.contexts[*number]);
                    stream.contexts[*number] = *table;
                    guest.write_context(stream.descriptors[*number], tables[*table], asid(*table));
                }
                Change::Forget(batch) => {
                    prop_assert_eq!(guest.submit(batch), Completion::Done);
                    for command in batch {
                        streams.iter_mut().for_each(|stream| stream.forget(command));
                    }
                }
            }
            for stream in &streams {
                let read = machine.read(stream.rid, IOVA).ok();
                let allowed = stream.may_read(read);
                prop_assert!(allowed, "{} reads {:?} after {:?}", stream.rid, read, change);
            }
        }
    }
}
