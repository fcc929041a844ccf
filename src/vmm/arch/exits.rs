// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exits of vCPUs: counters and dispatch.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Instant;

use crate::arch::Board;
use crate::bus::Bus;

macro_rules! exit_kinds {
    ($($(#[$doc:meta])* $variant:ident => $name:literal),* $(,)?) => {
        /// Kinds of exits, as counted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ExitKind {
            $($(#[$doc])* $variant,)*
        }

        impl ExitKind {
            /// Every kind, in the order of its discriminant.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name in reports.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

exit_kinds! {
    /// Port read.
    IoIn => "io-in",
    /// Port write.
    IoOut => "io-out",
    /// Memory-mapped read.
    MmioRead => "mmio-read",
    /// Memory-mapped write.
    MmioWrite => "mmio-write",
    /// The end of an interrupt for an IOAPIC outside of the kernel.
    IoapicEoi => "ioapic-eoi",
    /// The guest calls its firmware to power off or reset the machine.
    SystemEvent => "system-event",
    /// An access that no device answers, of any of the kinds above (and counted there, too).
    Unclaimed => "unclaimed",
    /// A signal.
    Interrupted => "interrupted",
    /// Anything else.
    Other => "other",
}

/// Exits by kind. Reads are not consistent with each other.
#[derive(Debug, Default)]
pub struct ExitCounters {
    counts: [AtomicU64; ExitKind::ALL.len()],
}

impl ExitCounters {
    /// How often `kind` happened.
    pub fn get(&self, kind: ExitKind) -> u64 {
        // A kind's discriminant is its index in ALL, so it is in range.
        self.counts[kind as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn count(&self, kind: ExitKind) {
        self.counts[kind as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Hears of accesses of vCPUs that leave KVM.
pub(crate) trait ExitObserver: fmt::Debug + Send + Sync {
    /// An access to `bytes` bytes at a port or guest-physical address was served since `started`.
    fn served(&self, kind: ExitKind, address: u64, bytes: usize, started: Instant);
}

/// Dispatch of exits.
#[derive(Debug, Default)]
pub(crate) struct Exits {
    /// Guest-physical addresses that are not RAM.
    pub mmio: Bus,
    /// Architecture-specific devices.
    pub board: Board,
    /// Exits by kind.
    pub counters: ExitCounters,
    /// Hears of each access.
    pub observer: Option<Arc<dyn ExitObserver>>,
    /// Some vCPU has run.
    pub ran: AtomicBool,
}

impl Exits {
    /// Handles a read of memory that is not RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.access(ExitKind::MmioRead, address, data.len(), || {
            self.claimed(self.mmio.read(address, data));
        });
    }

    /// Handles a write to memory that is not RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        self.access(ExitKind::MmioWrite, address, data.len(), || {
            self.claimed(self.mmio.write(address, data));
        });
    }

    /// Counts an access to `bytes` bytes at `address`, which `serve` serves.
    pub fn access(&self, kind: ExitKind, address: u64, bytes: usize, serve: impl FnOnce()) {
        self.counters.count(kind);
        let Some(observer) = &self.observer else { return serve() };
        let started = Instant::now();
        serve();
        observer.served(kind, address, bytes, started);
    }

    /// Counts an access that no device answers.
    pub fn claimed(&self, claimed: bool) {
        if !claimed {
            self.counters.count(ExitKind::Unclaimed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_answers_reads_as_ones_and_is_counted() {
        let exits = Exits::default();
        let mut data = [0; 4];
        exits.mmio_read(0xfed9_0000, &mut data);
        assert_eq!(data, [0xff; 4]);
        exits.mmio_write(0xfed9_0000, &[1]);
        assert_eq!(exits.counters.get(ExitKind::MmioRead), 1);
        assert_eq!(exits.counters.get(ExitKind::MmioWrite), 1);
        assert_eq!(exits.counters.get(ExitKind::Unclaimed), 2);
    }

    #[test]
    fn an_observer_hears_of_each_access() {
        #[derive(Debug, Default)]
        struct Heard(twostage::sync::Mutex<Vec<(ExitKind, u64, usize)>>);
        impl ExitObserver for Heard {
            fn served(&self, kind: ExitKind, address: u64, bytes: usize, _: Instant) {
                self.0.lock().push((kind, address, bytes));
            }
        }
        let heard = Arc::new(Heard::default());
        let exits = Exits { observer: Some(heard.clone()), ..Exits::default() };
        exits.mmio_read(0xfed9_0000, &mut [0; 8]);
        exits.mmio_write(0xfed9_0004, &[1; 4]);
        let expected =
            [(ExitKind::MmioRead, 0xfed9_0000, 8), (ExitKind::MmioWrite, 0xfed9_0004, 4)];
        assert_eq!(*heard.0.lock(), expected);
    }
}
