// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's tables as they are when an execution starts: they translate.

use twostage::spec::smmuv3::translation::Granule;

use crate::models::memory::{PAGE, PAGES, SIZE};

/// The uses of pages, by number.
pub mod page {
    /// The stream table, or its first level.
    pub const STREAMS: u64 = 1;
    /// Its second level.
    pub const LEAVES: u64 = 2;
    /// Context descriptors, and from its middle on their first level.
    pub const CONTEXTS: u64 = 3;
    /// Context descriptors of a second level.
    pub const MORE: u64 = 4;
    pub const COMMANDS: u64 = 5;
    pub const EVENTS: u64 = 6;
    pub const REQUESTS: u64 = 7;
    /// Two sets of tables, each from level 0 to level 3. Of larger granules there is one set, whose
    /// pages are elsewhere.
    pub const TABLES: [u64; 2] = [8, 12];
    /// Level 3 of the 16K granule.
    pub const LARGE: u64 = 16;
    /// What devices reach: eight pages.
    pub const DATA: u64 = crate::models::memory::DATA;
}

/// Flags of a page: valid, unprivileged, accessed, not global.
pub const FLAGS: u64 = 3 | 1 << 6 | 1 << 10 | 1 << 11;
/// The same of a block.
const BLOCK: u64 = FLAGS & !2;

/// A context descriptor's first two words: its tables, as their first page says, are its ASID.
pub fn context(granule: Granule, table: u64) -> [u64; 2] {
    // Addresses of 48 bits, 26, or 25: one table, but for the 4K granule.
    let (size, tg) = match granule {
        Granule::K4 => (16, 0),
        Granule::K64 => (39, 1),
        Granule::K16 => (38, 2),
    };
    // EPD1, V, IPS of 48 bits, AA64, R, A, ASET.
    let low = size | tg << 6 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 7 << 45 | table << 48;
    [low, table * PAGE]
}

/// An entry of the stream table, with stage 1: its context descriptors, the binary logarithm of
/// their number, and their format.
pub fn stage1(contexts: u64, count: u64, format: u64) -> [u64; 2] {
    // S1DSS: substream 0 is for transactions without one. Write-back, inner shareable.
    [1 | 5 << 1 | format << 4 | contexts | count << 59, 2 | 1 << 2 | 1 << 4 | 3 << 6]
}

/// The memory at the start; `two_levels` of stream table and of context descriptors, by which
/// transactions that fault end or, if so, `stall`, and devices may or may not cache (`ats`).
pub fn image(granule: Granule, two_levels: bool, stall: bool, ats: bool) -> Vec<u8> {
    let mut image = vec![0; SIZE as usize];
    let mut put = |at: u64, word: u64| {
        image[at as usize..at as usize + 8].copy_from_slice(&word.to_le_bytes());
    };
    // Entries of 64 bytes; the first level points to 64 of them.
    let streams = if two_levels { page::LEAVES } else { page::STREAMS } * PAGE;
    if two_levels {
        put(page::STREAMS * PAGE, (page::LEAVES * PAGE) | 7);
    }
    let contexts = page::CONTEXTS * PAGE;
    let entries = match two_levels {
        // Format 1: a second level of a page.
        true => [stage1(contexts + 0x800, 2, 1), stage1(contexts + 0x800, 2, 1)],
        false => [stage1(contexts, 2, 0), stage1(contexts + 0x400, 0, 0)],
    };
    put(contexts + 0x800, (page::MORE * PAGE) | 1);
    for (slot, entry) in [0x20, 0x28].into_iter().zip(entries) {
        for (word, value) in (0..).zip([entry[0], entry[1] | u64::from(ats) << 28]) {
            put(streams + slot * 64 + word * 8, value);
        }
    }
    // Contexts 0 to 3 of one, and one of the other.
    for number in [0, 1, 2, 3, 16] {
        let table = page::TABLES[(number % 2) as usize];
        for at in [contexts, page::MORE * PAGE] {
            let table = if granule == Granule::K4 { table } else { page::TABLES[0] };
            let [low, next] = context(granule, table);
            for (word, value) in (0..).zip([low | u64::from(stall) << 44, next]) {
                put(at + number * 64 + word * 8, value);
            }
            put(at + number * 64 + 24, 0xff);
        }
    }
    match granule {
        Granule::K4 => {
            for (set, top) in (0..).zip(page::TABLES) {
                let top = top * PAGE;
                for level in 0..3 {
                    let at = top + level * PAGE;
                    let next = (at + PAGE) | 3;
                    put(at, next);
                    put(at + 8, if level == 0 { next } else { BLOCK });
                }
                for slot in 0..8 {
                    let data = page::DATA + (slot + 1 + set) % 8;
                    put(top + 3 * PAGE + (page::DATA + slot) * 8, (data * PAGE) | FLAGS);
                }
            }
        }
        Granule::K16 => {
            put(page::TABLES[0] * PAGE, (page::LARGE * PAGE) | 3);
            put(page::TABLES[0] * PAGE + 8, BLOCK);
            for slot in 0..8 {
                let data = 0x1_8000 + (slot & 1) * 0x4000;
                put(page::LARGE * PAGE + slot * 8, data | FLAGS);
            }
        }
        Granule::K64 => {
            for slot in 0..8 {
                put(page::TABLES[0] * PAGE + slot * 8, 0x1_0000 | FLAGS);
            }
        }
    }
    for number in page::DATA..PAGES {
        put(number * PAGE, number * PAGE);
        put(number * PAGE + 8, !(number * PAGE));
    }
    image
}
