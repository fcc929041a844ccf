// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC's devices that are not on the PCI bus, and its I/O ports.
#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::config_ports::ConfigPorts;
use super::interrupts::{Ioapic, Lines};
use super::keyboard::{self, KeyboardController};
use super::layout::{DEBUG_EXIT_PORT, IOAPIC_ADDRESS, IOAPIC_SIZE, SERIAL_PORT};
use super::power::{self, PortsWithReset, SleepRegisters};
use crate::vmm::bus::{Bus, BusDevice};
use crate::vmm::debug_exit::{self, DebugExit};
use crate::vmm::pci::PciBus;
use crate::vmm::serial::{SerialPort, REGISTERS};
use crate::vmm::stop::Stopper;
use crate::vmm::Result;

/// What of it exits lead to, but for memory.
#[derive(Debug, Default)]
pub(in crate::vmm) struct Board {
    /// I/O ports.
    pub(super) ports: Bus,
    /// The IOAPIC, if it is not in the kernel.
    pub(super) ioapic: Option<Arc<Ioapic>>,
}

impl Board {
    /// The devices, those of them that have registers in memory on `mmio`: `serial`, a way to the
    /// functions of `pci`, the interrupt controller that `lines` are inputs of, if it is not in the
    /// kernel, and what switches the machine off or resets it through `stopper`.
    ///
    /// # Errors
    /// Two of them claim the same addresses.
    pub fn new(
        mmio: &mut Bus,
        serial: Arc<SerialPort>,
        pci: &Arc<PciBus>,
        lines: &Lines,
        stopper: &Stopper,
    ) -> Result<Self> {
        let config_ports =
            PortsWithReset { config: ConfigPorts::new(pci.clone()), stopper: stopper.clone() };
        let devices: [(RangeInclusive<u64>, Arc<dyn BusDevice>); 5] = [
            (SERIAL_PORT..=SERIAL_PORT + (REGISTERS - 1), serial),
            (
                DEBUG_EXIT_PORT..=DEBUG_EXIT_PORT + (debug_exit::LENGTH - 1),
                Arc::new(DebugExit::new(stopper.clone())),
            ),
            (
                keyboard::FIRST_PORT..=keyboard::LAST_PORT,
                Arc::new(KeyboardController::new(stopper.clone())),
            ),
            (ConfigPorts::FIRST_PORT..=ConfigPorts::LAST_PORT, Arc::new(config_ports)),
            (
                u64::from(power::SLEEP_CONTROL_PORT)..=power::SLEEP_STATUS_PORT.into(),
                Arc::new(SleepRegisters(stopper.clone())),
            ),
        ];
        let mut ports = Bus::default();
        for (range, device) in devices {
            ports.insert(range, device)?;
        }
        let ioapic = lines.ioapic();
        if let Some(ioapic) = ioapic.clone() {
            let first = u64::from(IOAPIC_ADDRESS);
            mmio.insert(first..=first + (IOAPIC_SIZE - 1), ioapic)?;
        }
        Ok(Self { ports, ioapic })
    }
}
