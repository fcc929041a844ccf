// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the sanitizer found, in terms that a driver's author understands.

use std::collections::BTreeMap;
use std::fmt;

use super::super::{size, Scope, Source, Spaces};
#[cfg(feature = "serde")]
use super::contexts::as_text;
use super::contexts::StaleContext;
use crate::units::hardware::CacheRange;
use twostage::spec::pci::Bdf;

/// Number of pages, and of requesters, that are recorded; further uses of stale translations are
/// only counted.
const MAX_PAGES: usize = 64;

/// Number of tags and address spaces whose last invalidation is recorded: guests can have any
/// number.
const MAX_INVALIDATED: usize = 1024;

/// Pages are counted in units of this, as a power of two.
pub(super) const UNIT_SHIFT: u8 = 12;

/// The invalidation needed after changing the guest's tables, in the terms of its IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub enum TlbInvalidation {
    /// VT-d, first-stage tables, whose translations are tagged by PASID (§6.5.2.4).
    VtdPasidIotlb,
    /// VT-d, second-stage tables, whose translations are not.
    VtdIotlb,
    /// SMMUv3: CMD_TLBI_NH_VA, or a command that drops more of this ASID.
    SmmuV3TlbiNhVa {
        /// ASID of the tables.
        asid: u16,
    },
}

impl fmt::Display for TlbInvalidation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VtdPasidIotlb => f.write_str("PASID-based IOTLB invalidation"),
            Self::VtdIotlb => f.write_str("IOTLB invalidation"),
            Self::SmmuV3TlbiNhVa { asid } => write!(f, "CMD_TLBI_NH_VA with ASID {asid:#x}"),
        }
    }
}

/// The 4 KiB pages of an invalidation of the guest's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub enum InvalidatedPages {
    /// All of them.
    All,
    /// Some of them.
    Range {
        /// IOVA of the first, in bytes.
        address: u64,
        /// How many there are.
        pages: u64,
        /// Leaf entries only: cached table pointers may stay (VT-d's invalidation hint, SMMUv3's
        /// Leaf).
        leaf: bool,
    },
}

impl From<CacheRange> for InvalidatedPages {
    fn from(range: CacheRange) -> Self {
        match range {
            CacheRange::All => Self::All,
            CacheRange::Pages(range) => {
                Self::Range { address: range.address(), pages: range.pages(), leaf: range.leaf() }
            }
        }
    }
}

impl fmt::Display for InvalidatedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all pages"),
            Self::Range { address, pages, leaf } => {
                let unit = if *pages == 1 { "page" } else { "pages" };
                let hint = if *leaf { "leaf entries" } else { "leaf and non-leaf entries" };
                write!(f, "{pages} {unit} from {address:#x}, {hint}")
            }
        }
    }
}

/// A DMA request used a translation that the guest's tables no longer had: they led elsewhere, or
/// no longer allowed the request.
///
/// The guest changed an entry, and had not completed the required invalidation when the device used
/// the old translation. Either the invalidation is missing, or the device was active before it
/// came: see [`invalidated_since`](Self::invalidated_since). (With page tables shared between a
/// processor and a device, such uses are legitimate for pages being unmapped: between the change
/// and the end of the invalidation the device may use either translation.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct StaleUse {
    /// The requester.
    #[cfg_attr(feature = "serde", serde(serialize_with = "as_text"))]
    pub rid: Bdf,
    /// Its PASID (SMMUv3: SubstreamID), when the request carried one.
    pub pasid: Option<u32>,
    /// IOVA of the 4 KiB page, in bytes.
    pub iova: u64,
    /// The first such request was a write.
    pub write: bool,
    /// Level (1 is the lowest) of the highest entry that changed.
    pub level: u8,
    /// That entry as it was when it was cached, for a global page perhaps in the tables of another
    /// address space; `None` if it is no longer known.
    pub old: Option<u64>,
    /// The entry as it is now; `None` if the tables no longer lead there.
    pub new: Option<u64>,
    /// The invalidation that the change needs.
    pub invalidation: TlbInvalidation,
    /// What it should have covered.
    pub needed: InvalidatedPages,
    /// The previous invalidation of these tables; `None` if there was none, or 1,024 other address
    /// spaces were invalidated since.
    pub last: Option<InvalidatedPages>,
    /// Number of requests to this page, including this one.
    pub uses: u64,
    /// The translation was dropped later, by the required invalidation or a wider one.
    pub invalidated_since: bool,
}

impl fmt::Display for StaleUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rid)?;
        if let Some(pasid) = self.pasid {
            write!(f, " PASID {pasid:#x}")?;
        }
        let access = if self.write { "write" } else { "read" };
        write!(f, ", {access} at IOVA {:#x}: the entry of level {} ", self.iova, self.level)?;
        match self.old {
            Some(old) => write!(f, "was {old:#x} when it was cached and is ")?,
            None => f.write_str("was different when it was cached and is ")?,
        }
        match self.new {
            Some(new) => write!(f, "{new:#x} now")?,
            None => f.write_str("out of reach now")?,
        }
        write!(f, "; needed: {} of {}", self.invalidation, self.needed)?;
        match self.last {
            Some(last) => write!(f, "; last seen: {last}"),
            None => f.write_str("; last seen: none"),
        }
    }
}

/// What the sanitizer of a unit found so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct SanitizerReport {
    /// Requesters whose DMA used a stale context: the first 64, each once, in ascending order.
    pub contexts: Vec<StaleContext>,
    /// Stale translations that were used: the first 64 pages, each once, in ascending order.
    pub stale: Vec<StaleUse>,
    /// Further uses.
    pub others: u64,
}

impl fmt::Display for SanitizerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.stale.len(), self.contexts.len()) {
            (0, 0) => writeln!(f, "sanitizer: no stale translation was used")?,
            (0, _) => writeln!(f, "sanitizer: stale contexts were used")?,
            (1, _) => writeln!(f, "sanitizer: stale translations of 1 page were used")?,
            (pages, _) => writeln!(f, "sanitizer: stale translations of {pages} pages were used")?,
        }
        for context in &self.contexts {
            writeln!(f, "  {context}; {}", Fate(context.uses, context.invalidated_since))?;
        }
        for stale in &self.stale {
            writeln!(f, "  {stale}; {}", Fate(stale.uses, stale.invalidated_since))?;
        }
        if self.others != 0 {
            writeln!(f, "  and {} uses beyond those", self.others)?;
        }
        Ok(())
    }
}

/// How often something stale was used, and whether it was invalidated since.
struct Fate(u64, bool);

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = if self.0 == 1 { "time" } else { "times" };
        let since = if self.1 { "since" } else { "never" };
        write!(f, "used {} {times}, invalidated {since}", self.0)
    }
}

/// A use, with what is needed to notice that its translation is dropped.
#[derive(Debug)]
struct Finding {
    stale: StaleUse,
    /// Source of the cached translation.
    source: Source,
    /// Size of the page that was cached, as a power of two.
    page_shift: u8,
}

/// The findings so far: the first [`MAX_PAGES`] pages, and requesters, each once.
#[derive(Debug, Default)]
pub(super) struct Findings {
    contexts: BTreeMap<(Bdf, Option<u32>), StaleContext>,
    pages: BTreeMap<(Bdf, Option<u32>, u64), Finding>,
    /// Further uses.
    others: u64,
    /// The last invalidation of each tag, or of one of its address spaces, with its sequence
    /// number: the [`MAX_INVALIDATED`] most recent. Those of tags without attachments are removed.
    last: BTreeMap<(u32, Option<u32>), (u64, InvalidatedPages)>,
    /// Number of invalidations.
    invalidations: u64,
}

impl Findings {
    /// The last invalidation of translations of `source`.
    pub fn last_invalidation(&self, source: Source) -> Option<InvalidatedPages> {
        let spaces = [None, Some(source.space())];
        let last = spaces.iter().filter_map(|space| self.last.get(&(source.tag(), *space)));
        last.max_by_key(|(number, _)| *number).map(|(_, pages)| *pages)
    }

    /// Adds a use of a translation cached for `source` as a page of `page_shift`. Returns it if it
    /// is the first of its page and is recorded.
    pub fn add(&mut self, stale: StaleUse, source: Source, page_shift: u8) -> Option<StaleUse> {
        let key = (stale.rid, stale.pasid, stale.iova);
        if let Some(known) = self.pages.get_mut(&key) {
            known.stale.uses += 1;
            return None;
        }
        if self.pages.len() >= MAX_PAGES {
            self.others += 1;
            return None;
        }
        self.pages.insert(key, Finding { stale, source, page_shift });
        Some(stale)
    }

    /// Adds a use of a stale context. Returns it if it is the requester's first and is recorded.
    pub fn add_context(&mut self, stale: StaleContext) -> Option<StaleContext> {
        let key = (stale.rid, stale.pasid);
        if let Some(known) = self.contexts.get_mut(&key) {
            known.uses += 1;
            return None;
        }
        if self.contexts.len() >= MAX_PAGES {
            self.others += 1;
            return None;
        }
        self.contexts.insert(key, stale);
        Some(stale)
    }

    /// The contexts of `rid` and its PASIDs for which `changed` holds were replaced.
    pub fn contexts_changed(&mut self, rid: Bdf, changed: impl Fn(Option<u32>) -> bool) {
        let of_rid = self.contexts.range_mut((rid, None)..=(rid, Some(u32::MAX)));
        for ((_, pasid), stale) in of_rid {
            stale.invalidated_since |= changed(*pasid);
        }
    }

    /// The guest invalidated `range` of `scope`.
    pub fn invalidated(&mut self, scope: Scope, range: CacheRange) {
        self.invalidations += 1;
        let space = match scope.spaces {
            Spaces::All | Spaces::UpTo(_) => None,
            // The other one is that of global pages, which is never queried.
            Spaces::One(space) | Spaces::Two(space, _) => Some(space),
        };
        self.last.insert((scope.tag, space), (self.invalidations, range.into()));
        if self.last.len() > MAX_INVALIDATED {
            let oldest = self.last.iter().min_by_key(|(_, (number, _))| *number);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.last.remove(&oldest);
            }
        }
        for finding in self.pages.values_mut().filter(|finding| scope.has(finding.source)) {
            let size = size(finding.page_shift);
            let first = finding.stale.iova & !(size - 1);
            let covered = covers(range, first, first | (size - 1));
            // If a table pointer changed, an invalidation of leaf entries only leaves it cached.
            if covered && (!is_of_leaves(range.into()) || is_of_leaves(finding.stale.needed)) {
                finding.stale.invalidated_since = true;
            }
        }
    }

    /// Everything cached of `tag` was dropped for other reasons: its attachments ended, or stage 2
    /// changed.
    pub fn forget(&mut self, tag: u32) {
        self.last.retain(|(of, _), _| *of != tag);
        for finding in self.pages.values_mut().filter(|finding| finding.source.tag() == tag) {
            finding.stale.invalidated_since = true;
        }
    }

    /// What was found so far.
    pub fn report(&self) -> SanitizerReport {
        let stale = self.pages.values().map(|finding| finding.stale).collect();
        let contexts = self.contexts.values().copied().collect();
        SanitizerReport { contexts, stale, others: self.others }
    }
}

/// Whether `pages` are leaf entries alone.
fn is_of_leaves(pages: InvalidatedPages) -> bool {
    matches!(pages, InvalidatedPages::Range { leaf: true, .. })
}

/// Whether `range` has an address in `first..=last`.
fn covers(range: CacheRange, first: u64, last: u64) -> bool {
    match range {
        CacheRange::All => true,
        CacheRange::Pages(range) => range.address() <= last && range.last() >= first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_recent_invalidations_are_kept() {
        let mut findings = Findings::default();
        let spaces = MAX_INVALIDATED as u32;
        let mut invalidate = |space| {
            let scope = Scope { tag: 1, spaces: Spaces::One(space) };
            findings.invalidated(scope, CacheRange::All);
        };
        (0..spaces).for_each(&mut invalidate);
        // The first is now the most recent, so the second is evicted.
        [0, spaces].into_iter().for_each(invalidate);
        let last = |space| findings.last_invalidation(Source::new(1, space));
        assert_eq!(findings.last.len(), MAX_INVALIDATED);
        assert_eq!(last(1), None);
        for space in [0, 2, spaces] {
            assert_eq!(last(space), Some(InvalidatedPages::All), "{space}");
        }
    }
}
