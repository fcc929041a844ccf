// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page tables of the mock driver.
//!
//! One contains exactly the IOAS's mappings, which determine its leaves: these are computed on
//! demand and not stored. The format is AMD's v1 with pages of 2 KiB and three levels: any power of
//! two can be a leaf.

use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::abi::{self, HwptData, HwptInvalidate, MOCK_HUGE_PAGE_SIZE, MOCK_PAGE_SIZE};
use super::devices::MockVdevices;
use crate::drivers::{NestedDomain, PagingDomain, Partial, UserArray, UserData};
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use crate::units::stage2::DirtyLog;
use twostage::iommufd::{Errno, HwptFlags};

/// IOVA bits translated by three levels of 512 entries over 2 KiB.
const IOVA_BITS: u32 = 38;
/// The IOVAs of the format.
const FORMAT_APERTURE: RangeInclusive<u64> = 0..=(1 << IOVA_BITS) - 1;
/// The format's page sizes, one bit for each: every power of two up to half of an entry of the top
/// level.
const FORMAT_SIZES: u64 = (1 << (IOVA_BITS - 1)) - MOCK_PAGE_SIZE;
/// The page sizes of a table of the huge type.
const HUGE_SIZES: u64 = MOCK_HUGE_PAGE_SIZE | PAGE_SIZE;

/// Tables filled from an IOAS.
#[derive(Debug)]
pub struct MockPaging {
    aperture: RangeInclusive<u64>,
    page_sizes: u64,
    dirty: Option<Arc<DirtyLog>>,
}

impl MockPaging {
    /// Tables according to `data` and `flags`, for a device with or without dirty tracking.
    ///
    /// # Errors
    /// `EOPNOTSUPP` unsupported data or tables, or dirty tracking without support; `EINVAL` data of
    /// a wrong length.
    pub fn new(
        flags: HwptFlags,
        data: Option<&dyn UserData>,
        device_tracks: bool,
    ) -> Outcome<Self> {
        if flags.dirty_tracking() && !device_tracks {
            return refuse(Errno::EOPNOTSUPP, "the device has no dirty tracking");
        }
        let data = match data {
            Some(data) => read_hwpt_data(data)?,
            None => HwptData::default(),
        };
        let (aperture, page_sizes) = match data.pagetable_type {
            abi::MOCK_IOMMUPT_DEFAULT => {
                (abi::MOCK_APERTURE_START..=abi::MOCK_APERTURE_LAST, FORMAT_SIZES)
            }
            abi::MOCK_IOMMUPT_HUGE => (FORMAT_APERTURE, HUGE_SIZES),
            other => return refuse(Errno::EOPNOTSUPP, format!("no page tables of type {other}")),
        };
        let page_size = 1 << page_sizes.trailing_zeros();
        let dirty = flags.dirty_tracking().then(|| Arc::new(DirtyLog::new(page_size)));
        Ok(Self { aperture, page_sizes, dirty })
    }

    /// The leaf that translates `iova`, if `area` as a whole is mapped to memory from `output` on;
    /// with `huge_pages` as large as possible, otherwise as small.
    pub fn leaf(
        &self,
        area: &RangeInclusive<u64>,
        output: u64,
        iova: u64,
        huge_pages: bool,
    ) -> Option<RangeInclusive<u64>> {
        let sizes = if huge_pages { self.page_sizes } else { self.page_size() };
        leaf_at(sizes, area, output, iova)
    }
}

impl PagingDomain for MockPaging {
    fn aperture(&self) -> RangeInclusive<u64> {
        self.aperture.clone()
    }

    fn page_size(&self) -> u64 {
        1 << self.page_sizes.trailing_zeros()
    }

    fn only_writable(&self) -> bool {
        false
    }

    fn dirty_log(&self) -> Option<&Arc<DirtyLog>> {
        self.dirty.as_ref()
    }
}

/// User-owned tables. They only consist of an IOTLB that the user fills at creation.
#[derive(Debug)]
pub struct MockNested {
    /// The vDEVICEs of the vIOMMU that it was created on.
    vdevices: Option<Arc<MockVdevices>>,
    iotlb: Mutex<[u32; abi::MOCK_NESTED_DOMAIN_IOTLB_NUM]>,
}

impl MockNested {
    /// Tables with the IOTLB from `data`, for `vdevices` if created on a vIOMMU.
    ///
    /// # Errors
    /// `EOPNOTSUPP` no such data; `EINVAL` data of a wrong length.
    pub fn new(vdevices: Option<Arc<MockVdevices>>, data: &dyn UserData) -> Outcome<Self> {
        let iotlb = [read_hwpt_data(data)?.iotlb; abi::MOCK_NESTED_DOMAIN_IOTLB_NUM];
        Ok(Self { vdevices, iotlb: Mutex::new(iotlb) })
    }

    /// The vDEVICEs of the vIOMMU that it was created on.
    pub fn vdevices(&self) -> Option<&Arc<MockVdevices>> {
        self.vdevices.as_ref()
    }

    /// Entry `index` of the IOTLB, if it exists.
    pub fn iotlb_entry(&self, index: u32) -> Option<u32> {
        self.iotlb().get(index as usize).copied()
    }

    fn iotlb(&self) -> MutexGuard<'_, [u32; abi::MOCK_NESTED_DOMAIN_IOTLB_NUM]> {
        self.iotlb.lock()
    }

    fn invalidate_one(&self, entry: HwptInvalidate) -> Outcome<()> {
        clear(&mut *self.iotlb(), entry.flags, entry.iotlb_id)
    }
}

impl NestedDomain for MockNested {
    fn invalidate(&self, entries: &dyn UserArray) -> Result<(), Partial> {
        const TYPE: u64 = abi::IOMMU_HWPT_INVALIDATE_DATA_SELFTEST as u64;
        if entries.data_type() != TYPE {
            let refused = format!("no invalidations of type {:#x}", entries.data_type());
            return refuse(Errno::EINVAL, refused).map_err(Partial::from);
        }
        for index in 0..entries.count() {
            // The first version of the structure was complete.
            let whole = size_of::<HwptInvalidate>();
            let outcome = entries
                .read_entry::<{ size_of::<HwptInvalidate>() }>(TYPE, index, whole)
                .and_then(|bytes| self.invalidate_one(zerocopy::transmute!(bytes)));
            outcome.map_err(|refusal| Partial { done: index, refusal })?;
        }
        Ok(())
    }

    fn describe(&self) -> String {
        format!("mock tables, IOTLB {:#x?}", *self.iotlb())
    }
}

/// Clears one entry of `cache`, or all of them with the flag. Cleared entries read as 0.
///
/// # Errors
/// `EOPNOTSUPP` another flag; `EINVAL` there is no such entry, even if all are to be cleared.
pub fn clear(cache: &mut [u32], flags: u32, index: u32) -> Outcome<()> {
    if flags & !abi::IOMMU_TEST_INVALIDATE_FLAG_ALL != 0 {
        return refuse(Errno::EOPNOTSUPP, format!("flags {flags:#x}"));
    }
    match cache.get_mut(index as usize) {
        None => return refuse(Errno::EINVAL, format!("there is no entry {index}")),
        Some(_) if flags != 0 => cache.fill(0),
        Some(entry) => *entry = 0,
    }
    Ok(())
}

fn read_hwpt_data(data: &dyn UserData) -> Outcome<HwptData> {
    const TYPE: u64 = abi::IOMMU_HWPT_DATA_SELFTEST as u64;
    if data.data_type() != TYPE {
        return refuse(Errno::EOPNOTSUPP, format!("no data of type {:#x}", data.data_type()));
    }
    let bytes = data.read_struct::<{ size_of::<HwptData>() }>(TYPE, HwptData::MIN_SIZE)?;
    Ok(zerocopy::transmute!(bytes))
}

/// The leaf that translates `iova` when `range` as a whole is mapped to `output` and what follows:
/// the largest of `sizes` (one bit for each) that both addresses are aligned to and that fits. None
/// outside of the range, and where even the smallest one does not fit.
///
/// A table filled from the lowest address on with the largest possible pages has exactly these
/// leaves: aligned blocks never overlap partially.
fn leaf_at(
    sizes: u64,
    range: &RangeInclusive<u64>,
    output: u64,
    iova: u64,
) -> Option<RangeInclusive<u64>> {
    let skew = output.wrapping_sub(*range.start());
    let block = |size: u64| {
        let start = iova & !(size - 1);
        start..=start + (size - 1)
    };
    let fits =
        |leaf: &RangeInclusive<u64>| range.contains(leaf.start()) && range.contains(leaf.end());
    let sizes = (0..u64::BITS).rev().map(|bit| 1 << bit).filter(|size| sizes & size != 0);
    sizes.filter(|size| skew.is_multiple_of(*size)).map(block).find(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The leaves of a table filled greedily: the largest page at the lowest address, repeatedly.
    fn filled(sizes: u64, range: RangeInclusive<u64>, output: u64) -> Vec<RangeInclusive<u64>> {
        let mut leaves = Vec::new();
        let (mut iova, mut output) = (*range.start(), output);
        while iova <= *range.end() {
            let room = *range.end() - iova + 1;
            let suits = |size: &u64| {
                sizes & size != 0 && iova % size == 0 && output % size == 0 && *size <= room
            };
            let size = (0..u64::BITS).rev().map(|bit| 1 << bit).find(suits).unwrap();
            leaves.push(iova..=iova + size - 1);
            (iova, output) = (iova + size, output + size);
        }
        leaves
    }

    #[test]
    fn sizes_of_the_formats() {
        assert_eq!(FORMAT_SIZES & MOCK_PAGE_SIZE, MOCK_PAGE_SIZE);
        assert_eq!(FORMAT_SIZES.count_ones(), 26);
        assert_eq!(
            leaf_at(HUGE_SIZES, &(0..=0x1f_ffff), 0x1000, 0x10_0000),
            Some(0x10_0000..=0x10_0fff)
        );
        assert_eq!(
            leaf_at(HUGE_SIZES, &(0..=0x1f_ffff), 0x10_0000, 0x17_0000),
            Some(0x10_0000..=0x1f_ffff)
        );
    }

    #[test]
    fn nothing_where_no_page_fits() {
        assert_eq!(leaf_at(HUGE_SIZES, &(0..=0xfff), 0x800, 0), None);
        assert_eq!(leaf_at(FORMAT_SIZES, &(0x800..=0xfff), 0, 0x1000), None);
    }

    proptest! {
        #[test]
        fn the_leaves_are_those_of_a_table_filled_in_order(
            first in 0u64..64,
            pages in 1u64..64,
            output in 0u64..64,
            sizes in prop::sample::select(vec![FORMAT_SIZES, MOCK_PAGE_SIZE, MOCK_PAGE_SIZE * 9]),
        ) {
            let range = first * MOCK_PAGE_SIZE..=(first + pages) * MOCK_PAGE_SIZE - 1;
            let output = output * MOCK_PAGE_SIZE;
            for leaf in filled(sizes, range.clone(), output) {
                for iova in [*leaf.start(), *leaf.end()] {
                    prop_assert_eq!(leaf_at(sizes, &range, output, iova), Some(leaf.clone()));
                }
            }
        }
    }
}
