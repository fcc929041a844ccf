// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The Gregorian calendar, by seconds since 1970 without leap seconds.

/// A date and a time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
}

const DAY: i64 = 24 * 60 * 60;
/// Days of 400 years, after which the calendar repeats.
const CYCLE_DAYS: i64 = 146_097;
/// Days from the first of March of the year 0 to 1970.
const MARCH_0_TO_1970: i64 = 719_468;

impl DateTime {
    /// Converts seconds since 1970.
    pub fn of_seconds(seconds: i64) -> Self {
        // Years here begin in March, so that the leap day is the last.
        let days = seconds.div_euclid(DAY) + MARCH_0_TO_1970;
        let in_day = seconds.rem_euclid(DAY);
        let (cycle, in_cycle) = (days.div_euclid(CYCLE_DAYS), days.rem_euclid(CYCLE_DAYS));
        let year = (in_cycle - in_cycle / 1460 + in_cycle / 36_524 - in_cycle / 146_096) / 365;
        let in_year = in_cycle - days_before(year);
        let month = (5 * in_year + 2) / 153;
        let day = in_year - (153 * month + 2) / 5 + 1;
        let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        Self {
            year: 400 * cycle + year + carry,
            // Each below 60.
            month: month as u8,
            day: day as u8,
            hour: (in_day / 3600) as u8,
            minute: (in_day / 60 % 60) as u8,
            second: (in_day % 60) as u8,
        }
    }

    /// Seconds since 1970. Out-of-range values, such as the 31st of April, carry over.
    pub fn seconds(&self) -> i64 {
        let months = i64::from(self.month) - 3;
        let (year, month) = (self.year + months.div_euclid(12), months.rem_euclid(12));
        let (cycle, in_cycle) = (year.div_euclid(400), year.rem_euclid(400));
        let in_year = (153 * month + 2) / 5 + i64::from(self.day) - 1;
        let days = CYCLE_DAYS * cycle + days_before(in_cycle) + in_year - MARCH_0_TO_1970;
        let in_day =
            i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        days * DAY + in_day
    }

    /// The weekday of so many seconds since 1970: 1 is Sunday.
    pub fn weekday(seconds: i64) -> u8 {
        // 1970 began on a Thursday.
        ((seconds.div_euclid(DAY) + 4).rem_euclid(7) + 1) as u8
    }
}

/// Days before the year `year` of a cycle.
fn days_before(year: i64) -> i64 {
    365 * year + year / 4 - year / 100
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn date(year: i64, month: u8, day: u8) -> DateTime {
        DateTime { year, month, day, hour: 0, minute: 0, second: 0 }
    }

    #[test]
    fn known_dates_are_right() {
        for (seconds, at) in [
            (0, date(1970, 1, 1)),
            (951_782_400, date(2000, 2, 29)),
            (951_868_800, date(2000, 3, 1)),
            (4_107_542_400, date(2100, 3, 1)),
            (-86_400, date(1969, 12, 31)),
        ] {
            assert_eq!((DateTime::of_seconds(seconds), at.seconds()), (at, seconds));
        }
        let last = DateTime { hour: 23, minute: 59, second: 59, ..date(2026, 11, 29) };
        assert_eq!(DateTime::of_seconds(last.seconds()), last);
        // A Thursday, and a Sunday.
        assert_eq!((DateTime::weekday(0), DateTime::weekday(last.seconds())), (5, 1));
    }

    #[test]
    fn dates_that_are_none_go_on_into_the_next_month() {
        assert_eq!(date(2026, 4, 31).seconds(), date(2026, 5, 1).seconds());
        assert_eq!(date(2026, 13, 1).seconds(), date(2027, 1, 1).seconds());
        assert_eq!(date(2026, 0, 1).seconds(), date(2025, 12, 1).seconds());
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same(seconds in -1i64 << 40..1 << 40) {
            let at = DateTime::of_seconds(seconds);
            prop_assert!((1..=12).contains(&at.month) && (1..=31).contains(&at.day));
            prop_assert_eq!(at.seconds(), seconds);
            // The next day is the next day.
            let next = DateTime::of_seconds(seconds + DAY);
            prop_assert!(next.day == at.day + 1 || next.day == 1);
        }
    }
}
