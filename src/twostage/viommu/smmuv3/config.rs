// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a virtual SMMUv3, and the identification registers for it: IDR0 to IDR5,
//! IIDR and AIDR.

use std::collections::BTreeMap;

use crate::spec::smmuv3::regs::{
    Aidr, Httu, Idr0, Idr1, Idr3, Idr5, Iidr, STALL_NONE, STALL_OR_TERMINATE, ST_LEVEL_2,
    TTF_AARCH64,
};
use crate::spec::smmuv3::translation::Granule;
use crate::spec::smmuv3::SubstreamId;

/// The largest queue that IDR1 can express, as binary logarithm of its entries (§6.3.2).
const MAX_QUEUE_BITS: u8 = 19;
/// The smallest queue that Linux's driver accepts: more commands than one of its batches has.
const MIN_QUEUE_BITS: u8 = 7;
/// IDR5.OAS: 48 bits, the most that an SMMUv3.0 can have.
const OAS_48: u8 = 0b101;
/// IDR0.TTENDIAN: translation tables are little-endian.
const LITTLE_ENDIAN: u8 = 0b10;

/// What the virtual SMMUv3 offers to the guest.
///
/// ```
/// use twostage::viommu::smmuv3::SmmuConfig;
///
/// let config = SmmuConfig::default().with_substream_bits(Some(8)).with_ats(true);
/// config.check()?;
/// assert!(config.with_stream_bits(33).check().is_err());
/// # Ok::<(), twostage::viommu::smmuv3::SmmuConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct SmmuConfig {
    /// Width of StreamIDs in bits, 1 to 32. 16 cover every PCI function of a segment.
    pub stream_bits: u8,
    /// Width of SubstreamIDs in bits, at most 20, 0 for none. `None`: as many as the hosts have.
    pub substream_bits: Option<u8>,
    /// Width of input addresses (VAX) in bits: 48, or 52 with the 64 KiB granule.
    pub input_bits: u8,
    /// Width of output addresses (OAS) in bits: 32, 36, 40, 42, 44, 48 or 52; no more than 48 in an
    /// SMMUv3.0. They are GPAs. Linux shares address spaces of processes with devices only if the
    /// guest's processors have no wider ones.
    pub output_bits: u8,
    /// Offer the 4 KiB granule.
    pub granule_4k: bool,
    /// Offer the 16 KiB granule.
    pub granule_16k: bool,
    /// Offer the 64 KiB granule.
    pub granule_64k: bool,
    /// All granules offered were requested explicitly: a host that lacks one is a conflict.
    /// Otherwise one is enough, and the others are dropped.
    pub require_granules: bool,
    /// Offer 16-bit ASIDs rather than 8-bit ones (ASID16).
    pub asid16: bool,
    /// Offer 2-level tables of context descriptors (CD2L).
    pub two_level_contexts: bool,
    /// Offer invalidation by range (RIL).
    pub range_invalidation: bool,
    /// Range invalidation was requested explicitly: a host that lacks it is a conflict. Otherwise
    /// it is dropped.
    pub require_range_invalidation: bool,
    /// Level of support for changing block sizes without break-before-make (BBML), 0 to 2.
    pub break_before_make_level: u8,
    /// The flags of stage 1 that are updated in the guest's tables when it is used (HTTU). `None`:
    /// as far as all hosts do that.
    pub httu: Option<Httu>,
    /// Offer ATS, for devices that have the capability in configuration space.
    pub ats: bool,
    /// Offer page requests (PRI), which need ATS, for devices that make them.
    pub page_requests: bool,
    /// Offer to stall transactions that fault (STALL_MODEL of 0b00): of devices that can be
    /// stalled. Stalled ones can only be terminated with an abort (TERM_MODEL).
    pub stalls: bool,
    /// Send interrupts as messages (MSI).
    pub msi: bool,
    /// Binary logarithm of the maximum command queue size, 7 to 19.
    pub command_queue_bits: u8,
    /// Binary logarithm of the maximum event queue size, 7 to 19.
    pub event_queue_bits: u8,
    /// Binary logarithm of the maximum PRI queue size, 7 to 19.
    pub page_queue_bits: u8,
    /// Tell the guest that terminated transactions are always aborted (TERM_MODEL): it must request
    /// that in each context descriptor.
    pub always_abort: bool,
    /// A host lets context descriptors stall transactions. Unless `stalls` are offered, nothing
    /// could resume them, so each that does is told not to (S1STALLD).
    pub host_stalls: bool,
    /// The x of the SMMUv3.x reported to the guest (AIDR).
    pub minor_revision: u8,
}

impl Default for SmmuConfig {
    fn default() -> Self {
        Self {
            stream_bits: 16,
            substream_bits: None,
            input_bits: 48,
            output_bits: 48,
            granule_4k: true,
            granule_16k: true,
            granule_64k: true,
            require_granules: false,
            asid16: true,
            two_level_contexts: true,
            range_invalidation: true,
            require_range_invalidation: false,
            break_before_make_level: 2,
            httu: None,
            ats: false,
            page_requests: false,
            stalls: false,
            msi: true,
            // Linux makes queues as large as possible: 64 KiB of commands and page requests, 128
            // KiB of events.
            command_queue_bits: 12,
            event_queue_bits: 12,
            page_queue_bits: 12,
            always_abort: true,
            host_stalls: false,
            // The first with range invalidation and break-before-make levels.
            minor_revision: 2,
        }
    }
}

/// An invalid configuration of a virtual SMMUv3.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SmmuConfigError {
    /// StreamIDs have 1 to 32 bits.
    #[error("{0} StreamID bits are not possible; use 1 to 32")]
    StreamBits(u8),
    /// SubstreamIDs have at most 20 bits.
    #[error("{0} SubstreamID bits are too many; the most is {max}", max = SubstreamId::BITS)]
    SubstreamBits(u8),
    /// Input addresses have 48 or 52 bits.
    #[error("input addresses of {0} bits are not supported; use 48 or 52")]
    InputBits(u8),
    /// The architecture does not define this output address size.
    #[error("output addresses of {0} bits are not possible; use 32, 36, 40, 42, 44, 48 or 52")]
    OutputBits(u8),
    /// 52 bits need the 64 KiB granule.
    #[error("input addresses of 52 bits need the 64 KiB granule")]
    WideWithoutGranule,
    /// There would be no translation table format.
    #[error("no translation granule is enabled; nothing could be translated")]
    NoGranule,
    /// Page requests come from devices with ATS.
    #[error("page requests need ATS")]
    PageRequestsAlone,
    /// BBML is 0 to 2.
    #[error("break-before-make level {0} is reserved; use 0, 1 or 2")]
    BreakBeforeMakeLevel(u8),
    /// A queue is too small or too large.
    #[error(
        "a queue of at most 2^{0} entries is not possible; use 2^{MIN_QUEUE_BITS} to \
         2^{MAX_QUEUE_BITS}"
    )]
    QueueBits(u8),
    /// AIDR has four bits for it.
    #[error("SMMUv3.{0} is not possible; use SMMUv3.0 to SMMUv3.15")]
    MinorRevision(u8),
}

impl SmmuConfig {
    setters! {
        with_stream_bits stream_bits: u8;
        with_substream_bits substream_bits: Option<u8>;
        with_input_bits input_bits: u8;
        with_output_bits output_bits: u8;
        with_granule_4k granule_4k: bool;
        with_granule_16k granule_16k: bool;
        with_granule_64k granule_64k: bool;
        with_require_granules require_granules: bool;
        with_asid16 asid16: bool;
        with_two_level_contexts two_level_contexts: bool;
        with_range_invalidation range_invalidation: bool;
        with_require_range_invalidation require_range_invalidation: bool;
        with_break_before_make_level break_before_make_level: u8;
        with_httu httu: Option<Httu>;
        with_ats ats: bool;
        with_page_requests page_requests: bool;
        with_stalls stalls: bool;
        with_msi msi: bool;
        with_command_queue_bits command_queue_bits: u8;
        with_event_queue_bits event_queue_bits: u8;
        with_page_queue_bits page_queue_bits: u8;
        with_always_abort always_abort: bool;
        with_host_stalls host_stalls: bool;
        with_minor_revision minor_revision: u8;
    }

    /// Whether the settings are consistent.
    ///
    /// # Errors
    /// They are not.
    pub fn check(&self) -> Result<(), SmmuConfigError> {
        if !(1..=32).contains(&self.stream_bits) {
            return Err(SmmuConfigError::StreamBits(self.stream_bits));
        }
        if let Some(bits) = self.substream_bits {
            if u32::from(bits) > SubstreamId::BITS {
                return Err(SmmuConfigError::SubstreamBits(bits));
            }
        }
        if !matches!(self.input_bits, 48 | 52) {
            return Err(SmmuConfigError::InputBits(self.input_bits));
        }
        if self.oas().is_none() {
            return Err(SmmuConfigError::OutputBits(self.output_bits));
        }
        if self.input_bits == 52 && !self.granule_64k {
            return Err(SmmuConfigError::WideWithoutGranule);
        }
        if self.granules().next().is_none() {
            return Err(SmmuConfigError::NoGranule);
        }
        if self.break_before_make_level > 2 {
            return Err(SmmuConfigError::BreakBeforeMakeLevel(self.break_before_make_level));
        }
        if self.page_requests && !self.ats {
            return Err(SmmuConfigError::PageRequestsAlone);
        }
        for bits in [self.command_queue_bits, self.event_queue_bits, self.page_queue_bits] {
            if !(MIN_QUEUE_BITS..=MAX_QUEUE_BITS).contains(&bits) {
                return Err(SmmuConfigError::QueueBits(bits));
            }
        }
        if self.minor_revision > 15 {
            return Err(SmmuConfigError::MinorRevision(self.minor_revision));
        }
        Ok(())
    }

    /// The granules offered.
    pub(super) fn granules(&self) -> impl Iterator<Item = Granule> {
        let offered = [self.granule_4k, self.granule_16k, self.granule_64k];
        Granule::ALL.into_iter().zip(offered).filter_map(|(granule, on)| on.then_some(granule))
    }

    /// The encoding of the output address size; `None` if invalid.
    fn oas(&self) -> Option<u8> {
        (0..8).find(|&bits| crate::spec::smmuv3::address_size(bits) == Some(self.output_bits))
    }
}

/// The identification registers of a virtual SMMUv3, and what they cannot express.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// IDR0.
    pub idr0: Idr0,
    /// IDR1.
    pub idr1: Idr1,
    /// IDR3.
    pub idr3: Idr3,
    /// IDR5.
    pub idr5: Idr5,
    /// IIDR: no implementer, so that guests do not work around errata that the host already
    /// handles.
    pub iidr: Iidr,
    /// AIDR.
    pub aidr: Aidr,
    /// Stage 1 must be kept from stalling transactions ([`SmmuConfig::host_stalls`]).
    pub disable_stalls: bool,
}

impl Capabilities {
    /// The registers by name, for reports.
    pub fn registers(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::from([
            ("IDR0", self.idr0.into_bits().into()),
            ("IDR1", self.idr1.into_bits().into()),
            ("IDR3", self.idr3.into_bits().into()),
            ("IDR5", self.idr5.into_bits().into()),
            ("AIDR", self.aidr.into_bits().into()),
        ])
    }
}

impl SmmuConfig {
    /// The identification registers for this configuration. All other features read as absent:
    /// stage 2, EL2, broadcast maintenance, address translation operations.
    ///
    /// # Errors
    /// The configuration is impossible ([`SmmuConfig::check`]).
    pub fn capabilities(&self) -> Result<Capabilities, SmmuConfigError> {
        self.check()?;
        let idr0 = Idr0::new()
            .with_s1p(true)
            .with_ttf(TTF_AARCH64)
            .with_cohacc(true)
            .with_httu(self.httu.unwrap_or_default().into_bits())
            .with_ats(self.ats)
            .with_pri(self.page_requests)
            .with_asid16(self.asid16)
            .with_msi(self.msi)
            .with_cd2l(self.two_level_contexts)
            .with_ttendian(LITTLE_ENDIAN)
            .with_stall_model(if self.stalls { STALL_OR_TERMINATE } else { STALL_NONE })
            .with_term_model(self.always_abort || self.stalls)
            .with_st_level(ST_LEVEL_2);
        let idr1 = Idr1::new()
            .with_sidsize(self.stream_bits)
            .with_ssidsize(self.substream_bits.unwrap_or(0))
            .with_priqs(if self.page_requests { self.page_queue_bits } else { 0 })
            .with_eventqs(self.event_queue_bits)
            .with_cmdqs(self.command_queue_bits);
        // Responses to an overflow have the PASID, whatever STE.PPAR says (PPS).
        let idr3 = Idr3::new()
            .with_pps(self.page_requests)
            .with_ril(self.range_invalidation)
            .with_bbml(self.break_before_make_level);
        let widest = if self.minor_revision == 0 { OAS_48 } else { u8::MAX };
        let idr5 = Idr5::new()
            .with_oas(self.oas().unwrap_or_default().min(widest))
            .with_gran4k(self.granule_4k)
            .with_gran16k(self.granule_16k)
            .with_gran64k(self.granule_64k)
            .with_vax(u8::from(self.input_bits == 52))
            // As many as there are stall tags.
            .with_stall_max(if self.stalls { u16::MAX } else { 0 });
        Ok(Capabilities {
            idr0,
            idr1,
            idr3,
            idr5,
            iidr: Iidr::new(),
            aidr: Aidr::new().with_minor(self.minor_revision),
            disable_stalls: self.host_stalls && !self.stalls,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_possible() {
        assert_eq!(SmmuConfig::default().check(), Ok(()));
    }

    #[test]
    fn impossible_configurations_are_refused_by_name() {
        let with = |change: fn(&mut SmmuConfig)| {
            let mut config = SmmuConfig::default();
            change(&mut config);
            config.check().unwrap_err()
        };
        assert_eq!(with(|c| c.stream_bits = 0), SmmuConfigError::StreamBits(0));
        assert_eq!(with(|c| c.stream_bits = 33), SmmuConfigError::StreamBits(33));
        assert_eq!(with(|c| c.substream_bits = Some(21)), SmmuConfigError::SubstreamBits(21));
        assert_eq!(with(|c| c.input_bits = 39), SmmuConfigError::InputBits(39));
        assert_eq!(with(|c| c.output_bits = 46), SmmuConfigError::OutputBits(46));
        let wide = |c: &mut SmmuConfig| (c.input_bits, c.granule_64k) = (52, false);
        assert_eq!(with(wide), SmmuConfigError::WideWithoutGranule);
        let none = |c: &mut SmmuConfig| {
            (c.granule_4k, c.granule_16k, c.granule_64k) = (false, false, false);
        };
        assert_eq!(with(none), SmmuConfigError::NoGranule);
        let level = |c: &mut SmmuConfig| c.break_before_make_level = 3;
        assert_eq!(with(level), SmmuConfigError::BreakBeforeMakeLevel(3));
        assert_eq!(with(|c| c.command_queue_bits = 6), SmmuConfigError::QueueBits(6));
        assert_eq!(with(|c| c.event_queue_bits = 20), SmmuConfigError::QueueBits(20));
        assert_eq!(with(|c| c.minor_revision = 16), SmmuConfigError::MinorRevision(16));
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
}
