// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The real-time clock and its memory: an MC146818 without interrupts.
//!
//! It shows the host's time in UTC, or what the guest has set. Source: Motorola MC146818 data sheet
//! ("Address Map", "Update Cycle", "Registers"). Of a PC's contents of its memory there is only the
//! century.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use twostage::sync::Mutex;

use super::calendar::DateTime;
use crate::bus::BusDevice;

/// I/O port of the index register; the next one is the data.
pub(in crate::arch::x86_64) const RTC_FIRST_PORT: u64 = 0x70;
/// I/O port of the data.
pub(in crate::arch::x86_64) const RTC_LAST_PORT: u64 = 0x71;
/// Index of the century, as in the FADT.
pub(in crate::arch::x86_64) const CENTURY: u8 = 0x32;

const SIZE: usize = 128;
/// The highest bit of the index masks NMIs, which do not exist here.
const ADDRESS_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

/// A: an update is in progress.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// A, as initialized by firmware: a 32.768 kHz crystal, and a rate of 1024 Hz.
const A_DEFAULT: u8 = 0x26;
/// B: the time is being set, and stopped.
const SET: u8 = 1 << 7;
/// B: numbers are binary, not BCD.
const BINARY: u8 = 1 << 2;
/// B: hours are 0 to 23; otherwise 1 to 12, with [`PM`].
const HOURS_24: u8 = 1 << 1;
/// The hour is one of the afternoon.
const PM: u8 = 1 << 7;
/// D: the battery is not empty.
const VALID: u8 = 1 << 7;

/// How long before an update it is announced: 244 µs, and the 1984 µs of the update.
const UPDATE: Duration = Duration::from_micros(244 + 1984);

/// The clock.
pub(in crate::arch::x86_64) struct Rtc(Mutex<State>);

/// The guest-visible state.
struct State {
    address: u8,
    memory: [u8; SIZE],
    /// Seconds ahead of the host.
    ahead: i64,
    /// The stopped time while it is set, in seconds since 1970.
    held: Option<i64>,
}

impl Rtc {
    pub fn new() -> Self {
        let mut memory = [0; SIZE];
        memory[usize::from(REGISTER_A)] = A_DEFAULT;
        memory[usize::from(REGISTER_B)] = HOURS_24;
        Self(Mutex::new(State { address: 0, memory, ahead: 0, held: None }))
    }

    fn access<T>(&self, access: impl FnOnce(&mut State, Duration) -> T) -> T {
        // Zero if the host's clock is before 1970.
        let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        access(&mut self.0.lock(), host)
    }
}

impl State {
    /// Seconds since 1970.
    fn time(&self, host: Duration) -> i64 {
        // Valid until the host's clock reaches 10^11 years.
        self.held.unwrap_or_else(|| (host.as_secs() as i64).saturating_add(self.ahead))
    }

    fn read(&self, host: Duration) -> u8 {
        let seconds = self.time(host);
        let at = DateTime::of_seconds(seconds);
        let byte = self.memory(self.address);
        match self.address {
            SECONDS => self.number(at.second),
            MINUTES => self.number(at.minute),
            HOURS => self.hours(at.hour),
            DAY_OF_WEEK => DateTime::weekday(seconds),
            DAY_OF_MONTH => self.number(at.day),
            MONTH => self.number(at.month),
            // Both below 100.
            YEAR => self.number(at.year.rem_euclid(100) as u8),
            CENTURY => self.number(at.year.div_euclid(100).rem_euclid(100) as u8),
            REGISTER_A => {
                let left =
                    Duration::from_secs(1) - Duration::from_nanos(host.subsec_nanos().into());
                let updates = self.held.is_none() && left <= UPDATE;
                byte & !UPDATE_IN_PROGRESS | if updates { UPDATE_IN_PROGRESS } else { 0 }
            }
            // There are no interrupts.
            REGISTER_C => 0,
            REGISTER_D => VALID,
            _ => byte,
        }
    }

    fn write(&mut self, value: u8, host: Duration) {
        let mut at = DateTime::of_seconds(self.time(host));
        let number = self.parse(value);
        match self.address {
            SECONDS => at.second = number,
            MINUTES => at.minute = number,
            HOURS => at.hour = self.parse_hours(value),
            DAY_OF_MONTH => at.day = number,
            MONTH => at.month = number,
            YEAR => at.year = at.year.div_euclid(100) * 100 + i64::from(number),
            CENTURY => at.year = i64::from(number) * 100 + at.year.rem_euclid(100),
            REGISTER_B => {
                match (self.held, value & SET != 0) {
                    (None, true) => self.held = Some(self.time(host)),
                    (Some(set), false) => self.set(set, host),
                    _ => {}
                }
                return self.put(value);
            }
            // It is derived from the date.
            DAY_OF_WEEK => return,
            REGISTER_C | REGISTER_D => return,
            _ => return self.put(value),
        }
        // It has four digits; carries must not accumulate.
        at.year = at.year.rem_euclid(10_000);
        match &mut self.held {
            Some(held) => *held = at.seconds(),
            None => self.set(at.seconds(), host),
        }
    }

    /// The clock continues from `seconds`.
    fn set(&mut self, seconds: i64, host: Duration) {
        self.held = None;
        self.ahead = seconds.saturating_sub(host.as_secs() as i64);
    }

    fn memory(&self, address: u8) -> u8 {
        self.memory.get(usize::from(address)).copied().unwrap_or(0)
    }

    fn put(&mut self, value: u8) {
        if let Some(byte) = self.memory.get_mut(usize::from(self.address)) {
            *byte = value;
        }
    }

    fn has(&self, bit: u8) -> bool {
        self.memory(REGISTER_B) & bit != 0
    }

    /// A number below 100 in the guest's format.
    fn number(&self, number: u8) -> u8 {
        if self.has(BINARY) {
            number
        } else {
            ((number / 10) << 4) | (number % 10)
        }
    }

    /// Converts from the guest's format.
    fn parse(&self, value: u8) -> u8 {
        // 165 at most.
        if self.has(BINARY) {
            value
        } else {
            (value >> 4) * 10 + (value & 0xf)
        }
    }

    fn hours(&self, hour: u8) -> u8 {
        if self.has(HOURS_24) {
            return self.number(hour);
        }
        let twelve = self.number(if hour.is_multiple_of(12) { 12 } else { hour % 12 });
        if hour < 12 {
            twelve
        } else {
            twelve | PM
        }
    }

    fn parse_hours(&self, value: u8) -> u8 {
        if self.has(HOURS_24) {
            return self.parse(value);
        }
        let hour = self.parse(value & !PM) % 12;
        if value & PM != 0 {
            hour + 12
        } else {
            hour
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The index is write-only.
        if let (1, [byte]) = (offset, data) {
            *byte = self.access(|state, host| state.read(host));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [byte]) => self.access(|state, _| state.address = byte & ADDRESS_MASK),
            (1, [byte]) => self.access(|state, host| state.write(*byte, host)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-29 21:07:05, a Sunday.
    const HOST: Duration = Duration::from_secs(1_795_986_425);

    fn clock() -> State {
        Rtc::new().0.into_inner()
    }

    fn read(clock: &mut State, address: u8, host: Duration) -> u8 {
        clock.address = address;
        clock.read(host)
    }

    fn write(clock: &mut State, address: u8, value: u8, host: Duration) {
        clock.address = address;
        clock.write(value, host);
    }

    fn shows(clock: &mut State, host: Duration) -> [u8; 8] {
        let registers = [CENTURY, YEAR, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS, DAY_OF_WEEK];
        registers.map(|register| read(clock, register, host))
    }

    #[test]
    fn it_shows_the_hosts_time() {
        let mut clock = clock();
        assert_eq!(shows(&mut clock, HOST), [0x20, 0x26, 0x11, 0x29, 0x21, 0x07, 0x05, 1]);
        write(&mut clock, REGISTER_B, HOURS_24 | BINARY, HOST);
        assert_eq!(shows(&mut clock, HOST), [20, 26, 11, 29, 21, 7, 5, 1]);
        write(&mut clock, REGISTER_B, 0, HOST);
        assert_eq!(read(&mut clock, HOURS, HOST), 0x09 | PM);
        let noon = HOST - Duration::from_secs(9 * 3600);
        assert_eq!(read(&mut clock, HOURS, noon), 0x12 | PM);
        assert_eq!(read(&mut clock, HOURS, noon - Duration::from_secs(12 * 3600)), 0x12);
        assert_eq!(read(&mut clock, REGISTER_C, HOST), 0);
        assert_eq!(read(&mut clock, REGISTER_D, HOST), VALID);
    }

    #[test]
    fn it_says_that_the_time_will_change() {
        let mut clock = clock();
        let mut at = |micros| read(&mut clock, REGISTER_A, HOST + Duration::from_micros(micros));
        assert_eq!(at(0), A_DEFAULT);
        assert_eq!(at(1_000_000 - 2229), A_DEFAULT);
        assert_eq!(at(1_000_000 - 2228), A_DEFAULT | UPDATE_IN_PROGRESS);
        assert_eq!(at(999_999), A_DEFAULT | UPDATE_IN_PROGRESS);
        assert_eq!(at(1_000_000), A_DEFAULT);
        // Not while it is being set; nor is it writable.
        write(&mut clock, REGISTER_A, 0xa6, HOST);
        assert_eq!(read(&mut clock, REGISTER_A, HOST), A_DEFAULT);
        write(&mut clock, REGISTER_B, SET | HOURS_24, HOST);
        let late = HOST + Duration::from_micros(999_999);
        assert_eq!(read(&mut clock, REGISTER_A, late), A_DEFAULT);
    }

    #[test]
    fn it_is_set_and_goes_on() {
        let mut clock = clock();
        write(&mut clock, REGISTER_B, SET | HOURS_24, HOST);
        let date = [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY_OF_MONTH, 0x31)];
        let time = [(HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x58), (DAY_OF_WEEK, 3)];
        for (register, value) in date.into_iter().chain(time) {
            write(&mut clock, register, value, HOST);
        }
        let later = HOST + Duration::from_secs(60);
        let set = [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58, 6];
        assert_eq!(shows(&mut clock, later), set, "it stands still");
        write(&mut clock, REGISTER_B, HOURS_24, later);
        assert_eq!(shows(&mut clock, later), set);
        let later = later + Duration::from_secs(2);
        assert_eq!(shows(&mut clock, later), [0x20, 0, 1, 1, 0, 0, 0, 7]);
        // One register, while running.
        write(&mut clock, MINUTES, 0x30, later);
        assert_eq!(shows(&mut clock, later + Duration::from_secs(1))[4..7], [0, 0x30, 1]);
        write(&mut clock, REGISTER_B, 0, later);
        write(&mut clock, HOURS, 0x12 | PM, later);
        write(&mut clock, REGISTER_B, HOURS_24, later);
        assert_eq!(read(&mut clock, HOURS, later), 0x12);
    }

    #[test]
    fn however_often_it_is_written_it_has_four_digits_of_a_year() {
        let mut clock = clock();
        for standing in [0, SET] {
            write(&mut clock, REGISTER_B, HOURS_24 | BINARY | standing, HOST);
            for register in [CENTURY, MONTH, DAY_OF_MONTH, HOURS, MINUTES, SECONDS] {
                write(&mut clock, register, 0xff, HOST);
            }
            for _ in 0..100 {
                write(&mut clock, YEAR, 0xff, HOST);
            }
            let year = DateTime::of_seconds(clock.time(HOST)).year;
            assert!((0..=10_000).contains(&year), "{year}");
        }
    }

    #[test]
    fn memory_keeps_what_is_written_and_nothing_else_harms() {
        let rtc = Rtc::new();
        let read = |address: u8| {
            let mut byte = [0];
            rtc.write(0, &[address]);
            rtc.read(1, &mut byte);
            byte[0]
        };
        rtc.write(0, &[0x80 | 0x0f]);
        rtc.write(1, &[0x0a]);
        assert_eq!(read(0x0f), 0x0a);
        for address in 0..=0xff {
            for value in 0..=0xff {
                rtc.write(0, &[address]);
                rtc.write(1, &[value]);
                read(address);
            }
        }
        let mut word = [0; 2];
        rtc.read(0, &mut word);
        assert_eq!(word, [0xff; 2]);
    }
}
