// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory BARs: what their registers say, and what they decode.

/// The kind of a memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBar {
    /// Bytes, a power of two.
    pub size: u64,
    /// Its address has 64 bits and uses the next register, too.
    pub wide: bool,
    /// Reads have no side effects.
    pub prefetchable: bool,
}

impl MemoryBar {
    /// The minimum size: the low four bits of a register encode the kind of BAR.
    pub const MIN_SIZE: u64 = 16;

    /// The low four bits of its register (§7.5.1.2.1).
    pub(super) fn kind(&self) -> u64 {
        u64::from(self.wide) << 2 | u64::from(self.prefetchable) << 3
    }

    /// The bits of its address.
    pub(super) fn address_mask(&self) -> u64 {
        let width = if self.wide { u64::MAX } else { u32::MAX.into() };
        width & !(self.size - 1)
    }
}

/// The current place of a memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarPlacement {
    /// Which BAR.
    pub index: usize,
    /// First address.
    pub start: u64,
    /// Last address, included.
    pub last: u64,
}

impl BarPlacement {
    /// BAR `index` of `size` bytes at `start`, a multiple of that.
    pub(super) fn new(index: usize, start: u64, size: u64) -> Self {
        // `start` is a multiple of the size, so the bits do not overlap.
        Self { index, start, last: start | (size - 1) }
    }

    /// The offset in the BAR of an access to `address`, if all of its `length` bytes are in it.
    pub(super) fn offset(&self, address: u64, length: usize) -> Option<u64> {
        let last = address.checked_add((length as u64).checked_sub(1)?)?;
        (last <= self.last).then(|| address.checked_sub(self.start)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_register_says_what_kind_it_is() {
        let narrow = MemoryBar { size: 0x1000, wide: false, prefetchable: false };
        assert_eq!((narrow.kind(), narrow.address_mask()), (0, 0xffff_f000));
        let wide = MemoryBar { size: 1 << 33, wide: true, prefetchable: true };
        assert_eq!((wide.kind(), wide.address_mask()), (0xc, !0 << 33));
    }

    #[test]
    fn an_access_lies_in_the_bar_or_does_not() {
        let bar = BarPlacement::new(0, 0xe000_0000, 0x1000);
        assert_eq!(bar.offset(0xe000_0ffc, 4), Some(0xffc));
        assert_eq!(bar.offset(0xe000_0ffd, 4), None);
        assert_eq!(bar.offset(0xdfff_ffff, 4), None);
        assert_eq!(bar.offset(u64::MAX, 4), None);
        assert_eq!(bar.offset(0xe000_0000, 0), None);
    }
}
