// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which page tables Linux's driver makes for an IOMMU, by what its registers say.

use std::ops::RangeInclusive;

use crate::emulated::ioas::PAGE_SIZE;
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{
    iommu_hw_info_vtd, Errno, HwInfoData, HwptFlags, HW_INFO_VTD_ERRATA_772415_SPR17,
};
use crate::spec::vtd::regs::{Cap, Ecap};

/// What the driver goes by. Register names are those of the VT-d specification (§11.4.2, §11.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Driver {
    /// First-stage tables (FSTS, in scalable mode).
    first_stage: bool,
    /// Second-stage tables (SSTS in scalable mode, always in legacy mode).
    second_stage: bool,
    /// Nested translation (NEST, in scalable mode).
    nest: bool,
    /// Dirty tracking in the second stage (SSADS, with SMPWCS).
    dirty_tracking: bool,
    /// 5-level first stage (FS5LP).
    five_level: bool,
    /// Guest address width in bits (MGAW).
    guest_address_width: u8,
    /// Width of second-stage tables in bits (SAGAW, at most MGAW).
    second_stage_width: u8,
    /// Snoop control (SC): second-stage tables can enforce cache coherency, and then do.
    snoop_control: bool,
    /// A nesting parent cannot hold read-only mappings (erratum 772415).
    no_read_only_parent: bool,
}

/// A page table that the driver filled in from an IOAS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PagingDomain {
    stage: Stage,
    /// The IOVAs it has tables for: 0 up to this.
    last_iova: u64,
    /// Nested page tables can stand on it.
    pub nest_parent: bool,
    /// It can track dirty pages.
    pub dirty_tracking: bool,
    /// It cannot hold mappings that are not writable.
    pub only_writable: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    First { five_level: bool },
    Second { width: u8, coherent: bool },
}

impl Driver {
    /// The driver of an IOMMU that says `info` of itself.
    pub fn new(info: &HwInfoData) -> Self {
        match info {
            HwInfoData::Vtd(info) => Self::of_registers(info),
            // An IOMMU that says nothing: plain 48-bit translation.
            HwInfoData::None => Self {
                first_stage: false,
                second_stage: true,
                nest: false,
                dirty_tracking: false,
                five_level: false,
                guest_address_width: 48,
                second_stage_width: 48,
                snoop_control: false,
                no_read_only_parent: false,
            },
        }
    }

    fn of_registers(info: &iommu_hw_info_vtd) -> Self {
        let (cap, ecap) = (Cap::from_bits(info.cap_reg), Ecap::from_bits(info.ecap_reg));
        let scalable = ecap.smts();
        let guest_address_width = cap.guest_address_width();
        Self {
            first_stage: scalable && ecap.fsts(),
            second_stage: !scalable || ecap.ssts(),
            nest: scalable && ecap.nest(),
            dirty_tracking: scalable && ecap.ssads() && ecap.smpwcs(),
            five_level: cap.fs5lp(),
            guest_address_width,
            // The widest table that SAGAW names and MGAW fills more than the next smaller one.
            second_stage_width: match guest_address_width {
                49.. if cap.sagaw() >= 1 << 3 => guest_address_width.min(57),
                40.. if cap.sagaw() >= 1 << 2 => guest_address_width.min(48),
                31.. if cap.sagaw() >= 1 << 1 => guest_address_width.min(39),
                _ => 0,
            },
            snoop_control: ecap.sc(),
            no_read_only_parent: info.flags & HW_INFO_VTD_ERRATA_772415_SPR17 != 0,
        }
    }

    /// Whether nested page tables can be made.
    pub fn nest(&self) -> bool {
        self.nest
    }

    /// Whether dirty pages can be tracked.
    pub fn dirty_tracking(&self) -> bool {
        self.dirty_tracking
    }

    /// The page table that `flags` ask for. `Ok` only for flags that have a meaning.
    ///
    /// # Errors
    /// `EOPNOTSUPP` this IOMMU cannot.
    pub fn paging_domain(&self, flags: HwptFlags) -> Outcome<PagingDomain> {
        let (nest_parent, dirty_tracking) = (flags.nest_parent(), flags.dirty_tracking());
        let only_writable = nest_parent && self.no_read_only_parent;
        if !nest_parent && !dirty_tracking && self.first_stage {
            let five_level = self.five_level && self.guest_address_width > 48;
            let width = self.guest_address_width.min(if five_level { 57 } else { 48 });
            return Ok(PagingDomain {
                stage: Stage::First { five_level },
                // Addresses are sign-extended; only the lower half is given out.
                last_iova: last_of_width(width.saturating_sub(1)),
                nest_parent,
                dirty_tracking,
                only_writable,
            });
        }
        if nest_parent && !self.nest {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU has no nested translation");
        }
        if dirty_tracking && !self.dirty_tracking {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU cannot track dirty pages");
        }
        if !self.second_stage || self.second_stage_width == 0 {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU has no second stage");
        }
        Ok(PagingDomain {
            stage: Stage::Second { width: self.second_stage_width, coherent: self.snoop_control },
            last_iova: last_of_width(self.second_stage_width),
            nest_parent,
            dirty_tracking,
            only_writable,
        })
    }

    /// Whether `domain`, made for this IOMMU or another, works on this one.
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn compatible(&self, domain: &PagingDomain) -> Outcome<()> {
        let misfit = match domain.stage {
            Stage::First { .. } if !self.first_stage => "a first stage",
            Stage::First { five_level: true } if !self.five_level => "a 5-level first stage",
            Stage::First { .. } => return Ok(()),
            Stage::Second { .. } if domain.dirty_tracking && !self.dirty_tracking => {
                "dirty tracking"
            }
            Stage::Second { .. } if domain.nest_parent && !self.nest => "a nesting parent",
            Stage::Second { .. } if !self.second_stage => "a second stage",
            Stage::Second { width, .. } if width > self.second_stage_width => {
                "a second stage of this width"
            }
            // Decided when the page table is made, for good: its entries ask for snooping.
            Stage::Second { coherent: true, .. } if !self.snoop_control => "snoop control",
            Stage::Second { .. } => return Ok(()),
        };
        refuse(Errno::EINVAL, format!("the device's IOMMU does not do {misfit}"))
    }
}

impl PagingDomain {
    /// The smallest page it can hold, in bytes.
    pub fn smallest_page(&self) -> u64 {
        PAGE_SIZE
    }

    /// The IOVAs it has no tables for.
    pub fn outside(&self) -> Vec<RangeInclusive<u64>> {
        self.last_iova.checked_add(1).map(|first| first..=u64::MAX).into_iter().collect()
    }
}

/// The last address of `width` bits.
fn last_of_width(width: u8) -> u64 {
    1u64.checked_shl(width.into()).map_or(u64::MAX, |end| end - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver(cap: Cap, ecap: Ecap) -> Driver {
        Driver::new(&HwInfoData::Vtd(iommu_hw_info_vtd {
            cap_reg: cap.into_bits(),
            ecap_reg: ecap.into_bits(),
            flags: HW_INFO_VTD_ERRATA_772415_SPR17,
            ..Default::default()
        }))
    }

    fn scalable() -> Ecap {
        Ecap::new().with_smts(true).with_fsts(true).with_ssts(true).with_nest(true)
    }

    fn width(mgaw: u8) -> Cap {
        Cap::new().with_mgaw(mgaw - 1).with_sagaw(0b1110)
    }

    const NEST: HwptFlags = HwptFlags::new().with_nest_parent(true);
    const DIRTY: HwptFlags = HwptFlags::new().with_dirty_tracking(true);

    #[test]
    fn a_plain_page_table_is_a_first_stage_in_scalable_mode() {
        let driver = driver(width(52), scalable());
        let plain = driver.paging_domain(HwptFlags::new()).unwrap();
        assert_eq!(plain.outside(), [1 << 47..=u64::MAX]);
        let parent = driver.paging_domain(NEST).unwrap();
        assert_eq!(parent.outside(), [1 << 52..=u64::MAX]);
        assert!(parent.only_writable && !plain.only_writable);
    }

    #[test]
    fn the_second_stage_is_as_wide_as_mgaw_and_sagaw_allow() {
        for (mgaw, sagaw, expected) in [(57, 8, 57), (57, 4, 48), (52, 12, 52), (46, 6, 46)] {
            let cap = width(mgaw).with_sagaw(sagaw);
            let parent = driver(cap, scalable()).paging_domain(NEST).unwrap();
            assert_eq!(parent.outside(), [1 << expected..=u64::MAX], "{mgaw} {sagaw}");
        }
        let none = driver(width(48).with_sagaw(0), scalable()).paging_domain(NEST);
        assert_eq!(none.unwrap_err().errno, Errno::EOPNOTSUPP);
    }

    #[test]
    fn what_the_registers_lack_is_not_supported() {
        let errno = |ecap, flags| driver(width(48), ecap).paging_domain(flags).unwrap_err().errno;
        assert_eq!(errno(scalable().with_nest(false), NEST), Errno::EOPNOTSUPP);
        assert_eq!(errno(scalable().with_smts(false), NEST), Errno::EOPNOTSUPP);
        assert_eq!(errno(scalable().with_ssts(false), NEST), Errno::EOPNOTSUPP);
        assert_eq!(errno(scalable().with_ssads(true), DIRTY), Errno::EOPNOTSUPP);
        driver(width(48), scalable().with_ssads(true).with_smpwcs(true))
            .paging_domain(DIRTY)
            .unwrap();
    }

    #[test]
    fn a_page_table_fits_iommus_that_are_as_able() {
        let wide = driver(width(57).with_fs5lp(true), scalable());
        let narrow = driver(width(48), scalable());
        let legacy = driver(width(48), Ecap::new());
        for (domain, on, fits) in [
            (wide.paging_domain(NEST), narrow, false),
            (narrow.paging_domain(NEST), wide, true),
            (narrow.paging_domain(NEST), legacy, false),
            (wide.paging_domain(HwptFlags::new()), narrow, false),
            (narrow.paging_domain(HwptFlags::new()), wide, true),
            (narrow.paging_domain(HwptFlags::new()), legacy, false),
            (legacy.paging_domain(HwptFlags::new()), wide, true),
        ] {
            let outcome = on.compatible(&domain.clone().unwrap());
            assert_eq!(outcome.is_ok(), fits, "{domain:?} on {on:?}");
            assert!(outcome.is_ok() || outcome.unwrap_err().errno == Errno::EINVAL);
        }
    }
}
