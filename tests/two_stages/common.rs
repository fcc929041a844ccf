// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Common parts of the machines: guest memory, two devices, and a host that fails.

use std::sync::Arc;

use twostage::iommufd::{
    FailNth, FaultQueue, HostIommu, HwptAlloc, HwptData, HwptFlags, ObjectId, UserMemory,
};
use twostage::spec::pci::Bdf;
use twostage_emulated::kit::Pages;
pub use twostage_emulated::kit::PAGE;
use twostage_emulated::EmulatedHost;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// The emulated host; one call of it can be made to fail, and the next one, too.
pub type Host = FailNth<FailNth<EmulatedHost>>;

/// Attaches `dev` to the tables of `data` on `pt`, by a HWPT whose page requests go to the returned
/// queue.
pub fn serve_page_requests(
    host: &Host,
    dev: ObjectId,
    pt: ObjectId,
    data: HwptData,
) -> Arc<dyn FaultQueue> {
    let queue = host.fault_queue_alloc().unwrap();
    let (flags, fault) = (HwptFlags::new().with_fault_id_valid(true), Some(queue.object()));
    let hwpt = host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault }).unwrap();
    host.device_attach(dev, None, hwpt).unwrap();
    queue
}

/// The guest's two devices.
pub const A: Bdf = Bdf::from_raw(0x20);
pub const B: Bdf = Bdf::from_raw(0x28);

/// Start and size of each region, in bytes.
const REGIONS: [(u64, usize); 2] = [(0, 16 << 20), (1 << 32, 4 << 20)];
/// The start of the region above 4 GiB.
pub const HIGH: u64 = REGIONS[1].0;
/// Its size.
pub const HIGH_SIZE: u64 = REGIONS[1].1 as u64;
/// Where page allocation starts.
const FIRST_FREE: u64 = 0x10_0000;

/// Guest memory. Every address is a GPA, in bytes.
#[derive(Clone)]
pub struct Memory {
    pub map: Arc<GuestMemoryMmap>,
    pub pages: Pages,
}

impl Memory {
    /// All regions; `mapped` is called for each with its start.
    ///
    /// # Errors
    /// The errors of `mapped`.
    pub fn new<E>(mut mapped: impl FnMut(u64, &UserMemory) -> Result<(), E>) -> Result<Self, E> {
        let region = |&(start, size)| {
            Arc::new(GuestRegionMmap::from_range(GuestAddress(start), size, None).unwrap())
        };
        let regions: Vec<_> = REGIONS.iter().map(region).collect();
        for ((start, _), region) in REGIONS.iter().zip(&regions) {
            mapped(*start, &UserMemory::whole(region.clone()))?;
        }
        let map = Arc::new(GuestMemoryMmap::from_arc_regions(regions).unwrap());
        Ok(Self::from_free(map, FIRST_FREE))
    }

    /// Other memory with the same contents below 4 GiB and the same free pages; `mapped` as in
    /// [`Self::new`].
    ///
    /// # Errors
    /// The errors of `mapped`.
    pub fn copied<E>(
        &self,
        mapped: impl FnMut(u64, &UserMemory) -> Result<(), E>,
    ) -> Result<Self, E> {
        let Self { map, .. } = Self::new(mapped)?;
        map.write_slice(&self.contents(), GuestAddress(0)).unwrap();
        Ok(Self::from_free(map, self.pages.free()))
    }

    fn from_free(map: Arc<GuestMemoryMmap>, free: u64) -> Self {
        Self { pages: Pages::new(map.clone(), free), map }
    }

    /// What is below the first free page.
    pub fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.pages.free() as usize];
        self.map.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}
