// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stream table: level 1 stream table descriptors (§5.1) and stream table entries (§5.2).

mod words;

use twostage_bits::bitfield;

pub use words::{Ste0, Ste1, Ste2, Ste3};

/// Size of a level 1 stream table descriptor, in bytes.
pub const L1_DESCRIPTOR_SIZE: u64 = 8;
/// Size of a stream table entry, in bytes.
pub const STE_SIZE: u64 = 64;
/// 64-bit words of a stream table entry.
pub const STE_WORDS: usize = 8;

/// Level 1 stream table descriptor, L1STD (§5.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct L1StreamTableDescriptor {
    /// Span: the level 2 table has `2^(span - 1)` entries; see
    /// [`L1StreamTableDescriptor::entries`].
    #[bits(5)]
    pub span: u8,
    __: bool,
    /// L2Ptr: address of the level 2 table, in units of 64 bytes.
    #[bits(46)]
    pub l2ptr: u64,
    #[bits(12)]
    __: u16,
}

impl L1StreamTableDescriptor {
    /// The widest Span that is not reserved.
    pub const MAX_SPAN: u8 = 11;

    /// Entries of the level 2 table; 0 if there is none: Span is 0 or reserved.
    pub const fn entries(self) -> u32 {
        match self.span() {
            span @ 1..=Self::MAX_SPAN => 1 << (span - 1),
            _ => 0,
        }
    }

    /// GPA of the level 2 table, in bytes. It is aligned to its size: the bits below are ignored.
    pub const fn l2_table(self) -> u64 {
        let size = (self.entries() as u64 * STE_SIZE).next_power_of_two();
        (self.l2ptr() << 6) & !(size - 1)
    }
}

/// Stream table entry, STE (§5.2): 512 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ste {
    /// Bits 63:0: validity, configuration, context descriptor table.
    pub qw0: Ste0,
    /// Bits 127:64: stage 1, ATS, attributes.
    pub qw1: Ste1,
    /// Bits 191:128: stage 2.
    pub qw2: Ste2,
    /// Bits 255:192: stage 2 table.
    pub qw3: Ste3,
    /// Bits 511:256: Secure stage 2, MPAM, permission overlays.
    pub rest: [u64; 4],
}

impl Ste {
    /// Decodes `words`.
    pub const fn from_words(words: [u64; STE_WORDS]) -> Self {
        let [qw0, qw1, qw2, qw3, r4, r5, r6, r7] = words;
        Self {
            qw0: Ste0::from_bits(qw0),
            qw1: Ste1::from_bits(qw1),
            qw2: Ste2::from_bits(qw2),
            qw3: Ste3::from_bits(qw3),
            rest: [r4, r5, r6, r7],
        }
    }

    /// The words of the entry.
    pub const fn to_words(self) -> [u64; STE_WORDS] {
        let [r4, r5, r6, r7] = self.rest;
        [
            self.qw0.into_bits(),
            self.qw1.into_bits(),
            self.qw2.into_bits(),
            self.qw3.into_bits(),
            r4,
            r5,
            r6,
            r7,
        ]
    }

    /// What is done with transactions.
    pub const fn config(&self) -> StreamConfig {
        StreamConfig::from_bits(self.qw0.config())
    }

    /// The format of the context descriptor table, if substreams are enabled.
    pub const fn s1_format(&self) -> S1Format {
        match self.qw0.s1fmt() {
            1 => S1Format::TwoLevel4K,
            2 => S1Format::TwoLevel64K,
            _ => S1Format::Linear,
        }
    }

    /// Address of the context descriptor table, in bytes.
    pub const fn context_table(&self) -> u64 {
        self.qw0.s1contextptr() << 6
    }

    /// The treatment of transactions without SubstreamID, if substreams are enabled.
    pub const fn default_substream(&self) -> DefaultSubstream {
        match self.qw1.s1dss() {
            1 => DefaultSubstream::Bypass,
            2 => DefaultSubstream::Substream0,
            _ => DefaultSubstream::Terminate,
        }
    }

    /// ATS support, if the entry translates.
    pub const fn ats(&self) -> EnableAts {
        match self.qw1.eats() {
            0 => EnableAts::Off,
            1 => EnableAts::Full,
            2 => EnableAts::SplitStage,
            _ => EnableAts::PermissionTable,
        }
    }

    /// Address of the stage 2 table, in bytes.
    pub const fn stage2_table(&self) -> u64 {
        self.qw3.s2ttb() << 4
    }
}

/// What a stream table entry does with transactions (STE.Config).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamConfig {
    /// 0b0xx: they are terminated, and no event is recorded.
    Abort,
    /// 0b100: they pass.
    Bypass,
    /// 0b101: through stage 1.
    Stage1,
    /// 0b110: through stage 2.
    Stage2,
    /// 0b111: through stage 1, then stage 2.
    Nested,
}

impl StreamConfig {
    /// Decodes the three bits of Config. Bits above are ignored.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            4 => Self::Bypass,
            5 => Self::Stage1,
            6 => Self::Stage2,
            7 => Self::Nested,
            _ => Self::Abort,
        }
    }

    /// The three bits of Config.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Abort => 0,
            Self::Bypass => 4,
            Self::Stage1 => 5,
            Self::Stage2 => 6,
            Self::Nested => 7,
        }
    }

    /// Whether stage 1 translates.
    pub const fn stage1(self) -> bool {
        matches!(self, Self::Stage1 | Self::Nested)
    }

    /// Whether stage 2 translates.
    pub const fn stage2(self) -> bool {
        matches!(self, Self::Stage2 | Self::Nested)
    }
}

/// The shape of the table of context descriptors (STE.S1Fmt), when there is more than one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum S1Format {
    /// 0b00, and the reserved 0b11: one table of context descriptors.
    Linear,
    /// 0b01: two levels; the tables of the second have 64 context descriptors (4 KiB).
    TwoLevel4K,
    /// 0b10: two levels; the tables of the second have 1024 context descriptors (64 KiB).
    TwoLevel64K,
}

impl S1Format {
    /// The two bits of S1Fmt.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Linear => 0,
            Self::TwoLevel4K => 1,
            Self::TwoLevel64K => 2,
        }
    }

    /// Bits of a SubstreamID that index a table of the second level; `None` for one level.
    pub const fn l2_index_bits(self) -> Option<u8> {
        match self {
            Self::Linear => None,
            Self::TwoLevel4K => Some(6),
            Self::TwoLevel64K => Some(10),
        }
    }
}

/// The treatment of transactions without SubstreamID if substreams are enabled (STE.S1DSS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DefaultSubstream {
    /// 0b00, and the reserved 0b11: they are terminated with F_STREAM_DISABLED.
    Terminate,
    /// 0b01: they bypass stage 1.
    Bypass,
    /// 0b10: they use SubstreamID 0, which no transaction may carry.
    Substream0,
}

impl DefaultSubstream {
    /// The two bits of S1DSS.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Terminate => 0,
            Self::Bypass => 1,
            Self::Substream0 => 2,
        }
    }
}

/// ATS support (STE.EATS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EnableAts {
    /// 0b00: translation requests and translated transactions are refused.
    Off,
    /// 0b01: full ATS.
    Full,
    /// 0b10: split stages: translated transactions go through stage 2.
    SplitStage,
    /// 0b11: full ATS, checked against the device permission table; reserved without one.
    PermissionTable,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        let words = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(Ste::from_words(words).to_words(), words);
    }

    #[test]
    fn reserved_encodings_behave_as_the_specification_says() {
        for bits in 0..8 {
            let config = StreamConfig::from_bits(bits);
            assert_eq!(config.into_bits(), if bits < 4 { 0 } else { bits });
            assert_eq!(config.stage1(), bits >= 4 && bits & 1 != 0);
            assert_eq!(config.stage2(), bits >= 4 && bits & 2 != 0);
        }
        let reserved = Ste::from_words([3 << 4, 3, 0, 0, 0, 0, 0, 0]);
        assert_eq!(reserved.s1_format(), S1Format::Linear);
        assert_eq!(reserved.default_substream(), DefaultSubstream::Terminate);
    }

    #[test]
    fn an_entry_as_a_linux_driver_writes_it() {
        // Stage 1 with two levels of context descriptors (64 KiB), up to 16 bits of SubstreamID,
        // SSID 0 by default, cacheable inner-shareable tables, full ATS, incoming shareability.
        let ste = Ste::from_words([
            0x8000_0012_3456_782b,
            0x0000_1000_1000_00d6 | 1 << 27,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
        assert!(ste.qw0.v());
        assert_eq!(ste.config(), StreamConfig::Stage1);
        assert_eq!(ste.s1_format(), S1Format::TwoLevel64K);
        assert_eq!(ste.context_table(), 0x12_3456_7800);
        assert_eq!(ste.qw0.s1cdmax(), 16);
        assert_eq!(ste.default_substream(), DefaultSubstream::Substream0);
        assert_eq!((ste.qw1.s1cir(), ste.qw1.s1cor(), ste.qw1.s1csh()), (1, 1, 3));
        assert_eq!(ste.ats(), EnableAts::Full);
        assert_eq!(ste.qw1.shcfg(), 1);
        assert!(ste.qw1.s1stalld());
    }

    #[test]
    fn level_2_tables_are_aligned_to_their_size() {
        let descriptor = L1StreamTableDescriptor::from_bits(0x8_1234_5fc0 | 9);
        assert_eq!(descriptor.entries(), 256);
        assert_eq!(descriptor.l2_table(), 0x8_1234_4000);
        assert_eq!(L1StreamTableDescriptor::from_bits(0x1fc0 | 1).l2_table(), 0x1fc0);
        assert_eq!(L1StreamTableDescriptor::from_bits(0x1fc0).entries(), 0);
        for span in 12..32 {
            assert_eq!(L1StreamTableDescriptor::new().with_span(span).entries(), 0);
        }
    }
}
