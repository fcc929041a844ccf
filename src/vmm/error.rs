// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can keep a machine from being built or from going on, each in one line for its user.

use std::io;
use std::path::PathBuf;

use crate::boot::BootError;
use crate::bus::Overlap;
use crate::config::ConfigError;
use crate::devices::virtio::{DiskError, TapError};
use crate::memory::MemoryError;
use crate::process::exit_code;
use crate::vfio::VfioError;
use twostage::iommufd::OpenError;
use twostage::viommu::CapabilityConflict;

/// Why there is no machine, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Guest memory cannot be had.
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
        /// What the open said.
        source: io::Error,
    },
    /// A call to KVM failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was being done.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM lacks something the machine cannot do without.
    #[error("KVM: {0}")]
    KvmLacks(String),
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("{what}: {source}")]
    Output {
        /// Which, as the command line has it.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The PCI bus cannot be built.
    #[error("PCI: {0}")]
    Pci(String),
    /// What tells the guest of its machine cannot be written.
    #[error("firmware: {0}")]
    Firmware(String),
    /// The host's IOMMU cannot serve what the virtual one was to offer.
    #[error("--iommu: {0}")]
    Capability(#[from] CapabilityConflict),
    /// There is no disk.
    #[error("--disk: {0}")]
    Disk(#[from] DiskError),
    /// There is no tap interface.
    #[error("--net: {0}")]
    Tap(#[from] TapError),
    /// A source of entropy cannot be opened.
    #[error("--rng: {path}: {source}", path = .path.display())]
    Rng {
        /// The source.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A device of the host's cannot be assigned.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// There is no IOMMU of the kernel's.
    #[error("--iommu: {0}")]
    KernelHost(OpenError),
    /// The host's IOMMU cannot serve a device.
    #[error("--iommu: {0}")]
    HostLacks(String),
    /// The virtual IOMMU or the host behind it cannot be built.
    #[error("IOMMU: {0}")]
    Iommu(String),
    /// An interrupt cannot be wired.
    #[error("interrupts: {0}")]
    Interrupts(String),
    /// The event loop failed.
    #[error("event loop: {0}")]
    EventLoop(String),
}

/// A result with [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The exit code that goes with the error.
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
            | Self::Interrupts(_)
            | Self::EventLoop(_) => exit_code::OS_ERROR,
            Self::Output { .. } => exit_code::IO_ERROR,
        }
    }

    /// Names what was being done when KVM failed.
    pub(super) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// Names what was being done when the operating system failed.
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
