// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The BARs of an assigned device, and which parts the guest accesses without an exit.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use twostage::sync::Mutex;

use super::host_device::{HostDevice, Region};
use super::mapping::{Lender, Loan, Mapping};
use crate::pci::layout::{BAR0, BARS, CONFIG_SIZE};
use crate::pci::{BarPlacement, MemoryBar};
use twostage::warn_limited;

/// A BAR in I/O space (§7.5.1.2.1).
const IO_SPACE: u8 = 1;
/// A memory BAR: its type, and that of a 64-bit address.
const TYPE: u8 = 0b110;
const TYPE_64: u8 = 0b100;
/// A memory BAR: reads have no side effects.
const PREFETCHABLE: u8 = 1 << 3;

/// A memory BAR of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceBar {
    /// Its first register, and the region behind it.
    pub index: usize,
    /// As the guest sees it.
    pub bar: MemoryBar,
    /// The region behind it.
    pub region: Region,
}

/// The memory BARs of `host`, whose configuration space is `config`. I/O BARs and invalid ones are
/// left out.
///
/// # Errors
/// VFIO's error.
pub fn memory_bars(
    host: &dyn HostDevice,
    config: &[u8; CONFIG_SIZE],
) -> io::Result<Vec<DeviceBar>> {
    let mut bars = Vec::new();
    let mut index = 0;
    while index < BARS {
        let Some(&kind) = config.get(usize::from(BAR0) + 4 * index) else { break };
        let wide = kind & (IO_SPACE | TYPE) == TYPE_64;
        // Six at most.
        let region = host.region(index as u32)?;
        let size = region.size;
        let sound = size.is_power_of_two()
            && size >= MemoryBar::MIN_SIZE
            && (size <= 1 << 31 || wide)
            && index + usize::from(wide) < BARS;
        if kind & IO_SPACE == 0 && sound {
            let bar = MemoryBar { size, wide, prefetchable: kind & PREFETCHABLE != 0 };
            bars.push(DeviceBar { index, bar, region });
        }
        index += 1 + usize::from(wide);
    }
    Ok(bars)
}

/// The parts of one BAR that can be mapped.
struct Lendable {
    index: usize,
    /// By the offset in the BAR.
    pieces: Vec<(u64, Arc<Mapping>)>,
    /// The BAR's place while they are mapped.
    lent: Option<(BarPlacement, Vec<Box<dyn Loan>>)>,
}

/// The BARs of a device, mapped into the guest where the guest has placed them.
pub struct LentBars {
    lender: Arc<dyn Lender>,
    bars: Mutex<Vec<Lendable>>,
}

impl LentBars {
    /// Maps the mappable parts of `bars` of `host`, except pages that contain a byte of what
    /// `trapped` returns for each BAR; `page` is their size. The rest is trapped.
    pub fn new(
        host: &dyn HostDevice,
        bars: &[DeviceBar],
        trapped: &dyn Fn(usize) -> Vec<Range<u64>>,
        page: u64,
        lender: Arc<dyn Lender>,
    ) -> Self {
        let bars = bars.iter().map(|DeviceBar { index, region, .. }| {
            let areas = region.areas_without(&trapped(*index), page);
            let map = |area: Range<u64>| {
                let mapping = host.map(region, area.start, area.end - area.start);
                let mapping = mapping.inspect_err(|error| {
                    log::warn!("BAR {index}, {area:#x?}: {error}; each access leaves the guest");
                });
                Some((area.start, Arc::new(mapping.ok()?)))
            };
            let pieces = areas.into_iter().filter_map(map).collect();
            Lendable { index: *index, pieces, lent: None }
        });
        Self { lender, bars: Mutex::new(bars.collect()) }
    }

    /// The decoding BARs are `placements`: maps them there, and nowhere else.
    pub fn update(&self, placements: &[BarPlacement]) {
        let mut bars = self.bars.lock();
        // Unmaps everything before mapping: two BARs may swap places.
        for bar in bars.iter_mut() {
            if bar.lent.as_ref().is_some_and(|(placement, _)| !placements.contains(placement)) {
                bar.lent = None;
            }
        }
        for bar in bars.iter_mut().filter(|bar| bar.lent.is_none()) {
            let placement = placements.iter().find(|placement| placement.index == bar.index);
            bar.lent = placement.map(|placement| (*placement, self.lend(bar, *placement)));
        }
    }

    /// Maps the pieces of `bar` at `placement`. What cannot be mapped is trapped.
    fn lend(&self, bar: &Lendable, placement: BarPlacement) -> Vec<Box<dyn Loan>> {
        let lend = |(offset, mapping): &(u64, Arc<Mapping>)| {
            // Within the BAR.
            let address = placement.start + offset;
            let loan = self.lender.lend(address, mapping.clone());
            let complain = |error: &io::Error| {
                warn_limited!("BAR {} at {address:#x}: {error}; accesses are trapped", bar.index);
            };
            loan.inspect_err(complain).ok()
        };
        bar.pieces.iter().filter_map(lend).collect()
    }
}

impl fmt::Debug for LentBars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bars = self.bars.lock();
        let lent = bars.iter().filter_map(|bar| bar.lent.as_ref().map(|(placement, _)| placement));
        f.debug_list().entries(lent).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{FakeDevice, FakeLender};
    use super::*;

    fn config(kinds: [u8; BARS]) -> Box<[u8; CONFIG_SIZE]> {
        let mut config = Box::new([0; CONFIG_SIZE]);
        for (index, kind) in kinds.into_iter().enumerate() {
            config[0x10 + 4 * index] = kind;
        }
        config
    }

    #[test]
    fn memory_bars_are_found_and_others_left_out() {
        let mut host = FakeDevice::default();
        // Wide and prefetchable; I/O; not a power of two; narrow.
        for (index, size) in [(0, 0x4000), (2, 0x20), (3, 0x3000), (4, 0x1000), (5, 1 << 20)] {
            host.add_region(index, size, false);
        }
        let bars = memory_bars(&host, &config([0xc, 0, 1, 0, 0, 4])).unwrap();
        let bar = |index: usize| &bars.iter().find(|bar| bar.index == index).unwrap().bar;
        assert_eq!(bars.len(), 2);
        assert_eq!(*bar(0), MemoryBar { size: 0x4000, wide: true, prefetchable: true });
        assert_eq!(*bar(4), MemoryBar { size: 0x1000, wide: false, prefetchable: false });
    }

    #[test]
    fn what_can_be_mapped_is_lent_where_the_bar_is() {
        let mut host = FakeDevice::default();
        host.add_region(0, 0x4000, true);
        host.add_region(2, 0x800, true);
        let bars = memory_bars(&host, &config([4, 0, 0, 0, 0, 0])).unwrap();
        let lender = Arc::new(FakeLender::default());
        // As for an MSI-X table.
        let trapped = |index| (index == 0).then_some(0x2000..0x2010).into_iter().collect();
        let lent = LentBars::new(&host, &bars, &trapped, 0x1000, lender.clone());
        let at = |start: u64| BarPlacement { index: 0, start, last: start + 0x3fff };
        lent.update(&[at(0xe000_0000)]);
        assert_eq!(lender.lent(), [(0xe000_0000, 0x2000), (0xe000_3000, 0x1000)]);
        lent.update(&[at(0xe000_0000)]);
        assert_eq!(lender.calls(), 2);
        lent.update(&[at(0xe001_0000)]);
        assert_eq!(lender.lent(), [(0xe001_0000, 0x2000), (0xe001_3000, 0x1000)]);
        lent.update(&[]);
        assert_eq!(lender.lent(), []);
    }
}
