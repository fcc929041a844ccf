// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest's tables say, naively.

use std::collections::BTreeMap;

use super::{MEMORY, PAGE};
use crate::input::Input;

/// Pages for data, which start where a large page may.
pub const DATA: u64 = LARGE;
pub const PAGES: usize = 8;
/// Where in a page the byte is that devices access.
pub const PLACE: u64 = 0x10;
/// Tables of the guest; of which kind they are, its driver knows.
pub const TABLES: usize = 4;
/// Bytes of a large page.
pub const LARGE: u64 = 0x20_0000;

/// The address of a place for a page.
pub fn small(slot: usize) -> u64 {
    0x7000_0000_0000 + (slot % PAGES) as u64 * PAGE
}

/// The address of a place for a large page.
pub fn large(slot: usize) -> u64 {
    0x4000_0000 + (slot % 2) as u64 * LARGE
}

/// The address of a page, mapped or not.
pub fn iova(input: &mut Input<'_>) -> u64 {
    let (kind, page) = (input.byte(), input.below(PAGES));
    match kind % 8 {
        0..=3 => small(page),
        4 => large(usize::from(kind >> 3)) + page as u64 * PAGE,
        5 => MEMORY as u64 + page as u64 * PAGE,
        _ => DATA + page as u64 * PAGE,
    }
}

/// A page that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    pub gpa: u64,
    pub writable: bool,
    pub large: bool,
}

impl Leaf {
    /// That of the page number `page` for data.
    pub fn small(page: u64, writable: bool) -> Self {
        Self { gpa: DATA + page * PAGE, writable, large: false }
    }

    /// That of the large page of all data.
    pub fn large(writable: bool) -> Self {
        Self { gpa: DATA, writable, large: true }
    }
}

/// Where a device's requests lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Nowhere,
    Bypass,
    Table(usize),
}

/// Where one request leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// To the data in this page.
    Data(usize),
    /// The device is not behind this IOMMU.
    Gone,
    /// The device has no tables, and no way past them.
    Blocked,
    /// The tables refuse it.
    Refused,
    /// There is no memory.
    Nothing,
}

/// The tables, who uses them, and the data.
#[derive(Debug, Default)]
pub struct Account {
    pub tables: [BTreeMap<u64, Leaf>; TABLES],
    pub ways: BTreeMap<(usize, Option<u32>), Way>,
    pub on: bool,
    pub data: [u8; PAGES],
}

impl Account {
    /// Where a request of `who` for `iova` leads.
    pub fn reach(&self, who: (usize, Option<u32>), iova: u64, write: bool) -> Reach {
        let way = self.ways.get(&who).copied().unwrap_or(Way::Nowhere);
        let gpa = match if self.on { way } else { Way::Bypass } {
            Way::Nowhere => return Reach::Blocked,
            Way::Bypass => iova,
            Way::Table(table) => {
                let size = |leaf: &Leaf| if leaf.large { LARGE } else { PAGE };
                let found = self.tables[table]
                    .iter()
                    .find(|(start, leaf)| (**start..**start + size(leaf)).contains(&iova));
                match found {
                    Some((start, leaf)) if leaf.writable || !write => leaf.gpa + (iova - start),
                    _ => return Reach::Refused,
                }
            }
        };
        match gpa.checked_sub(DATA + PLACE) {
            Some(offset) if gpa < MEMORY as u64 => Reach::Data((offset / PAGE) as usize),
            _ => Reach::Nothing,
        }
    }
}
