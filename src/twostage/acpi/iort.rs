// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IORT: describes Arm's SMMUs, the devices in front of them, and where their messages go.
//!
//! A root complex maps requester IDs to StreamIDs of an SMMU, and an SMMU maps StreamIDs to device
//! IDs of interrupt translation services (ITS). A node refers to others by their offsets in the
//! table, so these are added first: ITS groups, SMMUs, then the rest.
//!
//! Source: Arm DEN 0049, issue E.e, IO Remapping Table (revision 6 of the table).
//!
//! In the style of `acpi_tables`, which has no IORT.

use std::ops::RangeInclusive;

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use crate::spec::smmuv3::regs::Httu;

/// Why a node cannot be in a table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IortError {
    /// The length of a node has 16 bits.
    #[error(
        "IORT: {node} needs {length} bytes, but a node has at most 65535: give it fewer ranges"
    )]
    TooLong {
        /// Which node.
        node: &'static str,
        /// Its length in bytes.
        length: usize,
    },
    /// A range of IDs has at least one.
    #[error(
        "IORT: {node} maps no ID from {first:#x} to {last:#x}: the first comes before the last"
    )]
    NoId {
        /// Which node.
        node: &'static str,
        /// The first ID.
        first: u32,
        /// The last ID.
        last: u32,
    },
    /// Reserved memory is in whole pages of 64 KiB, and does not wrap.
    #[error(
        "IORT: {length:#x} reserved bytes at {base:#x} are not whole pages of 64 KiB: align both"
    )]
    NotAligned {
        /// Start of the range.
        base: u64,
        /// Its length in bytes.
        length: u64,
    },
}

/// Node types.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum NodeType {
    ItsGroup = 0,
    RootComplex = 2,
    Smmuv3 = 4,
    ReservedMemory = 6,
}

impl NodeType {
    /// Its revision, and its name in errors.
    fn revision_and_name(self) -> (u8, &'static str) {
        match self {
            Self::ItsGroup => (1, "an ITS group"),
            Self::RootComplex => (4, "a root complex"),
            Self::Smmuv3 => (5, "an SMMUv3"),
            Self::ReservedMemory => (3, "a reserved memory range"),
        }
    }
}

/// Where an ITS group is in its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ItsGroupOffset(u32);

/// Where an SMMU is in its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmmuOffset(u32);

/// IO remapping table.
#[derive(Debug)]
#[allow(clippy::upper_case_acronyms)] // As the tables of `acpi_tables`.
pub struct IORT {
    oem_id: [u8; 6],
    oem_table_id: [u8; 8],
    oem_revision: u32,
    count: u32,
    nodes: Vec<u8>,
}

impl IORT {
    /// Offset of the nodes.
    const HEADER_LENGTH: u32 = 48;
    const REVISION: u8 = 6;
    const NODE_COUNT: usize = 36;
    const NODE_OFFSET: usize = 40;
    /// Length of what all nodes begin with.
    const NODE_HEADER_LENGTH: usize = 16;

    /// A table without nodes.
    pub fn new(oem_id: [u8; 6], oem_table_id: [u8; 8], oem_revision: u32) -> Self {
        Self { oem_id, oem_table_id, oem_revision, count: 0, nodes: Vec::new() }
    }

    /// Adds a group of ITSs with these identifiers in the MADT.
    ///
    /// # Errors
    /// There are too many.
    pub fn add_its_group(&mut self, identifiers: &[u32]) -> Result<ItsGroupOffset, IortError> {
        let mut data = Vec::new();
        data.dword(identifiers.len() as u32);
        for identifier in identifiers {
            data.dword(*identifier);
        }
        self.add(NodeType::ItsGroup, &data, &[], &[]).map(ItsGroupOffset)
    }

    /// Adds an SMMU.
    ///
    /// # Errors
    /// It has too many ID mappings, or an empty one.
    pub fn add_smmuv3(&mut self, smmu: &Smmuv3) -> Result<SmmuOffset, IortError> {
        let mut mappings = smmu.mappings.clone();
        let mut flags = smmu.flags;
        // The SMMU's own messages have a mapping of their own, which no StreamID uses.
        let own = mappings.len() as u32;
        if let Some((device_id, its)) = smmu.messages {
            flags |= Smmuv3::DEVICE_ID_VALID;
            mappings.push(IdMapping::single(device_id, its.0));
        }
        let mut data = Vec::new();
        data.qword(smmu.registers);
        data.dword(flags);
        data.dword(0);
        // No address translation operations at a VATOS page; a generic SMMUv3.
        data.qword(0);
        data.dword(0);
        let Gsivs { event, pri, gerror, sync } = smmu.interrupts;
        for word in [event, pri, gerror, sync, smmu.proximity_domain] {
            data.dword(word);
        }
        data.dword(if smmu.messages.is_some() { own } else { 0 });
        self.add(NodeType::Smmuv3, &data, &mappings, &[]).map(SmmuOffset)
    }

    /// Adds a root complex.
    ///
    /// # Errors
    /// It has too many ID mappings, or an empty one.
    pub fn add_root_complex(&mut self, root_complex: &RootComplex) -> Result<(), IortError> {
        let mut data = Vec::new();
        data.dword(RootComplex::COHERENT);
        // No allocation hints.
        data.byte(0);
        data.word(0);
        data.byte(root_complex.memory_flags);
        data.dword(root_complex.ats);
        data.dword(root_complex.segment);
        data.byte(root_complex.address_bits);
        // PASID capabilities, a reserved byte, flags.
        data.word(0);
        data.byte(0);
        data.dword(0);
        self.add(NodeType::RootComplex, &data, &root_complex.mappings, &[]).map(drop)
    }

    /// Adds reserved memory ranges.
    ///
    /// # Errors
    /// A range is not in whole pages of 64 KiB, or there are too many ranges or StreamIDs.
    pub fn add_reserved_memory(&mut self, reserved: &ReservedMemory) -> Result<(), IortError> {
        const FIELDS: usize = 12;
        const PAGE: u64 = 0x1_0000;
        let mut ranges = Vec::new();
        for &(base, length) in &reserved.ranges {
            let whole = base % PAGE == 0 && length % PAGE == 0 && length > 0;
            if !whole || base.checked_add(length - 1).is_none() {
                return Err(IortError::NotAligned { base, length });
            }
            ranges.qword(base);
            ranges.qword(length);
            ranges.dword(0);
        }
        let streams = reserved.streams.iter();
        let mappings: Vec<_> =
            streams.map(|(stream, smmu)| IdMapping::single(*stream, smmu.0)).collect();
        let mut data = Vec::new();
        data.dword(reserved.flags);
        data.dword(reserved.ranges.len() as u32);
        // From the start of the node.
        let at = Self::NODE_HEADER_LENGTH + FIELDS + mappings.len() * IdMapping::LENGTH;
        data.dword(at as u32);
        self.add(NodeType::ReservedMemory, &data, &mappings, &ranges).map(drop)
    }

    /// Adds a node: `data`, `mappings`, `rest` behind what all nodes begin with. Returns
    /// its offset.
    fn add(
        &mut self,
        kind: NodeType,
        data: &[u8],
        mappings: &[IdMapping],
        rest: &[u8],
    ) -> Result<u32, IortError> {
        let (revision, node) = kind.revision_and_name();
        let mappings_at = Self::NODE_HEADER_LENGTH + data.len();
        let length = mappings_at + mappings.len() * IdMapping::LENGTH + rest.len();
        let too_long = || IortError::TooLong { node, length };
        let short = u16::try_from(length).map_err(|_| too_long())?;
        if let Some(IdMapping { first, last, .. }) =
            mappings.iter().find(|map| map.first > map.last)
        {
            return Err(IortError::NoId { node, first: *first, last: *last });
        }
        let offset = u32::try_from(self.nodes.len()).map_err(|_| too_long())?;
        self.nodes.byte(kind as u8);
        self.nodes.word(short);
        self.nodes.byte(revision);
        // A unique identifier.
        self.nodes.dword(self.count);
        self.nodes.dword(mappings.len() as u32);
        self.nodes.dword(if mappings.is_empty() { 0 } else { mappings_at as u32 });
        self.nodes.vec(data);
        for mapping in mappings {
            mapping.to_aml_bytes(&mut self.nodes);
        }
        self.nodes.vec(rest);
        self.count += 1;
        Ok(Self::HEADER_LENGTH + offset)
    }
}

impl Aml for IORT {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut sdt = Sdt::new(
            *b"IORT",
            Self::HEADER_LENGTH,
            Self::REVISION,
            self.oem_id,
            self.oem_table_id,
            self.oem_revision,
        );
        sdt.write_u32(Self::NODE_COUNT, self.count);
        sdt.write_u32(Self::NODE_OFFSET, Self::HEADER_LENGTH);
        sdt.append_slice(&self.nodes);
        sink.vec(sdt.as_slice());
    }
}

/// IDs of a node, and what they are at the node that they lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMapping {
    first: u32,
    last: u32,
    output: u32,
    reference: u32,
    flags: u32,
}

impl IdMapping {
    const LENGTH: usize = 20;
    /// Only `output` counts.
    const SINGLE: u32 = 1 << 0;

    /// The requester IDs `ids` are StreamIDs of `smmu`, which count from `output`.
    pub fn to_smmu(ids: RangeInclusive<u32>, output: u32, smmu: SmmuOffset) -> Self {
        Self::range(ids, output, smmu.0)
    }

    /// The requester IDs or StreamIDs `ids` are device IDs of the ITSs of `its`, which count from
    /// `output`.
    pub fn to_its(ids: RangeInclusive<u32>, output: u32, its: ItsGroupOffset) -> Self {
        Self::range(ids, output, its.0)
    }

    fn range(ids: RangeInclusive<u32>, output: u32, reference: u32) -> Self {
        let (first, last) = ids.into_inner();
        Self { first, last, output, reference, flags: 0 }
    }

    fn single(output: u32, reference: u32) -> Self {
        Self { first: 0, last: 0, output, reference, flags: Self::SINGLE }
    }
}

impl Aml for IdMapping {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.dword(self.first);
        // The number of IDs less one. `IORT::add` refuses a range without any.
        sink.dword(self.last.saturating_sub(self.first));
        sink.dword(self.output);
        sink.dword(self.reference);
        sink.dword(self.flags);
    }
}

/// The wired interrupts of an SMMU, edge-triggered, as interrupts of the GIC: a shared peripheral
/// interrupt's number plus 32. 0: there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gsivs {
    /// Of the event queue.
    pub event: u32,
    /// Of the page request queue.
    pub pri: u32,
    /// Of global errors.
    pub gerror: u32,
    /// Of CMD_SYNC.
    pub sync: u32,
}

/// An SMMUv3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smmuv3 {
    registers: u64,
    flags: u32,
    interrupts: Gsivs,
    proximity_domain: u32,
    messages: Option<(u32, ItsGroupOffset)>,
    mappings: Vec<IdMapping>,
}

impl Smmuv3 {
    const COHACC_OVERRIDE: u32 = 1 << 0;
    const HTTU_OVERRIDE: u32 = 1;
    const PROXIMITY_VALID: u32 = 1 << 3;
    const DEVICE_ID_VALID: u32 = 1 << 4;

    /// An SMMU whose registers are at `registers`. Its walks and queues are coherent.
    pub fn new(registers: u64) -> Self {
        Self {
            registers,
            flags: Self::COHACC_OVERRIDE,
            interrupts: Gsivs::default(),
            proximity_domain: 0,
            messages: None,
            mappings: Vec::new(),
        }
    }

    /// It has wired interrupts.
    pub fn interrupts(mut self, interrupts: Gsivs) -> Self {
        self.interrupts = interrupts;
        self
    }

    /// Its own messages have `device_id` at the ITSs of `its`.
    pub fn messages(mut self, device_id: u32, its: ItsGroupOffset) -> Self {
        self.messages = Some((device_id, its));
        self
    }

    /// It sets these flags in the guest's tables. Linux goes by this, not by IDR0.HTTU.
    pub fn httu(mut self, httu: Httu) -> Self {
        self.flags |= u32::from(httu.into_bits()) << Self::HTTU_OVERRIDE;
        self
    }

    /// It belongs to this proximity domain.
    pub fn proximity_domain(mut self, domain: u32) -> Self {
        self.flags |= Self::PROXIMITY_VALID;
        self.proximity_domain = domain;
        self
    }

    /// Leads messages from StreamIDs to ITSs. Ranges do not overlap.
    pub fn add_mapping(&mut self, mapping: IdMapping) {
        self.mappings.push(mapping);
    }
}

/// A PCI root complex whose DMA is coherent.
///
/// PASID capabilities stay 0: Linux reads those of the functions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootComplex {
    segment: u32,
    memory_flags: u8,
    ats: u32,
    address_bits: u8,
    mappings: Vec<IdMapping>,
}

impl RootComplex {
    const COHERENT: u32 = 1;
    const COHERENT_PATH: u8 = 1 << 0;
    const CACHEABLE_ATTRIBUTES: u8 = 1 << 1;
    const CANWBS: u8 = 1 << 2;
    const ATS: u32 = 1 << 0;
    const PRI: u32 = 1 << 1;

    /// The root complex of PCI segment `segment`. DMA has 64 address bits.
    pub fn new(segment: u32) -> Self {
        let memory_flags = Self::COHERENT_PATH | Self::CACHEABLE_ATTRIBUTES;
        Self { segment, memory_flags, ats: 0, address_bits: 64, mappings: Vec::new() }
    }

    /// DMA is coherent whatever attributes a stage-1 table requests (CANWBS). Linux offers stage 1
    /// to user space only with it or with S2FWB.
    pub fn coherent_always(mut self) -> Self {
        self.memory_flags |= Self::CANWBS;
        self
    }

    /// Functions may use ATS.
    pub fn ats(mut self) -> Self {
        self.ats |= Self::ATS;
        self
    }

    /// Functions may make page requests.
    pub fn pri(mut self) -> Self {
        self.ats |= Self::PRI;
        self
    }

    /// Limits the addresses of DMA to `bits` bits.
    pub fn address_bits(mut self, bits: u8) -> Self {
        self.address_bits = bits;
        self
    }

    /// Leads requester IDs to an SMMU, or past SMMUs to ITSs. Ranges do not overlap.
    pub fn add_mapping(&mut self, mapping: IdMapping) {
        self.mappings.push(mapping);
    }
}

/// How an operating system maps reserved memory (bits 9:2 of the flags of an RMR node).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum MemoryAttributes {
    /// Device-nGnRnE: registers, such as where messages go.
    Device = 0,
    /// Normal, not cacheable.
    NonCacheable = 4,
    /// Normal, write-back, inner shareable.
    WriteBack = 5,
}

/// Reserved memory ranges (RMR, §3.1.1.5): what stage 1 must map 1:1 for these StreamIDs.
///
/// The host maps the MSIs of assigned devices to a window of its own choice. If the hardware walks
/// the guest's tables first, these must map the window 1:1, or MSIs are lost.
///
/// Linux heeds it for PCI functions only if firmware tells it to keep the bus numbers, from which
/// StreamIDs follow: function 5 of the host bridge's `_DSM` returns 0 (PCI Firmware 3.3, §4.6.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservedMemory {
    flags: u32,
    streams: Vec<(u32, SmmuOffset)>,
    ranges: Vec<(u64, u64)>,
}

impl ReservedMemory {
    const REMAPPING_PERMITTED: u32 = 1 << 0;
    const PRIVILEGED: u32 = 1 << 1;
    const ATTRIBUTES: u32 = 2;

    /// Without ranges and StreamIDs yet.
    pub fn new(attributes: MemoryAttributes) -> Self {
        let flags = u32::from(attributes as u8) << Self::ATTRIBUTES;
        Self { flags, streams: Vec::new(), ranges: Vec::new() }
    }

    /// The operating system may map the ranges otherwise once it knows that the device is idle.
    pub fn remapping_permitted(mut self) -> Self {
        self.flags |= Self::REMAPPING_PERMITTED;
        self
    }

    /// Only privileged accesses need the ranges.
    pub fn privileged(mut self) -> Self {
        self.flags |= Self::PRIVILEGED;
        self
    }

    /// Adds `length` bytes from `base`, in whole pages of 64 KiB. Ranges do not overlap.
    pub fn add_range(&mut self, base: u64, length: u64) {
        self.ranges.push((base, length));
    }

    /// Adds a StreamID of `smmu`.
    pub fn add_stream(&mut self, stream: u32, smmu: SmmuOffset) {
        self.streams.push((stream, smmu));
    }
}

#[cfg(test)]
mod tests;
