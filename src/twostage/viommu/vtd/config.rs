// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a virtual VT-d, and the CAP and ECAP for it.

use std::collections::BTreeMap;

use crate::spec::pci::Pasid;
use crate::spec::vtd::qi::{Descriptor, InterruptEntryScope, IotlbScope};
use crate::spec::vtd::regs::{Cap, Ecap, IqErrorInfo};

/// Size of the register page, in bytes.
pub const MMIO_SIZE: u64 = 0x1000;

/// The maximum number of fault recording registers in the register page.
const MAX_FAULT_RECORDS: u16 = 128;
/// Location of the IVA and IOTLB registers, in units of 16 bytes.
const IRO: u16 = 0x10;
/// Location of the fault recording registers, in units of 16 bytes.
const FRO: u16 = 0x22;
/// The largest invalidation of interrupt entries: half of the largest table.
const MHMV: u8 = 15;
/// The largest page-selective invalidation: 1 GiB.
const MAMV: u8 = 18;

/// What the virtual VT-d offers to the guest.
///
/// ```
/// use twostage::viommu::vtd::VtdConfig;
///
/// let config = VtdConfig::default().with_address_width(57).with_interrupt_remapping(true);
/// config.check()?;
/// assert!(config.with_pasid_bits(Some(21)).check().is_err());
/// # Ok::<(), twostage::viommu::vtd::VtdConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct VtdConfig {
    /// Width of IOVAs in bits: 48, or 57 for 5-level tables.
    pub address_width: u8,
    /// Width of the IOVAs that are translated (MGAW), 32 or more, if that is less: where tables are
    /// mirrored, hosts may map fewer than tables have. `None`: all.
    #[cfg_attr(feature = "serde", serde(default))]
    pub iova_bits: Option<u8>,
    /// Width of PASIDs in bits, at most 20, 0 for none. `None`: as many as the hosts have, at most
    /// 8, as the host looks at every entry when all of a large PASID directory is invalidated.
    pub pasid_bits: Option<u8>,
    /// Offer scalable mode, including first-stage tables.
    pub scalable_mode: bool,
    /// Offer first-stage tables (FSTS). `None`: in scalable mode, but not mirrored ones, as guests
    /// need not invalidate first-stage entries that become present, not even in caching mode, and
    /// Linux does not. `Some(true)` is for guests that do, where tables are mirrored. Mirrors have
    /// only the lower half of a first stage's addresses: DMA to the upper one faults.
    #[cfg_attr(feature = "serde", serde(default))]
    pub first_stage: Option<bool>,
    /// Offer second-stage tables owned by the guest: legacy mode, and PGTT second-stage. Only
    /// possible on a host that walks them on top of its own.
    pub second_stage: bool,
    /// Offer nested translation (NEST): the guest's first-stage tables over its second-stage ones,
    /// for a guest that is a host itself; with it, accessed and dirty flags in second-stage tables
    /// (SSADS) where walks are coherent. Needs `second_stage`, and the same hosts.
    pub nest: bool,
    /// Caching mode: the guest also invalidates entries that become present or valid. Without it,
    /// the tables are read again for each request that they blocked, so the host has to ask before
    /// it fails one ([`crate::iommufd::Extensions::fault_reports`]).
    pub caching_mode: bool,
    /// Offer device-TLBs (ATS).
    pub device_iotlb: bool,
    /// Offer page requests (PRS), which need `device_iotlb`, scalable mode and first-stage tables:
    /// devices ask for pages that are not there, and the guest brings them.
    #[cfg_attr(feature = "serde", serde(default))]
    pub page_requests: bool,
    /// Offer interrupt remapping, with 32-bit destinations (IR, EIM).
    pub interrupt_remapping: bool,
    /// Offer 1 GiB first-stage pages.
    pub first_stage_1g: bool,
    /// Offer supervisor requests (SRS).
    pub supervisor_requests: bool,
    /// Offer the extended accessed flag (EAFS).
    pub extended_accessed: bool,
    /// Offer control of snooping (SC).
    pub snoop_control: bool,
    /// Tell the guest that page walks are coherent (SMPWCS).
    pub coherent_walks: bool,
    /// Number of fault recording registers, 1 to 128.
    pub fault_records: u16,
}

/// The most PASID bits that nobody requested.
const DEFAULT_PASID_BITS: u8 = 8;

impl Default for VtdConfig {
    fn default() -> Self {
        Self {
            address_width: 48,
            iova_bits: None,
            pasid_bits: None,
            scalable_mode: true,
            first_stage: None,
            second_stage: false,
            nest: false,
            caching_mode: true,
            device_iotlb: false,
            page_requests: false,
            interrupt_remapping: false,
            first_stage_1g: true,
            supervisor_requests: true,
            extended_accessed: true,
            snoop_control: true,
            coherent_walks: true,
            fault_records: 8,
        }
    }
}

/// An invalid configuration of a virtual VT-d.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VtdConfigError {
    /// The address width is neither 48 nor 57.
    #[error("address width {0} is not supported; it is 48 or 57")]
    AddressWidth(u8),
    /// IOVAs are narrower than any host maps, or wider than tables.
    #[error("IOVAs of {bits} bits are not supported; from 32 to {width} are")]
    IovaBits {
        /// What was requested.
        bits: u8,
        /// The address width.
        width: u8,
    },
    /// A PASID has at most 20 bits.
    #[error("{0} PASID bits are too many; the most is {max}", max = Pasid::BITS)]
    PasidBits(u8),
    /// PASIDs belong to scalable mode.
    #[error("PASIDs need scalable mode; set the PASID bits to 0 or turn scalable mode on")]
    PasidWithoutScalableMode,
    /// There would be no kind of translation.
    #[error("neither first-stage nor second-stage tables are on; nothing could be translated")]
    NoTranslation,
    /// Nested translation is of scalable mode, and has two stages.
    #[error("nested translation needs scalable mode and tables of both stages; turn them on")]
    NestWithoutStages,
    /// Only devices with device-TLBs make page requests, and only through the first stage.
    #[error(
        "page requests need device-TLBs, scalable mode and first-stage tables; turn these on, or \
         page requests off"
    )]
    PageRequestsAlone,
    /// The number of fault recording registers is out of range.
    #[error("{0} fault records are not possible; from 1 to {MAX_FAULT_RECORDS} are")]
    FaultRecords(u16),
}

impl VtdConfig {
    setters! {
        with_address_width address_width: u8;
        with_iova_bits iova_bits: Option<u8>;
        with_pasid_bits pasid_bits: Option<u8>;
        with_scalable_mode scalable_mode: bool;
        with_first_stage first_stage: Option<bool>;
        with_second_stage second_stage: bool;
        with_nest nest: bool;
        with_caching_mode caching_mode: bool;
        with_device_iotlb device_iotlb: bool;
        with_page_requests page_requests: bool;
        with_interrupt_remapping interrupt_remapping: bool;
        with_first_stage_1g first_stage_1g: bool;
        with_supervisor_requests supervisor_requests: bool;
        with_extended_accessed extended_accessed: bool;
        with_snoop_control snoop_control: bool;
        with_coherent_walks coherent_walks: bool;
        with_fault_records fault_records: u16;
    }

    /// Whether the settings are consistent.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&self) -> Result<(), VtdConfigError> {
        if !matches!(self.address_width, 48 | 57) {
            return Err(VtdConfigError::AddressWidth(self.address_width));
        }
        let (bits, width) = (self.iova_width(), self.address_width);
        if !(32..=width).contains(&bits) {
            return Err(VtdConfigError::IovaBits { bits, width });
        }
        let pasid_bits = self.pasid_bits.unwrap_or(0);
        if u32::from(pasid_bits) > Pasid::BITS {
            return Err(VtdConfigError::PasidBits(pasid_bits));
        }
        if pasid_bits > 0 && !self.scalable_mode {
            return Err(VtdConfigError::PasidWithoutScalableMode);
        }
        if !self.has_first_stage() && !self.second_stage {
            return Err(VtdConfigError::NoTranslation);
        }
        if self.nest && !(self.has_first_stage() && self.second_stage) {
            return Err(VtdConfigError::NestWithoutStages);
        }
        if self.page_requests && !(self.device_iotlb && self.has_first_stage()) {
            return Err(VtdConfigError::PageRequestsAlone);
        }
        if !(1..=MAX_FAULT_RECORDS).contains(&self.fault_records) {
            return Err(VtdConfigError::FaultRecords(self.fault_records));
        }
        Ok(())
    }
}

/// The capability registers of a virtual VT-d.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// CAP.
    pub cap: Cap,
    /// ECAP.
    pub ecap: Ecap,
}

impl Capabilities {
    /// The registers by name, for reports.
    pub fn registers(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::from([("CAP", self.cap.into_bits()), ("ECAP", self.ecap.into_bits())])
    }
}

impl VtdConfig {
    /// Whether first-stage tables are offered.
    pub(super) fn has_first_stage(&self) -> bool {
        self.scalable_mode && self.first_stage != Some(false)
    }

    /// Width of the IOVAs that are translated, in bits.
    pub(crate) fn iova_width(&self) -> u8 {
        self.iova_bits.unwrap_or(self.address_width)
    }

    /// Width of PASIDs in bits, also if nobody requested one.
    pub(super) fn pasids(&self) -> u8 {
        match self.pasid_bits {
            Some(bits) => bits,
            None if self.scalable_mode => DEFAULT_PASID_BITS,
            None => 0,
        }
    }

    /// The capability registers for this configuration.
    ///
    /// # Errors
    /// The configuration is impossible ([`VtdConfig::check`]).
    pub fn capabilities(&self) -> Result<Capabilities, VtdConfigError> {
        self.check()?;
        let five_level = self.address_width == 57;
        // Bit 1: 39 bits, bit 2: 48, bit 3: 57. None without second-stage tables (§11.4.2); nothing
        // is translated in legacy mode then, and legacy-mode drivers leave such a unit alone.
        let sagaw = match (self.second_stage, five_level) {
            (false, _) => 0,
            (true, false) => 0b00110,
            (true, true) => 0b01110,
        };
        let cap = Cap::new()
            .with_nd(6)
            .with_cm(self.caching_mode)
            .with_sagaw(sagaw)
            .with_mgaw(self.iova_width() - 1)
            .with_zlr(true)
            .with_fro(FRO)
            .with_sslps(if self.second_stage { 0b11 } else { 0 })
            .with_psi(true)
            // `check` limits the number to 1 to 128.
            .with_nfr((self.fault_records - 1) as u8)
            .with_mamv(MAMV)
            .with_dwd(true)
            .with_drd(true)
            .with_fs1gp(self.has_first_stage() && self.first_stage_1g)
            .with_fs5lp(self.has_first_stage() && five_level)
            .with_esirtps(self.interrupt_remapping)
            .with_esrtps(true);
        let ecap = Ecap::new()
            .with_c(true)
            .with_qi(true)
            .with_dt(self.device_iotlb)
            .with_ir(self.interrupt_remapping)
            .with_eim(self.interrupt_remapping)
            .with_mhmv(if self.interrupt_remapping { MHMV } else { 0 })
            .with_pt(true)
            .with_sc(self.snoop_control)
            .with_iro(IRO)
            .with_nest(self.nest)
            .with_srs(self.has_first_stage() && self.supervisor_requests)
            .with_eafs(self.has_first_stage() && self.extended_accessed)
            .with_pasid(self.pasids() > 0)
            .with_prs(self.page_requests)
            // Without page requests, a wait has none to drain.
            .with_pds(self.scalable_mode)
            .with_pss(self.pasids().saturating_sub(1))
            .with_smts(self.scalable_mode)
            .with_ssads(self.nest && self.coherent_walks)
            .with_ssts(self.scalable_mode && self.second_stage)
            .with_fsts(self.has_first_stage())
            .with_smpwcs(self.scalable_mode && self.coherent_walks)
            .with_rps(self.scalable_mode);
        Ok(Capabilities { cap, ecap })
    }
}

impl Capabilities {
    /// Whether a unit with these accepts `descriptor`, in scalable mode or not.
    pub(super) fn check(self, scalable: bool, descriptor: &Descriptor) -> Result<(), IqErrorInfo> {
        let ecap = self.ecap;
        let supported = match descriptor {
            Descriptor::ContextCache(_) | Descriptor::Iotlb { .. } | Descriptor::Wait { .. } => {
                true
            }
            Descriptor::DeviceTlb { .. } => ecap.dt(),
            Descriptor::InterruptEntryCache(_) => ecap.ir(),
            Descriptor::PasidIotlb { .. } | Descriptor::PasidCache(_) => scalable,
            Descriptor::PasidDeviceTlb { .. } => scalable && ecap.dt(),
            Descriptor::PageGroupResponse { .. } => scalable && ecap.prs(),
        };
        if !supported {
            return Err(IqErrorInfo::InvalidType);
        }
        let reserved = match *descriptor {
            Descriptor::Iotlb { scope: IotlbScope::Pages { range, .. }, .. } => {
                range.mask > self.cap.mamv()
            }
            Descriptor::InterruptEntryCache(InterruptEntryScope::Index { mask, .. }) => {
                mask > ecap.mhmv()
            }
            Descriptor::Wait { drain_page_requests, .. } => drain_page_requests && !ecap.pds(),
            Descriptor::DeviceTlb { physical_function, .. }
            | Descriptor::PasidDeviceTlb { physical_function, .. } => {
                physical_function != 0 && !ecap.dit()
            }
            _ => false,
        };
        if reserved {
            return Err(IqErrorInfo::ReservedField);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_possible() {
        assert_eq!(VtdConfig::default().check(), Ok(()));
    }

    #[test]
    fn impossible_configurations_are_refused_by_name() {
        let with = |change: fn(&mut VtdConfig)| {
            let mut config = VtdConfig::default();
            change(&mut config);
            config.check().unwrap_err()
        };
        assert_eq!(with(|c| c.address_width = 39), VtdConfigError::AddressWidth(39));
        assert_eq!(with(|c| c.pasid_bits = Some(21)), VtdConfigError::PasidBits(21));
        let none_for_pasids =
            |c: &mut VtdConfig| (c.scalable_mode, c.pasid_bits) = (false, Some(1));
        assert_eq!(with(none_for_pasids), VtdConfigError::PasidWithoutScalableMode);
        assert_eq!(with(|c| c.scalable_mode = false), VtdConfigError::NoTranslation);
        let narrow = VtdConfigError::IovaBits { bits: 31, width: 48 };
        assert_eq!(with(|c| c.iova_bits = Some(31)), narrow);
        let wide = VtdConfigError::IovaBits { bits: 49, width: 48 };
        assert_eq!(with(|c| c.iova_bits = Some(49)), wide);
        let no_second = |c: &mut VtdConfig| (c.nest, c.second_stage) = (true, false);
        assert_eq!(with(no_second), VtdConfigError::NestWithoutStages);
        let no_first = |c: &mut VtdConfig| {
            (c.nest, c.second_stage, c.scalable_mode) = (true, true, false);
        };
        assert_eq!(with(no_first), VtdConfigError::NestWithoutStages);
        assert_eq!(with(|c| c.page_requests = true), VtdConfigError::PageRequestsAlone);
        assert_eq!(with(|c| c.fault_records = 0), VtdConfigError::FaultRecords(0));
        assert_eq!(with(|c| c.fault_records = 129), VtdConfigError::FaultRecords(129));
    }

    #[test]
    fn the_default_offers_nested_first_stage_only() {
        let Capabilities { cap, ecap, .. } = VtdConfig::default().capabilities().unwrap();
        assert!(ecap.smts() && ecap.fsts() && ecap.qi() && ecap.pt() && cap.cm());
        assert!(!ecap.ssts() && !ecap.nest() && !ecap.dt() && !ecap.ir() && !ecap.prs());
        assert!(ecap.pds());
        assert_eq!((cap.guest_address_width(), ecap.pasid_bits()), (48, 8));
        assert_eq!((cap.fault_records(), cap.fault_record_offset()), (8, 0x220));
        assert!(!cap.fs5lp());
        // A legacy-mode driver finds no usable width.
        assert_eq!((cap.sagaw(), cap.sslps()), (0, 0));
    }

    /// What Linux's driver looks at before it serves nested tables, and tracks dirty pages below
    /// them: NEST, SSTS, SSADS, SMPWCS; and FSTS, SRS and PASIDs for what its guest may have.
    #[test]
    fn nesting_offers_all_that_a_host_needs() {
        let config = VtdConfig { nest: true, second_stage: true, ..Default::default() };
        let Capabilities { cap, ecap } = config.capabilities().unwrap();
        assert!(ecap.nest() && ecap.ssts() && ecap.fsts() && ecap.ssads() && ecap.smpwcs());
        assert!(ecap.srs() && ecap.pasid() && ecap.pds() && cap.fs1gp());
        assert_eq!((cap.sagaw(), cap.sslps()), (0b00110, 0b11));
        // Flags that others are to see are written by walks that snoop.
        let Capabilities { ecap, .. } = config.with_coherent_walks(false).capabilities().unwrap();
        assert!(ecap.nest() && !ecap.ssads() && !ecap.smpwcs());
        let second = VtdConfig { second_stage: true, ..Default::default() };
        assert!(!second.capabilities().unwrap().ecap.ssads());
    }

    #[test]
    fn the_registers_fit_the_page() {
        let config = VtdConfig { fault_records: 128, ..Default::default() };
        let cap = config.capabilities().unwrap().cap;
        let end = cap.fault_record_offset() + 16 * cap.fault_records();
        assert!(end <= MMIO_SIZE);
    }

    #[test]
    fn fifty_seven_bits_are_five_levels() {
        let config = VtdConfig { address_width: 57, second_stage: true, ..Default::default() };
        let Capabilities { cap, .. } = config.capabilities().unwrap();
        assert!(cap.fs5lp() && cap.sagaw() == 0b1110 && cap.guest_address_width() == 57);
    }

    #[test]
    fn legacy_only_offers_nothing_of_scalable_mode() {
        let config = VtdConfig { scalable_mode: false, second_stage: true, ..Default::default() };
        let Capabilities { cap, ecap, .. } = config.capabilities().unwrap();
        assert!(!ecap.smts() && !ecap.fsts() && !ecap.ssts() && !ecap.pasid() && !ecap.rps());
        assert!(!ecap.pds());
        assert!(!cap.fs1gp() && cap.sslps() == 3);
    }
}
