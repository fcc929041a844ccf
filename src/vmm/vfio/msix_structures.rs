// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the MSI-X structures of a device are (PCIe 6.0 §7.7.2), as the device says: that may be
//! anywhere.
//!
//! No guest reaches them, whatever becomes of the capability: the host's messages are in the table.

use std::ops::Range;

use super::bars::DeviceBar;
use crate::pci::layout::CONFIG_SIZE;
use crate::pci::MsixControl;

/// The capability, from its start: the place of the table, that of the pending bits, its length.
pub const MSIX_TABLE: u16 = 4;
pub const MSIX_PENDING: u16 = 8;
pub const MSIX_LENGTH: u16 = 12;
/// A place: the BAR. The rest is the offset in it.
const BAR: u32 = 0b111;
/// Bytes of one entry of the table.
const ENTRY: u64 = 16;
/// No other register of the device is in a page of this size with a byte of them (§7.7.2).
const PAGE: u64 = 0x1000;

/// The MSI-X structures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixStructures {
    /// The capability.
    pub offset: u16,
    /// Number of vectors: 1 to 2048.
    pub vectors: u16,
    /// BAR of the table, and the offset in it.
    pub table: (usize, u64),
    /// BAR of the pending bits, and the offset in it.
    pub pending: (usize, u64),
}

/// A part of the structures, and an offset in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MsixPart {
    /// The table.
    Table(u64),
    /// The pending bits.
    Pending(u64),
    /// An access that starts before them and ends in them. All of it is ignored, also what is in
    /// front of them, which VFIO would let through: no driver may access them but by whole aligned
    /// words (§7.7.2), so that its result is undefined anyway.
    Across,
}

impl MsixStructures {
    /// Those of the capability at `offset` of the configuration space `device`.
    pub fn new(device: &[u8; CONFIG_SIZE], offset: u16) -> Self {
        let dword = |at: u16| {
            let bytes = device.get(usize::from(at)..).and_then(|rest| rest.first_chunk());
            u32::from_le_bytes(bytes.copied().unwrap_or_default())
        };
        let place = |value: u32| ((value & BAR) as usize, u64::from(value & !BAR));
        // Message control is the upper half.
        let control = MsixControl::from_bits((dword(offset) >> 16) as u16);
        Self {
            offset,
            vectors: control.table_size() + 1,
            table: place(dword(offset + MSIX_TABLE)),
            pending: place(dword(offset + MSIX_PENDING)),
        }
    }

    /// Both: the BAR, and the bytes in it.
    fn both(&self) -> [(usize, Range<u64>); 2] {
        // Offsets have 32 bits.
        let bytes = |(bar, start): (usize, u64), length: u64| (bar, start..start + length);
        [
            bytes(self.table, ENTRY * u64::from(self.vectors)),
            // One bit each, in units of two doublewords.
            bytes(self.pending, u64::from(self.vectors).div_ceil(64) * 8),
        ]
    }

    /// As the guest of a device with `bars` sees them, which are emulated; `None` if it cannot.
    ///
    /// The table must be in a BAR: the host finds the device's own by the same pointer. Pending
    /// bits in none, or in the table, are a mistake of which some virtual functions are known, and
    /// these have no other interrupts. Nothing depends on where the device has them: the guest sees
    /// them behind the table, if the table's page has room.
    pub fn shown(self, bars: &[DeviceBar]) -> Option<Self> {
        let lie_in = |(of, bytes): &(usize, Range<u64>)| {
            bars.iter().any(|bar| bar.index == *of && bytes.end <= bar.bar.size)
        };
        let moved = |this: &Self| {
            let [(bar, table), _] = this.both();
            let moved = Self { pending: (bar, table.end), ..*this };
            let [_, (_, pending)] = moved.both();
            (pending.end <= table.end.next_multiple_of(PAGE)).then_some(moved)
        };
        let [table, pending] = self.both();
        let overlap =
            table.0 == pending.0 && table.1.start < pending.1.end && pending.1.start < table.1.end;
        let shown = if lie_in(&pending) && !overlap { self } else { moved(&self)? };
        let [_, pending] = shown.both();
        // The register of the guest's pointer has 32 bits.
        let has_register = u32::try_from(pending.1.start).is_ok();
        (lie_in(&table) && lie_in(&pending) && has_register).then_some(shown)
    }

    /// The register of the capability with the place of the pending bits.
    pub fn pending_register(&self) -> u32 {
        let (bar, offset) = self.pending;
        // It fits, or is not shown.
        offset as u32 | bar as u32
    }

    /// The bytes of `bar` that they are.
    pub fn in_bar(&self, bar: usize) -> Vec<Range<u64>> {
        self.both().into_iter().filter(|(of, _)| *of == bar).map(|(_, bytes)| bytes).collect()
    }

    /// What of them an access to `length` bytes at `offset` of `bar` reaches.
    pub fn reached(&self, bar: usize, offset: u64, length: usize) -> Option<MsixPart> {
        let parts = [MsixPart::Table as fn(u64) -> MsixPart, MsixPart::Pending];
        let end = offset.saturating_add(length as u64);
        self.both().into_iter().zip(parts).find_map(|((of, bytes), part)| {
            let reached = of == bar && offset < bytes.end && bytes.start < end;
            reached.then(|| offset.checked_sub(bytes.start).map_or(MsixPart::Across, part))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::MemoryBar;
    use crate::vfio::host_device::Region;

    /// 16 vectors: the table at 0x2000 of BAR 0, the pending bits at 0x3000 of BAR 1.
    fn structures() -> MsixStructures {
        let mut device = [0; CONFIG_SIZE];
        device[0x50..0x5c].copy_from_slice(&[0x11, 0, 15, 0x80, 0, 0x20, 0, 0, 1, 0x30, 0, 0]);
        MsixStructures::new(&device, 0x50)
    }

    #[test]
    fn they_are_where_the_capability_says() {
        let structures = structures();
        assert_eq!((structures.table, structures.pending), ((0, 0x2000), (1, 0x3000)));
        assert_eq!(structures.vectors, 16);
        assert!(structures.in_bar(0).iter().eq([&(0x2000..0x2100)]));
        assert!(structures.in_bar(1).iter().eq([&(0x3000..0x3008)]));
        assert!(structures.in_bar(2).is_empty());
        // A capability at the very end of configuration space.
        let end = MsixStructures::new(&[0xff; CONFIG_SIZE], CONFIG_SIZE as u16 - 2);
        assert_eq!((end.table, end.pending), ((0, 0), (0, 0)));
    }

    /// Those of `vectors` vectors with the table at `table` of BAR 0, as the guest of a device with
    /// that BAR alone, of 8 KiB, sees them.
    fn shown(vectors: u16, table: u64, pending: (usize, u64)) -> Option<MsixStructures> {
        shown_in(0x2000, MsixStructures { offset: 0x50, vectors, table: (0, table), pending })
    }

    fn shown_in(size: u64, structures: MsixStructures) -> Option<MsixStructures> {
        let bar = MemoryBar { size, wide: true, prefetchable: false };
        let region = Region { size, ..Region::default() };
        structures.shown(&[DeviceBar { index: 0, bar, region }])
    }

    #[test]
    fn pending_bits_beyond_what_a_pointer_can_say_are_not_shown() {
        let at =
            |table| MsixStructures { offset: 0x50, vectors: 1, table: (0, table), pending: (1, 0) };
        assert_eq!(shown_in(1 << 33, at(0xffff_fff8)).map(|shown| shown.pending), None);
        let below = shown_in(1 << 33, at(0xffff_ef08)).map(|shown| shown.pending);
        assert_eq!(below, Some((0, 0xffff_ef18)));
    }

    #[test]
    fn pending_bits_in_no_bar_are_behind_the_table() {
        let pending = |vectors, table, said| Some(shown(vectors, table, said)?.pending);
        assert_eq!(pending(16, 0x1000, (0, 0x1ff8)), Some((0, 0x1ff8)), "where they are");
        for wrong in [(0, 0x8000), (0, 0x1ffc), (1, 0), (7, 0xffff_fff8)] {
            assert_eq!(pending(16, 0x1000, wrong), Some((0, 0x1100)), "{wrong:x?}");
            // Up to the end of the page.
            assert_eq!(pending(65, 0xbe0, wrong), Some((0, 0xff0)), "{wrong:x?}");
            assert_eq!(pending(65, 0xbe8, wrong), None, "{wrong:x?}");
            assert_eq!(pending(256, 0, wrong), None, "{wrong:x?}");
            assert_eq!(pending(257, 0, wrong), Some((0, 0x1010)), "{wrong:x?}");
        }
        assert_eq!(pending(16, 0x1f01, (0, 0)), None, "a table in no BAR");
        assert_eq!(pending(16, 0xffff_ff08, (0, 0x8000)), None, "nor its page");
        for wrong in [0x0ff9, 0x1000, 0x10f8] {
            assert_eq!(pending(16, 0x1000, (0, wrong)), Some((0, 0x1100)), "in the table");
        }
        assert_eq!(pending(16, 0x1000, (0, 0xff8)), Some((0, 0xff8)), "before it");
        let register = shown(16, 0x1000, (3, 0)).map(|shown| shown.pending_register());
        assert_eq!(register, Some(0x1100));
    }

    #[test]
    fn an_access_reaches_them_wherever_it_starts() {
        let reached = |offset, length| structures().reached(0, offset, length);
        assert_eq!(reached(0x1ff8, 8), None);
        assert_eq!(reached(0x1ffc, 8), Some(MsixPart::Across));
        assert_eq!(reached(0x2000, 4), Some(MsixPart::Table(0)));
        assert_eq!(reached(0x20fc, 8), Some(MsixPart::Table(0xfc)));
        assert_eq!(reached(0x2100, 4), None);
        assert_eq!(reached(u64::MAX, 8), None);
        assert_eq!(structures().reached(1, 0x3004, 4), Some(MsixPart::Pending(4)));
        assert_eq!(structures().reached(1, 0x2000, 4), None);
    }
}
