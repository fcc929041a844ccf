// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A bus: devices by address range.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// A device with registers. Any vCPU thread may call it at any time.
///
/// `offset` is relative to the device's range; the access is within the range. `data` has 1, 2, 4
/// or 8 bytes in guest order (little-endian).
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices claim the same addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("addresses {start:#x}..={last:#x} are taken")]
pub struct Overlap {
    start: u64,
    last: u64,
}

struct Slot {
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address range. Filled while the machine is built, then only read.
#[derive(Default)]
pub struct Bus {
    slots: BTreeMap<u64, Slot>,
}

impl Bus {
    /// Adds `device` at `range`.
    ///
    /// # Errors
    /// Another device overlaps the range.
    pub fn insert(
        &mut self,
        range: RangeInclusive<u64>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let (start, last) = (*range.start(), *range.end());
        let below = self.slots.range(..=last).next_back();
        if start > last || below.is_some_and(|(_, slot)| slot.last >= start) {
            return Err(Overlap { start, last });
        }
        self.slots.insert(start, Slot { last, device });
        Ok(())
    }

    /// Reads; bytes without a device read as ones, as on an undriven bus. Returns whether a device
    /// answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; without a device the write is lost. Returns whether a device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The device whose range contains all of an access, and the offset in it.
    fn find(&self, address: u64, length: usize) -> Option<(u64, &dyn BusDevice)> {
        let last = address.checked_add(length.checked_sub(1)? as u64)?;
        let (start, slot) = self.slots.range(..=address).next_back()?;
        (last <= slot.last).then(|| (address - start, &*slot.device))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.slots.iter().map(|(start, slot)| *start..=slot.last);
        f.debug_list().entries(ranges.map(|range| format!("{range:#x?}"))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_goes_to_the_device_that_covers_it() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x100..=0x1ff, device.clone()).unwrap();
        let mut byte = [0];
        assert!(bus.read(0x142, &mut byte));
        assert_eq!(byte, [0x42]);
        assert!(bus.write(0x1fe, &[1, 2]));
        assert_eq!(*device.0.lock(), [(0xfe, vec![1, 2])]);
        // Past the end, before the start, entirely outside, and across the end of the address
        // space.
        let mut word = [0; 4];
        assert!(!bus.read(0x1fe, &mut word));
        assert_eq!(word, [0xff; 4]);
        assert!(!bus.write(0xff, &[1]));
        assert!(!bus.write(0x100, &[]));
        assert!(!bus.write(u64::MAX, &[1, 2]));
    }

    #[test]
    fn ranges_do_not_overlap() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x100..=0x1ff, device.clone()).unwrap();
        for range in [0x1ff..=0x200, 0x0..=0x100, 0x140..=0x150, 0x0..=0x1000] {
            bus.insert(range, device.clone()).unwrap_err();
        }
        bus.insert(0x200..=0x200, device.clone()).unwrap();
        bus.insert(0x0..=0xff, device).unwrap();
    }
}
