// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Surveys of emulated devices, and of possible answers of hardware.

use twostage::iommufd::{
    iommu_hw_info_arm_smmuv3, Errno, Extensions, FailNth, HostError, HostIommu, HwCapabilities,
    HwInfo, HwInfoData, Verb,
};
use twostage::nesting::survey::{
    makes_page_requests, survey, DeviceFacts, DeviceReport, NestingReport, Offer, OfferError,
    OfferKind, RegionKind,
};
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::regs::{
    Httu, Idr0, Idr1, Idr3, Idr5, STALL_NONE, ST_LEVEL_2, TTF_AARCH64,
};
use twostage_emulated::{
    AddressWidth, DeviceConfig, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit, VtdUnitConfig,
};

fn host(units: &[(VtdUnitConfig, DeviceConfig)]) -> (std::sync::Arc<EmulatedHost>, Vec<String>) {
    let host = EmulatedHost::new();
    let mut names = Vec::new();
    for (number, (unit, device)) in (0u8..).zip(units.iter().cloned()) {
        let unit = host.add_unit(VtdUnit::new(unit));
        let name = format!("device{number}");
        host.add_device(&name, unit, Bdf::new(0, number, 0).unwrap(), device).unwrap();
        names.push(name);
    }
    (host, names)
}

fn plain() -> (VtdUnitConfig, DeviceConfig) {
    (VtdUnitConfig::default(), DeviceConfig::default())
}

#[test]
fn a_survey_leaves_nothing_behind() {
    let reserved = vec![0x8000_0000..=0x8000_ffff];
    let device = DeviceConfig::default().with_pasid_bits(16).with_ats(true).with_reserved(reserved);
    let (host, names) = host(&[(VtdUnitConfig::default(), device)]);
    let facts = survey(&*host, &names).unwrap();
    assert_eq!(host.live_objects(), 0);
    let report = DeviceReport::new(&facts[0]);
    assert_eq!((report.iommu.as_str(), report.cannot_nest.as_ref()), ("VT-d", None));
    assert_eq!((report.pasids.bits, report.ats, report.page_requests), (16, true, false));
    assert_eq!(report.last_gpa, (1 << 48) - 1);
    let regions: Vec<_> = report.reserved.iter().map(|each| (each.first, each.kind)).collect();
    assert_eq!(regions, [(0x8000_0000, RegionKind::Other), (0xfee0_0000, RegionKind::Msi)]);
    assert!(report.errata[0].starts_with("772415"));
    assert_eq!(report.stage1_formats.len(), 1);
    let (text, nesting) = (report.to_string(), report.nesting.unwrap());
    assert_eq!([nesting.syswide_pasid, nesting.bind_pasid_table], [false; 2]);
    assert_eq!([nesting.bind_pgtbl, nesting.cache_invld], [true; 2]);
    for line in [
        "  PASIDs: 16 bits, allocated by the guest; the VMM attaches each",
        "  for the owner: SYSWIDE_PASID no, BIND_PGTBL yes, BIND_PASID_TABLE no, CACHE_INVLD yes",
    ] {
        assert!(text.lines().any(|found| found == line), "'{line}' is not in:\n{text}");
    }
}

#[test]
fn one_that_cannot_nest_has_pasids_of_its_mirrors() {
    let flat = VtdUnitConfig::default().with_nesting(false);
    let (host, names) = host(&[(flat, DeviceConfig::default().with_pasid_bits(16))]);
    let report = DeviceReport::new(&survey(&*host, &names).unwrap()[0]);
    let by = Some("the guest; the VMM attaches a mirror to each");
    assert_eq!((report.pasids.bits, report.pasids.allocated_by), (16, by));
}

#[test]
fn page_requests_of_a_bound_device() {
    let unit = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
    let device = |pri| DeviceConfig::default().with_pasid_bits(8).with_ats(true).with_pri(pri);
    let (host, names) = host(&[(unit.clone(), device(true)), (unit, device(false))]);
    let devices = names.iter().map(|name| host.device_bind(name).unwrap());
    let makes = devices.map(|dev| makes_page_requests(&*host, dev).unwrap());
    assert_eq!(makes.collect::<Vec<_>>(), [true, false]);
    assert_eq!(host.live_objects(), 2, "the devices");
}

#[test]
fn whatever_fails_leaves_nothing_behind() {
    let (host, names) = host(&[plain(), plain()]);
    for n in 1.. {
        let failing = FailNth::new(host.clone());
        failing.fail_nth(n, Errno::ENOMEM);
        let _ = survey(&failing, &names);
        if failing.is_armed() {
            break;
        }
        assert_eq!(host.live_objects(), 0, "call {n}");
    }
}

#[test]
fn an_offer_is_the_intersection() {
    let wide = VtdUnitConfig::default()
        .with_address_width(AddressWidth::Bits57)
        .with_device_tlb(true)
        .with_supervisor_requests(true);
    let with_tlb = DeviceConfig::default().with_ats(true);
    let both = |second| {
        let (host, names) = host(&[(wide.clone(), with_tlb.clone()), second]);
        Offer::new(&survey(&*host, &names).unwrap()).unwrap()
    };
    let offer = both((wide.clone(), with_tlb.clone()));
    assert_eq!((offer.address_bits, offer.pasid_bits, offer.ats), (57, 20, true));
    assert!(
        offer.dirty_tracking && offer.features.iter().any(|each| each == "supervisor requests")
    );
    let poor = VtdUnitConfig::default()
        .with_pasid_bits(8)
        .with_huge_pages(false)
        .with_dirty_tracking(false);
    let offer = both((poor, DeviceConfig::default()));
    assert_eq!((offer.address_bits, offer.pasid_bits, offer.ats), (48, 8, false));
    assert_eq!(offer.no_page_requests.as_deref(), Some("the IOMMU of device0 lacks ECAP.PRS"));
    assert!(!offer.dirty_tracking);
    assert!(!offer.features.iter().any(|each| each == "1 GiB pages"));
}

/// By the units' registers, and by an attach for each device.
#[test]
fn page_requests_are_offered_where_units_and_a_device_have_them() {
    let unit = |prs| VtdUnitConfig::default().with_device_tlb(true).with_page_requests(prs);
    let device = |pri| DeviceConfig::default().with_pasid_bits(8).with_ats(true).with_pri(pri);
    let why = |devices: [(bool, bool); 2]| {
        let (host, names) = host(&devices.map(|(prs, pri)| (unit(prs), device(pri))));
        let offer = Offer::new(&survey(&*host, &names).unwrap()).unwrap();
        let prs = offer.registers["ECAP"] >> 29 & 1 != 0;
        assert_eq!(prs, offer.no_page_requests.is_none());
        offer.no_page_requests
    };
    assert_eq!(why([(true, true), (true, false)]), None);
    assert_eq!(why([(true, false); 2]), Some("no device makes them (PRI)".into()));
    let lacks = Some("the IOMMU of device1 lacks ECAP.PRS".into());
    assert_eq!(why([(true, true), (false, false)]), lacks);
}

#[test]
fn who_cannot_nest_is_named() {
    let flat = VtdUnitConfig::default().with_nesting(false);
    let (host, names) = host(&[plain(), (flat, DeviceConfig::default())]);
    let facts = survey(&*host, &names).unwrap();
    let report = NestingReport::new(&facts);
    assert!(report.devices[0].cannot_nest.is_none());
    assert!(report.devices[1].cannot_nest.is_some() && report.devices[1].stage1_formats.is_empty());
    assert_eq!(report.devices[1].nesting, None);
    assert!(report.no_offer.unwrap().starts_with("device1: HWPT_ALLOC"));
    assert_eq!(Offer::new(&[]), Err(OfferError::NoDevice));
}

/// A device behind an SMMU much like the one that QEMU emulates.
fn behind_smmu(name: &str, smmu: usize) -> DeviceFacts {
    let idr0 = Idr0::new()
        .with_ttf(TTF_AARCH64)
        .with_asid16(true)
        .with_cd2l(true)
        .with_ttendian(2)
        .with_stall_model(STALL_NONE)
        .with_st_level(ST_LEVEL_2);
    let idr1 = Idr1::new().with_sidsize(16);
    let idr3 = Idr3::new().with_ril(true);
    let idr5 = Idr5::new().with_gran4k(true).with_gran16k(true).with_gran64k(true).with_oas(4);
    let idr = [idr0.into(), idr1.into(), 0, idr3.into(), 0, idr5.into()];
    let data = iommu_hw_info_arm_smmuv3 { idr, ..Default::default() };
    DeviceFacts {
        name: name.to_owned(),
        info: HwInfo::new(HwInfoData::ArmSmmuV3(data))
            .with_capabilities(HwCapabilities::new().with_pci_ats_not_supported(true)),
        extensions: Extensions::default(),
        refusal: None,
        dirty_nesting: false,
        page_requests: false,
        iovas: vec![0..=(1 << 44) - 1],
        reserved: vec![0x800_0000..=0x80f_ffff],
        smmu: Some(smmu),
    }
}

#[test]
fn devices_behind_smmus() {
    let (nvme, edu) = (behind_smmu("nvme", 0), behind_smmu("edu", 0));
    let report = DeviceReport::new(&nvme);
    assert_eq!(report.reserved[0].kind, RegionKind::SoftwareMsi);
    assert_eq!(report.stage1_formats.len(), 3);
    assert!(!report.invalidations.contains(&"ATC_INV"));
    let nesting = report.nesting.unwrap();
    assert_eq!([nesting.bind_pgtbl, nesting.bind_pasid_table], [false, true]);
    let offer = Offer::new(&[nvme.clone(), edu]).unwrap();
    assert_eq!((offer.kind, offer.address_bits, offer.pasid_bits), (OfferKind::Smmuv3, 48, 0));
    assert!(offer.features.iter().any(|each| each == "invalidation by range"));

    let error = Offer::new(&[nvme.clone(), behind_smmu("edu", 1)]).unwrap_err();
    assert!(error.to_string().contains("nvme and edu are behind different SMMUs"), "{error}");
    let (host, names) = host(&[plain()]);
    let mut mixed = survey(&*host, &names).unwrap();
    mixed.push(nvme.clone());
    assert!(matches!(Offer::new(&mixed), Err(OfferError::Mixed(..))));
    mixed.reverse();
    assert!(matches!(Offer::new(&mixed), Err(OfferError::Mixed(..))));
    let none = HwInfo::new(HwInfoData::Other(4));
    let amd = DeviceFacts { info: none, ..nvme.clone() };
    assert_eq!(DeviceReport::new(&amd).iommu, "AMD-Vi");
    assert!(matches!(Offer::new(std::slice::from_ref(&amd)), Err(OfferError::UnknownIommu(_))));
    // Its guest's tables are mirrored.
    let text = NestingReport::new(&[amd]).to_string();
    for line in [
        "not nested, but with the guest's tables mirrored (nesting=auto), a virtual VT-d over all of \
         them can offer:",
        "  legacy and scalable mode, second-stage tables",
    ] {
        assert!(text.lines().any(|found| found == line), "'{line}' is not in:\n{text}");
    }
    let refusal = HostError::new(Verb::ViommuAlloc, None, Errno::EOPNOTSUPP, "no S2FWB");
    let refused = DeviceFacts { refusal: Some(refusal), ..nvme };
    assert!(NestingReport::new(&[refused]).to_string().contains("no S2FWB"));
}

/// The hardware may have them, but Linux lets no guest's tables be updated.
#[test]
fn updates_of_flags_are_offered_where_the_host_makes_them() {
    let offer = |httu| {
        let host = EmulatedHost::new();
        let config = SmmuV3UnitConfig::default().with_httu(httu);
        let unit = host.add_unit(SmmuV3Unit::new(config));
        host.add_device("edu", unit, Bdf::from_raw(8), DeviceConfig::default()).unwrap();
        let facts = survey(&*host, &["edu".to_owned()]).unwrap();
        let kernel = DeviceFacts { extensions: Extensions::default(), ..facts[0].clone() };
        [facts, vec![kernel]].map(|facts| Offer::new(&facts).unwrap())
    };
    let updates = |offer: &Offer| {
        let text = offer.to_string();
        let found = text.lines().filter(|line| line.contains("updates of"));
        let lines: Vec<String> = found.map(|line| line.trim().to_owned()).collect();
        (offer.registers["IDR0"] >> 6 & 3, lines.join("; "))
    };
    let kernel = "no updates of flags in the guest's tables: Linux's vIOMMU has none (HTTU)";
    let none = "no updates of flags in the guest's tables: the SMMU has none (IDR0.HTTU)";
    let both = "updates of access flags; updates of the dirty state";
    for (httu, bits, said) in [
        (Httu::None, 0, none),
        (Httu::Access, 1, "updates of access flags"),
        (Httu::Dirty, 2, both),
    ] {
        let [emulated, linux] = offer(httu);
        assert_eq!(updates(&emulated), (bits, said.to_owned()), "{httu}");
        assert_eq!(updates(&linux), (0, kernel.to_owned()), "{httu}");
    }
}

/// A device behind an SMMU can have a fault queue whether it asks or not.
#[test]
fn page_requests_and_stalls_of_smmus_are_offered_where_the_host_brings_them() {
    let report = |unit: SmmuV3UnitConfig, extensions: Option<Extensions>| {
        let host = EmulatedHost::new();
        let ats = unit.ats;
        let unit = host.add_unit(SmmuV3Unit::new(unit));
        let device = DeviceConfig::default().with_ats(ats).with_pri(ats);
        host.add_device("edu", unit, Bdf::from_raw(8), device).unwrap();
        let mut facts = survey(&*host, &["edu".to_owned()]).unwrap();
        facts[0].extensions = extensions.unwrap_or(facts[0].extensions);
        let NestingReport { devices, offer, .. } = NestingReport::new(&facts);
        let offer = offer.unwrap();
        let stalls = offer.features.iter().any(|each| each.starts_with("stalls"));
        assert_eq!(offer.registers["IDR0"] >> 16 & 1 != 0, offer.no_page_requests.is_none());
        assert_eq!(offer.registers["IDR0"] >> 24 & 3 == 0, stalls);
        (devices[0].page_requests, offer.no_page_requests, stalls)
    };
    let able = || SmmuV3UnitConfig::default().with_ats(true).with_page_requests(true);
    let linux = "Linux gives those of an SMMUv3 to nobody, nor transactions that it stalls";
    let none = |why: &str, stalls| (false, Some(why.to_owned()), stalls);
    assert_eq!(report(able().with_stalls(true), None), (true, None, true));
    assert_eq!(report(able(), None), (true, None, false));
    let without = report(SmmuV3UnitConfig::default().with_stalls(true), None);
    assert_eq!(without, none("the IOMMU of edu lacks IDR0.PRI", true));
    let kernel = report(able().with_stalls(true), Some(Extensions::default()));
    assert_eq!(kernel, none(linux, false));
}

#[test]
fn a_survey_tells_smmus_apart() {
    let host = EmulatedHost::new();
    let add = |name: &str, unit, number| {
        let rid = Bdf::new(0, number, 0).unwrap();
        host.add_device(name, unit, rid, DeviceConfig::default()).unwrap();
        name.to_owned()
    };
    let [one, two] = [(); 2].map(|()| host.add_unit(SmmuV3Unit::new(SmmuV3UnitConfig::default())));
    let names = [add("nvme", one, 1), add("edu", two, 2), add("nic", one, 3)];
    let facts = survey(&*host, &names).unwrap();
    assert_eq!([0, 1, 2].map(|index: usize| facts[index].smmu), [Some(0), Some(1), Some(0)]);
    assert_eq!(host.live_objects(), 0);
    assert!(matches!(Offer::new(&facts), Err(OfferError::TwoSmmus(..))));
    assert!(Offer::new(&[facts[0].clone(), facts[2].clone()]).is_ok());
}
