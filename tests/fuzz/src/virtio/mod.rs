// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a driver can do to a virtio device, decoded from bytes: registers of the transport, rings
//! and their descriptors, in any order, with a disk that fails now and then.
//!
//! Most of what the driver does is what a driver may do. Of that a naive [`model`] says what must
//! have happened: each chain that was made available is used once, bytes of a disk and of frames
//! are where they belong and nowhere else, and an interrupt tells of it. Nonsense in registers and
//! rings ends these checks until the next reset. Whatever happens, nothing panics or hangs, and
//! after a reset the device works again.

mod backend;
mod chains;
mod driver;
mod identity;
mod masks;
mod messages;
mod model;

use crate::input::Input;
use driver::{Driver, QUEUE_AREA};

/// Maximum number of steps of one execution.
const MAX_STEPS: usize = 64;

/// One execution: one device from start to end.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut driver = match input.byte() {
        0xff => return backend::refused(&mut input),
        // Rarely: it is slower.
        0xfe => Driver::of_threads(&mut input),
        _ => Driver::new(&mut input),
    };
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        step(&mut driver, &mut input);
        driver.check_messages(false);
    }
    driver.end();
}

fn step(driver: &mut Driver, input: &mut Input<'_>) {
    match input.byte() % 32 {
        0..=9 => driver.request(input),
        10..=13 => driver.notify(input.below(8)),
        14..=18 => driver.turn(input.flag()),
        19 => driver.frame(input),
        20 => driver.fault(input),
        21 => driver.set_bus_master(input.flag()),
        22 => driver.reset(),
        23 => driver.reset_function(),
        24 => driver.start(input),
        25 => {
            // A register of the transport, or a structure in the BAR.
            let offset = match input.flag() {
                true => input.below(0x40) as u64,
                false => u64::from(input.byte() % 8) * 0x1000 + u64::from(input.byte()),
            };
            let (size, value) = (input.pick(&[1, 2, 4, 8]), input.number());
            driver.write_register(offset, size, value);
        }
        26 => {
            let offset = u64::from(input.byte() % 8) * 0x1000 + u64::from(input.byte());
            let size = input.pick(&[1, 2, 4, 8]);
            match offset {
                // Nothing is there.
                0x6000.. => driver.mask(offset),
                _ => driver.read_register(offset, size),
            }
        }
        27 => {
            let offset = input.half() % 0x1000;
            driver.write_config(offset, input.pick(&[1, 2, 4]), input.number());
        }
        28 => driver.read_config(input.half() % 0x1000, input.pick(&[1, 2, 4])),
        // The window to the BAR in configuration space.
        29 => driver.window(input),
        30 => {
            let address = input.number() % QUEUE_AREA;
            let value = input.number();
            driver.scribble(address, value);
        }
        _ => driver.wild_chain(input),
    }
}
