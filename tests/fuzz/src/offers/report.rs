// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is reported of devices, whatever a host says of them.

use std::ops::RangeInclusive;

use twostage::iommufd::{
    iommu_hw_info_arm_smmuv3, iommu_hw_info_vtd, Errno, Extensions, HostError, HwCapabilities,
    HwInfo, HwInfoData, ObjectId, Verb,
};
use twostage::nesting::survey::{DeviceFacts, NestingReport, OfferKind};

use super::common::{ABLE_SMMU, ABLE_VTD};
use super::{bit, near};
use crate::input::Input;

/// Facts of some devices, which need not fit together.
pub fn raw(input: &mut Input<'_>) {
    let count = input.byte() % 4;
    let kind = input.byte();
    let facts: Vec<_> = (0..count).map(|number| facts(input, kind, number)).collect();
    check(&NestingReport::new(&facts), &facts);
}

fn facts(input: &mut Input<'_>, kind: u8, number: u8) -> DeviceFacts {
    // Mostly all of one kind.
    let kind = if input.one_in(8) { input.byte() } else { kind };
    let flags = if input.one_in(4) { input.byte().into() } else { 0 };
    let data = match kind % 8 {
        0..=2 => HwInfoData::Vtd(iommu_hw_info_vtd {
            flags,
            cap_reg: near(input, ABLE_VTD[0]),
            ecap_reg: near(input, ABLE_VTD[1]),
            ..Default::default()
        }),
        3..=5 => {
            let [idr @ .., aidr] = ABLE_SMMU.map(|word| near(input, word.into()) as u32);
            HwInfoData::ArmSmmuV3(iommu_hw_info_arm_smmuv3 {
                flags,
                idr,
                aidr,
                ..Default::default()
            })
        }
        6 => HwInfoData::Other(input.byte().into()),
        _ => HwInfoData::None,
    };
    let capabilities = HwCapabilities::from_bits(input.byte().into());
    let of = Extensions::default()
        .with_guest_second_stage(input.flag())
        .with_fault_reports(input.flag())
        .with_table_updates(input.flag())
        .with_smmu_faults(input.flag());
    let refusal = input
        .one_in(8)
        .then(|| HostError::new(Verb::HwptAlloc, ObjectId(number.into()), Errno::EOPNOTSUPP, ""));
    DeviceFacts {
        name: format!("device {number}"),
        info: HwInfo::new(data)
            .with_capabilities(capabilities)
            .with_max_pasid_log2(input.byte() % 21),
        extensions: of,
        refusal,
        dirty_nesting: input.flag(),
        page_requests: input.flag(),
        iovas: ranges(input),
        reserved: ranges(input),
        smmu: matches!(data, HwInfoData::ArmSmmuV3(_)).then(|| usize::from(input.one_in(6))),
    }
}

/// Ascending ranges of IOVAs, mostly what Linux says.
fn ranges(input: &mut Input<'_>) -> Vec<RangeInclusive<u64>> {
    let mut next = Some(0_u64);
    let mut all = Vec::new();
    for _ in 0..input.byte() % 4 {
        let Some(start) = next.and_then(|next| next.checked_add(input.number())) else { break };
        let end = start.saturating_add(input.number());
        all.push(start..=end);
        // Neighbours would be one range.
        next = end.checked_add(2);
    }
    all
}

/// What is said of one device is in its facts, and what is offered is there in all of them.
pub fn check(report: &NestingReport, facts: &[DeviceFacts]) {
    assert_eq!(report.devices.len(), facts.len());
    assert_ne!(report.offer.is_some(), report.no_offer.is_some(), "{report}");
    for (device, facts) in report.devices.iter().zip(facts) {
        assert_eq!(device.name, facts.name);
        assert_eq!(device.nesting.is_none(), facts_refuse(facts));
        assert!(device.nesting.is_some() || device.stage1_formats.is_empty());
        assert_eq!(device.cannot_nest.is_some(), facts.refusal.is_some());
        assert!(device.pasids.bits <= facts.info.max_pasid_log2);
        assert!(device.ats || !device.page_requests);
        assert_eq!(device.reserved.len(), facts.reserved.len());
    }
    let text = report.to_string();
    assert!(report.devices.iter().all(|device| text.contains(&device.name)));
    serde_json::to_string(report).expect("JSON of any report");
    let smmus = facts.iter().filter(|it| matches!(it.info.data, HwInfoData::ArmSmmuV3(_))).count();
    let vtds = facts.iter().filter(|it| matches!(it.info.data, HwInfoData::Vtd(_))).count();
    if let Some(offer) = &report.offer {
        assert!(facts.iter().all(|device| device.refusal.is_none()));
        let of_kind = if offer.kind == OfferKind::Vtd { vtds } else { smmus };
        assert!(of_kind == facts.len() && of_kind > 0, "{report}");
        assert!(facts.iter().all(|device| device.smmu == facts[0].smmu));
        assert_eq!(offer.ats, facts.iter().any(ats) && facts.iter().all(takes_ats));
        assert!(offer.no_page_requests.is_some() || offer.ats);
        assert_eq!(offer.dirty_tracking, facts.iter().all(|device| device.dirty_nesting));
        assert!(report.mirrored.is_none());
    }
    if let Some(mirrored) = &report.mirrored {
        assert!(smmus == 0 && !facts.is_empty() && mirrored.kind == OfferKind::Vtd);
        assert!(!mirrored.ats && mirrored.no_page_requests.is_some());
        for device in facts {
            assert!(mirrored.pasid_bits <= device.info.max_pasid_log2);
            let reaches = (1_u128 << mirrored.address_bits) - 1;
            let last = device.iovas.last().map_or(0, |range| *range.end());
            assert!(reaches <= u128::from(last), "{} bits, up to {last:#x}", mirrored.address_bits);
        }
    }
}

/// A device that cannot nest, or whose IOMMU no virtual one is like.
fn facts_refuse(facts: &DeviceFacts) -> bool {
    let known = matches!(facts.info.data, HwInfoData::Vtd(_) | HwInfoData::ArmSmmuV3(_));
    facts.refusal.is_some() || !known
}

fn ats(device: &DeviceFacts) -> bool {
    !device.info.capabilities.pci_ats_not_supported()
}

/// ECAP.DT; the kernel does not say of an SMMU.
fn takes_ats(device: &DeviceFacts) -> bool {
    match device.info.data {
        HwInfoData::Vtd(vtd) => bit(vtd.ecap_reg, 2),
        _ => true,
    }
}
