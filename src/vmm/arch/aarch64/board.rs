// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An arm64 machine's devices that are not on the PCI bus, and its power.

use std::sync::Arc;

use event_manager::MutEventSubscriber;
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

use super::interrupts::Lines;
use super::layout::{CLOCK_ADDRESS, CLOCK_SIZE, DEBUG_EXIT_ADDRESS, SERIAL_ADDRESS};
use crate::arch::pl031::Pl031;
use crate::bus::Bus;
use crate::console::serial::{SerialPort, REGISTERS};
use crate::devices::debug_exit::{self, DebugExit};
use crate::pci::PciBus;
use crate::process::stop::{ResetCause, StopReason, Stopper};
use crate::Result;

/// The exits' destination besides memory: the processors' firmware interface, as far as KVM leaves
/// it to user space.
#[derive(Debug, Default)]
pub(crate) struct Board;

impl Board {
    /// The devices, on `mmio`: `serial`, a clock and the debug exit, which stops the machine
    /// through `stopper`. PCI is accessed through memory only, and all interrupt controllers are in
    /// the kernel.
    ///
    /// # Errors
    /// Two of them claim the same addresses.
    pub fn new(
        mmio: &mut Bus,
        serial: Arc<SerialPort>,
        _pci: Option<&Arc<PciBus>>,
        _lines: &Lines,
        stopper: &Stopper,
    ) -> Result<Self> {
        mmio.insert(SERIAL_ADDRESS..=SERIAL_ADDRESS + (REGISTERS - 1), serial)?;
        let last = DEBUG_EXIT_ADDRESS + (debug_exit::LENGTH - 1);
        mmio.insert(DEBUG_EXIT_ADDRESS..=last, Arc::new(DebugExit::new(stopper.clone())))?;
        let last = CLOCK_ADDRESS + (CLOCK_SIZE - 1);
        mmio.insert(CLOCK_ADDRESS..=last, Arc::new(Pl031::new()))?;
        Ok(Self)
    }

    /// The subscribers of the event loop.
    pub fn subscribers(&self) -> Vec<Box<dyn MutEventSubscriber>> {
        Vec::new()
    }

    /// The meaning of the guest's call to the firmware interface, KVM's system event `event`.
    pub fn system_event(&self, event: u32) -> StopReason {
        match event {
            KVM_SYSTEM_EVENT_SHUTDOWN => StopReason::PowerOff,
            KVM_SYSTEM_EVENT_RESET => StopReason::Reset(ResetCause::Psci),
            event => StopReason::Stuck(format!("KVM reports a system event of type {event}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn off_and_reset_are_told_apart() {
        let reason = |event| Board.system_event(event);
        assert_eq!(reason(KVM_SYSTEM_EVENT_SHUTDOWN), StopReason::PowerOff);
        assert_eq!(reason(KVM_SYSTEM_EVENT_RESET), StopReason::Reset(ResetCause::Psci));
        assert!(reason(3).to_string().contains("type 3"));
    }
}
