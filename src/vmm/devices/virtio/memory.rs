// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as a device accesses it: by GPA, or by IOVA through the IOMMU.

use std::ops::Deref;
use std::sync::Arc;

use vm_memory::iommu::{Error, IotlbIterator};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Iommu, IommuMemory, Iotlb, Permissions};

use crate::devices::{NotNow, Permit, RequestGate};
use twostage_emulated::{DmaAttributes, DmaPort, PortIommu};

/// The memory that one device can access.
#[derive(Debug)]
pub struct DeviceMemory {
    memory: GuestMemoryMmap,
    /// Where its DMA enters the IOMMU, if it is behind one.
    port: Option<DmaPort>,
    gate: Arc<RequestGate>,
}

/// Guest memory during one section, as `virtio_queue` needs it for rings.
pub type SectionMemory<'a> = IommuMemory<GuestMemoryMmap, DmaSection<'a>>;

/// A section: while it exists, revoking the permission to make requests waits.
#[derive(Debug)]
pub struct Section<'a> {
    memory: SectionMemory<'a>,
    _permit: Permit<'a>,
}

impl<'a> Deref for Section<'a> {
    type Target = SectionMemory<'a>;

    fn deref(&self) -> &Self::Target {
        &self.memory
    }
}

impl DeviceMemory {
    /// The memory of a device without an IOMMU: addresses are GPAs. Its gate is closed.
    pub fn direct(memory: GuestMemoryMmap) -> Self {
        Self { memory, port: None, gate: Arc::default() }
    }

    /// The memory of a device behind an IOMMU: addresses are IOVAs, and requests go through `port`.
    /// `memory` has the regions that the IOMMU's second stage maps. Its gate is closed.
    pub fn behind_iommu(memory: GuestMemoryMmap, port: DmaPort) -> Self {
        Self { memory, port: Some(port), gate: Arc::default() }
    }

    /// The gate of every section.
    pub fn gate(&self) -> Arc<RequestGate> {
        self.gate.clone()
    }

    /// Whether the device is behind an IOMMU.
    pub fn is_behind_iommu(&self) -> bool {
        self.port.is_some()
    }

    /// Access to buffers: until it is dropped, revoking the permission to make requests waits. It
    /// is for one bounded piece of work, without I/O or other waiting.
    ///
    /// # Errors
    /// The device may make no requests now.
    pub fn buffers(&mut self) -> Result<Buffers<'_>, NotNow> {
        let permit = self.gate.enter()?;
        Ok(Buffers { memory: &self.memory, port: self.port.as_mut(), _permit: permit })
    }

    /// Starts a section, for rings: until it is dropped, invalidations wait, and so does revoking
    /// the permission to make requests. It is for one bounded piece of work, without I/O or other
    /// waiting. Faults are reported at its end.
    ///
    /// # Errors
    /// The device may make no requests now.
    pub fn section(&mut self) -> Result<Section<'_>, NotNow> {
        let permit = self.gate.enter()?;
        let section = match &mut self.port {
            Some(port) => DmaSection::Behind(port.section(DmaAttributes::default())),
            None => DmaSection::Direct,
        };
        let translated = matches!(section, DmaSection::Behind(_));
        let memory = IommuMemory::new(self.memory.clone(), section, translated, ());
        Ok(Section { memory, _permit: permit })
    }
}

/// The buffers of a device. Behind an IOMMU, IOVAs are translated by the port only.
#[derive(Debug)]
pub struct Buffers<'a> {
    memory: &'a GuestMemoryMmap,
    port: Option<&'a mut DmaPort>,
    _permit: Permit<'a>,
}

impl Buffers<'_> {
    /// Reads memory at `address` into `data`. Returns whether it can be accessed.
    pub fn read(&mut self, address: u64, data: &mut [u8]) -> bool {
        match &mut self.port {
            Some(port) => port.read(DmaAttributes::default(), address, data).is_ok(),
            None => self.memory.read_slice(data, GuestAddress(address)).is_ok(),
        }
    }

    /// Writes `data` to memory at `address`. Returns whether it can be accessed; if not, some bytes
    /// may have been written.
    pub fn write(&mut self, address: u64, data: &[u8]) -> bool {
        match &mut self.port {
            Some(port) => port.write(DmaAttributes::default(), address, data).is_ok(),
            None => self.memory.write_slice(data, GuestAddress(address)).is_ok(),
        }
    }
}

/// The translation of one section.
#[derive(Debug)]
pub enum DmaSection<'a> {
    /// None: memory is accessed by GPA, and this is not called.
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
