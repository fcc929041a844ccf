// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hardware that only records calls, and a host around it.

use std::sync::{Arc, Weak};
use twostage::sync::Mutex;

use vm_memory::{GuestAddress, GuestRegionMmap};

use super::viommus::WithViommus;
use crate::drivers::VtdDriver;
use crate::units::hardware::{CacheRange, CacheTag, Hardware, Translation, UserTables};
use crate::units::stage2::Stage2;
use crate::{DeviceConfig, EmulatedHost, Machine, UnitId};
use twostage::iommufd::{
    iommu_hw_info_vtd, iommu_hwpt_vtd_s1, Errno, Extensions, FaultSink, HostIommu, HwptAlloc,
    HwptData, HwptFlags, MapTarget, ObjectId, PageRequest, PageResponseCode, Protection,
    UserMemory,
};
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::regs::{Cap, Ecap};

/// The recorded calls.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    /// The user's top table, if there is one.
    Install(u16, Option<u32>, Option<u64>),
    Remove(u16, Option<u32>),
    Invalidate(CacheTag, CacheRange),
    /// Of the second stage below a first one.
    InvalidateSecondStage(CacheTag, CacheRange),
    Stage2Changed,
    FaultSink(u16, Option<ObjectId>),
}

/// An IOMMU that translates nothing.
#[derive(Debug)]
pub struct Fake {
    pub info: iommu_hw_info_vtd,
    pub pasid_bits: u8,
    /// Its driver has vIOMMUs of one type and page requests, unlike that of VT-d.
    pub viommus: bool,
    pub extensions: Extensions,
    told: Mutex<Vec<Told>>,
    answered: Mutex<Vec<(u64, PageResponseCode)>>,
}

impl Fake {
    /// An IOMMU in scalable mode with all features that Linux uses, 48 bits wide.
    pub fn able() -> Self {
        let ecap = Ecap::new().with_smts(true).with_fsts(true).with_ssts(true).with_nest(true);
        let ecap = ecap.with_ssads(true).with_smpwcs(true);
        Self::new(Cap::new().with_mgaw(47).with_sagaw(0b0110), ecap)
    }

    /// The same, with vIOMMUs.
    pub fn with_viommus() -> Self {
        Self { viommus: true, ..Self::able() }
    }

    pub fn new(cap: Cap, ecap: Ecap) -> Self {
        Self {
            info: iommu_hw_info_vtd {
                flags: 1,
                cap_reg: cap.into_bits(),
                ecap_reg: ecap.into_bits(),
                ..Default::default()
            },
            pasid_bits: 20,
            viommus: false,
            extensions: Extensions::default()
                .with_guest_second_stage(true)
                .with_fault_reports(true),
            told: Mutex::default(),
            answered: Mutex::default(),
        }
    }

    /// The calls since the last time.
    pub fn told(&self) -> Vec<Told> {
        std::mem::take(&mut self.told.lock())
    }

    /// The responses to page requests since the last time, with their addresses.
    pub fn answered(&self) -> Vec<(u64, PageResponseCode)> {
        std::mem::take(&mut self.answered.lock())
    }

    pub fn answer(&self, request: &PageRequest, code: PageResponseCode) {
        self.answered.lock().push((request.address, code));
    }

    fn tell(&self, told: Told) {
        self.told.lock().push(told);
    }
}

impl Hardware for Fake {
    fn info(&self) -> iommu_hw_info_vtd {
        self.info
    }

    fn walks(&self, tables: &UserTables) -> bool {
        match tables {
            UserTables::FirstStage(tables) => tables.addr_width == 48,
            UserTables::SecondStage(_) | UserTables::Nested(_) => {
                self.extensions.guest_second_stage
            }
        }
    }

    fn pasid_bits(&self) -> u8 {
        self.pasid_bits
    }

    fn extensions(&self) -> Extensions {
        self.extensions
    }

    fn install(&self, rid: u16, pasid: Option<u32>, translation: Translation) {
        let table = translation.tables.map(|tables| match tables {
            UserTables::FirstStage(tables) => tables.pgtbl_addr,
            UserTables::SecondStage(tables) => tables.pgtbl_addr,
            UserTables::Nested(tables) => tables.first.pgtbl_addr,
        });
        self.tell(Told::Install(rid, pasid, table));
    }

    fn remove(&self, rid: u16, pasid: Option<u32>) {
        self.tell(Told::Remove(rid, pasid));
    }

    fn invalidate(&self, tag: CacheTag, ranges: &[CacheRange]) {
        for range in ranges {
            self.tell(Told::Invalidate(tag, *range));
        }
    }

    fn invalidate_second_stage(&self, tag: CacheTag, ranges: &[CacheRange]) {
        for range in ranges {
            self.tell(Told::InvalidateSecondStage(tag, *range));
        }
    }

    fn stage2_changed(&self, _: &Arc<Stage2>) {
        self.tell(Told::Stage2Changed);
    }

    fn set_fault_sink(&self, rid: u16, sink: Option<(ObjectId, Weak<dyn FaultSink>)>) {
        self.tell(Told::FaultSink(rid, sink.map(|(dev, _)| dev)));
    }
}

fn add_hardware(machine: &Machine, fake: &Arc<Fake>) -> UnitId {
    let driver = VtdDriver::new(fake.clone(), machine.cache_tags());
    match fake.viommus {
        false => machine.add_driver(Arc::new(driver)),
        true => machine.add_driver(Arc::new(WithViommus::new(driver, fake))),
    }
}

/// A host with two devices behind one IOMMU and a third behind another.
pub struct Bench {
    pub host: Arc<EmulatedHost>,
    pub fake: Arc<Fake>,
    pub other: Arc<Fake>,
}

pub const RID_A: u16 = 0x20;
pub const RID_B: u16 = 0x28;

/// Abbreviation for flags.
pub const PLAIN: HwptFlags = HwptFlags::new();
pub const PARENT: HwptFlags = HwptFlags::new().with_nest_parent(true);
pub const PASID: HwptFlags = HwptFlags::new().with_pasid(true);

impl Bench {
    pub fn new() -> Self {
        Self::of(Fake::able(), Fake::able())
    }

    /// A bench whose IOMMUs have vIOMMUs.
    pub fn with_viommus() -> Self {
        Self::of(Fake::with_viommus(), Fake::with_viommus())
    }

    pub fn of(fake: Fake, other: Fake) -> Self {
        Self::in_group(fake, other, None)
    }

    /// A bench whose first two devices are one IOMMU group.
    pub fn grouped() -> Self {
        Self::in_group(Fake::able(), Fake::able(), Some(7))
    }

    fn in_group(fake: Fake, other: Fake, group: Option<u32>) -> Self {
        let (host, fake, other) = (EmulatedHost::new(), Arc::new(fake), Arc::new(other));
        let unit = add_hardware(host.machine(), &fake);
        let far = add_hardware(host.machine(), &other);
        let config = || DeviceConfig { pasid_bits: 16, group, ..DeviceConfig::default() };
        let add = |name: &str, unit: UnitId, rid: u16| {
            host.add_device(name, unit, Bdf::from_raw(rid), config()).unwrap();
        };
        add("a", unit, RID_A);
        add("b", unit, RID_B);
        add("far", far, 0x20);
        Self { host, fake, other }
    }

    pub fn bind(&self, name: &str) -> ObjectId {
        let dev = self.host.device_bind(name).unwrap();
        self.fake.told();
        self.other.told();
        dev
    }

    pub fn ioas(&self) -> ObjectId {
        self.host.ioas_alloc().unwrap()
    }

    /// Maps fresh memory at `iova`.
    pub fn map(&self, ioas: ObjectId, iova: u64, length: u64) -> twostage::iommufd::Result<u64> {
        let target = MapTarget::Fixed(iova);
        self.host.ioas_map(ioas, &memory(length), target, Protection::READ_WRITE)
    }

    pub fn paging(&self, dev: ObjectId, pt: ObjectId, flags: HwptFlags) -> Outcome {
        self.host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data: HwptData::None, fault: None })
    }

    pub fn nested(&self, dev: ObjectId, pt: ObjectId, flags: HwptFlags, table: u64) -> Outcome {
        let data = HwptData::VtdS1(s1(table));
        self.host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault: None })
    }

    pub fn unmapped(&self, ioas: ObjectId) -> u64 {
        self.host.ioas_unmap(ioas, 0, u64::MAX).unwrap()
    }
}

type Outcome = twostage::iommufd::Result<ObjectId>;

pub fn s1(pgtbl_addr: u64) -> iommu_hwpt_vtd_s1 {
    iommu_hwpt_vtd_s1 { pgtbl_addr, addr_width: 48, ..Default::default() }
}

/// Memory with its own mapping, page-aligned.
pub fn memory(length: u64) -> UserMemory {
    let length = usize::try_from(length).unwrap();
    UserMemory::whole(Arc::new(
        GuestRegionMmap::<()>::from_range(GuestAddress(0), length, None).unwrap(),
    ))
}

/// The errno of a verb that must fail.
pub trait Failure {
    fn errno(self) -> Errno;
}

impl<T: std::fmt::Debug> Failure for twostage::iommufd::Result<T> {
    fn errno(self) -> Errno {
        self.unwrap_err().errno
    }
}
