// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest may have of a device: a naive reading of what the device and VFIO say.

use std::collections::BTreeSet;
use std::ops::Range;

use twostage_vmm::inside::{PCI_MMIO_LAST, PCI_MMIO_START};
use twostage_vmm::{HostDevice, Irq};

use super::device::{Device, CONFIG_SIZE};

/// The host's page size.
const PAGE: u64 = 0x1000;

/// A memory BAR.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    pub size: u64,
    /// Its address has 64 bits.
    wide: bool,
    /// All of its pages can be mapped.
    mappable: bool,
}

/// A piece of a BAR in the guest: its address and length there, the BAR and the offset in it.
pub type Piece = (u64, u64, usize, u64);

/// A device, read naively.
#[derive(Debug)]
pub struct Naive {
    /// Capabilities that the guest sees, in this order.
    pub list: Vec<(u8, u16)>,
    /// Extended ones, without those that are made for it.
    pub extended: Vec<u16>,
    /// Bytes that are read from the device and written to it.
    pub live: Vec<Range<u16>>,
    /// What the guest may see at all, beside the header and what is made for it.
    pub visible: Vec<Range<u16>>,
    /// Device control of PCI Express, if the guest can reset the device with it.
    pub control: Option<u16>,
    pub bars: [Option<Bar>; 6],
    /// The table of MSI-X and its pending bits: BAR and bytes.
    pub structures: Vec<(usize, Range<u64>)>,
    /// The capability of MSI-X, if the guest sees it, and its number of vectors.
    pub msix: Option<(u16, u16)>,
    /// Message control of MSI.
    pub msi: Option<u16>,
    pub intx: bool,
}

/// Two bytes at `at`.
pub fn half(config: &[u8], at: u16) -> u16 {
    let at = usize::from(at);
    config.get(at..at + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn word(config: &[u8], at: u16) -> u32 {
    u32::from(half(config, at)) | u32::from(half(config, at.saturating_add(2))) << 16
}

/// The list that starts with `first`: offset and room of each, and the next by `next`.
fn list(first: u16, least: u16, end: u16, next: impl Fn(u16) -> Option<u16>) -> Vec<(u16, u16)> {
    let (mut found, mut at) = (Vec::new(), first);
    while at >= least && !found.contains(&at) {
        let Some(after) = next(at) else { break };
        found.push(at);
        at = after;
    }
    let room = |at: u16| found.iter().copied().filter(|next| *next > at).min().unwrap_or(end) - at;
    found.iter().map(|at| (*at, room(*at))).collect()
}

impl Naive {
    pub fn new(device: &Device) -> Self {
        let config = device.config().clone();
        let count = |irq| device.irq(irq).map_or(0, |info| info.count);
        let mut naive = Self {
            list: Vec::new(),
            extended: Vec::new(),
            live: Vec::new(),
            visible: Vec::new(),
            control: None,
            bars: bars(&config, device),
            structures: Vec::new(),
            msix: None,
            msi: None,
            intx: count(Irq::Intx) > 0 && config[0x3d] != 0,
        };
        let next = |at: u16| Some(half(&config, at) >> 8 & 0xfc);
        let first = if config[6] & 0x10 != 0 { u16::from(config[0x34] & 0xfc) } else { 0 };
        let mut seen = BTreeSet::new();
        for (at, room) in list(first, 0x40, 0x100, next) {
            let id = config[usize::from(at)];
            let first = seen.insert(id);
            if let Some(length) = naive.capability(&config, (id, at, room), first, device) {
                naive.list.push((id, at));
                naive.visible.push(at..at + length);
            }
        }
        let next = |at: u16| match word(&config, at) {
            0 | u32::MAX => None,
            header => Some((header >> 20) as u16 & 0xffc),
        };
        for (at, room) in list(0x100, 0x100, CONFIG_SIZE as u16, next) {
            let id = half(&config, at);
            let length = (word(&config, at + 4) >> 20) as u16;
            let length = match id {
                0x03 => 12.min(room),
                0x0b | 0x23 if room >= 8 => length.clamp(8, room),
                _ => continue,
            };
            if id != 0x03 {
                naive.live.push(at + 4..at + length);
            }
            naive.extended.push(id);
            naive.visible.push(at..at + length);
        }
        naive
    }

    /// How many bytes of a capability, with `id` at an offset with so much room, the guest sees:
    /// `None` if not any. It is the first one if `first`.
    fn capability(
        &mut self,
        config: &[u8],
        (id, at, room): (u8, u16, u16),
        first: bool,
        device: &Device,
    ) -> Option<u16> {
        let control = half(config, at + 2);
        match id {
            0x01 => (first && room >= 8).then_some(8),
            0x03 | 0x09 => {
                let length = if id == 3 { 8 } else { control & 0xff }.clamp(4, room);
                self.live.push(at + 2..at + length);
                Some(length)
            }
            0x05 => {
                let wide = if control & 0x80 != 0 { 4 } else { 0 };
                let length = 10 + wide + if control & 0x100 != 0 { 10 } else { 0 };
                let there = device.irq(Irq::Msi).is_ok_and(|info| info.count > 0);
                let shown = first && there && room >= length;
                shown.then(|| self.msi = Some(at + 2));
                shown.then_some(length)
            }
            0x10 if first && room >= 0x14 => {
                self.live.push(at + 8..at + 12);
                self.control = device.can_reset().then_some(at + 8);
                Some(room.min(0x3c))
            }
            0x11 if first => {
                let vectors = (control & 0x7ff) + 1;
                let place = |at: u16, length: u64| {
                    let value = word(config, at);
                    let start = u64::from(value & !7);
                    ((value & 7) as usize, start..start + length)
                };
                let pending = u64::from(vectors).div_ceil(64) * 8;
                self.structures =
                    vec![place(at + 4, 16 * u64::from(vectors)), place(at + 8, pending)];
                let inside = |(bar, bytes): &(usize, Range<u64>)| {
                    let bar = self.bars.get(*bar).copied().flatten();
                    bar.is_some_and(|bar| bytes.end <= bar.size)
                };
                // Pending bits in no BAR, or in the table, are behind it, if its page has room.
                let mut seen = self.structures.clone();
                let both = seen[0].1.start.max(seen[1].1.start)..seen[0].1.end.min(seen[1].1.end);
                let wrong = !inside(&seen[1]) || seen[0].0 == seen[1].0 && !both.is_empty();
                if wrong {
                    let (bar, table) = seen[0].clone();
                    seen[1] = (bar, table.end..table.end + pending);
                }
                let page = seen[0].1.end.next_multiple_of(PAGE);
                let there = device.irq(Irq::Msix).map_or(0, |info| info.count);
                // Its place there must fit the register that says it.
                let says = u32::try_from(seen[1].1.start).is_ok();
                let fits = !wrong || seen[1].1.end <= page && says;
                let shown = seen.iter().all(inside) && fits && there > 0 && room >= 12;
                let vectors = vectors.min(there.try_into().unwrap_or(u16::MAX));
                if shown {
                    self.structures = seen;
                }
                self.msix = shown.then_some((at, vectors));
                shown.then_some(12)
            }
            _ => None,
        }
    }

    /// Where the BARs are, if their registers are `registers`: each that decodes, in order.
    pub fn places(&self, registers: [u32; 6]) -> Vec<(usize, u64)> {
        let place = |index: usize| {
            let Bar { size, wide, .. } = self.bars[index]?;
            let high = if wide { u64::from(registers[index + 1]) << 32 } else { 0 };
            let start = (high | u64::from(registers[index])) & !(size - 1) & !0xf;
            let fits = start >= PCI_MMIO_START && start.checked_add(size - 1)? <= PCI_MMIO_LAST;
            fits.then_some((index, start))
        };
        (0..6).filter_map(place).collect()
    }

    /// Whether any of `bytes` of `bar` is of MSI-X.
    pub fn is_msix(&self, bar: usize, bytes: &Range<u64>) -> bool {
        let over = |(of, it): &(usize, Range<u64>)| {
            *of == bar && it.start < bytes.end && bytes.start < it.end
        };
        self.structures.iter().any(over)
    }

    /// What the guest has mapped with its BARs at `places`: runs of pages with no byte of MSI-X.
    pub fn pieces(&self, places: &[(usize, u64)]) -> BTreeSet<Piece> {
        let mut all = BTreeSet::new();
        for (index, start) in places {
            let Some(Bar { size, mappable: true, .. }) = self.bars[*index] else { continue };
            let mut run = None;
            for page in 0..=size / PAGE {
                let offset = page * PAGE;
                let free = page < size / PAGE && !self.is_msix(*index, &(offset..offset + PAGE));
                match (run, free) {
                    (None, true) => run = Some(offset),
                    (Some(from), false) => {
                        all.insert((start + from, offset - from, *index, from));
                        run = None;
                    }
                    _ => {}
                }
            }
        }
        all
    }
}

/// The memory BARs that a device whose registers are in `config` has.
fn bars(config: &[u8], device: &Device) -> [Option<Bar>; 6] {
    let (mut bars, mut index) = ([None; 6], 0);
    while index < 6 {
        let kind = config[0x10 + 4 * index];
        let wide = kind & 7 == 4;
        let size = device.size(index);
        let fits = if wide { index < 5 } else { size <= 1 << 31 };
        if kind & 1 == 0 && size.is_power_of_two() && size >= 16 && fits {
            bars[index] = Some(Bar { size, wide, mappable: device.is_mappable(index) });
        }
        index += if wide { 2 } else { 1 };
    }
    bars
}
