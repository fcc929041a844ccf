// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host that counts the calls made to another, and shows each to an observer.
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::{
    DirtyRange, EventQueue, Extensions, FaultQueue, FaultSink, HostIommu, HwInfo, HwptAlloc,
    InvalidateData, InvalidateError, IovaRanges, MapTarget, ObjectId, Protection, Result,
    UserMemory, Verb, ViommuKind,
};

/// Sees every host call after it returned.
pub trait VerbObserver: Send + Sync {
    /// `verb` took `duration` and failed with `error`, if any. `objects` are those that the call
    /// names, in its order, behind the one that it made.
    fn called(
        &self,
        verb: Verb,
        objects: &[ObjectId],
        started: Instant,
        duration: Duration,
        error: Option<&dyn fmt::Display>,
    );
}

/// Calls and failures, by verb. Reads are of each number alone, not of one moment.
#[derive(Debug, Default)]
pub struct VerbCounters {
    calls: [AtomicU64; Verb::ALL.len()],
    failures: [AtomicU64; Verb::ALL.len()],
}

impl VerbCounters {
    /// How often `verb` was called.
    pub fn calls(&self, verb: Verb) -> u64 {
        // The discriminant of a verb is its place in ALL, so the index is in range.
        self.calls[verb as usize].load(Ordering::Relaxed)
    }

    /// How often `verb` failed.
    pub fn failures(&self, verb: Verb) -> u64 {
        self.failures[verb as usize].load(Ordering::Relaxed)
    }

    fn count(&self, verb: Verb, failed: bool) {
        self.calls[verb as usize].fetch_add(1, Ordering::Relaxed);
        if failed {
            self.failures[verb as usize].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `inner`, counted.
pub struct CountedHost {
    inner: Arc<dyn HostIommu>,
    counters: Arc<VerbCounters>,
    observer: Option<Arc<dyn VerbObserver>>,
}

impl CountedHost {
    /// Counts the calls to `inner` and shows them to `observer`, if there is one.
    pub fn new(inner: Arc<dyn HostIommu>, observer: Option<Arc<dyn VerbObserver>>) -> Self {
        Self { inner, counters: Arc::default(), observer }
    }

    /// The counters, which go on counting.
    pub fn counters(&self) -> Arc<VerbCounters> {
        self.counters.clone()
    }

    fn call<T, E: fmt::Display>(
        &self,
        verb: Verb,
        named: &[ObjectId],
        made: impl FnOnce(&T) -> Option<ObjectId>,
        call: impl FnOnce(&dyn HostIommu) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let started = self.observer.is_some().then(Instant::now);
        let result = call(&*self.inner);
        self.counters.count(verb, result.is_err());
        if let (Some(observer), Some(started)) = (&self.observer, started) {
            let duration = started.elapsed();
            let new = result.as_ref().ok().and_then(made);
            let objects: Vec<_> = new.into_iter().chain(named.iter().copied()).collect();
            let error = result.as_ref().err().map(|error| error as &dyn fmt::Display);
            observer.called(verb, &objects, started, duration, error);
        }
        result
    }
}

impl fmt::Debug for CountedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CountedHost").field("inner", &self.inner).finish_non_exhaustive()
    }
}

fn nothing<T>(_: &T) -> Option<ObjectId> {
    None
}

fn itself(id: &ObjectId) -> Option<ObjectId> {
    Some(*id)
}

impl HostIommu for CountedHost {
    fn device_bind(&self, name: &str) -> Result<ObjectId> {
        self.call(Verb::DeviceBind, &[], itself, |host| host.device_bind(name))
    }

    fn device_unbind(&self, dev: ObjectId) -> Result<()> {
        self.call(Verb::DeviceUnbind, &[dev], nothing, |host| host.device_unbind(dev))
    }

    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId> {
        self.call(Verb::DeviceAttach, &[dev, pt], nothing, |host| {
            host.device_attach(dev, pasid, pt)
        })
    }

    fn device_detach(&self, dev: ObjectId, pasid: Option<u32>) -> Result<()> {
        self.call(Verb::DeviceDetach, &[dev], nothing, |host| host.device_detach(dev, pasid))
    }

    fn destroy(&self, id: ObjectId) -> Result<()> {
        self.call(Verb::Destroy, &[id], nothing, |host| host.destroy(id))
    }

    fn ioas_alloc(&self) -> Result<ObjectId> {
        self.call(Verb::IoasAlloc, &[], itself, |host| host.ioas_alloc())
    }

    fn ioas_allow_iovas(&self, ioas: ObjectId, ranges: &[RangeInclusive<u64>]) -> Result<()> {
        self.call(Verb::IoasAllowIovas, &[ioas], nothing, |host| {
            host.ioas_allow_iovas(ioas, ranges)
        })
    }

    fn ioas_iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges> {
        self.call(Verb::IoasIovaRanges, &[ioas], nothing, |host| host.ioas_iova_ranges(ioas))
    }

    fn ioas_map(
        &self,
        ioas: ObjectId,
        memory: &UserMemory,
        target: MapTarget,
        protection: Protection,
    ) -> Result<u64> {
        self.call(Verb::IoasMap, &[ioas], nothing, |host| {
            host.ioas_map(ioas, memory, target, protection)
        })
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
        self.call(Verb::IoasCopy, &[dst, src], nothing, |host| {
            host.ioas_copy(dst, target, src, src_iova, length, protection)
        })
    }

    fn ioas_unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64> {
        self.call(Verb::IoasUnmap, &[ioas], nothing, |host| host.ioas_unmap(ioas, iova, length))
    }

    fn get_hw_info(&self, dev: ObjectId) -> Result<HwInfo> {
        self.call(Verb::GetHwInfo, &[dev], nothing, |host| host.get_hw_info(dev))
    }

    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId> {
        self.call(Verb::HwptAlloc, &[args.dev, args.pt], itself, |host| host.hwpt_alloc(args))
    }

    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> std::result::Result<(), InvalidateError> {
        self.call(Verb::HwptInvalidate, &[hwpt], nothing, |host| host.hwpt_invalidate(hwpt, data))
    }

    fn hwpt_set_dirty_tracking(&self, hwpt: ObjectId, enable: bool) -> Result<()> {
        self.call(Verb::HwptSetDirtyTracking, &[hwpt], nothing, |host| {
            host.hwpt_set_dirty_tracking(hwpt, enable)
        })
    }

    fn hwpt_get_dirty_bitmap(
        &self,
        hwpt: ObjectId,
        range: &DirtyRange,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<()> {
        self.call(Verb::HwptGetDirtyBitmap, &[hwpt], nothing, |host| {
            host.hwpt_get_dirty_bitmap(hwpt, range, clear, bitmap)
        })
    }

    fn viommu_alloc(&self, kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId> {
        self.call(Verb::ViommuAlloc, &[dev, hwpt], itself, |host| {
            host.viommu_alloc(kind, dev, hwpt)
        })
    }

    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId> {
        self.call(Verb::VdeviceAlloc, &[viommu, dev], itself, |host| {
            host.vdevice_alloc(viommu, dev, virt_id)
        })
    }

    fn fault_queue_alloc(&self) -> Result<Arc<dyn FaultQueue>> {
        let made = |queue: &Arc<dyn FaultQueue>| Some(queue.object());
        self.call(Verb::FaultQueueAlloc, &[], made, |host| host.fault_queue_alloc())
    }

    fn veventq_alloc(
        &self,
        viommu: ObjectId,
        kind: u32,
        depth: u32,
    ) -> Result<Arc<dyn EventQueue>> {
        let made = |queue: &Arc<dyn EventQueue>| Some(queue.object());
        self.call(Verb::VeventqAlloc, &[viommu], made, |host| {
            host.veventq_alloc(viommu, kind, depth)
        })
    }

    fn extensions(&self) -> Extensions {
        self.inner.extensions()
    }

    fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Result<()> {
        self.inner.set_fault_sink(dev, sink)
    }
}
