// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a requester's DMA goes through, as the guest's tables of contexts have it.

use std::fmt;

use twostage::spec::pci::Bdf;

/// Where a requester's DMA goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub enum DmaWay {
    /// Nowhere.
    Blocked,
    /// To guest memory as it is.
    Bypass,
    /// Through first-stage tables at this GPA (bytes).
    FirstStage(u64),
    /// Through second-stage tables of the guest's own at this GPA (bytes).
    SecondStage(u64),
    /// Through the tables of an SMMUv3's context descriptor.
    AddressSpace {
        /// Its ASID.
        asid: u16,
        /// GPAs (bytes) of the tables by TTB0 and TTB1; none for a half without.
        tables: [Option<u64>; 2],
    },
}

impl fmt::Display for DmaWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocked => f.write_str("nowhere"),
            Self::Bypass => f.write_str("past all tables"),
            Self::FirstStage(table) => write!(f, "through first-stage tables at {table:#x}"),
            Self::SecondStage(table) => write!(f, "through second-stage tables at {table:#x}"),
            Self::AddressSpace { asid, tables } => {
                write!(f, "through the tables of ASID {asid:#x}")?;
                let at = tables.iter().zip(["TTB0", "TTB1"]);
                at.filter_map(|(table, name)| Some((name, (*table)?)))
                    .try_for_each(|(name, table)| write!(f, ", {name} {table:#x}"))
            }
        }
    }
}

/// The invalidation that a change of a requester's context needs, in the words of its IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub enum ContextInvalidation {
    /// VT-d: of the PASID cache (in legacy mode, of the context cache).
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
                "invalidation of the PASID cache (in legacy mode, of the context cache), then of the \
                 IOTLB",
            ),
            Self::SmmuV3CfgiCd { substream } => write!(
                f,
                "CMD_CFGI_CD with SubstreamID {substream:#x}, then CMD_TLBI_NH_ASID with the old ASID"
            ),
        }
    }
}

/// The guest's context and PASID tables, of which the host of a VT-d sees what comes of them only.
pub trait ContextTables: fmt::Debug + Send + Sync {
    /// Where they send requests of `rid` (with this `pasid`) now; `None` when there is nothing to
    /// be said, as while translation is off.
    ///
    /// Called in the middle of a DMA: it must wait for nothing that waits for DMA.
    fn way(&self, rid: Bdf, pasid: Option<u32>) -> Option<DmaWay>;
}

/// DMA went a way that the guest's context and PASID tables no longer had: the guest changed them,
/// and had not completed the invalidation of the context or PASID cache that this needs.
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
    /// What the change needs.
    pub needed: ContextInvalidation,
    /// How many such requests there were.
    pub uses: u64,
    /// The way was changed later.
    pub invalidated_since: bool,
}

/// Serializes a requester as `bus:device.function`.
#[cfg(feature = "serde")]
pub(super) fn as_text<S: serde::Serializer>(rid: &Bdf, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(rid)
}

impl StaleContext {
    /// The tables that were changed.
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
