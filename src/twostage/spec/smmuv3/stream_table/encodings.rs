// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Decoding of stream table entry fields (§5.2).

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
