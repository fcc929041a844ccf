// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vIOMMUs of the mock driver.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::abi::{self, ViommuInvalidate};
use super::devices::MockDevices;
use super::domain::{clear, MockNested};
use crate::emulated::device::Requester;
use crate::emulated::driver::{NestedDomain, Partial, UserArray, UserData, ViommuDriver};
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{Errno, HwptFlags};
use crate::spec::pci::Bdf;

/// A vIOMMU. Devices have a cache, which it invalidates.
#[derive(Debug)]
pub struct MockViommu {
    itself: Weak<Self>,
    devices: Arc<MockDevices>,
    /// By the id that the guest knows them by.
    vdevices: Mutex<BTreeMap<u64, Bdf>>,
}

impl MockViommu {
    /// A vIOMMU of `devices`, none of which the guest knows.
    pub fn new(devices: Arc<MockDevices>) -> Arc<Self> {
        let vdevices = Mutex::default();
        Arc::new_cyclic(|itself| Self { itself: itself.clone(), devices, vdevices })
    }

    /// The id that the guest knows the device `rid` by.
    pub fn virt_id(&self, rid: Bdf) -> Option<u64> {
        self.vdevices().iter().find(|(_, known)| **known == rid).map(|(virt_id, _)| *virt_id)
    }

    fn vdevices(&self) -> MutexGuard<'_, BTreeMap<u64, Bdf>> {
        self.vdevices.lock().unwrap_or_else(PoisonError::into_inner)
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
