// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Power: the registers through which a guest switches the machine off or resets it, and ACPI's
//! power management timer.
//!
//! Source: ACPI 6.5, §4.8.2.1 and §4.8.3.3 (timer), §4.8.3.1 and §4.8.3.2 (PM1 event and control
//! registers), §4.8.3.6 (reset register); the ports of the reset register and of the keyboard
//! controller, which also resets, are a PC chipset's.

use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use bitfield_struct::bitfield;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vm_superio::{I8042Device, Trigger};

use super::config_ports::ConfigPorts;
use super::timers::ticks;
use crate::bus::BusDevice;
use crate::memory::MachineMemory;
use crate::process::stop::{ResetCause, StopReason, Stopper};
use twostage::sync::Mutex;

/// Port of the PM1 event registers: status, then enable.
pub(super) const PM1_EVENT_PORT: u16 = 0x600;
/// Length of both, in bytes.
pub(super) const PM1_EVENT_SIZE: u8 = 4;
/// Port of the PM1 control register, which follows.
pub(super) const PM1_CONTROL_PORT: u16 = PM1_EVENT_PORT + PM1_EVENT_SIZE as u16;
/// Its length, in bytes.
pub(super) const PM1_CONTROL_SIZE: u8 = 2;
/// Length of all of them, in bytes.
pub(super) const PM1_SIZE: u64 = (PM1_EVENT_SIZE + PM1_CONTROL_SIZE) as u64;
/// SLP_TYP of the soft-off state, S5.
pub(super) const SLEEP_TYPE_SOFT_OFF: u8 = 5;
/// Port of the reset register, among those of PCI configuration space.
pub(super) const RESET_PORT: u16 = 0xcf9;
/// The value that resets everything: a hard reset, now.
pub(super) const RESET_VALUE: u8 = 0x06;
/// The bit that resets; without the other one, only the processors.
const RESET_NOW: u8 = 0x04;

/// Where a PC's processor finds the BIOS, in real mode at F000:FFF0.
const RESET_VECTOR: u64 = 0xf_fff0;
/// Its code: a jump to the BIOS resets the machine.
#[rustfmt::skip]
const RESET_CODE: [u8; 9] = {
    let [port_low, port_high] = RESET_PORT.to_le_bytes();
    [
        0xba, port_low, port_high, // mov dx, RESET_PORT
        0xb0, RESET_VALUE,         // mov al, RESET_VALUE
        0xee,                      // out dx, al
        0xf4,                      // hlt
        0xeb, 0xfd,                // jmp to it: should something wake the processor up
    ]
};

/// Makes a jump to the BIOS a reset.
pub(super) fn write_reset_vector(memory: &MachineMemory) -> Result<(), GuestMemoryError> {
    memory.map().write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR))
}

/// PM1 control register.
#[bitfield(u16)]
struct Pm1Control {
    /// SCI_EN: ACPI mode, enabled from the start: there is no SMI_CMD.
    sci_enable: bool,
    /// BM_RLD and GBL_RLS, without effect here, and reserved bits.
    #[bits(9)]
    __: u16,
    /// SLP_TYP: the state to enter.
    #[bits(3)]
    sleep_type: u8,
    /// SLP_EN: enter it; reads as 0.
    sleep_enable: bool,
    #[bits(2)]
    __: u16,
}

/// The PM1 registers. There are no events, so the status is always 0, and there is no interrupt.
#[derive(Debug)]
pub(super) struct Pm1Registers {
    /// As read by software.
    bytes: Mutex<[u8; PM1_SIZE as usize]>,
    stopper: Stopper,
}

impl Pm1Registers {
    /// Writable bits of each byte. Status bits are cleared by writing them. Enable bits (TMR, GBL,
    /// PWRBTN, SLPBTN, RTC) read back as written, as drivers check. Of control SLP_TYP.
    const KEPT: [u8; PM1_SIZE as usize] = [0, 0, 0x21, 0x07, 0, 0x1c];
    /// Where the control register is.
    const CONTROL: usize = PM1_EVENT_SIZE as usize;

    pub fn new(stopper: Stopper) -> Self {
        let mut bytes = [0; PM1_SIZE as usize];
        let [low, high] = Pm1Control::new().with_sci_enable(true).into_bits().to_le_bytes();
        (bytes[Self::CONTROL], bytes[Self::CONTROL + 1]) = (low, high);
        Self { bytes: Mutex::new(bytes), stopper }
    }
}

impl BusDevice for Pm1Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes.lock();
        // An access is within the registers.
        let from = bytes.iter().skip(offset as usize);
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = self.bytes.lock();
        let (kept, skipped) = (Self::KEPT.iter(), offset as usize);
        for ((byte, kept), value) in bytes.iter_mut().zip(kept).skip(skipped).zip(data) {
            *byte = *byte & !kept | value & kept;
        }
        // SLP_EN is in the upper byte, and takes effect with the current contents.
        let control = Pm1Control::from_bits(u16::from_le_bytes([0, bytes[Self::CONTROL + 1]]));
        let upper = (Self::CONTROL + 1).checked_sub(skipped).and_then(|at| data.get(at));
        let enters = upper.is_some_and(|upper| {
            Pm1Control::from_bits(u16::from_le_bytes([0, *upper])).sleep_enable()
        });
        if enters && control.sleep_type() == SLEEP_TYPE_SOFT_OFF {
            self.stopper.stop(StopReason::PowerOff);
        }
    }
}

/// The ports of PCI configuration space, which include the reset register: it is accessed by single
/// bytes.
pub(super) struct PortsWithReset {
    /// Configuration space, if it is there.
    pub config: Option<ConfigPorts>,
    pub stopper: Stopper,
}

impl PortsWithReset {
    const OFFSET: u64 = RESET_PORT as u64 - ConfigPorts::FIRST_PORT;
}

impl BusDevice for PortsWithReset {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            (Self::OFFSET, [byte]) => *byte = 0,
            (_, data) => match &self.config {
                Some(config) => config.read(offset, data),
                None => data.fill(0xff),
            },
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (Self::OFFSET, [byte]) if byte & RESET_NOW != 0 => {
                self.stopper.stop(StopReason::Reset(ResetCause::ResetRegister));
            }
            _ => {
                if let Some(config) = &self.config {
                    config.write(offset, data);
                }
            }
        }
    }
}

/// The keyboard controller's I/O port for data. Those between the two belong to other devices: 0x61
/// is the chipset's port B.
pub(super) const KEYBOARD_DATA_PORT: u64 = 0x60;
/// Its I/O port for commands, and for the status.
pub(super) const KEYBOARD_COMMAND_PORT: u64 = 0x64;

/// Stops the machine when the controller's reset line is pulsed.
struct ResetLine(Stopper);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.stop(StopReason::Reset(ResetCause::KeyboardController));
        Ok(())
    }
}

/// The keyboard controller, behind both of its ports: what guests need of it to reset the machine.
pub(super) struct KeyboardController(Mutex<I8042Device<ResetLine>>);

impl KeyboardController {
    pub fn new(stopper: Stopper) -> Arc<Self> {
        Arc::new(Self(Mutex::new(I8042Device::new(ResetLine(stopper)))))
    }

    /// The port `number`, one of the two.
    pub fn port(self: &Arc<Self>, number: u64) -> KeyboardPort {
        // At most five ports from the first to the last.
        KeyboardPort { controller: self.clone(), offset: (number - KEYBOARD_DATA_PORT) as u8 }
    }
}

/// One of the keyboard controller's ports.
pub(super) struct KeyboardPort {
    controller: Arc<KeyboardController>,
    /// From the first of them.
    offset: u8,
}

impl KeyboardPort {
    fn device(&self) -> MutexGuard<'_, I8042Device<ResetLine>> {
        self.controller.0.lock()
    }
}

impl BusDevice for KeyboardPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = self.device().read(self.offset);
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let [byte] = data {
            let Ok(()) = self.device().write(self.offset, *byte);
        }
    }
}

/// I/O port of the power management timer.
pub(super) const PM_TIMER_PORT: u16 = 0x608;
/// Length of its only register, in bytes: a 32-bit timer.
pub(super) const PM_TIMER_SIZE: u8 = 4;
/// §4.8.2.1: 3.579545 MHz.
const PM_TIMER_HERTZ: u32 = 3_579_545;

/// The power management timer: a counter that runs since the machine's start (§4.8.2.1, §4.8.3.3).
/// It has no interrupt when it wraps: the machine has no SCI.
pub(super) struct PmTimer(Instant);

impl PmTimer {
    /// A timer that starts now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

/// The timer's value after so many nanoseconds.
fn pm_timer(nanoseconds: u128) -> u32 {
    // It wraps.
    ticks(nanoseconds, PM_TIMER_HERTZ) as u32
}

impl BusDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = u64::from(pm_timer(self.0.elapsed().as_nanos()));
        // An access is within the four bytes.
        let bytes = (value >> (8 * offset)).to_le_bytes();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    /// It is read-only.
    fn write(&self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pci::PciBus;

    #[test]
    fn only_soft_off_that_is_enabled_switches_off() {
        let stopper = Stopper::new().unwrap();
        let registers = Pm1Registers::new(stopper.clone());
        let (soft_off, enable) = (u16::from(SLEEP_TYPE_SOFT_OFF) << 10, 1u16 << 13);
        for (offset, value) in [(4, soft_off), (4, enable), (2, soft_off | enable)] {
            registers.write(offset, &value.to_le_bytes());
            assert_eq!(stopper.reason(), None, "{value:#x} at {offset}");
        }
        registers.write(4, &(soft_off | enable).to_le_bytes());
        assert_eq!(stopper.reason(), Some(&StopReason::PowerOff));
        // Byte by byte, too.
        let stopper = Stopper::new().unwrap();
        Pm1Registers::new(stopper.clone()).write(5, &[(soft_off | enable).to_le_bytes()[1]]);
        assert_eq!(stopper.reason(), Some(&StopReason::PowerOff));
    }

    #[test]
    fn events_can_be_enabled_and_never_happen() {
        let registers = Pm1Registers::new(Stopper::new().unwrap());
        let read = || {
            let mut data = [0xff; 6];
            registers.read(0, &mut data[..4]);
            registers.read(4, &mut data[4..]);
            data
        };
        assert_eq!(read(), [0, 0, 0, 0, 1, 0], "in ACPI's mode from the start");
        registers.write(0, &[0xff; 4]);
        registers.write(4, &[0xfe, 0x14]);
        assert_eq!(read(), [0, 0, 0x21, 0x07, 1, 0x14]);
        registers.write(2, &[0; 2]);
        registers.write(5, &[0, 1, 2, 3]);
        assert_eq!(read(), [0, 0, 0, 0, 1, 0]);
    }

    #[test]
    fn the_reset_vector_writes_to_the_reset_register() {
        let memory = MachineMemory::new(1 << 20).unwrap();
        write_reset_vector(&memory).unwrap();
        let mut code = [0; 16];
        memory.map().read_slice(&mut code, GuestAddress(0xf_fff0)).unwrap();
        assert_eq!(code[..6], [0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee]);
        // The jump goes back over itself (two bytes) and the halt.
        assert_eq!(code[6..9], [0xf4, 0xeb, (-3i8) as u8]);
    }

    #[test]
    fn the_reset_register_does_not_disturb_configuration_space() {
        let stopper = Stopper::new().unwrap();
        let config = ConfigPorts::new(Arc::new(PciBus::default()));
        let ports = PortsWithReset { config: Some(config), stopper: stopper.clone() };
        ports.write(0, &0x8000_0004u32.to_le_bytes());
        // Linux first sets the kind of reset, then triggers it.
        ports.write(1, &[0x02]);
        assert_eq!(stopper.reason(), None);
        let mut address = [0; 4];
        ports.read(0, &mut address);
        assert_eq!(u32::from_le_bytes(address), 0x8000_0004);
        ports.write(1, &[RESET_VALUE]);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset(ResetCause::ResetRegister)));
    }

    #[test]
    fn without_configuration_space_the_reset_register_is_there() {
        let stopper = Stopper::new().unwrap();
        let ports = PortsWithReset { config: None, stopper: stopper.clone() };
        ports.write(0, &0x8000_0000u32.to_le_bytes());
        let mut address = [0; 4];
        ports.read(0, &mut address);
        assert_eq!((address, stopper.reason()), ([0xff; 4], None));
        ports.write(1, &[RESET_VALUE]);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset(ResetCause::ResetRegister)));
    }

    #[test]
    fn the_reset_command_stops_the_machine() {
        let stopper = Stopper::new().unwrap();
        let controller = KeyboardController::new(stopper.clone());
        let (data, command) =
            (controller.port(KEYBOARD_DATA_PORT), controller.port(KEYBOARD_COMMAND_PORT));
        command.write(0, &[0x20]);
        data.write(0, &[0xfe]);
        assert_eq!(stopper.reason(), None);
        command.write(0, &[0xfe]);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset(ResetCause::KeyboardController)));
    }

    #[test]
    fn it_counts_3_579_545_a_second_and_wraps() {
        assert_eq!(pm_timer(0), 0);
        assert_eq!(pm_timer(1_000_000_000), 3_579_545);
        let wraps = u128::from(1u64 << 32) * 1_000_000_000 / u128::from(PM_TIMER_HERTZ);
        assert_eq!((pm_timer(wraps), pm_timer(wraps + 1000)), (u32::MAX, 3));
        assert_eq!(pm_timer(1_000_000_000 * 3600 * 24 * 365 * 100), 3_452_825_088);
    }

    #[test]
    fn it_runs_however_it_is_read() {
        let start = Instant::now().checked_sub(Duration::from_secs(100)).unwrap();
        let timer = PmTimer(start);
        let read = |offset, length| {
            let mut data = [0; 4];
            timer.read(offset, &mut data[..length]);
            u32::from_le_bytes(data)
        };
        timer.write(0, &[0; 4]);
        let first = read(0, 4);
        assert!(first >= 100 * PM_TIMER_HERTZ);
        assert!(read(0, 4) >= first);
        // Only the upper half.
        let (before, half, after) = (read(0, 4), read(2, 2), read(0, 4));
        assert!((before >> 16..=after >> 16).contains(&half), "{half:#x}");
    }
}
