// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page tables of the mock driver.

use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::abi::{self, HwptData, HwptInvalidate};
use super::page_table::{leaf_at, FORMAT_APERTURE, FORMAT_SIZES, HUGE_SIZES};
use super::vdevices::MockVdevices;
use crate::drivers::{NestedDomain, PagingDomain, Partial, UserArray, UserData};
use crate::host::refusal::{refuse, Outcome};
use crate::units::stage2::DirtyLog;
use twostage::iommufd::{Errno, HwptFlags};

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
