// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page tables that Linux's VT-d driver creates for a unit, depending on its registers, and
//! their domain IDs.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::host::refusal::{refuse, Outcome};
use crate::units::hardware::CacheTag;
use twostage::iommufd::{iommu_hw_info_vtd, Errno, HwptFlags, HW_INFO_VTD_ERRATA_772415_SPR17};
use twostage::spec::vtd::regs::{Cap, Ecap};

/// The features that the driver checks. Register names are those of the VT-d specification
/// (§11.4.2, §11.4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Features {
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
    /// First-stage pages of 1 GiB (FS1GP).
    first_stage_1g: bool,
    /// Second-stage pages of 2 MiB and 1 GiB: bits 0 and 1 (SSLPS).
    second_stage_large: u8,
    /// Guest address width in bits (MGAW).
    guest_address_width: u8,
    /// Width of second-stage tables in bits (SAGAW, at most MGAW).
    second_stage_width: u8,
    /// Number of domain IDs (ND).
    domains: usize,
    /// Snoop control (SC): second-stage tables can, and then do, enforce cache coherency.
    snoop_control: bool,
    /// A nesting parent cannot hold read-only mappings (erratum 772415).
    no_read_only_parent: bool,
}

/// A page table that the driver filled in from an IOAS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tables {
    stage: Stage,
    /// The last IOVA covered by its tables.
    last_iova: u64,
    /// It can be a nesting parent.
    pub nest_parent: bool,
    /// It can track dirty pages.
    pub dirty_tracking: bool,
    /// The sizes of its pages: a bit for each.
    pub page_sizes: u64,
    /// It snoops caches whatever a request asks for.
    pub enforces_coherency: bool,
    /// It only supports writable mappings.
    pub only_writable: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    First { five_level: bool },
    Second { width: u8, coherent: bool },
}

impl Features {
    /// The features of a unit with this `info`.
    pub fn new(info: &iommu_hw_info_vtd) -> Self {
        let (cap, ecap) = (Cap::from_bits(info.cap_reg), Ecap::from_bits(info.ecap_reg));
        let scalable = ecap.smts();
        let guest_address_width = cap.guest_address_width();
        Self {
            first_stage: scalable && ecap.fsts(),
            second_stage: !scalable || ecap.ssts(),
            nest: scalable && ecap.nest(),
            dirty_tracking: scalable && ecap.ssads() && ecap.smpwcs(),
            five_level: cap.fs5lp(),
            first_stage_1g: cap.fs1gp(),
            second_stage_large: cap.sslps(),
            guest_address_width,
            // The widest table of SAGAW for which the next smaller one is too narrow for MGAW.
            second_stage_width: match guest_address_width {
                49.. if cap.sagaw() >= 1 << 3 => guest_address_width.min(57),
                40.. if cap.sagaw() >= 1 << 2 => guest_address_width.min(48),
                31.. if cap.sagaw() >= 1 << 1 => guest_address_width.min(39),
                _ => 0,
            },
            domains: 1 << (4 + 2 * cap.nd()),
            snoop_control: ecap.sc(),
            no_read_only_parent: info.flags & HW_INFO_VTD_ERRATA_772415_SPR17 != 0,
        }
    }

    /// Whether nested page tables are supported.
    pub fn nest(&self) -> bool {
        self.nest
    }

    /// Number of domain IDs.
    pub fn domains(&self) -> usize {
        self.domains
    }

    /// Whether dirty tracking is supported.
    pub fn dirty_tracking(&self) -> bool {
        self.dirty_tracking
    }

    /// The page table for `flags`. `Ok` only for valid flags.
    ///
    /// # Errors
    /// `EOPNOTSUPP` not supported by this IOMMU.
    pub fn tables(&self, flags: HwptFlags) -> Outcome<Tables> {
        let (nest_parent, dirty_tracking) = (flags.nest_parent(), flags.dirty_tracking());
        let only_writable = nest_parent && self.no_read_only_parent;
        if !nest_parent && !dirty_tracking && self.first_stage {
            let five_level = self.five_level && self.guest_address_width > 48;
            let width = self.guest_address_width.min(if five_level { 57 } else { 48 });
            return Ok(Tables {
                stage: Stage::First { five_level },
                // Addresses are sign-extended; only the lower half is used.
                last_iova: last_of_width(width.saturating_sub(1)),
                nest_parent,
                dirty_tracking,
                page_sizes: page_sizes(true, self.first_stage_1g),
                enforces_coherency: self.snoop_control,
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
        Ok(Tables {
            stage: Stage::Second { width: self.second_stage_width, coherent: self.snoop_control },
            last_iova: last_of_width(self.second_stage_width),
            nest_parent,
            dirty_tracking,
            page_sizes: page_sizes(
                self.second_stage_large & 1 != 0,
                self.second_stage_large & 2 != 0,
            ),
            enforces_coherency: self.snoop_control,
            only_writable,
        })
    }

    /// Whether `domain`, created for this IOMMU or another, works on this one.
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn compatible(&self, domain: &Tables) -> Outcome<()> {
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
            // Fixed when the page table is created: its entries enable snooping.
            Stage::Second { coherent: true, .. } if !self.snoop_control => "snoop control",
            Stage::Second { .. } => return Ok(()),
        };
        refuse(Errno::EINVAL, format!("the device's IOMMU does not support {misfit}"))
    }
}

impl Tables {
    /// The IOVAs covered by its tables.
    pub fn aperture(&self) -> RangeInclusive<u64> {
        0..=self.last_iova
    }
}

/// Pages of 4 KiB, and of 2 MiB and 1 GiB.
fn page_sizes(large: bool, huge: bool) -> u64 {
    1 << 12 | u64::from(large) << 21 | u64::from(huge) << 30
}

/// The last address of `width` bits.
fn last_of_width(width: u8) -> u64 {
    1u64.checked_shl(width.into()).map_or(u64::MAX, |end| end - 1)
}

/// The domain IDs of a unit: Linux assigns one to each page table attached behind it, up to their
/// number (CAP.ND).
#[derive(Debug, Default)]
pub(super) struct DomainIds {
    /// Number of attachments of each page table, by its tag; no count is 0.
    attached: BTreeMap<u32, u32>,
}

impl DomainIds {
    /// 0 is reserved with caching mode, and 1 is for the kernel's first-stage tables.
    const RESERVED: usize = 2;

    /// `count` more attachments of the page table `tag`, with `all` IDs.
    pub fn take(&mut self, tag: CacheTag, count: u32, all: usize) -> Outcome<()> {
        let taken = self.attached.len() + Self::RESERVED;
        match self.attached.get_mut(&tag.0) {
            Some(attachments) => *attachments += count,
            None if taken < all => {
                self.attached.insert(tag.0, count);
            }
            None => return refuse(Errno::ENOSPC, format!("all {all} domain ids are in use")),
        }
        Ok(())
    }

    /// `count` fewer attachments.
    pub fn give_back(&mut self, tag: CacheTag, count: u32) {
        if let Some(left) = self.attached.get_mut(&tag.0) {
            *left = left.saturating_sub(count);
            if *left == 0 {
                self.attached.remove(&tag.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(cap: Cap, ecap: Ecap) -> Features {
        Features::new(&iommu_hw_info_vtd {
            cap_reg: cap.into_bits(),
            ecap_reg: ecap.into_bits(),
            flags: HW_INFO_VTD_ERRATA_772415_SPR17,
            ..Default::default()
        })
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
        let unit = unit(width(52), scalable());
        let plain = unit.tables(HwptFlags::new()).unwrap();
        assert_eq!(plain.aperture(), 0..=(1 << 47) - 1);
        let parent = unit.tables(NEST).unwrap();
        assert_eq!(parent.aperture(), 0..=(1 << 52) - 1);
        assert!(parent.only_writable && !plain.only_writable);
    }

    #[test]
    fn the_second_stage_is_as_wide_as_mgaw_and_sagaw_allow() {
        for (mgaw, sagaw, expected) in [(57, 8, 57), (57, 4, 48), (52, 12, 52), (46, 6, 46)] {
            let cap = width(mgaw).with_sagaw(sagaw);
            let parent = unit(cap, scalable()).tables(NEST).unwrap();
            assert_eq!(parent.aperture(), 0..=(1 << expected) - 1, "{mgaw} {sagaw}");
        }
        let none = unit(width(48).with_sagaw(0), scalable()).tables(NEST);
        assert_eq!(none.unwrap_err().errno, Errno::EOPNOTSUPP);
    }

    #[test]
    fn what_the_registers_lack_is_not_supported() {
        let errno = |ecap, flags| unit(width(48), ecap).tables(flags).unwrap_err().errno;
        assert_eq!(errno(scalable().with_nest(false), NEST), Errno::EOPNOTSUPP);
        assert_eq!(errno(scalable().with_smts(false), NEST), Errno::EOPNOTSUPP);
        assert_eq!(errno(scalable().with_ssts(false), NEST), Errno::EOPNOTSUPP);
        assert_eq!(errno(scalable().with_ssads(true), DIRTY), Errno::EOPNOTSUPP);
        unit(width(48), scalable().with_ssads(true).with_smpwcs(true)).tables(DIRTY).unwrap();
    }

    #[test]
    fn a_page_table_fits_iommus_that_are_as_able() {
        let wide = unit(width(57).with_fs5lp(true), scalable());
        let narrow = unit(width(48), scalable());
        let legacy = unit(width(48), Ecap::new());
        for (domain, on, fits) in [
            (wide.tables(NEST), narrow, false),
            (narrow.tables(NEST), wide, true),
            (narrow.tables(NEST), legacy, false),
            (wide.tables(HwptFlags::new()), narrow, false),
            (narrow.tables(HwptFlags::new()), wide, true),
            (narrow.tables(HwptFlags::new()), legacy, false),
            (legacy.tables(HwptFlags::new()), wide, true),
        ] {
            let outcome = on.compatible(&domain.clone().unwrap());
            assert_eq!(outcome.is_ok(), fits, "{domain:?} on {on:?}");
            assert!(outcome.is_ok() || outcome.unwrap_err().errno == Errno::EINVAL);
        }
    }

    #[test]
    fn there_are_as_many_page_tables_as_ids() {
        let mut ids = DomainIds::default();
        for tag in 0..14 {
            ids.take(CacheTag(tag), 1, 16).unwrap();
        }
        assert_eq!(ids.take(CacheTag(14), 1, 16).unwrap_err().errno, Errno::ENOSPC);
        // One that is already attached needs no other ID.
        ids.take(CacheTag(3), 2, 16).unwrap();
        ids.give_back(CacheTag(3), 2);
        assert_eq!(ids.take(CacheTag(14), 1, 16).unwrap_err().errno, Errno::ENOSPC);
        ids.give_back(CacheTag(3), 1);
        ids.take(CacheTag(14), 1, 16).unwrap();
    }
}
