// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a machine. The command line is one way to fill it in.

mod check;
mod devices;
mod error;
mod places;

use std::path::PathBuf;

use crate::arch::layout::IOMMU_REGISTERS;
use twostage::nesting::vtd::Nesting;
use twostage::spec::smmuv3::regs::{self, Httu};
use twostage::spec::smmuv3::translation::Granule;
use twostage::viommu::vtd::MMIO_SIZE;

pub use devices::{
    DeviceConfig, DiskConfig, EduConfig, IommuChoice, NetConfig, RngConfig, TapConfig, VfioConfig,
    MAX_DISK_QUEUES,
};
pub use error::ConfigError;
#[cfg(target_arch = "x86_64")]
pub use error::MAX_DEVICES;
pub(crate) use places::{BridgePlace, Place};
pub use places::{PciBridgeConfig, RootPortConfig};

/// Linux's iommufd.
pub const DEV_IOMMU: &str = "/dev/iommu";

/// A whole machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// What it boots.
    pub payload: PayloadConfig,
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// The virtual IOMMUs.
    pub iommus: Vec<IommuConfig>,
    /// PCI devices: those on bus 0 from 00:01.0 up.
    pub devices: Vec<DeviceConfig>,
    /// PCIe root ports, after the devices on bus 0.
    pub root_ports: Vec<RootPortConfig>,
    /// Bridges from PCI Express to conventional PCI.
    pub pci_bridges: Vec<PciBridgeConfig>,
    /// Whether configuration space is at I/O ports, too (PCI 3.0 §3.2.2.3.2). PCs have such ports.
    pub pci_ports: bool,
    /// The serial port's backend.
    pub serial: SerialConfig,
    /// The trace file, if any.
    pub trace: Option<PathBuf>,
}

impl MachineConfig {
    /// The name of the virtual IOMMU `number`: its id, or `vtd` or `smmu` and its number from 0.
    pub fn iommu_id(&self, number: usize) -> String {
        let iommu = self.iommus.get(number);
        let id = iommu.and_then(|iommu| iommu.id.clone());
        id.unwrap_or_else(|| match iommu.map(|iommu| &iommu.model) {
            Some(IommuModel::SmmuV3(_)) => format!("smmu{number}"),
            _ => format!("vtd{number}"),
        })
    }

    /// The address of the registers of the virtual IOMMU `number`: as configured, or the default
    /// address plus the size of those before it.
    pub fn iommu_address(&self, number: usize) -> u64 {
        let address = self.iommus.get(number).and_then(|iommu| iommu.address);
        let before: u64 =
            self.iommus.iter().take(number).map(|iommu| iommu.model.registers()).sum();
        address.unwrap_or_else(|| IOMMU_REGISTERS.saturating_add(before))
    }

    /// The number of the virtual IOMMU selected by `choice`; `None` for no IOMMU, or an unknown
    /// one.
    pub fn iommu_of(&self, choice: &IommuChoice) -> Option<usize> {
        let numbers = 0..self.iommus.len();
        match choice {
            IommuChoice::Off => None,
            IommuChoice::Unsaid | IommuChoice::First => numbers.into_iter().next(),
            IommuChoice::Named(id) => {
                numbers.into_iter().find(|number| self.iommu_id(*number) == *id)
            }
        }
    }

    /// The number of the virtual IOMMU that remaps the interrupts of `device`, if interrupts are
    /// remapped: the one it is behind. On a PC, the first one for a virtio device that is behind
    /// none: Linux gives no MSIs to a function in no unit's scope, and virtio has nothing else.
    /// This is harmless, as the driver knows that its DMA is not translated (no
    /// VIRTIO_F_ACCESS_PLATFORM). An SMMU has no part in interrupts, and does not see devices that
    /// are not behind it.
    pub fn interrupt_iommu_of(&self, device: &DeviceConfig) -> Option<usize> {
        let pc = self.iommus.iter().all(|iommu| iommu.model.vtd().is_some());
        match device {
            DeviceConfig::Edu(_) | DeviceConfig::Vfio(_) => self.iommu_of(device.iommu()),
            virtio if !pc => self.iommu_of(virtio.iommu()),
            virtio => self.iommu_of(virtio.iommu()).or_else(|| self.iommu_of(&IommuChoice::First)),
        }
    }

    /// The kernel's `/dev/iommu`, if the machine uses it: that of a virtual IOMMU, or the default
    /// one for an assigned device behind none.
    pub fn kernel_host(&self) -> Option<PathBuf> {
        let said = self.iommus.iter().find_map(|iommu| match &iommu.host {
            HostChoice::Kernel(path) => Some(path.clone()),
            HostChoice::Emulated => None,
        });
        let assigned = |device: &DeviceConfig| matches!(device, DeviceConfig::Vfio(_));
        said.or_else(|| self.devices.iter().any(assigned).then(|| DEV_IOMMU.into()))
    }

    /// Whether interrupts are remapped, if any virtual IOMMU's options say so.
    pub fn interrupt_remapping(&self) -> Option<bool> {
        self.iommus.iter().find_map(|iommu| iommu.model.vtd()?.interrupt_remapping)
    }
}

/// The payload of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PayloadConfig {
    /// A kernel that [`arch::boot`](crate::arch::boot) supports: on a PC, a bzImage, an ELF64 image
    /// with a PVH entry, or an ELF32 image with a Multiboot header.
    pub kernel: PathBuf,
    /// The kernel's initial file system. For a Multiboot or PVH kernel it is the first module, with
    /// the kernel's command line.
    pub initramfs: Option<PathBuf>,
    /// The modules of a Multiboot or PVH kernel, after that.
    pub modules: Vec<ModuleConfig>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// A file for a kernel that takes several, such as a hypervisor and its first guest's kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleConfig {
    /// The file.
    pub path: PathBuf,
    /// Its command line.
    pub cmdline: String,
}

/// A virtual IOMMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IommuConfig {
    /// Its name for devices; by default see [`MachineConfig::iommu_id`].
    pub id: Option<String>,
    /// Guest-physical address of the registers; by default see [`MachineConfig::iommu_address`].
    pub address: Option<u64>,
    /// The host that translates.
    pub host: HostChoice,
    /// Its model.
    pub model: IommuModel,
    /// Whether a side core serves it.
    pub side_core: SideCoreConfig,
}

/// A side core: a thread that serves the queues of virtual IOMMUs, instead of vCPUs that exit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SideCoreConfig {
    /// When it does.
    pub choice: SideCoreChoice,
    /// The processor that the thread is bound to, if any.
    pub cpu: Option<usize>,
}

/// When a side core serves a virtual IOMMU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SideCoreChoice {
    /// Never.
    #[default]
    Off,
    /// While the guest invalidates anything.
    On,
    /// While the guest invalidates a lot, and a processor is free for it.
    Auto,
}

/// The model of a virtual IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IommuModel {
    /// Intel VT-d.
    Vtd(VtdOptions),
    /// Arm SMMUv3.
    SmmuV3(SmmuV3Options),
}

impl Default for IommuModel {
    fn default() -> Self {
        Self::Vtd(VtdOptions::default())
    }
}

impl IommuModel {
    /// Its name in `--iommu`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Vtd(_) => "vtd",
            Self::SmmuV3(_) => "smmuv3",
        }
    }

    /// Length of its registers, in bytes.
    pub fn registers(&self) -> u64 {
        match self {
            Self::Vtd(_) => MMIO_SIZE,
            Self::SmmuV3(_) => regs::SIZE,
        }
    }

    /// Alignment of its registers, in bytes.
    pub fn page(&self) -> u64 {
        match self {
            Self::Vtd(_) => MMIO_SIZE,
            Self::SmmuV3(_) => regs::PAGE_SIZE,
        }
    }

    /// Whether it offers device TLBs (ATS).
    pub fn ats(&self) -> bool {
        match self {
            Self::Vtd(vtd) => vtd.ats,
            Self::SmmuV3(smmu) => smmu.ats,
        }
    }

    /// Whether it takes page requests (PRI).
    pub fn page_requests(&self) -> bool {
        match self {
            Self::Vtd(vtd) => vtd.pri,
            Self::SmmuV3(smmu) => smmu.pri,
        }
    }

    /// Whether it stalls transactions that fault.
    pub fn stalls(&self) -> bool {
        matches!(self, Self::SmmuV3(SmmuV3Options { stall: true, .. }))
    }

    /// Its options, if it is a VT-d.
    pub fn vtd(&self) -> Option<&VtdOptions> {
        match self {
            Self::Vtd(vtd) => Some(vtd),
            Self::SmmuV3(_) => None,
        }
    }

    /// Width of PASIDs (SubstreamIDs), in bits; 0 for none, `None` for the host's.
    pub fn pasid_bits(&self) -> Option<u8> {
        match self {
            Self::Vtd(vtd) => vtd.pasid_bits,
            Self::SmmuV3(smmu) => smmu.substream_bits,
        }
    }
}

impl From<VtdOptions> for IommuConfig {
    fn from(vtd: VtdOptions) -> Self {
        Self { model: IommuModel::Vtd(vtd), ..Self::default() }
    }
}

impl From<SmmuV3Options> for IommuConfig {
    fn from(smmu: SmmuV3Options) -> Self {
        Self { model: IommuModel::SmmuV3(smmu), ..Self::default() }
    }
}

/// A virtual VT-d.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VtdOptions {
    /// Input address width of first-stage tables, in bits: 48 or 57.
    pub address_width: u8,
    /// Width of PASIDs, in bits; 0 for none. Default: what all hosts have, at most 8.
    pub pasid_bits: Option<u8>,
    /// Offers first-stage tables. Default: unless they are mirrored.
    pub first_stage: Option<bool>,
    /// Offers guest-owned second-stage tables. Default: where the host walks or mirrors them.
    pub second_stage: Option<bool>,
    /// Offers nested translation: the guest's first stage over its second stage.
    pub nest: bool,
    /// Whether the host nests the guest's tables or has mirrors of them.
    pub nesting: Nesting,
    /// Offers device TLBs (ATS).
    pub ats: bool,
    /// Offers page requests (PRI), which need `ats`.
    pub pri: bool,
    /// Caching mode (CM), in which the guest also invalidates entries that become present.
    pub caching_mode: bool,
    /// Interrupt remapping, of all units; moves the IOAPIC out of the kernel. Default: if KVM can.
    pub interrupt_remapping: Option<bool>,
    /// Compares every DMA with the guest's tables and reports uses of stale translations.
    pub sanitize: bool,
}

impl Default for VtdOptions {
    fn default() -> Self {
        Self {
            address_width: 48,
            pasid_bits: None,
            first_stage: None,
            second_stage: None,
            nest: false,
            nesting: Nesting::Auto { pieces: Nesting::PIECES },
            ats: false,
            pri: false,
            caching_mode: true,
            interrupt_remapping: None,
            sanitize: false,
        }
    }
}

/// A virtual SMMUv3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmmuV3Options {
    /// Width of input addresses (IOVAs), in bits: 48, or 52 with the 64 KiB granule.
    pub address_width: u8,
    /// The offered granules; by default those that all hosts have.
    pub granules: Option<Vec<Granule>>,
    /// Offers invalidation by range; by default if all hosts have it.
    pub range_invalidation: Option<bool>,
    /// Width of SubstreamIDs (PASIDs), in bits; by default the host's.
    pub substream_bits: Option<u8>,
    /// Offers updates of flags in the guest's tables; by default those that all hosts make.
    pub httu: Option<Httu>,
    /// Offers device TLBs (ATS).
    pub ats: bool,
    /// Offers page requests (PRI), which need `ats`.
    pub pri: bool,
    /// Offers to stall transactions that fault, of devices that can be stalled.
    pub stall: bool,
    /// Compares every DMA with the guest's tables and reports uses of stale ones.
    pub sanitize: bool,
}

impl Default for SmmuV3Options {
    fn default() -> Self {
        Self {
            address_width: 48,
            granules: None,
            range_invalidation: None,
            substream_bits: None,
            httu: None,
            ats: false,
            pri: false,
            stall: false,
            sanitize: false,
        }
    }
}

/// The iommufd host behind a virtual IOMMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HostChoice {
    /// An IOMMU in this process, for emulated devices.
    #[default]
    Emulated,
    /// The kernel's, for assigned devices: the path of `/dev/iommu`. Emulated devices have an IOMMU
    /// in this process all the same.
    Kernel(PathBuf),
}

/// The serial port's backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialConfig {
    /// Standard input and output.
    Tty,
    /// Nowhere.
    Null,
    /// Into this file, which is created or truncated.
    File(PathBuf),
    /// Appended to this file, which is created if necessary.
    Append(PathBuf),
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A machine of one vCPU and 1 MiB, with nothing else.
    pub fn machine() -> MachineConfig {
        let payload = PayloadConfig { kernel: "kernel".into(), ..PayloadConfig::default() };
        MachineConfig {
            payload,
            vcpus: 1,
            memory: 1 << 20,
            iommus: Vec::new(),
            devices: Vec::new(),
            root_ports: Vec::new(),
            pci_bridges: Vec::new(),
            pci_ports: cfg!(target_arch = "x86_64"),
            serial: SerialConfig::Null,
            trace: None,
        }
    }
}
