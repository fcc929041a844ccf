// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vIOMMUs and vDEVICEs, with the rule that all devices of a vIOMMU are behind one physical IOMMU;
//! and `IOMMU_HW_QUEUE_ALLOC`: a queue in guest memory that a vIOMMU's hardware reads directly.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::access::Wanted;
use super::object::{HwQueue, Object, Vdevice, Viommu};
use super::Objects;
use crate::drivers::{HwQueueRequest, UserData, ViommuRequest};
use crate::host::mmaps::Mmap;
use crate::host::refusal::{allocate, refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use twostage::iommufd::{Errno, ObjectId, UserMemory};

/// The default type of vIOMMU, which is invalid (`IOMMU_VIOMMU_TYPE_DEFAULT`).
const DEFAULT_KIND: u32 = iommufd_bindings::iommu_viommu_type_IOMMU_VIOMMU_TYPE_DEFAULT;
/// The default type of hardware queue, which is invalid (`IOMMU_HW_QUEUE_TYPE_DEFAULT`).
const DEFAULT_QUEUE: u32 = iommufd_bindings::iommu_hw_queue_type_IOMMU_HW_QUEUE_TYPE_DEFAULT;

/// The arguments of `IOMMU_HW_QUEUE_ALLOC`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HwQueueArguments {
    pub viommu: ObjectId,
    /// The type, as the uAPI's number.
    pub kind: u32,
    pub index: u32,
    /// The guest's address, in bytes.
    pub base: u64,
    /// In bytes.
    pub length: u64,
}

impl Objects {
    /// `IOMMU_VIOMMU_ALLOC`.
    pub fn viommu_alloc(
        &mut self,
        kind: u32,
        dev: ObjectId,
        hwpt: ObjectId,
        data: Option<&dyn UserData>,
    ) -> Outcome<ObjectId> {
        if kind == DEFAULT_KIND {
            return refuse(Errno::EOPNOTSUPP, "a vIOMMU cannot have the default type");
        }
        let part = self.table.device(dev)?.part.clone();
        if !part.driver.has_viommu(kind) {
            return refuse(
                Errno::EOPNOTSUPP,
                format!("the IOMMU of device {dev} has no vIOMMU of type {kind:#x}"),
            );
        }
        let parent = self.table.hwpt_paging(hwpt)?;
        if !parent.flags.nest_parent() {
            return refuse(
                Errno::EINVAL,
                format!("HWPT_PAGING {hwpt} was not allocated with NEST_PARENT"),
            );
        }
        allocate("a vIOMMU")?;
        let (id, events) = (self.table.next_id()?, Arc::default());
        let mmap = |file, length| self.mmaps.add(Mmap { owner: id, length, file });
        let request = ViommuRequest {
            device: &part.requester,
            parent: &parent.domain,
            data,
            events: &events,
            mmap: &mmap,
        };
        let driver = part.driver.alloc_viommu(&request);
        let driver = driver.inspect_err(|_| self.mmaps.remove(id))?;
        let viommu = Viommu { kind, unit: part.unit, parent: hwpt, driver, events };
        let inserted = self.table.insert(Object::Viommu(viommu));
        let id = inserted.inspect_err(|_| self.mmaps.remove(id))?;
        self.table.hold(hwpt);
        Ok(id)
    }

    /// `IOMMU_VDEVICE_ALLOC`.
    pub fn vdevice_alloc(
        &mut self,
        viommu: ObjectId,
        dev: ObjectId,
        virt_id: u64,
    ) -> Outcome<ObjectId> {
        let object = self.table.viommu(viommu)?;
        let (unit, driver) = (object.unit, object.driver.clone());
        let device = self.table.device(dev)?;
        let part = device.part.clone();
        if part.unit != unit {
            return refuse(
                Errno::EINVAL,
                format!("device {dev} is not behind the IOMMU of vIOMMU {viommu}"),
            );
        }
        if let Some(vdevice) = device.vdevice {
            return refuse(Errno::EEXIST, format!("device {dev} has vDEVICE {vdevice} already"));
        }
        let same_id = |object: &Object| match object {
            Object::Vdevice(vdevice) => vdevice.viommu == viommu && vdevice.virt_id == virt_id,
            _ => false,
        };
        if let Some((id, _)) = self.table.iter().find(|(_, object)| same_id(object)) {
            return refuse(Errno::EEXIST, format!("vDEVICE {id} has the id {virt_id:#x} already"));
        }
        allocate("a vDEVICE")?;
        driver.vdevice_init(&part.requester, virt_id)?;
        let vdevice = Object::Vdevice(Vdevice { viommu, dev, virt_id });
        let vdevice =
            self.table.insert(vdevice).inspect_err(|_| driver.vdevice_destroy(virt_id))?;
        self.table.device_mut(dev)?.vdevice = Some(vdevice);
        self.table.hold(viommu);
        self.table.hold(dev);
        Ok(vdevice)
    }

    /// Ends a vDEVICE because its device was unbound.
    pub(super) fn end_vdevice(&mut self, id: ObjectId) -> Outcome<()> {
        self.forget_vdevice(id)?;
        self.release_all(self.holds(id));
        self.table.remove_leaving_tombstone(id);
        Ok(())
    }

    /// Removes a vDEVICE from the driver and the device.
    pub(super) fn forget_vdevice(&mut self, id: ObjectId) -> Outcome<()> {
        let &Vdevice { viommu, dev, virt_id } = self.table.vdevice(id)?;
        self.table.viommu(viommu)?.driver.vdevice_destroy(virt_id);
        self.table.device_mut(dev)?.vdevice = None;
        Ok(())
    }

    /// `IOMMU_HW_QUEUE_ALLOC`.
    pub fn hw_queue_alloc(&mut self, arguments: &HwQueueArguments) -> Outcome<ObjectId> {
        let HwQueueArguments { viommu, kind, index, base, length } = *arguments;
        if kind == DEFAULT_QUEUE {
            return refuse(Errno::EOPNOTSUPP, "a hardware queue cannot have the default type");
        }
        if length == 0 {
            return refuse(Errno::EINVAL, "an empty hardware queue");
        }
        if base.checked_add(length - 1).is_none() {
            return refuse(Errno::EOVERFLOW, format!("{base:#x} + {length:#x} is past 2^64"));
        }
        let object = self.table.viommu(viommu)?;
        let (driver, parent) = (object.driver.clone(), object.parent);
        if !driver.has_hw_queue(kind) {
            return refuse(
                Errno::EOPNOTSUPP,
                format!("vIOMMU {viommu} has no hardware queue of type {kind:#x}"),
            );
        }
        let ioas = self.table.hwpt_paging(parent)?.ioas;
        let pages = pages_of(base, length)?;
        let places = self.pin_range(ioas, &pages, Wanted::Read, true)?;
        let made = one_piece(&places, base % PAGE_SIZE, length).and_then(|memory| {
            let id = self.table.next_id()?;
            let request = HwQueueRequest { id, kind, index, base, memory: &memory };
            let needs = driver.hw_queue_init(&request)?;
            let queue = HwQueue { viommu, needs, ioas, pages: pages.clone() };
            let inserted = self.table.insert(Object::HwQueue(queue));
            Ok((inserted.inspect_err(|_| driver.hw_queue_destroy(id))?, needs))
        });
        if made.is_err() {
            self.unpin_range(ioas, &pages, true)?;
        }
        let (id, needs) = made?;
        self.table.hold(viommu);
        needs.into_iter().for_each(|needs| self.table.hold(needs));
        Ok(id)
    }

    /// Stops a hardware queue that is being destroyed, and releases its memory.
    pub(super) fn stop_hw_queue(&mut self, id: ObjectId) -> Outcome<()> {
        let Some(Object::HwQueue(queue)) = self.table.get(id) else { return Ok(()) };
        let (ioas, pages) = (queue.ioas, queue.pages.clone());
        self.table.viommu(queue.viommu)?.driver.hw_queue_destroy(id);
        self.unpin_range(ioas, &pages, true)
    }
}

/// The whole pages of `length` bytes at `base`, which must end within the address space.
fn pages_of(base: u64, length: u64) -> Outcome<RangeInclusive<u64>> {
    let end = (base % PAGE_SIZE).checked_add(length).and_then(|end| end.checked_add(PAGE_SIZE - 1));
    if end.is_none() {
        return refuse(Errno::ERANGE, format!("{length:#x} bytes are too many"));
    }
    let last = base + (length - 1);
    Ok(base - base % PAGE_SIZE..=last | (PAGE_SIZE - 1))
}

/// `length` bytes at `offset` of pinned memory, if contiguous.
fn one_piece(places: &[UserMemory], offset: u64, length: u64) -> Outcome<UserMemory> {
    let mut rest = places.iter();
    let first = rest.next().cloned();
    match first.and_then(|first| rest.try_fold(first, |one, next| one.join(next))) {
        Some(whole) => {
            whole.part(offset, length).or_else(|error| refuse(Errno::EFAULT, error.to_string()))
        }
        None => refuse(Errno::EFAULT, "the queue's memory is not contiguous"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestRegionMmap};

    #[test]
    fn whole_pages_are_pinned() {
        assert_eq!(pages_of(0x1800, 0x800).unwrap(), 0x1000..=0x1fff);
        assert_eq!(pages_of(0x1800, 0x801).unwrap(), 0x1000..=0x2fff);
        assert_eq!(pages_of(u64::MAX, 1).unwrap(), u64::MAX - 0xfff..=u64::MAX);
        assert_eq!(pages_of(0, u64::MAX).unwrap_err().errno, Errno::ERANGE);
    }

    #[test]
    fn memory_is_of_one_piece_however_it_was_mapped() {
        let region = || {
            let region = GuestRegionMmap::from_range(GuestAddress(0), 0x4000, None).unwrap();
            Arc::new(region)
        };
        let (region, other) = (region(), region());
        let piece = |of: &Arc<GuestRegionMmap>, offset| {
            UserMemory::new(of.clone(), offset, 0x1000).unwrap()
        };
        let places = [piece(&region, 0x1000), piece(&region, 0x2000)];
        let memory = one_piece(&places, 0x800, 0x1000).unwrap();
        assert_eq!((memory.offset(), memory.length()), (0x1800, 0x1000));
        for apart in [piece(&region, 0x3000), piece(&other, 0x2000)] {
            let outcome = one_piece(&[places[0].clone(), apart], 0, 0x2000);
            assert_eq!(outcome.unwrap_err().errno, Errno::EFAULT);
        }
    }
}
