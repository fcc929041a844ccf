// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VFIO device for the rest of this module: regions and interrupts, in the terms of
//! `linux/vfio.h`.
//!
//! The kernel's information about a region ends with a chain of capabilities, linked by byte
//! offsets. It is validated like any other input: the walk ends at an invalid or circular link.

use std::fmt::Debug;
use std::io;
use std::iter::once;
use std::ops::Range;

use vfio_bindings::bindings::vfio::{
    vfio_info_cap_header, vfio_region_info, vfio_region_info_cap_sparse_mmap,
    vfio_region_sparse_mmap_area, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP,
};
use vmm_sys_util::eventfd::EventFd;

use super::mapping::Mapping;

/// The operations of a VFIO device. Any thread may call it at any time.
pub trait HostDevice: Debug + Send + Sync {
    /// `VFIO_DEVICE_GET_REGION_INFO`: region `index`, a BAR by its number or
    /// `VFIO_PCI_CONFIG_REGION_INDEX`. A missing region is empty.
    ///
    /// # Errors
    /// VFIO's error.
    fn region(&self, index: u32) -> io::Result<Region>;

    /// Reads `data.len()` bytes at `offset` of `region`.
    ///
    /// # Errors
    /// VFIO's error; `EIO` while a BAR is not decoded.
    fn read(&self, region: &Region, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data` at `offset` of `region`.
    ///
    /// # Errors
    /// As [`HostDevice::read`].
    fn write(&self, region: &Region, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Maps `length` bytes at `offset` of `region`, all of which must be mappable.
    ///
    /// # Errors
    /// The error of `mmap(2)`.
    fn map(&self, region: &Region, offset: u64, length: u64) -> io::Result<Mapping>;

    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    ///
    /// # Errors
    /// VFIO's error.
    fn irq(&self, irq: Irq) -> io::Result<IrqInfo>;

    /// `VFIO_DEVICE_SET_IRQS`: the interrupts of `irq` from number `start` on write `events`;
    /// `None` disables one. The first such call enables the kind of interrupt; only one kind is
    /// enabled at a time.
    ///
    /// # Errors
    /// VFIO's error; `ENOSPC` if the host has too few interrupts.
    fn set_triggers(&self, irq: Irq, start: u32, events: &[Option<&EventFd>]) -> io::Result<()>;

    /// `event` unmasks INTx, which masks itself when it is sent.
    ///
    /// # Errors
    /// VFIO's error.
    fn set_intx_unmask(&self, event: &EventFd) -> io::Result<()>;

    /// Disables that kind of interrupt.
    ///
    /// # Errors
    /// VFIO's error.
    fn disable_irq(&self, irq: Irq) -> io::Result<()>;

    /// Whether [`HostDevice::reset`] is supported.
    fn can_reset(&self) -> bool;

    /// `VFIO_DEVICE_RESET`.
    ///
    /// # Errors
    /// VFIO's error.
    fn reset(&self) -> io::Result<()>;
}

/// The kinds of interrupts of a PCI device: `VFIO_PCI_*_IRQ_INDEX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Irq {
    /// The interrupt pin.
    Intx = 0,
    /// The MSI capability.
    Msi = 1,
    /// The MSI-X capability.
    Msix = 2,
}

/// VFIO's information about a kind of interrupts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// Their number.
    pub count: u32,
    /// `VFIO_IRQ_INFO_NORESIZE`: all vectors to be used must be set at first.
    pub fixed: bool,
}

/// A region: its place in the device's file, and which parts can be mapped; empty if it does not
/// exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Region {
    /// Its index.
    pub index: u32,
    /// Bytes.
    pub size: u64,
    /// Its offset in the device's file, in bytes.
    pub offset: u64,
    /// The mappable parts, in bytes from its start; ascending, within the region.
    pub mappable: Vec<Range<u64>>,
}

impl Region {
    /// The region of `info`, with the capabilities in `bytes`, which is all that the kernel wrote,
    /// starting with `info`.
    pub(super) fn new(info: &vfio_region_info, bytes: &[u8]) -> Self {
        let mut mappable = Vec::new();
        if info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0 && info.size != 0 {
            let areas = (info.flags & VFIO_REGION_INFO_FLAG_CAPS != 0)
                .then(|| sparse_areas(bytes, info.cap_offset))
                .flatten();
            // Without areas, all of it.
            mappable = areas.unwrap_or_else(|| once(0..info.size).collect());
            mappable.retain(|area| area.start < area.end && area.end <= info.size);
            mappable.sort_by_key(|area| area.start);
        }
        Self { index: info.index, size: info.size, offset: info.offset, mappable }
    }

    /// Whether all of `length` bytes at `offset` are in the region.
    pub fn contains(&self, offset: u64, length: usize) -> bool {
        offset.checked_add(length as u64).is_some_and(|end| end <= self.size)
    }

    /// The parts to be mapped: whole mappable pages of `page` bytes, without those that contain a
    /// byte of `trapped`.
    pub fn areas_without(&self, trapped: &[Range<u64>], page: u64) -> Vec<Range<u64>> {
        let mut areas: Vec<_> = self
            .mappable
            .iter()
            .filter_map(|area| {
                let start = area.start.checked_next_multiple_of(page)?;
                Some(start..area.end - area.end % page)
            })
            .collect();
        for trapped in trapped.iter().filter(|trapped| trapped.start < trapped.end) {
            let start = trapped.start - trapped.start % page;
            let end = trapped.end.checked_next_multiple_of(page).unwrap_or(u64::MAX);
            areas = areas
                .into_iter()
                .flat_map(|area| [area.start..area.end.min(start), area.start.max(end)..area.end])
                .collect();
        }
        areas.retain(|area| area.start < area.end);
        areas
    }
}

/// A four-byte field at `offset`.
fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|chunk| u32::from_ne_bytes(*chunk))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().map(|chunk| u64::from_ne_bytes(*chunk))
}

/// The areas of the sparse-mmap capability in the chain that starts at `first`, if there is one.
fn sparse_areas(bytes: &[u8], first: u32) -> Option<Vec<Range<u64>>> {
    let mut offset = first as usize;
    // Each capability has its own header: more steps than headers are a cycle.
    for _ in 0..bytes.len() / size_of::<vfio_info_cap_header>() {
        // ID and version of two bytes each; then the offset of the next one, or zero.
        let (id, next) = (u32_at(bytes, offset)? & 0xffff, u32_at(bytes, offset + 4)?);
        if id == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            return Some(areas_at(bytes, offset));
        }
        if (next as usize) < size_of::<vfio_region_info>() {
            return None;
        }
        offset = next as usize;
    }
    None
}

/// The areas of the sparse-mmap capability at `offset`, as far as they are complete.
fn areas_at(bytes: &[u8], offset: usize) -> Vec<Range<u64>> {
    let count = u32_at(bytes, offset + size_of::<vfio_info_cap_header>()).unwrap_or(0);
    let first = offset + size_of::<vfio_region_info_cap_sparse_mmap>();
    (first..bytes.len())
        .step_by(size_of::<vfio_region_sparse_mmap_area>())
        .take(count as usize)
        .map_while(|at| {
            let start = u64_at(bytes, at)?;
            Some(start..start.checked_add(u64_at(bytes, at + 8)?)?)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAD: usize = size_of::<vfio_region_info>();

    fn info(size: u64, cap_offset: u32) -> vfio_region_info {
        let flags = VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS;
        vfio_region_info { flags, cap_offset, size, ..vfio_region_info::default() }
    }

    /// A capability: id, version 1, next, what follows.
    fn capability(id: u16, next: u32, body: &[u64]) -> Vec<u8> {
        let words = [u32::from(id) | 1 << 16, next];
        let words = words.into_iter().flat_map(u32::to_ne_bytes);
        words.chain(body.iter().copied().flat_map(u64::to_ne_bytes)).collect()
    }

    #[test]
    fn the_sparse_areas_are_found_behind_others() {
        let first = capability(3, HEAD as u32 + 8, &[]);
        let areas = capability(1, 0, &[2, 0x4000, 0x1000, 0, 0x2000]);
        let bytes = [vec![0; HEAD], first, areas].concat();
        let region = Region::new(&info(0x8000, HEAD as u32), &bytes);
        assert_eq!(region.mappable, [0..0x2000, 0x4000..0x5000]);
        // The last area is truncated, and the one before is beyond the region.
        let region = Region::new(&info(0x4800, HEAD as u32), &bytes[..bytes.len() - 8]);
        assert_eq!(region.mappable, [] as [Range<u64>; 0]);
    }

    #[test]
    fn without_areas_all_of_it_can_be_mapped_or_nothing() {
        let msix_mappable = [vec![0; HEAD], capability(3, 0, &[])].concat();
        let region = Region::new(&info(0x4000, HEAD as u32), &msix_mappable);
        assert!(region.mappable.iter().eq([&(0..0x4000)]));
        let plain = vfio_region_info { size: 0x4000, ..vfio_region_info::default() };
        assert!(Region::new(&plain, &msix_mappable).mappable.is_empty());
    }

    #[test]
    fn pages_with_a_trapped_byte_are_left_out() {
        let mappable = vec![0..0x4000, 0x5800..0x7fff];
        let region = Region { size: 0x8000, mappable, ..Region::default() };
        assert_eq!(region.areas_without(&[], 0x1000), [0..0x4000, 0x6000..0x7000]);
        let trapped = [0x1ff0..0x2010, 0x6000..0x6000];
        let areas = region.areas_without(&trapped, 0x1000);
        assert_eq!(areas, [0..0x1000, 0x3000..0x4000, 0x6000..0x7000]);
        assert_eq!(region.areas_without(&trapped, 0x1_0000), [] as [Range<u64>; 0]);
        assert_eq!(region.areas_without(&[0..1, 1..u64::MAX], 0x1000), [] as [Range<u64>; 0]);
    }

    #[test]
    fn an_access_lies_in_the_region() {
        let region = Region { size: 16, ..Region::default() };
        assert!(region.contains(8, 8) && !region.contains(9, 8) && !region.contains(u64::MAX, 1));
    }

    proptest! {
        #[test]
        fn no_chain_loops_or_leads_out(
            words in prop::collection::vec(prop_oneof![0u32..80, any::<u32>()], 0..64),
            first in prop_oneof![0u32..300, any::<u32>()],
            size: u64,
        ) {
            let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
            let region = Region::new(&info(size, first), &bytes);
            for area in &region.mappable {
                prop_assert!(area.start < area.end && area.end <= size);
            }
            for area in region.areas_without(&[0..0, 0x1000..0x1004], 0x1000) {
                prop_assert!(area.start % 0x1000 == 0 && area.end % 0x1000 == 0);
                prop_assert!(!(area.start..area.end).contains(&0x1000));
            }
        }
    }
}
