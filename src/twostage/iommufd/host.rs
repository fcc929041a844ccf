// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The trait of the verbs, and the queues that a host fills and its user reads.

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};

use super::{
    DirtyRange, Errno, Extensions, HostError, HostFault, HwInfo, HwptAlloc, InvalidateData,
    InvalidateError, IovaRanges, MapTarget, ObjectId, PageRequest, PageResponseCode, Protection,
    Result, UserMemory, Verb, Vevent, ViommuKind,
};

/// The destination of DMA faults.
pub trait FaultSink: Send + Sync {
    /// One DMA request failed. Called by the thread that made the request, with no lock of the host
    /// held; when it returns, the fault is visible.
    fn dma_fault(&self, fault: &HostFault);

    /// A request of `dev`, or of its `pasid`, is about to fail because nothing is attached. The
    /// implementation may attach something and return true: the request is then retried once.
    /// Called as [`FaultSink::dma_fault`] is, and before it.
    fn attached_late(&self, dev: ObjectId, pasid: Option<u32>) -> bool {
        let _ = (dev, pasid);
        false
    }
}

/// One iommufd and the devices bound to it.
///
/// Every method is one ioctl and may be called from any thread. If it fails nothing has changed,
/// except for [`HostIommu::hwpt_invalidate`], which reports its progress, and
/// [`HostIommu::ioas_unmap`], which may have unmapped lower mappings. An invalidation, an unmap, a
/// replace or a detach returns only when no DMA can use what it removed.
///
/// Every host has the same verbs, and a host can be in front of another:
///
/// ```
/// # #[cfg(feature = "test-support")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
/// use twostage::iommufd::{CountedHost, HostIommu, HwptAlloc, HwptData, HwptFlags, Verb};
/// # use twostage::iommufd::fake::RecordingHost;
///
/// // With the kernel's: `KernelHost::open`, and `device_bind`.
/// # let (host, nic) = RecordingHost::with_vtd();
/// let counted = CountedHost::new(host, None);
/// let counters = counted.counters();
/// let host: Arc<dyn HostIommu> = Arc::new(counted);
///
/// // Stage 2 for a guest, and a device whose DMA goes through it.
/// let ioas = host.ioas_alloc()?;
/// let flags = HwptFlags::new().with_nest_parent(true);
/// let parent = HwptAlloc { flags, dev: nic, pt: ioas, data: HwptData::None, fault: None };
/// let parent = host.hwpt_alloc(&parent)?;
/// host.device_attach(nic, None, parent)?;
/// let error = host.destroy(parent).unwrap_err();
/// assert_eq!(error.errno, twostage::iommufd::Errno::EBUSY);
/// assert_eq!((counters.calls(Verb::Destroy), counters.failures(Verb::Destroy)), (1, 1));
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "test-support"))]
/// # fn main() {}
/// ```
pub trait HostIommu: Debug + Send + Sync {
    /// Binds the device that the host knows as `name` (a VFIO cdev's path; an emulated device's
    /// name) and returns its object. The device starts blocked, until it is attached.
    ///
    /// # Errors
    /// `ENODEV` no such device; `EBUSY` bound already.
    fn device_bind(&self, name: &str) -> Result<ObjectId>;

    /// Detaches the device from everything and destroys its object, and its vDEVICE (whose ID is
    /// not reused then).
    ///
    /// # Errors
    /// `ENOENT` no such device.
    fn device_unbind(&self, dev: ObjectId) -> Result<()>;

    /// Attaches `dev`, or its `pasid`, to the IOAS or HWPT `pt`; *replaces* an existing attachment
    /// without a gap. Returns the HWPT used (`pt`, or the automatic one).
    ///
    /// # Errors
    /// `ENOENT` no such object; `EINVAL` not a page table, or incompatible with the device, its
    /// IOMMU or its PASIDs; `EADDRINUSE` a reserved region is mapped.
    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId>;

    /// Detaches `dev`, or its `pasid`: its DMA is blocked. Does nothing if it was not attached.
    ///
    /// # Errors
    /// `ENOENT` no such device.
    fn device_detach(&self, dev: ObjectId, pasid: Option<u32>) -> Result<()>;

    /// Destroys an unused object.
    ///
    /// # Errors
    /// `ENOENT` no such object; `EBUSY` something uses it.
    fn destroy(&self, id: ObjectId) -> Result<()>;

    /// Creates an empty IOAS.
    ///
    /// # Errors
    /// `ENOMEM`.
    fn ioas_alloc(&self) -> Result<ObjectId>;

    /// Limits automatic placement to `ranges` (bytes, both ends included).
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` a range is empty or two overlap; `EADDRINUSE` reserved for a device.
    fn ioas_allow_iovas(&self, ioas: ObjectId, ranges: &[RangeInclusive<u64>]) -> Result<()>;

    /// The IOVAs that the IOAS can map.
    ///
    /// # Errors
    /// `ENOENT`.
    fn ioas_iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges>;

    /// Maps `memory` and returns its IOVA, in bytes.
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` unaligned, empty or reserved; `EEXIST` or `EADDRINUSE` mapped already;
    /// `EOVERFLOW` past the end of the address space; `ENOMEM`.
    fn ioas_map(
        &self,
        ioas: ObjectId,
        memory: &UserMemory,
        target: MapTarget,
        protection: Protection,
    ) -> Result<u64>;

    /// Maps in `dst` what `src` maps at `src_iova` for `length` bytes, sharing its pages; returns
    /// the IOVA in `dst`.
    ///
    /// # Errors
    /// As [`HostIommu::ioas_map`]; `ENOENT` also when `src` does not map the whole range.
    fn ioas_copy(
        &self,
        dst: ObjectId,
        target: MapTarget,
        src: ObjectId,
        src_iova: u64,
        length: u64,
        protection: Protection,
    ) -> Result<u64>;

    /// Unmaps whole mappings; `iova = 0, length = u64::MAX` unmaps all. Returns the bytes unmapped.
    ///
    /// # Errors
    /// `ENOENT` nothing is mapped there, or a mapping would be split: whole mappings below it are
    /// then unmapped nevertheless, as in Linux.
    fn ioas_unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64>;

    /// The IOMMU that `dev` is behind.
    ///
    /// # Errors
    /// `ENOENT`.
    fn get_hw_info(&self, dev: ObjectId) -> Result<HwInfo>;

    /// Creates a HWPT.
    ///
    /// # Errors
    /// `ENOENT`; `EOPNOTSUPP` flags, data or parent that this IOMMU does not support; `EINVAL` not
    /// a possible parent.
    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId>;

    /// Invalidates what the IOMMU caches of user-owned tables of `hwpt` (a HWPT_NESTED or vIOMMU).
    ///
    /// # Errors
    /// [`InvalidateError`] has the number of completed entries.
    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> Result<(), InvalidateError>;

    /// Starts or stops tracking which pages DMA writes through `hwpt`, a HWPT_PAGING, and through
    /// the HWPTs nested on it. Nothing is dirty when it starts; what is dirty when it stops
    /// remains so until it is cleared.
    ///
    /// # Errors
    /// `ENOENT`; `EOPNOTSUPP` allocated without `DIRTY_TRACKING`.
    fn hwpt_set_dirty_tracking(&self, hwpt: ObjectId, enable: bool) -> Result<()>;

    /// Sets the bits of the dirty pages of `range` in `bitmap`, from bit 0 of its first word on;
    /// other bits are not changed. `clear` makes the pages clean; later writes make them dirty
    /// again. What is mapped beyond the first hole of the range is ignored.
    ///
    /// # Errors
    /// `ENOENT`; `EOVERFLOW` past the end of the address space; `EINVAL` unaligned; `EOPNOTSUPP`
    /// as [`HostIommu::hwpt_set_dirty_tracking`]; `EFAULT` the bitmap is too short.
    fn hwpt_get_dirty_bitmap(
        &self,
        hwpt: ObjectId,
        range: &DirtyRange,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<()>;

    /// Creates a vIOMMU: a guest's slice of the physical IOMMU of `dev`, on the nesting parent
    /// `hwpt`.
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` not a nesting parent of this IOMMU; `EOPNOTSUPP` an unsupported kind.
    fn viommu_alloc(&self, kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId>;

    /// Sets the `virt_id` by which the vIOMMU's guest knows `dev`.
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` the device is behind another physical IOMMU; `EEXIST` it has a vDEVICE or
    /// the id is taken.
    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId>;

    /// Creates a fault queue: it gets the page requests of devices attached to HWPTs that name it.
    ///
    /// # Errors
    /// `ENOMEM`; `EMFILE`.
    fn fault_queue_alloc(&self) -> Result<Arc<dyn FaultQueue>>;

    /// Creates a vEVENTQ of `viommu` for events of one type (`enum iommu_veventq_type`), of which
    /// it holds up to `depth`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` the default type; `EINVAL` no depth, or more than 2^19; `ENOENT`; `EEXIST` the
    /// vIOMMU has one of this type.
    fn veventq_alloc(&self, viommu: ObjectId, kind: u32, depth: u32)
        -> Result<Arc<dyn EventQueue>>;

    /// Abilities of this host beyond the kernel's uAPI.
    fn extensions(&self) -> Extensions {
        Extensions::default()
    }

    /// Delivers DMA faults of `dev` to `sink` while it exists; replaces an earlier sink.
    ///
    /// # Errors
    /// `EOPNOTSUPP` unless [`Extensions::fault_reports`].
    fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Result<()> {
        drop(sink);
        Err(HostError::new(
            Verb::DeviceBind,
            dev,
            Errno::EOPNOTSUPP,
            "this host does not report DMA faults to user space",
        ))
    }

    /// Tells `dev` to forget the translations of `addresses` (bytes) that it has for requests with
    /// `pasid`, or for all of its requests (PCI ATS). Returns whether it has answered.
    ///
    /// # Errors
    /// `EOPNOTSUPP` unless [`Extensions::device_tlbs`].
    fn device_tlb_invalidate(
        &self,
        dev: ObjectId,
        pasid: Option<u32>,
        addresses: RangeInclusive<u64>,
    ) -> Result<bool> {
        let _ = (pasid, addresses);
        let detail = "this host invalidates device TLBs together with its own";
        Err(HostError::new(Verb::HwptInvalidate, dev, Errno::EOPNOTSUPP, detail))
    }
}

/// Is notified when a queue becomes readable or empty.
pub trait Readiness: Send + Sync {
    /// `readable` is the new state. The queue and its iommufd may be locked: do not call them here,
    /// only wake another thread.
    fn changed(&self, readable: bool);
}

/// Page requests that are answered together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequestGroup {
    /// Identifies the group for the response. Never 0.
    pub cookie: u32,
    /// The requesting device.
    pub dev: ObjectId,
    /// Oldest first; the last one closes the group.
    pub requests: Vec<PageRequest>,
}

/// An open fault queue (`IOMMU_FAULT_QUEUE_ALLOC`). Its object cannot be destroyed until this is
/// dropped.
pub trait FaultQueue: Debug + Send + Sync {
    /// Its object, for [`super::HwptAlloc::fault`].
    fn object(&self) -> ObjectId;

    /// The next group, if there is one. Never blocks.
    ///
    /// # Errors
    /// As [`EventQueue::next_event`].
    fn next_group(&self) -> Result<Option<PageRequestGroup>>;

    /// Responds to a group.
    ///
    /// # Errors
    /// `EINVAL` the group was answered already, as its attachment has ended.
    fn respond(&self, cookie: u32, code: PageResponseCode) -> Result<()>;

    /// Notifies `watcher`, which replaces an earlier one, of the current state and of changes.
    ///
    /// # Errors
    /// As [`EventQueue::watch`].
    fn watch(&self, watcher: Arc<dyn Readiness>) -> Result<()>;
}

/// An open vEVENTQ (`IOMMU_VEVENTQ_ALLOC`). Its object cannot be destroyed until this is dropped.
pub trait EventQueue: Debug + Send + Sync {
    /// Its object.
    fn object(&self) -> ObjectId;

    /// The next event, if there is one. Never blocks.
    ///
    /// # Errors
    /// `ENOMEM` the host has no memory for it now: the event stays, and can be read later. Other
    /// errors, such as `EIO`: the queue can never be read again.
    fn next_event(&self) -> Result<Option<Vevent>>;

    /// Notifies `watcher`, which replaces an earlier one, of the current state and of changes.
    ///
    /// # Errors
    /// `EMFILE`, `EAGAIN` and the like: nobody can wait for the queue, as there is no descriptor or
    /// no thread for it. `watcher` is not notified, and an earlier one is as before.
    fn watch(&self, watcher: Arc<dyn Readiness>) -> Result<()>;
}
