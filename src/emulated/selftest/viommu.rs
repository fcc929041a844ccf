// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vIOMMUs of the mock driver.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use zerocopy::IntoBytes;

use super::abi::{self, ViommuData, ViommuInvalidate};
use super::devices::{MockDevices, MockVdevices};
use super::domain::{clear, MockNested};
use crate::drivers::{
    HwQueueRequest, NestedDomain, Partial, UserArray, UserData, ViommuDriver, ViommuRequest,
};
use crate::host::device::Requester;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use twostage::iommufd::{Errno, HwptFlags, ObjectId};

/// Pages of a mock vIOMMU for mmap.
const MMAP_PAGES: u64 = 2;
/// A folder of files in memory.
const DIRECTORY: &str = "/dev/shm";

/// A vIOMMU. It invalidates the devices' caches.
#[derive(Debug)]
pub struct MockViommu {
    devices: Arc<MockDevices>,
    vdevices: Arc<MockVdevices>,
    /// By number.
    queues: Mutex<BTreeMap<u32, ObjectId>>,
}

impl MockViommu {
    /// A vIOMMU of `devices`, without vDEVICEs. If the user gave data, its number is returned in
    /// the answer, and in the first of a few pages that can be mapped.
    ///
    /// # Errors
    /// `EINVAL` data of a wrong length; `EFAULT`; `ENOMEM` there is no memory for pages.
    pub fn new(devices: Arc<MockDevices>, request: &ViommuRequest<'_>) -> Outcome<Self> {
        if let Some(data) = request.data {
            answer(data, request.mmap)?;
        }
        let vdevices = Arc::new(MockVdevices::new(request.events.clone()));
        Ok(Self { devices, vdevices, queues: Mutex::default() })
    }

    fn queues(&self) -> MutexGuard<'_, BTreeMap<u32, ObjectId>> {
        self.queues.lock()
    }

    fn invalidate_one(&self, entry: ViommuInvalidate) -> Outcome<()> {
        let ViommuInvalidate { flags, vdev_id, cache_id } = entry;
        // Errors of the entry precede those of the device.
        clear(&mut [0; abi::MOCK_DEV_CACHE_NUM], flags, cache_id)?;
        match self.vdevices.device(vdev_id.into()) {
            Some(rid) => {
                self.devices.change(rid, |device| clear(&mut device.cache, flags, cache_id))
            }
            None => refuse(Errno::EINVAL, format!("there is no vDEVICE {vdev_id:#x}")),
        }
    }
}

impl ViommuDriver for MockViommu {
    fn alloc_nested(&self, _: HwptFlags, data: &dyn UserData) -> Outcome<Arc<dyn NestedDomain>> {
        Ok(Arc::new(MockNested::new(Some(self.vdevices.clone()), data)?))
    }

    /// All entries are read before the first one is executed, so a fault in the last fails all.
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
        self.vdevices.add(virt_id, device.rid);
        Ok(())
    }

    fn vdevice_destroy(&self, virt_id: u64) {
        self.vdevices.remove(virt_id);
    }

    fn has_hw_queue(&self, kind: u32) -> bool {
        kind == abi::IOMMU_HW_QUEUE_TYPE_SELFTEST
    }

    /// Each queue depends on the previous one.
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

/// Answers the data of `VIOMMU_ALLOC`: the number in it, also in pages that can be mapped.
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
    // As much as the user has room for.
    data.write(answer.as_bytes().get(..data.length()).unwrap_or(answer.as_bytes()))
}

/// The structure number `index`: a shorter one is zero-extended, and a longer one truncated
/// (`copy_struct_from_user`).
///
/// # Errors
/// `E2BIG` the truncated part is not zero; `EFAULT`.
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

/// An unnamed file: `length` bytes of zeroes, in memory.
///
/// # Errors
/// `ENOMEM` not available.
fn unnamed_memory(length: u64) -> Outcome<File> {
    let open = || -> io::Result<File> {
        let mut options = File::options();
        let file = options.read(true).write(true).custom_flags(libc::O_TMPFILE).open(DIRECTORY)?;
        file.set_len(length)?;
        Ok(file)
    };
    open().or_else(|error| refuse(Errno::ENOMEM, format!("{DIRECTORY}: {error}")))
}
