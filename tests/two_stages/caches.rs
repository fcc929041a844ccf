// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Naive caches of translations: they keep everything that a device looked up, and drop exactly
//! what the specification's text requires.
//!
//! A model of one IOTLB and one paging-structure cache, compared with a whole stack: after every
//! step each device's reads must be as in the model. Where the text allows hardware to drop more
//! than required, and the stack does, the model does the same, with a comment.

use proptest::prelude::*;
use twostage_emulated::kit::Pages;

use crate::common::{HIGH, PAGE};

/// Pages of 2 MiB that tests map, by GPA. Every 4 KiB page of them starts with its GPA.
pub const BLOCKS: [u64; 4] = [0xc0_0000, 0xe0_0000, HIGH, HIGH + LARGE];
/// Bytes of a large page.
pub const LARGE: u64 = 2 << 20;
/// Start of the pages that tests use: tables have one entry at the top, and two, two and three
/// below that.
const BASE: u64 = 0x7000_0000_0000;
/// Number of these pages.
pub const SLOTS: u64 = 2 * 2 * 3;
/// Binary logarithm of the span of a table entry at a height; 1 is the lowest table.
pub const fn shift(height: u8) -> u32 {
    3 + 9 * height as u32
}
/// The height of a top table.
const TOP: u8 = 4;

/// The page number `slot` of those that tests use.
pub fn iova(slot: u64) -> u64 {
    let (top, directory, table) = (slot / 6, slot / 3 % 2, slot % 3);
    BASE + (top << shift(3)) + (directory << shift(2)) + (table << shift(1))
}

/// Writes its address into each page of [`BLOCKS`].
pub fn number_pages(memory: &Pages) {
    for block in BLOCKS {
        (block..block + LARGE).step_by(PAGE as usize).for_each(|gpa| memory.store(gpa, gpa));
    }
}

/// A decoded table entry.
pub struct Next {
    pub gpa: u64,
    pub leaf: bool,
    /// The same in every address space.
    pub global: bool,
}

/// Tables of four levels, each of 512 entries.
pub trait Format: Sync {
    fn pointer(&self, gpa: u64) -> u64;
    fn leaf(&self, gpa: u64, height: u8, global: bool) -> u64;
    /// `None` for an entry that is not present.
    fn decode(&self, word: u64, height: u8) -> Option<Next>;
}

/// Tables, by the address of the top one.
#[derive(Clone, Copy)]
pub struct Tables {
    pub top: u64,
    pub format: &'static dyn Format,
}

/// The tables of one address space: a top, two directories, three lowest tables.
pub struct Space {
    pub top: u64,
    middle: u64,
    directories: [u64; 2],
    tables: [u64; 3],
    format: &'static dyn Format,
}

/// A write to an entry.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    /// Which of the tables, from the middle down.
    table: usize,
    index: u64,
    value: usize,
    global: bool,
}

/// Any entry with any value.
pub fn write() -> impl Strategy<Value = Write> {
    // Mostly leaves.
    let table = prop_oneof![1 => Just(0usize), 3 => 1usize..3, 6 => 3usize..6];
    (table, 0u64..3, 0usize..9, any::<bool>()).prop_map(|(table, index, value, global)| Write {
        table,
        index,
        value,
        global,
    })
}

impl Space {
    /// Tables in which every page is mapped.
    pub fn new(memory: &Pages, format: &'static dyn Format) -> Self {
        let [top, middle] = [(); 2].map(|()| memory.page());
        let (directories, tables) =
            ([(); 2].map(|()| memory.page()), [(); 3].map(|()| memory.page()));
        let space = Self { top, middle, directories, tables, format };
        memory.store(top + (BASE >> shift(4) & 511) * 8, format.pointer(middle));
        for table in 0..6 {
            for index in 0..3 {
                let write = Write { table, index, value: table + index as usize, global: false };
                space.write(memory, write);
            }
        }
        space
    }

    /// The tables.
    pub fn tables(&self) -> Tables {
        Tables { top: self.top, format: self.format }
    }

    /// The GPAs of the tables of each height, from the top down.
    pub fn pages(&self) -> [&[u64]; 4] {
        use std::slice::from_ref;
        [from_ref(&self.top), from_ref(&self.middle), &self.directories, &self.tables]
    }

    /// Changes an entry, without invalidation.
    pub fn write(&self, memory: &Pages, write: Write) {
        let Write { table, index, value, global } = write;
        let (at, word) = match table {
            0 => (self.middle, self.directories.get(value % 3).map(|at| self.format.pointer(*at))),
            1 | 2 => (
                self.directories[table - 1],
                match value {
                    0..3 => Some(self.format.pointer(self.tables[value])),
                    3..7 => Some(self.format.leaf(BLOCKS[value - 3], 2, global)),
                    _ => None,
                },
            ),
            _ => {
                // Eight pages, two of each block.
                let page = BLOCKS[value % 4] + value as u64 * PAGE;
                (self.tables[table - 3], (value < 8).then(|| self.format.leaf(page, 1, global)))
            }
        };
        memory.store(at + index * 8, word.unwrap_or(0));
    }
}

/// A translation of a whole page.
#[derive(Debug, Clone, Copy)]
pub struct CachedPage<Tag> {
    pub tag: Tag,
    pub iova: u64,
    pub height: u8,
    gpa: u64,
}

/// A table below the top one.
#[derive(Debug, Clone, Copy)]
pub struct CachedTable<Tag> {
    pub tag: Tag,
    /// First of the addresses that it translates.
    pub iova: u64,
    /// Its own height.
    pub height: u8,
    gpa: u64,
}

impl<Tag> CachedPage<Tag> {
    /// The size of the page, as a power of two.
    pub fn shift(&self) -> u32 {
        shift(self.height)
    }
}

impl<Tag> CachedTable<Tag> {
    /// The size of what it translates, as a power of two.
    pub fn shift(&self) -> u32 {
        shift(self.height + 1)
    }
}

/// See the [module's documentation](self).
pub struct Caches<Tag> {
    pub pages: Vec<CachedPage<Tag>>,
    pub tables: Vec<CachedTable<Tag>>,
}

impl<Tag> Default for Caches<Tag> {
    fn default() -> Self {
        Self { pages: Vec::new(), tables: Vec::new() }
    }
}

impl<Tag: Copy + PartialEq> Caches<Tag> {
    /// The GPA that a read by `space` at `iova` reaches; caches what is used. `tag` is the space's;
    /// translations that are the same in every space are also looked up by, and stored with,
    /// `global`.
    pub fn read(
        &mut self,
        memory: &Pages,
        space: &Space,
        tags: (Tag, Option<Tag>),
        iova: u64,
    ) -> Option<u64> {
        Some(self.translate(memory, space.tables(), tags, iova, None)?.0)
    }

    /// The same by `tables`, with the height of the page that can be cached. Addresses in these
    /// tables are GPAs, or are translated by the tables `below` with a tag of their own.
    pub fn translate(
        &mut self,
        memory: &Pages,
        tables: Tables,
        (tag, global): (Tag, Option<Tag>),
        iova: u64,
        below: Option<(Tables, Tag)>,
    ) -> Option<(u64, u8)> {
        let lower = |caches: &mut Self, address| match below {
            None => Some((address, TOP)),
            Some((tables, tag)) => caches.translate(memory, tables, (tag, None), address, None),
        };
        let cached = [Some(tag), global].into_iter().flatten().find_map(|tag| {
            // The smallest of several sizes: the text leaves the choice.
            let holds = |page: &&CachedPage<Tag>| {
                page.tag == tag && page.iova >> page.shift() == iova >> page.shift()
            };
            self.pages.iter().filter(holds).min_by_key(|page| page.height).copied()
        });
        if let Some(CachedPage { gpa, height, .. }) = cached {
            return Some((gpa | iova & ((1 << shift(height)) - 1), height));
        }
        let lowest = (self.tables.iter())
            .filter(|table| {
                table.tag == tag && table.iova >> table.shift() == iova >> table.shift()
            })
            .min_by_key(|table| table.height);
        let (mut gpa, mut height) = match lowest {
            Some(table) => (table.gpa, table.height),
            None => (lower(self, tables.top)?.0, TOP),
        };
        let mut passed = Vec::new();
        let next = loop {
            let word = memory.load(gpa + (iova >> shift(height) & 511) * 8);
            let next = tables.format.decode(word, height)?;
            if next.leaf {
                break next;
            }
            (gpa, height) = (lower(self, next.gpa)?.0, height - 1);
            passed.push(CachedTable { tag, iova, height, gpa });
        };
        let (gpa, smaller) = lower(self, next.gpa | iova & ((1 << shift(height)) - 1))?;
        let height = height.min(smaller);
        // Nothing is cached of a walk that faults, except what is below it.
        self.tables.append(&mut passed);
        let tag = if next.global { global.unwrap_or(tag) } else { tag };
        self.pages.push(CachedPage {
            tag,
            iova,
            height,
            gpa: gpa >> shift(height) << shift(height),
        });
        Some((gpa, height))
    }
}

/// Whether the span of `shift` around `iova` has an address in `first..=last`.
pub fn overlaps(iova: u64, shift: u32, first: u64, last: u64) -> bool {
    iova >> shift << shift <= last && iova | ((1 << shift) - 1) >= first
}
