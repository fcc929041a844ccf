// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tables that the guest changes, and the dice by which it does.

use super::super::naive::{Page, PAGES};
use crate::common::{HIGH, PAGE};

/// Small numbers, of a fixed sequence.
pub(super) struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % limit
    }

    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// What a table has now.
pub(super) struct Table {
    pub top: u64,
    pub first_stage: bool,
    pub pages: [Page; PAGES as usize],
    /// The entry above the pages is a large page; otherwise it is `pointer`.
    pub large: bool,
    pub pointer: u64,
}

impl Table {
    pub fn word(&self, page: Page, large: bool) -> u64 {
        let Page { gpa, read, write } = page;
        let size = u64::from(large) << 7;
        match self.first_stage {
            true if read => gpa | size | 0x5 | u64::from(write) << 1,
            true => 0,
            false => gpa | size | u64::from(read) | u64::from(write) << 1,
        }
    }

    pub fn now(&self, page: u64) -> Page {
        match self.large {
            true => Page { gpa: HIGH + page * PAGE, read: true, write: true },
            false => self.pages[page as usize],
        }
    }
}
