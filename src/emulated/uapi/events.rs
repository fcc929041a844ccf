// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_FAULT_QUEUE_ALLOC`, and descriptors for the process.

use std::mem::offset_of;

use iommufd_bindings::*;

use super::argument::Argument;
use super::Process;
use crate::host::event_file::OpenFaultQueue;
use crate::host::refusal::{refuse, Outcome};
use crate::{EmulatedHost, EventFile};
use twostage::iommufd::ObjectId;

pub(super) fn fault_queue(
    host: &EmulatedHost,
    argument: &mut Argument,
    process: &dyn Process,
) -> Outcome<()> {
    argument.flags(offset_of!(iommu_fault_alloc, flags), 0)?;
    let (id, fd) = install(host, process, OpenFaultQueue::new(host.context())?.into())?;
    argument.set_u32(offset_of!(iommu_fault_alloc, out_fault_id), id.0);
    argument.set(offset_of!(iommu_fault_alloc, out_fault_fd), fd.to_ne_bytes());
    Ok(())
}

/// Passes `file` to the process: its object and its descriptor. If the process cannot take it, the
/// object is destroyed.
pub(super) fn install(
    host: &EmulatedHost,
    process: &dyn Process,
    file: EventFile,
) -> Outcome<(ObjectId, i32)> {
    let id = file.object();
    let fd = process.install(file);
    let fd = fd.or_else(|errno| {
        host.objects().destroy(id)?;
        refuse(errno, "the process can have no descriptor")
    })?;
    Ok((id, fd))
}
