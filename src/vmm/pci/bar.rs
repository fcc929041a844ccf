// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Base address registers: where they are, and where they put a function's memory.

use super::layout::BAR0;

/// Offset of BAR `index` in configuration space.
pub(super) fn register(index: usize) -> u16 {
    // Six registers of four bytes.
    BAR0 + 4 * index as u16
}

/// Where a memory BAR is just now.
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
    /// BAR `index` of `size` bytes whose register holds `value`.
    pub(super) fn new(index: usize, value: u32, size: u32) -> Self {
        // The low four bits say what kind of BAR it is; here they are always zero.
        let start = u64::from(value & !0xf);
        Self { index, start, last: start + u64::from(size) - 1 }
    }

    /// The offset in the BAR of an access to `address`, when all of its `length` bytes lie in it.
    pub(super) fn offset(&self, address: u64, length: usize) -> Option<u64> {
        let last = address.checked_add((length as u64).checked_sub(1)?)?;
        (last <= self.last).then(|| address.checked_sub(self.start)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
