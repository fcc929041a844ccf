// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why nesting could not do what it was asked.

use std::sync::Arc;

use crate::iommufd::HostError;
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::StreamId;
use crate::viommu::{HostSideError, Requester};

/// What nesting refuses, or what the host refused to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NestingError {
    /// A host call failed.
    #[error("{what}: {source}")]
    Host {
        /// What the call was for.
        what: String,
        /// What the host said.
        source: HostError,
    },
    /// The requester belongs to no device that was added.
    #[error("no device was added as {0}")]
    NoDevice(Bdf),
    /// The Requester ID, or the device object, was added before.
    #[error("{0} cannot be added: the Requester ID or the device object is in use already")]
    DeviceExists(Bdf),
    /// Erratum 772415: this IOMMU may write through read-only mappings of a nesting parent.
    #[error(
        "the guest memory at {gpa:#x} is mapped read-only, which erratum 772415 (SPR17) of the \
         IOMMU of {rid} forbids under nested translation; map it read-write, or not at all"
    )]
    ReadOnlyErratum {
        /// Where the read-only mapping is, in bytes.
        gpa: u64,
        /// A device behind an IOMMU with the erratum.
        rid: Bdf,
    },
    /// The device has no such PASID.
    #[error("{requester}: the device has {bits}-bit PASIDs only")]
    PasidTooWide {
        /// Who was to be configured.
        requester: Requester,
        /// Width of the device's PASIDs, in bits; 0 for none.
        bits: u8,
    },
    /// PASID 0 names, on the host, the requests without PASID: it has no configuration of its own.
    #[error("{0}: the host translates PASID 0 as it does requests without PASID")]
    PasidZero(Requester),
    /// The guest owns second-stage tables, and the host cannot walk them.
    #[error("{0}: the host cannot nest second-stage tables that the guest owns")]
    GuestSecondStage(Requester),
    /// A table that does not start a page.
    #[error("{requester}: the stage-1 table {table:#x} is not 4 KiB aligned")]
    UnalignedTable {
        /// Who was to be configured.
        requester: Requester,
        /// GPA of the table, in bytes.
        table: u64,
    },
    /// The device is behind another kind of IOMMU, or none.
    #[error("{0} is not behind an SMMUv3, which alone can serve a virtual one")]
    NoSmmu(Bdf),
    /// Streams of one virtual SMMU are behind one physical SMMU.
    #[error(
        "{rid} is behind another SMMU than {first}, and one virtual SMMU cannot serve both: give \
         each a virtual SMMU of its own"
    )]
    OtherSmmu {
        /// The device that was to be added.
        rid: Bdf,
        /// One that was added before.
        first: Bdf,
    },
    /// The stream belongs to no device that was added.
    #[error("no device was added with the StreamID {0}")]
    NoStream(StreamId),
    /// A command that only the owner of the physical SMMU can give.
    #[error("no invalidation of stage 1: {0}")]
    NoInvalidation(&'static str),
    /// The process can have no more threads.
    #[error("no thread can be started to bring the events of streams: {0}")]
    NoThread(String),
    /// A shutdown came first.
    #[error("the host objects are gone already")]
    ShutDown,
}

impl NestingError {
    /// As the virtual IOMMU wants it: with `what` it had asked for, and whether what was to be
    /// blocked is not.
    pub(super) fn for_viommu(self, what: String, still_reachable: bool) -> HostSideError {
        HostSideError { what, still_reachable, source: Arc::new(self) }
    }
}

/// What the parts of nesting return.
pub(super) type Result<T> = std::result::Result<T, NestingError>;

/// Names what a host call was for, in its error.
pub(super) trait Context<T> {
    /// Adds `what`.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for crate::iommufd::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| NestingError::Host { what: what(), source })
    }
}
