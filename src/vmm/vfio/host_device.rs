// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VFIO device for the rest of this module: regions and interrupts, in the terms of
//! `linux/vfio.h`.

use std::fmt::Debug;
use std::io;
use std::iter::once;
use std::ops::Range;

use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_MMAP;
use vfio_ioctls::{VfioRegionInfoCap, VfioRegionSparseMmapArea};
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
    /// Region `index`: `flags`, `size` and `offset` of its information, and its capabilities. Areas
    /// that are not in it are left out.
    pub(super) fn new(
        index: u32,
        flags: u32,
        size: u64,
        offset: u64,
        capabilities: &[VfioRegionInfoCap],
    ) -> Self {
        let mut mappable = Vec::new();
        if flags & VFIO_REGION_INFO_FLAG_MMAP != 0 && size != 0 {
            let areas = capabilities.iter().find_map(|capability| match capability {
                VfioRegionInfoCap::SparseMmap(sparse) => Some(&sparse.areas),
                _ => None,
            });
            let range = |area: &VfioRegionSparseMmapArea| {
                Some(area.offset..area.offset.checked_add(area.size)?)
            };
            mappable = match areas {
                Some(areas) => areas.iter().filter_map(range).collect(),
                // Without areas, all of it.
                None => once(0..size).collect(),
            };
            mappable.retain(|area| area.start < area.end && area.end <= size);
            mappable.sort_by_key(|area| area.start);
        }
        Self { index, size, offset, mappable }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vfio_ioctls::VfioRegionInfoCapSparseMmap;

    use super::*;

    /// The sparse-mmap capability of `areas`: offset and size.
    fn sparse(areas: &[(u64, u64)]) -> VfioRegionInfoCap {
        let area =
            |(offset, size): &(u64, u64)| VfioRegionSparseMmapArea { offset: *offset, size: *size };
        let areas = areas.iter().map(area).collect();
        VfioRegionInfoCap::SparseMmap(VfioRegionInfoCapSparseMmap { areas })
    }

    fn region(size: u64, capabilities: &[VfioRegionInfoCap]) -> Region {
        Region::new(2, VFIO_REGION_INFO_FLAG_MMAP, size, 2 << 40, capabilities)
    }

    #[test]
    fn the_sparse_areas_are_found_behind_others() {
        let areas = [VfioRegionInfoCap::MsixMappable, sparse(&[(0x4000, 0x1000), (0, 0x2000)])];
        let found = region(0x8000, &areas);
        assert_eq!(found.mappable, [0..0x2000, 0x4000..0x5000]);
        assert_eq!((found.index, found.size, found.offset), (2, 0x8000, 2 << 40));
        // One is beyond the region.
        assert!(region(0x4800, &areas).mappable.iter().eq([&(0..0x2000)]));
    }

    #[test]
    fn without_areas_all_of_it_can_be_mapped_or_nothing() {
        let found = region(0x4000, &[VfioRegionInfoCap::MsixMappable]);
        assert!(found.mappable.iter().eq([&(0..0x4000)]));
        assert!(region(0x4000, &[sparse(&[])]).mappable.is_empty());
        let trapped = Region::new(2, 0, 0x4000, 0, &[VfioRegionInfoCap::MsixMappable]);
        assert!(trapped.mappable.is_empty());
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
        fn no_area_leads_out(
            areas in prop::collection::vec(
                prop_oneof![(0u64..0x8000, 0u64..0x8000), (any::<u64>(), any::<u64>())], 0..8),
            size in prop_oneof![0u64..0x1_0000, any::<u64>()],
        ) {
            let region = region(size, &[sparse(&areas)]);
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
