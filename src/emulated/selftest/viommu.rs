// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vIOMMUs of the mock driver.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use zerocopy::IntoBytes;

use super::abi::{self, ViommuData, ViommuInvalidate};
use super::devices::MockDevices;
use super::domain::{clear, MockNested};
use super::memory::unnamed_memory;
use crate::emulated::device::Requester;
use crate::emulated::driver::{
    HwQueueRequest, NestedDomain, Partial, UserArray, UserData, ViommuDriver, ViommuRequest,
};
use crate::emulated::events::ViommuEvents;
use crate::emulated::ioas::PAGE_SIZE;
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{Errno, HwptFlags, ObjectId};
use crate::spec::pci::Bdf;

/// Pages of a mock vIOMMU that its user can map.
const MMAP_PAGES: u64 = 2;

/// A vIOMMU. Devices have a cache, which it invalidates.
#[derive(Debug)]
pub struct MockViommu {
    itself: Weak<Self>,
    devices: Arc<MockDevices>,
    events: Arc<ViommuEvents>,
    /// By the id that the guest knows them by.
    vdevices: Mutex<BTreeMap<u64, Bdf>>,
    /// By number.
    queues: Mutex<BTreeMap<u32, ObjectId>>,
}

impl MockViommu {
    /// A vIOMMU of `devices`, none of which the guest knows. When the user gave data, the number in
    /// it is to be seen in the answer, and in the first of a few pages that can be mapped.
    ///
    /// # Errors
    /// `EINVAL` data of a wrong length; `EFAULT`; `ENOMEM` there is no memory for pages.
    pub fn new(devices: Arc<MockDevices>, request: &ViommuRequest<'_>) -> Outcome<Arc<Self>> {
        if let Some(data) = request.data {
            answer(data, request.mmap)?;
        }
        let (vdevices, queues) = (Mutex::default(), Mutex::default());
        let (events, itself) = (request.events.clone(), Weak::clone);
        Ok(Arc::new_cyclic(|weak| Self { itself: itself(weak), devices, events, vdevices, queues }))
    }

    /// Tells the user that something happened to the device it knows by `virt_id`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` nobody wants to know.
    pub fn report(&self, virt_id: u64) -> Outcome<()> {
        // The structure of the event has 32 bits of it.
        let event = (virt_id as u32).to_ne_bytes();
        self.events.report(abi::IOMMU_VEVENTQ_TYPE_SELFTEST, &event)
    }

    /// The id that the guest knows the device `rid` by.
    pub fn virt_id(&self, rid: Bdf) -> Option<u64> {
        self.vdevices().iter().find(|(_, known)| **known == rid).map(|(virt_id, _)| *virt_id)
    }

    fn vdevices(&self) -> MutexGuard<'_, BTreeMap<u64, Bdf>> {
        self.vdevices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queues(&self) -> MutexGuard<'_, BTreeMap<u32, ObjectId>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn invalidate_one(&self, entry: ViommuInvalidate) -> Outcome<()> {
        let ViommuInvalidate { flags, vdev_id, cache_id } = entry;
        // What is wrong with the entry itself comes before the device.
        clear(&mut [0; abi::MOCK_DEV_CACHE_NUM], flags, cache_id)?;
        match self.vdevices().get(&vdev_id.into()) {
            Some(rid) => {
                self.devices.change(*rid, |device| clear(&mut device.cache, flags, cache_id))
            }
            None => refuse(Errno::EINVAL, format!("there is no vDEVICE {vdev_id:#x}")),
        }
    }
}

impl ViommuDriver for MockViommu {
    fn alloc_nested(&self, _: HwptFlags, data: &dyn UserData) -> Outcome<Arc<dyn NestedDomain>> {
        Ok(Arc::new(MockNested::new(self.itself.upgrade(), data)?))
    }

    /// All entries are read before the first one is carried out; so a fault of the last is one of
    /// all.
    fn invalidate(&self, entries: &dyn UserArray) -> Result<(), Partial> {
        const TYPE: u64 = abi::IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST as u64;
        const LENGTH: usize = size_of::<ViommuInvalidate>();
        let count = entries.count();
        if entries.data_type() != TYPE {
            let refused = format!("no invalidations of type {:#x}", entries.data_type());
            return refuse(Errno::EINVAL, refused).map_err(Partial::from);
        }
        let all: Vec<[u8; LENGTH]> =
            (0..count).map(|index| extend(entries, index)).collect::<Outcome<_>>()?;
        for (done, bytes) in all.into_iter().enumerate() {
            let outcome = self.invalidate_one(zerocopy::transmute!(bytes));
            outcome.map_err(|refusal| Partial { done, refusal })?;
        }
        Ok(())
    }

    fn vdevice_init(&self, device: &Requester, virt_id: u64) -> Outcome<()> {
        self.vdevices().insert(virt_id, device.rid);
        Ok(())
    }

    fn vdevice_destroy(&self, virt_id: u64) {
        self.vdevices().remove(&virt_id);
    }

    fn has_hw_queue(&self, kind: u32) -> bool {
        kind == abi::IOMMU_HW_QUEUE_TYPE_SELFTEST
    }

    /// Each queue needs the one before it.
    fn hw_queue_init(&self, queue: &HwQueueRequest<'_>) -> Outcome<Option<ObjectId>> {
        let index = queue.index;
        if index >= abi::IOMMU_TEST_HW_QUEUE_MAX {
            return refuse(Errno::EINVAL, format!("there is no queue {index}"));
        }
        let mut queues = self.queues();
        let before = index.checked_sub(1).map(|before| queues.get(&before).copied());
        match (queues.get(&index), before) {
            (Some(_), _) => refuse(Errno::EEXIST, format!("queue {index} is in use")),
            (None, Some(None)) => refuse(Errno::EIO, format!("there is no queue before {index}")),
            (None, before) => {
                queues.insert(index, queue.id);
                Ok(before.flatten())
            }
        }
    }

    fn hw_queue_destroy(&self, id: ObjectId) {
        self.queues().retain(|_, queue| *queue != id);
    }
}

/// Answers the data of `VIOMMU_ALLOC`: the number in it, there and in pages that can be mapped.
fn answer(data: &dyn UserData, mmap: &dyn Fn(Arc<File>, u64) -> Outcome<u64>) -> Outcome<()> {
    const TYPE: u64 = abi::IOMMU_VIOMMU_TYPE_SELFTEST as u64;
    let bytes = data.read_struct::<{ size_of::<ViommuData>() }>(TYPE, ViommuData::MIN_SIZE)?;
    let ViommuData { in_data, .. } = zerocopy::transmute!(bytes);
    let length = MMAP_PAGES * PAGE_SIZE;
    let pages = unnamed_memory(length)?;
    if let Err(error) = pages.write_all_at(&in_data.to_ne_bytes(), 0) {
        return refuse(Errno::ENOMEM, format!("memory of {length:#x} bytes: {error}"));
    }
    let offset = mmap(Arc::new(pages), length)?;
    let answer =
        ViommuData { in_data, out_data: in_data, out_mmap_offset: offset, out_mmap_length: length };
    // As much as the user has.
    data.write(answer.as_bytes().get(..data.length()).unwrap_or(answer.as_bytes()))
}

/// The structure number `index`: a shorter one is extended with zeroes, and a longer one cut off
/// (`copy_struct_from_user`).
///
/// # Errors
/// `E2BIG` there is something in what would be cut off; `EFAULT`.
fn extend<const N: usize>(entries: &dyn UserArray, index: usize) -> Outcome<[u8; N]> {
    let mut bytes = vec![0; entries.entry_length()];
    // Neither factor has more than 32 bits.
    entries.read(index as u64 * bytes.len() as u64, &mut bytes)?;
    let known = bytes.len().min(N);
    let (known, excess) = bytes.split_at(known);
    if excess.iter().any(|byte| *byte != 0) {
        return refuse(Errno::E2BIG, format!("entry {index} has more than {N} bytes"));
    }
    let mut structure = [0; N];
    structure.iter_mut().zip(known).for_each(|(to, from)| *to = *from);
    Ok(structure)
}
