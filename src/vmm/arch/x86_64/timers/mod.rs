// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC's clocks, for operating systems without support for KVM's: the interval timer if it is not
//! in the kernel, and the real-time clock. ACPI's power management timer is in `power`.

mod calendar;
mod counter;
mod pit;
mod rtc;

pub(super) use pit::{Pit, PitTimer, PIT_FIRST_PORT, PIT_LAST_PORT, PORT_B};
pub(super) use rtc::{Rtc, CENTURY, RTC_FIRST_PORT, RTC_LAST_PORT};

/// Ticks of a clock of `hertz` in so many nanoseconds.
pub(super) fn ticks(nanoseconds: u128, hertz: u32) -> u128 {
    nanoseconds * u128::from(hertz) / 1_000_000_000
}
