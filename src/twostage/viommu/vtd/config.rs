// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a virtual VT-d.

use crate::spec::pci::Pasid;

/// Size of the register page, in bytes.
pub const MMIO_SIZE: u64 = 0x1000;

/// The maximum number of fault recording registers in the register page.
const MAX_FAULT_RECORDS: u16 = 128;

/// What the virtual VT-d offers to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VtdConfig {
    /// Width of IOVAs in bits: 48, or 57 for 5-level tables.
    pub address_width: u8,
    /// Width of PASIDs in bits, 0 for none, at most 20.
    pub pasid_bits: u8,
    /// Offer scalable mode, including first-stage tables.
    pub scalable_mode: bool,
    /// Offer second-stage tables owned by the guest: legacy mode, and PGTT second-stage. Only
    /// possible on a host that walks them on top of its own.
    pub second_stage: bool,
    /// Caching mode: the guest also invalidates entries that become present or valid. Without it,
    /// the tables are read again for each request that they blocked, so the host has to ask before
    /// it fails one ([`crate::iommufd::Extensions::fault_reports`]).
    pub caching_mode: bool,
    /// Offer device-TLBs (ATS).
    pub device_iotlb: bool,
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

/// Default PASID width. With wider PASIDs, invalidating all of a large PASID directory costs the
/// host a look at as many entries.
pub(super) const DEFAULT_PASID_BITS: u8 = 8;

impl Default for VtdConfig {
    fn default() -> Self {
        Self {
            address_width: 48,
            pasid_bits: DEFAULT_PASID_BITS,
            scalable_mode: true,
            second_stage: false,
            caching_mode: true,
            device_iotlb: false,
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
pub enum ConfigError {
    /// The address width is neither 48 nor 57.
    #[error("address width {0} is not supported; it is 48 or 57")]
    AddressWidth(u8),
    /// A PASID has at most 20 bits.
    #[error("{0} PASID bits are too many; the most is {max}", max = Pasid::BITS)]
    PasidBits(u8),
    /// PASIDs belong to scalable mode.
    #[error("PASIDs need scalable mode; set the PASID bits to 0 or turn scalable mode on")]
    PasidWithoutScalableMode,
    /// There would be no kind of translation.
    #[error("neither scalable mode nor second-stage tables are on; nothing could be translated")]
    NoTranslation,
    /// The number of fault recording registers is out of range.
    #[error("{0} fault records are not possible; from 1 to {MAX_FAULT_RECORDS} are")]
    FaultRecords(u16),
}

impl VtdConfig {
    /// Whether the settings are consistent.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !matches!(self.address_width, 48 | 57) {
            return Err(ConfigError::AddressWidth(self.address_width));
        }
        if u32::from(self.pasid_bits) > Pasid::BITS {
            return Err(ConfigError::PasidBits(self.pasid_bits));
        }
        if self.pasid_bits > 0 && !self.scalable_mode {
            return Err(ConfigError::PasidWithoutScalableMode);
        }
        if !self.scalable_mode && !self.second_stage {
            return Err(ConfigError::NoTranslation);
        }
        if !(1..=MAX_FAULT_RECORDS).contains(&self.fault_records) {
            return Err(ConfigError::FaultRecords(self.fault_records));
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
        assert_eq!(with(|c| c.address_width = 39), ConfigError::AddressWidth(39));
        assert_eq!(with(|c| c.pasid_bits = 21), ConfigError::PasidBits(21));
        assert_eq!(with(|c| c.scalable_mode = false), ConfigError::PasidWithoutScalableMode);
        let nothing = |c: &mut VtdConfig| (c.scalable_mode, c.pasid_bits) = (false, 0);
        assert_eq!(with(nothing), ConfigError::NoTranslation);
        assert_eq!(with(|c| c.fault_records = 0), ConfigError::FaultRecords(0));
        assert_eq!(with(|c| c.fault_records = 129), ConfigError::FaultRecords(129));
    }
}
