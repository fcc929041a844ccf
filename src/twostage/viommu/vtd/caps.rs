// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! CAP and ECAP: what the configuration offers, and what every host unit can serve.
//!
//! Pure functions. Abilities that a guest can do without (1 GiB pages, the extended accessed flag)
//! are lowered to what every host unit has; those that were asked for by value (address width,
//! PASID bits) make an error that names the bit and the device.

use std::collections::BTreeMap;

use super::config::{ConfigError, VtdConfig};
use super::host_unit::HostUnit;
use crate::spec::vtd::regs::{Cap, Ecap};
use crate::viommu::CapabilityConflict;

/// Where the IVA and IOTLB registers stand, in 16 bytes.
const IRO: u16 = 0x10;
/// Where the fault recording registers stand, in 16 bytes.
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
    /// The registers by name, as reports show them.
    pub fn registers(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::from([("CAP", self.cap.into_bits()), ("ECAP", self.ecap.into_bits())])
    }
}

impl VtdConfig {
    /// The capability registers that offer this configuration.
    ///
    /// # Errors
    /// The configuration is impossible ([`VtdConfig::check`]).
    pub fn capabilities(&self) -> Result<Capabilities, ConfigError> {
        self.check()?;
        let five_level = self.address_width == 57;
        // Bit 1: 39 bits, bit 2: 48, bit 3: 57. None without second-stage tables (§11.4.2), where
        // nothing is translated in legacy mode: its drivers leave such a unit alone.
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
            // `check` bounds the number from 1 to 128.
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
            // No page request is ever pending, so that a wait has none to drain.
            .with_pds(self.scalable_mode)
            .with_pss(self.pasid_bits.saturating_sub(1))
            .with_smts(self.scalable_mode)
            .with_ssts(self.scalable_mode && self.second_stage)
            .with_fsts(self.scalable_mode)
            .with_smpwcs(self.scalable_mode && self.coherent_walks)
            .with_rps(self.scalable_mode);
        Ok(Capabilities { cap, ecap })
    }

    /// This configuration, lowered to what all of `hosts` can serve.
    ///
    /// # Errors
    /// A unit cannot serve what was asked for by value.
    pub fn intersect(&self, hosts: &[HostUnit]) -> Result<Self, CapabilityConflict> {
        self.require_pasids(hosts)?;
        let mut lowered = self.clone();
        for host in hosts {
            self.require(host)?;
            lowered.first_stage_1g &= host.cap.fs1gp();
            lowered.supervisor_requests &= host.ecap.srs();
            lowered.extended_accessed &= host.ecap.eafs();
            lowered.snoop_control &= host.ecap.sc();
            lowered.coherent_walks &= host.ecap.smpwcs();
        }
        Ok(lowered)
    }

    /// As many PASID bits as are offered, by the unit that has the fewest.
    fn require_pasids(&self, hosts: &[HostUnit]) -> Result<(), CapabilityConflict> {
        let least = hosts.iter().min_by_key(|host| host.ecap.pasid_bits());
        let Some(host) = least else { return Ok(()) };
        let (asked, has) = (self.pasid_bits, host.ecap.pasid_bits());
        if asked <= has {
            return Ok(());
        }
        Err(CapabilityConflict {
            device: host.device.clone(),
            bit: if has == 0 { "ECAP.PASID" } else { "ECAP.PSS" },
            needed_for: format!(
                "pasid-bits={asked} was asked for; say pasid-bits={has}, the most that all devices have"
            ),
        })
    }

    fn require(&self, host: &HostUnit) -> Result<(), CapabilityConflict> {
        let HostUnit { device, cap, ecap, guest_second_stage, fault_reports } = host;
        let conflict = |bit, needed_for: String| {
            Err(CapabilityConflict { device: device.clone(), bit, needed_for })
        };
        if self.scalable_mode && !ecap.smts() {
            return conflict(
                "ECAP.SMTS",
                "nested translation needs scalable mode; leave the device out".into(),
            );
        }
        if self.scalable_mode && !ecap.nest() {
            return conflict(
                "ECAP.NEST",
                "the guest's first-stage tables are nested; leave the device out".into(),
            );
        }
        if self.address_width == 57 && !cap.fs5lp() {
            return conflict("CAP.FS5LP", "aw=57 was asked for; say aw=48".into());
        }
        if self.address_width > cap.guest_address_width() {
            let (bits, has) = (self.address_width, cap.guest_address_width());
            let needed_for =
                format!("aw={bits} was asked for, and guest addresses have {has} bits there");
            return conflict("CAP.MGAW", needed_for);
        }
        if self.second_stage && !guest_second_stage {
            let needed_for = "second-stage=on was asked for; say second-stage=off";
            return conflict("guest_second_stage", needed_for.into());
        }
        if !self.caching_mode && !fault_reports {
            let needed_for = "caching-mode=off was asked for, and the host tells nobody of DMA that it \
                              blocks, so that tables that come to serve a device would not be read; say \
                              caching-mode=on";
            return conflict("fault_reports", needed_for.into());
        }
        if self.device_iotlb && !ecap.dt() {
            return conflict("ECAP.DT", "ats=on was asked for; say ats=off".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn able() -> HostUnit {
        HostUnit {
            device: "edu0".into(),
            cap: Cap::new().with_mgaw(56).with_fs1gp(true).with_fs5lp(true),
            ecap: Ecap::new()
                .with_smts(true)
                .with_nest(true)
                .with_pasid(true)
                .with_pss(19)
                .with_dt(true)
                .with_srs(true)
                .with_eafs(true)
                .with_sc(true)
                .with_smpwcs(true),
            guest_second_stage: true,
            fault_reports: true,
        }
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
        // A driver of legacy mode finds no width that it could use.
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

    #[test]
    fn pasid_bits_that_nobody_asked_for_are_what_there_is() {
        let has = |bits: u8| {
            let mut host = able();
            host.ecap = host.ecap.with_pasid(bits > 0).with_pss(bits.saturating_sub(1));
            host
        };
        assert_eq!(VtdConfig::usual_pasid_bits(&[]), VtdConfig::default().pasid_bits);
        for (hosts, bits) in [(vec![20], 8), (vec![20, 6], 6), (vec![0, 20], 0)] {
            let hosts: Vec<_> = hosts.into_iter().map(has).collect();
            let pasid_bits = VtdConfig::usual_pasid_bits(&hosts);
            assert_eq!(pasid_bits, bits);
            let config = VtdConfig { pasid_bits, ..Default::default() };
            assert_eq!(config.intersect(&hosts).map(|config| config.pasid_bits), Ok(bits));
        }
    }

    #[test]
    fn what_a_guest_can_do_without_is_lowered() {
        let config = VtdConfig { pasid_bits: 20, device_iotlb: true, ..Default::default() };
        assert_eq!(config.intersect(&[able()]), Ok(config.clone()));
        let mut poor = able();
        poor.cap.set_fs1gp(false);
        poor.ecap.set_eafs(false);
        let lowered = config.intersect(&[able(), poor]).unwrap();
        assert!(!lowered.first_stage_1g && !lowered.extended_accessed);
        assert!(lowered.supervisor_requests && lowered.snoop_control);
    }

    #[test]
    fn a_conflict_names_the_bit_and_the_device() {
        let config = VtdConfig {
            address_width: 57,
            pasid_bits: 20,
            device_iotlb: true,
            second_stage: true,
            caching_mode: false,
            ..Default::default()
        };
        type TakeAway = fn(&mut HostUnit);
        let lacking: [(TakeAway, &str); 9] = [
            (
                |host| host.ecap.set_smts(false),
                "ECAP.SMTS: nested translation needs scalable mode; leave the device out",
            ),
            (
                |host| host.ecap.set_nest(false),
                "ECAP.NEST: the guest's first-stage tables are nested; leave the device out",
            ),
            (|host| host.cap.set_fs5lp(false), "CAP.FS5LP: aw=57 was asked for; say aw=48"),
            (
                |host| host.ecap.set_pasid(false),
                "ECAP.PASID: pasid-bits=20 was asked for; say pasid-bits=0, the most that all devices \
                 have",
            ),
            (
                |host| host.ecap.set_pss(18),
                "ECAP.PSS: pasid-bits=20 was asked for; say pasid-bits=19, the most that all devices \
                 have",
            ),
            (|host| host.ecap.set_dt(false), "ECAP.DT: ats=on was asked for; say ats=off"),
            (
                |host| host.cap.set_mgaw(55),
                "CAP.MGAW: aw=57 was asked for, and guest addresses have 56 bits there",
            ),
            (
                |host| host.guest_second_stage = false,
                "guest_second_stage: second-stage=on was asked for; say second-stage=off",
            ),
            (
                |host| host.fault_reports = false,
                "fault_reports: caching-mode=off was asked for, and the host tells nobody of DMA that \
                 it blocks, so that tables that come to serve a device would not be read; say \
                 caching-mode=on",
            ),
        ];
        for (take_away, text) in lacking {
            let mut host = HostUnit { device: "nic1".into(), ..able() };
            take_away(&mut host);
            let error = config.intersect(&[able(), host]).unwrap_err();
            assert_eq!(error.to_string(), format!("the IOMMU of nic1 lacks {text}"));
        }
    }
}
