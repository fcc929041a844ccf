// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver of an SMMUv3, like Linux's: page tables filled from an IOAS are stage 1, or stage 2
//! for nesting parents; the user's stage 1 is nested through a vIOMMU, which takes commands of the
//! user's queue and reports events of its streams.

mod streams;
#[cfg(test)]
mod tests;
mod vsmmu;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use super::{
    own_nested, own_paging, CacheTags, Domain, Driver, DriverInfo, NestedDomain, OwnedTag,
    PagingDomain, UserData, ViommuDriver, ViommuRequest,
};
use crate::host::device::{Requester, Slot};
use crate::host::refusal::{refuse, Outcome};
use crate::units::hardware::CacheTag;
use crate::units::page_requests::PageRequests;
use crate::units::smmuv3::{SmmuV3Unit, StreamEntry};
use crate::units::stage2::{DirtyLog, Stage2};
use streams::{Master, Vmaster};
use twostage::iommufd::{Errno, Extensions, FaultSink, HwptFlags, ObjectId, ViommuKind};
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::translation::Granule;
use vsmmu::{SmmuNested, Vsmmu};

/// Linux's window for the doorbells of interrupt controllers (`MSI_IOVA_BASE`): no IOAS of a device
/// behind an SMMU can map anything else there.
const SW_MSI: RangeInclusive<u64> = 0x0800_0000..=0x080f_ffff;

/// SubstreamID bits of a linear context descriptor table (`CTXDESC_LINEAR_CDMAX`).
const LINEAR_SSID_BITS: u8 = 10;

/// Width of the host kernel's virtual addresses, in bits: the limit of its stage 1.
const HOST_VA_BITS: u8 = 48;

/// The driver of one SMMU.
#[derive(Debug)]
pub(crate) struct SmmuDriver {
    unit: Arc<SmmuV3Unit>,
    tags: Arc<CacheTags>,
    streams: Mutex<BTreeMap<u16, StreamState>>,
}

/// The attachments of a stream.
#[derive(Debug, Default)]
struct StreamState {
    master: Arc<Master>,
    /// The stage for requests without SubstreamID; none if blocked.
    stage: Option<Stage>,
    /// The SubstreamIDs with context descriptors of the host.
    substreams: BTreeSet<u32>,
}

impl SmmuDriver {
    /// The driver of `unit`, whose page tables get their tags from `tags`, which all units of the
    /// machine share.
    pub fn new(unit: Arc<SmmuV3Unit>, tags: Arc<CacheTags>) -> Self {
        Self { unit, tags, streams: Mutex::default() }
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<u16, StreamState>> {
        self.streams.lock()
    }

    /// The state of `device`, whose events are routed here from now on.
    fn stream<'a>(
        &self,
        streams: &'a mut BTreeMap<u16, StreamState>,
        device: &Requester,
    ) -> &'a mut StreamState {
        let sid = device.rid.raw();
        streams.entry(sid).or_insert_with(|| {
            let state = StreamState::default();
            self.unit.set_event_sink(sid, state.master.clone());
            state
        })
    }

    /// Whether both stages can translate together (`ARM_SMMU_FEAT_NESTING`).
    fn nests(&self) -> bool {
        self.unit.config().nesting
    }

    /// The stream table entry for `domain`, and the destination of events of `device`.
    fn prepare(
        &self,
        device: &Requester,
        slot: Slot,
        domain: &Domain,
        stream: &StreamState,
    ) -> Outcome<Prepared> {
        let paging = own_paging::<SmmuPaging>(&*domain.paging)?;
        let host = |stage1, ats| StreamEntry {
            tag: paging.tag(),
            stage2: domain.stage2.clone(),
            dirty: paging.dirty_log().cloned(),
            stage1,
            ats,
        };
        let Some(nested) = &domain.nested else {
            paging.check_unit(&self.unit)?;
            match (slot, paging.stage()) {
                (None, Stage::Two) if !stream.substreams.is_empty() => {
                    return refuse(Errno::EBUSY, "the device has PASIDs attached");
                }
                (Some(_), Stage::Two) => {
                    return refuse(Errno::EINVAL, "a PASID needs a page table of stage 1");
                }
                (Some(_), Stage::One) if stream.stage == Some(Stage::Two) => {
                    return refuse(
                        Errno::EINVAL,
                        "the device itself has no table of context descriptors of the host's",
                    );
                }
                _ => {}
            }
            let (stage, entry) = (paging.stage(), Some(host(None, true)));
            return Ok(Prepared { entry, stage, vmaster: None });
        };
        let nested = own_nested::<SmmuNested>(&**nested)?;
        if slot.is_some() {
            return refuse(Errno::EOPNOTSUPP, "a PASID of a nested page table is the user's");
        }
        paging.check_unit(&self.unit)?;
        if !stream.substreams.is_empty() {
            return refuse(Errno::EBUSY, "the device has PASIDs attached");
        }
        let vmaster = nested.vmaster(device)?;
        let entry = nested.stream_stage1().map(|stage1| host(stage1, nested.ats()));
        Ok(Prepared { entry, stage: Stage::Two, vmaster })
    }
}

/// A validated attachment.
struct Prepared {
    /// The stream table entry; none to abort.
    entry: Option<StreamEntry>,
    stage: Stage,
    vmaster: Option<Vmaster>,
}

impl Driver for SmmuDriver {
    fn info(&self) -> DriverInfo {
        DriverInfo::ArmSmmuV3(self.unit.config().info())
    }

    fn extensions(&self) -> Extensions {
        let extensions = Extensions::default().with_fault_reports(true);
        extensions.with_table_updates(true).with_smmu_faults(true)
    }

    fn pasid_bits(&self) -> u8 {
        let config = self.unit.config();
        match config.two_level_cd {
            true => config.ssid_bits(),
            false => config.ssid_bits().min(LINEAR_SSID_BITS),
        }
    }

    /// With updates of the dirty state (`ARM_SMMU_FEAT_HD`); walks are always coherent.
    fn dirty_tracking(&self, _: &Requester) -> bool {
        self.unit.config().httu() == Httu::Dirty
    }

    fn reserved_regions(&self, device: &Requester) -> Vec<RangeInclusive<u64>> {
        device.config.reserved.iter().cloned().chain([SW_MSI]).collect()
    }

    fn alloc_paging(
        &self,
        _: &Requester,
        flags: HwptFlags,
        data: Option<&dyn UserData>,
    ) -> Outcome<Arc<dyn PagingDomain>> {
        const PLAIN: HwptFlags = HwptFlags::new();
        const PARENT: HwptFlags = PLAIN.with_nest_parent(true);
        const PASID: HwptFlags = PLAIN.with_pasid(true);
        const DIRTY: HwptFlags = PLAIN.with_dirty_tracking(true);
        const DIRTY_PASID: HwptFlags = PASID.with_dirty_tracking(true);
        if data.is_some() {
            return refuse(Errno::EOPNOTSUPP, "a HWPT_PAGING takes no data");
        }
        let stage = match flags {
            PLAIN if self.nests() => Stage::One,
            PLAIN => Stage::Two,
            PARENT if self.nests() => Stage::Two,
            PASID | DIRTY | DIRTY_PASID if self.nests() => Stage::One,
            _ => {
                let detail =
                    format!("the SMMU has no page tables of flags {:#x}", flags.into_bits());
                return refuse(Errno::EOPNOTSUPP, detail);
            }
        };
        Ok(Arc::new(SmmuPaging::new(&self.unit, self.tags.next(), stage, flags.dirty_tracking())?))
    }

    fn nests_without_viommu(&self) -> bool {
        false
    }

    fn alloc_nested(
        &self,
        _: &Requester,
        _: &Arc<dyn PagingDomain>,
        _: HwptFlags,
        _: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        refuse(Errno::EOPNOTSUPP, "the SMMU nests page tables on a vIOMMU only")
    }

    fn has_viommu(&self, kind: u32) -> bool {
        let config = self.unit.config();
        // The user must not be able to bypass the caches by memory attributes.
        let coherent = config.canwbs || config.s2fwb;
        self.nests() && coherent && kind == ViommuKind::ArmSmmuV3.number()
    }

    fn alloc_viommu(&self, request: &ViommuRequest<'_>) -> Outcome<Arc<dyn ViommuDriver>> {
        let parent = own_paging::<SmmuPaging>(&**request.parent)?;
        parent.check_unit(&self.unit)?;
        Ok(Arc::new(Vsmmu::new(&self.unit, parent.tag(), request.parent, request.events)))
    }

    fn attach(
        &self,
        devices: &[&Requester],
        slot: Slot,
        new: &Domain,
        _: Option<&Domain>,
    ) -> Outcome<()> {
        let mut streams = self.streams();
        let mut prepared = Vec::with_capacity(devices.len());
        for device in devices {
            let stream = self.stream(&mut streams, device);
            prepared.push(self.prepare(device, slot, new, stream)?);
        }
        for (device, Prepared { entry, stage, vmaster }) in devices.iter().zip(prepared) {
            let sid = device.rid.raw();
            match entry {
                Some(entry) => self.unit.install(sid, slot, entry),
                None => self.unit.remove(sid, slot),
            }
            let stream = self.stream(&mut streams, device);
            match slot {
                None => {
                    stream.stage = Some(stage);
                    stream.master.set_vmaster(vmaster);
                }
                Some(pasid) => {
                    stream.substreams.insert(pasid);
                }
            }
        }
        Ok(())
    }

    fn detach(&self, devices: &[&Requester], slot: Slot, _: &Domain) {
        let mut streams = self.streams();
        for device in devices {
            let stream = self.stream(&mut streams, device);
            match slot {
                None => {
                    stream.stage = None;
                    stream.master.set_vmaster(None);
                }
                Some(pasid) => {
                    stream.substreams.remove(&pasid);
                }
            }
            self.unit.remove(device.rid.raw(), slot);
        }
    }

    fn block(&self, device: &Requester) {
        let mut streams = self.streams();
        let stream = self.stream(&mut streams, device);
        stream.stage = None;
        stream.master.set_vmaster(None);
        self.unit.remove(device.rid.raw(), None);
    }

    fn user_pasid_table(&self) -> bool {
        true
    }

    /// A device that makes none can still have a page table with a fault queue, as in Linux.
    fn page_requests(&self, device: &Requester) -> Option<&PageRequests> {
        match device.config.stalls {
            true => self.unit.stalled(),
            false => self.unit.page_requests().filter(|_| device.config.pri),
        }
    }

    fn stage2_changed(&self, stage2: &Arc<Stage2>) {
        self.unit.stage2_changed(stage2);
    }

    fn set_fault_sink(&self, device: &Requester, sink: Option<(ObjectId, Weak<dyn FaultSink>)>) {
        self.stream(&mut self.streams(), device).master.set_fault_sink(sink);
    }
}

/// The stage of a page table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Stage 1, with a context descriptor of the host's.
    One,
    /// Stage 2.
    Two,
}

/// Tables that an SMMU fills from an IOAS.
#[derive(Debug)]
struct SmmuPaging {
    /// The SMMU that can use them.
    unit: Arc<SmmuV3Unit>,
    tag: OwnedTag,
    stage: Stage,
    granule: Granule,
    /// The dirty state of its pages, if that is updated.
    dirty: Option<Arc<DirtyLog>>,
}

impl SmmuPaging {
    /// Tables of `stage` for `unit`, with updates of the dirty state if `dirty`.
    ///
    /// # Errors
    /// `ENOMEM` the SMMU has no granule, as in Linux.
    fn new(unit: &Arc<SmmuV3Unit>, tag: OwnedTag, stage: Stage, dirty: bool) -> Outcome<Self> {
        // The granule of the host's pages if supported, otherwise the next larger.
        let has = |granule: &Granule| unit.config().has_granule(*granule);
        let Some(granule) = Granule::ALL.into_iter().find(has) else {
            return refuse(Errno::ENOMEM, "the SMMU has no granule");
        };
        // HA and HD are in the context descriptor from the start: there is no other switch.
        let dirty = dirty.then(|| Arc::new(DirtyLog::always(granule.size())));
        Ok(Self { unit: unit.clone(), tag, stage, granule, dirty })
    }

    /// Tag of what is cached of them: the VMID of a stage 2.
    fn tag(&self) -> CacheTag {
        self.tag.tag()
    }

    /// Their stage.
    fn stage(&self) -> Stage {
        self.stage
    }

    /// Checks that they are for `unit`.
    ///
    /// # Errors
    /// `EINVAL` they are another's.
    fn check_unit(&self, unit: &Arc<SmmuV3Unit>) -> Outcome<()> {
        if Arc::ptr_eq(&self.unit, unit) {
            return Ok(());
        }
        refuse(Errno::EINVAL, "the page table is for another SMMU")
    }
}

impl PagingDomain for SmmuPaging {
    fn aperture(&self) -> RangeInclusive<u64> {
        let bits = match self.stage {
            Stage::One => HOST_VA_BITS,
            Stage::Two => self.unit.config().output_bits(),
        };
        // At most 52 bits.
        0..=(1 << bits) - 1
    }

    fn page_size(&self) -> u64 {
        self.granule.size()
    }

    fn page_sizes(&self) -> u64 {
        // Pages of level 3 and blocks of level 2; of level 1 too with the smallest granule.
        let large = if self.granule == Granule::K4 { self.granule.level_size(1) } else { 0 };
        self.granule.size() | self.granule.level_size(2) | large
    }

    fn only_writable(&self) -> bool {
        false
    }

    fn dirty_log(&self) -> Option<&Arc<DirtyLog>> {
        self.dirty.as_ref()
    }

    fn enforces_coherency(&self) -> bool {
        self.unit.config().canwbs
    }
}
