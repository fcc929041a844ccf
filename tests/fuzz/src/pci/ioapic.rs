// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The IOAPIC, compared with one that is written from its data sheet without a thought of speed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use twostage::sync::Mutex;

use twostage_vmm::inside::pci::MsiMessage;
use twostage_vmm::inside::{BusDevice, Ioapic};

use crate::input::Input;

const MAX_STEPS: usize = 128;
const PINS: usize = 24;
const WRITABLE: u64 = 0xffff_0000_0001_afff;
const IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

/// The naive one.
#[derive(Default)]
struct Naive {
    id: u32,
    entries: Vec<u64>,
    asserted: Vec<bool>,
    sent: Vec<(u64, u32)>,
    /// Messages do not pass.
    blocked: bool,
}

impl Naive {
    fn new(id: u32) -> Self {
        let (entries, asserted) = (vec![MASKED; PINS], vec![false; PINS]);
        Self { id, entries, asserted, ..Self::default() }
    }

    fn message(entry: u64) -> (u64, u32) {
        let address = 0xfee0_0000 | (entry >> 48) << 4 | (entry >> 11 & 1) << 2;
        // The data of an interrupt message: assert is always set.
        (address, (entry & 0x7ff) as u32 | 1 << 14 | ((entry >> 15 & 1) as u32) << 15)
    }

    /// A level-triggered pin may have something to send.
    fn level(&mut self, pin: usize) {
        let entry = self.entries[pin];
        if self.asserted[pin] && entry & (LEVEL | MASKED | IRR) == LEVEL {
            self.sent.push(Self::message(entry));
            if !self.blocked {
                self.entries[pin] |= IRR;
            }
        }
    }

    fn set_line(&mut self, pin: usize, asserted: bool) {
        let rises = asserted && !self.asserted[pin];
        self.asserted[pin] = asserted;
        let entry = self.entries[pin];
        if entry & LEVEL != 0 {
            self.level(pin);
        } else if rises && entry & MASKED == 0 {
            self.sent.push(Self::message(entry));
        }
    }

    fn write(&mut self, select: u8, value: u32) {
        if select == 0 {
            self.id = value >> 24 & 0xf;
        }
        let Some(half) = select.checked_sub(0x10) else { return };
        let (pin, shift) = (usize::from(half / 2), u32::from(half % 2) * 32);
        let Some(entry) = self.entries.get_mut(pin) else { return };
        let mask = (0xffff_ffff << shift) & WRITABLE;
        let mut new = *entry & !mask | u64::from(value) << shift & mask;
        if new & LEVEL == 0 {
            new &= !IRR;
        }
        if new != *entry {
            *entry = new;
            self.level(pin);
        }
    }

    fn read(&self, select: u8) -> u32 {
        match select {
            0 | 2 => self.id << 24,
            1 => (PINS as u32 - 1) << 16 | 0x20,
            _ => {
                let Some(half) = select.checked_sub(0x10) else { return 0 };
                let entry = self.entries.get(usize::from(half / 2)).copied().unwrap_or_default();
                (entry >> (32 * u32::from(half % 2))) as u32
            }
        }
    }

    fn end(&mut self, vector: u8) {
        let ended: Vec<_> = (0..PINS)
            .filter(|pin| {
                let entry = self.entries[*pin];
                entry & (LEVEL | IRR) == LEVEL | IRR && entry as u8 == vector
            })
            .collect();
        for pin in ended {
            self.entries[pin] &= !IRR;
            self.level(pin);
        }
    }
}

/// One execution.
pub fn run(input: &mut Input<'_>) {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let blocked = Arc::new(AtomicBool::new(false));
    let (seen, blocks) = (sent.clone(), blocked.clone());
    let send = move |MsiMessage { address, data }| {
        seen.lock().push((address, data));
        !blocks.load(Ordering::Relaxed)
    };
    let ioapic = Ioapic::with_output(5, Box::new(send));
    let mut naive = Naive::new(5);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        match input.byte() % 8 {
            0..=2 => {
                let select = 0x10 + 2 * (input.byte() % 25) + (input.byte() & 1);
                let value = match input.flag() {
                    true => u32::from(input.half() % 0x100) | (u32::from(input.byte()) & 3) << 15,
                    false => input.number() as u32,
                };
                ioapic.write(0, &[select]);
                ioapic.write(0x10, &value.to_le_bytes());
                naive.write(select, value);
            }
            3 | 4 => {
                let (pin, level) = (input.below(26), input.flag());
                ioapic.set_line(pin as u32, level);
                if pin < PINS {
                    naive.set_line(pin, level);
                }
            }
            5 => {
                let vector = input.byte();
                ioapic.write(0x40, &[vector]);
                naive.end(vector);
            }
            6 => {
                naive.blocked = input.flag();
                blocked.store(naive.blocked, Ordering::Relaxed);
            }
            _ => {
                let (offset, size, value) = (input.byte(), input.pick(&[1, 2, 4, 8]), input.byte());
                // Other registers, of which only the ID can be written.
                match offset & 0xf8 {
                    0x08 | 0x18 => ioapic.write(offset.into(), &[value; 8][..size]),
                    _ => {
                        let select = offset & 0xf;
                        ioapic.write(0, &[select]);
                        ioapic.write(0x10, &[0, 0, 0, value]);
                        naive.write(select, u32::from(value) << 24);
                    }
                }
            }
        }
        for select in 0..0x44 {
            let mut data = [0; 4];
            ioapic.write(0, &[select]);
            ioapic.read(0x10, &mut data);
            assert_eq!(u32::from_le_bytes(data), naive.read(select), "register {select:#x}");
        }
        assert_eq!(std::mem::take(&mut *sent.lock()), std::mem::take(&mut naive.sent));
    }
}
