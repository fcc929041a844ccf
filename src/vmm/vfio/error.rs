// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors that prevent assigning a device, in one line.

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
    /// `device`, as named by the user, has `problem`.
    pub fn new(device: &str, problem: VfioProblem) -> Self {
        Self { device: device.to_owned(), problem }
    }
}

/// Why a device cannot be assigned.
#[derive(Debug, thiserror::Error)]
pub enum VfioProblem {
    /// It is not bound to vfio-pci, or in use: the host's error says what to do.
    #[error(transparent)]
    Bind(#[from] HostError),
    /// VFIO refused something.
    #[error("{what}: {source}")]
    Call {
        /// The operation.
        what: &'static str,
        /// VFIO's error.
        source: io::Error,
    },
    /// The host's MSI window overlaps guest memory.
    #[error(
        "the host directs its interrupt messages to {0:#x?}, where the guest has memory: none \
         would arrive; reduce --memory so that it ends before, or leave the device out"
    )]
    Messages(RangeInclusive<u64>),
    /// It cannot be assigned.
    #[error(transparent)]
    Config(#[from] ConfigError),
}
