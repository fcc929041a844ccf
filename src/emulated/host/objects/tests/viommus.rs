// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A driver with vIOMMUs and page requests, to test their rules; otherwise like that of VT-d.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use twostage::sync::Mutex;

use super::fake::Fake;
use crate::drivers::{
    Domain, Driver, DriverInfo, HwQueueRequest, NestedDomain, PagingDomain, Partial, UserArray,
    UserData, ViommuDriver, ViommuRequest, VtdDriver,
};
use crate::host::device::{Requester, Slot};
use crate::host::refusal::{refuse, Outcome};
use crate::units::stage2::Stage2;
use twostage::iommufd::{
    Errno, Extensions, FaultSink, HwptFlags, ObjectId, PageRequest, PageResponseCode, ViommuKind,
};

/// The type of everything that it supports.
pub const KIND: u32 = ViommuKind::ArmSmmuV3.number();
/// Its hardware queues: each depends on the previous one.
const HW_QUEUES: u32 = 2;

/// See the [module's documentation](self).
#[derive(Debug)]
pub struct WithViommus {
    vtd: Arc<VtdDriver>,
    fake: Arc<Fake>,
}

impl WithViommus {
    pub fn new(vtd: VtdDriver, fake: &Arc<Fake>) -> Self {
        Self { vtd: Arc::new(vtd), fake: fake.clone() }
    }
}

/// What VT-d attaches: without page requests.
fn plain(domain: &Domain) -> Domain {
    Domain { page_requests: false, ..domain.clone() }
}

impl Driver for WithViommus {
    fn info(&self) -> DriverInfo {
        self.vtd.info()
    }

    fn extensions(&self) -> Extensions {
        self.vtd.extensions()
    }

    fn pasid_bits(&self) -> u8 {
        self.vtd.pasid_bits()
    }

    fn reserved_regions(&self, device: &Requester) -> Vec<RangeInclusive<u64>> {
        self.vtd.reserved_regions(device)
    }

    fn dirty_tracking(&self, device: &Requester) -> bool {
        self.vtd.dirty_tracking(device)
    }

    fn alloc_paging(
        &self,
        device: &Requester,
        flags: HwptFlags,
        data: Option<&dyn UserData>,
    ) -> Outcome<Arc<dyn PagingDomain>> {
        self.vtd.alloc_paging(device, flags, data)
    }

    fn alloc_nested(
        &self,
        device: &Requester,
        parent: &Arc<dyn PagingDomain>,
        flags: HwptFlags,
        data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        self.vtd.alloc_nested(device, parent, flags, data)
    }

    fn has_viommu(&self, kind: u32) -> bool {
        kind == KIND
    }

    fn alloc_viommu(&self, request: &ViommuRequest<'_>) -> Outcome<Arc<dyn ViommuDriver>> {
        if let Some(data) = request.data {
            // A word is returned in the answer, with the mmap offset of a page that contains it.
            let words: [u8; 16] = data.read_struct(KIND.into(), 16)?;
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&words[..8], 0).unwrap();
            let offset = (request.mmap)(Arc::new(file), 0x2000)?;
            data.write(&[&words[..8], &offset.to_ne_bytes()].concat())?;
        }
        Ok(Arc::new(Viommu {
            driver: self.vtd.clone(),
            device: request.device.clone(),
            parent: request.parent.clone(),
            virt_ids: Mutex::default(),
            queues: Mutex::default(),
        }))
    }

    fn attach(
        &self,
        devices: &[&Requester],
        slot: Slot,
        new: &Domain,
        old: Option<&Domain>,
    ) -> Outcome<()> {
        self.vtd.attach(devices, slot, &plain(new), old.map(plain).as_ref())
    }

    fn detach(&self, devices: &[&Requester], slot: Slot, old: &Domain) {
        self.vtd.detach(devices, slot, &plain(old));
    }

    fn user_pasid_table(&self) -> bool {
        true
    }

    fn page_response(&self, _: &Requester, request: &PageRequest, code: PageResponseCode) {
        self.fake.answer(request, code);
    }

    fn block(&self, device: &Requester) {
        self.vtd.block(device);
    }

    fn stage2_changed(&self, stage2: &Arc<Stage2>) {
        self.vtd.stage2_changed(stage2);
    }

    fn set_fault_sink(&self, device: &Requester, sink: Option<(ObjectId, Weak<dyn FaultSink>)>) {
        self.vtd.set_fault_sink(device, sink);
    }
}

#[derive(Debug)]
struct Viommu {
    driver: Arc<VtdDriver>,
    device: Requester,
    parent: Arc<dyn PagingDomain>,
    /// The guest's names of its devices.
    virt_ids: Mutex<BTreeMap<u64, u16>>,
    /// By number.
    queues: Mutex<BTreeMap<u32, ObjectId>>,
}

impl ViommuDriver for Viommu {
    fn alloc_nested(
        &self,
        flags: HwptFlags,
        data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        self.driver.alloc_nested(&self.device, &self.parent, flags, data)
    }

    /// Entries are virtual IDs; unknown devices stop it.
    fn invalidate(&self, entries: &dyn UserArray) -> Result<(), Partial> {
        for done in 0..entries.count() {
            let refused = |refusal| Partial { done, refusal };
            let id = entries.read_entry(KIND.into(), done, 8).map_err(refused)?;
            let id = u64::from_ne_bytes(id);
            if !self.virt_ids.lock().contains_key(&id) {
                return refuse(Errno::EIO, "no such device").map_err(refused);
            }
        }
        Ok(())
    }

    fn vdevice_init(&self, device: &Requester, virt_id: u64) -> Outcome<()> {
        if virt_id == FORBIDDEN_ID {
            return refuse(Errno::ENODEV, "not this id");
        }
        self.virt_ids.lock().insert(virt_id, device.rid.raw());
        Ok(())
    }

    fn vdevice_destroy(&self, virt_id: u64) {
        assert!(self.virt_ids.lock().remove(&virt_id).is_some(), "{virt_id:#x}");
    }

    fn has_hw_queue(&self, kind: u32) -> bool {
        kind == KIND
    }

    fn hw_queue_init(&self, queue: &HwQueueRequest<'_>) -> Outcome<Option<ObjectId>> {
        assert_eq!(queue.kind, KIND);
        assert_eq!(queue.memory.user_va() % 0x1000, queue.base % 0x1000);
        let mut queues = self.queues.lock();
        if queue.index >= HW_QUEUES {
            return refuse(Errno::EINVAL, "no such queue");
        }
        if queues.contains_key(&queue.index) {
            return refuse(Errno::EEXIST, "the queue is there");
        }
        let before = queue.index.checked_sub(1).map(|before| queues.get(&before).copied());
        if before == Some(None) {
            return refuse(Errno::EIO, "the queue before it is not there");
        }
        queues.insert(queue.index, queue.id);
        Ok(before.flatten())
    }

    fn hw_queue_destroy(&self, id: ObjectId) {
        self.queues.lock().retain(|_, queue| *queue != id);
    }
}

/// This ID is refused for devices.
pub const FORBIDDEN_ID: u64 = 0xbad;
