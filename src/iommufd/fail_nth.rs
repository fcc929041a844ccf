// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host whose n-th call fails: a test aid, in the manner of Linux's `fail-nth`.
//!
//! Run a scenario with `n` = 1, 2, 3… until no failure is left over, and look each time that
//! nothing leaked and nobody panicked.
#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{
    DirtyRange, Errno, EventQueue, Extensions, FaultQueue, FaultSink, HostError, HostIommu, HwInfo,
    HwptAlloc, InvalidateData, InvalidateError, IovaRanges, MapTarget, ObjectId, Protection,
    Result, UserMemory, Verb, ViommuKind,
};

/// `inner`, with one call that fails without reaching it. For tests.
#[derive(Debug)]
pub struct FailNth<H: HostIommu + ?Sized> {
    inner: Arc<H>,
    calls: AtomicU64,
    /// Number of the call that fails, counted from 1 over the life of the value, and how.
    failing: Mutex<Option<(u64, Errno)>>,
}

impl<H: HostIommu + ?Sized> FailNth<H> {
    /// Passes every call on to `inner` until told otherwise.
    pub fn new(inner: Arc<H>) -> Self {
        Self { inner, calls: AtomicU64::new(0), failing: Mutex::new(None) }
    }

    /// Makes the `n`-th verb called from now on (1 is the next) fail with `errno`, once. Replaces
    /// an earlier wish; 0 only drops it.
    pub fn fail_nth(&self, n: u64, errno: Errno) {
        let number = self.calls.load(Ordering::SeqCst) + n;
        *self.failing() = (n != 0).then_some((number, errno));
    }

    /// Whether the failure asked for is still to come.
    pub fn is_armed(&self) -> bool {
        self.failing().is_some()
    }

    /// How many verbs were called, failed ones included.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// The host that serves the calls.
    pub fn inner(&self) -> &Arc<H> {
        &self.inner
    }

    fn failing(&self) -> std::sync::MutexGuard<'_, Option<(u64, Errno)>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, and fails it when it is its turn.
    fn count(&self, verb: Verb, object: Option<ObjectId>) -> Result<()> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let mut failing = self.failing();
        match *failing {
            Some((nth, errno)) if nth == number => {
                *failing = None;
                Err(HostError::new(verb, object, errno, "a failure was asked for"))
            }
            _ => Ok(()),
        }
    }
}

impl<H: HostIommu + ?Sized> HostIommu for FailNth<H> {
    fn device_bind(&self, name: &str) -> Result<ObjectId> {
        self.count(Verb::DeviceBind, None)?;
        self.inner.device_bind(name)
    }

    fn device_unbind(&self, dev: ObjectId) -> Result<()> {
        self.count(Verb::DeviceUnbind, Some(dev))?;
        self.inner.device_unbind(dev)
    }

    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId> {
        self.count(Verb::DeviceAttach, Some(dev))?;
        self.inner.device_attach(dev, pasid, pt)
    }

    fn device_detach(&self, dev: ObjectId, pasid: Option<u32>) -> Result<()> {
        self.count(Verb::DeviceDetach, Some(dev))?;
        self.inner.device_detach(dev, pasid)
    }

    fn destroy(&self, id: ObjectId) -> Result<()> {
        self.count(Verb::Destroy, Some(id))?;
        self.inner.destroy(id)
    }

    fn ioas_alloc(&self) -> Result<ObjectId> {
        self.count(Verb::IoasAlloc, None)?;
        self.inner.ioas_alloc()
    }

    fn ioas_allow_iovas(&self, ioas: ObjectId, ranges: &[RangeInclusive<u64>]) -> Result<()> {
        self.count(Verb::IoasAllowIovas, Some(ioas))?;
        self.inner.ioas_allow_iovas(ioas, ranges)
    }

    fn ioas_iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges> {
        self.count(Verb::IoasIovaRanges, Some(ioas))?;
        self.inner.ioas_iova_ranges(ioas)
    }

    fn ioas_map(
        &self,
        ioas: ObjectId,
        memory: &UserMemory,
        target: MapTarget,
        protection: Protection,
    ) -> Result<u64> {
        self.count(Verb::IoasMap, Some(ioas))?;
        self.inner.ioas_map(ioas, memory, target, protection)
    }

    fn ioas_copy(
        &self,
        dst: ObjectId,
        target: MapTarget,
        src: ObjectId,
        src_iova: u64,
        length: u64,
        protection: Protection,
    ) -> Result<u64> {
        self.count(Verb::IoasCopy, Some(dst))?;
        self.inner.ioas_copy(dst, target, src, src_iova, length, protection)
    }

    fn ioas_unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64> {
        self.count(Verb::IoasUnmap, Some(ioas))?;
        self.inner.ioas_unmap(ioas, iova, length)
    }

    fn get_hw_info(&self, dev: ObjectId) -> Result<HwInfo> {
        self.count(Verb::GetHwInfo, Some(dev))?;
        self.inner.get_hw_info(dev)
    }

    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId> {
        self.count(Verb::HwptAlloc, Some(args.pt))?;
        self.inner.hwpt_alloc(args)
    }

    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> std::result::Result<(), InvalidateError> {
        self.count(Verb::HwptInvalidate, Some(hwpt))
            .map_err(|error| InvalidateError { done: 0, error })?;
        self.inner.hwpt_invalidate(hwpt, data)
    }

    fn hwpt_set_dirty_tracking(&self, hwpt: ObjectId, enable: bool) -> Result<()> {
        self.count(Verb::HwptSetDirtyTracking, Some(hwpt))?;
        self.inner.hwpt_set_dirty_tracking(hwpt, enable)
    }

    fn hwpt_get_dirty_bitmap(
        &self,
        hwpt: ObjectId,
        range: &DirtyRange,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<()> {
        self.count(Verb::HwptGetDirtyBitmap, Some(hwpt))?;
        self.inner.hwpt_get_dirty_bitmap(hwpt, range, clear, bitmap)
    }

    fn viommu_alloc(&self, kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId> {
        self.count(Verb::ViommuAlloc, Some(hwpt))?;
        self.inner.viommu_alloc(kind, dev, hwpt)
    }

    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId> {
        self.count(Verb::VdeviceAlloc, Some(viommu))?;
        self.inner.vdevice_alloc(viommu, dev, virt_id)
    }

    fn fault_queue_alloc(&self) -> Result<Arc<dyn FaultQueue>> {
        self.count(Verb::FaultQueueAlloc, None)?;
        self.inner.fault_queue_alloc()
    }

    fn veventq_alloc(
        &self,
        viommu: ObjectId,
        kind: u32,
        depth: u32,
    ) -> Result<Arc<dyn EventQueue>> {
        self.count(Verb::VeventqAlloc, Some(viommu))?;
        self.inner.veventq_alloc(viommu, kind, depth)
    }

    fn extensions(&self) -> Extensions {
        self.inner.extensions()
    }

    fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Result<()> {
        self.inner.set_fault_sink(dev, sink)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulated::EmulatedHost;

    #[test]
    fn only_the_nth_call_fails_and_does_not_reach_the_host() {
        let inner = EmulatedHost::new();
        let host = FailNth::new(inner.clone());
        host.fail_nth(2, Errno::ENOMEM);
        host.ioas_alloc().unwrap();
        let error = host.ioas_alloc().unwrap_err();
        assert_eq!((error.verb, error.errno), (Verb::IoasAlloc, Errno::ENOMEM));
        assert!(!host.is_armed());
        assert_eq!(inner.live_objects(), 1);
        host.ioas_alloc().unwrap();
        assert_eq!((host.calls(), inner.live_objects()), (3, 2));
    }

    #[test]
    fn the_count_starts_when_it_is_asked_for() {
        let host = FailNth::new(EmulatedHost::new());
        let id = host.ioas_alloc().unwrap();
        host.fail_nth(1, Errno::EIO);
        assert_eq!(host.destroy(id).unwrap_err().errno, Errno::EIO);
        host.destroy(id).unwrap();
        host.fail_nth(1, Errno::EIO);
        host.fail_nth(0, Errno::EIO);
        assert!(!host.is_armed());
        host.ioas_alloc().unwrap();
    }

    #[test]
    fn a_failed_invalidation_did_nothing() {
        let host: Arc<dyn HostIommu> = EmulatedHost::new();
        let host = FailNth::new(host);
        host.fail_nth(1, Errno::ETIMEDOUT);
        let error = host.hwpt_invalidate(ObjectId(1), InvalidateData::VtdS1(&[])).unwrap_err();
        assert_eq!((error.done, error.error.errno), (0, Errno::ETIMEDOUT));
    }
}
