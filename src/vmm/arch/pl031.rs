// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An arm64 machine's real-time clock: a PL031 without its interrupt. It shows the host's time, or
//! what the guest has set.

use twostage::sync::Mutex;

use vm_superio::rtc_pl031::NoEvents;
use vm_superio::Rtc;

use crate::bus::BusDevice;

/// The clock's registers, of four bytes each in a page.
pub(super) struct Pl031(Mutex<Rtc<NoEvents>>);

impl Pl031 {
    pub fn new() -> Self {
        Self(Mutex::new(Rtc::new()))
    }
}

impl BusDevice for Pl031 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            // An offset within a page.
            self.0.lock().read(offset as u16, word);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(word) = <&[u8; 4]>::try_from(data) {
            self.0.lock().write(offset as u16, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    fn read(clock: &Pl031, offset: u64) -> u32 {
        let mut data = [0; 4];
        clock.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_shows_the_hosts_time_until_it_is_set() {
        let clock = Pl031::new();
        let host = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as u32;
        let before = host();
        assert!((before..=host()).contains(&read(&clock, 0)));
        clock.write(8, &1_000_000u32.to_le_bytes());
        assert!((1_000_000..=1_000_000 + host() - before).contains(&read(&clock, 0)));
        // Drivers find it by its identification.
        let id = [0xfe0, 0xfe4, 0xfe8, 0xfec].map(|offset| read(&clock, offset));
        assert_eq!(id, [0x31, 0x10, 0x04, 0x00]);
    }

    #[test]
    fn any_access_is_served() {
        let clock = Pl031::new();
        for offset in 0..0x1000 {
            for length in [1, 2, 4, 8] {
                let mut data = [0xff; 8];
                clock.write(offset, &data[..length]);
                clock.read(offset, &mut data[..length]);
            }
        }
    }
}
