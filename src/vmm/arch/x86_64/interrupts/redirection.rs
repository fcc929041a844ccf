// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Registers of an IOAPIC, as in Intel's 82093AA data sheet (§3.0), with the EOI register of
//! version 20h; redirection entries in remappable format are VT-d's (§5.1.5.1).

use bitfield_struct::bitfield;

use twostage::spec::vtd::interrupt::MessageData;
use twostage::viommu::MsiMessage;

/// Version: 20h has an EOI register.
pub const VERSION: u8 = 0x20;

/// Offset of IOREGSEL, which selects a register.
pub const REGISTER_SELECT: u64 = 0x00;
/// Offset of IOWIN, the selected register.
pub const WINDOW: u64 = 0x10;
/// Offset of the EOI register.
pub const EOI: u64 = 0x40;

/// Index of IOAPICID.
pub const ID: u8 = 0x00;
/// Index of IOAPICVER.
pub const VERSION_REGISTER: u8 = 0x01;
/// Index of IOAPICARB.
pub const ARBITRATION: u8 = 0x02;
/// Index of the low half of the first redirection entry; its high half follows.
pub const REDIRECTION: u8 = 0x10;

/// A redirection entry.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct RedirectionEntry {
    /// Vector; in remappable format only used to match EOIs.
    pub vector: u8,
    /// Delivery mode.
    #[bits(3)]
    pub delivery_mode: u8,
    /// Destination mode: logical. In remappable format bit 15 of the interrupt index.
    pub logical: bool,
    /// Delivery status. Read-only; messages are delivered at once.
    pub delivery_status: bool,
    /// Polarity: active low. Ignored: lines here are asserted or not.
    pub active_low: bool,
    /// Remote IRR: a level-triggered interrupt waits for its EOI. Read-only.
    pub remote_irr: bool,
    /// Trigger mode: level.
    pub level: bool,
    /// Masked.
    #[bits(default = true)]
    pub masked: bool,
    #[bits(31)]
    __: u32,
    /// Bits 19:4 of the message's address: the destination in the upper eight; in remappable format
    /// the interrupt index above the format bit.
    pub address: u16,
}

impl RedirectionEntry {
    /// Bits that software can write.
    const WRITABLE: u64 = 0xffff_0000_0001_afff;

    /// The entry after software wrote the bits `mask` of it. An edge-triggered interrupt does not
    /// wait for an EOI.
    pub const fn written(self, value: u64, mask: u64) -> Self {
        let mask = mask & Self::WRITABLE;
        let new = Self::from_bits(self.into_bits() & !mask | value & mask);
        let waits = new.remote_irr() && new.level();
        new.with_remote_irr(waits)
    }

    /// The entry's message: its bits map to address and data in the same way in both formats.
    pub fn message(self) -> MsiMessage {
        let address = 0xfee0_0000 | u64::from(self.address()) << 4 | u64::from(self.logical()) << 2;
        let data = MessageData::new()
            .with_vector(self.vector())
            .with_delivery_mode(self.delivery_mode())
            .with_assert(true)
            .with_level(self.level());
        MsiMessage { address, data: data.into_bits() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::spec::vtd::interrupt::RemappableAddress;

    #[test]
    fn fields_stand_where_the_data_sheet_puts_them() {
        assert_eq!(RedirectionEntry::new().into_bits(), 1 << 16);
        let zero = RedirectionEntry::from_bits(0);
        assert_eq!(zero.with_delivery_mode(7).into_bits(), 7 << 8);
        assert_eq!(zero.with_logical(true).into_bits(), 1 << 11);
        assert_eq!(zero.with_active_low(true).into_bits(), 1 << 13);
        assert_eq!(zero.with_remote_irr(true).into_bits(), 1 << 14);
        assert_eq!(zero.with_level(true).into_bits(), 1 << 15);
        assert_eq!(zero.with_address(0xffff).into_bits(), 0xffff << 48);
    }

    #[test]
    fn status_is_read_only_and_goes_with_the_level() {
        let waiting = RedirectionEntry::new().with_level(true).with_remote_irr(true);
        let all = RedirectionEntry::new().written(u64::MAX, u64::MAX);
        assert_eq!(all.into_bits(), 0xffff_0000_0001_afff);
        assert!(waiting.written(1 << 15 | 0x41, u32::MAX.into()).remote_irr());
        assert!(!waiting.written(0x41, u32::MAX.into()).remote_irr());
    }

    #[test]
    fn a_message_carries_either_format() {
        let entry = RedirectionEntry::from_bits(0x12 << 56 | 1 << 15 | 1 << 11 | 1 << 8 | 0x41);
        assert_eq!(entry.message(), MsiMessage { address: 0xfee1_2004, data: 0xc141 });
        let remappable = RedirectionEntry::from_bits(0x1234 << 49 | 1 << 48 | 1 << 11 | 0x05);
        let address = RemappableAddress::from_bits(remappable.message().address as u32);
        assert!(address.remappable() && !address.shv());
        assert_eq!(address.handle(), 0x9234);
    }
}
