// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The power management timer: a counter that runs since the machine's start.
//!
//! Source: ACPI 6.5, §4.8.2.1 and §4.8.3.3. No interrupt when it wraps: the machine has no SCI.

use std::time::Instant;

use super::ticks;
use crate::bus::BusDevice;

/// Its I/O port.
pub(in crate::arch::x86_64) const PM_TIMER_PORT: u16 = 0x608;
/// Length of its only register, in bytes: a 32-bit timer.
pub(in crate::arch::x86_64) const PM_TIMER_SIZE: u8 = 4;
/// §4.8.2.1: 3.579545 MHz.
const HERTZ: u32 = 3_579_545;

/// The timer.
pub(in crate::arch::x86_64) struct PmTimer(Instant);

impl PmTimer {
    /// A timer that starts now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

/// Its value after so many nanoseconds.
fn value(nanoseconds: u128) -> u32 {
    // It wraps.
    ticks(nanoseconds, HERTZ) as u32
}

impl BusDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = u64::from(value(self.0.elapsed().as_nanos()));
        // An access is within the four bytes.
        let bytes = (value >> (8 * offset)).to_le_bytes();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    /// It is read-only.
    fn write(&self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_counts_3_579_545_a_second_and_wraps() {
        assert_eq!(value(0), 0);
        assert_eq!(value(1_000_000_000), 3_579_545);
        let wraps = u128::from(1u64 << 32) * 1_000_000_000 / u128::from(HERTZ);
        assert_eq!((value(wraps), value(wraps + 1000)), (u32::MAX, 3));
        assert_eq!(value(1_000_000_000 * 3600 * 24 * 365 * 100), 3_452_825_088);
    }

    #[test]
    fn it_runs_however_it_is_read() {
        let start = Instant::now().checked_sub(Duration::from_secs(100)).unwrap();
        let timer = PmTimer(start);
        let read = |offset, length| {
            let mut data = [0; 4];
            timer.read(offset, &mut data[..length]);
            u32::from_le_bytes(data)
        };
        timer.write(0, &[0; 4]);
        let first = read(0, 4);
        assert!(first >= 100 * HERTZ);
        assert!(read(0, 4) >= first);
        // Only the upper half.
        let (before, half, after) = (read(0, 4), read(2, 2), read(0, 4));
        assert!((before >> 16..=after >> 16).contains(&half), "{half:#x}");
    }
}
