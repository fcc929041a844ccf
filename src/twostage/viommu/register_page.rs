// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A register page as memory: reads of the guest need no exit, and while the page is *lent*, writes
//! need none either.
//!
//! A page is *kept* by its virtual IOMMU, *lent* to the guest, or *recalled*.
//! * Kept: each word is what a read of it returns, by the time that anything else tells the guest
//!   of a change (a status word, an interrupt). Hypervisors map it read-only, so that writes exit.
//! * Lent: the guest has the page as plain memory. A thread looks at it, and does what the guest
//!   writes. Writes to memory merge, and memory cannot express a bit that is cleared by writing 1
//!   or a handshake. So the page is lent while no such bit is set, and the virtual IOMMU changes
//!   nothing in it but the head of its queue: before any other change, it recalls the page, and
//!   before it raises an event, which the guest may have masked there.
//! * Recalled: the guest has it no longer. What it wrote last is in the memory, and applied as
//!   writes before its next access, which exits; then the page is kept again.
//!
//! # Locks
//! A word is changed with the lock of the state that it shows. The lock of the loan is the last of
//! all: it is held while the hypervisor maps or unmaps the page, which waits for no other lock.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, AtomicU8, Ordering};
use std::sync::{Arc, MutexGuard};

use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::VolatileMemory;

use super::registers::{pair, SlotAccess};
use crate::sync::Mutex;

/// Bytes of a page: the first of the registers.
pub const PAGE_SIZE: usize = 4096;

/// Looks between two of all registers, and between two of the whole page.
const REGISTERS_EACH: u32 = 8;
const ALL_EACH: u32 = 1024;

/// Who maps the page into the guest as memory.
pub trait PageLender: Send + Sync {
    /// From now on the guest has the page as memory that it reads and writes. Returns `false` if
    /// the hypervisor refuses; the guest's accesses then exit as before.
    fn lend(&self) -> bool;

    /// When this returns, the guest's accesses exit, and none of its writes reaches the memory any
    /// more. Called with locks of the virtual IOMMU held: it must not call that, nor wait for a
    /// thread that does.
    fn take_back(&self);
}

/// Why a page is not lent, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Recall {
    /// The guest wrote something other than the tail.
    Written,
    /// The guest must see something other than a new head: a fault, an interrupt's status.
    Changed,
    /// Its owner asked for it: it has nothing to do, ends, or takes a snapshot.
    Asked,
}

impl Recall {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Written, Self::Changed, Self::Asked];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Written => "the guest wrote another register",
            Self::Changed => "another register changed",
            Self::Asked => "asked",
        }
    }
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Kept,
    Lent,
    Recalled,
}

/// The places of a page that a model treats in a particular way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Places {
    /// Offset of the head of the queue, which the model changes while the page is lent.
    pub head: u64,
    /// Offset of the tail, which the guest does.
    pub tail: u64,
    /// Bytes of the tail register.
    pub tail_size: u64,
    /// A register that reads as zero but has state; while the page is lent it holds a mark that
    /// no guest writes, so that a write of zero is noticed, too.
    pub command: Option<u64>,
    /// A status register, and its bits that are set already when the guest sets off again what they
    /// acknowledge: while the page is lent, they read as 0, so that the guest waits until it has
    /// been done.
    pub acknowledged: Option<(u64, u32)>,
    /// Where registers end.
    pub end: u64,
}

impl Places {
    /// How `value` of the word at `offset` reads while the page is lent.
    fn lent(&self, offset: u64, value: u32) -> u32 {
        match self.acknowledged {
            Some((at, bits)) if at == offset => value & !bits,
            _ => value,
        }
    }
}

/// A write that the guest made in memory.
pub(super) struct Written {
    /// Where it begins, and its bytes.
    pub offset: u64,
    pub size: usize,
    /// The same, as an access to a slot.
    pub access: SlotAccess,
    /// What was written, at its place in the slot.
    pub value: u64,
}

/// A register page.
pub struct RegisterPage {
    memory: MmapRegion,
    /// What the model last put there, or the guest's tail that it has taken from there.
    told: Vec<AtomicU32>,
    mode: AtomicU8,
    /// Who has lent it, while it is lent.
    loan: Mutex<Option<Arc<dyn PageLender>>>,
    looks: AtomicU32,
    lends: AtomicU32,
    recalls: [AtomicU32; Recall::ALL.len()],
}

/// A mark for [`Places::command`]: bits that are reserved in all models, different each time.
const MARK: u32 = 0x0005_a000;

impl RegisterPage {
    /// A page of zeros, kept by nobody yet.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new() -> Result<Arc<Self>, MmapRegionError> {
        Ok(Arc::new(Self {
            memory: MmapRegion::new(PAGE_SIZE)?,
            told: (0..PAGE_SIZE / 4).map(|_| AtomicU32::new(0)).collect(),
            mode: AtomicU8::new(Mode::Kept as u8),
            loan: Mutex::new(None),
            looks: AtomicU32::new(0),
            lends: AtomicU32::new(0),
            recalls: Default::default(),
        }))
    }

    /// Its address in this process, for a hypervisor to map [`PAGE_SIZE`] bytes. The memory lives
    /// as long as the page.
    pub fn address(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    /// Whether the guest has it.
    pub fn is_lent(&self) -> bool {
        self.mode() == Mode::Lent
    }

    /// How often it was lent.
    pub fn lends(&self) -> u32 {
        self.lends.load(Ordering::Relaxed)
    }

    /// How often it was recalled for the reason `why`.
    pub fn recalls(&self, why: Recall) -> u32 {
        self.recalls.get(why as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// The word at `offset`, as the guest sees it.
    pub fn load(&self, offset: u64) -> u32 {
        self.word(offset).map_or(0, |word| u32::from_le(word.load(Ordering::Acquire)))
    }

    /// Stores the word at `offset`, if there is one, as a guest does that has the page.
    #[cfg(any(test, feature = "test-support"))]
    pub fn store_as_guest(&self, offset: u64, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value.to_le(), Ordering::Release);
        }
    }

    fn word(&self, offset: u64) -> Option<&AtomicU32> {
        self.memory.get_atomic_ref(usize::try_from(offset).ok()?).ok()
    }

    fn told(&self, offset: u64) -> Option<&AtomicU32> {
        self.told.get(usize::try_from(offset).ok()? / 4)
    }

    fn mode(&self) -> Mode {
        match self.mode.load(Ordering::Acquire) {
            mode if mode == Mode::Lent as u8 => Mode::Lent,
            mode if mode == Mode::Recalled as u8 => Mode::Recalled,
            _ => Mode::Kept,
        }
    }

    fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::Release);
    }

    /// Shows the 64-bit `value` at `offset`, its lower half first. The caller has the lock of its
    /// state.
    pub(super) fn show(&self, places: &Places, offset: u64, value: u64) {
        self.show_word(places, offset, value as u32);
        self.show_word(places, offset + 4, (value >> 32) as u32);
    }

    /// The same for 32 bits.
    pub(super) fn show_word(&self, places: &Places, offset: u64, value: u32) {
        let (Some(word), Some(told)) = (self.word(offset), self.told(offset)) else { return };
        let (old, mode) = (told.load(Ordering::Relaxed), self.mode());
        let shown = if mode == Mode::Lent { places.lent(offset, value) } else { value };
        if old == shown {
            return;
        }
        match mode {
            Mode::Recalled => {}
            Mode::Lent if places.command == Some(offset) => {}
            Mode::Lent if offset == places.tail => {
                // A newer one by the guest stays.
                let (old, new) = (old.to_le(), value.to_le());
                if word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    told.store(value, Ordering::Relaxed);
                }
            }
            Mode::Lent if offset != places.head => {
                self.recall(Recall::Changed);
                // It may have been refused to the guest meanwhile.
                if self.mode() == Mode::Kept {
                    self.put(offset, value);
                }
            }
            Mode::Kept | Mode::Lent => self.put(offset, value),
        }
    }

    /// Puts a word there.
    fn put(&self, offset: u64, value: u32) {
        if let (Some(word), Some(told)) = (self.word(offset), self.told(offset)) {
            told.store(value, Ordering::Relaxed);
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// Lends it with `lender`. The caller has the locks of all states, and releases them with
    /// `unlock`. Returns whether it is lent; otherwise it is kept, as it was.
    pub(super) fn lend(
        &self,
        places: &Places,
        lender: Arc<dyn PageLender>,
        unlock: impl FnOnce(),
    ) -> bool {
        let mut loan = self.loan.lock();
        if self.mode() != Mode::Kept {
            return false;
        }
        let status = places.acknowledged.map(|(offset, _)| (offset, self.load(offset)));
        if let Some((offset, value)) = status {
            self.put(offset, places.lent(offset, value));
        }
        if let Some(offset) = places.command {
            self.put(offset, MARK ^ (self.lends() & 0xfff));
        }
        self.set_mode(Mode::Lent);
        unlock();
        if !lender.lend() {
            // The guest never had it: but for these, it is what was shown. Whoever wants to show
            // more waits for the loan.
            let command = places.command.map(|offset| (offset, 0));
            status.into_iter().chain(command).for_each(|(offset, value)| self.put(offset, value));
            self.set_mode(Mode::Kept);
            return false;
        }
        self.lends.fetch_add(1, Ordering::Relaxed);
        *loan = Some(lender);
        true
    }

    /// Takes it back, if it is lent. May be called with any lock of the virtual IOMMU held.
    pub(super) fn recall(&self, why: Recall) {
        let mut loan = self.loan.lock();
        if let Some(lender) = loan.take() {
            lender.take_back();
            self.set_mode(Mode::Recalled);
            if let Some(count) = self.recalls.get(why as usize) {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Waits for a recall in progress: an access that exited because of it comes after what the
    /// same processor wrote before. Returns whether that is to be applied.
    pub(super) fn is_recalled(&self) -> bool {
        if self.mode() == Mode::Lent {
            drop(self.loan.lock());
        }
        self.mode() == Mode::Recalled
    }

    /// Takes the guest's new tail, if there is one and the page is lent; the caller has the lock of
    /// the registers. It is shown again as the register holds it.
    pub(super) fn take_tail(&self, places: &Places) -> Option<u32> {
        if self.mode() != Mode::Lent {
            return None;
        }
        let (word, told) = (self.word(places.tail)?, self.told(places.tail)?);
        let tail = u32::from_le(word.load(Ordering::Acquire));
        (tail != told.swap(tail, Ordering::Relaxed)).then_some(tail)
    }

    /// Whether the guest has written a new tail.
    pub(super) fn has_tail(&self, places: &Places) -> bool {
        self.differs(places.tail)
    }

    /// The next look at a lent page: whether the guest has written anything else, as far as this
    /// look goes. It may have been the model that changed a word just now, until the caller has the
    /// lock of the registers and asks again.
    pub(super) fn has_others(&self, places: &Places) -> bool {
        let looks = self.looks.fetch_add(1, Ordering::Relaxed);
        if !looks.is_multiple_of(REGISTERS_EACH) {
            return false;
        }
        let end = if looks.is_multiple_of(ALL_EACH) { PAGE_SIZE as u64 } else { places.end };
        self.others(places, end).next().is_some()
    }

    /// Whether it has written another register; the caller has the lock of the registers.
    pub(super) fn has_other_register(&self, places: &Places) -> bool {
        self.others(places, places.end).next().is_some()
    }

    /// Whether it has written anything else, anywhere; the caller has the lock of the registers.
    pub(super) fn has_any_other(&self, places: &Places) -> bool {
        self.others(places, PAGE_SIZE as u64).next().is_some()
    }

    fn others<'a>(&'a self, places: &'a Places, end: u64) -> impl Iterator<Item = u64> + 'a {
        (0..end).step_by(4).filter(|at| *at != places.tail && self.differs(*at))
    }

    fn differs(&self, offset: u64) -> bool {
        let told = self.told(offset).map(|told| told.load(Ordering::Relaxed));
        told.is_some_and(|told| told != self.load(offset))
    }

    /// Takes what the guest wrote to the 64-bit register at `slot` before the page was recalled, if
    /// anything: one write of it, or of the half that differs. The caller has the lock of the
    /// register.
    pub(super) fn take_written(&self, places: &Places, slot: u64) -> Option<Written> {
        let word = |at| {
            let new = self.load(at);
            (self.told(at)?.swap(new, Ordering::Relaxed) != new).then_some(new)
        };
        if self.mode() != Mode::Recalled {
            return None;
        }
        let (low, high) = (word(slot), word(slot + 4));
        let (offset, size) = match (low, high) {
            (None, None) => return None,
            (Some(_), None) => (slot, 4),
            (None, Some(_)) => (slot + 4, 4),
            (Some(_), Some(_)) => (slot, 8),
        };
        let access = SlotAccess::new(offset, size, places.end)?;
        let value = pair(low.unwrap_or(0), high.unwrap_or(0));
        Some(Written { offset, size, access, value })
    }

    /// It is kept again, once all of `words` has been shown. The caller has the locks of all
    /// states, and has applied what was written.
    pub(super) fn keep(&self, words: impl Iterator<Item = (u64, u64)>) {
        let _loan = self.loan.lock();
        let mut image = vec![0; PAGE_SIZE / 8];
        for (offset, value) in words {
            if let Some(slot) = image.get_mut(offset as usize / 8) {
                *slot = value;
            }
        }
        let halves = image.iter().flat_map(|value| [*value as u32, (*value >> 32) as u32]);
        for (at, (value, told)) in halves.zip(&self.told).enumerate() {
            told.store(value, Ordering::Relaxed);
            if let Some(word) = self.word(at as u64 * 4) {
                word.store(value.to_le(), Ordering::Release);
            }
        }
        self.set_mode(Mode::Kept);
    }
}

impl fmt::Debug for RegisterPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisterPage").field("mode", &self.mode()).finish_non_exhaustive()
    }
}

/// Shows part of the state of a model in its page.
pub(super) trait Show<T> {
    fn show(&self, state: &T);
}

/// Locked state, which is shown before it is unlocked.
pub(super) struct Shown<'a, T, U: Show<T>> {
    unit: &'a U,
    state: MutexGuard<'a, T>,
    changed: bool,
}

impl<'a, T, U: Show<T>> Shown<'a, T, U> {
    pub fn new(unit: &'a U, state: MutexGuard<'a, T>) -> Self {
        Self { unit, state, changed: false }
    }
}

impl<T, U: Show<T>> Deref for Shown<'_, T, U> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state
    }
}

impl<T, U: Show<T>> DerefMut for Shown<'_, T, U> {
    fn deref_mut(&mut self) -> &mut T {
        self.changed = true;
        &mut self.state
    }
}

impl<T, U: Show<T>> Drop for Shown<'_, T, U> {
    fn drop(&mut self) {
        if self.changed {
            self.unit.show(&self.state);
        }
    }
}
