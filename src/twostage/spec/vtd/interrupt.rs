// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt requests (§5.1.2) and interrupt remapping table entries (§9.10).

use std::ops::RangeInclusive;

use twostage_bits::bitfield;

/// Bits 31:20 of the address of every interrupt request.
const INTERRUPT_PREFIX: u16 = 0xfee;

/// Requests without PASID in this range are interrupt requests, not memory accesses (§3.14).
pub const INTERRUPT_RANGE: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

/// Size of an interrupt remapping table entry, in bytes.
pub const IRTE_SIZE: u64 = 16;

/// Low half of the address of an interrupt request in compatibility format (§5.1.2.1), which is
/// also that of a message to a LAPIC.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CompatibilityAddress {
    #[bits(2)]
    __: u8,
    /// Destination mode: logical.
    pub logical: bool,
    /// Redirection hint.
    pub redirection_hint: bool,
    /// Interrupt format: 0.
    pub remappable: bool,
    #[bits(7)]
    __: u8,
    /// Destination: bits 7:0 of an APIC ID.
    pub destination: u8,
    /// 0xFEE.
    #[bits(12, default = INTERRUPT_PREFIX)]
    pub prefix: u16,
}

impl CompatibilityAddress {
    /// Whether the address is that of an interrupt request.
    pub const fn is_interrupt(self) -> bool {
        self.prefix() == INTERRUPT_PREFIX
    }
}

/// Low half of the address of an interrupt request in remappable format (§5.1.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct RemappableAddress {
    #[bits(2)]
    __: u8,
    /// Bit 15 of the handle.
    pub handle_high: bool,
    /// SHV: the data has a subhandle.
    pub shv: bool,
    /// Interrupt format: 1.
    #[bits(default = true)]
    pub remappable: bool,
    /// Bits 14:0 of the handle.
    #[bits(15)]
    pub handle_low: u16,
    /// 0xFEE.
    #[bits(12, default = INTERRUPT_PREFIX)]
    pub prefix: u16,
}

impl RemappableAddress {
    /// The handle.
    pub const fn handle(self) -> u16 {
        (self.handle_high() as u16) << 15 | self.handle_low()
    }

    /// The request of `handle`.
    pub const fn with_handle(self, handle: u16) -> Self {
        self.with_handle_low(handle & 0x7fff).with_handle_high(handle >> 15 != 0)
    }
}

/// Data of an interrupt request in remappable format, if SHV is set (§5.1.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct RemappableData {
    /// Added to the handle.
    pub subhandle: u16,
    /// Reserved, must be 0.
    pub reserved: u16,
}

/// Data of a message to a LAPIC (Intel SDM Vol. 3, §11.11.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct MessageData {
    /// Vector.
    pub vector: u8,
    /// Delivery mode.
    #[bits(3)]
    pub delivery_mode: u8,
    #[bits(3)]
    __: u8,
    /// Level-triggered: asserted.
    pub assert: bool,
    /// Trigger mode: level.
    pub level: bool,
    __: u16,
}

/// Low 64 bits of an interrupt remapping table entry (§9.10).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct IrteLow {
    /// P: present.
    pub p: bool,
    /// FPD: qualified faults are not recorded.
    pub fpd: bool,
    /// DM: destination mode, logical.
    pub dm: bool,
    /// RH: redirection hint.
    pub rh: bool,
    /// TM: trigger mode, level.
    pub tm: bool,
    /// DLM: delivery mode.
    #[bits(3)]
    pub dlm: u8,
    /// For software.
    #[bits(4)]
    pub avail: u8,
    #[bits(3)]
    __: u8,
    /// IM: posted, if CAP.PI is set.
    pub im: bool,
    /// V: vector.
    pub v: u8,
    __: u8,
    /// DST: destination. All of it in extended interrupt mode, else bits 15:8.
    pub dst: u32,
}

/// Source validation type (IRTE.SVT, §9.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceValidation {
    /// 00: any source.
    None,
    /// 01: SID, except the bits that SQ ignores.
    Source,
    /// 10: the bus is from SID\[15:8\] to SID\[7:0\].
    Bus,
    /// 11: reserved.
    Reserved,
}

/// High 64 bits of an interrupt remapping table entry (§9.10).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct IrteHigh {
    /// SID: the allowed source.
    pub sid: u16,
    /// SQ: which bits of the function number are ignored.
    #[bits(2)]
    pub sq: u8,
    /// SVT, as bits; see [`IrteHigh::validation`].
    #[bits(2)]
    pub svt: u8,
    #[bits(44)]
    __: u64,
}

impl IrteHigh {
    /// How the source is validated.
    pub const fn validation(self) -> SourceValidation {
        match self.svt() {
            0 => SourceValidation::None,
            1 => SourceValidation::Source,
            2 => SourceValidation::Bus,
            _ => SourceValidation::Reserved,
        }
    }

    /// The bits of the source ID that SQ excludes from the comparison.
    pub const fn ignored_source_bits(self) -> u16 {
        match self.sq() {
            0 => 0b000,
            1 => 0b100,
            2 => 0b110,
            _ => 0b111,
        }
    }
}

/// An interrupt remapping table entry (§9.10): 128 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Irte {
    /// Bits 63:0.
    pub low: IrteLow,
    /// Bits 127:64.
    pub high: IrteHigh,
}

impl Irte {
    /// Bits 14:12 and 31:24 of the low half.
    const RESERVED_LOW: u64 = 0xff00_7000;
    /// The bits of DST that are reserved without extended interrupt mode.
    const RESERVED_DST: u32 = 0xffff_00ff;
    /// Bits 63:20 of the high half.
    const RESERVED_HIGH: u64 = !0xf_ffff;

    /// Decodes `words`.
    pub const fn from_words(words: [u64; 2]) -> Self {
        Self { low: IrteLow::from_bits(words[0]), high: IrteHigh::from_bits(words[1]) }
    }

    /// The words of the entry.
    pub const fn to_words(self) -> [u64; 2] {
        [self.low.into_bits(), self.high.into_bits()]
    }

    /// Whether a reserved field is set, or has a reserved value, with or without extended interrupt
    /// mode; not for posted interrupts.
    pub const fn has_reserved(self, extended: bool) -> bool {
        self.low.into_bits() & Self::RESERVED_LOW != 0
            || self.low.im()
            // Delivery modes 011 and 110.
            || matches!(self.low.dlm(), 3 | 6)
            || (!extended && self.low.dst() & Self::RESERVED_DST != 0)
            || self.high.into_bits() & Self::RESERVED_HIGH != 0
            || matches!(self.high.validation(), SourceValidation::Reserved)
    }

    /// The APIC ID or logical destination.
    pub const fn destination(self, extended: bool) -> u32 {
        if extended {
            self.low.dst()
        } else {
            self.low.dst() >> 8 & 0xff
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(RemappableAddress::new().into_bits(), 0xfee0_0010);
        assert_eq!(RemappableAddress::new().with_handle(0x7fff).into_bits(), 0xfeef_fff0);
        assert_eq!(RemappableAddress::new().with_handle(0x8001).into_bits(), 0xfee0_0034);
        assert_eq!(RemappableAddress::new().with_handle(0x8001).handle(), 0x8001);
        assert_eq!(RemappableAddress::new().with_shv(true).into_bits(), 0xfee0_0018);
        let compatibility = CompatibilityAddress::new().with_destination(0x12).with_logical(true);
        assert_eq!(compatibility.with_redirection_hint(true).into_bits(), 0xfee1_200c);
        let data = MessageData::new().with_vector(0x41).with_delivery_mode(7).with_assert(true);
        assert_eq!(data.with_level(true).into_bits(), 0xc741);
        let low = IrteLow::new().with_p(true).with_dlm(7).with_v(0xff);
        assert_eq!(low.into_bits(), 0xff_00e1);
        assert_eq!(IrteLow::new().with_im(true).into_bits(), 1 << 15);
        assert_eq!(IrteLow::new().with_dst(u32::MAX).into_bits(), 0xffff_ffff << 32);
        let high = IrteHigh::new().with_sid(0xffff).with_sq(1).with_svt(2);
        assert_eq!(high.into_bits(), 0x9_ffff);
        let words = [low.into_bits(), high.into_bits()];
        assert_eq!(Irte::from_words(words).to_words(), words);
    }

    #[test]
    fn each_reserved_bit_is_known() {
        let reserved = |word: usize, bit: u32, extended| {
            let mut words = [1, 0];
            words[word] |= 1 << bit;
            Irte::from_words(words).has_reserved(extended)
        };
        let low: Vec<u32> = (0..64).filter(|bit| reserved(0, *bit, true)).collect();
        assert_eq!(low, [12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31]);
        let narrow: Vec<u32> = (32..64).filter(|bit| !reserved(0, *bit, false)).collect();
        assert_eq!(narrow, [40, 41, 42, 43, 44, 45, 46, 47]);
        let high: Vec<u32> = (0..64).filter(|bit| reserved(1, *bit, true)).collect();
        assert_eq!(high, (20..64).collect::<Vec<_>>());
        assert!(Irte::from_words([1, 3 << 18]).has_reserved(true));
        assert!(Irte::from_words([3 << 5 | 1, 0]).has_reserved(true));
    }

    #[test]
    fn a_destination_has_8_bits_or_32() {
        let irte = Irte::from_words([0x1234_5678 << 32, 0]);
        assert_eq!(irte.destination(true), 0x1234_5678);
        assert_eq!(irte.destination(false), 0x56);
    }
}
