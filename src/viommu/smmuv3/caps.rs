// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IDR0 to IDR5, IIDR and AIDR: what the configuration offers, and what every host unit can serve.
//!
//! Pure functions. Abilities that a guest can do without (a granule, invalidation by range) are
//! lowered to what every host unit has; those that were asked for by value (52-bit addresses,
//! SubstreamID bits) make an error that names the bit and the device.

use super::config::{SmmuConfig, SmmuConfigError};
use crate::spec::smmuv3::regs::{
    Aidr, Idr0, Idr1, Idr3, Idr5, Iidr, STALL_NONE, ST_LEVEL_2, TTF_AARCH64,
};
use crate::viommu::CapabilityConflict;

/// IDR0.STALL_MODEL: every fault stalls that can.
const STALL_FORCED: u8 = 0b10;
/// IDR0.STALL_MODEL: context descriptors say whether faults stall.
const STALL_OR_TERMINATE: u8 = 0b00;
/// IDR0.TTENDIAN: translation tables are little-endian.
const LITTLE_ENDIAN: u8 = 0b10;
/// IDR0.TTENDIAN: translation tables are big-endian.
const BIG_ENDIAN: u8 = 0b11;

/// The identification registers of a virtual SMMUv3, and what they cannot tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// IDR0.
    pub idr0: Idr0,
    /// IDR1.
    pub idr1: Idr1,
    /// IDR3.
    pub idr3: Idr3,
    /// IDR5.
    pub idr5: Idr5,
    /// IIDR: no implementer is named, so that no guest works around errata that the host already
    /// works around.
    pub iidr: Iidr,
    /// AIDR.
    pub aidr: Aidr,
    /// Stage 1 is to be kept from stalling transactions ([`SmmuConfig::host_stalls`]).
    pub disable_stalls: bool,
}

/// What a host unit can serve, and a device behind it to name it by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSmmu {
    device: String,
    idr0: Idr0,
    idr1: Idr1,
    idr3: Idr3,
    idr5: Idr5,
    aidr: Aidr,
    /// The device can use ATS, which no register says.
    ats: bool,
}

impl HostSmmu {
    /// The fields of IDR0 to IDR5 that `struct iommu_hw_info_arm_smmuv3` lets its users read. The
    /// others are the hardware's, whether or not the kernel serves them to a guest.
    const READABLE: [u32; 6] = [
        Idr0::new()
            .with_ttf(!0 >> 6)
            .with_asid16(true)
            .with_cd2l(true)
            .with_ttendian(!0 >> 6)
            .with_stall_model(!0 >> 6)
            .with_term_model(true)
            .with_st_level(!0 >> 6)
            .into_bits(),
        Idr1::new().with_sidsize(!0 >> 2).with_ssidsize(!0 >> 3).into_bits(),
        0,
        Idr3::new().with_ril(true).with_bbml(!0 >> 6).into_bits(),
        0,
        Idr5::new()
            .with_gran4k(true)
            .with_gran16k(true)
            .with_gran64k(true)
            .with_vax(!0 >> 6)
            .into_bits(),
    ];

    /// What `IOMMU_GET_HW_INFO` of `device` says; `ats`: its capabilities are without
    /// `IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED`.
    pub fn new(device: String, idr: [u32; 6], aidr: u32, ats: bool) -> Self {
        let [mask0, mask1, _, mask3, _, mask5] = Self::READABLE;
        let [idr0, idr1, _, idr3, _, idr5] = idr;
        Self {
            device,
            idr0: Idr0::from_bits(idr0 & mask0),
            idr1: Idr1::from_bits(idr1 & mask1),
            idr3: Idr3::from_bits(idr3 & mask3),
            idr5: Idr5::from_bits(idr5 & mask5),
            aidr: Aidr::from_bits(aidr),
            ats,
        }
    }

    /// The x of its SMMUv3.x. A later major revision has all that the last minor one has.
    fn minor_revision(&self) -> u8 {
        if self.aidr.major() == 0 {
            self.aidr.minor()
        } else {
            u8::MAX
        }
    }

    fn lacks(&self, bit: &'static str, needed_for: String) -> CapabilityConflict {
        CapabilityConflict { device: self.device.clone(), bit, needed_for }
    }
}

impl SmmuConfig {
    /// The identification registers that offer this configuration. Everything else reads as zero:
    /// stage 2, EL2, stalls, page requests, hardware updates of tables, broadcast maintenance,
    /// address translation operations.
    ///
    /// # Errors
    /// The configuration is impossible ([`SmmuConfig::check`]).
    pub fn capabilities(&self) -> Result<Capabilities, SmmuConfigError> {
        self.check()?;
        let idr0 = Idr0::new()
            .with_s1p(true)
            .with_ttf(TTF_AARCH64)
            .with_cohacc(true)
            .with_ats(self.ats)
            .with_asid16(self.asid16)
            .with_msi(self.msi)
            .with_cd2l(self.two_level_contexts)
            .with_ttendian(LITTLE_ENDIAN)
            .with_stall_model(STALL_NONE)
            .with_term_model(self.always_abort)
            .with_st_level(ST_LEVEL_2);
        let idr1 = Idr1::new()
            .with_sidsize(self.stream_bits)
            .with_ssidsize(self.substream_bits.unwrap_or(0))
            .with_eventqs(self.event_queue_bits)
            .with_cmdqs(self.command_queue_bits);
        let idr3 =
            Idr3::new().with_ril(self.range_invalidation).with_bbml(self.break_before_make_level);
        let idr5 = Idr5::new()
            .with_oas(self.oas().unwrap_or_default())
            .with_gran4k(self.granule_4k)
            .with_gran16k(self.granule_16k)
            .with_gran64k(self.granule_64k)
            .with_vax(u8::from(self.input_bits == 52));
        Ok(Capabilities {
            idr0,
            idr1,
            idr3,
            idr5,
            iidr: Iidr::new(),
            aidr: Aidr::new().with_minor(self.minor_revision),
            disable_stalls: self.host_stalls,
        })
    }

    /// This configuration, lowered to what all of `hosts` can serve.
    ///
    /// # Errors
    /// A unit cannot serve what was asked for by value, or what every virtual SMMUv3 needs.
    pub fn intersect(&self, hosts: &[HostSmmu]) -> Result<Self, CapabilityConflict> {
        let mut lowered = self.clone();
        // Some devices behind an SMMU may have it, and others not.
        if let Some(host) = hosts.first().filter(|_| self.ats && !hosts.iter().any(|host| host.ats))
        {
            let needed_for = "nor has another device ATS, which was asked for: switch it off";
            return Err(host.lacks("ATS", needed_for.into()));
        }
        for host in hosts {
            lowered.require(host)?;
            lowered.granule_4k &= host.idr5.gran4k();
            lowered.granule_16k &= host.idr5.gran16k();
            lowered.granule_64k &= host.idr5.gran64k();
            if lowered.granules().next().is_none() {
                return Err(host.lacks(
                    "IDR5.GRAN4K, GRAN16K and GRAN64K",
                    "no granule that was asked for would be left".into(),
                ));
            }
            lowered.asid16 &= host.idr0.asid16();
            lowered.two_level_contexts &= host.idr0.cd2l();
            lowered.range_invalidation &= host.idr3.ril();
            lowered.break_before_make_level = lowered.break_before_make_level.min(host.idr3.bbml());
            lowered.minor_revision = lowered.minor_revision.min(host.minor_revision());
            lowered.always_abort |= host.idr0.term_model();
        }
        let least = hosts.iter().map(|host| host.idr1.ssidsize()).min();
        lowered.substream_bits = self.substream_bits.or(least);
        lowered.host_stalls |= !hosts.is_empty()
            && hosts.iter().all(|host| host.idr0.stall_model() == STALL_OR_TERMINATE);
        Ok(lowered)
    }

    fn require(&self, host: &HostSmmu) -> Result<(), CapabilityConflict> {
        if host.idr0.ttf() & TTF_AARCH64 == 0 {
            let needed_for = "the guest's tables have the AArch64 format";
            return Err(host.lacks("IDR0.TTF for AArch64", needed_for.into()));
        }
        if host.idr0.ttendian() == BIG_ENDIAN {
            let needed_for = "the guest's tables are little-endian";
            return Err(host.lacks("IDR0.TTENDIAN for little-endian", needed_for.into()));
        }
        if host.idr0.stall_model() == STALL_FORCED {
            let needed_for = "faults of the guest's must terminate, nobody could resume a stall";
            return Err(host.lacks("IDR0.STALL_MODEL that can terminate", needed_for.into()));
        }
        if self.input_bits == 52 && host.idr5.vax() == 0 {
            let needed_for = "input addresses of 52 bits were asked for";
            return Err(host.lacks("IDR5.VAX", needed_for.into()));
        }
        if self.input_bits == 52 && !host.idr5.gran64k() {
            let needed_for = "input addresses of 52 bits need the 64 KiB granule";
            return Err(host.lacks("IDR5.GRAN64K", needed_for.into()));
        }
        let has = host.idr1.ssidsize();
        match self.substream_bits {
            Some(bits) if bits > has => {
                let needed_for = format!("{bits} SubstreamID bits were asked for, it has {has}");
                Err(host.lacks("IDR1.SSIDSIZE", needed_for))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A unit that has everything, as registers.
    fn able() -> ([u32; 6], u32) {
        let idr0 = Idr0::new()
            .with_ttf(3)
            .with_asid16(true)
            .with_cd2l(true)
            .with_ttendian(0)
            .with_stall_model(0)
            .with_st_level(1);
        let idr1 = Idr1::new().with_sidsize(32).with_ssidsize(20);
        let idr3 = Idr3::new().with_ril(true).with_bbml(2);
        let idr5 = Idr5::new()
            .with_gran4k(true)
            .with_gran16k(true)
            .with_gran64k(true)
            .with_vax(1)
            .with_oas(6);
        let bits = [idr0.into(), idr1.into(), 0, idr3.into(), 0, idr5.into()];
        (bits, Aidr::new().with_minor(3).into_bits())
    }

    fn host(device: &str, change: fn(&mut [u32; 6])) -> HostSmmu {
        let (mut idr, aidr) = able();
        change(&mut idr);
        HostSmmu::new(device.into(), idr, aidr, true)
    }

    #[test]
    fn the_default_offers_stage_1_as_linux_wants_it() {
        let Capabilities { idr0, idr1, idr3, idr5, .. } =
            SmmuConfig::default().capabilities().unwrap();
        // S1P, TTF 2, COHACC, ASID16, MSI, CD2L, TTENDIAN 2, STALL_MODEL 1, TERM_MODEL, ST_LEVEL 1.
        assert_eq!(idr0.into_bits(), 0x0d48_301a);
        assert_eq!(idr1.into_bits(), 12 << 21 | 12 << 16 | 16);
        assert_eq!(idr3.into_bits(), 2 << 11 | 1 << 10);
        assert_eq!(idr5.into_bits(), 0x75);
    }

    #[test]
    fn what_is_asked_for_by_value_is_offered() {
        let config = SmmuConfig {
            substream_bits: Some(20),
            input_bits: 52,
            output_bits: 52,
            ats: true,
            msi: false,
            ..Default::default()
        };
        let caps = config.capabilities().unwrap();
        assert_eq!((caps.idr1.ssidsize(), caps.idr5.vax(), caps.idr5.oas()), (20, 1, 6));
        assert!(caps.idr0.ats() && !caps.idr0.msi());
    }

    #[test]
    fn only_fields_that_the_host_lets_read_count() {
        assert_eq!(HostSmmu::READABLE, [0x1f68_100c, 0x7ff, 0, 0x1c00, 0, 0xc70]);
        let (idr, aidr) = able();
        let mut noisy = idr;
        for (word, mask) in noisy.iter_mut().zip(HostSmmu::READABLE) {
            *word |= !mask;
        }
        assert_eq!(
            HostSmmu::new("a".into(), noisy, aidr, true),
            HostSmmu::new("a".into(), idr, aidr, true)
        );
    }

    #[test]
    fn what_a_guest_can_do_without_is_lowered() {
        let full = host("edu0", |_| ());
        let lowered = SmmuConfig::default().intersect(std::slice::from_ref(&full)).unwrap();
        assert_eq!(
            lowered,
            SmmuConfig { substream_bits: Some(20), host_stalls: true, ..Default::default() }
        );
        let poor = host("edu1", |idr| {
            idr[0] &= !(1 << 12 | 1 << 19);
            idr[0] |= 1 << 26 | 1 << 24;
            idr[1] &= !(31 << 6);
            idr[3] = 1 << 11;
            idr[5] &= !(1 << 5);
        });
        let lowered = SmmuConfig::default().intersect(&[full, poor]).unwrap();
        assert!(!lowered.asid16 && !lowered.two_level_contexts && !lowered.range_invalidation);
        assert!(!lowered.granule_16k && lowered.granule_4k && lowered.granule_64k);
        assert!(lowered.always_abort && !lowered.host_stalls);
        assert_eq!((lowered.substream_bits, lowered.break_before_make_level), (Some(0), 1));
    }

    #[test]
    fn ats_needs_a_device_that_has_it() {
        let (idr, aidr) = able();
        let host = |name: &str, ats| HostSmmu::new(name.into(), idr, aidr, ats);
        let config = SmmuConfig { ats: true, ..Default::default() };
        let conflict = config.intersect(&[host("a", false), host("b", false)]).unwrap_err();
        assert_eq!((conflict.device.as_str(), conflict.bit), ("a", "ATS"));
        assert!(config.intersect(&[host("a", false), host("b", true)]).unwrap().ats);
        assert!(SmmuConfig::default().intersect(&[host("a", false)]).is_ok());
    }

    #[test]
    fn an_older_host_makes_an_older_smmu() {
        let (idr, _) = able();
        let minor = |aidr: Aidr| {
            let host = HostSmmu::new("nic1".into(), idr, aidr.into_bits(), true);
            SmmuConfig::default().intersect(&[host]).unwrap().capabilities().unwrap().aidr.minor()
        };
        assert_eq!(minor(Aidr::new()), 0);
        assert_eq!(minor(Aidr::new().with_minor(4)), 2);
        assert_eq!(minor(Aidr::new().with_major(1)), 2);
    }

    #[test]
    fn without_hosts_nothing_changes() {
        assert_eq!(SmmuConfig::default().intersect(&[]), Ok(SmmuConfig::default()));
    }

    #[test]
    fn a_conflict_names_the_bit_and_the_device() {
        let config = SmmuConfig {
            input_bits: 52,
            output_bits: 52,
            substream_bits: Some(20),
            granule_16k: false,
            ..Default::default()
        };
        let narrow = SmmuConfig { granule_4k: false, granule_64k: false, ..Default::default() };
        type Change = fn(&mut [u32; 6]);
        let lacking: [(&SmmuConfig, Change, &str); 7] = [
            (&config, |idr| idr[0] = idr[0] & !0xc | 1 << 2, "IDR0.TTF"),
            (&config, |idr| idr[0] |= 3 << 21, "IDR0.TTENDIAN"),
            (&config, |idr| idr[0] |= 2 << 24, "IDR0.STALL_MODEL"),
            (&config, |idr| idr[5] &= !(3 << 10), "IDR5.VAX"),
            (&config, |idr| idr[5] &= !(1 << 6), "IDR5.GRAN64K"),
            (&config, |idr| idr[1] = 19 << 6, "IDR1.SSIDSIZE"),
            (&narrow, |idr| idr[5] &= !(1 << 5), "IDR5.GRAN4K"),
        ];
        for (config, change, bit) in lacking {
            let hosts = [host("edu0", |_| ()), host("nic1", change)];
            let error = config.intersect(&hosts).unwrap_err();
            assert_eq!(error.device, "nic1");
            assert!(error.bit.starts_with(bit), "{error}");
            assert!(error.to_string().starts_with("the IOMMU of nic1 lacks "), "{error}");
        }
    }
}
