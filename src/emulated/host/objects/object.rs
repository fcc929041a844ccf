// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The contents of each kind of object, and what it holds. Operations are in the other files.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::drivers::{NestedDomain, PagingDomain, ViommuDriver};
use crate::host::events::{FaultQueue, ViommuEvents};
use crate::host::machine::{Part, UnitId};
use crate::ioas::{IovaSpace, PAGE_SIZE};
use crate::units::stage2::Stage2;
use twostage::iommufd::{HwptFlags, ObjectId, PageRequest};

/// Kinds of objects, with the names of Linux's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub enum ObjectKind {
    /// An I/O address space.
    #[cfg_attr(feature = "serde", serde(rename = "IOAS"))]
    Ioas,
    /// A page table filled from an IOAS.
    #[cfg_attr(feature = "serde", serde(rename = "HWPT_PAGING"))]
    HwptPaging,
    /// A page table that the user owns, on top of a nesting parent.
    #[cfg_attr(feature = "serde", serde(rename = "HWPT_NESTED"))]
    HwptNested,
    /// A bound device.
    #[cfg_attr(feature = "serde", serde(rename = "DEVICE"))]
    Device,
    /// A slice of a physical IOMMU.
    #[cfg_attr(feature = "serde", serde(rename = "VIOMMU"))]
    Viommu,
    /// A device of a vIOMMU.
    #[cfg_attr(feature = "serde", serde(rename = "VDEVICE"))]
    Vdevice,
    /// A user of an IOAS without an IOMMU.
    #[cfg_attr(feature = "serde", serde(rename = "ACCESS"))]
    Access,
    /// A queue of page requests.
    #[cfg_attr(feature = "serde", serde(rename = "FAULT"))]
    Fault,
    /// A queue of events of a vIOMMU.
    #[cfg_attr(feature = "serde", serde(rename = "VEVENTQ"))]
    Veventq,
    /// A queue that a vIOMMU's hardware reads directly.
    #[cfg_attr(feature = "serde", serde(rename = "HW_QUEUE"))]
    HwQueue,
    /// Keeps a mock device bound.
    #[cfg_attr(feature = "serde", serde(rename = "SELFTEST"))]
    Selftest,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ioas => "IOAS",
            Self::HwptPaging => "HWPT_PAGING",
            Self::HwptNested => "HWPT_NESTED",
            Self::Device => "DEVICE",
            Self::Viommu => "VIOMMU",
            Self::Vdevice => "VDEVICE",
            Self::Access => "ACCESS",
            Self::Fault => "FAULT",
            Self::Veventq => "VEVENTQ",
            Self::HwQueue => "HW_QUEUE",
            Self::Selftest => "SELFTEST",
        })
    }
}

/// One object.
#[derive(Debug)]
pub(crate) enum Object {
    Ioas(Ioas),
    HwptPaging(HwptPaging),
    HwptNested(HwptNested),
    Device(Device),
    Viommu(Viommu),
    Vdevice(Vdevice),
    Access(Access),
    Fault(Fault),
    Veventq(Veventq),
    HwQueue(HwQueue),
    #[cfg_attr(not(feature = "selftest"), expect(dead_code, reason = "made by test operations"))]
    Selftest(Selftest),
}

impl Object {
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::Ioas(_) => ObjectKind::Ioas,
            Self::HwptPaging(_) => ObjectKind::HwptPaging,
            Self::HwptNested(_) => ObjectKind::HwptNested,
            Self::Device(_) => ObjectKind::Device,
            Self::Viommu(_) => ObjectKind::Viommu,
            Self::Vdevice(_) => ObjectKind::Vdevice,
            Self::Access(_) => ObjectKind::Access,
            Self::Fault(_) => ObjectKind::Fault,
            Self::Veventq(_) => ObjectKind::Veventq,
            Self::HwQueue(_) => ObjectKind::HwQueue,
            Self::Selftest(_) => ObjectKind::Selftest,
        }
    }
}

/// An I/O address space.
#[derive(Debug)]
pub(crate) struct Ioas {
    /// What is mapped, reserved and allowed.
    pub space: IovaSpace,
    /// The HWPTs' mappings, for DMA; empty without HWPTs.
    pub stage2: Arc<Stage2>,
    /// HWPTs of the IOAS, oldest first.
    pub hwpts: Vec<ObjectId>,
    /// Access objects attached to it, oldest first.
    pub accesses: Vec<ObjectId>,
    /// Required alignment of IOVAs, lengths and addresses of memory, in bytes.
    pub alignment: u64,
    /// HWPTs may hold pages larger than the host's (`IOMMU_OPTION_HUGE_PAGES`).
    pub huge_pages: bool,
}

impl Default for Ioas {
    fn default() -> Self {
        Self {
            space: IovaSpace::default(),
            stage2: Arc::default(),
            hwpts: Vec::new(),
            accesses: Vec::new(),
            alignment: 1,
            huge_pages: true,
        }
    }
}

/// A HWPT_PAGING: filled from its IOAS.
#[derive(Debug)]
pub(crate) struct HwptPaging {
    pub ioas: ObjectId,
    /// The driver's half.
    pub domain: Arc<dyn PagingDomain>,
    pub flags: HwptFlags,
    /// Created by an attachment to the IOAS; destroyed with its last attachment.
    pub automatic: bool,
    pub fault: Option<ObjectId>,
}

/// A HWPT_NESTED: user-owned tables on top of a HWPT_PAGING. It has no IOAS.
#[derive(Debug)]
pub(crate) struct HwptNested {
    /// The nesting parent.
    pub parent: ObjectId,
    /// The vIOMMU it was created on, which then holds the parent instead.
    pub viommu: Option<ObjectId>,
    /// The driver's half.
    pub domain: Arc<dyn NestedDomain>,
    pub flags: HwptFlags,
    pub fault: Option<ObjectId>,
}

/// A bound device.
#[derive(Debug)]
pub(crate) struct Device {
    pub part: Arc<Part>,
    pub vdevice: Option<ObjectId>,
    /// Page requests of incomplete groups, oldest first.
    pub page_requests: Vec<PageRequest>,
}

/// A slice of one physical IOMMU. It is bound to the IOMMU, not to the device named at creation.
#[derive(Debug)]
pub(crate) struct Viommu {
    /// Its type, as the uAPI's number.
    pub kind: u32,
    pub unit: UnitId,
    /// The nesting parent.
    pub parent: ObjectId,
    /// The driver's half.
    pub driver: Arc<dyn ViommuDriver>,
    /// Where the driver reports events.
    pub events: Arc<ViommuEvents>,
}

/// A device of a vIOMMU.
#[derive(Debug)]
pub(crate) struct Vdevice {
    pub viommu: ObjectId,
    pub dev: ObjectId,
    pub virt_id: u64,
}

/// The user of pages pinned by an [`Access`](crate::Access).
pub trait AccessUnmap: Debug + Send + Sync {
    /// The user unmaps `length` bytes at `iova`, or everything (`0`, `u64::MAX`) when the access
    /// object leaves its IOAS. When this returns, nothing pinned there is in use, and it is
    /// unpinned ([`Access::unpin_pages`](crate::Access::unpin_pages)).
    ///
    /// Called with no lock of the host held, by the unmapping thread, which waits; concurrently, if
    /// several threads unmap. It must not unmap anything itself, nor attach, replace or detach the
    /// access object. A call may outlast the access object, in which case there is nothing to do.
    fn unmap(&self, iova: u64, length: u64);
}

/// An access object.
#[derive(Debug)]
pub(crate) struct Access {
    /// Is told to unpin pages; none for one that never pins.
    pub listener: Option<Arc<dyn AccessUnmap>>,
    /// The IOAS whose pages it may pin; none while it is being moved.
    pub ioas: Option<ObjectId>,
    /// The IOAS whose pages it has pinned.
    pub pinned_in: Option<ObjectId>,
    /// First and last IOVA of pinned ranges, and how often.
    pub pins: BTreeMap<(u64, u64), u32>,
}

impl Access {
    /// Its required alignment of IOVAs, lengths and addresses of memory, in bytes.
    pub fn alignment(&self) -> u64 {
        if self.listener.is_some() {
            PAGE_SIZE
        } else {
            1
        }
    }
}

/// A fault queue.
#[derive(Debug)]
pub(crate) struct Fault {
    pub queue: Arc<FaultQueue>,
    /// Its descriptor is open, and counts as a user.
    pub open: bool,
}

/// A vEVENTQ.
#[derive(Debug)]
pub(crate) struct Veventq {
    pub viommu: ObjectId,
    /// Its type, as the uAPI's number.
    pub kind: u32,
    /// Its descriptor is open, and counts as a user.
    pub open: bool,
}

/// A hardware queue. Its memory is pinned, and cannot be unmapped.
#[derive(Debug)]
pub(crate) struct HwQueue {
    pub viommu: ObjectId,
    /// The queue that this one depends on.
    pub needs: Option<ObjectId>,
    /// The IOAS of the pinned mappings.
    pub ioas: ObjectId,
    /// Whole pages.
    pub pages: RangeInclusive<u64>,
}

/// Keeps a mock device bound. Its device, with its attachments, ends with it.
#[derive(Debug)]
pub(crate) struct Selftest {
    pub dev: ObjectId,
    /// The device's name in the machine.
    pub name: String,
}
