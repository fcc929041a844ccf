// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the unit as a whole, and a small machine to do them on.

mod attachments;
mod first_stage;
mod reference;
mod sanitizer;
mod second_stage;
mod sections;
mod staleness;

use std::cell::Cell;
use std::sync::{Arc, Mutex, Weak};

use vm_memory::{GuestAddress, GuestRegionMmap};

use super::*;
use crate::emulated::hardware::UserTables;
use crate::emulated::stage2::Mapping;
use crate::emulated::{DmaAccess, DmaAttributes, DmaError, DmaPort};
use crate::iommufd::{iommu_hwpt_vtd_s1, HwptVtdSecondStage, Protection, UserMemory};
use crate::spec::pci::Bdf;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::first_stage::{index, page_size, FirstStageEntry};

/// Requester id of the machine's device.
pub const RID: u16 = 0x0018;
/// Device object of the machine's device.
pub const DEVICE: ObjectId = ObjectId(7);
/// A request without PASID.
pub const PLAIN: DmaAttributes = DmaAttributes { pasid: None, privileged: false, execute: false };

/// GPA where the first half of guest memory starts. It lies in the second half of the region, so
/// that whoever takes a GPA for an offset reads something else.
pub const LOW: u64 = 0x0010_0000;
/// GPA where the second half starts: aligned to 1 GiB.
pub const HIGH: u64 = 0x4000_0000;
/// Bytes of each half.
pub const HALF: u64 = 8 << 20;
/// GPA of a page that stage 2 maps for reading only.
pub const READ_ONLY: u64 = 0x5000_0000;
/// GPA that stage 2 does not map.
pub const NOWHERE: u64 = 0x6000_0000;

/// Leaf bits for a page that a user may read and write, with its flags set already.
pub const RW: u64 = 0x67;
/// Bits of a pointer to a table, flag set.
pub const TABLE: u64 = 0x27;

/// Guest memory, a unit, and tables that a guest might have written.
#[derive(Debug)]
pub struct Machine {
    pub unit: Arc<VtdUnit>,
    pub stage2: Arc<Stage2>,
    region: Arc<GuestRegionMmap>,
    next_table: Cell<u64>,
}

impl Machine {
    pub fn new(config: VtdUnitConfig) -> Self {
        let unit = VtdUnit::new(config);
        let length = 2 * HALF + 0x1000;
        let region =
            GuestRegionMmap::from_range(GuestAddress(0x10_0000_0000), length as usize, None);
        let machine = Self {
            unit,
            stage2: Arc::default(),
            region: Arc::new(region.unwrap()),
            next_table: Cell::new(LOW),
        };
        machine.map_stage2(LOW, HALF, HALF, Protection::READ_WRITE);
        machine.map_stage2(HIGH, 0, HALF, Protection::READ_WRITE);
        machine.map_stage2(READ_ONLY, 2 * HALF, 0x1000, Protection::READ_ONLY);
        machine
    }

    pub fn map_stage2(&self, gpa: u64, offset: u64, length: u64, protection: Protection) {
        let memory = UserMemory::new(Arc::clone(&self.region), offset, length).unwrap();
        let last = gpa + length - 1;
        self.stage2.insert(Mapping { start: gpa, last, memory, protection });
    }

    pub fn port(&self) -> DmaPort {
        self.unit.port(RID)
    }

    /// Where `gpa` is in the region.
    fn offset(&self, gpa: u64) -> usize {
        let mapping = self.stage2.lookup(gpa).expect("a GPA of the machine");
        mapping.target(gpa).1 as usize
    }

    pub fn poke(&self, gpa: u64, word: u64) {
        let slot: &std::sync::atomic::AtomicU64 =
            vm_memory::VolatileMemory::get_atomic_ref(&**self.region, self.offset(gpa)).unwrap();
        slot.store(word.to_le(), std::sync::atomic::Ordering::SeqCst);
    }

    pub fn peek(&self, gpa: u64) -> u64 {
        let slot: &std::sync::atomic::AtomicU64 =
            vm_memory::VolatileMemory::get_atomic_ref(&**self.region, self.offset(gpa)).unwrap();
        u64::from_le(slot.load(std::sync::atomic::Ordering::SeqCst))
    }

    /// GPA of a new, empty table.
    pub fn table(&self) -> u64 {
        let gpa = self.next_table.replace(self.next_table.get() + 0x1000);
        assert!(gpa < LOW + HALF);
        gpa
    }

    /// GPA of the entry of `level` on the way of `iova` from the top table `root` of `levels`,
    /// making tables that are missing, their pointers with the bits `pointer`.
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

    /// Maps the page of `level` at `iova` to `gpa` with the leaf bits `bits`; gives the leaf's GPA.
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
        self.install(pasid, tag, Some(UserTables::VtdFirstStage(data)));
    }

    /// Attaches the device (or its `pasid`) to second-stage tables that it owns.
    pub fn attach_second_stage(&self, pasid: Option<u32>, tag: u32, root: u64, levels: u8) {
        let addr_width = 12 + 9 * u32::from(levels);
        let data = HwptVtdSecondStage { pgtbl_addr: root, addr_width };
        self.install(pasid, tag, Some(UserTables::VtdSecondStage(data)));
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

    /// What a one-byte read gives: the fault's reason and whether it was stage 2's, or the GPA
    /// that the byte is at, found by what is stored there.
    pub fn read_u64(&self, port: &mut DmaPort, attributes: DmaAttributes, iova: u64) -> Outcome {
        let mut bytes = [0; 8];
        port.read(attributes, iova, &mut bytes).map(|()| u64::from_le_bytes(bytes)).map_err(fault)
    }

    pub fn write_u64(
        &self,
        port: &mut DmaPort,
        attributes: DmaAttributes,
        iova: u64,
        word: u64,
    ) -> Outcome {
        port.write(attributes, iova, &word.to_le_bytes()).map(|()| word).map_err(fault)
    }
}

/// The word read or written; or why the request was blocked, and whether by stage 2.
pub type Outcome = Result<u64, (FaultReason, bool)>;

/// The reason of a fault; anything else fails the test.
pub fn fault(error: DmaError) -> (FaultReason, bool) {
    match error {
        DmaError::Fault { reason: DmaFaultReason::Vtd(reason), stage2, .. } => (reason, stage2),
        other => panic!("{other}"),
    }
}

/// A request with PASID.
pub fn pasid(pasid: u32) -> DmaAttributes {
    DmaAttributes { pasid: Some(pasid), ..PLAIN }
}

/// A request with PASID for supervisor privilege.
pub fn supervisor(pasid: u32) -> DmaAttributes {
    DmaAttributes { pasid: Some(pasid), privileged: true, execute: false }
}

/// All pages, tables too.
pub const ALL: CacheRange = CacheRange::All;

/// The page of `address`.
pub fn page(address: u64, leaf: bool) -> CacheRange {
    CacheRange::Pages { address: address & !0xfff, pages: 1, leaf }
}

/// A sink that keeps what it gets.
#[derive(Debug, Default)]
pub struct Sink(Mutex<Vec<HostFault>>);

impl Sink {
    /// What it got, emptying it.
    pub fn take(&self) -> Vec<HostFault> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl FaultSink for Sink {
    fn dma_fault(&self, fault: &HostFault) {
        self.0.lock().unwrap().push(*fault);
    }
}

impl Machine {
    /// A sink for the device's faults.
    pub fn sink(&self) -> Arc<Sink> {
        let sink = Arc::new(Sink::default());
        let weak: Weak<Sink> = Arc::downgrade(&sink);
        self.unit.set_fault_sink(RID, Some((DEVICE, weak)));
        sink
    }
}
