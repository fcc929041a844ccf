// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_OPTION`.

use std::mem::offset_of;

use iommufd_bindings::*;

use super::argument::Argument;
use super::UserSpace;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::RlimitMode;
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId};

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
