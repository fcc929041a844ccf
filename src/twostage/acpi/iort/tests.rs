// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables byte by byte, and as a parser finds them that knows only the specification.

use super::*;
use proptest::prelude::*;

fn table() -> IORT {
    IORT::new(*b"FOOBAR", *b"CAFEDEAD", 0xdead_beef)
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// A node as it is found: its offset, type, revision, identifier, and bytes.
#[derive(Debug)]
struct Node<'a> {
    at: u32,
    kind: u8,
    revision: u8,
    identifier: u32,
    bytes: &'a [u8],
}

impl Node<'_> {
    /// Its ID mappings: input base, number of IDs less one, output base, reference, flags.
    fn mappings(&self) -> Vec<[u32; 5]> {
        let (count, at) = (word(self.bytes, 8) as usize, word(self.bytes, 12) as usize);
        let words = self.bytes[at..at + 20 * count].chunks_exact(4);
        let words: Vec<_> = words.map(|bytes| word(bytes, 0)).collect();
        words.chunks_exact(5).map(|five| five.try_into().unwrap()).collect()
    }

    /// The mapping for the SMMU's own messages.
    fn own(&self) -> Option<usize> {
        (self.kind == 4 && word(self.bytes, 24) & 1 << 4 != 0)
            .then(|| word(self.bytes, 64) as usize)
    }
}

/// The nodes of `iort`, from the first to exactly the end.
fn parsed(iort: &[u8]) -> Vec<Node<'_>> {
    assert_eq!(&iort[..4], b"IORT");
    assert_eq!(word(iort, 4) as usize, iort.len());
    assert_eq!(iort.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    let (count, mut at, mut nodes) = (word(iort, 36), word(iort, 40) as usize, Vec::new());
    for _ in 0..count {
        let length = usize::from(u16::from_le_bytes([iort[at + 1], iort[at + 2]]));
        let bytes = &iort[at..at + length];
        let (kind, revision, identifier) = (bytes[0], bytes[3], word(bytes, 4));
        nodes.push(Node { at: at as u32, kind, revision, identifier, bytes });
        at += length;
    }
    assert_eq!(at, iort.len());
    nodes
}

/// What `id` of `node` is at the node of type `kind` that it leads to, and where that is.
fn lookup(nodes: &[Node<'_>], node: &Node<'_>, id: u32, kind: u8) -> Option<(u32, u32)> {
    if node.kind == kind {
        return Some((node.at, id));
    }
    let maps = node.mappings();
    let ranges = maps.iter().enumerate().filter(|(index, _)| Some(*index) != node.own());
    let mut hits = ranges.filter(|(_, [first, count, ..])| (*first..=first + count).contains(&id));
    let (_, [first, _, output, reference, _]) = hits.next()?;
    assert!(hits.next().is_none(), "two mappings of {id:#x}");
    let next = nodes.iter().find(|node| node.at == *reference).expect("a node at the reference");
    lookup(nodes, next, output + (id - first), kind)
}

/// One ITS, an SMMU with messages of its own, all requesters, a window for 00:01.0.
fn machine() -> IORT {
    let mut iort = table();
    let its = iort.add_its_group(&[7]).unwrap();
    let interrupts = Gsivs { event: 0x6a, pri: 0x6b, gerror: 0x6d, sync: 0x6c };
    let mut smmu = Smmuv3::new(0x1_0905_0000)
        .interrupts(interrupts)
        .messages(0x1_0002, its)
        .httu(Httu::Dirty)
        .proximity_domain(3);
    smmu.add_mapping(IdMapping::to_its(0..=0xffff, 0, its));
    let smmu = iort.add_smmuv3(&smmu).unwrap();
    let mut root_complex = RootComplex::new(1).ats().pri().address_bits(48);
    root_complex.add_mapping(IdMapping::to_smmu(0..=0xffff, 0, smmu));
    iort.add_root_complex(&root_complex).unwrap();
    let mut window = ReservedMemory::new(MemoryAttributes::Device);
    window.add_range(0x0800_0000, 0x10_0000);
    window.add_stream(8, smmu);
    iort.add_reserved_memory(&window).unwrap();
    iort
}

#[test]
fn the_machine_is_laid_out_as_the_specification_has_it() {
    let iort = bytes(&machine());
    assert_eq!(iort[4..9], [0x34, 1, 0, 0, 6]);
    assert_eq!(iort[10..28], *b"FOOBARCAFEDEAD\xef\xbe\xad\xde");
    #[rustfmt::skip]
    let nodes = [
        // Four nodes, the first at 48.
        4, 0, 0, 0, 48, 0, 0, 0, 0, 0, 0, 0,
        // At 0x30: the ITS group. One ITS, number 7.
        0, 24, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 7, 0, 0, 0,
        // At 0x48: the SMMU. Registers, flags, VATOS, model, interrupts, domain, index.
        4, 108, 0, 5, 1, 0, 0, 0, 2, 0, 0, 0, 68, 0, 0, 0,
        0, 0, 5, 9, 1, 0, 0, 0, 0b1_1101, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0x6a, 0, 0, 0, 0x6b, 0, 0, 0, 0x6d, 0, 0, 0, 0x6c, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0,
        0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0x30, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0x30, 0, 0, 0, 1, 0, 0, 0,
        // At 0xb4: the root complex. Coherent, hints, CPM and DACS, ATS and PRI, segment,
        // address bits, PASID.
        2, 60, 0, 4, 2, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0b11, 0b11, 0, 0, 0, 1, 0, 0, 0, 48, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0x48, 0, 0, 0, 0, 0, 0, 0,
        // At 0xf0: the window. Flags, one range at 48, StreamID 8 alone; the range.
        6, 68, 0, 3, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0,
        0, 0, 0, 0, 1, 0, 0, 0, 48, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0x48, 0, 0, 0, 1, 0, 0, 0,
        0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(iort[36..], nodes);
}

#[test]
fn every_reference_leads_to_a_node_of_the_right_type() {
    let iort = bytes(&machine());
    let nodes = parsed(&iort);
    let kinds: Vec<_> = nodes.iter().map(|node| (node.kind, node.revision)).collect();
    assert_eq!(kinds, [(0, 1), (4, 5), (2, 4), (6, 3)]);
    let identifiers: Vec<_> = nodes.iter().map(|node| node.identifier).collect();
    assert_eq!(identifiers, [0, 1, 2, 3]);
    let [its, smmu, root_complex, reserved] = &nodes[..] else { panic!("{nodes:?}") };
    // A requester's StreamID, and the device ID of its messages: not that of the SMMU's own.
    assert_eq!(lookup(&nodes, root_complex, 0x1234, 4), Some((smmu.at, 0x1234)));
    assert_eq!(lookup(&nodes, root_complex, 0, 0), Some((its.at, 0)));
    assert_eq!(lookup(&nodes, root_complex, 0x1_0000, 4), None);
    let [_, _, device_id, group, flags] = smmu.mappings()[smmu.own().unwrap()];
    assert_eq!((device_id, group, flags), (0x1_0002, its.at, 1));
    // The window's StreamID is one of the SMMU that is referred to.
    let [[_, _, stream, reference, flags]] = reserved.mappings()[..] else { panic!("one stream") };
    assert_eq!((stream, reference, flags), (8, smmu.at, 1));
    let range = word(reserved.bytes, 24) as usize;
    assert_eq!([0, 8].map(|at| word(reserved.bytes, range + at)), [0x0800_0000, 0x10_0000]);
}

#[test]
fn flags_are_where_the_specification_has_them() {
    // An SMMU without anything: coherent walks, no mapping, no messages.
    let mut iort = table();
    let smmu = iort.add_smmuv3(&Smmuv3::new(0x1000)).unwrap();
    iort.add_root_complex(&RootComplex::new(0).coherent_always()).unwrap();
    let attributes = [MemoryAttributes::WriteBack, MemoryAttributes::NonCacheable];
    let mut reserved = ReservedMemory::new(attributes[0]).remapping_permitted();
    reserved.add_stream(1, smmu);
    iort.add_reserved_memory(&reserved).unwrap();
    iort.add_reserved_memory(&ReservedMemory::new(attributes[1]).privileged()).unwrap();
    let iort = bytes(&iort);
    let [smmu, root_complex, one, other] = &parsed(&iort)[..] else { panic!("four nodes") };
    assert_eq!((word(smmu.bytes, 24), smmu.own(), smmu.mappings().len()), (1, None, 0));
    assert_eq!((word(smmu.bytes, 12), word(smmu.bytes, 64), smmu.bytes.len()), (0, 0, 68));
    assert_eq!((root_complex.bytes[23], word(root_complex.bytes, 24)), (0b111, 0));
    assert_eq!(root_complex.bytes[32], 64);
    assert_eq!([one, other].map(|node| word(node.bytes, 16)), [5 << 2 | 1, 4 << 2 | 2]);
}

#[test]
fn what_no_table_can_say_is_refused_by_name() {
    let mut iort = table();
    let its = iort.add_its_group(&[0]).unwrap();
    let smmu = iort.add_smmuv3(&Smmuv3::new(0x1000)).unwrap();
    let before = bytes(&iort);
    let refused = |error: Result<(), IortError>| error.unwrap_err().to_string();
    // 40 bytes and 20 for each range: 3274 ranges fit.
    let root_complex = |ranges: u32| {
        let mut root_complex = RootComplex::new(0);
        for id in 0..ranges {
            root_complex.add_mapping(IdMapping::to_smmu(id..=id, id, smmu));
        }
        root_complex
    };
    let message = refused(iort.add_root_complex(&root_complex(3275)));
    assert!(message.contains("a root complex needs 65540 bytes"), "{message}");
    #[allow(clippy::reversed_empty_ranges)]
    let empty = IdMapping::to_its(9..=8, 0, its);
    let mut mapped = Smmuv3::new(0);
    mapped.add_mapping(empty);
    let message = refused(iort.add_smmuv3(&mapped).map(drop));
    assert!(message.contains("an SMMUv3 maps no ID from 0x9 to 0x8"), "{message}");
    for (base, length) in [
        (0x1000, 0x1_0000),
        (0, 0x1000),
        (0, 0),
        (u64::MAX << 16, 0x2_0000),
        (1 << 63, 1 << 63 | 1),
    ] {
        let mut reserved = ReservedMemory::new(MemoryAttributes::Device);
        reserved.add_range(base, length);
        let error = iort.add_reserved_memory(&reserved).unwrap_err();
        assert_eq!(error, IortError::NotAligned { base, length });
    }
    assert_eq!(bytes(&iort), before, "nothing of what was refused is in the table");
    iort.add_root_complex(&root_complex(3274)).unwrap();
    // The last page there is.
    let mut reserved = ReservedMemory::new(MemoryAttributes::Device);
    reserved.add_range(u64::MAX << 16, 0x1_0000);
    iort.add_reserved_memory(&reserved).unwrap();
    assert_eq!(parsed(&bytes(&iort)).len(), 4);
}

proptest! {
    /// Buses spread over SMMUs, and SMMUs over ITS groups: every requester is found where it was
    /// put, and no other is found.
    #[test]
    fn requesters_are_found_where_they_were_put(
        groups in prop::collection::vec(1_usize..4, 1..4),
        smmus in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..5),
        buses in prop::collection::vec(prop::option::of(any::<prop::sample::Index>()), 1..16),
        reserved in prop::collection::vec((any::<u32>(), any::<prop::sample::Index>()), 0..8),
    ) {
        let mut iort = table();
        let add_group = |ids: &usize| iort.add_its_group(&vec![1; *ids]).unwrap();
        let groups: Vec<_> = groups.iter().map(add_group).collect();
        let mut offsets = Vec::new();
        for (number, (group, messages)) in (0_u32..).zip(&smmus) {
            let group = *group.get(&groups);
            let mut smmu = Smmuv3::new(0x10_0000);
            if *messages {
                smmu = smmu.messages(0x9000_0000, group);
            }
            smmu.add_mapping(IdMapping::to_its(0..=0xffff, number << 16, group));
            offsets.push((number, group, iort.add_smmuv3(&smmu).unwrap()));
        }
        let mut root_complex = RootComplex::new(0);
        for (bus, smmu) in (0_u32..).zip(&buses) {
            if let Some(smmu) = smmu {
                let ids = bus << 8..=bus << 8 | 0xff;
                let (.., smmu) = smmu.get(&offsets);
                root_complex.add_mapping(IdMapping::to_smmu(ids, bus << 8, *smmu));
            }
        }
        iort.add_root_complex(&root_complex).unwrap();
        let mut window = ReservedMemory::new(MemoryAttributes::Device);
        for (stream, smmu) in &reserved {
            window.add_stream(*stream, smmu.get(&offsets).2);
        }
        iort.add_reserved_memory(&window).unwrap();

        let iort = bytes(&iort);
        let nodes = parsed(&iort);
        let [.., root_complex, window] = &nodes[..] else { panic!("{nodes:?}") };
        for (bus, smmu) in (0_u32..).zip(&buses) {
            for id in [bus << 8, bus << 8 | 0xff] {
                let put = smmu.as_ref().map(|smmu| smmu.get(&offsets));
                let stream = put.map(|(.., smmu)| (smmu.0, id));
                prop_assert_eq!(lookup(&nodes, root_complex, id, 4), stream);
                let device = put.map(|(number, group, _)| (group.0, number << 16 | id));
                prop_assert_eq!(lookup(&nodes, root_complex, id, 0), device);
            }
        }
        let streams: Vec<_> = window.mappings().iter().map(|map| (map[2], map[3])).collect();
        let put: Vec<_> =
            reserved.iter().map(|(stream, smmu)| (*stream, smmu.get(&offsets).2 .0)).collect();
        prop_assert_eq!(streams, put);
    }
}

#[test]
fn an_id_mapping_covers_the_buses_behind_a_bridge_to_pci() {
    use crate::spec::pci::Bdf;
    use crate::viommu::bridges::{looked_up, Bridge, BridgeKind};
    let bdf = |raw: u16| Bdf::from_raw(raw);
    let port = Bridge { bdf: bdf(0x18), secondary: 1, kind: BridgeKind::Port };
    let to_pci = Bridge { bdf: bdf(0x100), secondary: 2, kind: BridgeKind::ExpressToPci };
    let mut iort = table();
    let smmu = iort.add_smmuv3(&Smmuv3::new(0x0905_0000)).unwrap();
    let mut root = RootComplex::new(0);
    for (function, bridges) in [(0x100, &[port][..]), (0x208, &[port, to_pci])] {
        for ids in looked_up(bdf(function), bridges, 2) {
            let ids = u32::from(*ids.start())..=u32::from(*ids.end());
            root.add_mapping(IdMapping::to_smmu(ids.clone(), *ids.start(), smmu));
        }
    }
    iort.add_root_complex(&root).unwrap();
    let iort = bytes(&iort);
    let nodes = parsed(&iort);
    let at = nodes[0].at;
    assert_eq!(nodes[1].mappings(), [[0x100, 0, 0x100, at, 0], [0x200, 0xff, 0x200, at, 0]]);
}
