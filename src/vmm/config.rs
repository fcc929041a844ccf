// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a machine is built from. The command line is one way to fill these in.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::devices::virtio::MacAddress;
use super::memory::{self, VTD_REGISTERS};

/// A whole machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// What it boots.
    pub payload: PayloadConfig,
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// The virtual IOMMU, if there is one.
    pub iommu: Option<IommuConfig>,
    /// PCI devices, from 00:01.0 up.
    pub devices: Vec<DeviceConfig>,
    /// Where the serial port leads.
    pub serial: SerialConfig,
    /// The file that a trace is written to, if any.
    pub trace: Option<PathBuf>,
}

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PayloadConfig {
    /// A bzImage, an ELF64 image with a PVH entry, or an ELF32 image with a Multiboot header.
    pub kernel: PathBuf,
    /// A file handed to the kernel as its initial file system (the first module).
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// A virtual VT-d.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuConfig {
    /// Guest-physical address of the register page.
    pub address: u64,
    /// Input address width of first-stage tables, in bits: 48 or 57.
    pub address_width: u8,
    /// Width of PASIDs, in bits; 0 for none.
    pub pasid_bits: u8,
    /// Second-stage tables of the guest's own are offered.
    pub second_stage: bool,
    /// Device TLBs (ATS) are offered.
    pub ats: bool,
    /// Caching mode: not-present entries may be cached too, the guest invalidates after mapping.
    pub caching_mode: bool,
    /// Interrupts are remapped, which takes the IOAPIC out of the kernel. Unsaid, they are where it
    /// is not in the kernel anyway.
    pub interrupt_remapping: Option<bool>,
}

impl Default for IommuConfig {
    fn default() -> Self {
        Self {
            address: VTD_REGISTERS,
            address_width: 48,
            pasid_bits: 8,
            second_stage: true,
            ats: false,
            caching_mode: false,
            interrupt_remapping: None,
        }
    }
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
}

impl DeviceConfig {
    /// Whether it is to be behind the virtual IOMMU, if anything is said of that.
    pub fn iommu(&self) -> Option<bool> {
        match self {
            Self::Edu(edu) => edu.iommu,
            Self::Disk(disk) => disk.iommu,
            Self::Net(net) => net.iommu,
            Self::Rng(rng) => rng.iommu,
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
        }
    }
}

/// A virtio block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The raw image, a file or a block device.
    pub path: PathBuf,
    /// It cannot be written.
    pub read_only: bool,
    /// Around the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Behind the virtual IOMMU; unsaid, it is when the machine has one.
    pub iommu: Option<bool>,
}

/// A virtio network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// What it is connected to.
    pub tap: TapConfig,
    /// Its address; unsaid, one is made of its number.
    pub mac: Option<MacAddress>,
    /// Behind the virtual IOMMU; unsaid, it is when the machine has one.
    pub iommu: Option<bool>,
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
    /// Behind the virtual IOMMU; unsaid, it is when the machine has one.
    pub iommu: Option<bool>,
}

/// The educational device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EduConfig {
    /// Behind the virtual IOMMU; unsaid, it is when the machine has one.
    pub iommu: Option<bool>,
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
        Self { iommu: None, pasid: false, dma_mask: Self::DEFAULT_DMA_MASK }
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

/// A configuration that contradicts itself or asks for what nobody can build.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No vCPU.
    #[error("--cpus: a machine needs at least one vCPU; boot=0 gives it none")]
    NoVcpus,
    /// The virtual IOMMU's registers would be on top of something else.
    #[error("--iommu: addr={0:#x} is where {1} is")]
    RegisterPage(u64, &'static str),
    /// A device behind what is not there.
    #[error("{0} {1}: iommu=on, but there is no --iommu")]
    NoIommu(&'static str, usize),
    /// PASIDs without an IOMMU to tell them apart.
    #[error("--device {0}: pasid=on needs the device behind an IOMMU (--iommu vtd, no iommu=off)")]
    PasidWithoutIommu(usize),
    /// PASIDs that the IOMMU does not have.
    #[error("--device {0}: pasid=on, but --iommu has pasid-bits=0")]
    NoPasidBits(usize),
    /// More devices than bus 0 has room for.
    #[error("{0} devices; bus 0 has room for {max}", max = MAX_DEVICES)]
    TooManyDevices(usize),
}

/// Device numbers 1 to 31 of bus 0; the host bridge is device 0.
pub const MAX_DEVICES: usize = 31;

impl MachineConfig {
    /// Checks what no part can check alone. Devices are counted from 1, as in their errors.
    ///
    /// # Errors
    /// The first contradiction.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.vcpus == 0 {
            return Err(ConfigError::NoVcpus);
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(ConfigError::TooManyDevices(self.devices.len()));
        }
        if let Some(iommu) = &self.iommu {
            if let Some(occupant) = memory::occupant(self.memory, iommu.address) {
                return Err(ConfigError::RegisterPage(iommu.address, occupant));
            }
        }
        for (number, device) in (1..).zip(&self.devices) {
            let (behind, pasid) = (device.iommu(), device.pasid());
            match &self.iommu {
                None if behind == Some(true) => {
                    return Err(ConfigError::NoIommu(device.option(), number));
                }
                None if pasid => return Err(ConfigError::PasidWithoutIommu(number)),
                Some(_) if pasid && behind == Some(false) => {
                    return Err(ConfigError::PasidWithoutIommu(number));
                }
                Some(iommu) if pasid && iommu.pasid_bits == 0 => {
                    return Err(ConfigError::NoPasidBits(number));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(iommu: Option<IommuConfig>, edu: EduConfig) -> MachineConfig {
        MachineConfig {
            payload: PayloadConfig {
                kernel: "kernel".into(),
                initramfs: None,
                cmdline: String::new(),
            },
            vcpus: 1,
            memory: 1 << 20,
            iommu,
            devices: vec![DeviceConfig::Edu(EduConfig::default()), DeviceConfig::Edu(edu)],
            serial: SerialConfig::Null,
            trace: None,
        }
    }

    #[test]
    fn contradictions_are_named() {
        let vtd = Some(IommuConfig::default());
        let no_pasid = Some(IommuConfig { pasid_bits: 0, ..IommuConfig::default() });
        let edu = |iommu, pasid| EduConfig { iommu, pasid, ..EduConfig::default() };
        for (iommu, edu, error) in [
            (None, edu(Some(true), false), ConfigError::NoIommu("--device", 2)),
            (None, edu(None, true), ConfigError::PasidWithoutIommu(2)),
            (vtd.clone(), edu(Some(false), true), ConfigError::PasidWithoutIommu(2)),
            (no_pasid.clone(), edu(None, true), ConfigError::NoPasidBits(2)),
        ] {
            assert_eq!(machine(iommu, edu).validate(), Err(error));
        }
        for (iommu, edu) in [
            (None, edu(None, false)),
            (None, edu(Some(false), false)),
            (vtd.clone(), edu(None, true)),
            (vtd, edu(Some(false), false)),
            (no_pasid, edu(Some(true), false)),
        ] {
            assert_eq!(machine(iommu, edu).validate(), Ok(()));
        }
    }

    #[test]
    fn the_register_page_needs_a_place_of_its_own() {
        let at = |address| {
            let iommu = IommuConfig { address, ..IommuConfig::default() };
            machine(Some(iommu), EduConfig::default()).validate()
        };
        assert_eq!(at(VTD_REGISTERS), Ok(()));
        assert_eq!(at(0x1000), Err(ConfigError::RegisterPage(0x1000, "RAM")));
        assert_eq!(at(0xe000_0000), Err(ConfigError::RegisterPage(0xe000_0000, "PCI memory")));
    }

    #[test]
    fn a_machine_has_vcpus_and_a_bus_of_limited_length() {
        let mut config = machine(None, EduConfig::default());
        config.vcpus = 0;
        assert_eq!(config.validate(), Err(ConfigError::NoVcpus));
        config.vcpus = 1;
        config.devices = vec![DeviceConfig::Edu(EduConfig::default()); 32];
        assert_eq!(config.validate(), Err(ConfigError::TooManyDevices(32)));
    }
}
