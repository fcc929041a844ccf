// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as a device accesses it: by GPA, or by IOVA through the IOMMU, while it may make
//! requests.

use std::ops::Deref;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use crate::devices::{NotNow, Permit, RequestGate};
use twostage_emulated::{DmaMemory, DmaPort, DmaSection};

/// The memory that one device can access.
#[derive(Debug)]
pub struct DeviceMemory {
    memory: DmaMemory<GuestMemoryMmap>,
    gate: Arc<RequestGate>,
}

/// Guest memory during one section, as `virtio_queue` needs it for rings.
pub type SectionMemory<'a> = DmaSection<'a, GuestMemoryMmap>;

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
        Self { memory: DmaMemory::direct(memory), gate: Arc::default() }
    }

    /// The memory of a device behind an IOMMU: addresses are IOVAs, and requests go through `port`.
    /// `memory` has the regions that the IOMMU's second stage maps. Its gate is closed.
    pub fn behind_iommu(memory: GuestMemoryMmap, port: DmaPort) -> Self {
        Self { memory: DmaMemory::behind_iommu(memory, port), gate: Arc::default() }
    }

    /// The gate of every section.
    pub fn gate(&self) -> Arc<RequestGate> {
        self.gate.clone()
    }

    /// Whether the device is behind an IOMMU.
    pub fn is_behind_iommu(&self) -> bool {
        self.memory.is_behind_iommu()
    }

    /// Starts a section: until it is dropped, invalidations wait, and so does revoking
    /// the permission to make requests. It is for one bounded piece of work, without I/O or other
    /// waiting. Faults are reported at its end.
    ///
    /// # Errors
    /// The device may make no requests now.
    pub fn section(&mut self) -> Result<Section<'_>, NotNow> {
        let permit = self.gate.enter()?;
        Ok(Section { memory: self.memory.section(), _permit: permit })
    }
}
