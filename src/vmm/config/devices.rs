// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The devices of a machine.

use std::path::PathBuf;

use crate::devices::virtio::{DiskAccess, MacAddress};

pub use crate::devices::virtio::MAX_QUEUES as MAX_DISK_QUEUES;

/// The virtual IOMMU of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum IommuChoice {
    /// Not given: the first one, if the machine has any.
    #[default]
    Unsaid,
    /// The first one.
    First,
    /// The one with this id.
    Named(String),
    /// None.
    Off,
}

/// A PCI device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceConfig {
    /// The educational device.
    Edu(EduConfig),
    /// A virtio block device.
    Disk(DiskConfig),
    /// A virtio network device.
    Net(NetConfig),
    /// A virtio entropy device.
    Rng(RngConfig),
    /// An assigned device of this machine.
    Vfio(VfioConfig),
}

impl DeviceConfig {
    /// The virtual IOMMU it is behind.
    pub fn iommu(&self) -> &IommuChoice {
        match self {
            Self::Edu(edu) => &edu.iommu,
            Self::Disk(disk) => &disk.iommu,
            Self::Net(net) => &net.iommu,
            Self::Rng(rng) => &rng.iommu,
            Self::Vfio(vfio) => &vfio.iommu,
        }
    }

    /// The id of the root port or bridge that it is behind; without, it is on bus 0.
    pub fn bus(&self) -> Option<&str> {
        let bus = match self {
            Self::Edu(edu) => &edu.bus,
            Self::Disk(disk) => &disk.bus,
            Self::Net(net) => &net.bus,
            Self::Rng(rng) => &rng.bus,
            Self::Vfio(vfio) => &vfio.bus,
        };
        bus.as_deref()
    }

    /// Whether it has the PASID capability.
    pub fn pasid(&self) -> bool {
        matches!(self, Self::Edu(EduConfig { pasid_bits: 1.., .. }))
    }

    /// Whether it has the ATS capability, which software can enable.
    pub fn ats(&self) -> bool {
        matches!(self, Self::Edu(EduConfig { ats: true, .. }))
    }

    /// Whether it has the PRI capability.
    pub fn pri(&self) -> bool {
        matches!(self, Self::Edu(EduConfig { pri: true, .. }))
    }

    /// Whether an SMMU can stall its transactions.
    pub fn stall(&self) -> bool {
        matches!(self, Self::Edu(EduConfig { stall: true, .. }))
    }

    /// The option that makes such a device.
    pub(super) fn option(&self) -> &'static str {
        match self {
            Self::Edu(_) => "--device",
            Self::Disk(_) => "--disk",
            Self::Net(_) => "--net",
            Self::Rng(_) => "--rng",
            Self::Vfio(_) => "--vfio",
        }
    }
}

/// A virtio block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The raw image, a file or a block device.
    pub path: PathBuf,
    /// How it is opened.
    pub access: DiskAccess,
    /// The number of its queues, 1 to [`MAX_DISK_QUEUES`].
    pub queues: u8,
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
    /// The id of the root port or bridge it is behind, if any.
    pub bus: Option<String>,
}

/// A virtio network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// What it is connected to.
    pub tap: TapConfig,
    /// Its address; by default derived from its number.
    pub mac: Option<MacAddress>,
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
    /// The id of the root port or bridge it is behind, if any.
    pub bus: Option<String>,
}

/// A host tap interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapConfig {
    /// By name.
    Name(String),
    /// By a file descriptor that the process inherited.
    Fd(i32),
}

/// A virtio entropy device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngConfig {
    /// The source of its bytes.
    pub source: PathBuf,
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
    /// The id of the root port or bridge it is behind, if any.
    pub bus: Option<String>,
}

/// A device of this machine, assigned to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VfioConfig {
    /// Its folder in sysfs (`/sys/bus/pci/devices/0000:01:00.0`), or its VFIO character device.
    pub path: PathBuf,
    /// Its name in reports and log lines; by default its path.
    pub id: Option<String>,
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
    /// The id of the root port or bridge it is behind, if any.
    pub bus: Option<String>,
}

impl VfioConfig {
    /// Its name in reports and log lines.
    pub fn name(&self) -> String {
        self.id.clone().unwrap_or_else(|| self.path.display().to_string())
    }
}

/// The educational device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EduConfig {
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
    /// The id of the root port or bridge it is behind, if any.
    pub bus: Option<String>,
    /// Width of its PASIDs, in bits, at most 20; 0: it has no PASID capability, and no register to
    /// select one.
    pub pasid_bits: u8,
    /// It has the ATS capability.
    pub ats: bool,
    /// It has the PRI capability, which needs ATS.
    pub pri: bool,
    /// An SMMU can stall its transactions, as of no other device on PCI: a device tree says so. Not
    /// with ATS.
    pub stall: bool,
    /// DMA addresses are masked with this.
    pub dma_mask: u64,
}

impl EduConfig {
    /// The default DMA mask.
    pub const DEFAULT_DMA_MASK: u64 = (1 << 28) - 1;
}

impl Default for EduConfig {
    fn default() -> Self {
        let dma_mask = Self::DEFAULT_DMA_MASK;
        let iommu = IommuChoice::Unsaid;
        Self { iommu, bus: None, pasid_bits: 0, ats: false, pri: false, stall: false, dma_mask }
    }
}
