// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the unit as a whole, and a small machine to do them on.

mod attachments;
mod device_tlb;
mod first_stage;
mod nested;
mod nested_reference;
mod nested_sanitizer;
mod nested_staleness;
mod reference;
mod sanitizer;
mod second_stage;
mod staleness;

use std::ops::Deref;
use std::sync::{Arc, Weak};

use vm_memory::{GuestAddress, GuestRegionMmap};

use super::*;
use crate::units::engine::testing::{self, *};
use crate::units::engine::TlbInvalidation;
use crate::units::hardware::UserTables;
use crate::units::stage2::Mapping;
use crate::{DmaAccess, DmaAttributes, DmaError, DmaFaultReason};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, FaultSink, HostFault, HwptVtdNested, HwptVtdSecondStage, ObjectId,
    Protection, UserMemory,
};
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::first_stage::{index, page_size, FirstStageEntry};
use twostage::spec::vtd::PageRange;

/// Requester id of the machine's device.
pub const RID: u16 = 0x0018;
/// Device object of the machine's device.
pub const DEVICE: ObjectId = ObjectId(7);
/// Leaf bits for a page that a user may read and write, with its flags set already.
pub const RW: u64 = 0x67;
/// Bits of a pointer to a table, flag set.
pub const TABLE: u64 = 0x27;

/// Guest memory, a unit, and tables as a guest would write them.
#[derive(Debug)]
pub struct Machine {
    pub unit: Arc<VtdUnit>,
    memory: Memory,
}

/// The machine's memory is accessed through the machine.
impl Deref for Machine {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.memory
    }
}

/// First-stage tables over second-stage tables.
#[derive(Debug, Clone, Copy)]
pub struct FirstStage {
    pub root: u64,
    pub levels: u8,
    pub flags: u64,
}

/// Second-stage tables.
#[derive(Debug, Clone, Copy)]
pub struct SecondStage {
    pub root: u64,
    pub levels: u8,
    pub accessed_dirty: bool,
}

impl SecondStage {
    /// For an attachment.
    pub fn data(self) -> HwptVtdSecondStage {
        let Self { root, levels, accessed_dirty } = self;
        let addr_width = 12 + 9 * u32::from(levels);
        HwptVtdSecondStage { pgtbl_addr: root, addr_width, accessed_dirty }
    }
}

impl Machine {
    pub fn new(config: VtdUnitConfig) -> Self {
        Self { unit: VtdUnit::new(config), memory: Memory::new() }
    }

    pub fn port(&self) -> DmaPort {
        self.unit.port(RID)
    }

    /// GPA of a new, empty table.
    pub fn table(&self) -> u64 {
        self.memory.table(0x1000)
    }

    /// GPA of the entry of `level` on the way to `iova` from the top table `root` of `levels`,
    /// creating missing tables, with the bits `pointer` in their pointers.
    pub fn entry(&self, root: u64, levels: u8, iova: u64, level: u8, pointer: u64) -> u64 {
        let mut table = root;
        for above in (level + 1..=levels).rev() {
            let entry = table + index(iova, above) * 8;
            if self.peek(entry) == 0 {
                self.poke(entry, self.table() | pointer);
            }
            table = FirstStageEntry::from_bits(self.peek(entry)).frame() << 12;
        }
        table + index(iova, level) * 8
    }

    /// Maps the page of `level` at `iova` to `gpa` with the leaf bits `bits`; returns the leaf's
    /// GPA.
    pub fn map(&self, root: u64, levels: u8, iova: u64, level: u8, gpa: u64, bits: u64) -> u64 {
        let entry = self.entry(root, levels, iova, level, TABLE);
        let large = if level > 1 { 0x80 } else { 0 };
        self.poke(entry, gpa & !(page_size(level) - 1) | bits | large);
        entry
    }

    /// Attaches the device (or its `pasid`) to first-stage tables.
    pub fn attach(&self, pasid: Option<u32>, tag: u32, root: u64, levels: u8, flags: u64) {
        let addr_width = if levels == 5 { 57 } else { 48 };
        let data = iommu_hwpt_vtd_s1 { flags, pgtbl_addr: root, addr_width, ..Default::default() };
        self.install(pasid, tag, Some(UserTables::FirstStage(data)));
    }

    /// Attaches the device (or its `pasid`) to first-stage tables over second-stage tables.
    pub fn attach_nested(
        &self,
        pasid: Option<u32>,
        tag: u32,
        first: FirstStage,
        second: SecondStage,
    ) {
        let FirstStage { root, levels, flags } = first;
        let addr_width = if levels == 5 { 57 } else { 48 };
        let first = iommu_hwpt_vtd_s1 { flags, pgtbl_addr: root, addr_width, ..Default::default() };
        let second = second.data();
        self.install(pasid, tag, Some(UserTables::Nested(HwptVtdNested { first, second })));
    }

    /// Attaches the device (or its `pasid`) to the user's second-stage tables.
    pub fn attach_second_stage(&self, pasid: Option<u32>, tag: u32, root: u64, levels: u8) {
        let tables = SecondStage { root, levels, accessed_dirty: false };
        self.attach_second_stage_with(pasid, tag, tables);
    }

    /// The same, perhaps with flags.
    pub fn attach_second_stage_with(&self, pasid: Option<u32>, tag: u32, tables: SecondStage) {
        self.install(pasid, tag, Some(UserTables::SecondStage(tables.data())));
    }

    pub fn install(&self, pasid: Option<u32>, tag: u32, tables: Option<UserTables>) {
        let stage2 = Arc::clone(&self.stage2);
        self.unit.install(
            RID,
            pasid,
            Translation { tag: CacheTag(tag), tables, stage2, dirty: None },
        );
    }

    pub fn invalidate(&self, tag: u32, range: CacheRange) {
        self.unit.invalidate(CacheTag(tag), &[range]);
    }

    pub fn invalidate_second_stage(&self, tag: u32, range: CacheRange) {
        self.unit.invalidate_second_stage(CacheTag(tag), &[range]);
    }

    /// The word read, or why the read was blocked.
    pub fn read_u64(&self, port: &mut DmaPort, attributes: DmaAttributes, iova: u64) -> Outcome {
        testing::read(port, attributes, iova).map_err(fault)
    }

    /// The word written, or why the write was blocked.
    pub fn write_u64(
        &self,
        port: &mut DmaPort,
        attributes: DmaAttributes,
        iova: u64,
        word: u64,
    ) -> Outcome {
        testing::write(port, attributes, iova, word).map_err(fault)
    }
}

/// Why a request was blocked, and whether by stage 2.
pub type Blocked = (FaultReason, bool);

/// The word read or written, if the request was not blocked.
pub type Outcome = Result<u64, Blocked>;

/// A request to compare with a naive walker's.
#[derive(Debug, Clone, Copy)]
pub struct TestRequest {
    pub iova: u64,
    pub write: bool,
    pub attributes: DmaAttributes,
}

impl TestRequest {
    /// Offset in memory of its result.
    pub fn outcome(&self, machine: &Machine, port: &mut DmaPort) -> Result<usize, Blocked> {
        let access = if self.write { DmaAccess::Write } else { DmaAccess::Read };
        let translated = port.translate(self.attributes, self.iova, 8, access).map_err(fault)?;
        let found = translated.slice().ptr_guard().as_ptr() as usize;
        Ok(found - machine.region.as_ptr() as usize)
    }
}

/// The reason of a fault; anything else fails the test.
pub fn fault(error: DmaError) -> Blocked {
    match error {
        DmaError::Fault { reason: DmaFaultReason::Vtd(reason), stage2, .. } => (reason, stage2),
        other => panic!("{other}"),
    }
}

/// A request with PASID for supervisor privilege.
pub fn supervisor(pasid: u32) -> DmaAttributes {
    privileged(testing::pasid(pasid))
}

/// All pages, including tables.
pub const ALL: CacheRange = CacheRange::All;

/// The page of `address`.
pub fn page(address: u64, leaf: bool) -> CacheRange {
    CacheRange::Pages(PageRange::new(address, 1, leaf))
}

impl FaultSink for Sink<HostFault> {
    fn dma_fault(&self, fault: &HostFault) {
        self.put(*fault);
    }
}

impl Machine {
    /// A sink for the device's faults.
    pub fn sink(&self) -> Arc<Sink<HostFault>> {
        let sink = Arc::new(Sink::default());
        let weak: Weak<Sink<HostFault>> = Arc::downgrade(&sink);
        self.unit.set_fault_sink(RID, Some((DEVICE, weak)));
        sink
    }
}
