// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The description of the emulated machine: a TOML file.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Deserialize;
use twostage::spec::pci::Bdf;

/// The default machine.
const DEFAULT: &str = include_str!("default.toml");

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// IOMMUs.
    #[serde(default)]
    pub iommu: Vec<Iommu>,
    /// Devices behind them.
    #[serde(default)]
    pub device: Vec<Device>,
    /// Capabilities granted to every process here, besides its own.
    #[serde(default)]
    pub capabilities: Vec<Capability>,
}

/// The capabilities that iommufd checks, with their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Capability {
    /// `CAP_IPC_LOCK`.
    IpcLock = 14,
    /// `CAP_SYS_RAWIO`.
    SysRawio = 17,
    /// `CAP_SYS_RESOURCE`.
    SysResource = 24,
}

impl Capability {
    /// Its bit in a set.
    pub fn bit(self) -> u64 {
        1 << self as u32
    }
}

/// One IOMMU.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Iommu {
    /// Its name for devices.
    pub name: String,
    /// Its model.
    pub model: Model,
    /// Width of its addresses in bits: 39, 48 or 57; for an SMMUv3 a value of IDR5.OAS, 32 to 52.
    #[serde(default = "forty_eight")]
    pub address_width: u8,
    /// Width of its PASIDs in bits, at most 20; 0 for none.
    #[serde(default = "twenty")]
    pub pasid_bits: u8,
    /// Nested translation.
    #[serde(default = "yes")]
    pub nesting: bool,
    /// Supports invalidation of device-TLBs.
    #[serde(default)]
    pub ats: bool,
    /// Supports page requests of devices, if it has `ats`.
    #[serde(default)]
    pub pri: bool,
    /// Reports erratum 772415, as Linux does for every VT-d: no read-only mappings with a nesting
    /// parent.
    #[serde(default = "yes")]
    pub erratum_772415: bool,
    /// Of an SMMUv3: stage 2 forces write-back (IDR3.FWB). Without it, there are no vIOMMUs.
    #[serde(default = "yes")]
    pub s2fwb: bool,
}

/// The models of IOMMUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Model {
    /// Intel VT-d.
    Vtd,
    /// Arm SMMUv3.
    Smmuv3,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Device {
    /// The number N of `/dev/vfio/devices/vfioN`.
    pub vfio: u32,
    /// Name of its IOMMU.
    pub iommu: String,
    /// Its address, such as `00:04.0`.
    pub address: String,
    /// Width of its PASIDs in bits; 0 for a device without.
    #[serde(default)]
    pub pasid_bits: u8,
    /// It has a device-TLB.
    #[serde(default)]
    pub ats: bool,
    /// It sends page requests, which needs `ats`.
    #[serde(default)]
    pub pri: bool,
    /// Its DMA engine.
    #[serde(default)]
    pub dma: Dma,
    /// It is a PCI Express device, with MSI-X and memory that can be mapped.
    #[serde(default)]
    pub express: bool,
    /// Devices behind one IOMMU with the same number are one IOMMU group; without, it has its own.
    pub group: Option<u32>,
    /// IOVAs that cannot be mapped for it, in bytes, inclusive.
    #[serde(default)]
    pub reserved: Vec<[u64; 2]>,
}

/// The DMA engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dma {
    /// None.
    None,
    /// That of QEMU's educational device.
    #[default]
    Edu,
}

fn forty_eight() -> u8 {
    48
}

fn twenty() -> u8 {
    20
}

fn yes() -> bool {
    true
}

/// An invalid description.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// Its format is wrong.
    #[error("{0}")]
    Form(#[from] toml::de::Error),
    /// Its content is invalid.
    #[error("{0}")]
    Content(String),
}

impl Config {
    /// Reads `file`, or the default machine.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        match file {
            Some(path) => {
                // Opening a FIFO would block, and reading a device might not end.
                let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
                if !file.metadata()?.is_file() {
                    return Err(io::Error::other("not a regular file").into());
                }
                Self::parse(&io::read_to_string(file)?)
            }
            None => Self::parse(DEFAULT),
        }
    }

    /// Reads a description.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        for (index, iommu) in self.iommu.iter().enumerate() {
            let of = |text: &dyn fmt::Display| content(format!("IOMMU '{}': {text}", iommu.name));
            if self.iommu.iter().take(index).any(|other| other.name == iommu.name) {
                return of(&"there are two of that name");
            }
            let widths: &[u8] = match iommu.model {
                Model::Vtd => &[39, 48, 57],
                Model::Smmuv3 => &[32, 36, 40, 42, 44, 48, 52],
            };
            if !widths.contains(&iommu.address_width) {
                let width = iommu.address_width;
                return of(&format_args!("address-width is one of {widths:?}, not {width}"));
            }
            if iommu.pasid_bits > 20 {
                return of(&format_args!("pasid-bits is at most 20, not {}", iommu.pasid_bits));
            }
        }
        for (index, device) in self.device.iter().enumerate() {
            let of = |text: &dyn fmt::Display| content(format!("device {}: {text}", device.vfio));
            if self.device.iter().take(index).any(|other| other.vfio == device.vfio) {
                return of(&"there are two of that number");
            }
            if !self.iommu.iter().any(|iommu| iommu.name == device.iommu) {
                return of(&format_args!("there is no IOMMU '{}'", device.iommu));
            }
            let elsewhere = |other: &&Device| other.iommu != device.iommu;
            let same_group = self.device.iter().filter(|other| other.group == device.group);
            if device.group.is_some() && same_group.filter(elsewhere).count() > 0 {
                return of(&"its group has devices behind another IOMMU");
            }
            if let Err(error) = device.rid() {
                return of(&error);
            }
            if let Some([first, last]) = device.reserved.iter().find(|[first, last]| first > last) {
                return of(&format_args!("reserved: {first:#x} is above {last:#x}"));
            }
        }
        Ok(())
    }
}

fn content(text: String) -> Result<(), ConfigError> {
    Err(ConfigError::Content(text))
}

impl Device {
    /// Its Requester ID.
    ///
    /// # Errors
    /// Its address is invalid.
    pub fn rid(&self) -> Result<Bdf, twostage::spec::pci::ParseBdfError> {
        self.address.parse()
    }

    /// Its reserved IOVAs.
    pub fn reserved(&self) -> Vec<RangeInclusive<u64>> {
        self.reserved.iter().map(|[first, last]| *first..=*last).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_machine() {
        let config = Config::load(None).unwrap();
        assert_eq!((config.iommu.len(), config.device.len()), (1, 2));
        assert!(config.device.iter().all(|device| device.dma == Dma::Edu));
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        for path in [&fifo, Path::new("/dev/zero"), Path::new("/")] {
            let error = Config::load(Some(path)).unwrap_err().to_string();
            assert_eq!(error, "not a regular file", "{}", path.display());
        }
    }

    #[test]
    fn what_a_description_cannot_say() {
        let unit = "[[iommu]]\nname = 'a'\nmodel = 'vtd'\n";
        let device = "[[device]]\nvfio = 0\niommu = 'a'\naddress = '00:04.0'\n";
        for (text, words) in [
            (format!("{unit}{unit}"), "two of that name"),
            (format!("{unit}address-width = 40\n"), "[39, 48, 57]"),
            (format!("{}address-width = 57\n", unit.replace("vtd", "smmuv3")), "44, 48, 52]"),
            (format!("{unit}pasid-bits = 21\n"), "at most 20"),
            (format!("{unit}colour = 'red'\n"), "unknown field"),
            (unit.replace("vtd", "amd"), "unknown variant"),
            (device.to_owned(), "no IOMMU 'a'"),
            (format!("{unit}{device}{device}"), "two of that number"),
            (
                format!(
                    "{unit}{}{device}group = 1\n{}group = 1\n",
                    unit.replace("'a'", "'b'"),
                    device.replace("'a'", "'b'").replace("vfio = 0", "vfio = 1")
                ),
                "behind another IOMMU",
            ),
            (format!("{unit}{device}reserved = [[2, 1]]\n"), "is above"),
            (format!("{unit}{device}").replace("00:04.0", "00:04.9"), "not a PCI address"),
        ] {
            let error = Config::parse(&text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert!(Config::parse(&format!("{unit}{device}")).is_ok());
        assert!(Config::parse(&format!("{unit}address-width = 39\n")).is_ok());
        assert!(Config::parse(&unit.replace("vtd", "smmuv3")).is_ok());
    }
}
