// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IDR0 to IDR5, IIDR and AIDR for a configuration.

use std::collections::BTreeMap;

use super::config::{SmmuConfig, SmmuConfigError};
use crate::spec::smmuv3::regs::{
    Aidr, Idr0, Idr1, Idr3, Idr5, Iidr, STALL_NONE, ST_LEVEL_2, TTF_AARCH64,
};

/// IDR0.TTENDIAN: translation tables are little-endian.
const LITTLE_ENDIAN: u8 = 0b10;

/// The identification registers of a virtual SMMUv3, and what they cannot express.
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
}

#[cfg(test)]
mod tests {
    use super::*;

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
