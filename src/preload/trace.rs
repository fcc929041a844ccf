// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One line for each call on an emulated file, in the style of `strace`, at the log level `trace`:
//! what the caller passed, the result, and the fields of the structure that the call changed.

use std::fmt;
use std::mem::{offset_of, size_of};

use iommufd_bindings::*;
use twostage::iommufd::Errno;
use twostage_emulated::uapi::{iommufd_request, vfio_request};
use vfio_bindings::bindings::vfio::*;

use crate::callers::process::Process;
use crate::files::file::{Answer, Call, Caller, File};

/// An ioctl, and the fields of its structure.
struct Operation {
    request: u32,
    name: &'static str,
    fields: &'static [Field],
}

/// A field of 1, 2, 4 or 8 bytes.
struct Field {
    name: &'static str,
    offset: usize,
    size: usize,
}

/// The size of the field that `_field` returns, in bytes.
const fn size_of_field<S, F>(_field: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

/// The operations `request`, `NAME`: `structure { fields }`.
macro_rules! operations {
    ($($request:expr, $name:literal: $type:ident { $($field:ident),* $(,)? };)*) => {
        &[$(Operation {
            request: $request,
            name: $name,
            fields: &[$(Field {
                name: stringify!($field),
                offset: offset_of!($type, $field),
                size: size_of_field(|it: &$type| &it.$field),
            }),*],
        }),*]
    };
}

static OPERATIONS: &[Operation] = operations! {
    iommufd_request(IOMMUFD_CMD_DESTROY), "IOMMU_DESTROY": iommu_destroy { id };
    iommufd_request(IOMMUFD_CMD_IOAS_ALLOC), "IOMMU_IOAS_ALLOC":
        iommu_ioas_alloc { flags, out_ioas_id };
    iommufd_request(IOMMUFD_CMD_IOAS_ALLOW_IOVAS), "IOMMU_IOAS_ALLOW_IOVAS":
        iommu_ioas_allow_iovas { ioas_id, num_iovas, allowed_iovas };
    iommufd_request(IOMMUFD_CMD_IOAS_COPY), "IOMMU_IOAS_COPY":
        iommu_ioas_copy { flags, dst_ioas_id, src_ioas_id, length, dst_iova, src_iova };
    iommufd_request(IOMMUFD_CMD_IOAS_IOVA_RANGES), "IOMMU_IOAS_IOVA_RANGES":
        iommu_ioas_iova_ranges { ioas_id, num_iovas, allowed_iovas, out_iova_alignment };
    iommufd_request(IOMMUFD_CMD_IOAS_MAP), "IOMMU_IOAS_MAP":
        iommu_ioas_map { flags, ioas_id, user_va, length, iova };
    iommufd_request(IOMMUFD_CMD_IOAS_UNMAP), "IOMMU_IOAS_UNMAP":
        iommu_ioas_unmap { ioas_id, iova, length };
    iommufd_request(IOMMUFD_CMD_OPTION), "IOMMU_OPTION":
        iommu_option { option_id, op, object_id, val64 };
    iommufd_request(IOMMUFD_CMD_VFIO_IOAS), "IOMMU_VFIO_IOAS": iommu_vfio_ioas { ioas_id, op };
    iommufd_request(IOMMUFD_CMD_HWPT_ALLOC), "IOMMU_HWPT_ALLOC": iommu_hwpt_alloc {
        flags, dev_id, pt_id, out_hwpt_id, data_type, data_len, data_uptr, fault_id
    };
    iommufd_request(IOMMUFD_CMD_GET_HW_INFO), "IOMMU_GET_HW_INFO": iommu_hw_info {
        flags, dev_id, data_len, data_uptr, out_max_pasid_log2, out_capabilities
    };
    iommufd_request(IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING), "IOMMU_HWPT_SET_DIRTY_TRACKING":
        iommu_hwpt_set_dirty_tracking { flags, hwpt_id };
    iommufd_request(IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP), "IOMMU_HWPT_GET_DIRTY_BITMAP":
        iommu_hwpt_get_dirty_bitmap { hwpt_id, flags, iova, length, page_size, data };
    iommufd_request(IOMMUFD_CMD_HWPT_INVALIDATE), "IOMMU_HWPT_INVALIDATE":
        iommu_hwpt_invalidate { hwpt_id, data_uptr, data_type, entry_len, entry_num };
    iommufd_request(IOMMUFD_CMD_FAULT_QUEUE_ALLOC), "IOMMU_FAULT_QUEUE_ALLOC":
        iommu_fault_alloc { flags, out_fault_id, out_fault_fd };
    iommufd_request(IOMMUFD_CMD_IOAS_MAP_FILE), "IOMMU_IOAS_MAP_FILE":
        iommu_ioas_map_file { flags, ioas_id, fd, start, length, iova };
    iommufd_request(IOMMUFD_CMD_VIOMMU_ALLOC), "IOMMU_VIOMMU_ALLOC": iommu_viommu_alloc {
        flags, type_, dev_id, hwpt_id, out_viommu_id, data_len, data_uptr
    };
    iommufd_request(IOMMUFD_CMD_VDEVICE_ALLOC), "IOMMU_VDEVICE_ALLOC":
        iommu_vdevice_alloc { viommu_id, dev_id, out_vdevice_id, virt_id };
    iommufd_request(IOMMUFD_CMD_IOAS_CHANGE_PROCESS), "IOMMU_IOAS_CHANGE_PROCESS":
        iommu_ioas_change_process {};
    iommufd_request(IOMMUFD_CMD_VEVENTQ_ALLOC), "IOMMU_VEVENTQ_ALLOC": iommu_veventq_alloc {
        flags, viommu_id, type_, veventq_depth, out_veventq_id, out_veventq_fd
    };
    iommufd_request(IOMMUFD_CMD_HW_QUEUE_ALLOC), "IOMMU_HW_QUEUE_ALLOC": iommu_hw_queue_alloc {
        flags, viommu_id, type_, index, out_hw_queue_id, nesting_parent_iova, length
    };
    vfio_request(3), "VFIO_GROUP_GET_STATUS": vfio_group_status { flags };
    vfio_request(7), "VFIO_DEVICE_GET_INFO":
        vfio_device_info { argsz, flags, num_regions, num_irqs, cap_offset };
    vfio_request(8), "VFIO_DEVICE_GET_REGION_INFO":
        vfio_region_info { argsz, flags, index, cap_offset, size, offset };
    vfio_request(9), "VFIO_DEVICE_GET_IRQ_INFO": vfio_irq_info { argsz, flags, index, count };
    vfio_request(10), "VFIO_DEVICE_SET_IRQS": vfio_irq_set { argsz, flags, index, start, count };
    vfio_request(12), "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO":
        vfio_pci_hot_reset_info { argsz, flags, count };
    vfio_request(13), "VFIO_DEVICE_PCI_HOT_RESET": vfio_pci_hot_reset { argsz, flags, count };
    vfio_request(17), "VFIO_DEVICE_FEATURE": vfio_device_feature { argsz, flags };
    vfio_request(18), "VFIO_DEVICE_BIND_IOMMUFD":
        vfio_device_bind_iommufd { argsz, flags, iommufd, out_devid };
    vfio_request(19), "VFIO_DEVICE_ATTACH_IOMMUFD_PT":
        vfio_device_attach_iommufd_pt { argsz, flags, pt_id, pasid };
    vfio_request(20), "VFIO_DEVICE_DETACH_IOMMUFD_PT":
        vfio_device_detach_iommufd_pt { argsz, flags, pasid };
};

/// The ioctls whose argument is a number, or the address of something else than a structure.
static WITHOUT_STRUCTURE: [(u32, &str); 8] = [
    (vfio_request(0), "VFIO_GET_API_VERSION"),
    (vfio_request(1), "VFIO_CHECK_EXTENSION"),
    (vfio_request(2), "VFIO_SET_IOMMU"),
    (vfio_request(4), "VFIO_GROUP_SET_CONTAINER"),
    (vfio_request(5), "VFIO_GROUP_UNSET_CONTAINER"),
    (vfio_request(6), "VFIO_GROUP_GET_DEVICE_FD"),
    (vfio_request(11), "VFIO_DEVICE_RESET"),
    (iommufd_request(0xa0), "IOMMU_TEST_CMD"),
];

/// The ioctls of VFIO's containers, whose numbers are also those of device ioctls.
static OF_CONTAINERS: &[Operation] = operations! {
    vfio_request(12), "VFIO_IOMMU_GET_INFO":
        vfio_iommu_type1_info { argsz, flags, iova_pgsizes, cap_offset };
    vfio_request(13), "VFIO_IOMMU_MAP_DMA":
        vfio_iommu_type1_dma_map { argsz, flags, vaddr, iova, size };
    vfio_request(14), "VFIO_IOMMU_UNMAP_DMA":
        vfio_iommu_type1_dma_unmap { argsz, flags, iova, size };
    vfio_request(17), "VFIO_IOMMU_DIRTY_PAGES": vfio_iommu_type1_dirty_bitmap { argsz, flags };
};

/// The longest structure, in bytes.
const LONGEST: usize = 80;

/// What is at an address of the caller.
struct Structure {
    bytes: [u8; LONGEST],
    /// How much of it there is and can be read, in bytes.
    length: usize,
}

impl Structure {
    fn read(process: &Process, address: u64) -> Self {
        let mut bytes = [0; LONGEST];
        let length = process.read_some(address, &mut bytes);
        // Each structure starts with its length.
        let declared = bytes.first_chunk().map_or(0, |first| u32::from_ne_bytes(*first));
        Self { bytes, length: length.min(declared as usize) }
    }

    /// The value of `field`; `None` if it is not there.
    fn value(&self, field: &Field) -> Option<u64> {
        let bytes = self.bytes.get(..self.length)?.get(field.offset..field.offset + field.size)?;
        let mut value = [0; size_of::<u64>()];
        value.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        Some(u64::from_le_bytes(value))
    }
}

/// Fields and values: `flags=0x1, length=0x1000`.
struct Fields<'a> {
    operation: &'a Operation,
    now: &'a Structure,
    /// If present, only the fields that differ from it are shown, each with a comma before it.
    before: Option<&'a Structure>,
}

impl fmt::Display for Fields<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = self.before.is_some();
        for field in self.operation.fields {
            let value = self.now.value(field);
            let Some(shown) = value else { continue };
            if self.before.is_some_and(|before| before.value(field) == value) {
                continue;
            }
            write!(f, "{}{}={shown:#x}", if comma { ", " } else { "" }, field.name)?;
            comma = true;
        }
        Ok(())
    }
}

/// The result of a call.
struct Outcome<'a>(&'a Result<Answer, Errno>);

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Ok(answer) => write!(f, "{}", answer.value),
            Err(errno) => write!(f, "-1 {errno}"),
        }
    }
}

/// Makes `call` on `file`, and logs it.
pub fn call(file: &dyn File, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
    if !log::log_enabled!(log::Level::Trace) {
        return file.call(caller, call);
    }
    let name = file.name();
    match call {
        Call::Ioctl { request, argument } => {
            let own = if file.as_iommufd().is_some() { OF_CONTAINERS } else { &[] };
            let mut operations = own.iter().chain(OPERATIONS);
            let Some(operation) = operations.find(|operation| operation.request == request) else {
                let result = file.call(caller, call);
                let known = WITHOUT_STRUCTURE.iter().find(|(number, _)| *number == request);
                match known {
                    Some((_, ioctl)) => {
                        log::trace!("{name}: {ioctl}({argument:#x}) = {}", Outcome(&result));
                    }
                    None => log::trace!(
                        "{name}: ioctl({request:#x}, {argument:#x}) = {}",
                        Outcome(&result)
                    ),
                }
                return result;
            };
            let before = Structure::read(caller.process(), argument);
            let result = file.call(caller, call);
            let after = Structure::read(caller.process(), argument);
            log::trace!(
                "{name}: {}({}) = {}{}",
                operation.name,
                Fields { operation, now: &before, before: None },
                Outcome(&result),
                Fields { operation, now: &after, before: Some(&before) },
            );
            result
        }
        Call::Read { count, offset, .. } => {
            let result = file.call(caller, call);
            log::trace!("{name}: read({count:#x}{}) = {}", At(offset), Outcome(&result));
            result
        }
        Call::Write { count, offset, .. } => {
            let result = file.call(caller, call);
            log::trace!("{name}: write({count:#x}{}) = {}", At(offset), Outcome(&result));
            result
        }
    }
}

/// The offset of an access, if it has one.
struct At(Option<u64>);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |offset| write!(f, ", offset={offset:#x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn structure(values: &[(usize, &[u8])]) -> Structure {
        let mut bytes = [0; LONGEST];
        for (at, value) in values {
            bytes[*at..at + value.len()].copy_from_slice(value);
        }
        Structure { bytes, length: LONGEST }
    }

    fn operation(name: &str) -> &'static Operation {
        OPERATIONS.iter().find(|operation| operation.name == name).unwrap()
    }

    #[test]
    fn every_structure_is_as_long_as_the_longest_at_the_most() {
        for operation in OPERATIONS.iter().chain(OF_CONTAINERS) {
            for field in operation.fields {
                let name = format!("{}.{}", operation.name, field.name);
                assert!([1, 2, 4, 8].contains(&field.size), "{name}");
                assert!(field.offset + field.size <= LONGEST, "{name}");
            }
        }
    }

    #[test]
    fn every_ioctl_is_named_once() {
        let mut requests: Vec<_> = OPERATIONS.iter().map(|operation| operation.request).collect();
        requests.extend(WITHOUT_STRUCTURE.map(|(request, _)| request));
        let all = requests.len();
        requests.sort_unstable();
        requests.dedup();
        assert_eq!(requests.len(), all);
        let ours = (IOMMUFD_CMD_BASE..=IOMMUFD_CMD_HW_QUEUE_ALLOC).map(iommufd_request);
        assert!(ours.into_iter().all(|request| requests.contains(&request)));
    }

    #[test]
    fn fields_are_shown_before_and_as_they_changed() {
        let operation = operation("IOMMU_IOAS_MAP");
        let before = structure(&[(4, &[7]), (8, &[2]), (16, &[0, 0x10])]);
        let shown = Fields { operation, now: &before, before: None }.to_string();
        assert_eq!(shown, "flags=0x7, ioas_id=0x2, user_va=0x1000, length=0x0, iova=0x0");
        let mut after = structure(&[(4, &[7]), (8, &[2]), (16, &[0, 0x10]), (32, &[0, 0x20])]);
        let changed =
            |after: &Structure| Fields { operation, now: after, before: Some(&before) }.to_string();
        assert_eq!(changed(&after), ", iova=0x2000");
        assert_eq!(changed(&before), "");
        // A shorter structure, or one that can be read in part only.
        after.length = 36;
        assert_eq!(changed(&after), "");
    }

    #[test]
    fn results_are_shown_as_libc_has_them() {
        assert_eq!(Outcome(&Ok(4.into())).to_string(), "4");
        assert_eq!(Outcome(&Err(Errno::ENOENT)).to_string(), "-1 ENOENT");
    }
}
