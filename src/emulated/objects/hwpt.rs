// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hardware page tables: `IOMMU_HWPT_ALLOC`.

use std::collections::BTreeMap;
use std::fmt;

use super::device::Device;
use super::driver::PagingDomain;
use super::machine::UnitId;
use super::{Object, Objects};
use crate::emulated::hardware::{CacheTag, Translation, UserTables};
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{Errno, HwptData, HwptFlags, ObjectId};

/// How often devices behind each IOMMU are attached to a HWPT; no entry is 0.
#[derive(Debug, Default)]
pub(crate) struct Attachments(BTreeMap<UnitId, u32>);

impl Attachments {
    /// One more behind `unit`.
    pub fn add(&mut self, unit: UnitId) {
        *self.0.entry(unit).or_default() += 1;
    }

    /// One less behind `unit`.
    pub fn sub(&mut self, unit: UnitId) {
        if let Some(count) = self.0.get_mut(&unit) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&unit);
            }
        }
    }

    /// The IOMMUs that may cache something of the HWPT.
    pub fn units(&self) -> impl Iterator<Item = UnitId> + '_ {
        self.0.keys().copied()
    }
}

/// A HWPT_PAGING: filled from its IOAS.
#[derive(Debug)]
pub(crate) struct HwptPaging {
    pub ioas: ObjectId,
    pub tag: CacheTag,
    pub domain: PagingDomain,
    pub flags: HwptFlags,
    /// Made by an attachment to the IOAS; vanishes with its last attachment.
    pub automatic: bool,
    pub attached: Attachments,
}

/// A HWPT_NESTED: tables that the user owns, on top of a HWPT_PAGING. It has no IOAS of its own.
#[derive(Debug)]
pub(crate) struct HwptNested {
    /// The nesting parent.
    pub parent: ObjectId,
    /// The vIOMMU it was made from, which then holds the parent in its stead.
    pub viommu: Option<ObjectId>,
    pub tag: CacheTag,
    /// Never [`HwptData::None`].
    pub data: HwptData,
    pub flags: HwptFlags,
    pub attached: Attachments,
}

/// Where the user's data comes from: read only when everything before it has been found good.
pub(crate) type UserData<'a> = &'a dyn Fn() -> Outcome<HwptData>;

/// Arguments of `IOMMU_HWPT_ALLOC`.
#[derive(Clone, Copy)]
pub(crate) struct HwptRequest<'a> {
    pub flags: HwptFlags,
    pub dev: ObjectId,
    pub pt: ObjectId,
    pub fault: Option<ObjectId>,
    /// `None` for data of no length.
    pub data: Option<UserData<'a>>,
}

impl fmt::Debug for HwptRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HwptRequest")
            .field("flags", &self.flags)
            .field("dev", &self.dev)
            .field("pt", &self.pt)
            .finish_non_exhaustive()
    }
}

impl Objects {
    /// `IOMMU_HWPT_ALLOC`.
    pub fn hwpt_alloc(&mut self, request: &HwptRequest<'_>) -> Outcome<ObjectId> {
        let unit = self.table.device(request.dev)?.unit;
        match self.table.get(request.pt) {
            Some(Object::Ioas(_)) => {
                let domain = self.paging_domain(unit, request.flags, request.data.is_some())?;
                self.check_room(request.pt, &domain)?;
                check_fault_queue(request)?;
                self.add_paging(request.pt, domain, request.flags, false)
            }
            Some(Object::HwptPaging(_)) => {
                let data = self.nested_on_parent(unit, request)?;
                check_fault_queue(request)?;
                self.add_nested(request.pt, None, request.flags, data)
            }
            Some(Object::Viommu(viommu)) => {
                if viommu.unit != unit {
                    return refuse(
                        Errno::EINVAL,
                        format!(
                            "device {} is not behind the IOMMU of vIOMMU {}",
                            request.dev, request.pt
                        ),
                    );
                }
                let parent = viommu.parent;
                let data = self.nested_data(unit, request)?;
                check_fault_queue(request)?;
                self.add_nested(parent, Some(request.pt), request.flags, data)
            }
            Some(other) => {
                let kind = other.kind();
                refuse(Errno::EINVAL, format!("no HWPT can be made on {kind} {}", request.pt))
            }
            // Linux looks the page table up without saying ENOENT.
            None => refuse(Errno::EINVAL, format!("there is no object {}", request.pt)),
        }
    }

    /// An automatic HWPT for `dev` on `ioas`.
    pub(super) fn add_automatic(&mut self, ioas: ObjectId, unit: UnitId) -> Outcome<ObjectId> {
        let domain = self.paging_domain(unit, HwptFlags::new(), false)?;
        self.check_room(ioas, &domain)?;
        self.add_paging(ioas, domain, HwptFlags::new(), true)
    }

    /// The page table that the driver of `unit` makes for `flags`.
    fn paging_domain(
        &self,
        unit: UnitId,
        flags: HwptFlags,
        has_data: bool,
    ) -> Outcome<PagingDomain> {
        let driver = &self.machine.unit(unit)?.driver;
        if flags.unknown() != 0 {
            return refuse(Errno::EOPNOTSUPP, format!("flags {:#x}", flags.into_bits()));
        }
        if flags.dirty_tracking() && !driver.dirty_tracking() {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU cannot track dirty pages");
        }
        if flags.fault_id_valid() && flags.nest_parent() {
            return refuse(Errno::EOPNOTSUPP, "a nesting parent has no fault queue");
        }
        if has_data {
            return refuse(Errno::EOPNOTSUPP, "a HWPT_PAGING takes no data");
        }
        driver.paging_domain(flags)
    }

    /// Whether `ioas` can be filled into `domain` as it is.
    fn check_room(&self, ioas: ObjectId, domain: &PagingDomain) -> Outcome<()> {
        let space = &self.table.ioas(ioas)?.space;
        space.check_alignment(domain.smallest_page())?;
        space.check_reservable(&domain.outside())
    }

    /// Adds a HWPT_PAGING that [`Self::check_room`] found room for.
    fn add_paging(
        &mut self,
        ioas: ObjectId,
        domain: PagingDomain,
        flags: HwptFlags,
        automatic: bool,
    ) -> Outcome<ObjectId> {
        let tag = self.next_tag();
        let attached = Attachments::default();
        let hwpt = HwptPaging { ioas, tag, domain, flags, automatic, attached };
        let id = self.table.insert(Object::HwptPaging(hwpt))?;
        if let Err(refusal) = self.fill(ioas, &domain) {
            self.table.remove(id);
            self.tags.remove(&tag.0);
            return Err(refusal);
        }
        let object = self.table.ioas_mut(ioas)?;
        object.hwpts.push(id);
        object.space.reserve(id, &domain.outside());
        self.table.hold(ioas);
        self.align(ioas)?;
        Ok(id)
    }

    /// Checks a HWPT_NESTED straight on a HWPT_PAGING, and reads its data.
    fn nested_on_parent(&self, unit: UnitId, request: &HwptRequest<'_>) -> Outcome<HwptData> {
        let parent = self.table.hwpt_paging(request.pt)?;
        check_nested_flags(request)?;
        if parent.automatic || !parent.domain.nest_parent {
            return refuse(
                Errno::EINVAL,
                format!("HWPT_PAGING {} was not allocated with NEST_PARENT", request.pt),
            );
        }
        if !self.machine.unit(unit)?.driver.nest() {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU has no nested translation");
        }
        self.nested_data(unit, request)
    }

    /// Checks flags, and reads the data, of a HWPT_NESTED.
    fn nested_data(&self, unit: UnitId, request: &HwptRequest<'_>) -> Outcome<HwptData> {
        let read = check_nested_flags(request)?;
        let data = read()?;
        match self.machine.unit(unit)?.hardware.accepts(&data) {
            // What the driver looks at only when a device is attached.
            Ok(()) | Err(Errno::EINVAL) => Ok(data),
            Err(errno) => refuse(errno, "the IOMMU does not have this format of tables"),
        }
    }

    fn add_nested(
        &mut self,
        parent: ObjectId,
        viommu: Option<ObjectId>,
        flags: HwptFlags,
        data: HwptData,
    ) -> Outcome<ObjectId> {
        let tag = self.next_tag();
        let attached = Attachments::default();
        let hwpt = HwptNested { parent, viommu, tag, data, flags, attached };
        let id = self.table.insert(Object::HwptNested(hwpt))?;
        self.table.hold(viommu.unwrap_or(parent));
        Ok(id)
    }

    /// The HWPT_PAGING whose IOAS `hwpt` translates to: itself, or its parent.
    pub(super) fn stage2_of(&self, hwpt: ObjectId) -> Outcome<&HwptPaging> {
        match self.table.get(hwpt) {
            Some(Object::HwptNested(nested)) => self.table.hwpt_paging(nested.parent),
            _ => self.table.hwpt_paging(hwpt),
        }
    }

    /// The flags `hwpt` was allocated with.
    pub(super) fn hwpt_flags(&self, hwpt: ObjectId) -> Outcome<HwptFlags> {
        match self.table.get(hwpt) {
            Some(Object::HwptNested(nested)) => Ok(nested.flags),
            _ => self.table.hwpt_paging(hwpt).map(|paging| paging.flags),
        }
    }

    /// The attachments of `hwpt`, to change them.
    pub(super) fn attached_mut(&mut self, hwpt: ObjectId) -> Outcome<&mut Attachments> {
        if let Some(Object::HwptNested(_)) = self.table.get(hwpt) {
            return self.table.hwpt_nested_mut(hwpt).map(|nested| &mut nested.attached);
        }
        self.table.hwpt_paging_mut(hwpt).map(|paging| &mut paging.attached)
    }

    /// What the hardware is to know of `hwpt`.
    pub(super) fn translation(&self, hwpt: ObjectId) -> Outcome<Translation> {
        let paging = self.stage2_of(hwpt)?;
        let stage2 = self.table.ioas(paging.ioas)?.stage2.clone();
        let (tag, tables) = match self.table.get(hwpt) {
            Some(Object::HwptNested(nested)) => (nested.tag, user_tables(&nested.data)),
            _ => (paging.tag, None),
        };
        Ok(Translation { tag, tables, stage2 })
    }

    /// Whether the IOMMU of `device` can use `hwpt`.
    pub(super) fn check_driver(&self, device: &Device, hwpt: ObjectId) -> Outcome<()> {
        let unit = self.machine.unit(device.unit)?;
        unit.driver.compatible(&self.stage2_of(hwpt)?.domain)?;
        let Some(Object::HwptNested(nested)) = self.table.get(hwpt) else { return Ok(()) };
        if let Some(viommu) = nested.viommu {
            if self.table.viommu(viommu)?.unit != device.unit {
                return refuse(
                    Errno::EINVAL,
                    format!("the device is not behind the IOMMU of vIOMMU {viommu}"),
                );
            }
        }
        match unit.hardware.accepts(&nested.data) {
            Ok(()) => Ok(()),
            Err(_) => {
                refuse(Errno::EINVAL, format!("the device's IOMMU cannot walk {:x?}", nested.data))
            }
        }
    }

    fn next_tag(&mut self) -> CacheTag {
        // After 2^32 allocations tags come round; those still alive are left out.
        loop {
            self.last_tag = self.last_tag.wrapping_add(1);
            if self.tags.insert(self.last_tag) {
                return CacheTag(self.last_tag);
            }
        }
    }
}

fn user_tables(data: &HwptData) -> Option<UserTables> {
    match data {
        HwptData::None => None,
        HwptData::VtdS1(tables) => Some(UserTables::VtdFirstStage(*tables)),
        HwptData::VtdSecondStage(tables) => Some(UserTables::VtdSecondStage(*tables)),
    }
}

fn check_nested_flags<'a>(request: &HwptRequest<'a>) -> Outcome<UserData<'a>> {
    let other = request.flags.with_fault_id_valid(false).with_pasid(false).into_bits();
    if other != 0 {
        return refuse(Errno::EOPNOTSUPP, format!("a HWPT_NESTED cannot have flags {other:#x}"));
    }
    match request.data {
        Some(read) => Ok(read),
        None => refuse(Errno::EOPNOTSUPP, "a HWPT_NESTED needs data"),
    }
}

/// There are no fault queues yet, so none can be named.
fn check_fault_queue(request: &HwptRequest<'_>) -> Outcome<()> {
    if request.flags.fault_id_valid() {
        return refuse(Errno::ENOENT, format!("there is no fault queue {:?}", request.fault));
    }
    Ok(())
}
