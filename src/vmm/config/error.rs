// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can be wrong with a configuration.

use crate::arch;
use crate::arch::layout::MAX_BUSES;

/// Device numbers 1 to 31 of bus 0; the host bridge is device 0.
pub const MAX_DEVICES: usize = 31;

/// A configuration that contradicts itself or cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The process cannot become another user.
    #[error("{option}: {why}")]
    User {
        /// Which says so.
        option: &'static str,
        /// Why it cannot.
        why: &'static str,
    },
    /// No vCPU.
    #[error("--cpus: a machine needs at least one vCPU; boot=0 gives it none")]
    NoVcpus,
    /// A virtual IOMMU's registers overlap something else.
    #[error("--iommu: addr={0:#x} overlaps {1}")]
    RegisterPage(u64, &'static str),
    /// The registers of two virtual IOMMUs overlap.
    #[error("--iommu: addr={0:#x} overlaps the registers of {1}")]
    SameRegisterPage(u64, String),
    /// This architecture's firmware cannot describe it.
    #[error("--iommu {0}: this architecture has {known} only", known = arch::IOMMU)]
    OtherArchitecture(&'static str),
    /// The registers are not aligned.
    #[error("--iommu: addr={0:#x} is not a multiple of {1:#x}")]
    Unaligned(u64, u64),
    /// Two virtual IOMMUs have the same name.
    #[error("--iommu: there are two with id={0}")]
    SameIommu(String),
    /// One side core serves all virtual IOMMUs that have one.
    #[error("--iommu: {0} must be the same for all with a side core: it is one thread")]
    SeveralSideCores(&'static str),
    /// Linux, for example, remaps the interrupts of all units or of none.
    #[error("--iommu: intremap=on and intremap=off contradict each other; it applies to all")]
    SomeInterruptsRemapped,
    /// A device behind an IOMMU, but there is none.
    #[error("{0} {1}: iommu=on, but there is no --iommu")]
    NoIommu(&'static str, usize),
    /// A device behind an unknown IOMMU.
    #[error("{0} {1}: iommu={2}, but there is no --iommu with id={2}; there is {3}")]
    UnknownIommu(&'static str, usize, String, String),
    /// An assigned device behind an IOMMU on the emulated host.
    #[error("{0}")]
    WrongHost(String),
    /// Virtual IOMMUs of one machine share one IOAS.
    #[error("--iommu: host= must be the same for all of a machine")]
    SeveralHosts,
    /// The same device twice.
    #[error("--vfio: {0} is given twice")]
    SameDevice(String),
    /// PASIDs without an IOMMU.
    #[error("--device {0}: pasid=on needs the device behind an IOMMU (--iommu vtd, no iommu=off)")]
    PasidWithoutIommu(usize),
    /// PASIDs that the IOMMU does not support.
    #[error("--device {0}: pasid=on, but --iommu has pasid-bits=0")]
    NoPasidBits(usize),
    /// A capability that the device's IOMMU has no use for.
    #[error("--device {0}: {1}=on needs {1}=on at the --iommu that the device is behind")]
    NotOffered(usize, &'static str),
    /// More devices than fit on bus 0.
    #[error("{0} devices and root ports on bus 0, which has room for {max}", max = MAX_DEVICES)]
    TooManyDevices(usize),
    /// More buses than configuration space has room for.
    #[error("--root-port, --pci-bridge: {0} buses; there is room for {max}", max = MAX_BUSES)]
    TooManyBuses(usize),
    /// Two root ports or bridges have the same name.
    #[error("--root-port, --pci-bridge: there are two with id={0}")]
    SameBus(String),
    /// A conventional bridge behind a conventional bridge.
    #[error("--pci-bridge {0}: bus={1} is a bridge to PCI itself; it needs that of a --root-port")]
    BridgeBehindBridge(String, String),
    /// A bridge behind an unknown port.
    #[error("--pci-bridge {0}: bus={1}, but there is no --root-port with id={1}")]
    NoSuchPort(String, String),
    /// Two bridges in the same slot.
    #[error("--pci-bridge {0}: bus={1} has {2} in its only slot; add a --root-port")]
    TwoBridges(String, String, String),
    /// A device behind an unknown port.
    #[error(
        "{0} {1}: bus={2}, but there is no --root-port or --pci-bridge of this id; there is {3}"
    )]
    UnknownBus(&'static str, usize, String, String),
    /// A device behind a port or bridge without room.
    #[error("{0} {1}: bus={2} is full ({3}); add a --root-port for it")]
    BusIsFull(&'static str, usize, String, &'static str),
    /// A device that cannot be a conventional one.
    #[error(
        "{0} {1}: bus={2} is conventional PCI, which has no {3}; it needs bus= of a --root-port"
    )]
    NotConventional(&'static str, usize, String, &'static str),
    /// Devices that share a Requester ID behind different IOMMUs.
    #[error("{0} {1}: bus={2}: its devices share one Requester ID, and so need the same iommu=")]
    SharedRequester(&'static str, usize, String),
}
