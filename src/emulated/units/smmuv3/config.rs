// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The abilities of an emulated SMMUv3, and the registers that report them.

use std::ops::RangeInclusive;

use crate::units::engine::CacheSizes;
use crate::units::page_requests::MAX_GROUPS;
use twostage::iommufd::iommu_hw_info_arm_smmuv3;
use twostage::spec::smmuv3::regs::{
    Aidr, Httu, Idr0, Idr1, Idr3, Idr5, Iidr, STALL_NONE, STALL_OR_TERMINATE,
};
use twostage::spec::smmuv3::translation::Granule;
use twostage::spec::smmuv3::{address_size, ADDRESS_WIDTH};

/// Entries of each device TLB.
const DEVICE_TLB: usize = 128;

/// Bits of the widest SubstreamID.
const MAX_SSID_BITS: u8 = 20;

/// The abilities and cache sizes of an emulated SMMUv3.
///
/// ASIDs and VMIDs have 16 bits.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SmmuV3UnitConfig {
    /// Size of its addresses in bits: 32, 36, 40, 42, 44, 48 or 52 (IDR5.OAS); other values are
    /// rounded down. It is also the size of guest addresses.
    pub address_width: u8,
    /// Virtual addresses of 52 bits with the 64K granule (IDR5.VAX).
    pub va_52: bool,
    /// Granules (IDR5.GRAN4K, GRAN16K, GRAN64K).
    pub granules: Vec<Granule>,
    /// Width of a SubstreamID in bits, at most 20 (IDR1.SSIDSIZE); 0 for none.
    pub ssid_bits: u8,
    /// Context descriptor tables of two levels (IDR0.CD2L).
    pub two_level_cd: bool,
    /// Invalidation by range (IDR3.RIL).
    pub range_invalidation: bool,
    /// Has ATS (IDR0.ATS). A device of this process has a TLB while its ATS is enabled
    /// ([`DeviceControl::set_device_tlb`](crate::DeviceControl::set_device_tlb)) and, if stage 1 is
    /// the user's, the user's stream table entry allows it (EATS).
    pub ats: bool,
    /// Takes page requests, if it has ATS (IDR0.PRI). Linux 7.2's driver refuses all of them and
    /// supports only devices that stall, which PCI devices must not; here it serves page requests.
    pub page_requests: bool,
    /// Stalls faulting transactions where the user's stage 1 says so (IDR0.STALL_MODEL = 0b00), of
    /// devices that can be stalled ([`DeviceConfig::stalls`](crate::DeviceConfig::stalls)): those
    /// of others are terminated, as §3.12 allows.
    pub stalls: bool,
    /// The flags it sets in descriptors of stage 1 that it uses (IDR0.HTTU). With the dirty state,
    /// the host tracks dirty pages, as far as Linux's driver does: in page tables of stage 1.
    pub httu: Httu,
    /// Both stages at once (IDR0.S1P with S2P): user-owned stage 1 on the host's stage 2.
    pub nesting: bool,
    /// Stage 2 forces write-back (IDR3.FWB). Without this and `canwbs` Linux creates no vIOMMUs.
    pub s2fwb: bool,
    /// Firmware says that DMA is coherent whatever attributes a device requests (IORT's CANWBS).
    pub canwbs: bool,
    /// Guest addresses, in bytes, that are doorbells of interrupt controllers: a write that stage 1
    /// sends there, and that stage 2 does not map, is an interrupt message.
    pub msi_doorbell: Option<RangeInclusive<u64>>,
    /// Entries of the IOTLB, rounded up to a power of two; 0 for no IOTLB.
    pub iotlb_entries: usize,
    /// Entries of the cache of table descriptors, likewise.
    pub paging_structure_entries: usize,
    /// Entries of the cache of stage-2 translations, likewise.
    pub stage2_entries: usize,
    /// Compares every translation with context descriptors and tables when it is used, and reports
    /// missing invalidations
    /// ([`SmmuV3Unit::sanitizer_report`](super::SmmuV3Unit::sanitizer_report)). Slow.
    pub sanitize: bool,
}

impl Default for SmmuV3UnitConfig {
    /// A recent unit with 48 bits: everything except virtual addresses of 52 bits, ATS, page
    /// requests, stalls and a doorbell.
    fn default() -> Self {
        Self {
            address_width: 48,
            va_52: false,
            granules: Granule::ALL.to_vec(),
            ssid_bits: 16,
            two_level_cd: true,
            range_invalidation: true,
            ats: false,
            page_requests: false,
            httu: Httu::Dirty,
            stalls: false,
            nesting: true,
            s2fwb: true,
            canwbs: false,
            msi_doorbell: None,
            iotlb_entries: 4096,
            paging_structure_entries: 1024,
            stage2_entries: 1024,
            sanitize: false,
        }
    }
}

impl SmmuV3UnitConfig {
    twostage::setters! {
        with_address_width address_width: u8;
        with_va_52 va_52: bool;
        with_granules granules: Vec<Granule>;
        with_ssid_bits ssid_bits: u8;
        with_two_level_cd two_level_cd: bool;
        with_range_invalidation range_invalidation: bool;
        with_ats ats: bool;
        with_page_requests page_requests: bool;
        with_httu httu: Httu;
        with_stalls stalls: bool;
        with_nesting nesting: bool;
        with_s2fwb s2fwb: bool;
        with_canwbs canwbs: bool;
        with_msi_doorbell msi_doorbell: Option<RangeInclusive<u64>>;
        with_iotlb_entries iotlb_entries: usize;
        with_paging_structure_entries paging_structure_entries: usize;
        with_stage2_entries stage2_entries: usize;
        with_sanitize sanitize: bool;
    }

    /// IDR5.OAS: the size of addresses.
    fn oas(&self) -> u8 {
        let fits = |bits: &u8| address_size(*bits).is_some_and(|size| size <= self.address_width);
        (0..=7).rev().find(fits).unwrap_or_default()
    }

    /// Size of addresses in bits.
    pub(crate) fn output_bits(&self) -> u8 {
        address_size(self.oas()).unwrap_or(ADDRESS_WIDTH)
    }

    /// Width of a SubstreamID in bits.
    pub(crate) fn ssid_bits(&self) -> u8 {
        self.ssid_bits.min(MAX_SSID_BITS)
    }

    /// Whether it takes page requests, which needs ATS (§6.3.1).
    pub(crate) fn page_requests(&self) -> bool {
        self.page_requests && self.ats
    }

    /// The flags it sets, which are those of stage 1.
    pub(crate) fn httu(&self) -> Httu {
        if self.nesting {
            self.httu
        } else {
            Httu::None
        }
    }

    /// Whether it supports this granule.
    pub(crate) fn has_granule(&self, granule: Granule) -> bool {
        self.granules.contains(&granule)
    }

    /// Width of the widest virtual addresses of this granule, in bits.
    pub(super) fn input_bits(&self, granule: Granule) -> u8 {
        match granule {
            Granule::K64 if self.va_52 => 52,
            _ => 48,
        }
    }

    /// Its cache sizes.
    pub(super) fn cache_sizes(&self) -> CacheSizes {
        CacheSizes {
            iotlb: self.iotlb_entries,
            paging_structures: self.paging_structure_entries,
            stage2: self.stage2_entries,
            device_tlb: if self.ats { DEVICE_TLB } else { 0 },
        }
    }

    /// The result of GET_HW_INFO: the identification registers.
    pub(crate) fn info(&self) -> iommu_hw_info_arm_smmuv3 {
        let idr0 = Idr0::new()
            .with_s2p(true)
            .with_s1p(self.nesting)
            .with_ttf(0b10)
            .with_cohacc(true)
            .with_httu(self.httu().into_bits())
            .with_ats(self.ats)
            .with_pri(self.page_requests())
            .with_asid16(true)
            .with_vmid16(true)
            .with_msi(true)
            .with_cd2l(self.two_level_cd)
            .with_ttendian(0b10)
            .with_stall_model(if self.stalls { STALL_OR_TERMINATE } else { STALL_NONE })
            .with_term_model(true)
            .with_st_level(0b01);
        let idr1 = Idr1::new()
            .with_sidsize(16)
            .with_ssidsize(self.ssid_bits())
            .with_cmdqs(19)
            .with_eventqs(19)
            .with_attr_types_ovr(true);
        let idr3 = Idr3::new().with_ril(self.range_invalidation).with_fwb(self.s2fwb);
        let idr5 = Idr5::new()
            .with_oas(self.oas())
            .with_gran4k(self.has_granule(Granule::K4))
            .with_gran16k(self.has_granule(Granule::K16))
            .with_gran64k(self.has_granule(Granule::K64))
            .with_vax(self.va_52.into())
            .with_stall_max(if self.stalls { MAX_GROUPS } else { 0 });
        iommu_hw_info_arm_smmuv3 {
            idr: [idr0.into_bits(), idr1.into_bits(), 0, idr3.into_bits(), 0, idr5.into_bits()],
            iidr: Iidr::new().into_bits(),
            // SMMUv3.2.
            aidr: Aidr::new().with_minor(2).into_bits(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_size_that_the_register_can_say() {
        for (width, size) in [(52, 52), (51, 48), (48, 48), (40, 40), (33, 32), (0, 32), (255, 52)]
        {
            let config = SmmuV3UnitConfig { address_width: width, ..Default::default() };
            assert_eq!(config.output_bits(), size, "{width}");
        }
    }

    #[test]
    fn the_registers_say_what_the_configuration_says() {
        let config = SmmuV3UnitConfig {
            granules: vec![Granule::K64],
            va_52: true,
            s2fwb: false,
            ssid_bits: 30,
            ..Default::default()
        };
        let info = config.info();
        let idr5 = Idr5::from_bits(info.idr[5]);
        assert_eq!((idr5.oas(), idr5.vax()), (5, 1));
        assert!(idr5.gran64k() && !idr5.gran4k() && !idr5.gran16k());
        assert!(!Idr3::from_bits(info.idr[3]).fwb());
        assert_eq!(Idr1::from_bits(info.idr[1]).ssidsize(), 20);
        let idr0 = Idr0::from_bits(info.idr[0]);
        assert_eq!((idr0.stall_model(), idr0.httu()), (1, 2));
    }
}
