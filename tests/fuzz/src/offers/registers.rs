// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers of an emulated host's units, from the specifications' numbers of bits.

use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::translation::Granule;
use twostage_emulated::{AddressWidth, SmmuV3UnitConfig, VtdUnitConfig};

/// A register of fields: the lowest bit of each, and its value.
fn register(fields: &[(u32, u64)]) -> u64 {
    fields.iter().fold(0, |register, (bit, value)| register | value << bit)
}

/// CAP, ECAP, and the flags beside them (VT-d 10.4.2, 10.4.3; `struct iommu_hw_info_vtd`).
pub fn vtd(unit: &VtdUnitConfig) -> [u64; 3] {
    let (bits, sagaw) = match unit.address_width {
        AddressWidth::Bits39 => (39, 0b00010),
        AddressWidth::Bits48 => (48, 0b00110),
        AddressWidth::Bits57 => (57, 0b01110),
    };
    let huge = u64::from(unit.huge_pages);
    let (nd, mgaw, sslps, psi, mamv) = (6, bits - 1, 1 | huge << 1, 1, 18);
    let (dwd, drd, fs5lp, esirtps, esrtps) = (1, 1, u64::from(bits == 57), 1, 1);
    let cap = register(&[
        (0, nd),
        (8, sagaw),
        (16, mgaw),
        (34, sslps),
        (39, psi),
        (48, mamv),
        (54, dwd),
        (55, drd),
        (56, huge),
        (60, fs5lp),
        (62, esirtps),
        (63, esrtps),
    ]);
    let pasid = u64::from(unit.pasid_bits > 0);
    let pss = u64::from(unit.pasid_bits.saturating_sub(1));
    let prs = u64::from(unit.page_requests && unit.device_tlb) & pasid;
    let (c, qi, pt, sc, smts, ssts, fsts, smpwcs) = (1, 1, 1, 1, 1, 1, 1, 1);
    let ecap = register(&[
        (0, c),
        (1, qi),
        (2, unit.device_tlb.into()),
        (6, pt),
        (7, sc),
        (26, unit.nesting.into()),
        (29, prs),
        (31, unit.supervisor_requests.into()),
        (34, unit.extended_accessed.into()),
        (35, pss),
        (40, pasid),
        (42, prs),
        (43, smts),
        (45, unit.dirty_tracking.into()),
        (46, ssts),
        (47, fsts),
        (48, smpwcs),
    ]);
    [cap, ecap, unit.erratum_772415.into()]
}

/// IDR0 to IDR5 (SMMUv3 6.3.1 to 6.3.6).
pub fn smmuv3(unit: &SmmuV3UnitConfig) -> [u32; 6] {
    let httu = match unit.httu {
        Httu::Access if unit.nesting => 1,
        Httu::Dirty if unit.nesting => 2,
        _ => 0,
    };
    let pri = u64::from(unit.page_requests && unit.ats);
    // It stalls or terminates, or never stalls; some groups of stalls at once.
    let (stall_model, stall_max) = if unit.stalls { (0, 512) } else { (1, 0) };
    let (s2p, ttf, cohacc, asid16, msi, vmid16) = (1, 0b10, 1, 1, 1, 1);
    let (ttendian, term_model, st_level) = (0b10, 1, 0b01);
    let idr0 = register(&[
        (0, s2p),
        (1, unit.nesting.into()),
        (2, ttf),
        (4, cohacc),
        (6, httu),
        (10, unit.ats.into()),
        (12, asid16),
        (13, msi),
        (16, pri),
        (18, vmid16),
        (19, unit.two_level_cd.into()),
        (21, ttendian),
        (24, stall_model),
        (26, term_model),
        (27, st_level),
    ]);
    let (sidsize, eventqs, cmdqs, attr_types_ovr) = (16, 19, 19, 1);
    let idr1 = register(&[
        (0, sidsize),
        (6, unit.ssid_bits.into()),
        (16, eventqs),
        (21, cmdqs),
        (27, attr_types_ovr),
    ]);
    let idr3 = register(&[(8, unit.s2fwb.into()), (10, unit.range_invalidation.into())]);
    let oas = [32, 36, 40, 42, 44, 48, 52].iter().position(|bits| *bits == unit.address_width);
    let has = |granule| u64::from(unit.granules.contains(&granule));
    let idr5 = register(&[
        (0, oas.expect("a size that the register has") as u64),
        (4, has(Granule::K4)),
        (5, has(Granule::K16)),
        (6, has(Granule::K64)),
        (10, unit.va_52.into()),
        (16, stall_max),
    ]);
    [idr0, idr1, 0, idr3, 0, idr5].map(|register| register as u32)
}
