// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can keep a device from being assigned, each in one line that says what to do.
#![forbid(unsafe_code)]

use std::io;

use super::config_image::ConfigError;
use crate::iommufd::HostError;

/// A device cannot be assigned.
#[derive(Debug, thiserror::Error)]
#[error("--vfio {device}: {problem}")]
pub struct VfioError {
    device: String,
    /// Why.
    problem: VfioProblem,
}

impl VfioError {
    /// `device`, as the user named it, has `problem`.
    pub fn new(device: &str, problem: VfioProblem) -> Self {
        Self { device: device.to_owned(), problem }
    }

    /// Why.
    pub fn problem(&self) -> &VfioProblem {
        &self.problem
    }
}

/// Why a device cannot be assigned.
#[derive(Debug, thiserror::Error)]
pub enum VfioProblem {
    /// There is no such device.
    #[error("there is no such PCI device; `ls /sys/bus/pci/devices` shows which there are")]
    NoDevice,
    /// It has no driver, or one of the host's.
    #[error(
        "{}; give it to vfio-pci: echo vfio-pci > {path}/driver_override{unbind}, \
         echo {address} > /sys/bus/pci/drivers_probe",
        driver_text(.driver),
        unbind = unbind_text(.driver, .path)
    )]
    NotVfio {
        /// What drives it.
        driver: Option<String>,
        /// Its directory.
        path: String,
        /// Its address.
        address: String,
    },
    /// The host's VFIO has no character devices.
    #[error("vfio-pci has it, but made no {path}/vfio-dev: the host's kernel needs CONFIG_VFIO_DEVICE_CDEV")]
    NoCdev {
        /// Its directory.
        path: String,
    },
    /// Others of its group belong to the host.
    #[error(
        "{others} of the same IOMMU group {verb} the host's; give all of a group to vfio-pci, or to no driver",
        verb = if .others.contains(", ") { "are" } else { "is" }
    )]
    Group {
        /// Each with its driver.
        others: String,
    },
    /// The host's IOMMU does not take it.
    #[error("{0}{advice}", advice = bind_advice(.0))]
    Bind(HostError),
    /// VFIO refused something.
    #[error("{what}: {source}")]
    Call {
        /// What was being done.
        what: &'static str,
        /// What VFIO said.
        source: io::Error,
    },
    /// It is nothing that a guest can have.
    #[error(transparent)]
    Config(ConfigError),
}

fn driver_text(driver: &Option<String>) -> String {
    match driver {
        Some(driver) => format!("the host's driver '{driver}' has it"),
        None => "no driver has it".to_owned(),
    }
}

/// The step that takes it away from a driver that has it.
fn unbind_text(driver: &Option<String>, path: &str) -> String {
    match driver {
        Some(_) => format!(", echo its address > {path}/driver/unbind"),
        None => String::new(),
    }
}

fn bind_advice(error: &HostError) -> &'static str {
    match error.errno.raw() {
        libc::EACCES | libc::EPERM => {
            "; this user may not open it: chown its file in /dev/vfio/devices"
        }
        libc::EBUSY => "; another process has it, or another of its IOMMU group is the host's",
        libc::ENODEV => {
            "; is there an IOMMU in front of it? its driver must be in the host's kernel"
        }
        libc::EINVAL => "; another process may have it",
        _ => "",
    }
}
