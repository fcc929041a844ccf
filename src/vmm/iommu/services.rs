// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which services the guest may be offered of assigned devices: those that the host says a device
//! has, and that the virtual IOMMU in front of it offers.

use std::collections::BTreeMap;

use super::host::{failed, BoundDevice};
use crate::devices::HostServices;
use crate::pci::PasidCapabilities;
use crate::Result;
use twostage::iommufd::HwInfo;
use twostage::nesting::survey::makes_page_requests;
use twostage::spec::pci::Bdf;

/// What a virtual IOMMU offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offered {
    /// Width of PASIDs, in bits; 0 for none.
    pub pasid_bits: u8,
    /// Device TLBs.
    pub ats: bool,
    /// Page requests.
    pub pri: bool,
}

/// Of each assigned device, what its host says.
#[derive(Debug, Default)]
pub(super) struct AssignedServices(BTreeMap<Bdf, (HwInfo, bool)>);

impl AssignedServices {
    /// Asks the hosts of `devices`, none of which is attached to anything. Whether they make page
    /// requests is asked only if `pri`: that takes an attachment, of no memory.
    ///
    /// # Errors
    /// A host does not answer.
    pub fn of(devices: &[BoundDevice], pri: bool) -> Result<Self> {
        let ask = |BoundDevice { bdf, dev, host }: &BoundDevice| {
            let info = host.verbs.get_hw_info(*dev)?;
            Ok((*bdf, (info, pri && makes_page_requests(&*host.verbs, *dev)?)))
        };
        let assigned = devices.iter().filter(|device| device.host.is_kernel());
        let answers = assigned.map(ask).collect::<twostage::iommufd::Result<_>>();
        answers.map(Self).map_err(failed("the services of an assigned device"))
    }

    /// Those of the device at `bdf` behind a virtual IOMMU with `offered`; none of another one.
    pub fn behind(&self, bdf: Bdf, offered: Offered) -> HostServices {
        let answer = self.0.get(&bdf);
        answer.map_or_else(HostServices::default, |(info, pri)| services(info, *pri, offered))
    }
}

fn services(info: &HwInfo, pri: bool, offered: Offered) -> HostServices {
    let bits = info.max_pasid_log2.min(offered.pasid_bits);
    let pasid = PasidCapabilities::new()
        .with_max_width(bits)
        .with_execute_permission(info.capabilities.pci_pasid_exec())
        .with_privileged_mode(info.capabilities.pci_pasid_priv());
    let ats = offered.ats && !info.capabilities.pci_ats_not_supported();
    HostServices { pasid: (bits > 0).then_some(pasid), ats, pri: ats && offered.pri && pri }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::iommufd::{HwCapabilities, HwInfoData};

    #[test]
    fn a_service_needs_the_device_and_the_virtual_iommu() {
        let info = |bits, capabilities| {
            let info = HwInfo::new(HwInfoData::None).with_capabilities(capabilities);
            info.with_max_pasid_log2(bits)
        };
        let all = Offered { pasid_bits: 8, ats: true, pri: true };
        let able = HwCapabilities::new().with_pci_pasid_priv(true);
        let got = services(&info(16, able), true, all);
        let pasid = PasidCapabilities::new().with_max_width(8).with_privileged_mode(true);
        assert_eq!(got, HostServices { pasid: Some(pasid), ats: true, pri: true });
        let width = |bits, offered| services(&info(bits, able), true, offered).pasid;
        assert_eq!(width(5, all).map(|pasid| pasid.max_width()), Some(5));
        assert_eq!([width(0, all), width(16, Offered { pasid_bits: 0, ..all })], [None, None]);
        let without = HwCapabilities::new().with_pci_ats_not_supported(true);
        for (capabilities, pri, offered, expected) in [
            (without, true, all, (false, false)),
            (able, true, Offered { ats: false, ..all }, (false, false)),
            (able, false, all, (true, false)),
            (able, true, Offered { pri: false, ..all }, (true, false)),
        ] {
            let got = services(&info(16, capabilities), pri, offered);
            assert_eq!((got.ats, got.pri), expected);
        }
    }
}
