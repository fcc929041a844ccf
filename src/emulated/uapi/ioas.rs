// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_DESTROY`, the ioctls of an IOAS, and `IOMMU_OPTION`.

use std::mem::offset_of;
use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};

use iommufd_bindings::*;

use super::argument::Argument;
use super::{UserFault, UserSpace};
use crate::host::context::Context;
use crate::host::objects::MapRequest;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::{RlimitMode, Source};
use crate::EmulatedHost;
use twostage::iommufd::{Errno, MapTarget, ObjectId, Protection};

const FIXED: u32 = iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA;
const WRITEABLE: u32 = iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
const READABLE: u32 = iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
const RLIMIT_MODE: u32 = iommufd_option_IOMMU_OPTION_RLIMIT_MODE;
const HUGE_PAGES: u32 = iommufd_option_IOMMU_OPTION_HUGE_PAGES;
const OP_SET: u32 = iommufd_option_ops_IOMMU_OPTION_OP_SET;
const OP_GET: u32 = iommufd_option_ops_IOMMU_OPTION_OP_GET;

/// What to do with the option.
#[derive(Debug, Clone, Copy)]
enum Operation {
    Set(u64),
    Get,
    Unknown(u16),
}

pub(super) fn destroy(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    host.objects().destroy(argument.id(offset_of!(iommu_destroy, id)))
}

pub(super) fn alloc(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    argument.flags(offset_of!(iommu_ioas_alloc, flags), 0)?;
    let id = host.objects().ioas_alloc()?;
    argument.set_u32(offset_of!(iommu_ioas_alloc, out_ioas_id), id.0);
    Ok(())
}

pub(super) fn allow_iovas(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    argument.reserved(offset_of!(iommu_ioas_allow_iovas, __reserved))?;
    let ioas = argument.id(offset_of!(iommu_ioas_allow_iovas, ioas_id));
    let count = argument.u32(offset_of!(iommu_ioas_allow_iovas, num_iovas));
    let list = argument.u64(offset_of!(iommu_ioas_allow_iovas, allowed_iovas));
    let ranges = (0..u64::from(count)).map(|index| Ok(read_range(user, list, index)?));
    host.objects().ioas_allow_iovas(ioas, ranges)
}

pub(super) fn iova_ranges(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    argument.reserved(offset_of!(iommu_ioas_iova_ranges, __reserved))?;
    let ioas = argument.id(offset_of!(iommu_ioas_iova_ranges, ioas_id));
    let ranges = host.objects().ioas_iova_ranges(ioas)?;
    let room = argument.u32(offset_of!(iommu_ioas_iova_ranges, num_iovas));
    let list = argument.u64(offset_of!(iommu_ioas_iova_ranges, allowed_iovas));
    for (index, range) in (0..u64::from(room)).zip(&ranges.allowed) {
        write_range(user, list, index, range)?;
    }
    // More than 2^32 ranges do not fit in memory.
    let needed = u32::try_from(ranges.allowed.len()).unwrap_or(u32::MAX);
    argument.set_u32(offset_of!(iommu_ioas_iova_ranges, num_iovas), needed);
    argument.set_u64(offset_of!(iommu_ioas_iova_ranges, out_iova_alignment), ranges.alignment);
    if needed > room {
        argument.answer_anyhow();
        return refuse(Errno::EMSGSIZE, format!("{needed} ranges do not fit in {room}"));
    }
    Ok(())
}

pub(super) fn map(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    let flags = argument.flags(offset_of!(iommu_ioas_map, flags), FIXED | WRITEABLE | READABLE)?;
    argument.reserved(offset_of!(iommu_ioas_map, __reserved))?;
    let ioas = argument.id(offset_of!(iommu_ioas_map, ioas_id));
    let start = argument.u64(offset_of!(iommu_ioas_map, user_va));
    let length = argument.u64(offset_of!(iommu_ioas_map, length));
    let target = target(flags, argument.u64(offset_of!(iommu_ioas_map, iova)))?;
    let protection = protection(flags);
    MapRequest::check(target, length, protection)?;
    let source = Source::User(user.share(), start);
    let request = MapRequest { target, source, length, protection };
    let iova = host.objects().ioas_map(ioas, request)?;
    argument.set_u64(offset_of!(iommu_ioas_map, iova), iova);
    Ok(())
}

pub(super) fn map_file(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    let known = FIXED | WRITEABLE | READABLE;
    let flags = argument.flags(offset_of!(iommu_ioas_map_file, flags), known)?;
    let ioas = argument.id(offset_of!(iommu_ioas_map_file, ioas_id));
    let fd = i32::from_ne_bytes(argument.bytes(offset_of!(iommu_ioas_map_file, fd)));
    let start = argument.u64(offset_of!(iommu_ioas_map_file, start));
    let length = argument.u64(offset_of!(iommu_ioas_map_file, length));
    let target = target(flags, argument.u64(offset_of!(iommu_ioas_map_file, iova)))?;
    let protection = protection(flags);
    MapRequest::check(target, length, protection)?;
    host.objects().table().ioas(ioas)?;
    if length == 0 {
        return refuse(Errno::EINVAL, "length 0");
    }
    if start.checked_add(length - 1).is_none() {
        return refuse(Errno::EOVERFLOW, format!("{start:#x} + {length:#x} is past 2^64"));
    }
    let source = if let Some(buf) = user.dma_buf(fd) {
        let size = buf.memory().length();
        if start + (length - 1) >= size {
            return refuse(
                Errno::EINVAL,
                format!("{length:#x} bytes at {start:#x} are not in {size:#x} of a device"),
            );
        }
        let importer: Weak<Context> = Arc::downgrade(host.context());
        buf.import(importer);
        Source::DmaBuf(buf, start)
    } else if let Some(file) = user.file(fd) {
        Source::File(user.share(), file, start)
    } else {
        return refuse(Errno::EBADF, format!("there is no file {fd}"));
    };
    let request = MapRequest { target, source, length, protection };
    let iova = host.objects().ioas_map(ioas, request)?;
    argument.set_u64(offset_of!(iommu_ioas_map_file, iova), iova);
    Ok(())
}

pub(super) fn change_process(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    argument.reserved(offset_of!(iommu_ioas_change_process, __reserved))?;
    host.objects().ioas_change_process(&user.credentials())
}

pub(super) fn copy(host: &EmulatedHost, argument: &mut Argument, _: &dyn UserSpace) -> Outcome<()> {
    let flags = argument.flags(offset_of!(iommu_ioas_copy, flags), FIXED | WRITEABLE | READABLE)?;
    let dst = argument.id(offset_of!(iommu_ioas_copy, dst_ioas_id));
    let src = argument.id(offset_of!(iommu_ioas_copy, src_ioas_id));
    let length = argument.u64(offset_of!(iommu_ioas_copy, length));
    let src_iova = argument.u64(offset_of!(iommu_ioas_copy, src_iova));
    let target = target(flags, argument.u64(offset_of!(iommu_ioas_copy, dst_iova)))?;
    let protection = protection(flags);
    let iova = host.objects().ioas_copy(dst, target, src, src_iova, length, protection)?;
    argument.set_u64(offset_of!(iommu_ioas_copy, dst_iova), iova);
    Ok(())
}

pub(super) fn unmap(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    let ioas = argument.id(offset_of!(iommu_ioas_unmap, ioas_id));
    let iova = argument.u64(offset_of!(iommu_ioas_unmap, iova));
    let length = argument.u64(offset_of!(iommu_ioas_unmap, length));
    let unmapped = host.unmap(ioas, iova, length)?;
    argument.set_u64(offset_of!(iommu_ioas_unmap, length), unmapped);
    Ok(())
}

pub(super) fn option(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    let reserved = u16::from_ne_bytes(argument.bytes(offset_of!(iommu_option, __reserved)));
    if reserved != 0 {
        return refuse(Errno::EOPNOTSUPP, format!("the reserved field is {reserved:#x}"));
    }
    let operation = u16::from_ne_bytes(argument.bytes(offset_of!(iommu_option, op)));
    let operation = match u32::from(operation) {
        OP_SET => Operation::Set(argument.u64(offset_of!(iommu_option, val64))),
        OP_GET => Operation::Get,
        _ => Operation::Unknown(operation),
    };
    let object = argument.id(offset_of!(iommu_option, object_id));
    let value = match argument.u32(offset_of!(iommu_option, option_id)) {
        RLIMIT_MODE => rlimit_mode(host, object, operation, user),
        HUGE_PAGES => huge_pages(host, object, operation),
        unknown => refuse(Errno::EOPNOTSUPP, format!("there is no option {unknown}")),
    }?;
    argument.set_u64(offset_of!(iommu_option, val64), value);
    Ok(())
}

/// Where to map; the IOVA is checked even if the flags do not ask for it.
fn target(flags: u32, iova: u64) -> Outcome<MapTarget> {
    if iova == u64::MAX {
        return refuse(Errno::EOVERFLOW, "the IOVA is 2^64-1");
    }
    Ok(if flags & FIXED != 0 { MapTarget::Fixed(iova) } else { MapTarget::Anywhere })
}

fn protection(flags: u32) -> Protection {
    Protection { read: flags & READABLE != 0, write: flags & WRITEABLE != 0 }
}

/// Address of the `index`-th range of the list; if it wraps, the access fails.
fn range_address(list: u64, index: u64) -> u64 {
    list.wrapping_add(index.wrapping_mul(size_of::<iommu_iova_range>() as u64))
}

fn read_range(
    user: &dyn UserSpace,
    list: u64,
    index: u64,
) -> Result<RangeInclusive<u64>, UserFault> {
    let mut words = [[0; 8]; 2];
    user.read(range_address(list, index), words.as_flattened_mut())?;
    let [start, last] = words.map(u64::from_ne_bytes);
    Ok(start..=last)
}

fn write_range(
    user: &dyn UserSpace,
    list: u64,
    index: u64,
    range: &RangeInclusive<u64>,
) -> Result<(), UserFault> {
    let words = [range.start().to_ne_bytes(), range.end().to_ne_bytes()];
    user.write(range_address(list, index), words.as_flattened())
}

fn rlimit_mode(
    host: &EmulatedHost,
    object: ObjectId,
    operation: Operation,
    user: &dyn UserSpace,
) -> Outcome<u64> {
    if object != ObjectId(0) {
        return refuse(Errno::EOPNOTSUPP, "the mode is not of one object");
    }
    match operation {
        Operation::Get => Ok(u64::from(host.objects().rlimit_mode() == RlimitMode::Process)),
        Operation::Set(mode) => {
            host.objects().set_rlimit_mode(&user.credentials(), mode).map(|()| mode)
        }
        Operation::Unknown(operation) => no_operation(operation),
    }
}

fn huge_pages(host: &EmulatedHost, ioas: ObjectId, operation: Operation) -> Outcome<u64> {
    let mut objects = host.objects();
    let allowed = objects.huge_pages(ioas)?;
    match operation {
        Operation::Get => Ok(u64::from(allowed)),
        Operation::Set(value @ (0 | 1)) => objects.set_huge_pages(ioas, value == 1).map(|()| value),
        Operation::Set(value) => {
            refuse(Errno::EINVAL, format!("huge pages are 0 or 1, not {value}"))
        }
        Operation::Unknown(operation) => no_operation(operation),
    }
}

fn no_operation<T>(operation: u16) -> Outcome<T> {
    refuse(Errno::EOPNOTSUPP, format!("there is no operation {operation}"))
}
