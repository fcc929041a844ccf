// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a requester's DMA goes according to the guest's context tables.

use std::fmt;

use twostage::spec::pci::Bdf;

/// Where a requester's DMA goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub enum DmaWay {
    /// Nowhere.
    Blocked,
    /// To guest memory, untranslated.
    Bypass,
    /// Through first-stage tables at this GPA (bytes).
    FirstStage(u64),
    /// Through the guest's second-stage tables at this GPA (bytes).
    SecondStage(u64),
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

/// Serializes a requester as `bus:device.function`.
#[cfg(feature = "serde")]
pub(super) fn as_text<S: serde::Serializer>(rid: &Bdf, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(rid)
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
