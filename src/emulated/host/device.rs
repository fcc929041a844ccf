// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an emulated device is, as far as an IOMMU and its driver are concerned.

use std::ops::RangeInclusive;

use twostage::spec::pci::Bdf;

/// What of a device is attached: the device itself (requests without PASID), or one PASID of it.
pub(crate) type Slot = Option<u32>;

/// What an emulated device is, as far as an IOMMU is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Width of its PASIDs in bits; 0 when it has no PASID capability.
    pub pasid_bits: u8,
    /// It may ask to execute (PASID capability, Execute Permission Supported).
    pub pasid_exec: bool,
    /// It may ask for privileged access (PASID capability, Privileged Mode Supported).
    pub pasid_priv: bool,
    /// It has a device TLB (ATS).
    pub ats: bool,
    /// It asks for pages (PRI), which takes `ats`, and an IOMMU that takes page requests. While it,
    /// or a PASID of it, is attached to a HWPT with a fault queue, a DMA that meets a translation
    /// which is not there, or does not allow it, is no fault: the queue gets a page request, and
    /// the DMA goes on when that is answered.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use twostage_emulated::{DeviceConfig, DmaAttributes, EmulatedHost, VtdUnit, VtdUnitConfig};
    /// use twostage::iommufd::*;
    /// use twostage::spec::pci::Bdf;
    /// use vm_memory::{GuestAddress, GuestRegionMmap};
    ///
    /// let host = EmulatedHost::new();
    /// let config = VtdUnitConfig { device_tlb: true, page_requests: true, ..Default::default() };
    /// let unit = host.add_unit(VtdUnit::new(config));
    /// let config = DeviceConfig { ats: true, pri: true, ..Default::default() };
    /// host.add_device("nic", unit, Bdf::new(0, 4, 0).expect("an address"), config)?;
    /// let (dev, pt) = (host.device_bind("nic")?, host.ioas_alloc()?);
    /// let queue = host.fault_queue_alloc()?;
    /// let (flags, fault) = (HwptFlags::new().with_fault_id_valid(true), Some(queue.object()));
    /// let hwpt = host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data: HwptData::None, fault })?;
    /// host.device_attach(dev, None, hwpt)?;
    ///
    /// let mut port = host.dma_port("nic").expect("the device");
    /// let dma = std::thread::spawn(move || port.write(DmaAttributes::default(), 0x8000, b"hello"));
    /// let group = loop {
    ///     match queue.next_group()? {
    ///         Some(group) => break group,
    ///         None => std::thread::yield_now(), // or be told: FaultQueue::watch
    ///     }
    /// };
    /// assert_eq!(group.requests[0].address, 0x8000);
    /// let page = GuestRegionMmap::from_range(GuestAddress(0), 4096, None)?;
    /// let memory = UserMemory::whole(Arc::new(page));
    /// host.ioas_map(pt, &memory, MapTarget::Fixed(0x8000), Protection::READ_WRITE)?;
    /// queue.respond(group.cookie, PageResponseCode::Success)?;
    /// assert_eq!(dma.join().expect("no panic"), Ok(()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub pri: bool,
    /// IOVAs, in bytes and both ends included, that no IOAS it is attached to can map, besides the
    /// window of interrupt messages (firmware's reserved memory regions).
    pub reserved: Vec<RangeInclusive<u64>>,
    /// Devices behind one IOMMU with the same number are one IOMMU group: they reach the same
    /// memory, and one iommufd at most has them. `None` for a group of its own.
    pub group: Option<u32>,
}

/// A device as the driver of its IOMMU sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Requester {
    /// Unique behind its IOMMU.
    pub rid: Bdf,
    pub config: DeviceConfig,
}
