// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors that prevent a machine from being built or from running, each in one line for the user.

use std::io;
use std::path::PathBuf;

use crate::boot::BootError;
use crate::bus::Overlap;
use crate::config::ConfigError;
use crate::devices::virtio::{DiskError, TapError};
use crate::memory::MemoryError;
use crate::process::exit_code;
use crate::process::jail::JailError;
use crate::vfio::VfioError;
use twostage::iommufd::OpenError;
use twostage::viommu::CapabilityConflict;

/// Why a machine cannot be built or has failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Guest memory cannot be allocated.
    #[error("--memory: {0}")]
    Memory(#[from] MemoryError),
    /// The kernel or the initramfs cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Two parts of the machine claim the same addresses.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// `/dev/kvm` cannot be opened.
    #[error("/dev/kvm: {source}; {}", kvm_advice(.source))]
    KvmOpen {
        /// The error of the open.
        source: io::Error,
    },
    /// A call to KVM failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// The operation.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM lacks a required feature.
    #[error("KVM: {0}")]
    KvmLacks(String),
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Os {
        /// The operation.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("{what}: {source}")]
    Output {
        /// The file, as on the command line.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// The PCI bus cannot be built.
    #[error("PCI: {0}")]
    Pci(String),
    /// The tables for the guest cannot be written.
    #[error("firmware: {0}")]
    Firmware(String),
    /// The host's IOMMU does not support an option of the virtual one.
    #[error("--iommu: {0}")]
    Capability(#[from] CapabilityConflict),
    /// A disk cannot be opened.
    #[error("--disk: {0}")]
    Disk(#[from] DiskError),
    /// A tap interface cannot be opened.
    #[error("--net: {0}")]
    Tap(#[from] TapError),
    /// A source of entropy cannot be opened.
    #[error("--rng: {path}: {source}", path = .path.display())]
    Rng {
        /// The source.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A device of the host cannot be assigned.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// The kernel's IOMMU cannot be opened.
    #[error("--iommu: {0}")]
    KernelHost(OpenError),
    /// The host's IOMMU does not support a device.
    #[error("--iommu: {0}")]
    HostLacks(String),
    /// The virtual IOMMU or its host cannot be built.
    #[error("IOMMU: {0}")]
    Iommu(String),
    /// The process cannot be jailed.
    #[error("{0}")]
    Jail(#[from] JailError),
    /// An interrupt cannot be connected.
    #[error("interrupts: {0}")]
    Interrupts(String),
    /// The event loop failed.
    #[error("event loop: {0}")]
    EventLoop(String),
}

/// A result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The exit code for the error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Memory(MemoryError::Map { .. }) => exit_code::OS_ERROR,
            Self::Config(_) | Self::Memory(_) | Self::Overlap(_) => exit_code::USAGE,
            Self::Boot(error) if error.is_of_memory_size() => exit_code::USAGE,
            Self::Boot(_) | Self::Disk(_) | Self::Rng { .. } => exit_code::NO_INPUT,
            Self::KvmOpen { .. }
            | Self::KvmLacks(_)
            | Self::Capability(_)
            | Self::HostLacks(_)
            | Self::Vfio(_)
            | Self::KernelHost(_) => exit_code::UNAVAILABLE,
            Self::Kvm { .. }
            | Self::Os { .. }
            | Self::Tap(_)
            | Self::Pci(_)
            | Self::Firmware(_)
            | Self::Iommu(_)
            | Self::Jail(_)
            | Self::Interrupts(_)
            | Self::EventLoop(_) => exit_code::OS_ERROR,
            Self::Output { .. } => exit_code::IO_ERROR,
        }
    }

    /// Adds the operation to an error of KVM.
    pub(super) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// Adds the operation to an error of the operating system.
    pub(super) fn os<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Os { what, source: source.into() }
    }
}

fn kvm_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "is the CPU's virtualization switched on and the kvm module loaded?"
        }
        io::ErrorKind::PermissionDenied => "is this user in the group 'kvm'?",
        _ => "it cannot be used",
    }
}
