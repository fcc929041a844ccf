// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One counter of an 8254 interval timer. Time is a number of clock pulses, given by the caller.
//!
//! Source: Intel 82C54 data sheet (231244): "Operational Description" (writing, latching,
//! read-back, status), "Mode Definitions", "Operation Common to All Modes".

/// How the bytes of a count are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Low,
    High,
    /// The low one, then the high one.
    Both,
}

/// The active counting element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counting {
    /// Its initial count, from 1 to 65536.
    count: i64,
    /// The pulse that loaded the count. Negative if it is the second half of a long square wave.
    start: i64,
}

/// A counter. Every method takes the current pulse, which never decreases.
#[derive(Debug, Clone)]
pub(super) struct Counter {
    mode: u8,
    access: Access,
    bcd: bool,
    gate: bool,
    /// The count register, once it has been written completely.
    register: Option<i64>,
    /// It has not been loaded yet.
    waits: bool,
    /// The pulse that will load it: the end of a period, or of half a period of a square wave.
    load_at: Option<i64>,
    counting: Option<Counting>,
    /// The count when the gate closed.
    held: Option<i64>,
    /// The first written byte of a two-byte count.
    first_byte: Option<u8>,
    /// The next byte read is the second of two.
    second_next: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    /// An unprogrammed counter, which does not count.
    pub fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            access: Access::Both,
            bcd: false,
            gate,
            register: None,
            waits: false,
            load_at: None,
            counting: None,
            held: None,
            first_byte: None,
            second_next: false,
            latched: None,
            latched_status: None,
        }
    }

    /// A control word for this counter: `word` has the access, mode and BCD bits.
    pub fn control(&mut self, word: u8, now: i64) {
        let access = match word >> 4 & 3 {
            0 => return self.latch_count(now),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // The highest mode bit is ignored for modes 2 and 3.
        let mode = match word >> 1 & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        // Resets everything except the gate, which is a pin, and latched values.
        *self = Self {
            mode,
            access,
            bcd: word & 1 != 0,
            register: None,
            waits: false,
            load_at: None,
            counting: None,
            held: None,
            first_byte: None,
            second_next: false,
            ..*self
        };
    }

    /// Latches the count for the next read, unless one is latched already.
    pub fn latch_count(&mut self, now: i64) {
        let count = self.count(now);
        self.latched = self.latched.or(Some(count));
    }

    /// Latches the status for the next read, unless one is latched already.
    pub fn latch_status(&mut self, now: i64) {
        self.settle(now);
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3u8,
        };
        // The last written count is not in the counting element yet.
        let null_count = self.waits || self.counting.is_none_or(|counting| now < counting.start);
        let status = u8::from(self.output(now)) << 7
            | u8::from(null_count) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status = self.latched_status.or(Some(status));
    }

    /// Software reads a byte.
    pub fn read(&mut self, now: i64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = self.count(now);
        let [low, high] = self.latched.unwrap_or(count).to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both if self.second_next => (high, true),
            Access::Both => (low, false),
        };
        self.second_next = !last;
        if last {
            self.latched = None;
        }
        byte
    }

    /// Software writes a byte.
    pub fn write(&mut self, byte: u8, now: i64) {
        self.settle(now);
        match (self.access, self.first_byte.take()) {
            (Access::Low, _) => self.set_count(byte.into(), now),
            (Access::High, _) => self.set_count(u16::from(byte) << 8, now),
            (Access::Both, None) => {
                self.first_byte = Some(byte);
                if self.mode == 0 {
                    // The first byte stops it.
                    (self.counting, self.held) = (None, None);
                }
            }
            (Access::Both, Some(low)) => self.set_count(u16::from_le_bytes([low, byte]), now),
        }
    }

    /// The gate opens or closes.
    pub fn set_gate(&mut self, open: bool, now: i64) {
        self.settle(now);
        if open == std::mem::replace(&mut self.gate, open) {
            return;
        }
        match (self.mode, open) {
            // A trigger.
            (1 | 2 | 3 | 5, true) => self.load(now + 1),
            (2 | 3, false) => (self.counting, self.load_at) = (None, None),
            (1 | 5, false) => {}
            (_, false) => self.held = self.counting.map(|counting| (now - counting.start).max(0)),
            (_, true) => {
                if let (Some(held), Some(counting)) = (self.held.take(), &mut self.counting) {
                    counting.start = now - held;
                }
            }
        }
    }

    /// Whether the output is high.
    pub fn output(&mut self, now: i64) -> bool {
        self.settle(now);
        let Some((Counting { count, .. }, elapsed)) = self.progress(now) else {
            return self.mode != 0;
        };
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => elapsed % count != count - 1,
            3 => elapsed % count < high_half(count),
            _ => elapsed != count,
        }
    }

    /// The first pulse after `after` at which counting makes the output rise. The effect of a
    /// control word is not included.
    pub fn next_rise(&mut self, after: i64) -> Option<i64> {
        self.settle(after);
        let Counting { count, start } = self.counting.filter(|_| self.held.is_none())?;
        let rise = match (self.mode, self.load_at, self.register) {
            (0 | 1, ..) => start + count,
            // The second half of this square wave uses the next count.
            (3, Some(at), Some(next)) if (at - start) % count != 0 => at + low_half(next),
            (2 | 3, ..) => start + count * ((after - start).max(0) / count + 1),
            _ => start + count + 1,
        };
        (rise > after).then_some(rise)
    }

    /// The count at `now`, as read by software.
    fn count(&mut self, now: i64) -> u16 {
        self.settle(now);
        let value = match (self.progress(now), self.counting) {
            (None, None) => 0,
            (None, Some(counting)) => counting.count,
            (Some((Counting { count, .. }, elapsed)), _) => match self.mode {
                2 => count - elapsed % count,
                3 => {
                    let (into, half) = (elapsed % count, high_half(count));
                    // By two, from an even number, once in each half.
                    (count & !1) - 2 * if into < half { into } else { into - half }
                }
                _ => count - elapsed,
            },
        };
        // Below the modulus, which is 65536 at the most.
        let value = value.rem_euclid(self.modulus()) as u16;
        if self.bcd {
            to_bcd(value)
        } else {
            value
        }
    }

    /// A count was written.
    fn set_count(&mut self, value: u16, now: i64) {
        let value = if self.bcd { from_bcd(value) } else { value.into() };
        let count = if value == 0 { self.modulus() } else { value };
        // There is no period of one pulse.
        let periodic = matches!(self.mode, 2 | 3);
        self.register = Some(if periodic { count.max(2) } else { count });
        self.waits = true;
        match self.counting {
            _ if matches!(self.mode, 0 | 4) => {
                self.load(now + 1);
                self.held = (!self.gate).then_some(0);
            }
            Some(Counting { count, start }) if periodic => {
                let into = (now - start).max(0) % count;
                let half = high_half(count);
                let left = if self.mode == 3 && into < half { half - into } else { count - into };
                self.load_at = Some(now.max(start) + left);
            }
            None if periodic && self.gate => self.load(now + 1),
            _ => {}
        }
    }

    /// Loads the count, to count from `start` on.
    fn load(&mut self, start: i64) {
        if let Some(count) = self.register {
            self.counting = Some(Counting { count, start });
            (self.waits, self.load_at) = (false, None);
        }
    }

    /// Loads a waiting count whose time has come.
    fn settle(&mut self, now: i64) {
        let (Some(at), Some(before)) = (self.load_at.filter(|at| *at <= now), self.counting) else {
            return;
        };
        let half_way = (at - before.start) % before.count != 0;
        let skipped = self.register.filter(|_| half_way).map_or(0, high_half);
        self.load(at - skipped);
    }

    /// What is counted and the progress; none before a count is loaded.
    fn progress(&self, now: i64) -> Option<(Counting, i64)> {
        let counting = self.counting?;
        let elapsed = self.held.unwrap_or(now - counting.start);
        (elapsed >= 0).then_some((counting, elapsed))
    }

    fn modulus(&self) -> i64 {
        if self.bcd {
            10_000
        } else {
            0x1_0000
        }
    }
}

/// How long a square wave is high.
fn high_half(count: i64) -> i64 {
    (count + 1) / 2
}

/// How long it is low.
fn low_half(count: i64) -> i64 {
    count / 2
}

/// Four decimal digits; digits above nine carry, whatever hardware does.
fn from_bcd(value: u16) -> i64 {
    let digits = [value >> 12, value >> 8 & 0xf, value >> 4 & 0xf, value & 0xf];
    digits.into_iter().fold(0, |number, digit| number * 10 + i64::from(digit)) % 10_000
}

fn to_bcd(value: u16) -> u16 {
    let digits = [value / 1000, value / 100 % 10, value / 10 % 10, value % 10];
    digits.into_iter().fold(0, |bcd, digit| bcd << 4 | digit)
}

#[cfg(test)]
mod tests;
