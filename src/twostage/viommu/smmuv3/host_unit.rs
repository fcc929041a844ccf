// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of a configuration that every host unit supports.
//!
//! Pure functions. Features that a guest can do without (a granule, range invalidation) are reduced
//! to what every host unit has; those requested by value (52-bit addresses, SubstreamID bits) cause
//! an error that names the bit and the device, and what to request.

use super::config::SmmuConfig;
use crate::spec::smmuv3::regs::{
    Aidr, Httu, Idr0, Idr1, Idr3, Idr5, STALL_OR_TERMINATE, TTF_AARCH64,
};
use crate::spec::smmuv3::translation::Granule;
use crate::viommu::host_side::OFFERED_BEFORE;
use crate::viommu::{CapabilityConflict, IntersectError};

/// IDR0.STALL_MODEL: every fault that can stall does.
const STALL_FORCED: u8 = 0b10;
/// IDR0.TTENDIAN: translation tables are big-endian.
const BIG_ENDIAN: u8 = 0b11;

/// The features of a host unit, and a device behind it, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSmmu {
    device: String,
    idr0: Idr0,
    idr1: Idr1,
    idr3: Idr3,
    idr5: Idr5,
    aidr: Aidr,
    /// The device can use ATS, which no register reports.
    ats: bool,
    /// The flags that it sets in the guest's tables, which no kernel does.
    httu: Httu,
    /// Page requests of devices reach the guest.
    page_requests: bool,
    /// So do transactions that stall.
    stalls: bool,
}

impl HostSmmu {
    /// The fields of IDR0 to IDR5 that users of `struct iommu_hw_info_arm_smmuv3` may interpret.
    /// The others describe the hardware, whether or not the kernel supports them for a guest.
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

    /// The answer of `IOMMU_GET_HW_INFO` for `device`; `ats`: its capabilities lack
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
            httu: Httu::None,
            page_requests: false,
            stalls: false,
        }
    }

    /// It sets these flags in the guest's tables
    /// ([`crate::iommufd::Extensions::table_updates`]).
    pub fn with_httu(mut self, httu: Httu) -> Self {
        self.httu = httu;
        self
    }

    /// The same, of a host that gives page requests and stalled transactions to the guest, as far
    /// as `idr0` has them ([`crate::iommufd::Extensions::smmu_faults`]).
    #[must_use]
    pub fn with_faults_served(mut self, idr0: u32) -> Self {
        let idr0 = Idr0::from_bits(idr0);
        self.page_requests = idr0.pri();
        self.stalls = idr0.stall_model() == STALL_OR_TERMINATE;
        self
    }

    /// The x of its SMMUv3.x. A later major revision has all features of the last minor one.
    fn minor_revision(&self) -> u8 {
        if self.aidr.major() == 0 {
            self.aidr.minor()
        } else {
            u8::MAX
        }
    }

    fn has_granule(&self, granule: Granule) -> bool {
        match granule {
            Granule::K4 => self.idr5.gran4k(),
            Granule::K16 => self.idr5.gran16k(),
            Granule::K64 => self.idr5.gran64k(),
        }
    }

    fn lacks(&self, bit: &'static str, needed_for: String) -> CapabilityConflict {
        CapabilityConflict { device: self.device.clone(), bit, needed_for }
    }
}

impl SmmuConfig {
    /// This configuration, reduced to what all of `hosts` support.
    ///
    /// # Errors
    /// There is no unit, or one does not support what was requested by value, or what every virtual
    /// SMMUv3 needs.
    pub fn intersect(&self, hosts: &[HostSmmu]) -> Result<Self, IntersectError> {
        let Some(first) = hosts.first() else { return Err(IntersectError::NoHosts) };
        // Only some of the devices behind an SMMU may support it.
        if self.ats && !hosts.iter().any(|host| host.ats) {
            let needed_for =
                "ats=on was requested, and no other device has ATS either; say ats=off";
            return Err(first.lacks("ATS", needed_for.into()).into());
        }
        // So it is with page requests.
        if self.page_requests && !hosts.iter().any(|host| host.page_requests) {
            let needed_for = "pri=on was requested, and no host gives page requests of an SMMUv3 \
                              to its guest, but the emulated one; say pri=off";
            return Err(first.lacks("IDR0.PRI", needed_for.into()).into());
        }
        Ok(self.lowered(hosts)?)
    }

    /// The same, but for ATS and page requests, which are a matter of each device.
    fn lowered(&self, hosts: &[HostSmmu]) -> Result<Self, CapabilityConflict> {
        self.require_substreams(hosts)?;
        let mut lowered = self.clone();
        for host in hosts {
            self.require(host)?;
            lowered.granule_4k &= host.idr5.gran4k();
            lowered.granule_16k &= host.idr5.gran16k();
            lowered.granule_64k &= host.idr5.gran64k();
            if lowered.granules().next().is_none() {
                let needed_for =
                    "they are all that the devices before it have in common; give it a \
                                  virtual SMMUv3 of its own";
                return Err(host.lacks("IDR5.GRAN4K, GRAN16K and GRAN64K", needed_for.into()));
            }
            lowered.asid16 &= host.idr0.asid16();
            lowered.two_level_contexts &= host.idr0.cd2l();
            lowered.range_invalidation &= host.idr3.ril();
            lowered.break_before_make_level = lowered.break_before_make_level.min(host.idr3.bbml());
            lowered.minor_revision = lowered.minor_revision.min(host.minor_revision());
            lowered.always_abort |= host.idr0.term_model();
            lowered.host_stalls |= host.idr0.stall_model() == STALL_OR_TERMINATE;
        }
        let least = hosts.iter().map(|host| host.idr1.ssidsize()).min();
        lowered.substream_bits = self.substream_bits.or(least);
        lowered.httu = self.httu.or(hosts.iter().map(|host| host.httu).min());
        Ok(lowered)
    }

    /// Whether `host` supports all of this configuration: a guest that knows it already cannot do
    /// with less.
    pub(crate) fn check_late(&self, host: &HostSmmu) -> Result<(), CapabilityConflict> {
        let can_stall = host.idr0.stall_model() == STALL_OR_TERMINATE;
        if can_stall && !self.host_stalls && !self.stalls {
            let needed_for = "the virtual SMMUv3 was built with host_stalls=false; build it with \
                              true, or with this device";
            return Err(host.lacks("an IDR0.STALL_MODEL without stalls", needed_for.into()));
        }
        // Perhaps nobody requested it: the devices before it had it.
        if self.httu > Some(host.httu) {
            return Err(host.lacks("IDR0.HTTU", OFFERED_BEFORE.into()));
        }
        if self.substream_bits > Some(host.idr1.ssidsize()) {
            return Err(host.lacks("IDR1.SSIDSIZE", OFFERED_BEFORE.into()));
        }
        let lowered = self.lowered(std::slice::from_ref(host))?;
        let lost = [
            ("IDR5.GRAN4K", self.granule_4k && !lowered.granule_4k),
            ("IDR5.GRAN16K", self.granule_16k && !lowered.granule_16k),
            ("IDR5.GRAN64K", self.granule_64k && !lowered.granule_64k),
            ("IDR0.ASID16", self.asid16 && !lowered.asid16),
            ("IDR0.CD2L", self.two_level_contexts && !lowered.two_level_contexts),
            ("IDR3.RIL", self.range_invalidation && !lowered.range_invalidation),
            ("IDR3.BBML", lowered.break_before_make_level < self.break_before_make_level),
            ("AIDR", lowered.minor_revision < self.minor_revision),
            ("IDR0.TERM_MODEL of 0", lowered.always_abort && !self.always_abort),
        ];
        match lost.into_iter().find(|(_, lost)| *lost) {
            None => Ok(()),
            Some((bit, _)) => Err(host.lacks(bit, OFFERED_BEFORE.into())),
        }
    }

    /// As many SubstreamID bits as requested, on the unit with the fewest.
    fn require_substreams(&self, hosts: &[HostSmmu]) -> Result<(), CapabilityConflict> {
        let least = hosts.iter().min_by_key(|host| host.idr1.ssidsize());
        let (Some(asked), Some(host)) = (self.substream_bits, least) else { return Ok(()) };
        let has = host.idr1.ssidsize();
        if asked <= has {
            return Ok(());
        }
        let needed_for = format!(
            "pasid-bits={asked} was requested; pasid-bits={has} is the most that all devices have"
        );
        Err(host.lacks("IDR1.SSIDSIZE", needed_for))
    }

    /// Everything else that was requested by value, or that every virtual SMMUv3 needs.
    fn require(&self, host: &HostSmmu) -> Result<(), CapabilityConflict> {
        let needed = |bit, what: &str| {
            let leave = "no virtual SMMUv3 can do without; leave the device out";
            Err(host.lacks(bit, format!("{what}, which {leave}")))
        };
        if host.idr0.ttf() & TTF_AARCH64 == 0 {
            return needed("IDR0.TTF for AArch64", "the guest's tables have the AArch64 format");
        }
        if host.idr0.ttendian() == BIG_ENDIAN {
            return needed("IDR0.TTENDIAN for little-endian", "the guest's tables have that order");
        }
        if host.idr0.stall_model() == STALL_FORCED {
            let what = "nobody could resume a transaction that stalls";
            return needed("IDR0.STALL_MODEL that can terminate", what);
        }
        if self.stalls && !host.stalls {
            let needed_for =
                "stall=on was requested, and its host stalls nothing for a guest; say \
                              stall=off";
            return Err(host.lacks("an IDR0.STALL_MODEL of 0b00 for guests", needed_for.into()));
        }
        if self.input_bits == 52 && host.idr5.vax() == 0 {
            return Err(host.lacks("IDR5.VAX", "aw=52 was requested; say aw=48".into()));
        }
        if self.input_bits == 52 && !host.idr5.gran64k() {
            let needed_for = "aw=52 was requested, which needs the 64 KiB granule; say aw=48";
            return Err(host.lacks("IDR5.GRAN64K", needed_for.into()));
        }
        if self.require_granules {
            for (granule, bit, name) in GRANULES {
                if self.granules().any(|offered| offered == granule) && !host.has_granule(granule) {
                    let needed_for = format!("granules= with {name} was requested; leave that out");
                    return Err(host.lacks(bit, needed_for));
                }
            }
        }
        if self.require_range_invalidation && !host.idr3.ril() {
            return Err(host.lacks("IDR3.RIL", "ril=on was requested; say ril=off".into()));
        }
        if let Some(asked) = self.httu.filter(|asked| *asked > host.httu) {
            let needed_for = format!("httu={asked} was requested; say httu={}", host.httu);
            return Err(host.lacks("IDR0.HTTU", needed_for));
        }
        Ok(())
    }
}

/// Each granule, its bit, and its name for users.
const GRANULES: [(Granule, &str, &str); 3] = [
    (Granule::K4, "IDR5.GRAN4K", "4K"),
    (Granule::K16, "IDR5.GRAN16K", "16K"),
    (Granule::K64, "IDR5.GRAN64K", "64K"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// A unit with all features, as registers.
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
            SmmuConfig {
                substream_bits: Some(20),
                httu: Some(Httu::None),
                host_stalls: true,
                ..Default::default()
            }
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
        // Of one that can stall, it is kept from that.
        assert!(lowered.always_abort && lowered.host_stalls);
        assert_eq!((lowered.substream_bits, lowered.break_before_make_level), (Some(0), 1));
    }

    #[test]
    fn flags_are_updated_as_far_as_all_hosts_do_or_as_was_requested() {
        let hosts = [Httu::Dirty, Httu::Access].map(|httu| host("a", |_| ()).with_httu(httu));
        let httu = |asked, hosts: &[HostSmmu]| {
            let config = SmmuConfig { httu: asked, ..Default::default() };
            config.intersect(hosts).map(|config| config.capabilities().unwrap().idr0.httu())
        };
        assert_eq!((httu(None, &hosts[..1]), httu(None, &hosts)), (Ok(2), Ok(1)));
        assert_eq!(httu(Some(Httu::None), &hosts), Ok(0));
        assert_eq!(httu(Some(Httu::Access), &hosts), Ok(1));
        assert_eq!(
            httu(Some(Httu::Dirty), &hosts).unwrap_err().to_string(),
            "the IOMMU of a lacks IDR0.HTTU: httu=dirty was requested; say httu=access"
        );
        // Of a device that comes late, nobody requested anything.
        let config = SmmuConfig::default().intersect(&hosts[..1]).unwrap();
        let late = config.check_late(&hosts[1]).unwrap_err().to_string();
        assert_eq!(late, format!("the IOMMU of a lacks IDR0.HTTU: {OFFERED_BEFORE}"));
        let fewer = host("b", |idr| idr[1] = 19 << 6).with_httu(Httu::Dirty);
        let late = config.check_late(&fewer).unwrap_err().to_string();
        assert_eq!(late, format!("the IOMMU of b lacks IDR1.SSIDSIZE: {OFFERED_BEFORE}"));
    }

    #[test]
    fn ats_needs_a_device_that_has_it() {
        let (idr, aidr) = able();
        let host = |name: &str, ats| HostSmmu::new(name.into(), idr, aidr, ats);
        let config = SmmuConfig { ats: true, ..Default::default() };
        let conflict = config.intersect(&[host("a", false), host("b", false)]).unwrap_err();
        assert_eq!(
            conflict.to_string(),
            "the IOMMU of a lacks ATS: ats=on was requested, and no other device has ATS either; \
             say ats=off"
        );
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
        let oas = |minor_revision| {
            let config = SmmuConfig { output_bits: 52, minor_revision, ..Default::default() };
            config.capabilities().unwrap().idr5.oas()
        };
        assert_eq!((oas(0), oas(1)), (5, 6));
    }

    #[test]
    fn without_hosts_nothing_changes() {
        assert_eq!(SmmuConfig::default().intersect(&[]), Err(IntersectError::NoHosts));
    }

    #[test]
    fn a_conflict_names_the_device_and_the_value_and_says_what_to_do() {
        let config = SmmuConfig {
            input_bits: 52,
            output_bits: 52,
            substream_bits: Some(20),
            granule_16k: false,
            ..Default::default()
        };
        let only = |granule_4k, granule_16k, granule_64k| SmmuConfig {
            granule_4k,
            granule_16k,
            granule_64k,
            ..Default::default()
        };
        let narrow = only(false, true, false);
        let asked = SmmuConfig { require_granules: true, ..only(false, true, true) };
        let ril = SmmuConfig { require_range_invalidation: true, ..Default::default() };
        let no_other = "no virtual SMMUv3 can do without; leave the device out";
        type Change = fn(&mut [u32; 6]);
        let lacking: [(&SmmuConfig, Change, &str); 9] = [
            (
                &config,
                |idr| idr[0] = idr[0] & !0xc | 1 << 2,
                "IDR0.TTF for AArch64: the guest's tables have the AArch64 format, which ",
            ),
            (
                &config,
                |idr| idr[0] |= 3 << 21,
                "IDR0.TTENDIAN for little-endian: the guest's tables have that order, which ",
            ),
            (
                &config,
                |idr| idr[0] |= 2 << 24,
                "IDR0.STALL_MODEL that can terminate: nobody could resume a transaction that \
                 stalls, which ",
            ),
            (&config, |idr| idr[5] &= !(3 << 10), "IDR5.VAX: aw=52 was requested; say aw=48"),
            (
                &config,
                |idr| idr[5] &= !(1 << 6),
                "IDR5.GRAN64K: aw=52 was requested, which needs the 64 KiB granule; say aw=48",
            ),
            (
                &config,
                |idr| idr[1] = 19 << 6,
                "IDR1.SSIDSIZE: pasid-bits=20 was requested; pasid-bits=19 is the most that all \
                 devices have",
            ),
            (
                &narrow,
                |idr| idr[5] &= !(1 << 5),
                "IDR5.GRAN4K, GRAN16K and GRAN64K: they are all that the devices before it have in \
                 common; give it a virtual SMMUv3 of its own",
            ),
            (
                &asked,
                |idr| idr[5] &= !(1 << 5),
                "IDR5.GRAN16K: granules= with 16K was requested; leave that out",
            ),
            (&ril, |idr| idr[3] &= !(1 << 10), "IDR3.RIL: ril=on was requested; say ril=off"),
        ];
        for (config, change, text) in lacking {
            let hosts = [host("edu0", |_| ()), host("nic1", change)];
            let error = config.intersect(&hosts).unwrap_err();
            let ending = if text.ends_with("which ") { no_other } else { "" };
            let expected = format!("the IOMMU of nic1 lacks {text}{ending}");
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn the_device_with_the_fewest_substreams_is_the_one_to_blame() {
        let config = SmmuConfig { substream_bits: Some(17), ..Default::default() };
        let hosts = [
            host("a", |idr| idr[1] = 16 << 6),
            host("b", |idr| idr[1] = 4 << 6),
            host("c", |_| ()),
        ];
        assert_eq!(
            config.intersect(&hosts).unwrap_err().to_string(),
            "the IOMMU of b lacks IDR1.SSIDSIZE: pasid-bits=17 was requested; pasid-bits=4 is the \
             most that all devices have"
        );
        let config = SmmuConfig { substream_bits: Some(4), ..config };
        assert_eq!(config.intersect(&hosts).unwrap().substream_bits, Some(4));
    }
}
