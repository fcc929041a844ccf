// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers as memory of the guest: lent, looked at and taken back as a side core does, and
//! compared with what reads of them return.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use twostage::spec::vtd::regs;
use twostage::viommu::{Look, PageLender, PagedRegisters, RegisterPage};

use super::world::World;

/// Looks until all registers have been looked at once, and the whole page; the unit promises no
/// numbers.
const LOOKS: u32 = 8;
const ALL_LOOKS: u32 = 1024;
/// Where registers end, with their records.
const END: u64 = 0x300;

/// The page, and who has it.
#[derive(Debug)]
pub struct Paged {
    page: Arc<RegisterPage>,
    slot: Arc<Slot>,
}

/// Whether the guest has the page.
#[derive(Debug, Default)]
struct Slot {
    lent: AtomicBool,
    refuses: AtomicBool,
}

impl PageLender for Slot {
    fn lend(&self) -> bool {
        let lends = !self.refuses.load(Ordering::Relaxed);
        assert!(!self.lent.swap(lends, Ordering::Relaxed), "lent twice");
        lends
    }

    fn take_back(&self) {
        assert!(self.lent.swap(false, Ordering::Relaxed), "it was not lent");
    }
}

impl World {
    fn lent(&self) -> Option<&RegisterPage> {
        let paged = self.paged.as_ref().filter(|paged| paged.slot.lent.load(Ordering::Relaxed));
        paged.map(|paged| &*paged.page)
    }

    /// Reads a register of 32 bits, as a guest does.
    pub fn read32(&self, offset: u64) -> u32 {
        match self.lent() {
            Some(page) => page.load(offset),
            None => self.read32_of_unit(offset),
        }
    }

    fn read32_of_unit(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.iommu.mmio_read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn read64(&self, offset: u64) -> u64 {
        match self.lent() {
            Some(page) => u64::from(page.load(offset)) | u64::from(page.load(offset + 4)) << 32,
            None => {
                let mut bytes = [0; 8];
                self.iommu.mmio_read(offset, &mut bytes);
                u64::from_le_bytes(bytes)
            }
        }
    }

    /// What a write of `bytes`, which are fewer than a word and in one, makes of that: where it is,
    /// and its value, if it is memory.
    pub fn merged(&self, offset: u64, bytes: &[u8]) -> Option<(u64, u32)> {
        let (word, first) = (offset & !3, offset as usize & 3);
        let is_part = !bytes.is_empty() && first + bytes.len() <= 4;
        let mut all = self.lent().filter(|_| is_part)?.load(word).to_le_bytes();
        all[first..first + bytes.len()].copy_from_slice(bytes);
        Some((word, u32::from_le_bytes(all)))
    }

    /// Writes registers, as a guest does: to memory, if they are that.
    pub fn put_registers(&mut self, offset: u64, bytes: &[u8]) {
        let is_words = matches!(bytes.len(), 4 | 8) && offset.is_multiple_of(bytes.len() as u64);
        if !is_words {
            self.iommu.take_page_back();
        }
        let Some(page) = self.lent() else { return self.iommu.mmio_write(offset, bytes) };
        for (at, word) in (offset..).step_by(4).zip(bytes.as_chunks().0) {
            page.store_as_guest(at, u32::from_le_bytes(*word));
        }
        if offset >= END {
            self.look(ALL_LOOKS);
        }
    }

    /// The unit has done what the guest wrote.
    pub fn settle(&self) {
        self.look(LOOKS);
    }

    fn look(&self, looks: u32) {
        for _ in 0..looks {
            if self.lent().is_none() || self.iommu.look_at_page() == Look::NotLent {
                return;
            }
        }
    }

    /// The page is what reads return.
    pub fn check_page(&self) {
        let Some(paged) = &self.paged else { return };
        self.settle();
        let lent = self.lent().is_some();
        assert_eq!(lent, paged.page.is_lent());
        for offset in (0..END).step_by(4) {
            let (shown, read) = (paged.page.load(offset), self.read32_of_unit(offset));
            let same = match offset {
                // There is a mark.
                regs::GCMD if lent => true,
                // What a command sets reads as 0 until it is done.
                regs::GSTS if lent => shown == read & !(1 << 30 | 1 << 24),
                _ => shown == read,
            };
            assert!(same, "{offset:#x}: {shown:#x}, and read {read:#x}; lent: {lent}");
        }
    }

    /// Lends the page, which is lent if nothing speaks against it, and otherwise is not.
    fn lend(&mut self, refuses: bool) {
        self.settle();
        let paged = self.paged.get_or_insert_with(|| {
            let page = RegisterPage::new().expect("a page of memory");
            self.iommu.keep_page(page.clone());
            Paged { page, slot: Arc::default() }
        });
        paged.slot.refuses.store(refuses, Ordering::Relaxed);
        if paged.slot.lent.load(Ordering::Relaxed) {
            return;
        }
        let slot = paged.slot.clone();
        let status = self.status();
        let events = [regs::FECTL, regs::IECTL, regs::PECTL];
        // IP; FSTS without FRI, ICS, and PRS.
        let pending = events.iter().any(|event| self.read32(*event) >> 30 & 1 != 0)
            || self.read32(regs::FSTS) & 0x7f != 0
            || self.read32(regs::ICS) & 1 != 0
            || self.read32(regs::PRS) & 3 != 0;
        let runs = status.tes() && status.qies();
        let lends = self.iommu.lend_page(slot);
        assert_eq!(lends, runs && !pending && !refuses, "{status:?}, pending: {pending}");
    }
}

/// Registers that do nothing by themselves. Commands and the tail are looked at, as the guest waits
/// for them.
const OFFSETS: [u64; 8] = [
    regs::FECTL,
    regs::FEADDR,
    regs::FEDATA,
    regs::IECTL,
    regs::IEADDR,
    regs::PECTL,
    regs::IRTA,
    regs::FEUADDR,
];

/// A part of the word at `offset` is written in memory, which does as much as a write of the word.
fn write_part(world: &mut World, offset: u64, bytes: &[u8]) {
    world.settle();
    let whole = world.merged(offset, bytes);
    world.write(offset, bytes);
    let Some((word, value)) = whole else { return };
    let found = world.read32(word);
    world.iommu.take_page_back();
    assert_eq!(world.read32(word), found, "{offset:#x} is lost: {bytes:x?}");
    world.write32(word, value);
    assert_eq!(world.read32(word), found, "{offset:#x}: {bytes:x?}");
}

/// The page is lent, or taken back, or the guest writes to it without being looked at.
pub fn step(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let how: u8 = input.arbitrary()?;
    match how & 7 {
        0..=3 => world.lend(how & 0xf0 == 0xf0),
        4 => world.iommu.take_page_back(),
        5 => {
            let [of, value]: [u8; 2] = input.arbitrary()?;
            let offset = OFFSETS[usize::from(of & 7)];
            let value = u32::from(value) << (of >> 3);
            world.put_registers(offset, &value.to_le_bytes());
            return Ok(());
        }
        6 => {
            // Another page than the first is ignored.
            if let (Some(_), Ok(page)) = (&world.paged, RegisterPage::new()) {
                world.iommu.keep_page(page);
            }
        }
        _ => {
            let [of, low, high]: [u8; 3] = input.arbitrary()?;
            let size = 1 + usize::from(of >> 3 & 1);
            let at = OFFSETS[usize::from(of & 7)] + u64::from(of >> 4 & 3);
            world.lend(false);
            write_part(world, at, &[low, high][..size]);
        }
    }
    world.check_page();
    Ok(())
}
