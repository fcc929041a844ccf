// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exits of vCPUs: counted, and brought to the device that answers.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use kvm_ioctls::VcpuExit;

use super::bus::Bus;
use super::interrupts::Ioapic;

/// What a vCPU thread does after an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Enters the guest again.
    Enter,
    /// The guest faulted three times over.
    TripleFault,
    /// KVM could not go on; the vCPU says why.
    InternalError,
    /// The processor refused to enter the guest, with this reason.
    FailedEntry(u64),
    /// An exit that this machine never asked for.
    Unexpected,
}

macro_rules! exit_kinds {
    ($($(#[$doc:meta])* $variant:ident => $name:literal),* $(,)?) => {
        /// Kinds of exits, as they are counted.
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
    /// The end of an interrupt that an IOAPIC outside the kernel waits for.
    IoapicEoi => "ioapic-eoi",
    /// An access that no device answers, of any of the kinds above (and counted there too).
    Unclaimed => "unclaimed",
    /// A signal.
    Interrupted => "interrupted",
    /// Anything else.
    Other => "other",
}

/// Exits by kind. Reads are of each number alone, not of one moment.
#[derive(Debug, Default)]
pub struct ExitCounters {
    counts: [AtomicU64; ExitKind::ALL.len()],
}

impl ExitCounters {
    /// How often `kind` happened.
    pub fn get(&self, kind: ExitKind) -> u64 {
        // The discriminant of a kind is its place in ALL, so the index is in range.
        self.counts[kind as usize].load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, kind: ExitKind) {
        self.counts[kind as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Where exits lead.
#[derive(Debug, Default)]
pub(super) struct Exits {
    /// I/O ports.
    pub ports: Bus,
    /// Guest-physical addresses that are no RAM.
    pub mmio: Bus,
    /// The IOAPIC, if it is not in the kernel.
    pub ioapic: Option<Arc<Ioapic>>,
    /// Exits by kind.
    pub counters: ExitCounters,
}

impl Exits {
    /// Serves one exit. Of a port access `item` is the size of one item, in bytes: a repeated string
    /// instruction may come as one exit with the items side by side.
    pub fn dispatch(&self, exit: VcpuExit<'_>, item: u8) -> Next {
        let item = usize::from(item).max(1);
        match exit {
            VcpuExit::IoIn(port, data) => {
                self.counters.count(ExitKind::IoIn);
                for item in data.chunks_mut(item) {
                    self.claimed(self.ports.read(port.into(), item));
                }
            }
            VcpuExit::IoOut(port, data) => {
                self.counters.count(ExitKind::IoOut);
                for item in data.chunks(item) {
                    self.claimed(self.ports.write(port.into(), item));
                }
            }
            VcpuExit::MmioRead(address, data) => {
                self.counters.count(ExitKind::MmioRead);
                self.claimed(self.mmio.read(address, data));
            }
            VcpuExit::MmioWrite(address, data) => {
                self.counters.count(ExitKind::MmioWrite);
                self.claimed(self.mmio.write(address, data));
            }
            VcpuExit::IoapicEoi(vector) => {
                self.counters.count(ExitKind::IoapicEoi);
                if let Some(ioapic) = &self.ioapic {
                    ioapic.end_of_interrupt(vector);
                }
            }
            other => {
                self.counters.count(ExitKind::Other);
                return match other {
                    // Halting is the in-kernel LAPIC's business; should it come out, go on.
                    VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => Next::Enter,
                    VcpuExit::Shutdown => Next::TripleFault,
                    VcpuExit::InternalError => Next::InternalError,
                    VcpuExit::FailEntry(reason, _) => Next::FailedEntry(reason),
                    _ => Next::Unexpected,
                };
            }
        }
        Next::Enter
    }

    fn claimed(&self, claimed: bool) {
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
        assert_eq!(exits.dispatch(VcpuExit::MmioRead(0xfed9_0000, &mut data), 1), Next::Enter);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(exits.dispatch(VcpuExit::IoOut(0x80, &[1]), 1), Next::Enter);
        assert_eq!(exits.counters.get(ExitKind::MmioRead), 1);
        assert_eq!(exits.counters.get(ExitKind::IoOut), 1);
        assert_eq!(exits.counters.get(ExitKind::Unclaimed), 2);
    }

    #[test]
    fn string_instructions_are_served_item_by_item() {
        /// Counts up with each access, and remembers how wide it was.
        #[derive(Debug, Default)]
        struct Device(std::sync::Mutex<Vec<usize>>);
        impl crate::vmm::bus::BusDevice for Device {
            fn read(&self, _: u64, data: &mut [u8]) {
                let mut widths = self.0.lock().unwrap();
                data.fill(widths.len() as u8);
                widths.push(data.len());
            }
            fn write(&self, _: u64, data: &[u8]) {
                self.0.lock().unwrap().push(data.len());
            }
        }
        let device = Arc::new(Device::default());
        let mut exits = Exits::default();
        exits.ports.insert(0x3f8..=0x3ff, device.clone()).unwrap();
        let mut data = [9; 4];
        assert_eq!(exits.dispatch(VcpuExit::IoIn(0x3f8, &mut data), 1), Next::Enter);
        assert_eq!(data, [0, 1, 2, 3]);
        assert_eq!(exits.dispatch(VcpuExit::IoIn(0x3f8, &mut data), 2), Next::Enter);
        assert_eq!(data, [4, 4, 5, 5]);
        assert_eq!(exits.dispatch(VcpuExit::IoOut(0x3f8, &data), 4), Next::Enter);
        assert_eq!(*device.0.lock().unwrap(), [1, 1, 1, 1, 2, 2, 4]);
    }

    #[test]
    fn exits_that_end_the_machine_are_told_apart() {
        let exits = Exits::default();
        assert_eq!(exits.dispatch(VcpuExit::Shutdown, 1), Next::TripleFault);
        assert_eq!(exits.dispatch(VcpuExit::InternalError, 1), Next::InternalError);
        assert_eq!(exits.dispatch(VcpuExit::FailEntry(7, 0), 1), Next::FailedEntry(7));
        assert_eq!(exits.dispatch(VcpuExit::Debug(Default::default()), 1), Next::Unexpected);
    }
}
