// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration space of one function: bytes, which bits software may change, and the base
//! address registers with the memory they decode.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::config_page::ConfigPage;
use super::layout::*;
use super::memory_bar::{BarPlacement, MemoryBar};
use super::way::Way;

/// The identification of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Base class, sub-class and programming interface, from bit 23 down.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
}

/// Configuration space of a function. It answers any access within it.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SIZE]>,
    /// Bits that software may change.
    writable: Box<[u8; CONFIG_SIZE]>,
    /// The memory BARs, by their first register.
    bars: [Option<MemoryBar>; BARS],
    /// The bridge that the function is behind.
    way: Option<Arc<Way>>,
    /// Where the guest reads it without an exit.
    page: Option<Arc<ConfigPage>>,
    /// Place of the next capability and of the pointer to it.
    capability: Place,
    extended_capability: Place,
}

/// The end of a capability list.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// The register that will point to the next one.
    pointer: u16,
    /// Offset of the next one.
    next: u16,
}

impl ConfigSpace {
    /// The configuration space of a function without BARs or capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            bars: [None; BARS],
            way: None,
            page: None,
            capability: Place { pointer: CAPABILITIES_POINTER, next: HEADER_END },
            // The first extended capability has a fixed offset and no pointer to it.
            extended_capability: Place { pointer: 0, next: EXTENDED_START },
        };
        config.put(VENDOR_ID, &identity.vendor.to_le_bytes());
        config.put(DEVICE_ID, &identity.device.to_le_bytes());
        config
            .put(REVISION_ID, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        let command = Command::new()
            .with_memory_space(true)
            .with_bus_master(true)
            .with_interrupt_disable(true);
        config.allow(COMMAND, &command.into_bits().to_le_bytes());
        config.allow(INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Puts the function behind the bridge `way`. Comes before capabilities.
    pub fn behind(&mut self, way: Option<Arc<Way>>) {
        self.way = way;
    }

    /// The bridge that the function is behind.
    pub fn way(&self) -> Option<&Arc<Way>> {
        self.way.as_ref()
    }

    /// The configuration space of an existing function: `bytes` as read by software, and in
    /// `writable` the bits that it may change. There are no BARs, and no place for more
    /// capabilities.
    pub fn of_image(bytes: Box<[u8; CONFIG_SIZE]>, writable: Box<[u8; CONFIG_SIZE]>) -> Self {
        let full = Place { pointer: 0, next: CONFIG_SIZE as u16 };
        let (bars, way, page) = ([None; BARS], None, None);
        Self { bytes, writable, bars, way, page, capability: full, extended_capability: full }
    }

    /// More extended capabilities go to `next` and beyond, where nothing is; the one at `last`,
    /// with no link yet, leads there.
    pub(crate) fn extend_list(&mut self, last: u16, next: u16) {
        self.extended_capability = Place { pointer: last, next };
    }

    /// Sets the subsystem: its vendor and ID.
    pub fn set_subsystem(&mut self, vendor: u16, id: u16) {
        let both = u32::from(id) << 16 | u32::from(vendor);
        self.put(SUBSYSTEM_VENDOR_ID, &both.to_le_bytes());
    }

    /// Adds a vendor-specific capability: `body` follows its three-byte header, `writable` has the
    /// bits of the body that software may change. Returns its offset.
    pub fn add_vendor_capability(&mut self, body: &[u8], writable: &[u8]) -> u16 {
        // A capability is within the first 256 bytes.
        let length = [(body.len() + 3) as u8];
        let (body, writable) = ([&length, body].concat(), [&[0], writable].concat());
        self.add_capability(CAPABILITY_VENDOR, &body, &writable)
    }

    /// Sets the four bytes at `offset`, which must be in the header or a capability.
    pub fn set_u32(&mut self, offset: u16, value: u32) {
        self.put(offset, &value.to_le_bytes());
    }

    /// Sets the two bytes at `offset`, likewise.
    pub fn set_u16(&mut self, offset: u16, value: u16) {
        self.put(offset, &value.to_le_bytes());
    }

    /// Sets the byte at `offset`, likewise.
    pub fn set_u8(&mut self, offset: u16, value: u8) {
        self.put(offset, &[value]);
    }

    /// Adds memory BAR `index` (32 bits, not prefetchable) of `size` bytes, a power of two of at
    /// least 4096, at `address`.
    pub fn add_bar(&mut self, index: usize, size: u32, address: u32) {
        debug_assert!(size >= 4096);
        let bar = MemoryBar { size: size.into(), wide: false, prefetchable: false };
        self.add_memory_bar(index, bar, address.into());
    }

    /// Adds memory BAR `index` at `address`, a multiple of its size. It decodes from the start, as
    /// if firmware had placed it: software that keeps the address need not enable it.
    pub fn add_memory_bar(&mut self, index: usize, bar: MemoryBar, address: u64) {
        debug_assert!(bar.size.is_power_of_two() && bar.size >= MemoryBar::MIN_SIZE);
        debug_assert!(index + usize::from(bar.wide) < BARS);
        // The low bits are read-only: that is how software learns the size.
        let (value, writable) = ((address | bar.kind()).to_le_bytes(), bar.address_mask());
        let registers = if bar.wide { 8 } else { 4 };
        self.put(bar_register(index), &value[..registers]);
        self.allow(bar_register(index), &writable.to_le_bytes()[..registers]);
        self.bars[index] = Some(bar);
        let command = self.command().with_memory_space(true);
        self.put(COMMAND, &command.into_bits().to_le_bytes());
    }

    /// Adds the interrupt pin INTA, connected to `line`.
    pub fn set_intx(&mut self, line: u8) {
        self.put(INTERRUPT_LINE, &[line]);
        self.put(INTERRUPT_PIN, &[1]);
    }

    /// Adds a capability: `body` follows its two-byte header, `writable` has the bits of the body
    /// that software may change. Returns its offset.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let offset = self.capability.next;
        // An offset in the first 256 bytes.
        self.put(self.capability.pointer, &[offset as u8]);
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        let end = offset + 2 + body.len() as u16;
        self.capability = Place { pointer: offset + 1, next: end.next_multiple_of(4) };
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        offset
    }

    /// Adds an extended capability, as [`Self::add_capability`]; `body` follows its four-byte
    /// header.
    pub(super) fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> u16 {
        let offset = self.extended_capability.next;
        if offset != EXTENDED_START {
            let pointer = self.extended_capability.pointer;
            let linked = self.u32(pointer) | u32::from(offset) << 20;
            self.put(pointer, &linked.to_le_bytes());
        }
        self.put(offset, &(u32::from(id) | u32::from(version) << 16).to_le_bytes());
        self.put(offset + 4, body);
        self.allow(offset + 4, writable);
        let end = offset + 4 + body.len() as u16;
        self.extended_capability = Place { pointer: offset, next: end.next_multiple_of(4) };
        offset
    }

    /// From now on a page shows what software reads.
    ///
    /// # Errors
    /// The process has no memory.
    pub(super) fn show(&mut self) -> io::Result<Arc<ConfigPage>> {
        let page = Arc::new(ConfigPage::new(&self.bytes)?);
        self.page = Some(page.clone());
        Ok(page)
    }

    /// The bytes in `range` changed.
    fn changed(&self, range: Range<usize>) {
        if let Some(page) = &self.page {
            page.show(&self.bytes, range);
        }
    }

    /// Software reads; bytes beyond configuration space read as ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        match self.bytes.get(start..start + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// Software writes; read-only bits keep their value.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        let range = start..start + data.len();
        let (Some(bytes), Some(writable)) =
            (self.bytes.get_mut(range.clone()), self.writable.get(range.clone()))
        else {
            return;
        };
        for ((byte, mask), value) in bytes.iter_mut().zip(writable).zip(data) {
            *byte = *byte & !mask | value & mask;
        }
        self.changed(range);
    }

    /// The part of a function-level reset in here (§6.6.2): what software can change is zero, so
    /// that no BAR decodes and no request is allowed. Software saves what it needs again.
    pub fn reset(&mut self) {
        for (byte, writable) in self.bytes.iter_mut().zip(self.writable.iter()) {
            *byte &= !writable;
        }
        self.changed(0..CONFIG_SIZE);
        self.set_interrupt_status(false);
    }

    /// The command register.
    pub fn command(&self) -> Command {
        Command::from_bits(self.u16(COMMAND))
    }

    /// Whether the function may make requests, and the bridges that it is behind forward them.
    pub fn may_request(&self) -> bool {
        self.command().bus_master() && self.way.as_ref().is_none_or(|way| way.takes_requests())
    }

    /// Sets the status register's INTx pending bit.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = self.u16(STATUS) & !STATUS_INTERRUPT;
        let status = if pending { status | STATUS_INTERRUPT } else { status };
        self.put(STATUS, &status.to_le_bytes());
    }

    /// The places of the memory BARs, if memory decoding is enabled and accesses get there.
    pub fn bar_placements(&self) -> Vec<BarPlacement> {
        if !self.command().memory_space() {
            return Vec::new();
        }
        let bars = self.bars.iter().enumerate();
        bars.filter_map(|(index, bar)| {
            let bar = bar.as_ref()?;
            let register = bar_register(index);
            let high = if bar.wide { self.u32(register + 4) } else { 0 };
            let value = u64::from(high) << 32 | u64::from(self.u32(register));
            Some(BarPlacement::new(index, value & bar.address_mask(), bar.size))
        })
        .filter(|bar| self.way.as_ref().is_none_or(|way| way.reaches(bar.start, bar.last)))
        .collect()
    }

    /// The two bytes at `offset`.
    pub fn u16(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The four bytes at `offset`.
    pub fn u32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Sets bytes, writable or not. The offsets are from this program, not the guest.
    fn put(&mut self, offset: u16, bytes: &[u8]) {
        let start = usize::from(offset);
        let range = start..start + bytes.len();
        self.bytes[range.clone()].copy_from_slice(bytes);
        self.changed(range);
    }

    /// Lets software change the bits set in `mask`.
    pub(super) fn allow(&mut self, offset: u16, mask: &[u8]) {
        let start = usize::from(offset);
        self.writable[start..start + mask.len()].copy_from_slice(mask);
    }
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSpace")
            .field("vendor", &format_args!("{:#06x}", self.u16(VENDOR_ID)))
            .field("device", &format_args!("{:#06x}", self.u16(DEVICE_ID)))
            .field("command", &self.command())
            .finish_non_exhaustive()
    }
}

/// Offset of BAR `index` in configuration space.
fn bar_register(index: usize) -> u16 {
    // Six registers of four bytes.
    BAR0 + 4 * index as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1234,
            device: 0x11e8,
            class: 0x00ff00,
            revision: 0x10,
        })
    }

    #[test]
    fn the_header_says_who_it_is_and_stays_so() {
        let mut config = config();
        config.write(VENDOR_ID, &[0; 4]);
        config.write(REVISION_ID, &[0xff; 4]);
        assert_eq!(config.u32(VENDOR_ID), 0x11e8_1234);
        assert_eq!(config.u32(REVISION_ID), 0x00ff_0010);
        config.write(COMMAND, &[0xff; 2]);
        assert_eq!(config.u16(COMMAND), 0x0406);
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut config = config();
        assert_eq!(config.u16(COMMAND), 0);
        config.add_bar(0, 0x10_0000, 0xe000_0000);
        assert_eq!(config.u16(COMMAND), 2, "who places a BAR enables it");
        assert_eq!(config.bar_placements(), [BarPlacement::new(0, 0xe000_0000, 0x10_0000)]);
        config.write(COMMAND, &[0, 0]);
        assert_eq!(config.bar_placements(), []);
        config.write(COMMAND, &[2, 0]);
        assert_eq!(config.bar_placements(), [BarPlacement::new(0, 0xe000_0000, 0x10_0000)]);
        config.write(BAR0, &[0xff; 4]);
        assert_eq!(config.u32(BAR0), 0xfff0_0000);
        config.write(BAR0, &0xe123_4567u32.to_le_bytes());
        assert_eq!(config.bar_placements(), [BarPlacement::new(0, 0xe120_0000, 0x10_0000)]);
        // BARs that do not exist cannot be written.
        config.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(config.u32(BAR0 + 4), 0);
    }

    #[test]
    fn a_wide_bar_has_two_registers() {
        let mut config = config();
        let bar = MemoryBar { size: 0x100, wide: true, prefetchable: true };
        config.add_memory_bar(2, bar, 0x1_e000_0000);
        assert_eq!((config.u32(BAR0 + 8), config.u32(BAR0 + 12)), (0xe000_000c, 1));
        assert_eq!(config.bar_placements(), [BarPlacement::new(2, 0x1_e000_0000, 0x100)]);
        config.write(BAR0 + 8, &[0xff; 8]);
        assert_eq!((config.u32(BAR0 + 8), config.u32(BAR0 + 12)), (0xffff_ff0c, u32::MAX));
        // At the very end of the address space, where nothing decodes.
        assert_eq!(config.bar_placements()[0].last, u64::MAX);
    }

    #[test]
    fn a_reset_leaves_what_software_cannot_change() {
        let mut config = config();
        config.add_bar(0, 0x10_0000, 0xe000_0000);
        let wide = MemoryBar { size: 0x1000, wide: true, prefetchable: true };
        config.add_memory_bar(2, wide, 0x1_e000_0000);
        config.set_intx(11);
        let capability = config.add_capability(5, &[0x5a; 4], &[0xf0; 2]);
        let extended = config.add_extended_capability(0x1b, 1, &[3; 4], &[0, 0, 1, 0]);
        config.set_interrupt_status(true);
        config.write(COMMAND, &[6, 4]);
        config.reset();
        assert_eq!((config.u16(COMMAND), config.u16(STATUS)), (0, STATUS_CAPABILITIES));
        assert_eq!((config.u32(BAR0), config.u32(BAR0 + 8), config.u32(BAR0 + 12)), (0, 0xc, 0));
        assert_eq!(config.bar_placements(), []);
        assert_eq!(config.u16(INTERRUPT_LINE), 0x100);
        assert_eq!(config.u32(VENDOR_ID), 0x11e8_1234);
        assert_eq!(config.u32(capability + 2), 0x5a5a_0a0a);
        assert_eq!((config.u32(extended), config.u32(extended + 4)), (0x1_001b, 0x0302_0303));
    }

    #[test]
    fn an_image_is_read_as_it_is_and_written_as_it_may_be() {
        let (mut bytes, mut writable) = (Box::new([0; CONFIG_SIZE]), Box::new([0; CONFIG_SIZE]));
        (bytes[0x40], bytes[4095], writable[0x40]) = (0x5a, 7, 0xf0);
        let mut config = ConfigSpace::of_image(bytes, writable);
        config.write(0x40, &[0xff; 2]);
        assert_eq!((config.u16(0x40), config.u32(4092)), (0xfa, 7 << 24));
        assert_eq!(config.bar_placements(), []);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut config = config();
        assert_eq!(config.u16(STATUS) & STATUS_CAPABILITIES, 0);
        let first = config.add_capability(5, &[1; 12], &[]);
        let second = config.add_capability(0x10, &[2; 4], &[]);
        assert_ne!(config.u16(STATUS) & STATUS_CAPABILITIES, 0);
        assert_eq!(config.u32(CAPABILITIES_POINTER), u32::from(first));
        assert_eq!(config.u16(first), second << 8 | 5);
        assert_eq!(config.u16(second), 0x10);

        let first = config.add_extended_capability(0x1b, 1, &[3; 4], &[0; 4]);
        let second = config.add_extended_capability(0x0f, 1, &[4; 4], &[0; 4]);
        assert_eq!(first, EXTENDED_START);
        assert_eq!(config.u32(first), u32::from(second) << 20 | 1 << 16 | 0x1b);
        assert_eq!(config.u32(second), 1 << 16 | 0x0f);
    }

    #[test]
    fn accesses_outside_are_harmless() {
        let mut config = config();
        let mut data = [0; 4];
        config.read(4094, &mut data);
        assert_eq!(data, [0xff; 4]);
        config.write(4094, &data);
        config.write(u16::MAX, &data);
    }
}
