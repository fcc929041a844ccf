// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host that forwards its verbs to another, with a hook for each.

use std::fmt::{Debug, Display};
use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};

use super::{
    DirtyRange, EventQueue, Extensions, FaultQueue, FaultSink, HostError, HostIommu, HwInfo,
    HwptAlloc, InvalidateData, InvalidateError, IovaRanges, MapTarget, ObjectId, Protection,
    Result, UserMemory, Verb, ViommuKind,
};

/// The hook for each verb. Everything else is forwarded.
pub(super) trait Forwarding: Debug + Send + Sync {
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
        call: impl FnOnce(&Self::Inner) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E>;
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
}
