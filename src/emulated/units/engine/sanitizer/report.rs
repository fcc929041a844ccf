// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the sanitizer reports, in terms that a driver's author understands.

use std::fmt;

use crate::units::hardware::CacheRange;
use twostage::spec::pci::Bdf;

/// What the sanitizer of a unit found so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
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

/// The invalidation needed after changing the guest's tables, in the terms of its IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
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
    /// That of the device TLB (VT-d §6.5.2.5 and §6.5.2.6; SMMUv3: CMD_ATC_INV), after that of the
    /// IOMMU's own.
    DeviceTlb,
}

impl fmt::Display for TlbInvalidation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VtdPasidIotlb => f.write_str("PASID-based IOTLB invalidation"),
            Self::VtdIotlb => f.write_str("IOTLB invalidation"),
            Self::SmmuV3TlbiNhVa { asid } => write!(f, "CMD_TLBI_NH_VA with ASID {asid:#x}"),
            Self::DeviceTlb => f.write_str("device-TLB invalidation (SMMUv3: CMD_ATC_INV)"),
        }
    }
}

/// The 4 KiB pages of an invalidation of the guest's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
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
    /// The entry that changed is of the guest's second stage below its first, for this address of
    /// that stage (bytes); `None` for an entry of the tables that translate IOVAs.
    pub second_stage: Option<u64>,
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
        write!(f, ", {access} at IOVA {:#x}: the ", self.iova)?;
        if self.invalidation == TlbInvalidation::DeviceTlb {
            let Self { invalidation, needed, .. } = self;
            return write!(f, "device had another translation; needed: {invalidation} of {needed}");
        }
        match self.second_stage {
            Some(address) => {
                write!(f, "second-stage entry of level {} for {address:#x} ", self.level)?;
            }
            None => write!(f, "entry of level {} ", self.level)?,
        }
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

/// Where a requester's DMA goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub enum DmaWay {
    /// Nowhere.
    Blocked,
    /// To guest memory, untranslated.
    Bypass,
    /// Through first-stage tables at this GPA (bytes).
    FirstStage(u64),
    /// Through the guest's second-stage tables at this GPA (bytes).
    SecondStage(u64),
    /// First-stage tables over second-stage tables, both the guest's.
    Nested {
        /// Address of the first stage's top table, which the second stage translates.
        first: u64,
        /// GPA of the second stage's top table.
        second: u64,
    },
    /// Through the tables of an SMMUv3's context descriptor.
    AddressSpace {
        /// Its ASID.
        asid: u16,
        /// GPAs (bytes) of the tables of TTB0 and TTB1; none for a half without.
        tables: [Option<u64>; 2],
    },
}

impl fmt::Display for DmaWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocked => f.write_str("nowhere"),
            Self::Bypass => f.write_str("untranslated"),
            Self::FirstStage(table) => write!(f, "through first-stage tables at {table:#x}"),
            Self::SecondStage(table) => write!(f, "through second-stage tables at {table:#x}"),
            Self::Nested { first, second } => {
                write!(f, "through first-stage tables at {first:#x} over second-stage tables at ")?;
                write!(f, "{second:#x}")
            }
            Self::AddressSpace { asid, tables } => {
                write!(f, "through the tables of ASID {asid:#x}")?;
                let at = tables.iter().zip(["TTB0", "TTB1"]);
                at.filter_map(|(table, name)| Some((name, (*table)?)))
                    .try_for_each(|(name, table)| write!(f, ", {name} {table:#x}"))
            }
        }
    }
}

/// The invalidation needed after changing a requester's context, in the terms of its IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub enum ContextInvalidation {
    /// VT-d: PASID-cache invalidation (in legacy mode, context-cache invalidation).
    Vtd,
    /// SMMUv3: CMD_CFGI_CD, for a context descriptor.
    SmmuV3CfgiCd {
        /// SubstreamID of the descriptor.
        substream: u32,
    },
}

impl fmt::Display for ContextInvalidation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vtd => f.write_str(
                "invalidation of the PASID cache (in legacy mode, of the context cache), then of \
                 the IOTLB",
            ),
            Self::SmmuV3CfgiCd { substream } => write!(
                f,
                "CMD_CFGI_CD with SubstreamID {substream:#x}, then CMD_TLBI_NH_ASID with the old \
                 ASID"
            ),
        }
    }
}

/// The guest's context and PASID tables, of which a VT-d host sees only the result.
pub trait ContextTables: fmt::Debug + Send + Sync {
    /// Where they currently send requests of `rid` (with this `pasid`); `None` if that is
    /// undefined, as while translation is disabled.
    ///
    /// Called during DMA: it must not wait for anything that waits for DMA.
    fn way(&self, rid: Bdf, pasid: Option<u32>) -> Option<DmaWay>;
}

/// DMA was translated by a context that the guest's context and PASID tables no longer had: the
/// guest changed them and had not completed the required invalidation of the context or PASID
/// cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct StaleContext {
    /// The requester.
    #[cfg_attr(feature = "serde", serde(serialize_with = "as_text"))]
    pub rid: Bdf,
    /// Its PASID (SMMUv3: SubstreamID), when requests carried one.
    pub pasid: Option<u32>,
    /// Where the first such request went.
    pub old: DmaWay,
    /// Where the tables would have sent it.
    pub new: DmaWay,
    /// The invalidation that the change needs.
    pub needed: ContextInvalidation,
    /// Number of such requests.
    pub uses: u64,
    /// The context was invalidated or replaced later.
    pub invalidated_since: bool,
}

impl StaleContext {
    /// Names the tables that were changed.
    fn tables(&self) -> &'static str {
        match self.needed {
            ContextInvalidation::Vtd => "context and PASID tables",
            ContextInvalidation::SmmuV3CfgiCd { .. } => "context descriptors",
        }
    }
}

impl fmt::Display for StaleContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rid)?;
        if let Some(pasid) = self.pasid {
            write!(f, " PASID {pasid:#x}")?;
        }
        write!(
            f,
            ", DMA went {}, and by {} goes {} now; needed: {}",
            self.old,
            self.tables(),
            self.new,
            self.needed
        )
    }
}

/// Serializes a requester as `bus:device.function`.
#[cfg(feature = "serde")]
fn as_text<S: serde::Serializer>(rid: &Bdf, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(rid)
}
