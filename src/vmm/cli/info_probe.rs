// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `twostage info`: what devices and their IOMMUs offer. `twostage probe`: what KVM can do.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::complain;
use crate::arch::probe::Probe;
use crate::process::exit_code;
use twostage::iommufd::{Errno, HostError, HostIommu, KernelHost, OpenError};
use twostage::nesting::survey::{survey, NestingReport};
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, EmulatedHost, EmulatedUnit, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit, VtdUnitConfig,
};

/// Exit codes of `info`.
pub(super) const INFO_EXIT_CODES: &str = "\
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
    report: InfoForm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum InfoForm {
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

/// Surveys devices and reports; returns the exit code.
pub(super) fn info(args: &InfoArgs) -> u8 {
    match survey_devices(args).and_then(|report| Ok(write_report(&report, args.report)?)) {
        Ok(()) => 0,
        Err(error) => {
            complain(&error);
            error.exit_code()
        }
    }
}

fn survey_devices(args: &InfoArgs) -> Result<NestingReport, InfoError> {
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
    let config = DeviceConfig::default().with_pasid_bits(EDU_PASID_BITS);
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

fn write_report(report: &NestingReport, form: InfoForm) -> io::Result<()> {
    let text = match form {
        InfoForm::Text => report.to_string(),
        InfoForm::Json => serde_json::to_string_pretty(report)? + "\n",
    };
    print(&text)
}

/// Exit codes of `probe`.
pub(super) const PROBE_EXIT_CODES: &str = "\
Exit codes:
    0  Linux runs on this machine's KVM
    1  it does not
   64  the command line cannot be understood
   69  there is no KVM, or it lacks what every guest needs
   71  the operating system or KVM refused a resource
   74  the result cannot be written";

/// Linux runs on this machine's KVM.
const RUNS: u8 = 0;
/// Linux does not run.
const DOES_NOT: u8 = 1;

#[derive(Debug, Args)]
pub(super) struct ProbeArgs {
    /// Format of the result on standard output: everything, its last line only, or JSON.
    #[arg(long, value_enum, default_value = "text")]
    report: ProbeForm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProbeForm {
    Text,
    Line,
    Json,
}

/// Probes this machine's KVM and reports; returns the exit code.
pub(super) fn probe(args: &ProbeArgs) -> u8 {
    let probe = match Probe::new() {
        Ok(probe) => probe,
        Err(error) => {
            complain(&error);
            return error.exit_code();
        }
    };
    match write_probe(&probe, args.report) {
        Ok(()) if probe.linux => RUNS,
        Ok(()) => DOES_NOT,
        Err(error) => {
            complain(&format_args!("--report: {error}"));
            exit_code::IO_ERROR
        }
    }
}

fn write_probe(probe: &Probe, form: ProbeForm) -> io::Result<()> {
    let text = match form {
        ProbeForm::Text => probe.to_string(),
        ProbeForm::Line => probe.verdict() + "\n",
        ProbeForm::Json => serde_json::to_string_pretty(probe)? + "\n",
    };
    print(&text)
}

/// Prints `text` to standard output.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
