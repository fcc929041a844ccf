// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stream table: level 1 stream table descriptors (§5.1) and stream table entries (§5.2).

use bitfield_struct::bitfield;

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

    /// Entries of the level 2 table; 0 when there is none: Span is 0 or reserved.
    pub const fn entries(self) -> u32 {
        match self.span() {
            span @ 1..=Self::MAX_SPAN => 1 << (span - 1),
            _ => 0,
        }
    }

    /// GPA of the level 2 table, in bytes. It is aligned to its size: the bits below do not count.
    pub const fn l2_table(self) -> u64 {
        let size = (self.entries() as u64 * STE_SIZE).next_power_of_two();
        (self.l2ptr() << 6) & !(size - 1)
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
    /// What the three bits of Config say. Bits above are ignored.
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

/// What becomes of transactions without SubstreamID where substreams are enabled (STE.S1DSS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DefaultSubstream {
    /// 0b00, and the reserved 0b11: they are terminated with F_STREAM_DISABLED.
    Terminate,
    /// 0b01: stage 1 lets them pass.
    Bypass,
    /// 0b10: they have SubstreamID 0, which no transaction may bring.
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

/// How ATS is served (STE.EATS).
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

/// Bits 63:0 of a stream table entry (§5.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ste0 {
    /// V: valid.
    pub v: bool,
    /// Config: what is done with transactions, as bits; see [`StreamConfig`].
    #[bits(3)]
    pub config: u8,
    /// S1Fmt: shape of the context descriptor table, as bits; see [`Ste::s1_format`].
    #[bits(2)]
    pub s1fmt: u8,
    /// S1ContextPtr: address of the context descriptor table, in units of 64 bytes.
    #[bits(46)]
    pub s1contextptr: u64,
    #[bits(7)]
    __: u8,
    /// S1CDMax: the table has `2^s1cdmax` context descriptors; 0 disables substreams.
    #[bits(5)]
    pub s1cdmax: u8,
}

/// Bits 127:64 of a stream table entry (§5.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ste1 {
    /// S1DSS: transactions without SubstreamID, as bits; see [`Ste::default_substream`].
    #[bits(2)]
    pub s1dss: u8,
    /// S1CIR: inner cacheability of the context descriptor table.
    #[bits(2)]
    pub s1cir: u8,
    /// S1COR: outer cacheability of the context descriptor table.
    #[bits(2)]
    pub s1cor: u8,
    /// S1CSH: shareability of the context descriptor table.
    #[bits(2)]
    pub s1csh: u8,
    /// S2HWU59 to S2HWU62: use of descriptor bits 62:59 by hardware.
    #[bits(4)]
    pub s2hwu: u8,
    /// DRE: destructive reads may be done.
    pub dre: bool,
    /// CONT: `2^cont` consecutive entries are alike.
    #[bits(4)]
    pub cont: u8,
    /// DCP: directed cache prefetches may be done.
    pub dcp: bool,
    /// PPAR: page request auto-responses have the PASID.
    pub ppar: bool,
    /// MEV: events may be merged.
    pub mev: bool,
    /// SW_RESERVED: for software.
    #[bits(4)]
    pub sw_reserved: u8,
    /// S1PIE: stage 1 permission indirection.
    pub s1pie: bool,
    /// S2FWB: stage 2 forces write-back.
    pub s2fwb: bool,
    /// S1MPAM: stage 1 decides the MPAM values.
    pub s1mpam: bool,
    /// S1STALLD: no transaction may stall by stage 1's wish.
    pub s1stalld: bool,
    /// EATS: ATS, as bits; see [`Ste::ats`].
    #[bits(2)]
    pub eats: u8,
    /// STRW: StreamWorld.
    #[bits(2)]
    pub strw: u8,
    /// MemAttr: memory type that overrides the incoming one.
    #[bits(4)]
    pub memattr: u8,
    /// MTCFG: MemAttr counts.
    pub mtcfg: bool,
    /// ALLOCCFG: allocation hints.
    #[bits(4)]
    pub alloccfg: u8,
    #[bits(3)]
    __: u8,
    /// SHCFG: shareability; 0b01 is the incoming one.
    #[bits(2)]
    pub shcfg: u8,
    /// NSCFG: Non-secure attribute.
    #[bits(2)]
    pub nscfg: u8,
    /// PRIVCFG: privilege; 0b00 is the incoming one.
    #[bits(2)]
    pub privcfg: u8,
    /// INSTCFG: instruction or data; 0b00 is the incoming one.
    #[bits(2)]
    pub instcfg: u8,
    /// IMPLEMENTATION DEFINED.
    #[bits(12)]
    pub implementation: u16,
}

/// Bits 191:128 of a stream table entry (§5.2): stage 2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ste2 {
    /// S2VMID: the virtual machine that translations belong to.
    pub s2vmid: u16,
    /// IMPLEMENTATION DEFINED.
    pub implementation: u16,
    /// S2T0SZ: stage 2 takes `64 - s2t0sz` bits of address.
    #[bits(6)]
    pub s2t0sz: u8,
    /// S2SL0: level at which the walk starts.
    #[bits(2)]
    pub s2sl0: u8,
    /// S2IR0: inner cacheability of the tables.
    #[bits(2)]
    pub s2ir0: u8,
    /// S2OR0: outer cacheability of the tables.
    #[bits(2)]
    pub s2or0: u8,
    /// S2SH0: shareability of the tables.
    #[bits(2)]
    pub s2sh0: u8,
    /// S2TG: granule, as TG0 of a context descriptor; see [`super::translation::Granule`].
    #[bits(2)]
    pub s2tg: u8,
    /// S2PS: size of physical addresses; see [`super::address_size`].
    #[bits(3)]
    pub s2ps: u8,
    /// S2AA64: the tables are VMSAv8-64.
    pub s2aa64: bool,
    /// S2ENDI: the tables are big-endian.
    pub s2endi: bool,
    /// S2AFFD: a clear access flag is no fault.
    pub s2affd: bool,
    /// S2PTW: table walks must not reach Device memory.
    pub s2ptw: bool,
    /// S2HD: hardware keeps the dirty state.
    pub s2hd: bool,
    /// S2HA: hardware keeps the access flag.
    pub s2ha: bool,
    /// S2S: faulting transactions stall.
    pub s2s: bool,
    /// S2R: faults are recorded.
    pub s2r: bool,
    /// S2HAFT: hardware keeps the access flag of table descriptors.
    pub s2haft: bool,
    /// S2PIE: stage 2 permission indirection.
    pub s2pie: bool,
    /// S2POE: stage 2 permission overlays.
    pub s2poe: bool,
    /// DPT_VMATCH: how the device permission table matches VMIDs.
    #[bits(2)]
    pub dpt_vmatch: u8,
}

/// Bits 255:192 of a stream table entry (§5.2): the stage 2 table.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Ste3 {
    /// S2NSW and S2NSA: of Secure streams.
    #[bits(2)]
    pub secure: u8,
    /// S2SL0_2: bit 2 of S2SL0, for 52-bit addresses of the 4K and 16K granules.
    pub s2sl0_2: bool,
    /// S2DS: the 4K and 16K granules have 52-bit addresses.
    pub s2ds: bool,
    /// S2TTB: address of the stage 2 table, in units of 16 bytes.
    #[bits(48)]
    pub s2ttb: u64,
    #[bits(12)]
    __: u16,
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
    /// The entry that `words` hold.
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

    /// The shape of the context descriptor table; it counts only where substreams are enabled.
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

    /// What becomes of transactions without SubstreamID, where substreams are enabled.
    pub const fn default_substream(&self) -> DefaultSubstream {
        match self.qw1.s1dss() {
            1 => DefaultSubstream::Bypass,
            2 => DefaultSubstream::Substream0,
            _ => DefaultSubstream::Terminate,
        }
    }

    /// How ATS is served, where the entry translates.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(Ste0::new().with_config(7).into_bits(), 7 << 1);
        assert_eq!(Ste0::new().with_s1fmt(3).into_bits(), 3 << 4);
        assert_eq!(Ste0::new().with_s1contextptr(u64::MAX >> 18).into_bits(), 0xf_ffff_ffff_ffc0);
        assert_eq!(Ste0::new().with_s1cdmax(31).into_bits(), 31 << 59);
        for (bits, first, last) in [
            (Ste1::new().with_s1dss(3), 64, 65),
            (Ste1::new().with_s1cir(3), 66, 67),
            (Ste1::new().with_s1cor(3), 68, 69),
            (Ste1::new().with_s1csh(3), 70, 71),
            (Ste1::new().with_s2hwu(15), 72, 75),
            (Ste1::new().with_dre(true), 76, 76),
            (Ste1::new().with_cont(15), 77, 80),
            (Ste1::new().with_dcp(true), 81, 81),
            (Ste1::new().with_ppar(true), 82, 82),
            (Ste1::new().with_mev(true), 83, 83),
            (Ste1::new().with_sw_reserved(15), 84, 87),
            (Ste1::new().with_s1pie(true), 88, 88),
            (Ste1::new().with_s2fwb(true), 89, 89),
            (Ste1::new().with_s1mpam(true), 90, 90),
            (Ste1::new().with_s1stalld(true), 91, 91),
            (Ste1::new().with_eats(3), 92, 93),
            (Ste1::new().with_strw(3), 94, 95),
            (Ste1::new().with_memattr(15), 96, 99),
            (Ste1::new().with_mtcfg(true), 100, 100),
            (Ste1::new().with_alloccfg(15), 101, 104),
            (Ste1::new().with_shcfg(3), 108, 109),
            (Ste1::new().with_nscfg(3), 110, 111),
            (Ste1::new().with_privcfg(3), 112, 113),
            (Ste1::new().with_instcfg(3), 114, 115),
        ] {
            assert_eq!(bits.into_bits(), mask(first - 64, last - 64), "{bits:?}");
        }
        for (bits, first, last) in [
            (Ste2::new().with_s2vmid(u16::MAX), 128, 143),
            (Ste2::new().with_s2t0sz(63), 160, 165),
            (Ste2::new().with_s2sl0(3), 166, 167),
            (Ste2::new().with_s2ir0(3), 168, 169),
            (Ste2::new().with_s2or0(3), 170, 171),
            (Ste2::new().with_s2sh0(3), 172, 173),
            (Ste2::new().with_s2tg(3), 174, 175),
            (Ste2::new().with_s2ps(7), 176, 178),
            (Ste2::new().with_s2aa64(true), 179, 179),
            (Ste2::new().with_s2endi(true), 180, 180),
            (Ste2::new().with_s2affd(true), 181, 181),
            (Ste2::new().with_s2ptw(true), 182, 182),
            (Ste2::new().with_s2hd(true), 183, 183),
            (Ste2::new().with_s2ha(true), 184, 184),
            (Ste2::new().with_s2s(true), 185, 185),
            (Ste2::new().with_s2r(true), 186, 186),
        ] {
            assert_eq!(bits.into_bits(), mask(first - 128, last - 128), "{bits:?}");
        }
        assert_eq!(Ste3::new().with_s2ttb(u64::MAX >> 16).into_bits(), 0xf_ffff_ffff_fff0);
    }

    fn mask(first: u32, last: u32) -> u64 {
        u64::MAX >> (63 - last) & u64::MAX << first
    }

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
