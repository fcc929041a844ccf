// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Power: the registers through which a guest's ACPI switches the machine off or resets it.
//!
//! Source: ACPI 6.5, §4.8.3.6 (reset register) and §4.8.3.7 (sleep control and status registers);
//! the ports of the reset register are a PC chipset's.
#![forbid(unsafe_code)]

use bitfield_struct::bitfield;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::config_ports::ConfigPorts;
use crate::vmm::bus::BusDevice;
use crate::vmm::memory::MachineMemory;
use crate::vmm::stop::{ResetCause, StopReason, Stopper};

/// Port of the sleep control register.
pub(super) const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Port of the sleep status register.
pub(super) const SLEEP_STATUS_PORT: u16 = 0x601;
/// SLP_TYP of the soft-off state, S5.
pub(super) const SLEEP_TYPE_SOFT_OFF: u8 = 5;
/// Port of the reset register, amid those of PCI configuration space.
pub(super) const RESET_PORT: u16 = 0xcf9;
/// What a write to the reset register takes to reset everything: a hard reset, now.
pub(super) const RESET_VALUE: u8 = 0x06;
/// The bit of it that resets; without the other one, the processors alone.
const RESET_NOW: u8 = 0x04;

/// Where a PC's processor finds the BIOS, in real mode at F000:FFF0.
const RESET_VECTOR: u64 = 0xf_fff0;
/// What is there: this machine's BIOS knows how to reset the machine. Linux reboots this way when
/// ACPI is hardware-reduced and there is no EFI.
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

/// Sleep control register.
#[bitfield(u8)]
struct SleepControl {
    #[bits(2)]
    __: u8,
    /// SLP_TYP: the state to enter.
    #[bits(3)]
    sleep_type: u8,
    /// SLP_EN: enter it.
    sleep_enable: bool,
    #[bits(2)]
    __: u8,
}

/// The sleep control and status registers, which are neighbours. The status register reads as 0:
/// this machine never wakes up.
pub(super) struct SleepRegisters(pub Stopper);

impl BusDevice for SleepRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (0, [byte]) = (offset, data) else { return };
        let control = SleepControl::from_bits(*byte);
        if control.sleep_enable() && control.sleep_type() == SLEEP_TYPE_SOFT_OFF {
            self.0.stop(StopReason::PowerOff);
        }
    }
}

/// The ports of PCI configuration space with the reset register among them, which a write of one
/// byte tells apart.
pub(super) struct PortsWithReset {
    pub config: ConfigPorts,
    pub stopper: Stopper,
}

impl PortsWithReset {
    const OFFSET: u64 = RESET_PORT as u64 - ConfigPorts::FIRST_PORT;
}

impl BusDevice for PortsWithReset {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            (Self::OFFSET, [byte]) => *byte = 0,
            (_, data) => self.config.read(offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (Self::OFFSET, [byte]) if byte & RESET_NOW != 0 => {
                self.stopper.stop(StopReason::Reset(ResetCause::ResetRegister));
            }
            _ => self.config.write(offset, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::pci::PciBus;
    use std::sync::Arc;

    #[test]
    fn only_soft_off_that_is_enabled_switches_off() {
        let stopper = Stopper::new().unwrap();
        let registers = SleepRegisters(stopper.clone());
        let soft_off = SLEEP_TYPE_SOFT_OFF << 2;
        for (offset, value) in [(0, soft_off), (0, 1 << 5), (1, soft_off | 1 << 5)] {
            registers.write(offset, &[value]);
            assert_eq!(stopper.reason(), None, "{value:#x} at {offset}");
        }
        let mut status = [0xff];
        registers.read(1, &mut status);
        assert_eq!(status, [0]);
        registers.write(0, &[soft_off | 1 << 5]);
        assert_eq!(stopper.reason(), Some(&StopReason::PowerOff));
    }

    #[test]
    fn the_reset_vector_writes_to_the_reset_register() {
        let memory = MachineMemory::new(1 << 20).unwrap();
        write_reset_vector(&memory).unwrap();
        let mut code = [0; 16];
        memory.map().read_slice(&mut code, GuestAddress(0xf_fff0)).unwrap();
        assert_eq!(code[..6], [0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee]);
        // The jump leads two bytes and itself back, to the halt.
        assert_eq!(code[6..9], [0xf4, 0xeb, (-3i8) as u8]);
    }

    #[test]
    fn the_reset_register_does_not_disturb_configuration_space() {
        let stopper = Stopper::new().unwrap();
        let config = ConfigPorts::new(Arc::new(PciBus::default()));
        let ports = PortsWithReset { config, stopper: stopper.clone() };
        ports.write(0, &0x8000_0004u32.to_le_bytes());
        // Linux sets the kind of reset first, and asks for it then.
        ports.write(1, &[0x02]);
        assert_eq!(stopper.reason(), None);
        let mut address = [0; 4];
        ports.read(0, &mut address);
        assert_eq!(u32::from_le_bytes(address), 0x8000_0004);
        ports.write(1, &[RESET_VALUE]);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset(ResetCause::ResetRegister)));
    }
}
