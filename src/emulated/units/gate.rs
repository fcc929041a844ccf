// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A big-reader lock: reading is as cheap as possible, writing waits for every reader.
//!
//! DMA reads translations all the time; invalidations change them rarely, and must not return while
//! any DMA still uses what they removed. So each [`Reader`] owns a slot on its own cache lines and
//! marks it busy while it reads; readers share nothing that they write. A writer closes the gate,
//! waits until every slot is idle, has exclusive access to the value, and opens the gate. A reader
//! that finds the gate closed marks its slot idle again and blocks on the writer's mutex: it sleeps
//! instead of spinning.
//!
//! # Why this is exclusive
//!
//! A reader stores *busy* and then loads *closed*; a writer stores *closed* and then loads *busy*.
//! All four are sequentially consistent, so they have one total order, and whichever store is
//! second is followed by a load that must see the first: the reader finds the gate closed, or the
//! writer finds the slot busy, or both. (With acquire and release only, both loads could be
//! reordered before the stores, and both sides would enter.)
//!
//! * *What readers did happens before what the writer does.* A reader leaves by a release store of
//!   *idle*; the writer enters after its acquire load has seen that store or a later one of the
//!   same slot, which follows it in the reader's program order.
//! * *What the writer did happens before what readers do.* The writer opens the gate by a release
//!   store. A reader that entered after the writer checked its slot has the writer's *closed*
//!   before its own load in the total order, so the load sees that or something newer: the release
//!   store of this writer, or a store of a later one, which had the mutex after this writer.
//! * *Writers exclude each other* by a mutex. *Closed* is only true while it is held, so a reader
//!   that holds it may mark its slot busy without checking.
//!
//! `make loom` checks all interleavings of the threads' steps in loom's memory model.
//!
//! # Progress
//!
//! A writer waits for at most one read section of each reader: a closed gate lets nobody in. A
//! reader waits for the mutex, which a writer holds for one write; a reader that has it enters
//! regardless of other writers. The mutex is as fair as the system's: threads that write
//! continuously may overtake a sleeping reader, but no writer makes it start over.
//!
//! A thread that holds a [`ReadGuard`] must not write to the same gate: it would deadlock. A leaked
//! guard blocks writes for as long as its reader lives, which is memory-safe.
#![allow(unsafe_code)]

#[cfg(all(loom, test))]
mod model;

use std::cell::UnsafeCell;
use std::fmt;
use std::ops::Deref;
#[cfg(not(all(loom, test)))]
use std::sync::{
    atomic::{AtomicBool, Ordering},
    Mutex, MutexGuard,
};
use std::sync::{Arc, PoisonError};

#[cfg(all(loom, test))]
use model::{
    sync::{AtomicBool, Mutex, MutexGuard},
    Ordering,
};

/// A value that shares neither a cache line nor its prefetch neighbour with other data.
#[repr(align(128))]
struct CachePadded<T>(T);

/// Whether the reader is inside.
type Slot = CachePadded<AtomicBool>;

/// The value behind a gate.
struct Value<T: ?Sized>(UnsafeCell<T>);

/// See the [module's documentation](self).
pub(crate) struct Gate<T: ?Sized> {
    /// A writer is inside or waits for readers to leave. Written with `slots` locked.
    closed: CachePadded<AtomicBool>,
    /// Held by writers; the slots of all readers.
    slots: Mutex<Vec<Arc<Slot>>>,
    /// Last, so that a gate in front of a value is one in front of a trait object, too.
    value: Value<T>,
}

// SAFETY: a gate hands out `&T` to readers on several threads at once (hence `T: Sync`) and `&mut
// T` to one writer on any thread (hence `T: Send`), never both at a time: see the module's
// documentation. Everything else in it is `Sync` by itself.
unsafe impl<T: ?Sized + Send + Sync> Sync for Value<T> {}

impl<T> Gate<T> {
    /// A gate in front of `value`, open.
    pub fn new(value: T) -> Arc<Self> {
        Arc::new(Self {
            closed: CachePadded(AtomicBool::new(false)),
            slots: Mutex::new(Vec::new()),
            value: Value(UnsafeCell::new(value)),
        })
    }
}

impl<T: ?Sized> Gate<T> {
    /// A new reader.
    pub fn reader(self: &Arc<Self>) -> Reader<T> {
        let slot = Arc::new(CachePadded(AtomicBool::new(false)));
        let mut slots = self.lock();
        // Not only writers do this: while nothing is invalidated there are none.
        if slots.len() == slots.capacity() {
            forget_dropped(&mut slots);
            let living = slots.len();
            // So that it is not soon full again.
            slots.reserve(living.max(8));
        }
        slots.push(Arc::clone(&slot));
        drop(slots);
        Reader { gate: Arc::clone(self), slot }
    }

    /// Changes the value with no reader inside. When `change` starts, nothing that readers looked
    /// up before is in use, and all that enter afterwards see its effect.
    pub fn write<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let closed = self.close();
        closed.wait_until_idle();
        // SAFETY: `closed` keeps other writers and new readers out until it is dropped, and every
        // reader that was inside has left: nobody else refers to the value.
        change(unsafe { &mut *self.value.0.get() })
    }

    /// Keeps other writers and new readers out until the result is dropped.
    fn close(&self) -> Closed<'_, T> {
        let mut slots = self.lock();
        forget_dropped(&mut slots);
        self.closed.0.store(true, Ordering::SeqCst);
        Closed { gate: self, slots }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> fmt::Debug for Gate<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The value may be in the middle of a change.
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

/// Drops the slots of dropped readers, which have no other reference. Dropping the last reference
/// acquires what the reader released with its own: everything it did happens before.
fn forget_dropped(slots: &mut Vec<Arc<Slot>>) {
    slots.retain(|slot| Arc::strong_count(slot) > 1);
}

/// Waits a little for a reader, in round number `round`.
#[cfg(not(all(loom, test)))]
fn wait(round: u32) {
    /// Rounds before the writer yields to other threads, and before it sleeps. A read section
    /// copies at most some pages: it ends within the first rounds, unless its thread is not
    /// running.
    const SPIN_ROUNDS: u32 = 128;
    const YIELD_ROUNDS: u32 = 1024;
    const SLEEP: std::time::Duration = std::time::Duration::from_micros(50);
    match round {
        0..SPIN_ROUNDS => std::hint::spin_loop(),
        SPIN_ROUNDS..YIELD_ROUNDS => std::thread::yield_now(),
        _ => std::thread::sleep(SLEEP),
    }
}

#[cfg(all(loom, test))]
use model::wait;

/// The gate is closed while this exists.
struct Closed<'a, T: ?Sized> {
    gate: &'a Gate<T>,
    slots: MutexGuard<'a, Vec<Arc<Slot>>>,
}

impl<T: ?Sized> Closed<'_, T> {
    /// Waits until every reader that was inside has left.
    fn wait_until_idle(&self) {
        for slot in self.slots.iter() {
            let mut round = 0;
            while slot.0.load(Ordering::SeqCst) {
                wait(round);
                round = round.saturating_add(1);
            }
        }
    }
}

impl<T: ?Sized> Drop for Closed<'_, T> {
    fn drop(&mut self) {
        // Before the mutex is released, with `slots`.
        self.gate.closed.0.store(false, Ordering::Release);
    }
}

/// A reader: at most one read section at a time.
pub(crate) struct Reader<T: ?Sized> {
    gate: Arc<Gate<T>>,
    /// Busy while this reader is inside. Nobody else writes it.
    slot: Arc<Slot>,
}

impl<T: ?Sized> Reader<T> {
    /// Starts a read section, which ends when the guard is dropped. Keep it short: writers wait.
    #[inline]
    pub fn enter(&mut self) -> ReadGuard<'_, T> {
        let gate = &*self.gate;
        enter(gate, &self.slot);
        ReadGuard { gate, slot: &self.slot, value: &gate.value }
    }
}

/// Starts a read section of the reader whose slot is `slot`, which is idle.
#[inline]
fn enter<T: ?Sized>(gate: &Gate<T>, slot: &Slot) {
    // A swap, not a store: on x86 both are the same locked instruction, and elsewhere a swap is
    // never more expensive than a store and a fence.
    slot.0.swap(true, Ordering::SeqCst);
    if gate.closed.0.load(Ordering::SeqCst) {
        enter_after_writer(gate, slot);
    }
}

#[cold]
fn enter_after_writer<T: ?Sized>(gate: &Gate<T>, slot: &Slot) {
    slot.0.store(false, Ordering::Release);
    let _no_writer = gate.lock();
    slot.0.swap(true, Ordering::SeqCst);
}

impl<T: ?Sized> Clone for Reader<T> {
    /// Another reader of the same gate, with its own slot.
    fn clone(&self) -> Self {
        self.gate.reader()
    }
}

impl<T: ?Sized> fmt::Debug for Reader<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

/// A read section: the value does not change while this exists.
pub(crate) struct ReadGuard<'a, T: ?Sized> {
    gate: &'a Gate<T>,
    slot: &'a Slot,
    /// The gate's: where it is in the gate of a trait object, only its vtable says.
    value: &'a Value<T>,
}

impl<T: ?Sized> ReadGuard<'_, T> {
    /// Leaves the section while `pause` runs, which may write, and starts another one: nothing read
    /// before is valid after it.
    pub fn outside<R>(&mut self, pause: impl FnOnce() -> R) -> R {
        /// Enters again even if `pause` panics, as the guard still exists.
        struct Outside<'a, T: ?Sized>(&'a Gate<T>, &'a Slot);
        impl<T: ?Sized> Drop for Outside<'_, T> {
            fn drop(&mut self) {
                enter(self.0, self.1);
            }
        }
        self.slot.0.store(false, Ordering::Release);
        let _outside = Outside(self.gate, self.slot);
        pause()
    }
}

impl<T: ?Sized> Deref for ReadGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the slot is busy and was marked so before the gate was seen open (or with the
        // writers' mutex held), so no writer touches the value until this guard is dropped.
        unsafe { &*self.value.0.get() }
    }
}

impl<T: ?Sized> Drop for ReadGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.slot.0.store(false, Ordering::Release);
    }
}

impl<T: ?Sized> fmt::Debug for ReadGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadGuard").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    const WRITES: u64 = 20_000;

    #[test]
    fn readers_that_are_gone_cost_nothing_though_nobody_writes() {
        let gate = Gate::new(());
        let living: Vec<_> = (0..20).map(|_| gate.reader()).collect();
        for _ in 0..10_000 {
            gate.reader();
        }
        assert!(gate.lock().len() <= 4 * living.len());
        gate.write(|()| ());
        assert_eq!(gate.lock().len(), living.len());
    }

    #[test]
    fn readers_see_whole_writes_only_and_the_last_one_at_once() {
        // Plain memory: a reader inside together with a writer is a data race that tears the pair
        // (and that a race detector reports).
        let gate = Gate::new((0u64, 0u64));
        let published = AtomicU64::new(0);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..3 {
                let mut reader = gate.reader();
                let (published, done) = (&published, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Acquire) {
                        let before = published.load(Ordering::Acquire);
                        let pair = reader.enter();
                        assert_eq!(pair.0, pair.1);
                        assert!(pair.0 >= before, "a write that had returned was not seen");
                    }
                });
            }
            for value in 1..=WRITES {
                gate.write(|pair| {
                    pair.0 = value;
                    std::hint::black_box(&mut *pair);
                    pair.1 = value;
                });
                published.store(value, Ordering::Release);
            }
            done.store(true, Ordering::Release);
        });
    }

    /// Lets readers watch a cell that every writer sets while inside, and counts how often a reader
    /// saw it set.
    fn meetings(wait: bool) -> u64 {
        let gate = Gate::new(AtomicBool::new(false));
        let met = AtomicU64::new(0);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                let mut reader = gate.reader();
                let (met, done) = (&met, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Acquire) {
                        let writer_inside = reader.enter();
                        for _ in 0..64 {
                            if writer_inside.load(Ordering::Relaxed) {
                                met.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
            let mut writes = 0;
            // Without the wait, until the readers have noticed: that may take a while on a busy
            // machine, so the bound is generous.
            while writes < WRITES || (!wait && met.load(Ordering::Relaxed) == 0 && writes < 1 << 24)
            {
                let closed = gate.close();
                if wait {
                    closed.wait_until_idle();
                }
                // SAFETY: shared access only, as the readers have; the cell is atomic.
                let inside = unsafe { &*gate.value.0.get() };
                inside.store(true, Ordering::Relaxed);
                std::hint::spin_loop();
                inside.store(false, Ordering::Relaxed);
                drop(closed);
                writes += 1;
            }
            done.store(true, Ordering::Release);
        });
        met.into_inner()
    }

    #[test]
    fn a_reader_never_meets_a_writer() {
        assert_eq!(meetings(true), 0);
    }

    #[test]
    fn a_writer_that_does_not_wait_is_caught() {
        assert_ne!(meetings(false), 0);
    }

    #[test]
    fn a_reader_may_write_while_it_is_outside() {
        let gate = Gate::new(0);
        let (mut reader, mut other) = (gate.reader(), gate.reader());
        let mut section = reader.enter();
        assert_eq!(*section, 0);
        section.outside(|| gate.write(|value| *value = 1));
        assert_eq!(*section, 1);
        // Inside again: writers wait for it, whatever happened to the pause.
        let paused = std::panic::AssertUnwindSafe(|| section.outside(|| panic!("on purpose")));
        assert!(std::panic::catch_unwind(paused).is_err());
        thread::scope(|scope| {
            let writing = scope.spawn(|| gate.write(|value| *value = 2));
            while !gate.closed.0.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            assert_eq!(*section, 1);
            drop(section);
            writing.join().unwrap();
        });
        assert_eq!(*other.enter(), 2);
    }

    #[test]
    fn readers_come_and_go() {
        let gate = Gate::new(0);
        let mut first = gate.reader();
        let mut second = first.clone();
        assert_eq!((*first.enter(), *second.enter()), (0, 0));
        drop(first);
        gate.write(|value| *value = 1);
        assert_eq!(gate.lock().len(), 1);
        assert_eq!(*second.enter(), 1);
    }

    #[test]
    fn a_panicking_writer_opens_the_gate() {
        let gate = Gate::new(0);
        let mut reader = gate.reader();
        thread::scope(|scope| {
            assert!(scope.spawn(|| gate.write(|_| panic!("on purpose"))).join().is_err());
        });
        assert_eq!(*reader.enter(), 0);
        gate.write(|value| *value = 2);
        assert_eq!(*reader.enter(), 2);
    }
}
