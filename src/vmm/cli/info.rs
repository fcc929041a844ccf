// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `twostage info`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::complain;
use crate::process::exit_code;
use twostage::iommufd::{Errno, HostError, HostIommu, KernelHost, OpenError};
use twostage::nesting::survey::{survey, NestingReport};
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, EmulatedHost, EmulatedUnit, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit, VtdUnitConfig,
};

/// Exit codes of the subcommand.
pub(super) const EXIT_CODES: &str = "\
Exit codes:
    0  every device was examined, whatever it offers
   64  the command line contradicts itself
   66  a device does not exist, or is not bound to vfio-pci
   69  there is no such host, or it refused something
   74  the result cannot be written";

/// Where Linux has the VFIO devices.
const VFIO_DEVICES: &str = "/dev/vfio/devices";

#[derive(Debug, Args)]
pub(super) struct InfoArgs {
    /// The host: the kernel's iommufd, or an emulated edu behind an emulated IOMMU.
    #[arg(long, value_name = "/dev/iommu|emulated", default_value = "/dev/iommu")]
    host: PathBuf,

    /// A device bound to vfio-pci, by its folder in /sys/bus/pci/devices or its file in
    /// /dev/vfio/devices; may be given several times. Default: all of the latter. It must not be in
    /// use, and its DMA is blocked meanwhile.
    #[arg(long = "vfio", value_name = "path=PATH", value_parser = parse_vfio)]
    vfio: Vec<String>,

    /// IOMMU of the emulated host.
    #[arg(long, value_enum, default_value = "vtd")]
    iommu: Emulated,

    /// Format of the result on standard output.
    #[arg(long, value_enum, default_value = "text")]
    report: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Emulated {
    Vtd,
    Smmuv3,
}

fn parse_vfio(text: &str) -> Result<String, String> {
    match text.strip_prefix("path=") {
        Some(path) if !path.is_empty() => Ok(path.to_owned()),
        _ => Err("write path=PATH, the path of a device".to_owned()),
    }
}

/// Why `info` fails.
#[derive(Debug, thiserror::Error)]
enum InfoError {
    #[error("--vfio names devices of the kernel; the emulated host has its own")]
    VfioOfEmulated,
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("no device is bound to vfio-pci: {VFIO_DEVICES} has none")]
    NoDevices,
    #[error("{0}")]
    Device(HostError),
    #[error("{0}")]
    Host(HostError),
    #[error("--report: {0}")]
    Write(#[from] io::Error),
}

impl InfoError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::VfioOfEmulated => exit_code::USAGE,
            Self::NoDevices | Self::Device(_) => exit_code::NO_INPUT,
            Self::Open(_) | Self::Host(_) => exit_code::UNAVAILABLE,
            Self::Write(_) => exit_code::IO_ERROR,
        }
    }
}

impl From<HostError> for InfoError {
    fn from(error: HostError) -> Self {
        match error.errno {
            Errno::ENODEV => Self::Device(error),
            _ => Self::Host(error),
        }
    }
}

/// Surveys and reports; returns the exit code.
pub(super) fn info(args: &InfoArgs) -> u8 {
    match report(args).and_then(|report| Ok(write(&report, args.report)?)) {
        Ok(()) => 0,
        Err(error) => {
            complain(&error);
            error.exit_code()
        }
    }
}

fn report(args: &InfoArgs) -> Result<NestingReport, InfoError> {
    let (host, names): (Arc<dyn HostIommu>, _) = if args.host == Path::new("emulated") {
        if !args.vfio.is_empty() {
            return Err(InfoError::VfioOfEmulated);
        }
        (emulated(args.iommu), vec![EDU.to_owned()])
    } else {
        let host = Arc::new(KernelHost::open(&args.host)?);
        let names = if args.vfio.is_empty() { bound_devices()? } else { args.vfio.clone() };
        (host, names)
    };
    Ok(NestingReport::new(&survey(&*host, &names)?))
}

const EDU: &str = "edu";
/// The maximum number of PASID bits.
const EDU_PASID_BITS: u8 = 20;

/// A host like that of virtual machines, with an edu.
fn emulated(iommu: Emulated) -> Arc<EmulatedHost> {
    let host = EmulatedHost::new();
    let unit: EmulatedUnit = match iommu {
        Emulated::Vtd => VtdUnit::new(VtdUnitConfig::default()).into(),
        Emulated::Smmuv3 => SmmuV3Unit::new(SmmuV3UnitConfig::default()).into(),
    };
    let unit = host.add_unit(unit);
    let config = DeviceConfig { pasid_bits: EDU_PASID_BITS, ..Default::default() };
    // Cannot fail, as the host has no other device.
    if let Err(error) = host.add_device(EDU, unit, Bdf::from_raw(0x0008), config) {
        log::error!("the emulated host: {error}");
    }
    host
}

/// Every VFIO device, ordered by number.
fn bound_devices() -> Result<Vec<String>, InfoError> {
    let entries = fs::read_dir(VFIO_DEVICES).into_iter().flatten().flatten();
    let mut paths: Vec<_> =
        entries.filter_map(|entry| entry.path().to_str().map(str::to_owned)).collect();
    paths.sort_by_key(|path| (path.len(), path.clone()));
    if paths.is_empty() {
        return Err(InfoError::NoDevices);
    }
    Ok(paths)
}

fn write(report: &NestingReport, form: Form) -> io::Result<()> {
    let text = match form {
        Form::Text => report.to_string(),
        Form::Json => serde_json::to_string_pretty(report)? + "\n",
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
