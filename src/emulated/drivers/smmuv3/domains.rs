// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page tables of an SMMU: those filled from an IOAS, and the user's stream table entries.

use std::any::Any;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::streams::{Streams, Vmaster};
use crate::drivers::tags::OwnedTag;
use crate::drivers::{NestedDomain, PagingDomain, Partial, UserArray};
use crate::host::device::Requester;
use crate::host::refusal::{refuse, Outcome};
use crate::units::hardware::CacheTag;
use crate::units::smmuv3::SmmuV3Unit;
use twostage::iommufd::Errno;
use twostage::spec::smmuv3::stream_table::{EnableAts, Ste, Ste0, Ste1, StreamConfig};
use twostage::spec::smmuv3::translation::Granule;

/// Width of the host kernel's virtual addresses, in bits: the limit of its stage 1.
const HOST_VA_BITS: u8 = 48;

/// The stage of a page table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Stage 1, with a context descriptor of the host's.
    One,
    /// Stage 2.
    Two,
}

/// Tables that an SMMU fills from an IOAS.
#[derive(Debug)]
pub(super) struct SmmuPaging {
    /// The SMMU that can use them.
    unit: Arc<SmmuV3Unit>,
    tag: OwnedTag,
    stage: Stage,
    granule: Granule,
}

impl SmmuPaging {
    /// Tables of `stage` for `unit`.
    ///
    /// # Errors
    /// `ENOMEM` the SMMU has no granule, as in Linux.
    pub fn new(unit: &Arc<SmmuV3Unit>, tag: OwnedTag, stage: Stage) -> Outcome<Self> {
        // The granule of the host's pages if supported, otherwise the next larger.
        let has = |granule: &Granule| unit.config().has_granule(*granule);
        let Some(granule) = Granule::ALL.into_iter().find(has) else {
            return refuse(Errno::ENOMEM, "the SMMU has no granule");
        };
        Ok(Self { unit: unit.clone(), tag, stage, granule })
    }

    /// Tag of what is cached of them: the VMID of a stage 2.
    pub fn tag(&self) -> CacheTag {
        self.tag.tag()
    }

    /// Their stage.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Checks that they are for `unit`.
    ///
    /// # Errors
    /// `EINVAL` they are another's.
    pub fn check_unit(&self, unit: &Arc<SmmuV3Unit>) -> Outcome<()> {
        if Arc::ptr_eq(&self.unit, unit) {
            return Ok(());
        }
        refuse(Errno::EINVAL, "the page table is for another SMMU")
    }
}

impl PagingDomain for SmmuPaging {
    fn aperture(&self) -> RangeInclusive<u64> {
        let bits = match self.stage {
            Stage::One => HOST_VA_BITS,
            Stage::Two => self.unit.config().output_bits(),
        };
        // At most 52 bits.
        0..=(1 << bits) - 1
    }

    fn page_size(&self) -> u64 {
        self.granule.size()
    }

    fn page_sizes(&self) -> u64 {
        // Pages of level 3 and blocks of level 2; of level 1 too with the smallest granule.
        let large = if self.granule == Granule::K4 { self.granule.level_size(1) } else { 0 };
        self.granule.size() | self.granule.level_size(2) | large
    }

    fn only_writable(&self) -> bool {
        false
    }

    fn enforces_coherency(&self) -> bool {
        self.unit.config().canwbs
    }
}

/// The user's stream table entry, for streams of a vIOMMU.
#[derive(Debug)]
pub(super) struct SmmuNested {
    /// Words 0 and 1, without EATS.
    ste: [u64; 2],
    /// The streams of the vIOMMU.
    streams: Arc<Streams>,
}

impl SmmuNested {
    /// The entry `ste` for streams of a vIOMMU.
    ///
    /// # Errors
    /// `EIO` it has fields that the user must not set, or a configuration that cannot be nested
    /// (`arm_smmu_validate_vste`).
    pub fn new(ste: [u64; 2], streams: &Arc<Streams>) -> Outcome<Self> {
        Ok(Self { ste: validate(ste)?, streams: streams.clone() })
    }

    fn config(&self) -> StreamConfig {
        StreamConfig::from_bits(Ste0::from_bits(self.ste[0]).config())
    }

    /// The destination of events of `device` while it is attached here.
    ///
    /// # Errors
    /// `ENOENT` it has no vDEVICE, but would be translated.
    pub fn vmaster(&self, device: &Requester) -> Outcome<Option<Vmaster>> {
        match (self.streams.vmaster(device), self.config()) {
            (Some(vmaster), _) => Ok(Some(vmaster)),
            (None, StreamConfig::Abort | StreamConfig::Bypass) => Ok(None),
            (None, _) => refuse(Errno::ENOENT, "the device has no vDEVICE on the vIOMMU"),
        }
    }

    /// The user's part of the stream table entry: none to abort; otherwise nothing, or the words of
    /// stage 1.
    pub fn stream_stage1(&self) -> Option<Option<[u64; 2]>> {
        match self.config() {
            StreamConfig::Stage1 => Some(Some(self.ste)),
            StreamConfig::Bypass => Some(None),
            _ => None,
        }
    }
}

impl NestedDomain for SmmuNested {
    fn invalidate(&self, _: &dyn UserArray) -> Result<(), Partial> {
        refuse(Errno::EOPNOTSUPP, "invalidations are for the vIOMMU").map_err(Partial::from)
    }

    fn describe(&self) -> String {
        match self.config() {
            StreamConfig::Stage1 => {
                let table = Ste0::from_bits(self.ste[0]).s1contextptr() << 6;
                format!("ARM_SMMUV3 stage 1, context descriptors at {table:#x}")
            }
            StreamConfig::Bypass => "ARM_SMMUV3 bypass".into(),
            _ => "ARM_SMMUV3 abort".into(),
        }
    }
}

/// Linux's version of the user's words: 0 for an entry that is not valid.
fn validate([low, high]: [u64; 2]) -> Outcome<[u64; 2]> {
    let (word0, word1) = (Ste0::from_bits(low), Ste1::from_bits(high));
    if !word0.v() {
        return Ok([0, 0]);
    }
    let ste = Ste { qw0: word0, qw1: word1, ..Ste::default() };
    let nests = matches!(word0.config(), 0 | 4 | 5);
    let ats = matches!(ste.ats(), EnableAts::Off | EnableAts::Full);
    if low & !allowed0() != 0 || high & !allowed1() != 0 || !nests || !ats {
        return refuse(Errno::EIO, format!("the stream table entry is {low:#x}, {high:#x}"));
    }
    Ok([low, word1.with_eats(0).into_bits()])
}

/// The fields of word 0 that the user may set (`STRTAB_STE_0_NESTING_ALLOWED`).
fn allowed0() -> u64 {
    Ste0::new()
        .with_v(true)
        .with_config(7)
        .with_s1fmt(3)
        .with_s1contextptr((1 << 46) - 1)
        .with_s1cdmax(31)
        .into_bits()
}

/// The fields of word 1 that the user may set (`STRTAB_STE_1_NESTING_ALLOWED`).
fn allowed1() -> u64 {
    Ste1::new()
        .with_s1dss(3)
        .with_s1cir(3)
        .with_s1cor(3)
        .with_s1csh(3)
        .with_s1stalld(true)
        .with_eats(3)
        .into_bits()
}

/// Downcasts `domain` to this driver's.
///
/// # Errors
/// `EINVAL` it is another's.
pub(super) fn own_paging(domain: &dyn PagingDomain) -> Outcome<&SmmuPaging> {
    match (domain as &dyn Any).downcast_ref() {
        Some(paging) => Ok(paging),
        None => refuse(Errno::EINVAL, "the page table is another driver's"),
    }
}

/// Downcasts `domain` to this driver's.
///
/// # Errors
/// `EINVAL` it is another's.
pub(super) fn own_nested(domain: &dyn NestedDomain) -> Outcome<&SmmuNested> {
    match (domain as &dyn Any).downcast_ref() {
        Some(nested) => Ok(nested),
        None => refuse(Errno::EINVAL, "the nested page table is another driver's"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_bits_are_those_that_linux_allows() {
        assert_eq!(allowed0(), 0xf80f_ffff_ffff_ffff);
        assert_eq!(allowed1(), 0x3800_00ff);
    }

    #[test]
    fn an_entry_that_does_not_nest_is_refused() {
        for ste in [
            [1 | 6 << 1, 0],
            [1 | 7 << 1, 0],
            [1 | 1 << 1, 0],
            [1 | 5 << 1 | 1 << 52, 0],
            [1 | 5 << 1, 1 << 8],
            [1 | 5 << 1, 2 << 28],
            [1 | 5 << 1, 3 << 28],
            [1 | 5 << 1, 1 << 44],
        ] {
            assert_eq!(validate(ste).unwrap_err().errno, Errno::EIO, "{ste:x?}");
        }
        let good = [1 | 5 << 1 | 0x1000 | 3 << 59, 0xff | 1 << 28];
        assert_eq!(validate(good).unwrap(), [good[0], 0xff]);
        assert_eq!(validate([1, 0]).unwrap(), [1, 0]);
        assert_eq!(validate([0xfff0, u64::MAX]).unwrap(), [0, 0], "not valid: nobody looks");
    }
}
