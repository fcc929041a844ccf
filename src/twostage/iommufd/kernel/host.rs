// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The verbs.

use std::borrow::Cow;
use std::fs::File;
use std::ops::RangeInclusive;
use std::sync::Arc;

use iommufd_bindings::*;

use super::ioctls::{self, errno_of, size, IommuFdExt, VfioCdev};
use super::meaning::{self, error};
use super::queues::{self, Parse, Queue};
use super::KernelHost;
use crate::iommufd::{
    DirtyRange, Errno, EventQueue, FaultQueue, HostError, HostIommu, HwCapabilities, HwInfo,
    HwInfoData, HwptAlloc, HwptData, InvalidateData, InvalidateError, IovaRanges, MapTarget,
    ObjectId, Protection, Result, UserMemory, Verb, ViommuKind,
};

impl KernelHost {
    /// `IOMMU_GET_HW_INFO`.
    #[allow(non_upper_case_globals)] // bindgen's names
    pub(super) fn hw_info(&self, dev: u32) -> Result<HwInfo, Errno> {
        let mut room = ioctls::HwInfoRoom::new();
        let asked = self.iommufd.hw_info_of(dev, &mut room)?;
        let data = match ioctls::hw_info_type(&asked) {
            iommu_hw_info_type_IOMMU_HW_INFO_TYPE_NONE => HwInfoData::None,
            iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD => HwInfoData::Vtd(room.vtd()),
            iommu_hw_info_type_IOMMU_HW_INFO_TYPE_ARM_SMMUV3 => {
                HwInfoData::ArmSmmuV3(room.smmuv3())
            }
            other => HwInfoData::Other(other),
        };
        Ok(HwInfo {
            data,
            capabilities: HwCapabilities::from(asked.out_capabilities),
            max_pasid_log2: asked.out_max_pasid_log2,
        })
    }

    /// `IOMMU_HWPT_ALLOC` with a structure of user-owned tables.
    fn alloc_hwpt<T>(&self, args: &HwptAlloc, kind: u32, data: &T) -> Result<u32, Errno> {
        let length = size::<T>();
        let mut alloc = iommu_hwpt_alloc {
            size: size::<iommu_hwpt_alloc>(),
            flags: args.flags.into(),
            dev_id: args.dev.0,
            pt_id: args.pt.0,
            data_type: kind,
            data_len: length,
            data_uptr: if length == 0 { 0 } else { std::ptr::from_ref(data) as u64 },
            fault_id: args.fault.map_or(0, |fault| fault.0),
            ..Default::default()
        };
        self.iommufd.alloc_iommu_hwpt(&mut alloc).map_err(errno_of)?;
        Ok(alloc.out_hwpt_id)
    }

    /// `IOMMU_HWPT_INVALIDATE`; the number of entries completed according to the kernel.
    fn invalidate<T>(
        &self,
        hwpt: ObjectId,
        kind: u32,
        entries: &[T],
    ) -> Result<(), (usize, Errno)> {
        let mut invalidate = iommu_hwpt_invalidate {
            size: size::<iommu_hwpt_invalidate>(),
            hwpt_id: hwpt.0,
            data_uptr: entries.as_ptr() as u64,
            data_type: kind,
            entry_len: size::<T>(),
            entry_num: entries.len().try_into().map_err(|_| (0, Errno::EINVAL))?,
            ..Default::default()
        };
        let outcome = self.iommufd.invalidate_hwpt(&mut invalidate).map_err(errno_of);
        outcome.map_err(|errno| {
            // If the kernel fails early, it may leave the number unchanged.
            let done = (invalidate.entry_num as usize).min(entries.len().saturating_sub(1));
            (done, errno)
        })
    }

    /// The queue `id`, which `verb` reads from `file`.
    fn queue<T: Send + 'static>(
        &self,
        id: u32,
        verb: Verb,
        file: File,
        parse: Parse<T>,
    ) -> Arc<Queue<T>> {
        Arc::new(Queue::new(ObjectId(id), verb, file, parse, self.threads.clone()))
    }
}

fn map_flags(target: MapTarget, protection: Protection) -> (u32, u64) {
    let (fixed, iova) = match target {
        MapTarget::Fixed(iova) => (iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA, iova),
        MapTarget::Anywhere => (0, 0),
    };
    let set = |wanted, flag| if wanted { flag } else { 0 };
    let read = set(protection.read, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE);
    let write = set(protection.write, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE);
    (fixed | read | write, iova)
}

/// The file and offset of memory for `IOMMU_IOAS_MAP_FILE`. Mapping by file uses no address of this
/// process, and survives its exec.
fn file_of(memory: &UserMemory) -> Option<(&File, u64)> {
    memory.file().filter(|(file, _)| ioctls::is_memory_file(file))
}

/// The outcome of mapping by file; where there is no file, or the kernel has no such call (before
/// Linux 6.13), that of mapping by address.
fn or_by_address(
    by_file: Option<Result<u64, Errno>>,
    by_address: impl FnOnce() -> Result<u64, Errno>,
) -> Result<u64, Errno> {
    match by_file {
        None | Some(Err(Errno::ENOTTY)) => by_address(),
        Some(outcome) => outcome,
    }
}

impl HostIommu for KernelHost {
    fn device_bind(&self, name: &str) -> Result<ObjectId> {
        self.bind_name(name)
    }

    fn device_unbind(&self, dev: ObjectId) -> Result<()> {
        self.release(dev).map(drop)
    }

    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId> {
        let verb = Verb::DeviceAttach;
        let (file, bits) =
            self.device(verb, dev, |device| (device.file.clone(), device.info.max_pasid_log2))?;
        match pasid {
            // VFIO treats PASID 0 as the device itself, which it then loses track of.
            Some(0) => {
                let detail = "PASID 0 stands for the device itself";
                return Err(HostError::new(verb, dev, Errno::EINVAL, detail));
            }
            // Linux would return success and do nothing.
            Some(pasid) if bits == 0 => {
                let detail = format!("PASID {pasid}: the device has no PASIDs");
                return Err(HostError::new(verb, dev, Errno::EINVAL, detail));
            }
            _ => {}
        }
        let hwpt = file.attach_iommufd_pt(pasid, pt.0).map_err(|errno| {
            let detail = format!("page table {pt}: {}", meaning::of(verb, errno));
            HostError::new(verb, dev, errno, detail)
        })?;
        self.device(verb, dev, |device| device.attached.insert(pasid))?;
        Ok(ObjectId(hwpt))
    }

    fn device_detach(&self, dev: ObjectId, pasid: Option<u32>) -> Result<()> {
        let verb = Verb::DeviceDetach;
        let (file, attached) = self
            .device(verb, dev, |device| (device.file.clone(), device.attached.contains(&pasid)))?;
        if !attached {
            return Ok(());
        }
        file.detach_iommufd_pt(pasid).map_err(|errno| error(verb, dev, errno))?;
        self.device(verb, dev, |device| device.attached.remove(&pasid))?;
        Ok(())
    }

    fn destroy(&self, id: ObjectId) -> Result<()> {
        // Another thread may be given the same id again as soon as the object is gone: what that
        // maps waits.
        let mut memory = self.memory();
        let outcome = self.iommufd.destroy_iommu_object(id.0).map_err(errno_of);
        outcome.map_err(|errno| error(Verb::Destroy, id, errno))?;
        memory.destroyed(id);
        Ok(())
    }

    fn ioas_alloc(&self) -> Result<ObjectId> {
        let mut alloc = iommu_ioas_alloc { size: size::<iommu_ioas_alloc>(), ..Default::default() };
        let outcome = self.iommufd.alloc_iommu_ioas(&mut alloc).map_err(errno_of);
        outcome.map_err(|errno| error(Verb::IoasAlloc, None, errno))?;
        Ok(ObjectId(alloc.out_ioas_id))
    }

    fn ioas_allow_iovas(&self, ioas: ObjectId, ranges: &[RangeInclusive<u64>]) -> Result<()> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|range| iommu_iova_range { start: *range.start(), last: *range.end() })
            .collect();
        self.iommufd
            .allow_iommu_ioas_iovas(ioas.0, &ranges)
            .map_err(|errno| error(Verb::IoasAllowIovas, ioas, errno))
    }

    fn ioas_iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges> {
        let mut ranges = Vec::new();
        loop {
            let (count, alignment) = self
                .iommufd
                .iommu_ioas_iova_ranges(ioas.0, &mut ranges)
                .map_err(|errno| error(Verb::IoasIovaRanges, ioas, errno))?;
            if count <= ranges.len() {
                ranges.truncate(count);
                let allowed = ranges.iter().map(|range| range.start..=range.last).collect();
                return Ok(IovaRanges { allowed, alignment });
            }
            // Their number may have grown by the next call.
            ranges.resize(count, iommu_iova_range::default());
        }
    }

    fn ioas_map(
        &self,
        ioas: ObjectId,
        memory: &UserMemory,
        target: MapTarget,
        protection: Protection,
    ) -> Result<u64> {
        let (flags, iova) = map_flags(target, protection);
        let mut kept = self.memory();
        let by_file = file_of(memory).map(|(file, start)| {
            self.iommufd.map_memory_file(ioas.0, flags, file, start, memory.length(), iova)
        });
        let outcome =
            or_by_address(by_file, || self.iommufd.map_user_memory(ioas.0, flags, memory, iova));
        let iova = outcome.map_err(|errno| error(Verb::IoasMap, ioas, errno))?;
        kept.mapped(ioas, iova, memory.clone());
        Ok(iova)
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
        let (flags, dst_iova) = map_flags(target, protection);
        let mut copy = iommu_ioas_copy {
            size: size::<iommu_ioas_copy>(),
            flags,
            dst_ioas_id: dst.0,
            src_ioas_id: src.0,
            length,
            dst_iova,
            src_iova,
        };
        let mut kept = self.memory();
        let outcome = self.iommufd.copy_iommu_ioas(&mut copy);
        outcome.map_err(|errno| error(Verb::IoasCopy, dst, errno))?;
        kept.copied(dst, copy.dst_iova, src, src_iova, length);
        Ok(copy.dst_iova)
    }

    fn ioas_unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64> {
        let mut unmap =
            iommu_ioas_unmap { size: size::<iommu_ioas_unmap>(), ioas_id: ioas.0, iova, length };
        let mut kept = self.memory();
        // What a failed call has unmapped nevertheless is kept, until it is overwritten.
        let outcome = self.iommufd.unmap_iommu_ioas(&mut unmap).map_err(errno_of);
        outcome.map_err(|errno| error(Verb::IoasUnmap, ioas, errno))?;
        kept.unmapped(ioas, iova, length);
        Ok(unmap.length)
    }

    fn get_hw_info(&self, dev: ObjectId) -> Result<HwInfo> {
        // Queried at binding; it does not change.
        self.device(Verb::GetHwInfo, dev, |device| device.info)
    }

    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId> {
        use iommufd_bindings as uapi;
        let outcome = match &args.data {
            HwptData::None => {
                self.alloc_hwpt(args, uapi::iommu_hwpt_data_type_IOMMU_HWPT_DATA_NONE, &())
            }
            HwptData::VtdS1(data) => {
                self.alloc_hwpt(args, uapi::iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1, data)
            }
            HwptData::ArmSmmuV3(data) => {
                self.alloc_hwpt(args, uapi::iommu_hwpt_data_type_IOMMU_HWPT_DATA_ARM_SMMUV3, data)
            }
            HwptData::VtdSecondStage(_) | HwptData::VtdNested(_) => {
                let detail = "no hardware nests second-stage tables of a guest";
                return Err(HostError::new(Verb::HwptAlloc, args.pt, Errno::EOPNOTSUPP, detail));
            }
        };
        outcome.map(ObjectId).map_err(|errno| {
            let detail = match (errno, self.named(args.dev)) {
                (Errno::EOPNOTSUPP, Some((name, info))) => {
                    Cow::from(meaning::hwpt_unsupported(&name, &info, args))
                }
                _ => meaning::of(Verb::HwptAlloc, errno),
            };
            HostError::new(Verb::HwptAlloc, args.pt, errno, detail)
        })
    }

    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> Result<(), InvalidateError> {
        use iommufd_bindings as uapi;
        let outcome = match data {
            InvalidateData::VtdS1(entries) => self.invalidate(
                hwpt,
                uapi::iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
                entries,
            ),
            InvalidateData::ArmSmmuV3(commands) => self.invalidate(
                hwpt,
                uapi::iommu_hwpt_invalidate_data_type_IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
                commands,
            ),
            InvalidateData::VtdSecondStage(_) => Err((0, Errno::EOPNOTSUPP)),
        };
        outcome.map_err(|(done, errno)| InvalidateError {
            done,
            error: error(Verb::HwptInvalidate, hwpt, errno),
        })
    }

    fn hwpt_set_dirty_tracking(&self, hwpt: ObjectId, enable: bool) -> Result<()> {
        self.iommufd
            .set_hwpt_dirty_tracking(hwpt.0, enable)
            .map_err(|errno| error(Verb::HwptSetDirtyTracking, hwpt, errno))
    }

    fn hwpt_get_dirty_bitmap(
        &self,
        hwpt: ObjectId,
        range: &DirtyRange,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<()> {
        let keep = iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR;
        let get = iommu_hwpt_get_dirty_bitmap {
            hwpt_id: hwpt.0,
            flags: if clear { 0 } else { keep },
            iova: range.iova,
            length: range.length,
            page_size: range.page_size,
            ..Default::default()
        };
        self.iommufd
            .get_hwpt_dirty_bitmap(get, bitmap)
            .map_err(|errno| error(Verb::HwptGetDirtyBitmap, hwpt, errno))
    }

    fn viommu_alloc(&self, kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId> {
        let mut alloc = iommu_viommu_alloc {
            size: size::<iommu_viommu_alloc>(),
            type_: kind.number(),
            dev_id: dev.0,
            hwpt_id: hwpt.0,
            ..Default::default()
        };
        let outcome = self.iommufd.alloc_iommu_viommu(&mut alloc).map_err(errno_of);
        outcome.map_err(|errno| {
            let detail = match (errno, self.named(dev)) {
                (Errno::EOPNOTSUPP, Some((_, info))) if matches!(info.data, HwInfoData::Vtd(_)) => {
                    "Linux has no vIOMMU for VT-d: nested HWPTs are allocated on the parent itself"
                        .into()
                }
                (Errno::EOPNOTSUPP, Some((name, info))) => {
                    Cow::from(meaning::cannot_nest(&name, &info))
                }
                _ => meaning::of(Verb::ViommuAlloc, errno),
            };
            HostError::new(Verb::ViommuAlloc, hwpt, errno, detail)
        })?;
        Ok(ObjectId(alloc.out_viommu_id))
    }

    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId> {
        let mut alloc = iommu_vdevice_alloc {
            size: size::<iommu_vdevice_alloc>(),
            viommu_id: viommu.0,
            dev_id: dev.0,
            virt_id,
            ..Default::default()
        };
        let outcome = self.iommufd.alloc_iommu_vdevice(&mut alloc).map_err(errno_of);
        outcome.map_err(|errno| error(Verb::VdeviceAlloc, viommu, errno))?;
        Ok(ObjectId(alloc.out_vdevice_id))
    }

    fn fault_queue_alloc(&self) -> Result<Arc<dyn FaultQueue>> {
        let outcome = self.iommufd.alloc_fault_queue();
        let (id, file) = outcome.map_err(|errno| error(Verb::FaultQueueAlloc, None, errno))?;
        Ok(self.queue(id, Verb::PageRequest, file, queues::page_requests))
    }

    fn veventq_alloc(
        &self,
        viommu: ObjectId,
        kind: u32,
        depth: u32,
    ) -> Result<Arc<dyn EventQueue>> {
        let refused = |errno| error(Verb::VeventqAlloc, viommu, errno);
        let parse = queues::vevent_parser(kind).ok_or_else(|| refused(Errno::EOPNOTSUPP))?;
        let mut alloc = iommu_veventq_alloc {
            size: size::<iommu_veventq_alloc>(),
            viommu_id: viommu.0,
            type_: kind,
            veventq_depth: depth,
            ..Default::default()
        };
        let outcome = self.iommufd.alloc_veventq(&mut alloc).map_err(errno_of);
        let (id, file) = outcome.map_err(refused)?;
        Ok(self.queue(id, Verb::Vevent, file, parse))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_maps_no_files_maps_by_address() {
        assert_eq!(or_by_address(Some(Err(Errno::ENOTTY)), || Ok(1)), Ok(1));
        assert_eq!(or_by_address(None, || Ok(1)), Ok(1));
        let refused = || panic!("mapped twice");
        assert_eq!(or_by_address(Some(Err(Errno::EEXIST)), refused), Err(Errno::EEXIST));
        assert_eq!(or_by_address(Some(Ok(2)), refused), Ok(2));
    }
}
