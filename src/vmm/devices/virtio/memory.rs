// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as a device reaches it: by GPA, or by IOVA through the IOMMU.
#![forbid(unsafe_code)]

use std::sync::Arc;

use vm_memory::iommu::{Error, IotlbIterator};
use vm_memory::{GuestAddress, GuestMemoryMmap, Iommu, IommuMemory, Iotlb, Permissions};

use crate::emulated::{DmaAttributes, DmaPort, PortIommu};

/// The memory that one device reaches.
#[derive(Debug)]
pub struct DeviceMemory {
    memory: GuestMemoryMmap,
    /// Where its DMA enters the IOMMU, if it is behind one.
    port: Option<DmaPort>,
}

/// Guest memory for the length of one section.
pub type SectionMemory<'a> = IommuMemory<GuestMemoryMmap, DmaSection<'a>>;

impl DeviceMemory {
    /// The memory of a device that no IOMMU is in front of: addresses are GPAs.
    pub fn direct(memory: GuestMemoryMmap) -> Self {
        Self { memory, port: None }
    }

    /// The memory of a device behind an IOMMU: addresses are IOVAs, requests go through `port`.
    /// `memory` has the regions that the IOMMU's second stage leads to.
    pub fn behind_iommu(memory: GuestMemoryMmap, port: DmaPort) -> Self {
        Self { memory, port: Some(port) }
    }

    /// Whether the device is behind an IOMMU.
    pub fn is_behind_iommu(&self) -> bool {
        self.port.is_some()
    }

    /// Starts a section: until it is dropped, invalidations wait. It is for one bounded piece of
    /// work, without input, output or any other wait. Faults are reported at its end.
    pub fn section(&mut self) -> SectionMemory<'_> {
        let section = match &mut self.port {
            Some(port) => DmaSection::Behind(port.section(DmaAttributes::default())),
            None => DmaSection::Direct,
        };
        let translated = matches!(section, DmaSection::Behind(_));
        IommuMemory::new(self.memory.clone(), section, translated, ())
    }
}

/// What translates for one section.
#[derive(Debug)]
pub enum DmaSection<'a> {
    /// Nothing: memory is reached by GPA, and this is not asked.
    Direct,
    /// The IOMMU.
    Behind(PortIommu<'a>),
}

impl Iommu for DmaSection<'_> {
    type IotlbGuard<'b>
        = Arc<Iotlb>
    where
        Self: 'b;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        match self {
            Self::Direct => Err(Error::IommuMisconfigured { reason: "there is none".into() }),
            Self::Behind(port) => port.translate(iova, length, access),
        }
    }
}
