// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host's description of one device means for nesting.

use std::fmt;
use std::ops::RangeInclusive;

use super::DeviceFacts;
use crate::iommufd::HwInfoData;
use crate::nesting::hw_info;
use crate::spec::smmuv3::regs::{Idr1, Idr3, Idr5};
use crate::spec::vtd::regs::{Cap, Ecap};

/// Where devices behind an SMMU send interrupt messages under Linux: a window of IOVAs that Linux
/// maps to the real doorbell (`IOMMU_RESV_SW_MSI`).
const SOFTWARE_MSI: RangeInclusive<u64> = 0x800_0000..=0x80f_ffff;
/// Where devices of PCs send them (`IOMMU_RESV_MSI`).
const PC_MSI: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// `IOMMU_HW_INFO_TYPE_AMD`.
const AMD: u32 = iommufd_bindings::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD;

/// What a device offers for nesting.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct DeviceReport {
    /// The device's name as given.
    pub name: String,
    /// The architecture of its IOMMU.
    pub iommu: String,
    /// The index of its SMMU among those of the devices: a vIOMMU belongs to one SMMU.
    pub smmu: Option<usize>,
    /// Why nesting is impossible, if it is.
    pub cannot_nest: Option<String>,
    /// Stage-1 formats that a guest can use.
    pub stage1_formats: Vec<String>,
    /// Its PASIDs.
    pub pasids: PasidReport,
    /// What falls to user space when it nests; `None` if it cannot.
    pub nesting: Option<NestingFeatures>,
    /// What the owner of stage 1 has to invalidate, by the architecture's names.
    pub invalidations: Vec<&'static str>,
    /// Pages written by DMA can be tracked.
    pub dirty_tracking: bool,
    /// ... also with nested tables.
    pub dirty_tracking_nested: bool,
    /// It can make page requests.
    pub page_requests: bool,
    /// It may have a device-TLB (PCIe ATS).
    pub ats: bool,
    /// The last GPA that stage 2 can map.
    pub last_gpa: u64,
    /// What no IOAS can map while the device is attached.
    pub reserved: Vec<Region>,
    /// Errata that affect nesting.
    pub errata: Vec<&'static str>,
    /// Unknown flags of its IOMMU; 0 for none.
    pub unknown_flags: u32,
}

/// The duties of user space in nested translation, by the names that Linux's
/// `Documentation/userspace-api/iommu.rst` (5.x) gave them: `IOMMU_NESTING_FEAT_...`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct NestingFeatures {
    /// PASIDs have one numbering for the whole host, which allocates them for user space. No host
    /// of iommufd has that: each device has its own PASIDs, and its owner numbers them.
    pub syswide_pasid: bool,
    /// User space attaches each stage-1 table, to a PASID or to the device's requests without one.
    pub bind_pgtbl: bool,
    /// User space attaches the guest's table of stage-1 tables, which has one for each PASID.
    pub bind_pasid_table: bool,
    /// User space has the host invalidate what it caches of stage 1.
    pub cache_invld: bool,
}

impl NestingFeatures {
    const fn new(bind_pgtbl: bool) -> Self {
        Self { syswide_pasid: false, bind_pgtbl, bind_pasid_table: !bind_pgtbl, cache_invld: true }
    }
}

impl fmt::Display for NestingFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { syswide_pasid, bind_pgtbl, bind_pasid_table, cache_invld } = *self;
        let (syswide, table) = (yes(syswide_pasid), yes(bind_pasid_table));
        let (pgtbl, cache) = (yes(bind_pgtbl), yes(cache_invld));
        write!(
            f,
            "SYSWIDE_PASID {syswide}, BIND_PGTBL {pgtbl}, BIND_PASID_TABLE {table}, CACHE_INVLD \
             {cache}"
        )
    }
}

/// The PASIDs of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PasidReport {
    /// Their width in bits; 0 for none.
    pub bits: u8,
    /// Who allocates them, and what is needed to use one.
    pub allocated_by: Option<&'static str>,
}

/// IOVAs that cannot be mapped, bounds included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Region {
    /// The first one.
    pub first: u64,
    /// The last one.
    pub last: u64,
    /// Its purpose.
    pub kind: RegionKind,
}

/// What IOVAs are reserved for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum RegionKind {
    /// Interrupt messages, which are not translated.
    Msi,
    /// Interrupt messages, which are translated like other writes: the guest has to map the window
    /// 1:1 in stage 1.
    SoftwareMsi,
    /// Firmware's, or another device's.
    Other,
}

impl Region {
    fn new(iommu: &HwInfoData, range: &RangeInclusive<u64>) -> Self {
        let kind = match iommu {
            HwInfoData::ArmSmmuV3(_) if *range == SOFTWARE_MSI => RegionKind::SoftwareMsi,
            HwInfoData::Vtd(_) | HwInfoData::Other(AMD) if *range == PC_MSI => RegionKind::Msi,
            _ => RegionKind::Other,
        };
        Self { first: *range.start(), last: *range.end(), kind }
    }
}

impl DeviceReport {
    /// Interprets `facts`.
    pub fn new(facts: &DeviceFacts) -> Self {
        let info = &facts.info;
        let mut report = Self {
            name: facts.name.clone(),
            iommu: iommu_name(&info.data),
            smmu: facts.smmu,
            cannot_nest: facts.refusal.as_ref().map(ToString::to_string),
            stage1_formats: Vec::new(),
            pasids: PasidReport { bits: 0, allocated_by: None },
            nesting: None,
            invalidations: Vec::new(),
            dirty_tracking: info.capabilities.dirty_tracking(),
            dirty_tracking_nested: facts.dirty_nesting,
            page_requests: facts.asks(),
            ats: facts.ats(),
            last_gpa: facts.iovas.last().map_or(0, |range| *range.end()),
            reserved: facts.reserved.iter().map(|range| Region::new(&info.data, range)).collect(),
            errata: Vec::new(),
            unknown_flags: hw_info::unknown_flags(info),
        };
        if hw_info::writes_through_read_only(info) {
            report.errata.push("772415: no read-only memory with nested tables");
        }
        if hw_info::misses_invalidations(info) {
            report.errata.push("Tegra264: each TLBI and CFGI command has to be issued twice");
        }
        match &info.data {
            HwInfoData::Vtd(vtd) => {
                let (cap, ecap) = (Cap::from_bits(vtd.cap_reg), Ecap::from_bits(vtd.ecap_reg));
                report.vtd(cap, ecap, info.max_pasid_log2);
            }
            HwInfoData::ArmSmmuV3(smmu) => report.smmuv3(&smmu.idr, info.max_pasid_log2),
            HwInfoData::Other(_) | HwInfoData::None => report.pasids.bits = info.max_pasid_log2,
        }
        if report.cannot_nest.is_some() || report.nesting.is_none() {
            report.nesting = None;
            let mirrored = !matches!(info.data, HwInfoData::ArmSmmuV3(_));
            let by = "the guest; the VMM attaches a mirror to each";
            report.pasids.allocated_by = mirrored.then_some(by);
            report.stage1_formats.clear();
            report.invalidations.clear();
        }
        if report.pasids.bits == 0 {
            report.pasids.allocated_by = None;
        }
        report
    }

    fn vtd(&mut self, cap: Cap, ecap: Ecap, device_pasid_bits: u8) {
        let page = if cap.fs1gp() { "1 GiB" } else { "2 MiB" };
        let mut format = |bits, levels| {
            let text =
                format!("VT-d first stage, {bits} bits, {levels} levels, pages up to {page}");
            self.stage1_formats.push(text);
        };
        format(48, 4);
        if cap.fs5lp() {
            format(57, 5);
        }
        self.pasids.bits = device_pasid_bits.min(ecap.pasid_bits());
        self.pasids.allocated_by = Some("the guest; the VMM attaches each");
        self.nesting = Some(NestingFeatures::new(true));
        self.invalidations.push("PASID-based IOTLB invalidation (a device-TLB is flushed with it)");
    }

    fn smmuv3(&mut self, idr: &[u32; 6], device_pasid_bits: u8) {
        let (idr1, idr3) = (Idr1::from_bits(idr[1]), Idr3::from_bits(idr[3]));
        let idr5 = Idr5::from_bits(idr[5]);
        let wide = idr5.vax() != 0;
        let granules =
            [("4 KiB", idr5.gran4k()), ("16 KiB", idr5.gran16k()), ("64 KiB", idr5.gran64k())];
        for (granule, _) in granules.iter().filter(|(_, there)| *there) {
            // 52 bits with smaller granules are LPA2, which Linux does not report.
            let bits = if wide && *granule == "64 KiB" { 52 } else { 48 };
            self.stage1_formats.push(format!("AArch64, {granule} granule, {bits} bits"));
        }
        self.pasids.bits = device_pasid_bits.min(idr1.ssidsize());
        self.pasids.allocated_by =
            Some("the guest, in its context descriptors; nothing is attached");
        self.nesting = Some(NestingFeatures::new(false));
        let range =
            if idr3.ril() { "TLBI_NH_VA and VAA (by range, too)" } else { "TLBI_NH_VA and VAA" };
        self.invalidations.extend([
            range,
            "TLBI_NH_ASID and ALL, TLBI_NSNH_ALL",
            "CFGI_CD and CD_ALL",
        ]);
        if self.ats {
            self.invalidations.push("ATC_INV");
        }
    }
}

/// The architecture.
fn iommu_name(data: &HwInfoData) -> String {
    match data {
        HwInfoData::Vtd(_) => "VT-d".to_owned(),
        HwInfoData::ArmSmmuV3(_) => "SMMUv3".to_owned(),
        HwInfoData::Other(AMD) => "AMD-Vi".to_owned(),
        HwInfoData::Other(kind) => format!("IOMMU of type {kind}"),
        HwInfoData::None => "IOMMU that does not describe itself".to_owned(),
    }
}

fn yes(value: bool) -> &'static str {
    if value {
        "yes"
    } else {
        "no"
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let smmu = self.smmu.map(|number| format!(" {number}")).unwrap_or_default();
        writeln!(f, "{}: behind {}{smmu}", self.name, self.iommu)?;
        if let Some(why) = &self.cannot_nest {
            writeln!(f, "  nesting: no ({why})")?;
        }
        for format in &self.stage1_formats {
            writeln!(f, "  stage 1: {format}")?;
        }
        match self.pasids {
            PasidReport { bits: 0, .. } => writeln!(f, "  PASIDs: none")?,
            PasidReport { bits, allocated_by } => {
                writeln!(
                    f,
                    "  PASIDs: {bits} bits, allocated by {}",
                    allocated_by.unwrap_or("nobody")
                )?;
            }
        }
        if let Some(nesting) = &self.nesting {
            writeln!(f, "  for the owner: {nesting}")?;
        }
        for invalidation in &self.invalidations {
            writeln!(f, "  to invalidate: {invalidation}")?;
        }
        let nested = match (self.dirty_tracking, self.dirty_tracking_nested) {
            (true, false) => " (not with nested tables)",
            _ => "",
        };
        writeln!(f, "  dirty tracking: {}{nested}", yes(self.dirty_tracking))?;
        writeln!(f, "  page requests: {}, ATS: {}", yes(self.page_requests), yes(self.ats))?;
        writeln!(f, "  guest memory: up to {:#x}", self.last_gpa)?;
        for Region { first, last, kind } in &self.reserved {
            let kind = match kind {
                RegionKind::Msi => "interrupt messages",
                RegionKind::SoftwareMsi => "interrupt messages, to be mapped 1:1 in stage 1",
                RegionKind::Other => "firmware's or another device's",
            };
            writeln!(f, "  reserved: {first:#x} to {last:#x}: {kind}")?;
        }
        for erratum in &self.errata {
            writeln!(f, "  erratum {erratum}")?;
        }
        if self.unknown_flags != 0 {
            writeln!(f, "  unknown flags of the kernel: {:#x}", self.unknown_flags)?;
        }
        Ok(())
    }
}
