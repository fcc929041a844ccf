// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Common to the registers of all virtual IOMMUs: their lock, and their pages.
//!
//! A page is a row of 64-bit slots: each one 64-bit register or two 32-bit ones. An access covers a
//! slot or one half of it.

use std::sync::MutexGuard;

use crate::sync::Mutex;

/// A fair mutex, for the registers: a thread that locks them again queues behind those that wait.
/// One that works through a queue unlocks them between two slices.
#[derive(Debug, Default)]
pub(super) struct FairMutex<T> {
    /// Held for a moment before `value` by the next thread to get it, so that a thread that locks
    /// again waits here.
    next: Mutex<()>,
    value: Mutex<T>,
}

impl<T> FairMutex<T> {
    /// Locks the value, after those that wait for it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let _next = self.next.lock();
        self.value.lock()
    }
}

const LOW: u64 = 0x0000_0000_ffff_ffff;
const HIGH: u64 = 0xffff_ffff_0000_0000;

/// An access: its slot, and its bits in the slot.
#[derive(Clone, Copy)]
pub(super) struct SlotAccess {
    /// Offset of the slot, in bytes.
    pub slot: u64,
    mask: u64,
    shift: u32,
}

impl SlotAccess {
    /// The access of `size` bytes at `offset` of pages of `length` bytes; `None` unless it is an
    /// aligned 32- or 64-bit access there.
    pub fn new(offset: u64, size: usize, length: u64) -> Option<Self> {
        if offset >= length {
            return None;
        }
        let slot = offset & !7;
        match (size, offset & 7) {
            (8, 0) => Some(Self { slot, mask: u64::MAX, shift: 0 }),
            (4, 0) => Some(Self { slot, mask: LOW, shift: 0 }),
            (4, 4) => Some(Self { slot, mask: HIGH, shift: 32 }),
            _ => None,
        }
    }

    /// The value read when the slot holds `value`: in the low bits, for either half.
    pub fn extract(self, value: u64) -> u64 {
        (value & self.mask) >> self.shift
    }

    /// The value written, at its place in the slot.
    pub fn place(self, data: &[u8]) -> u64 {
        let mut bytes = [0; 8];
        for (byte, from) in bytes.iter_mut().zip(data) {
            *byte = *from;
        }
        u64::from_le_bytes(bytes) << self.shift
    }

    /// `old` with those bits of this access that are `writable` taken from `value`; all three as
    /// slot values.
    pub fn merge(self, old: u64, value: u64, writable: u64) -> u64 {
        let mask = self.mask & writable;
        old & !mask | value & mask
    }

    /// The lower and the upper 32 bits of `value`, where the access covers them.
    pub fn halves(self, value: u64) -> (Option<u32>, Option<u32>) {
        let low = (self.mask & LOW != 0).then_some(value as u32);
        let high = (self.mask & HIGH != 0).then_some((value >> 32) as u32);
        (low, high)
    }

    /// The bits of `value` that the access covers.
    pub fn masked(self, value: u64) -> u64 {
        value & self.mask
    }
}

/// A slot of two 32-bit registers.
pub(super) fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_a_slot_or_half_of_one() {
        let of = |offset, size| SlotAccess::new(offset, size, 0x1000).map(|access| access.slot);
        assert_eq!((of(0, 8), of(8, 4), of(12, 4)), (Some(0), Some(8), Some(8)));
        for (offset, size) in [(0, 1), (0, 2), (2, 4), (4, 8), (1, 8), (0, 16), (0x1000, 4)] {
            assert_eq!(of(offset, size), None, "{offset:#x} {size}");
        }
    }

    #[test]
    fn halves_stand_in_their_place() {
        let upper = SlotAccess::new(4, 4, 8).unwrap();
        let value = upper.place(&[1, 0, 0, 0]);
        assert_eq!((value, upper.halves(value)), (1 << 32, (None, Some(1))));
        assert_eq!(upper.merge(7, value, u64::MAX), 1 << 32 | 7);
        assert_eq!(upper.merge(7, value, 0xffff), 7);
        assert_eq!(upper.extract(pair(7, 9)), 9);
        assert_eq!(upper.masked(pair(7, 9)), 9 << 32);
    }
}
