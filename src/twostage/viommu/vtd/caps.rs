// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! CAP and ECAP for a configuration.

use std::collections::BTreeMap;

use super::config::{ConfigError, VtdConfig};
use crate::spec::vtd::regs::{Cap, Ecap};

/// Location of the IVA and IOTLB registers, in units of 16 bytes.
const IRO: u16 = 0x10;
/// Location of the fault recording registers, in units of 16 bytes.
const FRO: u16 = 0x22;
/// The largest invalidation of interrupt entries: half of the largest table.
const MHMV: u8 = 15;
/// The largest page-selective invalidation: 1 GiB.
const MAMV: u8 = 18;

/// The capability registers of a virtual VT-d.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// The capability registers for this configuration.
    ///
    /// # Errors
    /// The configuration is impossible ([`VtdConfig::check`]).
    pub fn capabilities(&self) -> Result<Capabilities, ConfigError> {
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
            .with_mgaw(self.address_width - 1)
            .with_zlr(true)
            .with_fro(FRO)
            .with_sslps(if self.second_stage { 0b11 } else { 0 })
            .with_psi(true)
            // `check` limits the number to 1 to 128.
            .with_nfr((self.fault_records - 1) as u8)
            .with_mamv(MAMV)
            .with_dwd(true)
            .with_drd(true)
            .with_fs1gp(self.scalable_mode && self.first_stage_1g)
            .with_fs5lp(self.scalable_mode && five_level)
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
            .with_srs(self.scalable_mode && self.supervisor_requests)
            .with_eafs(self.scalable_mode && self.extended_accessed)
            .with_pasid(self.pasid_bits > 0)
            // No page request is ever pending, so a wait has none to drain.
            .with_pds(self.scalable_mode)
            .with_pss(self.pasid_bits.saturating_sub(1))
            .with_smts(self.scalable_mode)
            .with_ssts(self.scalable_mode && self.second_stage)
            .with_fsts(self.scalable_mode)
            .with_smpwcs(self.scalable_mode && self.coherent_walks)
            .with_rps(self.scalable_mode);
        Ok(Capabilities { cap, ecap })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn the_registers_fit_the_page() {
        let config = VtdConfig { fault_records: 128, ..Default::default() };
        let cap = config.capabilities().unwrap().cap;
        let end = cap.fault_record_offset() + 16 * cap.fault_records();
        assert!(end <= super::super::MMIO_SIZE);
    }

    #[test]
    fn fifty_seven_bits_are_five_levels() {
        let config = VtdConfig { address_width: 57, second_stage: true, ..Default::default() };
        let Capabilities { cap, .. } = config.capabilities().unwrap();
        assert!(cap.fs5lp() && cap.sagaw() == 0b1110 && cap.guest_address_width() == 57);
    }

    #[test]
    fn legacy_only_offers_nothing_of_scalable_mode() {
        let config = VtdConfig {
            scalable_mode: false,
            second_stage: true,
            pasid_bits: 0,
            ..Default::default()
        };
        let Capabilities { cap, ecap, .. } = config.capabilities().unwrap();
        assert!(!ecap.smts() && !ecap.fsts() && !ecap.ssts() && !ecap.pasid() && !ecap.rps());
        assert!(!ecap.pds());
        assert!(!cap.fs1gp() && cap.sslps() == 3);
    }
}
