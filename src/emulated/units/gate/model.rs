// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gate in loom's memory model: all interleavings of its threads' steps, and all values that a
//! load may see. Built for tests with `--cfg loom` only: `make loom`.
//!
//! loom treats sequentially consistent accesses as acquire and release, and models the full
//! strength of fences only. So each access of the gate that must be sequentially consistent has a
//! fence here on the side that the gate relies on: after a store, before a load. A store, a fence
//! and a load give exactly what the gate's documentation argues with.
#![allow(unsafe_code)]

pub(super) use std::sync::atomic::Ordering;

/// loom's types, with the interface of std's.
pub(super) mod sync {
    use loom::sync::atomic::fence;
    pub(in super::super) use loom::sync::{Mutex, MutexGuard};

    use super::Ordering;

    #[derive(Debug)]
    pub(in super::super) struct AtomicBool(loom::sync::atomic::AtomicBool);

    impl AtomicBool {
        pub fn new(value: bool) -> Self {
            Self(loom::sync::atomic::AtomicBool::new(value))
        }

        pub fn load(&self, order: Ordering) -> bool {
            if order == Ordering::SeqCst {
                fence(order);
            }
            self.0.load(order)
        }

        pub fn store(&self, value: bool, order: Ordering) {
            self.0.store(value, order);
            if order == Ordering::SeqCst {
                fence(order);
            }
        }

        pub fn swap(&self, value: bool, order: Ordering) -> bool {
            let before = self.0.swap(value, order);
            if order == Ordering::SeqCst {
                fence(order);
            }
            before
        }
    }
}

/// Lets other threads run.
pub(super) fn wait(_round: u32) {
    loom::thread::yield_now();
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use loom::cell::UnsafeCell;
    use loom::thread;

    use super::super::Gate;

    /// What the gate guards. loom reports every access that is not ordered with a change.
    struct Value(UnsafeCell<u32>);

    // SAFETY: it is used through the gate, whose promise it is that nobody reads while somebody
    // writes; loom ends the test where that is broken.
    unsafe impl Sync for Value {}

    impl Value {
        fn get(&self) -> u32 {
            // SAFETY: see above.
            self.0.with(|value| unsafe { *value })
        }

        fn set(&self, new: u32) {
            // SAFETY: see above.
            self.0.with_mut(|value| unsafe { *value = new });
        }
    }

    fn gate() -> Arc<Gate<Value>> {
        Gate::new(Value(UnsafeCell::new(0)))
    }

    /// Runs `test` in all interleavings with at most five preemptions.
    fn explore(test: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(5);
        builder.check(test);
    }

    #[test]
    fn nobody_reads_while_somebody_writes() {
        explore(|| {
            let gate = gate();
            let mut readers = [gate.reader(), gate.reader()];
            let threads = readers
                .each_mut()
                .map(|reader| reader.clone())
                .map(|mut reader| thread::spawn(move || assert!(reader.enter().get() <= 1)));
            gate.write(|value| value.set(1));
            assert_eq!(readers[0].enter().get(), 1, "a write that has returned is seen");
            threads.into_iter().for_each(|thread| thread.join().expect("it does not panic"));
        });
    }

    #[test]
    fn writers_exclude_each_other_and_a_reader_goes_in_after_both() {
        explore(|| {
            let gate = gate();
            let mut reader = gate.reader();
            let other = {
                let gate = gate.clone();
                thread::spawn(move || gate.write(|value| value.set(value.get() + 1)))
            };
            gate.write(|value| value.set(value.get() + 1));
            assert!((1..=2).contains(&reader.enter().get()));
            other.join().expect("it does not panic");
            assert_eq!(reader.enter().get(), 2);
        });
    }

    #[test]
    #[should_panic(expected = "Causality violation")]
    fn a_writer_that_does_not_wait_is_caught() {
        explore(|| {
            let gate = gate();
            let mut reader = gate.reader();
            let thread = thread::spawn(move || reader.enter().get());
            let closed = gate.close();
            // SAFETY: none, on purpose: readers may be inside.
            unsafe { &*gate.value.0.get() }.set(1);
            drop(closed);
            thread.join().expect("it does not panic");
        });
    }
}
