// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The text of calls and results in the log.

use std::fmt::Write as _;

use super::super::{
    iommu_hwpt_vtd_s1_invalidate, iommu_viommu_arm_smmuv3_invalidate, HwInfo, HwptAlloc, HwptData,
    InvalidateData, ObjectId, VTD_INV_FLAGS_LEAF,
};

/// The text of a result in the log.
pub(super) trait Answer {
    fn text(&self) -> String;
}

impl Answer for () {
    fn text(&self) -> String {
        String::new()
    }
}

impl Answer for ObjectId {
    fn text(&self) -> String {
        format!(" = {self:?}")
    }
}

impl Answer for u64 {
    fn text(&self) -> String {
        String::new()
    }
}

impl Answer for HwInfo {
    fn text(&self) -> String {
        String::new()
    }
}

pub(super) fn source(dev: ObjectId, pasid: Option<u32>) -> String {
    match pasid {
        Some(pasid) => format!("{dev:?} PASID {pasid:#x}"),
        None => format!("{dev:?}"),
    }
}

pub(super) fn hwpt_text(args: &HwptAlloc) -> String {
    let mut text = match args.data {
        HwptData::None => "paging".to_owned(),
        HwptData::VtdS1(s1) => {
            format!("VTD_S1({:#x}, {} bits, flags {:#x})", s1.pgtbl_addr, s1.addr_width, s1.flags)
        }
        HwptData::VtdSecondStage(ss) => {
            format!("second-stage({:#x}, {} bits)", ss.pgtbl_addr, ss.addr_width)
        }
        HwptData::ArmSmmuV3(smmu) => format!("ARM_SMMUV3({:#x}, {:#x})", smmu.ste[0], smmu.ste[1]),
    };
    if args.flags.nest_parent() {
        text.push_str(" NEST_PARENT");
    }
    if args.flags.pasid() {
        text.push_str(" PASID");
    }
    // Writing to a string cannot fail.
    let _ = write!(text, " on {:?} for {:?}", args.pt, args.dev);
    text
}

pub(super) fn entries_text(data: InvalidateData<'_>) -> String {
    let (kind, entries) = match data {
        InvalidateData::VtdS1(entries) => ("", entries),
        InvalidateData::VtdSecondStage(entries) => ("second-stage ", entries),
        InvalidateData::ArmSmmuV3(commands) => {
            let one = |command: &iommu_viommu_arm_smmuv3_invalidate| {
                format!("{:#x}:{:#x}", command.cmd[0], command.cmd[1])
            };
            return format!("[{}]", commands.iter().map(one).collect::<Vec<_>>().join(", "));
        }
    };
    let one = |entry: &iommu_hwpt_vtd_s1_invalidate| {
        if entry.npages == u64::MAX {
            return "all".to_owned();
        }
        let leaf = if entry.flags & VTD_INV_FLAGS_LEAF != 0 { " leaf" } else { "" };
        format!("{:#x}/{}{leaf}", entry.addr, entry.npages)
    };
    format!("{kind}[{}]", entries.iter().map(one).collect::<Vec<_>>().join(", "))
}
