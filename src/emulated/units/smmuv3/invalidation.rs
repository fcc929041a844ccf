// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What an invalidation command drops (§4.3, §4.4).

use crate::units::engine::{Caches, IovaRange, Scope, Spaces};
use crate::units::hardware::CacheTag;
use twostage::spec::smmuv3::command::AddressRange;
use twostage::spec::smmuv3::translation::Granule;

/// The address space of global translations, which serve every ASID of their VMID.
pub(super) const GLOBAL: u32 = 1 << 16;
/// The address space of stage-2-only translations, which no ASID tags.
pub(super) const STAGE2_ONLY: u32 = GLOBAL + 1;

/// Sizes of the pages of every granule, as powers of two.
const PAGE_SHIFTS: [u8; 8] = [12, 14, 16, 21, 25, 29, 30, 42];
/// Sizes of what one table descriptor spans, as powers of two, for every granule.
const TABLE_SHIFTS: [u8; 8] = [21, 25, 29, 30, 36, 39, 42, 47];

/// A command that drops cached entries, with the host's names for streams and VMIDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Invalidation {
    /// CMD_TLBI_NH_ALL.
    All { tag: CacheTag },
    /// CMD_TLBI_NH_ASID.
    Asid { tag: CacheTag, asid: u16 },
    /// CMD_TLBI_NH_VA.
    Va { tag: CacheTag, asid: u16, range: AddressRange },
    /// CMD_TLBI_NH_VAA.
    Vaa { tag: CacheTag, range: AddressRange },
    /// CMD_CFGI_CD.
    Context { sid: u16, substream: u32 },
    /// CMD_CFGI_CD_ALL.
    Contexts { sid: u16 },
    /// CMD_ATC_INV: of one SubstreamID, or without (or with G) of all.
    DeviceTlb { sid: u16, substream: Option<u32>, range: IovaRange },
}

/// Drops the stage-1 translations of `spaces` of `tag`; returns the number of entries.
pub(super) fn drop_spaces(caches: &mut Caches, tag: CacheTag, spaces: Spaces) -> u64 {
    let scope = Scope { tag: tag.0, spaces };
    let all = [IovaRange::ALL];
    caches.drop_pages(scope, &all, &PAGE_SHIFTS) + caches.drop_tables(scope, &all, &TABLE_SHIFTS)
}

/// `range` as understood by an SMMU that may not support ranges (IDR3.RIL).
pub(super) fn known_range(range: AddressRange, ranges: bool) -> AddressRange {
    match ranges {
        true => range,
        false => AddressRange { leaf: range.leaf, ..AddressRange::at(range.address) },
    }
}

/// Drops the stage-1 translations in `range` of `spaces` of `tag`; returns the number of entries.
pub(super) fn drop_range(
    caches: &mut Caches,
    tag: CacheTag,
    spaces: Spaces,
    range: AddressRange,
) -> u64 {
    let scope = Scope { tag: tag.0, spaces };
    let first = range.address;
    let length = range.bytes().unwrap_or(1 << 12);
    let addresses = [IovaRange { first, last: first.saturating_add(length - 1) }];
    let of_granule;
    let shifts = match granule(range.tg) {
        None => &PAGE_SHIFTS[..],
        Some(granule) => {
            // TTL gives the level of the pages, if it is not 0.
            of_granule = [1, 2, 3].map(|level| granule.level_shift(level) as u8);
            let level = usize::from(range.ttl);
            // A level is 1 to 3 (TTL has two bits).
            level.checked_sub(1).and_then(|at| of_granule.get(at..=at)).unwrap_or(&of_granule)
        }
    };
    let pages = caches.drop_whole_pages(scope, &addresses, shifts);
    let tables = match range.leaf {
        true => 0,
        false => caches.drop_tables(scope, &addresses, &TABLE_SHIFTS),
    };
    pages + tables
}

/// The granule that TG of a command selects, if it has a range (§4.4.1.1).
fn granule(tg: u8) -> Option<Granule> {
    match tg {
        1 => Some(Granule::K4),
        2 => Some(Granule::K16),
        3 => Some(Granule::K64),
        _ => None,
    }
}
