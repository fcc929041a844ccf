// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hosts that forward their verbs to another: one counts the calls and reports each to an observer,
//! one makes some fail.

use crate::sync::Mutex;
use std::fmt::{self, Debug, Display};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, Weak};
use std::time::{Duration, Instant};

use super::{
    DirtyRange, Errno, EventQueue, Extensions, FaultQueue, FaultSink, HostError, HostIommu, HwInfo,
    HwptAlloc, InvalidateData, InvalidateError, IovaRanges, MapTarget, ObjectId, Protection,
    Result, UserMemory, Verb, ViommuKind,
};

/// Is called after every host call.
pub trait VerbObserver: Send + Sync {
    /// `verb` took `duration` and failed with `error`, if any. `objects` are those of the call, in
    /// its order, after the one that it created.
    fn called(
        &self,
        verb: Verb,
        objects: &[ObjectId],
        started: Instant,
        duration: Duration,
        error: Option<&dyn Display>,
    );
}

/// Calls and failures, by verb. Reads are not consistent with each other.
#[derive(Debug, Default)]
pub struct VerbCounters {
    calls: [AtomicU64; Verb::ALL.len()],
    failures: [AtomicU64; Verb::ALL.len()],
}

impl VerbCounters {
    /// Number of calls of `verb`.
    pub fn calls(&self, verb: Verb) -> u64 {
        // A verb's discriminant is its index in ALL, so it is in range.
        self.calls[verb as usize].load(Ordering::Relaxed)
    }

    /// Number of failures of `verb`.
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
    /// Counts the calls to `inner` and reports them to `observer`, if there is one.
    pub fn new(inner: Arc<dyn HostIommu>, observer: Option<Arc<dyn VerbObserver>>) -> Self {
        Self { inner, counters: Arc::default(), observer }
    }

    /// The live counters.
    pub fn counters(&self) -> Arc<VerbCounters> {
        self.counters.clone()
    }
}

impl Forwarding for CountedHost {
    type Inner = dyn HostIommu;

    fn served_by(&self) -> &Self::Inner {
        &*self.inner
    }

    fn call<T, E: From<HostError> + Display>(
        &self,
        verb: Verb,
        named: &[ObjectId],
        made: fn(&T) -> Option<ObjectId>,
        call: impl FnOnce(&Self::Inner) -> Result<T, E>,
    ) -> Result<T, E> {
        let started = self.observer.is_some().then(Instant::now);
        let result = call(&*self.inner);
        self.counters.count(verb, result.is_err());
        if let (Some(observer), Some(started)) = (&self.observer, started) {
            let duration = started.elapsed();
            let new = result.as_ref().ok().and_then(made);
            let objects: Vec<_> = new.into_iter().chain(named.iter().copied()).collect();
            let error = result.as_ref().err().map(|error| error as &dyn Display);
            observer.called(verb, &objects, started, duration, error);
        }
        result
    }
}

impl Debug for CountedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CountedHost").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// `inner`, with calls that fail without reaching it: a test aid, like Linux's `fail-nth`.
///
/// Run a scenario with `n` = 1, 2, 3… until the failure is not reached, and check each time for
/// leaks and panics.
#[derive(Debug)]
pub struct FailNth<H: HostIommu + ?Sized> {
    inner: Arc<H>,
    calls: AtomicU64,
    /// The pending failure.
    failing: Mutex<Option<Failure>>,
}

/// The failing calls, by the numbers of the first and the last, counted from 1 over the life of the
/// value, and their error.
#[derive(Debug, Clone, Copy)]
struct Failure {
    first: u64,
    last: u64,
    errno: Errno,
}

impl<H: HostIommu + ?Sized> FailNth<H> {
    /// Passes every call on to `inner` by default.
    pub fn new(inner: Arc<H>) -> Self {
        Self { inner, calls: AtomicU64::new(0), failing: Mutex::new(None) }
    }

    /// Makes the `n`-th verb from now on (1 is the next) fail with `errno`, once. Replaces an
    /// earlier request; 0 only cancels it.
    pub fn fail_nth(&self, n: u64, errno: Errno) {
        let last = self.calls.load(Ordering::SeqCst) + n;
        *self.failing() = (n != 0).then_some(Failure { first: last, last, errno });
    }

    /// Makes the next `count` verbs fail with `errno`. Replaces an earlier request.
    pub fn fail_next(&self, count: u64, errno: Errno) {
        let calls = self.calls.load(Ordering::SeqCst);
        let failure = Failure { first: calls + 1, last: calls + count, errno };
        *self.failing() = (count != 0).then_some(failure);
    }

    /// Whether the requested failure is still pending.
    pub fn is_armed(&self) -> bool {
        self.failing().is_some()
    }

    /// Number of verbs called, including failed ones.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// The host behind it.
    pub fn inner(&self) -> &Arc<H> {
        &self.inner
    }

    fn failing(&self) -> MutexGuard<'_, Option<Failure>> {
        self.failing.lock()
    }
}

impl<H: HostIommu + ?Sized> Forwarding for FailNth<H> {
    type Inner = H;

    fn served_by(&self) -> &H {
        &self.inner
    }

    /// Counts the call, and fails it if it is due.
    fn call<T, E: From<HostError> + Display>(
        &self,
        verb: Verb,
        named: &[ObjectId],
        _made: fn(&T) -> Option<ObjectId>,
        call: impl FnOnce(&H) -> Result<T, E>,
    ) -> Result<T, E> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let mut failing = self.failing();
        if let Some(Failure { last, errno, .. }) =
            failing.filter(|failure| (failure.first..=failure.last).contains(&number))
        {
            if number == last {
                *failing = None;
            }
            let object = named.first().copied();
            return Err(HostError::new(verb, object, errno, "injected failure").into());
        }
        drop(failing);
        call(&self.inner)
    }
}

/// The hook for each verb. Everything else is forwarded.
trait Forwarding: Debug + Send + Sync {
    /// The host that serves the verbs.
    type Inner: HostIommu + ?Sized;

    fn served_by(&self) -> &Self::Inner;

    /// `call` is `verb` on the objects `named`, in its order; `made` returns the one that it
    /// created.
    fn call<T, E: From<HostError> + Display>(
        &self,
        verb: Verb,
        named: &[ObjectId],
        made: fn(&T) -> Option<ObjectId>,
        call: impl FnOnce(&Self::Inner) -> Result<T, E>,
    ) -> Result<T, E>;
}

fn nothing<T>(_: &T) -> Option<ObjectId> {
    None
}

fn itself(id: &ObjectId) -> Option<ObjectId> {
    Some(*id)
}

impl<F: Forwarding> HostIommu for F {
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
    ) -> Result<(), InvalidateError> {
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
        let made: fn(&Arc<dyn FaultQueue>) -> _ = |queue| Some(queue.object());
        self.call(Verb::FaultQueueAlloc, &[], made, |host| host.fault_queue_alloc())
    }

    fn veventq_alloc(
        &self,
        viommu: ObjectId,
        kind: u32,
        depth: u32,
    ) -> Result<Arc<dyn EventQueue>> {
        let made: fn(&Arc<dyn EventQueue>) -> _ = |queue| Some(queue.object());
        self.call(Verb::VeventqAlloc, &[viommu], made, |host| {
            host.veventq_alloc(viommu, kind, depth)
        })
    }

    fn extensions(&self) -> Extensions {
        self.served_by().extensions()
    }

    fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Result<()> {
        self.served_by().set_fault_sink(dev, sink)
    }

    fn device_tlb_invalidate(
        &self,
        dev: ObjectId,
        pasid: Option<u32>,
        addresses: RangeInclusive<u64>,
    ) -> Result<bool> {
        self.served_by().device_tlb_invalidate(dev, pasid, addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommufd::fake::RecordingHost;

    fn host() -> Arc<RecordingHost> {
        RecordingHost::new(Extensions::default())
    }

    #[test]
    fn only_the_nth_call_fails_and_does_not_reach_the_host() {
        let inner = host();
        let host = FailNth::new(inner.clone());
        host.fail_nth(2, Errno::ENOMEM);
        host.ioas_alloc().unwrap();
        let error = host.ioas_alloc().unwrap_err();
        assert_eq!((error.verb, error.errno), (Verb::IoasAlloc, Errno::ENOMEM));
        assert!(!host.is_armed());
        assert_eq!(inner.live_objects().len(), 1);
        host.ioas_alloc().unwrap();
        assert_eq!((host.calls(), inner.live_objects().len()), (3, 2));
    }

    #[test]
    fn the_count_starts_when_it_is_asked_for() {
        let host = FailNth::new(host());
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
    fn as_many_calls_fail_as_are_asked_for() {
        let host = FailNth::new(host());
        host.fail_next(2, Errno::EIO);
        for armed in [true, false] {
            assert_eq!(host.ioas_alloc().unwrap_err().errno, Errno::EIO);
            assert_eq!(host.is_armed(), armed);
        }
        host.ioas_alloc().unwrap();
        host.fail_next(0, Errno::EIO);
        assert!(!host.is_armed());
    }

    #[test]
    fn a_failed_invalidation_did_nothing() {
        let host: Arc<dyn HostIommu> = host();
        let host = FailNth::new(host);
        host.fail_nth(1, Errno::ETIMEDOUT);
        let error = host.hwpt_invalidate(ObjectId(1), InvalidateData::VtdS1(&[])).unwrap_err();
        assert_eq!((error.done, error.error.errno), (0, Errno::ETIMEDOUT));
    }
}
