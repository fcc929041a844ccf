// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host-side PASID-table entry of one requester.

use super::config::{AddressWidth, VtdUnitConfig};
use super::first_stage::FirstStage;
use super::second_stage::SecondStage;
use crate::units::engine::{HostStage2, Source};
use crate::units::hardware::{CacheTag, Translation, UserTables};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, HwptVtdSecondStage, VTD_S1_EAFE, VTD_S1_SRE, VTD_S1_WPE,
};

/// PASID that tags translations for requests without PASID (RID_PASID, as set by Linux).
const RID_PASID: u32 = 0;

/// The user's tables that translate a request before stage 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tables {
    /// None: stage 2 only.
    None,
    /// First-stage tables.
    FirstStage(FirstStage),
    /// Second-stage tables.
    SecondStage(SecondStage),
    /// Tables that the unit cannot walk: invalid programming.
    Unsupported,
}

impl Tables {
    fn new(tables: Option<&UserTables>, config: &VtdUnitConfig) -> Self {
        match tables {
            None => Self::None,
            Some(UserTables::VtdFirstStage(data)) => {
                first_stage(data, config).map_or(Self::Unsupported, Self::FirstStage)
            }
            Some(UserTables::VtdSecondStage(data)) => {
                second_stage(data, config).map_or(Self::Unsupported, Self::SecondStage)
            }
        }
    }
}

fn first_stage(data: &iommu_hwpt_vtd_s1, config: &VtdUnitConfig) -> Option<FirstStage> {
    let levels = match data.addr_width {
        48 => 4,
        57 if config.address_width == AddressWidth::Bits57 => 5,
        _ => return None,
    };
    let supervisor_requests = data.flags & VTD_S1_SRE != 0;
    Some(FirstStage {
        table: data.pgtbl_addr & !0xfff,
        levels,
        huge_pages: config.huge_pages,
        supervisor_requests,
        // WPE matters only with SRE.
        write_protect: supervisor_requests && data.flags & VTD_S1_WPE != 0,
        extended_accessed: data.flags & VTD_S1_EAFE != 0,
        // The uAPI has no flags for these two.
        execute_requests: false,
        no_execute: false,
    })
}

fn second_stage(data: &HwptVtdSecondStage, config: &VtdUnitConfig) -> Option<SecondStage> {
    let levels = match data.addr_width {
        39 => 3,
        48 => 4,
        57 if config.address_width == AddressWidth::Bits57 => 5,
        _ => return None,
    };
    let large_pages = config.second_stage_large_pages();
    Some(SecondStage { table: data.pgtbl_addr & !0xfff, levels, large_pages })
}

/// An entry of the PASID table, the same for all requesters that are attached to a HWPT.
#[derive(Debug)]
pub(super) struct Context {
    /// The HWPT.
    pub tag: CacheTag,
    /// The user's tables.
    pub tables: Tables,
    /// Stage 2.
    pub host: HostStage2,
}

impl Context {
    /// The context for `translation`; `stage2_tag` is unique to its stage 2 among the contexts of
    /// the unit.
    pub fn new(translation: Translation, stage2_tag: u32, config: &VtdUnitConfig) -> Self {
        Self {
            tag: translation.tag,
            tables: Tables::new(translation.tables.as_ref(), config),
            host: HostStage2::new(translation.stage2, stage2_tag, translation.dirty),
        }
    }

    /// The source of cached translations for requests with `pasid`.
    #[inline]
    pub fn source(&self, pasid: Option<u32>) -> Source {
        Source::new(self.tag.0, pasid.unwrap_or(RID_PASID))
    }
}
