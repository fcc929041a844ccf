// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of MSI-X once it has started: masks, and pending bits.

use super::driver::{Driver, PENDING, TABLE};

impl Driver {
    /// The driver may have written to the table in another way.
    pub(super) fn look_at_table(&mut self) {
        let words = (0..2 * self.messages.len() as u64).map(|word| self.read(TABLE + 8 * word, 8));
        let table: Vec<_> = words.flat_map(u64::to_le_bytes).collect();
        self.messages.naive.learn(&table, self.read(PENDING, 8));
        self.messages.changed();
        self.messages.forget();
    }

    pub fn check_messages(&mut self, quiet: bool) {
        let pending = self.read(PENDING, 8);
        self.messages.check(pending, quiet, self.waits);
    }

    /// Masks a vector, or all, or ends that.
    pub fn mask(&mut self, choice: u64) {
        if self.waits {
            return;
        }
        self.check_messages(false);
        let masked = choice >> 6 & 1;
        match choice >> 4 & 3 {
            0 => {
                let msix = self.capability(0x11).expect("it has MSI-X");
                self.config(msix + 2, &(0x8000 | (masked as u16) << 14).to_le_bytes());
            }
            _ => self.write(TABLE + 12 + 16 * (choice % self.messages.len() as u64), 4, masked),
        }
        self.check_messages(true);
    }
}
