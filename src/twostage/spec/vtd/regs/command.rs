// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands, table pointers and the register-based invalidation interface (§11.4.4–§11.4.6,
//! §11.4.8, §11.4.10).

use twostage_bits::bitfield;

use crate::spec::vtd::PAGE_SHIFT;

/// Global command register (§11.4.4); write-only.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Gcmd {
    #[bits(23)]
    __: u32,
    /// CFI: allow compatibility-format interrupts.
    pub cfi: bool,
    /// SIRTP: set the interrupt remapping table pointer.
    pub sirtp: bool,
    /// IRE: enable interrupt remapping.
    pub ire: bool,
    /// QIE: enable queued invalidation.
    pub qie: bool,
    /// WBF: flush the write buffer.
    pub wbf: bool,
    /// EAFL: enable advanced fault logging.
    pub eafl: bool,
    /// SFL: set the fault log pointer.
    pub sfl: bool,
    /// SRTP: set the root table pointer.
    pub srtp: bool,
    /// TE: enable translation.
    pub te: bool,
}

/// Global status register (§11.4.4); read-only.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Gsts {
    #[bits(23)]
    __: u32,
    /// CFIS: compatibility-format interrupts pass.
    pub cfis: bool,
    /// IRTPS: the interrupt remapping table pointer is set.
    pub irtps: bool,
    /// IRES: interrupt remapping is enabled.
    pub ires: bool,
    /// QIES: queued invalidation is enabled.
    pub qies: bool,
    /// WBFS: a write buffer flush is under way.
    pub wbfs: bool,
    /// AFLS: advanced fault logging is enabled.
    pub afls: bool,
    /// FLS: the fault log pointer is set.
    pub fls: bool,
    /// RTPS: the root table pointer is set.
    pub rtps: bool,
    /// TES: translation is enabled.
    pub tes: bool,
}

/// How the root table is to be read (RTADDR.TTM).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TranslationTableMode {
    /// 00: legacy root and context entries.
    Legacy,
    /// 01: scalable-mode root and context entries.
    Scalable,
    /// 10: reserved.
    Reserved,
    /// 11: every request is aborted.
    AbortDma,
}

/// Root table address register (§11.4.5).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Rtaddr {
    #[bits(10)]
    __: u16,
    /// TTM, as bits; see [`Rtaddr::mode`].
    #[bits(2)]
    pub ttm: u8,
    /// RTA: address of the root table, in 4 KiB pages.
    #[bits(52)]
    pub rta: u64,
}

impl Rtaddr {
    /// Bits that software can write.
    pub const WRITABLE: u64 = !0x3ff;

    /// The translation table mode.
    pub const fn mode(self) -> TranslationTableMode {
        match self.ttm() {
            0 => TranslationTableMode::Legacy,
            1 => TranslationTableMode::Scalable,
            2 => TranslationTableMode::Reserved,
            _ => TranslationTableMode::AbortDma,
        }
    }

    /// GPA of the root table, in bytes.
    pub const fn root_table(self) -> u64 {
        self.rta() << PAGE_SHIFT
    }
}

/// Granularity of a context-cache invalidation (CCMD.CIRG, descriptor field G).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ContextGranularity {
    /// 01: every entry.
    Global,
    /// 10: entries of a domain.
    Domain,
    /// 11: entries of a device, or of several by function mask.
    Device,
}

impl ContextGranularity {
    /// The granularity that `bits` name; `None` for the reserved 00.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            1 => Some(Self::Global),
            2 => Some(Self::Domain),
            3 => Some(Self::Device),
            _ => None,
        }
    }

    /// The two bits of the granularity.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Global => 1,
            Self::Domain => 2,
            Self::Device => 3,
        }
    }
}

/// Context command register (§11.4.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Ccmd {
    /// DID: domain id.
    pub did: u16,
    /// SID: source id.
    pub sid: u16,
    /// FM: low bits of the function number to ignore.
    #[bits(2)]
    pub fm: u8,
    #[bits(25)]
    __: u32,
    /// CAIG: granularity of the completed invalidation; 00 if there was none. Read-only.
    #[bits(2)]
    pub caig: u8,
    /// CIRG: requested granularity.
    #[bits(2)]
    pub cirg: u8,
    /// ICC: invalidate now; clear when it is done.
    pub icc: bool,
}

impl Ccmd {
    /// Bits that software can write.
    pub const WRITABLE: u64 = 0xe000_0003_ffff_ffff;
}

/// Granularity of an IOTLB invalidation (IOTLB.IIRG, descriptor field G).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IotlbGranularity {
    /// 01: every entry.
    Global,
    /// 10: entries of a domain.
    Domain,
    /// 11: pages of a domain.
    Page,
}

impl IotlbGranularity {
    /// The granularity that `bits` name; `None` for the reserved 00.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            1 => Some(Self::Global),
            2 => Some(Self::Domain),
            3 => Some(Self::Page),
            _ => None,
        }
    }

    /// The two bits of the granularity.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Global => 1,
            Self::Domain => 2,
            Self::Page => 3,
        }
    }
}

/// IOTLB invalidate register (§11.4.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct IotlbReg {
    __: u32,
    /// DID: domain id.
    pub did: u16,
    /// DW: drain writes.
    pub dw: bool,
    /// DR: drain reads.
    pub dr: bool,
    #[bits(7)]
    __: u8,
    /// IAIG: granularity of the completed invalidation; 00 if there was none. Read-only.
    #[bits(2)]
    pub iaig: u8,
    #[bits(1)]
    __: u8,
    /// IIRG: requested granularity.
    #[bits(2)]
    pub iirg: u8,
    #[bits(1)]
    __: u8,
    /// IVT: invalidate now; clear when it is done.
    pub ivt: bool,
}

impl IotlbReg {
    /// Bits that software can write.
    pub const WRITABLE: u64 = 0xb003_ffff_0000_0000;
}

/// Invalidate address register (§11.4.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Iva {
    /// AM: low bits of the page number to ignore.
    #[bits(6)]
    pub am: u8,
    /// IH: only leaf entries changed.
    pub ih: bool,
    #[bits(5)]
    __: u8,
    /// ADDR: address, in 4 KiB pages.
    #[bits(52)]
    pub addr: u64,
}

impl Iva {
    /// Bits that software can write.
    pub const WRITABLE: u64 = !0xf80;
}

/// Protected memory enable register (§11.4.8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Pmen {
    /// PRS: protection is in effect. Read-only.
    pub prs: bool,
    #[bits(30)]
    __: u32,
    /// EPM: enable protected memory.
    pub epm: bool,
}

/// Interrupt remapping table address register (§11.4.10).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Irta {
    /// S: the table has `2^(s + 1)` entries.
    #[bits(4)]
    pub s: u8,
    #[bits(7)]
    __: u8,
    /// EIME: extended interrupt mode.
    pub eime: bool,
    /// Address of the table, in 4 KiB pages.
    #[bits(52)]
    pub addr: u64,
}

impl Irta {
    /// Bits that software can write.
    pub const WRITABLE: u64 = !0x7f0;

    /// GPA of the table, in bytes.
    pub const fn base(self) -> u64 {
        self.addr() << PAGE_SHIFT
    }

    /// Number of entries in the table.
    pub const fn entries(self) -> u32 {
        2 << self.s()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(Gcmd::new().with_te(true).into_bits(), 1 << 31);
        assert_eq!(Gcmd::new().with_cfi(true).into_bits(), 1 << 23);
        assert_eq!(Gsts::new().with_rtps(true).into_bits(), 1 << 30);
        assert_eq!(Gsts::new().with_qies(true).into_bits(), 1 << 26);
        assert_eq!(Rtaddr::from_bits(0x1234_5c00).root_table(), 0x1234_5000);
        assert_eq!(Rtaddr::from_bits(0x400).mode(), TranslationTableMode::Scalable);
        assert_eq!(Rtaddr::from_bits(0xc00).mode(), TranslationTableMode::AbortDma);
        assert_eq!(Ccmd::new().with_caig(3).into_bits(), 3 << 59);
        assert_eq!(Ccmd::new().with_cirg(3).into_bits(), 3 << 61);
        assert_eq!(IotlbReg::new().with_did(0xffff).into_bits(), 0xffff << 32);
        assert_eq!(IotlbReg::new().with_iaig(3).into_bits(), 3 << 57);
        assert_eq!(IotlbReg::new().with_iirg(3).into_bits(), 3 << 60);
        assert_eq!(IotlbReg::new().with_ivt(true).into_bits(), 1 << 63);
        assert_eq!(Iva::new().with_ih(true).into_bits(), 1 << 6);
        assert_eq!(Pmen::new().with_epm(true).into_bits(), 1 << 31);
        assert_eq!(Irta::new().with_eime(true).into_bits(), 1 << 11);
    }

    #[test]
    fn what_is_writable_is_what_is_neither_reserved_nor_read_only() {
        let all = Rtaddr::new().with_ttm(3).with_rta((1 << 52) - 1);
        assert_eq!(all.into_bits(), Rtaddr::WRITABLE);
        let all = Ccmd::new().with_did(!0).with_sid(!0).with_fm(3).with_cirg(3).with_icc(true);
        assert_eq!(all.into_bits(), Ccmd::WRITABLE);
        let all = IotlbReg::new().with_did(!0).with_dw(true).with_dr(true).with_iirg(3);
        assert_eq!(all.with_ivt(true).into_bits(), IotlbReg::WRITABLE);
        let all = Iva::new().with_am(63).with_ih(true).with_addr((1 << 52) - 1);
        assert_eq!(all.into_bits(), Iva::WRITABLE);
        let all = Irta::new().with_s(15).with_eime(true).with_addr((1 << 52) - 1);
        assert_eq!(all.into_bits(), Irta::WRITABLE);
    }

    #[test]
    fn granularities_round_trip() {
        for bits in 0..4 {
            assert_eq!(ContextGranularity::from_bits(bits).map_or(0, |g| g.into_bits()), bits);
            assert_eq!(IotlbGranularity::from_bits(bits).map_or(0, |g| g.into_bits()), bits);
        }
    }
}
