// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Turns the decisions of a virtual IOMMU into host objects.
//!
//! [`vtd`] and [`smmuv3`] implement the host-side traits of the virtual IOMMUs with the verbs of a
//! [`HostIommu`](crate::iommufd::HostIommu). Common to both:
//!
//! * one IOAS ([`GuestIoas`]) holds the guest's memory map (GPA → host memory) and changes only
//!   with it. All virtual IOMMUs of a guest, and devices without one, share it;
//! * its stage 2 is one nesting parent per physical IOMMU;
//! * one `HWPT_NESTED` per stage 1, shared by all requesters that use it, created with the first
//!   and destroyed with the last;
//! * a changed attachment is replaced directly; an unchanged one costs no call;
//! * a batch of invalidations becomes one call; what the host fails to invalidate is blocked and
//!   reported.
//!
//! Files of the same name in both folders do the same and can be read side by side: `attachments`
//! (from policies to host objects), `invalidate` (from invalidations to host calls), `state` (the
//! objects), `faults` and `page_requests` (back to the virtual IOMMU). VT-d alone has `nested`: the
//! PASIDs of its devices have attachments of their own; `flush_set`: the host takes ranges, not the
//! guest's commands; and `shadow`, for hosts that do not nest. `sides` in both is for devices of
//! several hosts behind one virtual IOMMU.
//!
//! Nothing here accesses registers, or guest memory but for `shadow`, or leaves DMA on a
//! translation that the guest has revoked.

mod guest_ioas;
mod hw_info;
mod objects;
mod page_route;
mod reader;
pub(crate) mod sides;
pub mod smmuv3;
pub mod survey;
pub mod vtd;

use std::sync::Arc;

use crate::iommufd::{HostError, HwInfo, ObjectId};
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::StreamId;
use crate::viommu::{HostSideError, Requester};
pub use guest_ioas::GuestIoas;
pub use hw_info::{host_smmu, host_vtd};

/// The host's description of one device, from which the guest's capabilities are derived.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceInfo {
    /// The device's identity for the guest.
    pub rid: Bdf,
    /// The device's identity for the host.
    pub dev: ObjectId,
    /// The registers of its IOMMU, and its PASID width.
    pub info: HwInfo,
}

/// What nesting refuses, or what the host refused it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NestingError {
    /// A host call failed.
    #[error("{what}: {source}")]
    Host {
        /// What the call was for.
        what: String,
        /// The host's error.
        source: HostError,
    },
    /// The requester's device was never added.
    #[error("no device was added as {0}")]
    NoDevice(Bdf),
    /// The Requester ID, or the device object, was already added.
    #[error("{0} cannot be added: the Requester ID or the device object is in use already")]
    DeviceExists(Bdf),
    /// Erratum 772415: this IOMMU may write through read-only mappings of a nesting parent.
    #[error(
        "the guest memory at {gpa:#x} is mapped read-only, which erratum 772415 (SPR17) of the \
         IOMMU of {rid} forbids under nested translation; map it read-write, or not at all"
    )]
    ReadOnlyErratum {
        /// Address of the read-only mapping, in bytes.
        gpa: u64,
        /// A device behind an IOMMU with the erratum.
        rid: Bdf,
    },
    /// The device's PASIDs are too narrow.
    #[error("{requester}: the device has {bits}-bit PASIDs only")]
    PasidTooWide {
        /// The requester being configured.
        requester: Requester,
        /// Width of the device's PASIDs, in bits; 0 for none.
        bits: u8,
    },
    /// On the host, PASID 0 stands for the requests without PASID: it cannot be configured
    /// separately.
    #[error("{0}: the host uses PASID 0 for requests without PASID")]
    PasidZero(Requester),
    /// The guest uses second-stage tables of its own, which the host cannot walk.
    #[error("{0}: the host cannot nest second-stage tables that the guest owns")]
    GuestSecondStage(Requester),
    /// The guest's tables cannot be mirrored as they are: it gets a fault.
    #[error("IOVA {iova:#x} of the guest's tables cannot be mirrored: {why}")]
    NotMirrored {
        /// The first IOVA that is not, in bytes.
        iova: u64,
        /// Why, and what to do.
        why: String,
    },
    /// Tables are mirrored from guest memory that is known only.
    #[error(
        "the adopted IOAS {0} has a map that is not known here, so the guest's tables cannot be \
         mirrored: adopt it with GuestIoas::adopt_mapped"
    )]
    UnknownMap(ObjectId),
    /// Guest memory is unmapped in whole mappings.
    #[error(
        "the {length:#x} bytes of guest memory at {gpa:#x} are in part of a larger mapping: unmap \
         whole ones, as they were mapped or adopted"
    )]
    PartOfMapping {
        /// The first address to be unmapped, in bytes.
        gpa: u64,
        /// In bytes.
        length: u64,
    },
    /// A table that is not page-aligned.
    #[error("{requester}: the stage-1 table {table:#x} is not 4 KiB aligned")]
    UnalignedTable {
        /// The requester being configured.
        requester: Requester,
        /// GPA of the table, in bytes.
        table: u64,
    },
    /// The device is behind another kind of IOMMU, or none.
    #[error("{0} is not behind a VT-d, which a virtual VT-d needs")]
    NoVtd(Bdf),
    /// The device is behind another kind of IOMMU, or none.
    #[error("{0} is not behind an SMMUv3, which a virtual SMMUv3 needs")]
    NoSmmu(Bdf),
    /// All streams of one virtual SMMU must be behind one physical SMMU.
    #[error(
        "{rid} is behind another SMMU than {first}, and one virtual SMMU cannot serve both: give \
         each a virtual SMMU of its own"
    )]
    OtherSmmu {
        /// The device being added.
        rid: Bdf,
        /// A device added earlier.
        first: Bdf,
    },
    /// The stream's device was never added.
    #[error("no device was added with the StreamID {0}")]
    NoStream(StreamId),
    /// A command that only the owner of the physical SMMU may issue.
    #[error("not an invalidation of stage 1: {0}")]
    NoInvalidation(&'static str),
    /// The process cannot create another thread, or what that waits with.
    #[error("no thread can be started to deliver the events of streams: {0}")]
    NoThread(String),
    /// The host still has events for the guest, or their target does not take them.
    #[error("events of streams are still on their way to the guest; stop the devices first")]
    EventsPending,
    /// It was shut down.
    #[error("the host objects are gone already")]
    ShutDown,
}

impl NestingError {
    /// As an error for the virtual IOMMU: `what` it had requested, and whether DMA that was to be
    /// blocked is still possible.
    fn for_viommu(self, what: String, still_reachable: bool) -> HostSideError {
        HostSideError { what, still_reachable, source: Arc::new(self) }
    }
}

/// The result of nesting's parts.
type Result<T, E = NestingError> = std::result::Result<T, E>;

/// Describes the purpose of a host call in its error.
trait Context<T> {
    /// Adds `what`.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for crate::iommufd::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| NestingError::Host { what: what(), source })
    }
}
