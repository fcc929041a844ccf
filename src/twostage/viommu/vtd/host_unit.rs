// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of a configuration that every host unit supports.
//!
//! Pure functions. Features that a guest can do without (1 GiB pages, the extended accessed flag)
//! are reduced to what every host unit has; those requested by value (address width, PASID bits)
//! cause an error that names the bit and the device.

use super::config::VtdConfig;
use crate::spec::vtd::regs::{Cap, Ecap};
use crate::viommu::host_side::OFFERED_BEFORE;
use crate::viommu::{CapabilityConflict, IntersectError};

/// The features of a host unit, and a device behind it, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostVtd {
    /// The device whose `IOMMU_GET_HW_INFO` this is.
    pub device: String,
    /// CAP of the unit.
    pub cap: Cap,
    /// ECAP of the unit.
    pub ecap: Ecap,
    /// The host walks second-stage tables of the guest on top of its own
    /// ([`crate::iommufd::Extensions::guest_second_stage`]). No register reports this.
    pub guest_second_stage: bool,
    /// The host reports requests that it blocks ([`crate::iommufd::Extensions::fault_reports`]).
    pub fault_reports: bool,
    /// The unit does not nest: the guest's tables are mirrored for it.
    pub mirrored: bool,
}

impl HostVtd {
    /// The unit of `device`, with these registers and no more than they say.
    pub const fn new(device: String, cap: Cap, ecap: Ecap) -> Self {
        let (guest_second_stage, fault_reports, mirrored) = (false, false, false);
        Self { device, cap, ecap, guest_second_stage, fault_reports, mirrored }
    }

    /// Any unit that maps `iova_bits` of IOVA and `pasid_bits` of PASID, as it looks to a guest
    /// whose tables are mirrored for it: they are walked by software, which knows every format of
    /// one stage, but neither requests of supervisors nor the flag that such walks do not set.
    pub fn mirrored(device: String, iova_bits: u8, pasid_bits: u8) -> Self {
        let cap =
            Cap::new().with_mgaw(iova_bits.saturating_sub(1)).with_fs1gp(true).with_fs5lp(true);
        let ecap = Ecap::new()
            .with_smts(true)
            .with_nest(true)
            .with_sc(true)
            .with_smpwcs(true)
            .with_pasid(pasid_bits > 0)
            .with_pss(pasid_bits.saturating_sub(1));
        Self { mirrored: true, guest_second_stage: true, ..Self::new(device, cap, ecap) }
    }

    setters! {
        with_guest_second_stage guest_second_stage: bool;
        with_fault_reports fault_reports: bool;
    }
}

impl VtdConfig {
    /// This configuration, reduced to what all of `hosts` support.
    ///
    /// # Errors
    /// There is no unit, or one does not support what was requested by value.
    pub fn intersect(&self, hosts: &[HostVtd]) -> Result<Self, IntersectError> {
        let least = hosts.iter().min_by_key(|host| host.ecap.pasid_bits());
        let narrowest = least.ok_or(IntersectError::NoHosts)?;
        require_pasids(self.pasid_bits, narrowest)?;
        let mut lowered = self.clone();
        lowered.pasid_bits = Some(self.pasids().min(narrowest.ecap.pasid_bits()));
        for host in hosts {
            lowered.lower(self, host)?;
        }
        // A unit that nests, beside mirrors that brought second-stage tables in.
        let nesting = hosts.iter().find(|host| !host.guest_second_stage);
        match nesting.filter(|_| lowered.second_stage) {
            Some(HostVtd { device, .. }) => Err(CapabilityConflict {
                device: device.clone(),
                bit: "guest_second_stage",
                needed_for: "tables are mirrored for other devices, which takes second-stage \
                             tables; say nesting=off"
                    .into(),
            }
            .into()),
            None => Ok(lowered),
        }
    }

    /// Reduces this part of `wanted` to what `host` supports, too.
    fn lower(&mut self, wanted: &Self, host: &HostVtd) -> Result<(), CapabilityConflict> {
        wanted.require(host)?;
        self.first_stage_1g &= host.cap.fs1gp();
        self.supervisor_requests &= host.ecap.srs();
        self.extended_accessed &= host.ecap.eafs();
        self.snoop_control &= host.ecap.sc();
        self.coherent_walks &= host.ecap.smpwcs();
        if host.mirrored && self.first_stage.is_none() {
            (self.first_stage, self.second_stage) = (Some(false), true);
        }
        if host.mirrored {
            let bits = host.cap.guest_address_width();
            self.iova_bits = Some(self.iova_bits.unwrap_or(self.address_width).min(bits));
        }
        Ok(())
    }

    /// Whether `host` nests all tables of this configuration: if not, they are mirrored for it.
    pub(crate) fn check_nesting(&self, host: &HostVtd) -> Result<(), CapabilityConflict> {
        let lacks = |bit, needed_for: &str| {
            let (device, needed_for) = (host.device.clone(), needed_for.to_owned());
            Err(CapabilityConflict { device, bit, needed_for })
        };
        if self.scalable_mode && !host.ecap.smts() {
            return lacks(
                "ECAP.SMTS",
                "nested translation needs scalable mode; leave the device out",
            );
        }
        if self.scalable_mode && !host.ecap.nest() {
            let why = "the guest's first-stage tables are nested; leave the device out";
            return lacks("ECAP.NEST", why);
        }
        if self.second_stage && !host.guest_second_stage {
            let why = "second-stage=on was requested; say second-stage=off";
            return lacks("guest_second_stage", why);
        }
        Ok(())
    }

    /// Whether `host` supports all of this configuration: a guest that knows it already cannot do
    /// with less.
    pub(crate) fn check_late(&self, host: &HostVtd) -> Result<(), CapabilityConflict> {
        // Whether or not they were requested by value.
        let offered =
            |conflict| CapabilityConflict { needed_for: OFFERED_BEFORE.into(), ..conflict };
        require_pasids(Some(self.pasids()), host).map_err(offered)?;
        let mut lowered = self.clone();
        lowered.lower(self, host)?;
        let lost = [
            ("CAP.FS1GP", self.first_stage_1g && !lowered.first_stage_1g),
            ("ECAP.FSTS", self.first_stage.is_none() && lowered.first_stage == Some(false)),
            ("ECAP.SRS", self.supervisor_requests && !lowered.supervisor_requests),
            ("ECAP.EAFS", self.extended_accessed && !lowered.extended_accessed),
            ("ECAP.SC", self.snoop_control && !lowered.snoop_control),
            ("ECAP.SMPWCS", self.coherent_walks && !lowered.coherent_walks),
            ("CAP.MGAW", host.mirrored && lowered.iova_bits < Some(self.iova_width())),
        ];
        match lost.into_iter().find(|(_, lost)| *lost) {
            None => Ok(()),
            Some((bit, _)) => Err(CapabilityConflict {
                device: host.device.clone(),
                bit,
                needed_for: OFFERED_BEFORE.into(),
            }),
        }
    }

    fn require(&self, host: &HostVtd) -> Result<(), CapabilityConflict> {
        let HostVtd { device, cap, ecap, guest_second_stage, fault_reports, mirrored } = host;
        let conflict = |bit, needed_for: String| {
            Err(CapabilityConflict { device: device.clone(), bit, needed_for })
        };
        if self.nest && *mirrored {
            let needed_for =
                "nest=on was requested, and tables of two stages are not mirrored; say \
                              nest=off";
            return conflict("nesting", needed_for.into());
        }
        if !self.caching_mode && *mirrored {
            let needed_for =
                "caching-mode=off was requested, and the guest's tables are mirrored, \
                              so that it has to invalidate what it maps; say caching-mode=on";
            return conflict("nesting", needed_for.into());
        }
        if self.nest && !guest_second_stage {
            let needed_for = "nest=on was requested, and no hardware nests two stages of a guest \
                              on a third; say nest=off";
            return conflict("guest_second_stage", needed_for.into());
        }
        self.check_nesting(host)?;
        if self.address_width == 57 && !cap.fs5lp() {
            return conflict("CAP.FS5LP", "aw=57 was requested; say aw=48".into());
        }
        if self.address_width > cap.guest_address_width() && !mirrored {
            let (bits, has) = (self.address_width, cap.guest_address_width());
            let needed_for =
                format!("aw={bits} was requested, and guest addresses have {has} bits there");
            return conflict("CAP.MGAW", needed_for);
        }
        if !self.caching_mode && !fault_reports {
            let needed_for = "caching-mode=off was requested, and the host does not report DMA \
                              that it blocks, so that tables that start to serve a device would \
                              not be read; say caching-mode=on";
            return conflict("fault_reports", needed_for.into());
        }
        if self.device_iotlb && !ecap.dt() {
            return conflict("ECAP.DT", "ats=on was requested; say ats=off".into());
        }
        if self.page_requests && !ecap.prs() {
            return conflict("ECAP.PRS", "pri=on was requested; say pri=off".into());
        }
        Ok(())
    }
}

/// Whether `host` has as many PASID bits as were asked for.
fn require_pasids(asked: Option<u8>, host: &HostVtd) -> Result<(), CapabilityConflict> {
    let has = host.ecap.pasid_bits();
    let Some(asked) = asked.filter(|asked| *asked > has) else { return Ok(()) };
    Err(CapabilityConflict {
        device: host.device.clone(),
        bit: if has == 0 { "ECAP.PASID" } else { "ECAP.PSS" },
        needed_for: format!(
            "pasid-bits={asked} was requested; say pasid-bits={has}, the most that all devices have"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn able() -> HostVtd {
        HostVtd {
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
            mirrored: false,
        }
    }

    #[test]
    fn a_unit_that_does_not_nest_looks_like_one_that_walks_every_single_stage() {
        let amd = |bits, pasids| HostVtd::mirrored("nvme".into(), bits, pasids);
        let asked = VtdConfig { address_width: 57, ..Default::default() };
        let lowered = asked.intersect(&[amd(47, 0), amd(39, 8)]).unwrap();
        let (cap, ecap) = {
            let offered = lowered.capabilities().unwrap();
            (offered.cap, offered.ecap)
        };
        assert_eq!((cap.guest_address_width(), cap.sagaw()), (39, 0b1110));
        assert!(cap.cm() && !cap.fs5lp() && !cap.fs1gp() && cap.sslps() == 3);
        // Of the first stage, guests do not say what becomes present.
        assert!(ecap.smts() && !ecap.fsts() && ecap.ssts() && ecap.smpwcs() && ecap.sc());
        let said = asked.clone().with_first_stage(Some(true));
        let both = said.intersect(&[amd(47, 0)]).unwrap().capabilities().unwrap();
        assert!(both.ecap.fsts() && both.cap.fs1gp() && !both.ecap.ssts() && !both.ecap.srs());
        assert!(!ecap.srs() && !ecap.eafs() && !ecap.nest() && !ecap.ssads() && !ecap.dt());
        assert_eq!(ecap.pasid_bits(), 0);
        lowered.check_late(&amd(48, 8)).unwrap();
        let late = lowered.check_late(&amd(38, 0)).unwrap_err().to_string();
        assert!(late.contains("nvme lacks CAP.MGAW"), "{late}");
        // Beside one that nests; and one that does not nest a second stage.
        let hardware = HostVtd { guest_second_stage: false, ..able() };
        let error = asked.intersect(&[hardware, amd(47, 3)]).unwrap_err().to_string();
        assert!(error.contains("edu0 lacks guest_second_stage") && error.contains("nesting=off"));
        assert_eq!(asked.intersect(&[able(), amd(47, 3)]).unwrap().pasid_bits, Some(3));
        for (config, why) in [
            (VtdConfig { nest: true, ..asked.clone() }, "nest=on was requested"),
            (VtdConfig { caching_mode: false, ..asked.clone() }, "caching-mode=off was requested"),
            (VtdConfig { device_iotlb: true, ..asked }, "ats=on was requested"),
        ] {
            let error = config.intersect(&[amd(47, 0)]).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn pasid_bits_that_nobody_asked_for_are_what_there_is() {
        let has = |bits: u8| {
            let mut host = able();
            host.ecap = host.ecap.with_pasid(bits > 0).with_pss(bits.saturating_sub(1));
            host
        };
        for (hosts, bits) in [(vec![20], 8), (vec![20, 6], 6), (vec![0, 20], 0)] {
            let hosts: Vec<_> = hosts.into_iter().map(has).collect();
            let lowered = VtdConfig::default().intersect(&hosts).unwrap();
            assert_eq!(lowered.pasid_bits, Some(bits));
            assert_eq!(lowered.capabilities().unwrap().ecap.pasid_bits(), bits);
        }
        let lowered = VtdConfig::default().intersect(&[has(20)]).unwrap();
        lowered.check_late(&has(8)).unwrap();
        assert_eq!(
            lowered.check_late(&has(6)).unwrap_err().to_string(),
            format!("the IOMMU of edu0 lacks ECAP.PSS: {OFFERED_BEFORE}")
        );
    }

    #[test]
    fn nothing_is_offered_on_behalf_of_no_host() {
        assert_eq!(VtdConfig::default().intersect(&[]), Err(IntersectError::NoHosts));
    }

    #[test]
    fn what_a_guest_can_do_without_is_lowered() {
        let config = VtdConfig { pasid_bits: Some(20), device_iotlb: true, ..Default::default() };
        assert_eq!(config.intersect(&[able()]), Ok(config.clone()));
        let mut poor = able();
        poor.cap.set_fs1gp(false);
        poor.ecap.set_eafs(false);
        let lowered = config.intersect(&[able(), poor]).unwrap();
        assert!(!lowered.first_stage_1g && !lowered.extended_accessed);
        assert!(lowered.supervisor_requests && lowered.snoop_control);
    }

    #[test]
    fn nesting_is_for_hosts_that_walk_both_stages() {
        let config = VtdConfig { second_stage: true, nest: true, ..Default::default() };
        assert_eq!(config.intersect(&[able()]).map(|lowered| lowered.nest), Ok(true));
        config.check_late(&able()).unwrap();
        let hardware = HostVtd { device: "nic1".into(), guest_second_stage: false, ..able() };
        for error in [
            config.intersect(&[able(), hardware.clone()]).unwrap_err().to_string(),
            config.check_late(&hardware).unwrap_err().to_string(),
        ] {
            assert_eq!(
                error,
                "the IOMMU of nic1 lacks guest_second_stage: nest=on was requested, and no \
                 hardware nests two stages of a guest on a third; say nest=off"
            );
        }
    }

    #[test]
    fn a_conflict_names_the_bit_and_the_device() {
        let config = VtdConfig {
            address_width: 57,
            pasid_bits: Some(20),
            device_iotlb: true,
            second_stage: true,
            caching_mode: false,
            ..Default::default()
        };
        type TakeAway = fn(&mut HostVtd);
        let lacking: [(TakeAway, &str); 9] = [
            (
                |host| host.ecap.set_smts(false),
                "ECAP.SMTS: nested translation needs scalable mode; leave the device out",
            ),
            (
                |host| host.ecap.set_nest(false),
                "ECAP.NEST: the guest's first-stage tables are nested; leave the device out",
            ),
            (|host| host.cap.set_fs5lp(false), "CAP.FS5LP: aw=57 was requested; say aw=48"),
            (
                |host| host.ecap.set_pasid(false),
                "ECAP.PASID: pasid-bits=20 was requested; say pasid-bits=0, the most that all \
                 devices have",
            ),
            (
                |host| host.ecap.set_pss(18),
                "ECAP.PSS: pasid-bits=20 was requested; say pasid-bits=19, the most that all \
                 devices have",
            ),
            (|host| host.ecap.set_dt(false), "ECAP.DT: ats=on was requested; say ats=off"),
            (
                |host| host.cap.set_mgaw(55),
                "CAP.MGAW: aw=57 was requested, and guest addresses have 56 bits there",
            ),
            (
                |host| host.guest_second_stage = false,
                "guest_second_stage: second-stage=on was requested; say second-stage=off",
            ),
            (
                |host| host.fault_reports = false,
                "fault_reports: caching-mode=off was requested, and the host does not report DMA \
                 that it blocks, so that tables that start to serve a device would not be read; \
                 say caching-mode=on",
            ),
        ];
        for (take_away, text) in lacking {
            let mut host = HostVtd { device: "nic1".into(), ..able() };
            take_away(&mut host);
            let error = config.intersect(&[able(), host]).unwrap_err();
            assert_eq!(error.to_string(), format!("the IOMMU of nic1 lacks {text}"));
        }
    }
}
