// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's tables as they are when an execution starts: they translate.
//!
//! Each page of memory has one use ([`page`]). The pages that devices reach begin with their own
//! numbers.

use crate::models::memory::{PAGE, PAGES, SIZE};

/// The uses of pages, by number.
pub mod page {
    pub const ROOT: u64 = 1;
    pub const CONTEXT: u64 = 2;
    pub const DIRECTORY: u64 = 4;
    pub const PASIDS: u64 = 5;
    pub const INTERRUPTS: u64 = 6;
    pub const QUEUE: u64 = 7;
    pub const STATUS: u64 = 8;
    pub const REQUESTS: u64 = 9;
    /// Two first stages, each from its fourth level down.
    pub const FIRST: [u64; 2] = [10, 20];
    /// Fifth levels over them, of either stage.
    pub const FIFTH: [u64; 2] = [14, 15];
    /// A second stage.
    pub const SECOND: u64 = 16;
    /// What devices reach: eight pages.
    pub const DATA: u64 = crate::models::memory::DATA;
}

/// Which tables a requester has at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Start {
    FirstStage,
    SecondStage,
    Nested,
    PassThrough,
    Legacy,
}

impl Start {
    pub fn of(number: u8) -> Self {
        use Start::*;
        [FirstStage, Nested, SecondStage, Legacy, FirstStage, Nested, FirstStage, PassThrough]
            [usize::from(number) % 8]
    }

    pub fn is_legacy(self) -> bool {
        self == Self::Legacy
    }
}

/// Domains of entries at the start are this and the next one.
pub const DOMAIN: u64 = 1;

/// P, R/W and U/S of a first stage; R and W of a second one.
pub const FIRST_FLAGS: u64 = 7;
pub const SECOND_FLAGS: u64 = 3;

/// An entry of a PASID table: its type, domain, and tables.
pub fn pasid_entry(pgtt: u64, domain: u64, first: u64, second: u64, levels: u64) -> [u64; 3] {
    // AW: two for four levels, three for five; FSPM: none for four, one for five.
    let aw = levels - 2;
    let (first, second) = (first * PAGE, second * PAGE);
    [1 | aw << 2 | pgtt << 6 | second, domain, (levels - 4) << 2 | first]
}

/// The memory at the start.
pub fn image(start: Start, levels: u64) -> Vec<u8> {
    let mut image = vec![0; SIZE as usize];
    let mut put = |page: u64, index: u64, word: u64| {
        let at = (page * PAGE + index * 8) as usize;
        image[at..at + 8].copy_from_slice(&word.to_le_bytes());
    };
    // Functions 4.0 and 5.0, of bus 0.
    put(page::ROOT, 0, (page::CONTEXT * PAGE) | 1);
    let five = levels == 5;
    let second = if five { page::FIFTH[1] } else { page::SECOND };
    for (number, slot) in [0x20, 0x28].into_iter().enumerate() {
        if start.is_legacy() {
            put(page::CONTEXT, slot * 2, (second * PAGE) | 1);
            put(page::CONTEXT, slot * 2 + 1, (DOMAIN + number as u64) << 8 | (levels - 2));
        } else {
            // PASIDE, and 2^13 PASIDs.
            put(page::CONTEXT, slot * 4, (page::DIRECTORY * PAGE) | 9);
        }
    }
    put(page::DIRECTORY, 0, (page::PASIDS * PAGE) | 1);
    for pasid in 0..4 {
        let first = match pasid % 2 {
            _ if five && pasid < 2 => page::FIFTH[0],
            which => page::FIRST[which as usize],
        };
        let of = if five && pasid < 2 { 5 } else { 4 };
        let pgtt = match start {
            Start::FirstStage => 1,
            Start::SecondStage | Start::Legacy => 2,
            Start::Nested => 3,
            Start::PassThrough => [4, 1, 2, 3][pasid as usize],
        };
        let second = if of == 5 { second } else { page::SECOND };
        let domain = DOMAIN + u64::from(pasid == 2);
        for (word, value) in pasid_entry(pgtt, domain, first, second, of).into_iter().enumerate() {
            put(page::PASIDS, pasid * 8 + word as u64, value);
        }
    }
    put(page::FIFTH[0], 0, (page::FIRST[0] * PAGE) | FIRST_FLAGS);
    put(page::FIFTH[1], 0, (page::SECOND * PAGE) | SECOND_FLAGS);
    for (number, top) in page::FIRST.into_iter().enumerate() {
        stage(&mut put, top, FIRST_FLAGS, |slot| {
            Some(page::DATA + (slot.checked_sub(page::DATA)? + 1 + number as u64) % 8)
        });
    }
    stage(&mut put, page::SECOND, SECOND_FLAGS, |slot| match slot.checked_sub(page::DATA) {
        Some(slot) if !matches!(start, Start::Nested) => Some(page::DATA + (slot + 3) % 8),
        _ => Some(slot),
    });
    // Entry 0: to vector 0x31 of processor 1, of any source.
    put(page::INTERRUPTS, 0, 1 << 40 | 0x31 << 16 | 1);
    for number in page::DATA..PAGES {
        put(number, 0, number * PAGE);
        put(number, 1, !(number * PAGE));
    }
    image
}

/// Tables of four levels: the first table of each has the next one as its first entry, and as its
/// second one a large page where there is one; the last one has pages.
fn stage(
    put: &mut impl FnMut(u64, u64, u64),
    top: u64,
    flags: u64,
    page: impl Fn(u64) -> Option<u64>,
) {
    const LARGE: u64 = 1 << 7;
    put(top, 0, ((top + 1) * PAGE) | flags);
    put(top, 1, ((top + 1) * PAGE) | flags);
    put(top + 1, 0, ((top + 2) * PAGE) | flags);
    put(top + 1, 1, LARGE | flags);
    put(top + 2, 0, ((top + 3) * PAGE) | flags);
    put(top + 2, 1, LARGE | flags);
    for slot in 0..PAGES {
        if let Some(page) = page(slot) {
            put(top + 3, slot, (page * PAGE) | flags);
        }
    }
}
