// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Assigned devices whose configuration space says anything, and what a guest does to one.
//!
//! A device is refused with a message, or is a function with the capabilities that a naive reading
//! of the device's finds usable, none of which gives power over the host. What the guest writes of
//! those that are the device's, and of its memory, gets there, and of the rest only the command
//! register. What is mapped into the guest are its BARs, where they are, without the pages of the
//! MSI-X structures. Vectors have the messages of a naive MSI-X, and what the device triggers is
//! sent or pending as there. At the end nothing is mapped and no interrupt is on.

mod device;
mod machine;
mod messages;
mod naive;

use crate::input::Input;
use machine::Machine;

/// Maximum number of steps of one execution.
const MAX_STEPS: usize = 48;

/// One execution: one device from start to end.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let Some(machine) = Machine::new(&mut input) else { return };
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        step(&machine, &mut input);
        machine.check();
    }
    machine.end();
}

fn step(machine: &Machine, input: &mut Input<'_>) {
    match input.byte() % 16 {
        0..=4 => {
            let register = match input.byte() {
                byte @ ..=0x3f => [4, 4, 6, 0x10, 0x14, 0x18, 0x1c, 0x3c][usize::from(byte) % 8],
                byte @ ..=0xef => u16::from(byte),
                _ => input.half() % 0x1002,
            };
            let value = match input.byte() % 4 {
                0 => u64::MAX,
                1 => twostage_vmm::inside::PCI_MMIO_START + (u64::from(input.byte()) << 14),
                2 => 6,
                _ => input.number(),
            };
            machine.write_config(register, &value.to_le_bytes()[..input.pick(&[1, 2, 4])]);
        }
        5 | 6 => machine.read_config(input.half() % 0x1002, input.pick(&[1, 2, 4, 8])),
        // A register of some capability.
        7..=9 => {
            let (which, offset) = (input.byte(), u16::from(input.byte() % 32));
            machine.capability(which, offset, &input.number().to_le_bytes()[..2]);
        }
        10 | 11 => {
            let (bar, offset) = (input.below(7), input.number() % 0x1_0000);
            let (size, value) = (input.pick(&[1, 2, 4, 8]), input.number());
            machine.access(bar, offset, &mut value.to_le_bytes()[..size], input.flag());
        }
        12 => machine.msix(input.byte(), input.byte(), input.number()),
        13 => machine.device().change(input),
        14 => machine.device().refuse(input.flag()),
        _ => machine.reset(),
    }
}
