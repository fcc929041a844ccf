// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The trait of the verbs.

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};

use super::{
    DirtyRange, Errno, EventQueue, Extensions, FaultQueue, HostError, HostFault, HwInfo, HwptAlloc,
    InvalidateData, InvalidateError, IovaRanges, MapTarget, ObjectId, Protection, Result,
    UserMemory, Verb, ViommuKind,
};

/// Where a host delivers DMA faults.
pub trait FaultSink: Send + Sync {
    /// One DMA request failed. Called by the thread that made the request, with no lock of the
    /// host held; by the time it returns the fault is visible to whoever looks.
    fn dma_fault(&self, fault: &HostFault);

    /// A request of `dev`, or of its `pasid`, is about to fail because nothing is attached. Whoever
    /// finds that something ought to be may attach it now and say so: the request is then tried
    /// again, once. Called as [`FaultSink::dma_fault`] is, and before it.
    fn attached_late(&self, dev: ObjectId, pasid: Option<u32>) -> bool {
        let _ = (dev, pasid);
        false
    }
}

/// One iommufd and the devices bound to it.
///
/// Every method is one ioctl and may be called from any thread. When it fails nothing has
/// changed, but for [`HostIommu::hwpt_invalidate`], which says how far it came, and
/// [`HostIommu::ioas_unmap`], which may have unmapped what is below. An invalidation,
/// an unmap, a replace or a detach returns only when no DMA can use what it took away any more.
pub trait HostIommu: Debug + Send + Sync {
    /// Binds the device that the host knows as `name` (a VFIO cdev's path; an emulated device's
    /// name) and gives its object. The device starts blocked: it reaches nothing until attached.
    ///
    /// # Errors
    /// `ENODEV` no such device; `EBUSY` bound already.
    fn device_bind(&self, name: &str) -> Result<ObjectId>;

    /// Detaches the device from everything and ends its object, and its vDEVICE with it (whose id
    /// is then not used again).
    ///
    /// # Errors
    /// `ENOENT` no such device.
    fn device_unbind(&self, dev: ObjectId) -> Result<()>;

    /// Attaches `dev`, or its `pasid`, to the IOAS or HWPT `pt`; *replaces* without a gap what was
    /// attached before. Returns the HWPT that serves (`pt` itself, or the automatic one).
    ///
    /// # Errors
    /// `ENOENT` no such object; `EINVAL` not a page table, or incompatible with the device, its
    /// IOMMU or its PASIDs; `EADDRINUSE` a reserved region is mapped.
    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId>;

    /// Detaches `dev`, or its `pasid`: its DMA is blocked. Nothing happens when it was detached.
    ///
    /// # Errors
    /// `ENOENT` no such device.
    fn device_detach(&self, dev: ObjectId, pasid: Option<u32>) -> Result<()>;

    /// Destroys an object that nothing uses.
    ///
    /// # Errors
    /// `ENOENT` no such object; `EBUSY` something uses it.
    fn destroy(&self, id: ObjectId) -> Result<()>;

    /// Makes an empty IOAS.
    ///
    /// # Errors
    /// `ENOMEM`.
    fn ioas_alloc(&self) -> Result<ObjectId>;

    /// Limits automatic placement to `ranges` (bytes, both ends included).
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` a range is empty or two overlap; `EADDRINUSE` reserved for a device.
    fn ioas_allow_iovas(&self, ioas: ObjectId, ranges: &[RangeInclusive<u64>]) -> Result<()>;

    /// What the IOAS can map.
    ///
    /// # Errors
    /// `ENOENT`.
    fn ioas_iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges>;

    /// Maps `memory` and returns the IOVA it is at, in bytes.
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
    /// `ENOENT` nothing is mapped there, or a mapping would be cut: whole mappings below it are
    /// then unmapped all the same, as Linux does it.
    fn ioas_unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64>;

    /// What IOMMU `dev` is behind.
    ///
    /// # Errors
    /// `ENOENT`.
    fn get_hw_info(&self, dev: ObjectId) -> Result<HwInfo>;

    /// Makes a HWPT.
    ///
    /// # Errors
    /// `ENOENT`; `EOPNOTSUPP` flags, data or parent that this IOMMU does not support; `EINVAL` a
    /// parent that can be none.
    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId>;

    /// Invalidates what the IOMMU caches of user-owned tables of `hwpt` (a HWPT_NESTED or vIOMMU).
    ///
    /// # Errors
    /// [`InvalidateError`] says how many entries are complete.
    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> std::result::Result<(), InvalidateError>;

    /// Starts or stops to track which pages DMA writes through `hwpt`, a HWPT_PAGING, and through
    /// the HWPTs nested on it. Nothing is dirty when it starts.
    ///
    /// # Errors
    /// `ENOENT`; `EOPNOTSUPP` allocated without `DIRTY_TRACKING`.
    fn hwpt_set_dirty_tracking(&self, hwpt: ObjectId, enable: bool) -> Result<()>;

    /// Sets the bits of the dirty pages of `range` in `bitmap`, from bit 0 of its first word on;
    /// other bits stay. `clear` makes the pages clean: what is written from then on is dirty
    /// again. What is mapped beyond the first hole of the range is not looked at.
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

    /// Makes a vIOMMU: the slice of the physical IOMMU of `dev` that a guest gets, over the nesting
    /// parent `hwpt`.
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` not a nesting parent of this IOMMU; `EOPNOTSUPP` a kind it does not have.
    fn viommu_alloc(&self, kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId>;

    /// Tells the vIOMMU by which `virt_id` the guest knows `dev`.
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` the device is behind another physical IOMMU; `EEXIST` it has a vDEVICE or
    /// the id is taken.
    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId>;

    /// Makes a fault queue: it gets the page requests of devices while they are attached to HWPTs
    /// that name it.
    ///
    /// # Errors
    /// `ENOMEM`; `EMFILE`.
    fn fault_queue_alloc(&self) -> Result<Arc<dyn FaultQueue>>;

    /// Makes a vEVENTQ of `viommu` for events of one type (`enum iommu_veventq_type`), of which it
    /// keeps up to `depth`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` the default type; `EINVAL` no depth, or more than 2^19; `ENOENT`; `EEXIST` the
    /// vIOMMU has one of this type.
    fn veventq_alloc(&self, viommu: ObjectId, kind: u32, depth: u32)
        -> Result<Arc<dyn EventQueue>>;

    /// What this host can do beyond the kernel's uAPI.
    fn extensions(&self) -> Extensions {
        Extensions::default()
    }

    /// Delivers DMA faults of `dev` to `sink` while that lives; replaces an earlier sink.
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
}
