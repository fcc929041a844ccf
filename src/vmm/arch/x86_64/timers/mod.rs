// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC's clocks, for operating systems without support for KVM's: the interval timer if it is not
//! in the kernel, ACPI's power management timer, and the real-time clock.

mod calendar;
mod counter;
mod pit;
mod pm_timer;
mod rtc;

pub(super) use pit::{Pit, PitTimer, PIT_FIRST_PORT, PIT_LAST_PORT, PORT_B};
pub(super) use pm_timer::{PmTimer, PM_TIMER_PORT, PM_TIMER_SIZE};
pub(super) use rtc::{Rtc, CENTURY, RTC_FIRST_PORT, RTC_LAST_PORT};

/// Ticks of a clock of `hertz` in so many nanoseconds.
fn ticks(nanoseconds: u128, hertz: u32) -> u128 {
    nanoseconds * u128::from(hertz) / 1_000_000_000
}
