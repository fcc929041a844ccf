// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From policies to attachments: where each requester's DMA is attached.

use super::nested::{Attached, Slot};
use super::shadow::refused_attach;
use super::state::{Device, Parent, State};
use crate::iommufd::{
    iommu_hwpt_vtd_s1, Errno, HwptAlloc, HwptData, HwptFlags, HwptVtdNested, HwptVtdSecondStage,
    ObjectId, VTD_S1_EAFE, VTD_S1_SRE, VTD_S1_WPE,
};
use crate::nesting::reader::QueueThread;
use crate::nesting::{NestingError, Result};
use crate::spec::pci::{Bdf, Pasid};
use crate::viommu::vtd::{
    DomainTag, Policy, RequesterConfig, Stage1, VtdFirstStage, VtdNested, VtdSecondStage,
};
use crate::viommu::Requester;
use crate::warn_limited;

/// Tables are aligned to 4 KiB. The kernel would take the low bits for flags of the PASID entry.
const TABLE_ALIGNMENT: u64 = 4096;

impl State {
    fn slot(&self, requester: Requester) -> Slot {
        self.nested.slots().get(requester)
    }

    /// See [`crate::viommu::vtd::VtdHostSide::configure`].
    pub fn configure(&mut self, requester: Requester, config: &RequesterConfig) -> Result<()> {
        let result = self.configure_one(requester, config);
        // Others may have been lost with a mirror that this one was to join. What could not even be
        // blocked has a name of its own, and is tried again before that is invalidated.
        let _ = self.starve_lost(Some(requester));
        result
    }

    /// [`State::configure`] without regard to others.
    pub fn configure_one(&mut self, requester: Requester, config: &RequesterConfig) -> Result<()> {
        if let Some(shadow) = self.shadow.as_mut() {
            shadow.feed(requester);
        }
        let applied = self.apply(requester, config);
        self.drop_prepared();
        let Err(error) = applied else { return Ok(()) };
        if matches!(error, NestingError::NotMirrored { .. }) {
            self.starve(requester, config, &error);
            // Blocked, it is served as well as its tables allow.
            return if self.is_reachable(requester) { Err(error) } else { Ok(()) };
        }
        self.block(requester);
        Err(error)
    }

    fn apply(&mut self, requester: Requester, config: &RequesterConfig) -> Result<()> {
        let Some(device) = self.devices.get(&requester.rid).copied() else {
            return match config.policy {
                Policy::Blocked(_) => Ok(()),
                _ => Err(NestingError::NoDevice(requester.rid)),
            };
        };
        if requester.pasid.is_some_and(|pasid| pasid.raw() == 0) {
            // On the host, attaching to PASID 0 means attaching the RID.
            return Err(NestingError::PasidZero(requester));
        }
        if self.slot(requester).unsettled {
            self.detach(requester)?;
        }
        let attached = self.slot(requester).attached;
        match config.policy {
            Policy::Blocked(_) if attached == Attached::Nothing => self.unchanged(),
            Policy::Blocked(_) => self.detach(requester),
            Policy::Bypass if attached == Attached::Parent => self.unchanged(),
            Policy::Bypass | Policy::Stage1(_) => match device.parent {
                Some(parent) => self.follow(requester, &device, parent, config),
                None => self.follow_first(requester, &device, config),
            },
        }
    }

    /// Attaches `requester` by its configuration, on `parent`.
    fn follow(
        &mut self,
        requester: Requester,
        device: &Device,
        parent: Parent,
        config: &RequesterConfig,
    ) -> Result<()> {
        match config.policy {
            Policy::Blocked(_) => self.detach(requester),
            Policy::Bypass => {
                let slot = Slot::on(Attached::Parent, 0);
                self.attach(requester, device, parent.hwpt, slot)
            }
            Policy::Stage1(stage1) => self.nest(requester, device, parent, stage1, config.tag),
        }
    }

    /// The same for the first attach of a device that may be behind the IOMMU of another: tries
    /// their nesting parents. So it is never attached to anything but what it is to follow.
    fn follow_first(
        &mut self,
        requester: Requester,
        device: &Device,
        config: &RequesterConfig,
    ) -> Result<()> {
        for parent in self.parents.fitting(&device.info) {
            match self.follow(requester, device, parent, config) {
                Ok(()) => {
                    self.set_parent(requester.rid, parent);
                    return Ok(());
                }
                Err(NestingError::Host { source, .. })
                    if source.errno == Errno::EINVAL && !self.is_reachable(requester) => {}
                Err(error) => return Err(error),
            }
        }
        // None fits, so it is the first behind its IOMMU; or the host refuses what the guest has
        // for it, and says the same. It keeps the parent then, too: another try costs none.
        let parent =
            self.parents.alloc(&mut self.objects, requester.rid, device.dev, &device.info)?;
        self.set_parent(requester.rid, parent);
        self.follow(requester, device, parent, config)
    }

    fn set_parent(&mut self, rid: Bdf, parent: Parent) {
        if let Some(device) = self.devices.get_mut(&rid) {
            device.parent = Some(parent);
        }
    }

    fn unchanged(&mut self) -> Result<()> {
        self.counters.unchanged += 1;
        Ok(())
    }

    /// Attaches `requester` to `stage1` on `parent`.
    fn nest(
        &mut self,
        requester: Requester,
        device: &Device,
        parent: Parent,
        stage1: Stage1,
        tag: DomainTag,
    ) -> Result<()> {
        let result = self.nest_as(requester, device, parent, stage1, tag);
        if !device.page_requests || self.is_reachable(requester) || !refuses(&result) {
            return result;
        }
        // Only an attach shows whether a device makes page requests: without, it may be served.
        let device = &Device { page_requests: false, ..*device };
        let without = self.nest_as(requester, device, parent, stage1, tag);
        if without.is_ok() {
            if let Some(device) = self.devices.get_mut(&requester.rid) {
                device.page_requests = false;
            }
            // Once, as it is not tried again.
            if let Err(error) = &result {
                let rid = requester.rid;
                log::info!("{rid}: the host takes no page requests of it, and gets none: {error}");
            }
            return without;
        }
        result
    }

    /// The same, with the host's fault queue if page requests of `device` are served.
    fn nest_as(
        &mut self,
        requester: Requester,
        device: &Device,
        parent: Parent,
        stage1: Stage1,
        tag: DomainTag,
    ) -> Result<()> {
        let parent = self.key(parent)?;
        let found = self.nested.hwpts.find(&(parent.hwpt, device.page_requests, stage1));
        let mut hwpt = match found {
            Some(hwpt) => hwpt,
            None => self.alloc_nested(requester, device, parent, stage1)?,
        };
        // The host caches under its own tag for each HWPT, the guest under a DomainTag for each
        // user. Under a tag that no other user of the HWPT has, nothing is cached in the guest's
        // view, so it need not have invalidated what the host still caches for the others.
        let adopts = found.is_some() && (!self.nested.knows(hwpt, tag) || self.is_unsettled(hwpt));
        let was_flushed = self.shadow.as_mut().is_some_and(|shadow| shadow.take_compared(hwpt));
        if adopts && !was_flushed {
            self.flush_everything(hwpt)?;
            if self.nested.stage1(hwpt).is_none() {
                // The last of its users was lost on the way, and it with that.
                hwpt = self.alloc_nested(requester, device, parent, stage1)?;
            }
        }
        let slot = Slot::on(Attached::Nested(hwpt), tag.domain);
        if self.slot(requester).attached != slot.attached {
            let attached = self.attachable(hwpt, requester, device);
            let attached = attached.and_then(|pt| self.attach(requester, device, pt, slot));
            attached.inspect_err(|_| self.destroy_unused(requester.rid, slot.attached))?;
            self.counters.nested_shares += u64::from(found.is_some());
        } else {
            self.nested.set(requester, slot);
            self.counters.unchanged += u64::from(!adopts);
        }
        self.nested.name(requester, tag);
        Ok(())
    }

    /// What the tables of devices on `parent` are told apart by: mirrors are shared by all.
    fn key(&self, parent: Parent) -> Result<Parent> {
        match self.shadow {
            Some(_) => Ok(Parent { hwpt: self.objects.ioas()?.id(), ..parent }),
            None => Ok(parent),
        }
    }

    /// Allocates the `HWPT_NESTED` of `stage1` on `parent`, without users.
    fn alloc_nested(
        &mut self,
        requester: Requester,
        device: &Device,
        parent: Parent,
        stage1: Stage1,
    ) -> Result<ObjectId> {
        check_pasid(requester, device)?;
        for table in stage1.tables() {
            if table % TABLE_ALIGNMENT != 0 {
                return Err(NestingError::UnalignedTable { requester, table });
            }
        }
        if self.shadow.is_some() {
            let mirror = self.add_mirror(requester, &stage1)?;
            self.nested.hwpts.insert(mirror, (parent.hwpt, false, stage1));
            self.counters.mirrors += 1;
            return Ok(mirror);
        }
        let data = match stage1 {
            Stage1::VtdFirstStage(first) => HwptData::VtdS1(vtd_s1(&first)),
            _ if !self.nests_second_stage() => {
                return Err(NestingError::GuestSecondStage(requester));
            }
            Stage1::VtdSecondStage(second) => HwptData::VtdSecondStage(vtd_ss(&second)),
            Stage1::VtdNested(VtdNested { first, second }) => {
                let (first, second) = (vtd_s1(&first), vtd_ss(&second));
                HwptData::VtdNested(HwptVtdNested { first, second })
            }
        };
        let pages = self.pages.as_ref().filter(|_| device.page_requests);
        let fault = pages.map(QueueThread::object);
        let args = HwptAlloc {
            flags: HwptFlags::new().with_pasid(parent.pasid).with_fault_id_valid(fault.is_some()),
            dev: device.dev,
            pt: parent.hwpt,
            data,
            fault,
        };
        let hwpt =
            self.objects.alloc_hwpt(&args, || format!("nesting the tables of {requester}"))?;
        self.counters.nested_allocs += 1;
        self.counters.ssade_allocs += u64::from(sets_flags_of_second_stage(&args.data));
        self.nested.hwpts.insert(hwpt, (parent.hwpt, device.page_requests, stage1));
        Ok(hwpt)
    }

    /// Attaches `requester` to `pt`, replacing its attachment. If the host refuses, the requester
    /// is blocked and `pt` is destroyed if unused.
    fn attach(
        &mut self,
        requester: Requester,
        device: &Device,
        pt: ObjectId,
        slot: Slot,
    ) -> Result<()> {
        check_pasid(requester, device)?;
        let before = self.slot(requester);
        let pasid = requester.pasid.map(Pasid::raw);
        if let Err(source) = self.objects.host().device_attach(device.dev, pasid, pt) {
            self.counters.refused_attaches += 1;
            // VT-d blocks before it checks, and never reverts; but iommufd still records the old
            // page table, and would ignore an attach of that one.
            self.nested.set(requester, Slot { unsettled: true, ..before });
            self.block(requester);
            self.destroy_unused(requester.rid, slot.attached);
            return Err(match (&self.shadow, slot.attached) {
                (Some(_), Attached::Nested(_)) => refused_attach(requester, source),
                _ => NestingError::Host { what: format!("attaching {requester}"), source },
            });
        }
        self.nested.set(requester, slot);
        self.counters.replaces += u64::from(before.attached != Attached::Nothing);
        self.destroy_unused(requester.rid, before.attached);
        Ok(())
    }

    /// Blocks `requester` as far as the host allows. A failure is retried when the requester is
    /// next configured or removed.
    pub fn block(&mut self, requester: Requester) {
        if let Err(error) = self.detach(requester) {
            warn_limited!("{requester} could not be blocked: {error}");
        }
    }

    /// Detaches `requester`: its DMA is blocked.
    pub fn detach(&mut self, requester: Requester) -> Result<()> {
        let slot = self.slot(requester);
        // A non-default slot belongs to a device.
        let Some(device) = self.devices.get(&requester.rid).copied() else { return Ok(()) };
        if slot == Slot::default() {
            return Ok(());
        }
        if let Err(source) = self.objects.detach(device.dev, requester.pasid.map(Pasid::raw)) {
            self.nested.set(requester, Slot { unsettled: true, ..slot });
            return Err(NestingError::Host { what: format!("detaching {requester}"), source });
        }
        self.nested.set(requester, Slot::default());
        self.destroy_unused(requester.rid, slot.attached);
        Ok(())
    }

    /// Destroys the `HWPT_NESTED` if unused; or of a mirror what only `rid` has used.
    fn destroy_unused(&mut self, rid: Bdf, attached: Attached) {
        let Attached::Nested(hwpt) = attached else { return };
        match (self.nested.hwpts.remove_unused(hwpt), &self.shadow) {
            (true, Some(_)) => self.end_mirror(hwpt),
            (true, None) => self.objects.destroy(hwpt),
            (false, Some(_)) => self.end_unused_of(hwpt, rid),
            (false, None) => {}
        }
    }

    /// Whether the host may let DMA of `requester` pass: it was attached and not detached since.
    pub fn is_reachable(&self, requester: Requester) -> bool {
        self.slot(requester) != Slot::default()
    }

    /// Blocks every PASID of `rid`. Failures are retried at a later call of this or of
    /// [`State::configure`].
    pub fn forget_pasids(&mut self, rid: Bdf) -> Result<()> {
        let mut result = Ok(());
        let mut next = self.nested.slots().pasid_from(rid, 0);
        while let Some(requester) = next {
            result = result.and(self.detach(requester));
            let after = requester.pasid.map_or(0, Pasid::raw) + 1;
            next = self.nested.slots().pasid_from(rid, after);
        }
        result
    }
}

/// Whether a host may have refused tables because of their fault queue: Linux has `ENODEV` for a
/// device without page requests, and `EINVAL` for a virtual function, which shares those of its
/// physical one.
fn refuses(result: &Result<()>) -> bool {
    let Err(NestingError::Host { source, .. }) = result else { return false };
    matches!(source.errno, Errno::ENODEV | Errno::EOPNOTSUPP | Errno::EINVAL)
}

/// For a device without PASIDs, Linux ignores an attach of a PASID and returns success.
fn check_pasid(requester: Requester, device: &Device) -> Result<()> {
    let bits = device.info.max_pasid_log2;
    match requester.pasid {
        Some(pasid) if pasid.raw().checked_shr(bits.into()).unwrap_or(0) != 0 => {
            Err(NestingError::PasidTooWide { requester, bits })
        }
        _ => Ok(()),
    }
}

fn vtd_ss(tables: &VtdSecondStage) -> HwptVtdSecondStage {
    HwptVtdSecondStage {
        pgtbl_addr: tables.table,
        addr_width: tables.address_width.bits().into(),
        accessed_dirty: tables.accessed_dirty,
    }
}

fn sets_flags_of_second_stage(data: &HwptData) -> bool {
    match data {
        HwptData::VtdSecondStage(second) => second.accessed_dirty,
        HwptData::VtdNested(nested) => nested.second.accessed_dirty,
        _ => false,
    }
}

fn vtd_s1(tables: &VtdFirstStage) -> iommu_hwpt_vtd_s1 {
    let flag = |set: bool, flag: u64| if set { flag } else { 0 };
    iommu_hwpt_vtd_s1 {
        flags: flag(tables.supervisor_requests, VTD_S1_SRE)
            | flag(tables.extended_accessed, VTD_S1_EAFE)
            | flag(tables.write_protect, VTD_S1_WPE),
        pgtbl_addr: tables.table,
        addr_width: tables.paging_mode.address_width().into(),
        __reserved: 0,
    }
}
