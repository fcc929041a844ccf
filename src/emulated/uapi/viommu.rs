// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of vIOMMUs, their objects and fault queues, and descriptors for the process.

use std::mem::offset_of;

use iommufd_bindings::*;

use super::argument::{Argument, PointedData};
use super::{Process, UserSpace};
use crate::drivers::UserData;
use crate::host::event_file::{OpenFaultQueue, OpenVeventq};
use crate::host::objects::HwQueueArguments;
use crate::host::refusal::{refuse, Outcome};
use crate::{EmulatedHost, EventFile};
use twostage::iommufd::ObjectId;

pub(super) fn alloc(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    // Linux ignores the reserved field.
    argument.flags(offset_of!(iommu_viommu_alloc, flags), 0)?;
    let kind = argument.u32(offset_of!(iommu_viommu_alloc, type_));
    let length = argument.u32(offset_of!(iommu_viommu_alloc, data_len));
    let data = PointedData {
        user,
        data_type: kind,
        length,
        address: argument.u64(offset_of!(iommu_viommu_alloc, data_uptr)),
    };
    let data = (length != 0).then_some(&data as &dyn UserData);
    let dev = argument.id(offset_of!(iommu_viommu_alloc, dev_id));
    let hwpt = argument.id(offset_of!(iommu_viommu_alloc, hwpt_id));
    let id = host.objects().viommu_alloc(kind, dev, hwpt, data)?;
    argument.set_u32(offset_of!(iommu_viommu_alloc, out_viommu_id), id.0);
    Ok(())
}

pub(super) fn vdevice(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    let viommu = argument.id(offset_of!(iommu_vdevice_alloc, viommu_id));
    let dev = argument.id(offset_of!(iommu_vdevice_alloc, dev_id));
    let virt_id = argument.u64(offset_of!(iommu_vdevice_alloc, virt_id));
    let id = host.objects().vdevice_alloc(viommu, dev, virt_id)?;
    argument.set_u32(offset_of!(iommu_vdevice_alloc, out_vdevice_id), id.0);
    Ok(())
}

pub(super) fn event_queue(
    host: &EmulatedHost,
    argument: &mut Argument,
    process: &dyn Process,
) -> Outcome<()> {
    argument.flags(offset_of!(iommu_veventq_alloc, flags), 0)?;
    argument.reserved(offset_of!(iommu_veventq_alloc, __reserved))?;
    let viommu = argument.id(offset_of!(iommu_veventq_alloc, viommu_id));
    let kind = argument.u32(offset_of!(iommu_veventq_alloc, type_));
    let depth = argument.u32(offset_of!(iommu_veventq_alloc, veventq_depth));
    let queue = OpenVeventq::new(host.context(), viommu, kind, depth)?;
    let (id, fd) = install(host, process, queue.into())?;
    argument.set_u32(offset_of!(iommu_veventq_alloc, out_veventq_id), id.0);
    argument.set(offset_of!(iommu_veventq_alloc, out_veventq_fd), fd.to_ne_bytes());
    Ok(())
}

pub(super) fn hw_queue(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    argument.flags(offset_of!(iommu_hw_queue_alloc, flags), 0)?;
    let id = host.objects().hw_queue_alloc(&HwQueueArguments {
        viommu: argument.id(offset_of!(iommu_hw_queue_alloc, viommu_id)),
        kind: argument.u32(offset_of!(iommu_hw_queue_alloc, type_)),
        index: argument.u32(offset_of!(iommu_hw_queue_alloc, index)),
        base: argument.u64(offset_of!(iommu_hw_queue_alloc, nesting_parent_iova)),
        length: argument.u64(offset_of!(iommu_hw_queue_alloc, length)),
    })?;
    argument.set_u32(offset_of!(iommu_hw_queue_alloc, out_hw_queue_id), id.0);
    Ok(())
}

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
fn install(
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
