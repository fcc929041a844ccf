// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can keep a device from being assigned, in one line.

use std::io;
use std::ops::RangeInclusive;

use super::config_image::ConfigError;
use twostage::iommufd::HostError;

/// A device cannot be assigned.
#[derive(Debug, thiserror::Error)]
#[error("--vfio {device}: {problem}")]
pub struct VfioError {
    device: String,
    problem: VfioProblem,
}

impl VfioError {
    /// `device`, as the user named it, has `problem`.
    pub fn new(device: &str, problem: VfioProblem) -> Self {
        Self { device: device.to_owned(), problem }
    }
}

/// Why a device cannot be assigned.
#[derive(Debug, thiserror::Error)]
pub enum VfioProblem {
    /// It is not bound to vfio-pci, or somebody else has it: the host says what to do.
    #[error(transparent)]
    Bind(#[from] HostError),
    /// VFIO refused something.
    #[error("{what}: {source}")]
    Call {
        /// What was being done.
        what: &'static str,
        /// What VFIO said.
        source: io::Error,
    },
    /// The host has its messages go to these addresses, where the guest has memory.
    #[error(
        "the host has its interrupt messages go to {0:#x?}, where the guest has memory: none would \
         arrive; give the guest so little --memory that it ends before, or leave the device out"
    )]
    Messages(RangeInclusive<u64>),
    /// It is nothing that a guest can have.
    #[error(transparent)]
    Config(#[from] ConfigError),
}
