// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The meaning of an errno by its origin, and what to do about it.
//!
//! The kernel only returns a number. Its meanings are taken from Linux 7.2's checks; if there are
//! several, all are listed, the most likely first.

use std::borrow::Cow;

use crate::iommufd::{Errno, HostError, HwInfo, HwInfoData, HwptAlloc, HwptData, ObjectId, Verb};

/// The meaning of `errno` of `verb`.
pub(super) fn of(verb: Verb, errno: Errno) -> Cow<'static, str> {
    match known(verb, errno) {
        Some(text) => text.into(),
        None => std::io::Error::from_raw_os_error(errno.raw()).to_string().into(),
    }
}

/// An error of the kernel, with its meaning.
pub(super) fn error(verb: Verb, object: impl Into<Option<ObjectId>>, errno: Errno) -> HostError {
    HostError::new(verb, object, errno, of(verb, errno))
}

fn known(verb: Verb, errno: Errno) -> Option<&'static str> {
    use Verb::*;
    let text = match (verb, errno) {
        (_, Errno::ENOTTY) => "this kernel is too old, or the file does not support it",
        (DeviceBind, Errno::EINVAL) => {
            "the device is already open, or its DMA is not cache-coherent"
        }
        (DeviceBind, Errno::EBUSY) => {
            "its IOMMU group is in use: bind every device of the group to vfio-pci, and close \
             /dev/vfio/GROUP"
        }
        (DeviceBind, Errno::EPERM) => {
            "its IOMMU group has another owner, or its interrupts are not isolated (interrupt \
             remapping; or the iommufd module's allow_unsafe_interrupts=1)"
        }
        (DeviceAttach, Errno::ENOENT) => "there is no such page table",
        (DeviceAttach, Errno::EINVAL) => {
            "the page table is incompatible: it belongs to another IOMMU, lacks the PASID flag \
             with PASIDs in use, or has a format that the IOMMU does not support"
        }
        (DeviceAttach, Errno::EADDRINUSE) => {
            "the IOAS maps IOVAs that are reserved for the device (IOVA_RANGES lists the free ones)"
        }
        (DeviceAttach, Errno::EBUSY) => "the device is being reset, or the PASID is attached",
        (DeviceAttach, Errno::ENODEV) => {
            "the page table has a fault queue, but the device or its IOMMU has no page requests"
        }
        (DeviceAttach | DeviceDetach, Errno::EOPNOTSUPP) => {
            "the driver of the device or of its IOMMU does not support PASIDs"
        }
        (DeviceAttach, Errno::ENOSPC) => "the IOMMU has no domain id or PASID left",
        (Destroy, Errno::ENOENT) => "there is no such object",
        (Destroy, Errno::EBUSY) => {
            "something uses it: an attached device, a nested HWPT, a vIOMMU, a vDEVICE or an open \
             queue"
        }
        (IoasAllowIovas, Errno::EINVAL) => "a range has less than two bytes, or two overlap",
        (IoasAllowIovas, Errno::EADDRINUSE) => {
            "a range overlaps IOVAs that are reserved for a device"
        }
        (IoasMap | IoasCopy, Errno::EINVAL) => {
            "empty, not aligned, reserved for a device, or read-only with a nesting parent of VT-d"
        }
        (IoasMap | IoasCopy, Errno::EEXIST) => "something is mapped there",
        (IoasMap | IoasCopy, Errno::EADDRINUSE) => "reserved for a device",
        (IoasMap | IoasCopy, Errno::EOVERFLOW) => "past the end of the address space",
        (IoasMap | IoasCopy, Errno::ENOSPC) => "no space is left in the allowed IOVAs",
        (IoasMap, Errno::EFAULT) => "the memory does not exist, or is not writable",
        (IoasCopy, Errno::EPERM) => "a read-only mapping cannot be copied as writable",
        (IoasMap | IoasCopy | HwptAlloc | DeviceAttach, Errno::ENOMEM) => {
            "out of memory, or more is pinned than RLIMIT_MEMLOCK allows (ulimit -l)"
        }
        (IoasCopy, Errno::ENOENT) => {
            "there is no such IOAS, or the source does not map the whole range"
        }
        (IoasUnmap, Errno::ENOENT) => {
            "there is no such IOAS, nothing is mapped there, or a mapping would be split"
        }
        (HwptAlloc, Errno::EINVAL) => {
            "the parent is not a page table, not a nesting parent, or belongs to another IOMMU"
        }
        (HwptAlloc, Errno::EADDRINUSE) => {
            "the IOAS maps more than the IOMMU can address, or in smaller pages"
        }
        (HwptAlloc, Errno::ENOENT) => "there is no such device or fault queue",
        (HwptAlloc, Errno::EIO) => "a stream table entry has bits that a guest may not set",
        (HwptInvalidate, Errno::EINVAL) => {
            "it is neither a nested HWPT nor a vIOMMU, or an entry is malformed"
        }
        (HwptInvalidate, Errno::EIO) => {
            "a command that the owner of stage 1 may not issue, or for a stream without a vDEVICE"
        }
        (HwptInvalidate, Errno::EOPNOTSUPP) => {
            "this IOMMU does not support invalidations from user space, or an entry has unknown \
             flags"
        }
        (HwptInvalidate, Errno::ETIMEDOUT) => "the IOMMU or the device did not answer in time",
        (HwptSetDirtyTracking | HwptGetDirtyBitmap, Errno::EOPNOTSUPP) => {
            "the HWPT was not allocated with DIRTY_TRACKING"
        }
        (HwptGetDirtyBitmap, Errno::EFAULT) => "the bitmap is too short",
        (ViommuAlloc, Errno::EINVAL) => "the HWPT is not a nesting parent of this IOMMU",
        (ViommuAlloc, Errno::ENOENT) => "there is no such device or no such HWPT",
        (VdeviceAlloc, Errno::EINVAL) => {
            "the device is behind another IOMMU than the vIOMMU, or its driver does not accept the \
             id"
        }
        (VdeviceAlloc, Errno::EOPNOTSUPP) => {
            "the device has several StreamIDs, and a vIOMMU supports one"
        }
        (VdeviceAlloc, Errno::EEXIST) => "the device has a vDEVICE, or the id is taken",
        (VdeviceAlloc, Errno::ENOENT) => "there is no such vIOMMU or no such device",
        (VeventqAlloc, Errno::EEXIST) => "the vIOMMU has a vEVENTQ of this type",
        (VeventqAlloc, Errno::EOPNOTSUPP) => "the vIOMMU has no events of this type",
        (VeventqAlloc, Errno::EINVAL) => "the depth is 0 or more than 2^19",
        (_, Errno::EMFILE) => "this process cannot open more files (ulimit -n)",
        _ => return None,
    };
    Some(text)
}

/// The meaning of `EOPNOTSUPP` of `HWPT_ALLOC` for the device `name`.
pub(super) fn hwpt_unsupported(name: &str, info: &HwInfo, args: &HwptAlloc) -> String {
    let mut flags = Vec::new();
    for (set, flag) in [
        (args.flags.nest_parent(), "NEST_PARENT"),
        (args.flags.dirty_tracking(), "DIRTY_TRACKING"),
        (args.flags.fault_id_valid(), "FAULT_ID_VALID"),
        (args.flags.pasid(), "PASID"),
    ] {
        set.then(|| flags.push(flag));
    }
    match (args.data, flags.as_slice()) {
        (HwptData::None, ["NEST_PARENT"]) => cannot_nest(name, info),
        (HwptData::None, _) => {
            format!("the IOMMU of {name} has no page table with {}", flags.join(" and "))
        }
        _ if flags.iter().any(|flag| !matches!(*flag, "FAULT_ID_VALID" | "PASID")) => {
            format!("a nested page table cannot have {}", flags.join(" and "))
        }
        _ => cannot_nest(name, info),
    }
}

/// Why the IOMMU of the device `name` does not support nesting, and what would help.
pub(super) fn cannot_nest(name: &str, info: &HwInfo) -> String {
    let why = match info.data {
        HwInfoData::Vtd(_) => {
            "VT-d needs scalable mode and nested translation (ECAP.SMTS and NEST; \
             intel_iommu=sm_on)"
        }
        HwInfoData::ArmSmmuV3(_) => {
            "an SMMUv3 needs both stages, and S2FWB or CANWBS in the firmware's description of the \
             root complex"
        }
        HwInfoData::Other(_) => "Linux supports nesting on VT-d and SMMUv3 only",
        HwInfoData::None => "it does not describe itself to user space",
    };
    format!("the IOMMU of {name} cannot nest: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommufd::{iommu_hw_info_arm_smmuv3, HwCapabilities, HwptFlags, ObjectId};

    #[test]
    fn who_cannot_nest_is_told_what_it_takes() {
        let data = HwInfoData::ArmSmmuV3(iommu_hw_info_arm_smmuv3::default());
        let info = HwInfo { data, capabilities: HwCapabilities::new(), max_pasid_log2: 0 };
        let args =
            |flags, data| HwptAlloc { flags, dev: ObjectId(1), pt: ObjectId(2), data, fault: None };
        let parent = HwptFlags::new().with_nest_parent(true);
        let words = hwpt_unsupported("nvme", &info, &args(parent, HwptData::None));
        assert!(words.contains("IOMMU of nvme cannot nest") && words.contains("S2FWB or CANWBS"));
        let words = hwpt_unsupported("nvme", &info, &args(parent.with_pasid(true), HwptData::None));
        assert!(words.ends_with("no page table with NEST_PARENT and PASID"), "{words}");
    }

    #[test]
    fn every_number_has_words() {
        assert_eq!(of(Verb::IoasUnmap, Errno::from_raw(5)), "Input/output error (os error 5)");
        assert!(of(Verb::DeviceAttach, Errno::EADDRINUSE).contains("reserved"));
    }
}
