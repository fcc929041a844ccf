// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Addresses of CMD_TLBI_* commands: one, or a range with a hint of the level (§4.4.1).

use super::words::{TlbiAddress, TlbiWord};

/// Binary logarithm of the unit of addresses in commands.
pub(super) const ADDRESS_SHIFT: u32 = 12;

/// The addresses of a CMD_TLBI_* by address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressRange {
    /// Address: of the first byte, 4 KiB aligned.
    pub address: u64,
    /// Leaf: only entries of the last level changed.
    pub leaf: bool,
    /// TG: 0 for an entry of any size at the address; 1, 2, 3 for a range in 4 KiB, 16 KiB, 64 KiB.
    pub tg: u8,
    /// TTL: level of the leaf entries, 1 to 3; 0 for any.
    pub ttl: u8,
    /// NUM: see [`AddressRange::bytes`].
    pub num: u8,
    /// SCALE: see [`AddressRange::bytes`].
    pub scale: u8,
}

impl AddressRange {
    /// The entries that translate `address`, whatever their size.
    pub const fn at(address: u64) -> Self {
        Self { address, leaf: false, tg: 0, ttl: 0, num: 0, scale: 0 }
    }

    /// Binary logarithm of the granule of TG; `None` without a range.
    pub const fn granule_shift(self) -> Option<u32> {
        match self.tg {
            1 => Some(12),
            2 => Some(14),
            3 => Some(16),
            _ => None,
        }
    }

    /// Length of the range in bytes, `(NUM + 1) * 2^SCALE` granules, which is below 2^53; `None`
    /// without a range.
    pub const fn bytes(self) -> Option<u64> {
        match self.granule_shift() {
            Some(granule) => Some((self.num as u64 + 1) << (self.scale as u32 + granule)),
            None => None,
        }
    }

    /// Whether this is the range that the specification reserves: one granule without a level,
    /// which would look like an invalidation without range.
    pub const fn is_reserved(self) -> bool {
        self.tg != 0 && self.ttl == 0 && self.num == 0 && self.scale == 0
    }

    /// Whether it uses the fields that need IDR3.RIL.
    pub const fn needs_ril(self) -> bool {
        self.tg != 0
    }

    pub(super) fn decode(low: TlbiWord, high: u64) -> Self {
        let high = TlbiAddress::from_bits(high);
        let address = high.address() << ADDRESS_SHIFT;
        let leaf = high.leaf();
        let (num, scale) = (low.num(), low.scale());
        match (high.tg(), high.ttl()) {
            // Without TG the others are reserved.
            (0, _) => Self { leaf, ..Self::at(address) },
            // The 16K granule has no level 1 blocks: the level is reserved, and treated as any.
            (tg @ 2, 1) => Self { address, leaf, tg, ttl: 0, num, scale },
            (tg, ttl) => Self { address, leaf, tg, ttl, num, scale },
        }
    }

    /// `low` with the fields of this range, and the word after it.
    pub(super) fn encode(self, low: TlbiWord) -> [u64; 2] {
        let high = TlbiAddress::new()
            .with_address(self.address >> ADDRESS_SHIFT)
            .with_leaf(self.leaf)
            .with_tg(self.tg & 3)
            .with_ttl(self.ttl & 3);
        [low.with_num(self.num & 0x1f).with_scale(self.scale & 0x1f).into_bits(), high.into_bits()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_in_granules() {
        let of = |tg, num, scale| AddressRange { tg, num, scale, ..AddressRange::at(0) }.bytes();
        assert_eq!(of(0, 31, 31), None);
        assert_eq!(of(1, 0, 0), Some(0x1000));
        assert_eq!(of(2, 2, 1), Some(3 * 2 * 0x4000));
        assert_eq!(of(3, 31, 31), Some(1 << 52));
    }

    #[test]
    fn one_granule_without_a_level_is_reserved() {
        let granule = AddressRange { tg: 1, ..AddressRange::at(0) };
        assert!(granule.is_reserved() && granule.needs_ril());
        assert!(!AddressRange { ttl: 3, ..granule }.is_reserved());
        assert!(!AddressRange { num: 1, ..granule }.is_reserved());
        assert!(!AddressRange::at(!0).is_reserved() && !AddressRange::at(!0).needs_ril());
    }

    #[test]
    fn reserved_fields_are_not_read() {
        let low = TlbiWord::new().with_num(5).with_scale(3);
        let plain = TlbiAddress::new().with_address(7).with_leaf(true).with_ttl(2);
        let at = AddressRange { leaf: true, ..AddressRange::at(0x7000) };
        assert_eq!(AddressRange::decode(low, plain.into_bits()), at);
        let level =
            |tg| AddressRange::decode(TlbiWord::new(), plain.with_ttl(1).with_tg(tg).into());
        assert!(!level(1).is_reserved() && !level(3).is_reserved());
        assert!(level(2).is_reserved(), "16K granule, level 1");
    }
}
