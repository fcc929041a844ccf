// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC's devices that are not on the PCI bus, and its I/O ports.

use std::ops::RangeInclusive;
use std::sync::Arc;

use event_manager::MutEventSubscriber;

use super::config_ports::ConfigPorts;
use super::interrupts::Lines;
use super::ioapic::Ioapic;
use super::layout::{DEBUG_EXIT_PORT, IOAPIC_ADDRESS, IOAPIC_SIZE, SERIAL_PORT, TIMER_PIN};
use super::power::{
    KeyboardController, Pm1Registers, PmTimer, PortsWithReset, KEYBOARD_COMMAND_PORT,
    KEYBOARD_DATA_PORT, PM1_EVENT_PORT, PM1_SIZE, PM_TIMER_PORT, PM_TIMER_SIZE,
};
use super::timers::{
    Pit, PitTimer, Rtc, PIT_FIRST_PORT, PIT_LAST_PORT, PORT_B, RTC_FIRST_PORT, RTC_LAST_PORT,
};
use crate::bus::{Bus, BusDevice};
use crate::console::serial::{SerialPort, REGISTERS};
use crate::devices::debug_exit::{self, DebugExit};
use crate::pci::PciBus;
use crate::process::stop::Stopper;
use crate::Result;

/// The exits' destinations besides memory.
#[derive(Debug, Default)]
pub(crate) struct Board {
    /// I/O ports.
    pub(super) ports: Bus,
    /// The IOAPIC, if it is not in the kernel.
    pub(super) ioapic: Option<Arc<Ioapic>>,
    /// The interval timer, if it is not in the kernel.
    pit: Option<Arc<Pit>>,
}

impl Board {
    /// The devices, with those registers that are memory-mapped on `mmio`: `serial`, the
    /// configuration ports of `pci`, if they are to be there, clocks, the interrupt controller
    /// behind `lines` and the interval timer, if they are not in the kernel, and the power
    /// registers, which stop the machine through `stopper`.
    ///
    /// # Errors
    /// Two of them claim the same addresses; the process has no file descriptors left.
    pub fn new(
        mmio: &mut Bus,
        serial: Arc<SerialPort>,
        pci: Option<&Arc<PciBus>>,
        lines: &Lines,
        stopper: &Stopper,
    ) -> Result<Self> {
        let config = pci.cloned().map(ConfigPorts::new);
        let config_ports = PortsWithReset { config, stopper: stopper.clone() };
        let keyboard = KeyboardController::new(stopper.clone());
        let (pm1, pm_timer) = (u64::from(PM1_EVENT_PORT), u64::from(PM_TIMER_PORT));
        let mut devices: Vec<(RangeInclusive<u64>, Arc<dyn BusDevice>)> = vec![
            (SERIAL_PORT..=SERIAL_PORT + (REGISTERS - 1), serial),
            (
                DEBUG_EXIT_PORT..=DEBUG_EXIT_PORT + (debug_exit::LENGTH - 1),
                Arc::new(DebugExit::new(stopper.clone())),
            ),
            (KEYBOARD_DATA_PORT..=KEYBOARD_DATA_PORT, Arc::new(keyboard.port(KEYBOARD_DATA_PORT))),
            (
                KEYBOARD_COMMAND_PORT..=KEYBOARD_COMMAND_PORT,
                Arc::new(keyboard.port(KEYBOARD_COMMAND_PORT)),
            ),
            (RTC_FIRST_PORT..=RTC_LAST_PORT, Arc::new(Rtc::new())),
            (pm_timer..=pm_timer + u64::from(PM_TIMER_SIZE - 1), Arc::new(PmTimer::new())),
            (ConfigPorts::FIRST_PORT..=ConfigPorts::LAST_PORT, Arc::new(config_ports)),
            (pm1..=pm1 + (PM1_SIZE - 1), Arc::new(Pm1Registers::new(stopper.clone()))),
        ];
        let ioapic = lines.ioapic();
        let mut pit = None;
        if let Some(ioapic) = ioapic.clone() {
            let first = u64::from(IOAPIC_ADDRESS);
            mmio.insert(first..=first + (IOAPIC_SIZE - 1), ioapic)?;
            // KVM has an interval timer only with its own interrupt controllers.
            let timer = Pit::new(Box::new(lines.edge(TIMER_PIN)?))?;
            devices.push((PIT_FIRST_PORT..=PIT_LAST_PORT, timer.ports()));
            devices.push((PORT_B..=PORT_B, timer.port_b()));
            pit = Some(timer);
        }
        let mut ports = Bus::default();
        for (range, device) in devices {
            ports.insert(range, device)?;
        }
        Ok(Self { ports, ioapic, pit })
    }

    /// The subscribers of the event loop.
    pub fn subscribers(&self) -> Vec<Box<dyn MutEventSubscriber>> {
        let timer = |pit: &Arc<Pit>| Box::new(PitTimer(pit.clone())) as Box<dyn MutEventSubscriber>;
        self.pit.iter().map(timer).collect()
    }
}
