// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a machine is built from. The command line is one way to fill these in.

mod check;
mod payload;

use std::path::PathBuf;

use crate::arch::layout::IOMMU_REGISTERS;
use crate::devices::virtio::{DiskAccess, MacAddress};
use crate::{Error, Result};
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::regs;
use twostage::spec::smmuv3::translation::Granule;
use twostage::viommu::vtd::MMIO_SIZE;

pub use check::{ConfigError, MAX_DEVICES};
pub use payload::{ModuleConfig, PayloadConfig};

/// Where Linux has its iommufd.
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
    /// PCI devices, from 00:01.0 up.
    pub devices: Vec<DeviceConfig>,
    /// Where the serial port leads.
    pub serial: SerialConfig,
    /// The file that a trace is written to, if any.
    pub trace: Option<PathBuf>,
}

impl MachineConfig {
    /// What the virtual IOMMU `number` is called: its id, or `vtd` or `smmu` and
    /// its number from 0.
    pub fn iommu_id(&self, number: usize) -> String {
        let iommu = self.iommus.get(number);
        let id = iommu.and_then(|iommu| iommu.id.clone());
        id.unwrap_or_else(|| match iommu.map(|iommu| &iommu.model) {
            Some(IommuModel::SmmuV3(_)) => format!("smmu{number}"),
            _ => format!("vtd{number}"),
        })
    }

    /// Where the registers of the virtual IOMMU `number` are: where it says, or above the usual
    /// place and as many bytes as those before it have.
    pub fn iommu_address(&self, number: usize) -> u64 {
        let address = self.iommus.get(number).and_then(|iommu| iommu.address);
        let before: u64 =
            self.iommus.iter().take(number).map(|iommu| iommu.model.registers()).sum();
        address.unwrap_or_else(|| IOMMU_REGISTERS.saturating_add(before))
    }

    /// The number of the virtual IOMMU that `choice` means; `None` for no IOMMU, or none that there
    /// is.
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

    /// The number of the virtual IOMMU that remaps the interrupts of `device`, where they are
    /// remapped: the one it is behind. On a PC a virtio device behind none has those of the first:
    /// Linux then gives no messages to a function in no unit's scope, and virtio has nothing else;
    /// nor does it hurt, as its driver knows that its DMA is not translated (no
    /// VIRTIO_F_ACCESS_PLATFORM). An SMMU knows nothing of interrupts: what is not behind it, it
    /// does not see.
    pub fn interrupt_iommu_of(&self, device: &DeviceConfig) -> Option<usize> {
        let pc = self.iommus.iter().all(|iommu| iommu.model.vtd().is_some());
        match device {
            DeviceConfig::Edu(_) | DeviceConfig::Vfio(_) => self.iommu_of(device.iommu()),
            virtio if !pc => self.iommu_of(virtio.iommu()),
            virtio => self.iommu_of(virtio.iommu()).or_else(|| self.iommu_of(&IommuChoice::First)),
        }
    }

    /// The kernel's `/dev/iommu`, if the machine uses it: what a virtual IOMMU says, or the usual
    /// one for a device of this machine that is behind none.
    pub fn kernel_host(&self) -> Option<PathBuf> {
        let said = self.iommus.iter().find_map(|iommu| match &iommu.host {
            HostChoice::Kernel(path) => Some(path.clone()),
            HostChoice::Emulated => None,
        });
        let assigned = |device: &DeviceConfig| matches!(device, DeviceConfig::Vfio(_));
        said.or_else(|| self.devices.iter().any(assigned).then(|| DEV_IOMMU.into()))
    }

    /// Whether interrupts are remapped, if any virtual IOMMU says so.
    pub fn interrupt_remapping(&self) -> Option<bool> {
        self.iommus.iter().find_map(|iommu| iommu.model.vtd()?.interrupt_remapping)
    }
}

/// A virtual IOMMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IommuConfig {
    /// What devices call it; unsaid, see [`MachineConfig::iommu_id`].
    pub id: Option<String>,
    /// Guest-physical address of the registers; unsaid, see [`MachineConfig::iommu_address`].
    pub address: Option<u64>,
    /// Who does the translating.
    pub host: HostChoice,
    /// Which kind.
    pub model: IommuModel,
}

/// Which kind of virtual IOMMU.
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
    /// What `--iommu` calls it.
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

    /// What its registers are aligned to, in bytes.
    pub fn page(&self) -> u64 {
        match self {
            Self::Vtd(_) => MMIO_SIZE,
            Self::SmmuV3(_) => regs::PAGE_SIZE,
        }
    }

    /// What it is like, if it is a VT-d.
    pub fn vtd(&self) -> Option<&VtdOptions> {
        match self {
            Self::Vtd(vtd) => Some(vtd),
            Self::SmmuV3(_) => None,
        }
    }

    /// Width of PASIDs (SubstreamIDs), in bits; 0 for none, and `None` for what the host has.
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
    /// Width of PASIDs, in bits; 0 for none. Unsaid, 8, or what all hosts have.
    pub pasid_bits: Option<u8>,
    /// Second-stage tables of the guest's own are offered.
    pub second_stage: bool,
    /// Device TLBs (ATS) are offered.
    pub ats: bool,
    /// Caching mode: the guest tells of entries that become present, too. Without it the tables are
    /// read again for each request that they blocked, which takes a host that tells of those.
    pub caching_mode: bool,
    /// Interrupts are remapped, which takes the IOAPIC out of the kernel. Unsaid, they are where
    /// KVM can do without it. What one says holds for all of a machine.
    pub interrupt_remapping: Option<bool>,
    /// Every DMA is compared with the guest's tables; uses of stale translations are reported.
    pub sanitize: bool,
}

impl Default for VtdOptions {
    fn default() -> Self {
        Self {
            address_width: 48,
            pasid_bits: None,
            second_stage: true,
            ats: false,
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
    /// The granules that are offered; unsaid, those that all hosts have.
    pub granules: Option<Vec<Granule>>,
    /// Invalidation by range is offered; unsaid, where all hosts have it.
    pub range_invalidation: Option<bool>,
    /// Width of SubstreamIDs (PASIDs), in bits; unsaid, what the host has.
    pub substream_bits: Option<u8>,
    /// Device TLBs (ATS) are offered.
    pub ats: bool,
    /// Every DMA is compared with the guest's context descriptors and tables; uses of stale ones
    /// are reported.
    pub sanitize: bool,
}

impl Default for SmmuV3Options {
    fn default() -> Self {
        Self {
            address_width: 48,
            granules: None,
            range_invalidation: None,
            substream_bits: None,
            ats: false,
            sanitize: false,
        }
    }
}

/// Who serves the verbs of iommufd behind a virtual IOMMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HostChoice {
    /// An IOMMU in this process, for devices in this process.
    #[default]
    Emulated,
    /// The kernel's, for devices of this machine: the path of `/dev/iommu`.
    Kernel(PathBuf),
}

/// Which virtual IOMMU a device is behind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum IommuChoice {
    /// Nothing is said: the first one, if the machine has any.
    #[default]
    Unsaid,
    /// The first one.
    First,
    /// The one of this id.
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
    /// A device of this machine.
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

    /// Whether it has the PASID capability.
    pub fn pasid(&self) -> bool {
        matches!(self, Self::Edu(EduConfig { pasid: true, .. }))
    }

    /// The option that makes such a device.
    fn option(&self) -> &'static str {
        match self {
            Self::Edu(_) => "--device",
            Self::Disk(_) => "--disk",
            Self::Net(_) => "--net",
            Self::Rng(_) => "--rng",
            Self::Vfio(_) => "--vfio",
        }
    }
}

/// Where the device `number` of a configuration goes, counted from 0: the host bridge is first.
pub(crate) fn bdf_of(number: usize) -> Result<Bdf> {
    u8::try_from(number + 1)
        .ok()
        .and_then(|device| Bdf::new(0, device, 0))
        .ok_or_else(|| Error::Pci(format!("bus 0 has no room for {} devices", number + 1)))
}

/// A virtio block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The raw image, a file or a block device.
    pub path: PathBuf,
    /// How it is opened.
    pub access: DiskAccess,
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
}

/// A virtio network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// What it is connected to.
    pub tap: TapConfig,
    /// Its address; unsaid, one is made of its number.
    pub mac: Option<MacAddress>,
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
}

/// A tap interface of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapConfig {
    /// By its name.
    Name(String),
    /// By a file descriptor that the process was started with.
    Fd(i32),
}

/// A virtio entropy device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RngConfig {
    /// Where its bytes come from.
    pub source: PathBuf,
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
}

/// A device of this machine, assigned to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VfioConfig {
    /// Its folder in sysfs (`/sys/bus/pci/devices/0000:01:00.0`), or its VFIO character device.
    pub path: PathBuf,
    /// What reports and log lines call it, if not by its path.
    pub id: Option<String>,
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
}

impl VfioConfig {
    /// What reports and log lines call it.
    pub fn name(&self) -> String {
        self.id.clone().unwrap_or_else(|| self.path.display().to_string())
    }
}

/// The educational device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EduConfig {
    /// The virtual IOMMU it is behind.
    pub iommu: IommuChoice,
    /// Has the PASID capability, and the register that chooses one.
    pub pasid: bool,
    /// DMA addresses are cut to these bits.
    pub dma_mask: u64,
}

impl EduConfig {
    /// The address bits the device has unless told otherwise.
    pub const DEFAULT_DMA_MASK: u64 = (1 << 28) - 1;
}

impl Default for EduConfig {
    fn default() -> Self {
        Self { iommu: IommuChoice::Unsaid, pasid: false, dma_mask: Self::DEFAULT_DMA_MASK }
    }
}

/// Where the serial port leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialConfig {
    /// Standard input and output.
    Tty,
    /// Nowhere.
    Null,
    /// Into this file, which is created or emptied.
    File(PathBuf),
    /// To the end of this file, which is created if need be.
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
            serial: SerialConfig::Null,
            trace: None,
        }
    }
}
