// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A configuration, reduced to what units have in common, bit by bit.

use std::collections::BTreeMap;

use twostage::iommufd::{iommu_hw_info_arm_smmuv3, Extensions, HwCapabilities, HwInfo, HwInfoData};
use twostage::nesting::host_smmu;
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::vtd::regs::{Cap, Ecap};
use twostage::viommu::smmuv3::SmmuConfig;
use twostage::viommu::vtd::{HostVtd, VtdConfig};
use twostage::viommu::{CapabilityConflict, IntersectError};

use super::{bit, near};
use crate::input::Input;

/// CAP and ECAP of a unit that has all that matters here.
pub const ABLE_VTD: [u64; 2] = [1 << 60 | 1 << 56 | 56 << 16, {
    let (dt, sc, nest, prs, srs, eafs) = (1 << 2, 1 << 7, 1 << 26, 1 << 29, 1 << 31, 1 << 34);
    let (pss, pasid, smts, smpwcs) = (19 << 35, 1 << 40, 1 << 43, 1 << 48);
    dt | sc | nest | prs | srs | eafs | pss | pasid | smts | smpwcs
}];

/// IDR0 to IDR5 of such an SMMU, and AIDR.
pub const ABLE_SMMU: [u32; 7] = {
    let (ttf, ats, asid16, pri, cd2l) = (3 << 2, 1 << 10, 1 << 12, 1 << 16, 1 << 19);
    let (st_level, httu) = (1 << 27, 2 << 6);
    let granules = 7 << 4;
    let idr0 = ttf | ats | asid16 | pri | cd2l | st_level | httu;
    [idr0, 32 | 20 << 6, 0, 1 << 10 | 2 << 11, 0, granules | 1 << 10 | 6, 3]
};

/// The registers of VT-d units, and what no register says.
struct VtdUnit {
    name: String,
    cap: u64,
    ecap: u64,
    second_stage: bool,
    reports: bool,
}

impl VtdUnit {
    /// Width of PASIDs in bits (PSS is one less).
    fn pasid_bits(&self) -> u8 {
        if bit(self.ecap, 40) {
            (self.ecap >> 35 & 0x1f) as u8 + 1
        } else {
            0
        }
    }

    /// Whether it lacks what is called `what` in errors.
    fn lacks(&self, what: &str, config: &VtdConfig) -> bool {
        match what {
            "ECAP.SMTS" => !bit(self.ecap, 43),
            "ECAP.NEST" => !bit(self.ecap, 26),
            "ECAP.DT" => !bit(self.ecap, 2),
            "ECAP.PRS" => !bit(self.ecap, 29),
            "ECAP.PASID" => !bit(self.ecap, 40),
            "ECAP.PSS" => self.pasid_bits() < config.pasid_bits.unwrap_or(0),
            "CAP.FS5LP" => !bit(self.cap, 60),
            "CAP.MGAW" => (self.cap >> 16 & 0x3f) + 1 < u64::from(config.address_width),
            "guest_second_stage" => !self.second_stage,
            "fault_reports" => !self.reports,
            _ => panic!("what is {what}?"),
        }
    }
}

/// A virtual VT-d in front of some units.
pub fn vtd(input: &mut Input<'_>) {
    let count = input.byte() % 4;
    let units: Vec<_> = (0..count).map(|number| vtd_unit(input, number)).collect();
    let hosts = units.iter().map(|unit| {
        let (cap, ecap) = (Cap::from_bits(unit.cap), Ecap::from_bits(unit.ecap));
        HostVtd::new(unit.name.clone(), cap, ecap)
            .with_guest_second_stage(unit.second_stage)
            .with_fault_reports(unit.reports)
    });
    let hosts: Vec<_> = hosts.collect();
    let asked = VtdConfig::default()
        .with_address_width(input.pick(&[48, 48, 57, 39]))
        .with_pasid_bits(if input.flag() { Some(input.byte() % 24) } else { None })
        .with_scalable_mode(!input.one_in(8))
        .with_first_stage(input.pick(&[None, None, Some(true), Some(false)]))
        .with_second_stage(input.one_in(3))
        .with_nest(input.one_in(4))
        .with_caching_mode(!input.one_in(4))
        .with_device_iotlb(input.one_in(3))
        .with_page_requests(input.one_in(4))
        .with_interrupt_remapping(input.flag())
        .with_first_stage_1g(input.flag())
        .with_supervisor_requests(input.flag())
        .with_extended_accessed(input.flag())
        .with_snoop_control(input.flag())
        .with_coherent_walks(input.flag())
        .with_fault_records(u16::from(input.byte()) % 130);
    let all = |number, of: fn(&VtdUnit) -> u64| units.iter().all(|unit| bit(of(unit), number));
    let (cap, ecap) = (|unit: &VtdUnit| unit.cap, |unit: &VtdUnit| unit.ecap);
    let config = match asked.intersect(&hosts) {
        Ok(config) => config,
        Err(error) => {
            return refused(&error, units.is_empty(), |conflict| {
                let unit = units.iter().find(|unit| unit.name == conflict.device);
                unit.is_some_and(|unit| unit.lacks(conflict.bit, &asked))
            });
        }
    };
    // Each that was asked for and that all have, and no other.
    assert_eq!(config.first_stage_1g, asked.first_stage_1g && all(56, cap), "FS1GP");
    assert_eq!(config.supervisor_requests, asked.supervisor_requests && all(31, ecap), "SRS");
    assert_eq!(config.extended_accessed, asked.extended_accessed && all(34, ecap), "EAFS");
    assert_eq!(config.snoop_control, asked.snoop_control && all(7, ecap), "SC");
    assert_eq!(config.coherent_walks, asked.coherent_walks && all(48, ecap), "SMPWCS");
    let narrowest = units.iter().map(VtdUnit::pasid_bits).min().expect("there is a unit");
    let unasked = if asked.scalable_mode { 8 } else { 0 };
    let pasids = asked.pasid_bits.unwrap_or(unasked.min(narrowest));
    assert_eq!(config.pasid_bits, Some(pasids));
    // Nothing but what was reduced is another.
    let reduced = config
        .clone()
        .with_first_stage_1g(asked.first_stage_1g)
        .with_supervisor_requests(asked.supervisor_requests)
        .with_extended_accessed(asked.extended_accessed)
        .with_snoop_control(asked.snoop_control)
        .with_coherent_walks(asked.coherent_walks)
        .with_pasid_bits(asked.pasid_bits);
    assert_eq!(reduced, asked);
    assert_eq!(config.intersect(&hosts).as_ref(), Ok(&config), "reduced again");
    let Ok(offered) = config.capabilities() else {
        config.check().expect_err("impossible, but consistent");
        return;
    };
    offers_no_more(offered.cap.into_bits(), offered.ecap.into_bits(), &units);
}

/// What the guest finds in the registers is there in each unit.
fn offers_no_more(cap: u64, ecap: u64, units: &[VtdUnit]) {
    for unit in units {
        for number in [56, 60] {
            assert!(!bit(cap, number) || bit(unit.cap, number), "CAP bit {number}");
        }
        // Without NEST: that of a guest takes more than hardware has.
        for number in [2, 7, 29, 31, 34, 40, 43, 48] {
            assert!(!bit(ecap, number) || bit(unit.ecap, number), "ECAP bit {number}");
        }
        let bits = (ecap >> 35 & 0x1f) as u8 + 1;
        assert!(!bit(ecap, 40) || bits <= unit.pasid_bits(), "PSS");
        let (width, has) = (cap >> 16 & 0x3f, unit.cap >> 16 & 0x3f);
        assert!(width <= has, "MGAW {width} of {has}");
        // SSLPS, SAGAW, SSTS, NEST: tables of the second stage.
        let second = cap >> 34 & 0xf | cap >> 8 & 0x1f | ecap >> 46 & 1 | ecap >> 26 & 1;
        assert!(second == 0 || unit.second_stage, "second stage");
        assert!(bit(cap, 7) || unit.reports, "CM");
    }
}

fn vtd_unit(input: &mut Input<'_>, number: u8) -> VtdUnit {
    let [cap, ecap] = ABLE_VTD;
    VtdUnit {
        name: format!("device {number}"),
        cap: near(input, cap),
        ecap: near(input, ecap),
        second_stage: input.flag(),
        reports: input.flag(),
    }
}

/// An error says whether there was no unit, or what one lacks indeed.
fn refused(error: &IntersectError, no_unit: bool, lacks: impl FnOnce(&CapabilityConflict) -> bool) {
    match error {
        IntersectError::NoHosts => assert!(no_unit, "there are units"),
        IntersectError::Lacks(conflict) => {
            assert!(lacks(conflict), "{conflict}: it has that");
            assert!(!conflict.needed_for.is_empty());
        }
        other => panic!("what is {other}?"),
    }
}

/// What an SMMU says, and what its host does.
struct SmmuUnit {
    idr: [u32; 6],
    aidr: u32,
    ats: bool,
    faults: bool,
    updates: bool,
}

impl SmmuUnit {
    fn bit(&self, register: usize, number: u32) -> bool {
        bit(self.idr[register].into(), number)
    }

    /// IDR1.SSIDSIZE.
    fn substream_bits(&self) -> u8 {
        (self.idr[1] >> 6 & 0x1f) as u8
    }

    /// IDR0.STALL_MODEL.
    fn stall_model(&self) -> u32 {
        self.idr[0] >> 24 & 3
    }

    /// IDR0.HTTU of a host that updates flags; 3 is reserved.
    fn httu(&self) -> u32 {
        match self.idr[0] >> 6 & 3 {
            level @ 0..=2 if self.updates => level,
            3 if self.updates => 2,
            _ => 0,
        }
    }
}

/// A virtual SMMUv3 in front of some units.
pub fn smmuv3(input: &mut Input<'_>) {
    let count = input.byte() % 4;
    let units: Vec<_> = (0..count).map(|_| smmu_unit(input)).collect();
    let hosts: Vec<_> = units
        .iter()
        .enumerate()
        .map(|(number, unit)| {
            let SmmuUnit { idr, aidr, .. } = *unit;
            let data = iommu_hw_info_arm_smmuv3 { idr, aidr, ..Default::default() };
            let info = HwInfo::new(HwInfoData::ArmSmmuV3(data))
                .with_capabilities(HwCapabilities::new().with_pci_ats_not_supported(!unit.ats));
            let extensions = Extensions::default()
                .with_table_updates(unit.updates)
                .with_smmu_faults(unit.faults);
            host_smmu(format!("device {number}"), &info, extensions).expect("an SMMUv3")
        })
        .collect();
    let asked = SmmuConfig::default()
        .with_substream_bits(if input.flag() { Some(input.byte() % 24) } else { None })
        .with_input_bits(input.pick(&[48, 48, 52]))
        .with_granule_4k(!input.one_in(4))
        .with_granule_16k(input.flag())
        .with_granule_64k(input.flag())
        .with_require_granules(input.one_in(8))
        .with_asid16(input.flag())
        .with_two_level_contexts(input.flag())
        .with_range_invalidation(input.flag())
        .with_require_range_invalidation(input.one_in(8))
        .with_break_before_make_level(input.byte() % 3)
        .with_httu(input.pick(&[
            None,
            None,
            Some(Httu::None),
            Some(Httu::Access),
            Some(Httu::Dirty),
        ]))
        .with_ats(input.one_in(4))
        .with_page_requests(input.one_in(8))
        .with_stalls(input.one_in(8))
        .with_always_abort(input.flag())
        .with_minor_revision(input.byte() % 17);
    let config = match asked.intersect(&hosts) {
        Ok(config) => config,
        Err(error) => {
            return refused(&error, units.is_empty(), |conflict| {
                let number = conflict.device.strip_prefix("device ").and_then(|it| it.parse().ok());
                let number: usize = number.expect("the name of a device");
                smmu_lacks(&units, number, conflict.bit, &asked)
            })
        }
    };
    let all = |register, number| units.iter().all(|unit| unit.bit(register, number));
    assert_eq!(config.granule_4k, asked.granule_4k && all(5, 4), "GRAN4K");
    assert_eq!(config.granule_16k, asked.granule_16k && all(5, 5), "GRAN16K");
    assert_eq!(config.granule_64k, asked.granule_64k && all(5, 6), "GRAN64K");
    assert_eq!(config.asid16, asked.asid16 && all(0, 12), "ASID16");
    assert_eq!(config.two_level_contexts, asked.two_level_contexts && all(0, 19), "CD2L");
    assert_eq!(config.range_invalidation, asked.range_invalidation && all(3, 10), "RIL");
    let least = units.iter().map(SmmuUnit::substream_bits).min();
    assert_eq!(config.substream_bits, asked.substream_bits.or(least), "SSIDSIZE");
    let flags = units.iter().map(SmmuUnit::httu).min().expect("there is a unit");
    let offered = config.httu.map(|httu| u32::from(httu.into_bits()));
    assert_eq!(offered, asked.httu.map(|httu| httu.into_bits().into()).or(Some(flags)), "HTTU");
    assert_eq!((config.ats, config.page_requests), (asked.ats, asked.page_requests));
    assert_eq!(config.stalls, asked.stalls);
    assert_eq!(config.intersect(&hosts).as_ref(), Ok(&config), "reduced again");
    match config.capabilities() {
        Ok(offered) => smmu_offers_no_more(&offered.registers(), &units),
        Err(_) => {
            config.check().expect_err("impossible, but consistent");
        }
    }
    // What no register of the guest's says.
    for unit in &units {
        assert!(config.host_stalls || unit.stall_model() != 0, "STALL_MODEL");
    }
}

/// What the guest finds in the registers is there in each unit; ATS and PRI are of devices, one of
/// which has them.
fn smmu_offers_no_more(registers: &BTreeMap<&'static str, u64>, units: &[SmmuUnit]) {
    let offered = |register: &str, first: u32, width: u32| {
        let bits = registers[register] >> first & ((1 << width) - 1);
        u32::try_from(bits).expect("registers have 32 bits")
    };
    assert!(offered("IDR0", 10, 1) == 0 || units.iter().any(|unit| unit.ats), "ATS");
    let asks = |unit: &SmmuUnit| unit.faults && unit.bit(0, 16);
    assert!(offered("IDR0", 16, 1) == 0 || units.iter().any(asks), "PRI");
    for unit in units {
        let of = |register: usize, first: u32, width: u32| {
            unit.idr[register] >> first & ((1 << width) - 1)
        };
        for (name, register, first, width) in [
            ("IDR0", 0, 12, 1),
            ("IDR0", 0, 19, 1),
            ("IDR1", 1, 6, 5),
            ("IDR3", 3, 10, 1),
            ("IDR3", 3, 11, 2),
            ("IDR5", 5, 4, 1),
            ("IDR5", 5, 5, 1),
            ("IDR5", 5, 6, 1),
        ] {
            let (guest, host) = (offered(name, first, width), of(register, first, width));
            assert!(guest <= host, "{name}, bit {first}: {guest} of {host}");
        }
        assert!(offered("IDR0", 6, 2) <= unit.httu(), "HTTU");
        let stalls = unit.faults && unit.stall_model() == 0;
        assert!(offered("IDR0", 24, 2) != 0 || stalls, "STALL_MODEL");
        assert!(offered("IDR0", 26, 1) >= of(0, 26, 1), "TERM_MODEL");
        assert!(offered("IDR5", 10, 2) == 0 || of(5, 10, 2) != 0, "VAX");
        let minor = if unit.aidr >> 4 & 0xf == 0 { unit.aidr & 0xf } else { u32::MAX };
        assert!(offered("AIDR", 0, 4) <= minor, "AIDR");
    }
}

/// Whether unit `number` lacks what is called `what` in errors.
fn smmu_lacks(units: &[SmmuUnit], number: usize, what: &str, asked: &SmmuConfig) -> bool {
    let unit = &units[number];
    match what {
        "ATS" => units.iter().all(|unit| !unit.ats),
        "IDR0.PRI" => units.iter().all(|unit| !(unit.faults && unit.bit(0, 16))),
        "IDR0.TTF for AArch64" => !unit.bit(0, 3),
        "IDR0.TTENDIAN for little-endian" => unit.idr[0] >> 21 & 3 == 3,
        "IDR0.STALL_MODEL that can terminate" => unit.stall_model() == 2,
        "an IDR0.STALL_MODEL of 0b00 for guests" => !unit.faults || unit.stall_model() != 0,
        "IDR5.VAX" => unit.idr[5] >> 10 & 3 == 0,
        "IDR5.GRAN4K" => !unit.bit(5, 4),
        "IDR5.GRAN16K" => !unit.bit(5, 5),
        "IDR5.GRAN64K" => !unit.bit(5, 6),
        "IDR5.GRAN4K, GRAN16K and GRAN64K" => {
            let wanted = [asked.granule_4k, asked.granule_16k, asked.granule_64k];
            let common = |granule: u32| units[..=number].iter().all(|unit| unit.bit(5, granule));
            !wanted.into_iter().zip(4..).any(|(wanted, granule)| wanted && common(granule))
        }
        "IDR1.SSIDSIZE" => unit.substream_bits() < asked.substream_bits.unwrap_or(0),
        "IDR3.RIL" => !unit.bit(3, 10),
        "IDR0.HTTU" => unit.httu() < asked.httu.map_or(0, |httu| httu.into_bits().into()),
        _ => panic!("what is {what}?"),
    }
}

fn smmu_unit(input: &mut Input<'_>) -> SmmuUnit {
    let mut words = ABLE_SMMU.map(|word| near(input, word.into()) as u32);
    let aidr = words[6];
    if input.one_in(4) {
        // As Linux's VMMs see it most.
        words[0] |= 1 << 24;
    }
    let [idr @ .., _] = words;
    SmmuUnit { idr, aidr, ats: input.flag(), faults: input.flag(), updates: input.flag() }
}
