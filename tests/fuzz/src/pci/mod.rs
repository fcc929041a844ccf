// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest can do to PCI: configuration space by memory and by ports, BARs and where they are,
//! bridges, MSI, MSI-X, INTx, resets, and the registers and DMA of an `edu`; and to interrupt
//! routes and the IOAPIC.
//!
//! After each step what the guest sees agrees: a page of configuration space that it has as memory
//! with reads that exit, BARs with what answers at their addresses, interrupt lines with the
//! functions' registers, who makes requests with who may, and messages, pending bits and registers
//! of an `edu`, and memory after its DMA, with those of a naive one.

mod around;
mod edu;
mod fixed;
#[cfg(target_arch = "x86_64")]
mod ioapic;
mod machine;
mod naive;
mod routes;
mod transfers;

use crate::input::Input;
use machine::{Machine, FUNCTIONS};

/// Maximum number of steps of one execution.
const MAX_STEPS: usize = 64;

/// One execution: one machine from start to end.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    match input.byte() % 8 {
        #[cfg(target_arch = "x86_64")]
        0 => ioapic::run(&mut input),
        1 => routes::run(&mut input),
        _ => {
            let mut machine = Machine::new(&mut input);
            for _ in 0..MAX_STEPS {
                if input.is_empty() {
                    break;
                }
                step(&mut machine, &mut input);
                machine.check_lines();
                machine.check_fixed();
            }
            machine.check_pages();
        }
    }
}

/// Registers that matter in every function.
const REGISTERS: [u16; 24] = [
    0x04, 0x04, 0x06, 0x0c, 0x10, 0x14, 0x18, 0x19, 0x1a, 0x20, 0x22, 0x24, 0x26, 0x28, 0x2c, 0x30,
    0x34, 0x3c, 0x3e, 0x40, 0x48, 0x49, 0x100, 0x106,
];

fn register(input: &mut Input<'_>) -> u16 {
    match input.byte() {
        byte @ ..=0x7f => REGISTERS[usize::from(byte) % REGISTERS.len()],
        byte @ ..=0xdf => u16::from(byte),
        byte => u16::from(byte & 0x1f) * 4 + 0x100,
    }
}

fn value(input: &mut Input<'_>) -> u64 {
    match input.byte() % 8 {
        0 => u64::MAX,
        1 => 6,
        2 => 0x8000,
        // Places of BARs and windows.
        3 => twostage_vmm::inside::PCI_MMIO_START + (u64::from(input.byte()) << 16),
        4 => (twostage_vmm::inside::PCI_MMIO_START >> 16) + u64::from(input.byte()),
        _ => input.number(),
    }
}

fn step(machine: &mut Machine, input: &mut Input<'_>) {
    let function = input.below(FUNCTIONS);
    match input.byte() % 16 {
        0..=3 => {
            let (register, size, value) = (register(input), input.pick(&[1, 2, 4]), value(input));
            machine.write_config(function, register, &value.to_le_bytes()[..size], input.flag());
        }
        4 => machine.read_config(function, register(input), input.pick(&[1, 2, 4]), input.flag()),
        5 => machine.any_config(input.half(), register(input), value(input), input.flag()),
        // Bus mastering and decoding, on or off; or a reset of the function, or behind a bridge.
        6 => machine.write_config(function, 4, &[input.byte() & 7, input.byte() & 4], false),
        7 => machine.reset(function),
        8 => machine.capability(function, input.byte(), input.byte(), value(input)),
        9 => machine.look(function, input.below(3)),
        10 | 11 => {
            let bar = input.below(3);
            let offset = u64::from(input.half() % 0x400) * 4;
            let (size, value) = (input.pick(&[1, 2, 4, 8]), input.number());
            machine.access(function, bar, offset, &mut value.to_le_bytes()[..size], input.flag());
        }
        12 => machine.memory(input.number(), input.pick(&[1, 2, 4, 8]), input.flag()),
        13 => machine.raise(function, input.number() as u32, input.flag()),
        14 => machine.transfer(function, input),
        _ => machine.enable_msix(function, input.byte()),
    }
}
