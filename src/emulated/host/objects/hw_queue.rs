// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_HW_QUEUE_ALLOC`: a queue in guest memory that a vIOMMU's hardware reads directly.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::access::Wanted;
use super::object::{HwQueue, Object};
use super::Objects;
use crate::drivers::HwQueueRequest;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use twostage::iommufd::{Errno, ObjectId, UserMemory};

/// The default type of hardware queue, which is invalid (`IOMMU_HW_QUEUE_TYPE_DEFAULT`).
const DEFAULT: u32 = iommufd_bindings::iommu_hw_queue_type_IOMMU_HW_QUEUE_TYPE_DEFAULT;

/// The user's arguments.
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
    /// `IOMMU_HW_QUEUE_ALLOC`.
    pub fn hw_queue_alloc(&mut self, arguments: &HwQueueArguments) -> Outcome<ObjectId> {
        let HwQueueArguments { viommu, kind, index, base, length } = *arguments;
        if kind == DEFAULT {
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
    let adjoin = |pair: &[UserMemory]| match pair {
        [one, next] => {
            Arc::ptr_eq(one.region(), next.region()) && one.offset() + one.length() == next.offset()
        }
        _ => false,
    };
    match places.first() {
        Some(first) if places.windows(2).all(adjoin) => {
            UserMemory::new(first.region().clone(), first.offset() + offset, length)
                .or_else(|error| refuse(Errno::EFAULT, error.to_string()))
        }
        _ => refuse(Errno::EFAULT, "the queue's memory is not contiguous"),
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
