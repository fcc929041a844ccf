// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_TEST_CMD`: one ioctl of `/dev/iommu`, many operations.

use std::mem::offset_of;

use zerocopy::FromBytes;

use super::abi::{self, op, BODY};
use super::machine::add_mock_device;
use super::{access, checks, dirty, dmabuf, events};
use crate::host::device::Slot;
use crate::host::objects::{Change, Object};
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::range_of;
use crate::uapi::{Argument, Process};
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId};

/// The minimum limit of memory for batches: one entry of a batch.
const LEAST_MEMORY_LIMIT: u32 = 12;

/// Executes the operation in `argument`, a `struct iommu_test_cmd`.
///
/// # Errors
/// Those of Linux's operation; `EOPNOTSUPP` there is no such operation.
pub fn run(host: &EmulatedHost, argument: &mut Argument, process: &dyn Process) -> Outcome<()> {
    let id = argument.id(abi::ID);
    match argument.u32(abi::OP) {
        op::ADD_RESERVED => add_reserved(host, id, &body(argument)?),
        op::MOCK_DOMAIN => mock_domain(host, id, 0, argument),
        op::MOCK_DOMAIN_FLAGS => {
            let flags = body::<abi::MockDomain>(argument)?.dev_flags;
            mock_domain(host, id, flags, argument)
        }
        op::MOCK_DOMAIN_REPLACE => {
            let pt = ObjectId(body::<abi::MockDomainReplace>(argument)?.pt_id);
            let hwpt = host.objects().change_mock(id, None, pt, Change::Replace)?;
            argument.set_u32(BODY + offset_of!(abi::MockDomainReplace, pt_id), hwpt.0);
            Ok(())
        }
        op::MD_CHECK_MAP => checks::check_map(host, id, &body(argument)?, process),
        op::MD_CHECK_REFS => checks::check_refs(host, &body(argument)?, process),
        op::MD_CHECK_IOTLB => checks::check_iotlb(host, id, &body(argument)?),
        op::DEV_CHECK_CACHE => checks::check_device_cache(host, id, &body(argument)?),
        op::CREATE_ACCESS => access::create(host, id, argument, &body(argument)?, process),
        op::DESTROY_ACCESS_PAGES => {
            let item = body::<abi::DestroyAccessPages>(argument)?.access_pages_id;
            access::destroy_pages(fd(id), item, process)
        }
        op::ACCESS_PAGES => access::pages(host, fd(id), argument, &body(argument)?, process),
        op::ACCESS_RW => access::read_write(host, fd(id), &body(argument)?, process),
        op::ACCESS_REPLACE_IOAS => {
            let ioas = ObjectId(body::<abi::AccessReplaceIoas>(argument)?.ioas_id);
            access::replace_ioas(fd(id), ioas, process)
        }
        op::DIRTY => dirty::dirty(host, id, &body(argument)?, argument, process),
        op::SET_TEMP_MEMORY_LIMIT => set_memory_limit(body::<abi::MemoryLimit>(argument)?.limit),
        op::TRIGGER_IOPF => events::page_request(host, &body(argument)?),
        op::TRIGGER_VEVENT => {
            events::vevent(host, ObjectId(body::<abi::TriggerVevent>(argument)?.dev_id))
        }
        op::DMABUF_GET => {
            let fd = dmabuf::get(&body(argument)?, process)?;
            argument.set_result(fd);
            Ok(())
        }
        op::DMABUF_REVOKE => {
            let abi::DmabufRevoke { dmabuf_fd, revoked } = body(argument)?;
            dmabuf::revoke(dmabuf_fd, revoked != 0, process)
        }
        op::PASID_ATTACH => pasid_change(host, id, argument, Change::Attach),
        op::PASID_REPLACE => pasid_change(host, id, argument, Change::Replace),
        op::PASID_DETACH => pasid_detach(host, id, &body(argument)?),
        op::PASID_CHECK_HWPT => pasid_check_hwpt(host, id, &body(argument)?),
        other => refuse(Errno::EOPNOTSUPP, format!("there is no test operation {other}")),
    }
}

/// The operation-specific part of `argument`.
fn body<T: FromBytes>(argument: &Argument) -> Outcome<T> {
    match T::read_from_prefix(argument.rest(BODY)) {
        Ok((body, _)) => Ok(body),
        Err(_) => refuse(Errno::EINVAL, "the structure is too short for the operation"),
    }
}

fn add_reserved(host: &EmulatedHost, ioas: ObjectId, body: &abi::AddReserved) -> Outcome<()> {
    let &abi::AddReserved { start, length } = body;
    if length == 0 {
        return refuse(Errno::EINVAL, "length 0");
    }
    match range_of(start, length) {
        Some(range) => host.objects().reserve_iovas(ioas, range),
        None => refuse(Errno::EOVERFLOW, format!("{start:#x} + {length:#x} is past 2^64")),
    }
}

fn mock_domain(
    host: &EmulatedHost,
    pt: ObjectId,
    flags: u32,
    argument: &mut Argument,
) -> Outcome<()> {
    let name = add_mock_device(host.machine(), flags)?;
    let ids = host.objects().add_mock_device(&name, pt)?;
    argument.set_u32(BODY + offset_of!(abi::MockDomain, out_stdev_id), ids.selftest.0);
    argument.set_u32(BODY + offset_of!(abi::MockDomain, out_hwpt_id), ids.hwpt.0);
    argument.set_u32(BODY + offset_of!(abi::MockDomain, out_idev_id), ids.dev.0);
    Ok(())
}

/// Limits the kernel's memory for page lists of page table updates: with little, it makes more
/// passes. There are no such lists here, so this has no effect.
fn set_memory_limit(limit: u32) -> Outcome<()> {
    if limit < LEAST_MEMORY_LIMIT {
        return refuse(Errno::EINVAL, format!("{limit} bytes are not enough for one entry"));
    }
    Ok(())
}

/// Some operations use a descriptor.
fn fd(id: ObjectId) -> i32 {
    id.0.cast_signed()
}

/// PASID 0 means the device itself (`IOMMU_NO_PASID`).
fn slot(pasid: u32) -> Slot {
    (pasid != 0).then_some(pasid)
}

fn pasid_change(
    host: &EmulatedHost,
    id: ObjectId,
    argument: &mut Argument,
    change: Change,
) -> Outcome<()> {
    let abi::PasidChange { pasid, pt_id } = body(argument)?;
    let hwpt = host.objects().change_mock(id, slot(pasid), ObjectId(pt_id), change)?;
    argument.set_u32(BODY + offset_of!(abi::PasidChange, pt_id), hwpt.0);
    Ok(())
}

fn pasid_detach(host: &EmulatedHost, id: ObjectId, body: &abi::PasidChange) -> Outcome<()> {
    let mut objects = host.objects();
    let dev = objects.table().selftest(id)?.dev;
    objects.device_detach(dev, slot(body.pasid))
}

/// Whether the PASID is attached to the HWPT, or to none if it is 0.
fn pasid_check_hwpt(host: &EmulatedHost, id: ObjectId, body: &abi::PasidChange) -> Outcome<()> {
    let objects = host.objects();
    let dev = objects.table().selftest(id)?.dev;
    let attached = objects.attached_to(dev, slot(body.pasid));
    let wanted = ObjectId(body.pt_id);
    match objects.table().get(wanted) {
        _ if body.pt_id == 0 && attached.is_none() => Ok(()),
        _ if body.pt_id == 0 => refuse(Errno::EINVAL, format!("{attached:?} is attached")),
        None => refuse(Errno::ENOENT, format!("there is no object {wanted}")),
        Some(Object::HwptPaging(_) | Object::HwptNested(_)) if attached == Some(wanted) => Ok(()),
        Some(_) => refuse(Errno::EINVAL, format!("{attached:?} is attached, not {wanted}")),
    }
}
