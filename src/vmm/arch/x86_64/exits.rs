// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exits of a PC's vCPUs, dispatched to devices.

use kvm_ioctls::VcpuExit;

use crate::arch::exits::{ExitKind, Exits};

/// What a vCPU thread does after an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Enters the guest again.
    Enter,
    /// A triple fault.
    TripleFault,
    /// KVM failed; the vCPU says why.
    InternalError,
    /// The processor refused to enter the guest, with this reason.
    FailedEntry(u64),
    /// An exit that this machine never asked for.
    Unexpected,
}

/// Handles one exit. For a port access, `item` is the size of one item, in bytes: a repeated string
/// instruction may cause one exit with all its items.
pub(super) fn dispatch(exits: &Exits, exit: VcpuExit<'_>, item: u8) -> Next {
    let item = usize::from(item).max(1);
    match exit {
        VcpuExit::IoIn(port, data) => {
            exits.access(ExitKind::IoIn, port.into(), data.len(), || {
                for item in data.chunks_mut(item) {
                    exits.claimed(exits.board.ports.read(port.into(), item));
                }
            });
        }
        VcpuExit::IoOut(port, data) => {
            exits.access(ExitKind::IoOut, port.into(), data.len(), || {
                for item in data.chunks(item) {
                    exits.claimed(exits.board.ports.write(port.into(), item));
                }
            });
        }
        VcpuExit::MmioRead(address, data) => exits.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => exits.mmio_write(address, data),
        VcpuExit::IoapicEoi(vector) => {
            exits.counters.count(ExitKind::IoapicEoi);
            if let Some(ioapic) = &exits.board.ioapic {
                ioapic.end_of_interrupt(vector);
            }
        }
        other => {
            exits.counters.count(ExitKind::Other);
            return match other {
                // The in-kernel LAPIC handles HLT; if it exits nevertheless, re-enter.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn string_instructions_are_served_item_by_item() {
        /// Increments with each access and records the access width.
        #[derive(Debug, Default)]
        struct Device(twostage::sync::Mutex<Vec<usize>>);
        impl crate::bus::BusDevice for Device {
            fn read(&self, _: u64, data: &mut [u8]) {
                let mut widths = self.0.lock();
                data.fill(widths.len() as u8);
                widths.push(data.len());
            }
            fn write(&self, _: u64, data: &[u8]) {
                self.0.lock().push(data.len());
            }
        }
        let device = Arc::new(Device::default());
        let mut exits = Exits::default();
        exits.board.ports.insert(0x3f8..=0x3ff, device.clone()).unwrap();
        let mut data = [9; 4];
        assert_eq!(dispatch(&exits, VcpuExit::IoIn(0x3f8, &mut data), 1), Next::Enter);
        assert_eq!(data, [0, 1, 2, 3]);
        assert_eq!(dispatch(&exits, VcpuExit::IoIn(0x3f8, &mut data), 2), Next::Enter);
        assert_eq!(data, [4, 4, 5, 5]);
        assert_eq!(dispatch(&exits, VcpuExit::IoOut(0x3f8, &data), 4), Next::Enter);
        assert_eq!(*device.0.lock(), [1, 1, 1, 1, 2, 2, 4]);
    }

    #[test]
    fn exits_that_end_the_machine_are_told_apart() {
        let exits = Exits::default();
        assert_eq!(dispatch(&exits, VcpuExit::Shutdown, 1), Next::TripleFault);
        assert_eq!(dispatch(&exits, VcpuExit::InternalError, 1), Next::InternalError);
        assert_eq!(dispatch(&exits, VcpuExit::FailEntry(7, 0), 1), Next::FailedEntry(7));
        assert_eq!(dispatch(&exits, VcpuExit::Debug(Default::default()), 1), Next::Unexpected);
    }
}
