// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Properties of an emulated device that matter to an IOMMU and its driver.

use std::ops::RangeInclusive;

use twostage::spec::pci::Bdf;

/// An attachment slot of a device: the device itself (requests without PASID), or one PASID.
pub(crate) type Slot = Option<u32>;

/// Properties of an emulated device that matter to an IOMMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceConfig {
    /// Width of its PASIDs in bits; 0 without a PASID capability.
    pub pasid_bits: u8,
    /// It may request execute permission (PASID capability, Execute Permission Supported).
    pub pasid_exec: bool,
    /// It may request privileged access (PASID capability, Privileged Mode Supported).
    pub pasid_priv: bool,
    /// It has a device TLB (ATS).
    pub ats: bool,
    /// It sends page requests (PRI), which needs `ats`, and an IOMMU that takes them. While it, or
    /// a PASID of it, is attached to a HWPT with a fault queue, a DMA without a valid translation,
    /// or without permission, does not fault: the queue gets a page request, and the DMA continues
    /// after the response.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use twostage_emulated::{DeviceConfig, DmaAttributes, EmulatedHost, VtdUnit, VtdUnitConfig};
    /// use twostage::iommufd::*;
    /// use twostage::spec::pci::Bdf;
    /// use vm_memory::{GuestAddress, GuestRegionMmap};
    ///
    /// let host = EmulatedHost::new();
    /// let config = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
    /// let unit = host.add_unit(VtdUnit::new(config));
    /// let config = DeviceConfig::default().with_ats(true).with_pri(true);
    /// host.add_device("nic", unit, Bdf::new(0, 4, 0).expect("an address"), config)?;
    /// let (dev, pt) = (host.device_bind("nic")?, host.ioas_alloc()?);
    /// let queue = host.fault_queue_alloc()?;
    /// let (flags, fault) = (HwptFlags::new().with_fault_id_valid(true), Some(queue.object()));
    /// let hwpt = host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data: HwptData::None, fault })?;
    /// host.device_attach(dev, None, hwpt)?;
    ///
    /// let mut port = host.dma_port("nic").expect("the device");
    /// let attributes = DmaAttributes::default();
    /// let dma = std::thread::spawn(move || port.write(attributes, 0x8000, b"hello"));
    /// let group = loop {
    ///     match queue.next_group()? {
    ///         Some(group) => break group,
    ///         None => std::thread::yield_now(), // or be told: FaultQueue::watch
    ///     }
    /// };
    /// assert_eq!(group.requests[0].address, 0x8000);
    /// let page = GuestRegionMmap::<()>::from_range(GuestAddress(0), 4096, None)?;
    /// let memory = UserMemory::whole(Arc::new(page));
    /// host.ioas_map(pt, &memory, MapTarget::Fixed(0x8000), Protection::READ_WRITE)?;
    /// queue.respond(group.cookie, PageResponseCode::Success)?;
    /// assert_eq!(dma.join().expect("no panic"), Ok(()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub pri: bool,
    /// Its transactions can be stalled, by an SMMU that does that, while the user's stage 1 says so
    /// (CD.S): the fault queue of the user's tables gets a page request then, and the DMA continues
    /// after the response. Not for a device with `ats`, which an SMMU must not stall.
    pub stalls: bool,
    /// IOVAs, in bytes, inclusive, that no IOAS it is attached to can map, besides the MSI window
    /// (firmware's reserved memory regions).
    pub reserved: Vec<RangeInclusive<u64>>,
    /// Devices behind one IOMMU with the same number are one IOMMU group: they access the same
    /// memory, and only one iommufd at a time can own them. `None` for a group of its own.
    pub group: Option<u32>,
}

impl DeviceConfig {
    twostage::setters! {
        with_pasid_bits pasid_bits: u8;
        with_pasid_exec pasid_exec: bool;
        with_pasid_priv pasid_priv: bool;
        with_ats ats: bool;
        with_pri pri: bool;
        with_stalls stalls: bool;
        with_reserved reserved: Vec<RangeInclusive<u64>>;
        with_group group: Option<u32>;
    }
}

/// A device, for the driver of its IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Requester {
    /// Unique behind its IOMMU.
    pub rid: Bdf,
    pub config: DeviceConfig,
}
