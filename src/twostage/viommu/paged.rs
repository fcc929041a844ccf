// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What both models do with a page of registers that is memory of the guest ([`RegisterPage`]):
//! they lend it, look at it, and apply what the guest wrote there.

use std::fmt;
use std::sync::{Arc, OnceLock};

use super::register_page::{PageLender, Places, Recall, RegisterPage, Show, Shown, Written};
use super::registers::SlotAccess;
use crate::counters::Counter;

/// What a look at a lent page found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing new.
    Nothing,
    /// A new tail; the queue has been worked through.
    Tail,
    /// The page is not lent, or no longer.
    NotLent,
}

/// A virtual IOMMU that a guest may have as memory, by either model.
pub trait PagedRegisters: Send + Sync {
    /// From now on `page` is the first page of the registers. A unit has one page at most; a second
    /// one is ignored.
    fn keep_page(&self, page: Arc<RegisterPage>);

    /// Offset of the tail register of the queue, and its length in bytes. Of all registers, a write
    /// to this one alone needs no answer before the guest goes on.
    fn tail_register(&self) -> (u64, u64);

    /// The guest wrote `data` to the tail register, at `offset`. The queue is not worked through:
    /// that is [`PagedRegisters::work_through_queue`], so that several writes can be taken in order
    /// by threads that must not wait. A write that a hypervisor holds is no part of a snapshot: it
    /// is handed over before.
    fn write_tail(&self, offset: u64, data: &[u8]);

    /// Works through the queue up to its tail or its first error.
    fn work_through_queue(&self);

    /// Lends the page if the state can be expressed in memory: nothing is pending that the guest
    /// clears by writing 1, no command is under way, and the queue is enabled. Returns whether it
    /// is lent.
    /// Not to be called during a snapshot or a reset, which take it back.
    fn lend_page(&self, lender: Arc<dyn PageLender>) -> bool;

    /// Looks at the page while it is lent, and does what the guest wrote; one thread at a time.
    fn look_at_page(&self) -> Look;

    /// Takes the page back if it is lent, and does what the guest wrote.
    fn take_page_back(&self);
}

/// A model, as far as it differs from the other one.
pub(super) trait Paged: Show<<Self as Paged>::Registers> + Send + Sync + Sized {
    /// The registers that the tail and commands change, which have one lock.
    type Registers;

    /// The page, if there is one.
    fn page(&self) -> &OnceLock<Arc<RegisterPage>>;

    fn places(&self) -> Places;

    /// The registers that the guest may have written in memory, in the order in which they are
    /// applied; those of [`Paged::apply_others`] come before.
    fn order(&self) -> impl Iterator<Item = u64>;

    /// Locks the registers.
    fn registers(&self) -> Shown<'_, Self::Registers, Self>;

    /// Locks the registers once no command is under way.
    fn idle_registers(&self) -> Shown<'_, Self::Registers, Self>;

    /// Locks all other states, if nothing is pending that memory cannot express.
    fn quiet(&self, registers: &Self::Registers) -> Option<impl Sized>;

    /// The guest writes the tail.
    fn set_tail(&self, registers: &mut Self::Registers, tail: u32);

    /// The guest writes `value`, at its place in the slot of `access`. What takes its time is left
    /// to [`Paged::drain`].
    fn apply(&self, registers: &mut Self::Registers, access: SlotAccess, value: u64);

    /// Applies what the guest wrote, while it had the page, to registers that are taken with
    /// another lock.
    fn apply_others(&self);

    /// Fills the page, which the model keeps from now on.
    fn keep(&self, registers: &Self::Registers);

    /// Works through the queue.
    fn drain(&self);

    /// Counts writes of the guest.
    fn writes(&self) -> &Counter;

    /// The guest writes `size` bytes at `offset`, for traces.
    fn observe_write(&self, offset: u64, size: usize, value: u64);

    /// Counts and logs a mistake of the guest.
    fn mistake(&self, what: fmt::Arguments<'_>);

    /// Does what the guest wrote to the page before that was recalled, if anything. Every access
    /// begins with this.
    fn settle(&self) {
        if self.apply_written() {
            self.drain();
        }
    }

    /// The same, but what takes its time is left to [`Paged::drain`]. Returns whether there was
    /// anything.
    fn apply_written(&self) -> bool {
        let Some(page) = self.page().get().filter(|page| page.is_recalled()) else { return false };
        let mut registers = self.idle_registers();
        // Another thread may have done it.
        if !page.is_recalled() {
            return false;
        }
        self.apply_others();
        for slot in self.order() {
            if let Some(Written { access, value, .. }) = self.take_written(slot) {
                self.apply(&mut registers, access, value);
            }
        }
        self.keep(&registers);
        true
    }

    /// Takes what the guest wrote to the register at `slot` before the page was recalled, if
    /// anything; the caller has the lock of the register.
    fn take_written(&self, slot: u64) -> Option<Written> {
        let written = self.page().get()?.take_written(&self.places(), slot)?;
        let Written { offset, size, access, value } = written;
        self.writes().count();
        self.observe_write(offset, size, access.extract(value));
        Some(written)
    }
}

impl<T: Paged> PagedRegisters for T {
    fn keep_page(&self, page: Arc<RegisterPage>) {
        if self.page().set(page).is_ok() {
            self.keep(&self.registers());
        }
    }

    fn tail_register(&self) -> (u64, u64) {
        let Places { tail, tail_size, .. } = self.places();
        (tail, tail_size)
    }

    fn write_tail(&self, offset: u64, data: &[u8]) {
        // The caller works through the queue.
        self.apply_written();
        self.writes().count();
        let places = self.places();
        let access = SlotAccess::new(offset, data.len(), places.end);
        let Some(access) = access.filter(|access| access.slot == places.tail) else {
            self.mistake(format_args!("a {} byte write at {offset:#x}", data.len()));
            return;
        };
        let value = access.place(data);
        let mut registers = self.registers();
        self.observe_write(offset, data.len(), access.extract(value));
        self.apply(&mut registers, access, value);
    }

    fn work_through_queue(&self) {
        self.drain();
    }

    fn lend_page(&self, lender: Arc<dyn PageLender>) -> bool {
        self.settle();
        let Some(page) = self.page().get() else { return false };
        let registers = self.idle_registers();
        let Some(others) = self.quiet(&registers) else { return false };
        page.lend(&self.places(), lender, || drop(others))
    }

    fn look_at_page(&self) -> Look {
        let Some(page) = self.page().get() else { return Look::NotLent };
        let places = self.places();
        if page.is_lent() && page.has_tail(&places) {
            let mut registers = self.registers();
            // What the guest wrote before it is done before it: all of that is in the memory.
            if page.has_other_register(&places) {
                page.recall(Recall::Written);
            } else if let Some(tail) = page.take_tail(&places) {
                self.writes().count();
                self.observe_write(places.tail, 4, tail.into());
                self.set_tail(&mut registers, tail);
            }
            drop(registers);
            if page.is_lent() {
                self.drain();
                return Look::Tail;
            }
        }
        if page.is_lent() && page.has_others(&places) {
            let registers = self.registers();
            if page.has_any_other(&places) {
                page.recall(Recall::Written);
            }
            drop(registers);
        }
        if page.is_lent() {
            return Look::Nothing;
        }
        self.settle();
        Look::NotLent
    }

    fn take_page_back(&self) {
        if let Some(page) = self.page().get() {
            page.recall(Recall::Asked);
            self.settle();
        }
    }
}
