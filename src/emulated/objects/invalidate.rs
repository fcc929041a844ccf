// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_HWPT_INVALIDATE`.

use super::hwpt::HwptNested;
use super::{Object, Objects};
use crate::emulated::hardware::CacheRange;
use crate::emulated::ioas::PAGE_SIZE;
use crate::emulated::refusal::{refuse, Outcome, Refusal};
use crate::iommufd::{iommu_hwpt_vtd_s1_invalidate, Errno, HwptData, ObjectId, VTD_INV_FLAGS_LEAF};

/// Linux takes no more entries in one call.
pub(crate) const MAX_INVALIDATE_ENTRIES: usize = 1 << 19;

/// The formats of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InvalidateFormat {
    /// `IOMMU_HWPT_INVALIDATE_DATA_VTD_S1`.
    VtdS1,
    /// The same for guest-owned second-stage tables.
    VtdSecondStage,
    /// A format that VT-d does not have.
    Other,
}

/// An array of entries, each read when it is its turn.
pub(crate) struct Entries<'a> {
    /// How many there are.
    pub count: usize,
    /// Reads one by its number.
    pub read: &'a dyn Fn(usize) -> Outcome<iommu_hwpt_vtd_s1_invalidate>,
}

impl Objects {
    /// `IOMMU_HWPT_INVALIDATE`. Fails with how many entries are complete.
    pub fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        format: InvalidateFormat,
        entries: &Entries<'_>,
    ) -> Result<(), (usize, Refusal)> {
        let nested =
            self.check_invalidate(hwpt, format, entries.count).map_err(|refusal| (0, refusal))?;
        // The hardware is told once: it holds DMA up for each call.
        let mut ranges = Vec::with_capacity(entries.count);
        let mut read = |number| {
            ranges.push(cache_range(&(entries.read)(number)?, number)?);
            Ok(())
        };
        let refused = (0..entries.count).find_map(|number| read(number).err());
        if !ranges.is_empty() {
            for unit in nested.attached.units() {
                let unit = self.machine.unit(unit).map_err(|refusal| (0, refusal))?;
                unit.hardware.invalidate(nested.tag, &ranges);
            }
        }
        refused.map_or(Ok(()), |refusal| Err((ranges.len(), refusal)))
    }

    /// The HWPT_NESTED that `count` entries of `format` are for.
    fn check_invalidate(
        &self,
        hwpt: ObjectId,
        format: InvalidateFormat,
        count: usize,
    ) -> Outcome<&HwptNested> {
        if count > MAX_INVALIDATE_ENTRIES {
            return refuse(Errno::EINVAL, format!("{count} entries"));
        }
        let nested = match self.table.get(hwpt) {
            Some(Object::HwptNested(nested)) => nested,
            Some(Object::Viommu(_)) => {
                return refuse(Errno::EOPNOTSUPP, "the vIOMMU takes no invalidations");
            }
            Some(other) => {
                let kind = other.kind();
                return refuse(Errno::EINVAL, format!("{kind} {hwpt} has no user-owned tables"));
            }
            None => return refuse(Errno::ENOENT, format!("there is no object {hwpt}")),
        };
        let expected = match nested.data {
            HwptData::VtdS1(_) => InvalidateFormat::VtdS1,
            HwptData::VtdSecondStage(_) => InvalidateFormat::VtdSecondStage,
            HwptData::None => InvalidateFormat::Other,
        };
        if format != expected {
            return refuse(
                Errno::EINVAL,
                format!("HWPT_NESTED {hwpt} takes {expected:?}, not {format:?}"),
            );
        }
        Ok(nested)
    }
}

/// The addresses that an entry names.
fn cache_range(entry: &iommu_hwpt_vtd_s1_invalidate, number: usize) -> Outcome<CacheRange> {
    let iommu_hwpt_vtd_s1_invalidate { addr, npages, flags, __reserved } = *entry;
    if flags & !VTD_INV_FLAGS_LEAF != 0 || __reserved != 0 {
        return refuse(
            Errno::EOPNOTSUPP,
            format!("entry {number} has flags {flags:#x}, reserved {__reserved:#x}"),
        );
    }
    if addr % PAGE_SIZE != 0 || (npages == u64::MAX && addr != 0) {
        return refuse(
            Errno::EINVAL,
            format!("entry {number} is {npages:#x} pages from {addr:#x}"),
        );
    }
    // The number of bytes is taken modulo 2^64, as Linux does: a count that does not fit names
    // fewer pages than its user meant, and a range that passes 2^64 (or has no byte) everything.
    let bytes = npages.wrapping_mul(PAGE_SIZE);
    let wraps = bytes != 0 && addr.checked_add(bytes - 1).is_none();
    if npages == u64::MAX || bytes == 0 || wraps {
        return Ok(CacheRange::All);
    }
    let leaf = flags & VTD_INV_FLAGS_LEAF != 0;
    Ok(CacheRange::Pages { address: addr, pages: bytes / PAGE_SIZE, leaf })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(addr: u64, npages: u64, flags: u32) -> Outcome<CacheRange> {
        cache_range(&iommu_hwpt_vtd_s1_invalidate { addr, npages, flags, __reserved: 0 }, 0)
    }

    #[test]
    fn an_entry_names_pages_or_everything() {
        let pages = |address, pages, leaf| CacheRange::Pages { address, pages, leaf };
        assert_eq!(range(0x1000, 3, 0).unwrap(), pages(0x1000, 3, false));
        assert_eq!(range(0x1000, 3, VTD_INV_FLAGS_LEAF).unwrap(), pages(0x1000, 3, true));
        assert_eq!(range(0, u64::MAX, 0).unwrap(), CacheRange::All);
        let top = u64::MAX - 0xfff;
        assert_eq!(range(top, 1, 0).unwrap(), pages(top, 1, false));
    }

    #[test]
    fn a_count_that_does_not_fit_is_taken_as_linux_takes_it() {
        assert_eq!(range(u64::MAX - 0xfff, 2, 0).unwrap(), CacheRange::All);
        assert_eq!(range(0, 1 << 52, 0).unwrap(), CacheRange::All);
        assert_eq!(range(0x5000, 0, 0).unwrap(), CacheRange::All);
        let one = CacheRange::Pages { address: 0, pages: 1, leaf: false };
        assert_eq!(range(0, (1 << 52) + 1, 0).unwrap(), one);
    }

    #[test]
    fn unknown_flags_and_unaligned_addresses_are_refused() {
        assert_eq!(range(0, 1, 2).unwrap_err().errno, Errno::EOPNOTSUPP);
        assert_eq!(range(0x1001, 1, 0).unwrap_err().errno, Errno::EINVAL);
        assert_eq!(range(0x1000, u64::MAX, 0).unwrap_err().errno, Errno::EINVAL);
        let reserved = iommu_hwpt_vtd_s1_invalidate { addr: 1, npages: 1, flags: 0, __reserved: 1 };
        assert_eq!(cache_range(&reserved, 0).unwrap_err().errno, Errno::EOPNOTSUPP);
    }
}
