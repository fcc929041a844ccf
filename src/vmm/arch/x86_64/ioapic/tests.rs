// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An IOAPIC as its guest, its LAPICs and its devices see it.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::pci::IntxRouter;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::interrupt::RemappableAddress;

#[derive(Default)]
struct Output {
    sent: Mutex<Vec<u32>>,
    watched: Mutex<Vec<Option<MsiMessage>>>,
    blocked: AtomicBool,
}

impl PinOutput for Arc<Output> {
    fn watch(&self, messages: &[Option<MsiMessage>]) {
        *self.watched.lock() = messages.to_vec();
    }

    fn send(&self, message: MsiMessage) -> bool {
        self.sent.lock().push(message.data & 0xff);
        !self.blocked.load(Ordering::SeqCst)
    }
}

fn ioapic() -> (Arc<Ioapic>, Arc<Output>) {
    let output = Arc::new(Output::default());
    (Ioapic::new(5, Box::new(output.clone())), output)
}

impl Ioapic {
    fn get(&self, index: u8) -> u32 {
        self.write(0, &[index]);
        let mut data = [0; 4];
        self.read(0x10, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, index: u8, value: u32) {
        self.write(0, &u32::from(index).to_le_bytes());
        self.write(0x10, &value.to_le_bytes());
    }

    fn set_pin(&self, pin: u8, value: u32) {
        self.set(0x10 + 2 * pin, value);
    }

    fn remote_irr(&self, pin: u8) -> bool {
        self.get(0x10 + 2 * pin) & 1 << 14 != 0
    }
}

impl Output {
    fn take(&self) -> Vec<u32> {
        std::mem::take(&mut self.sent.lock())
    }
}

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;

#[test]
fn registers_are_what_the_data_sheet_says() {
    let (ioapic, _) = ioapic();
    assert_eq!((ioapic.get(0), ioapic.get(1), ioapic.get(2)), (5 << 24, 0x17_0020, 5 << 24));
    ioapic.set(0, 0xffff_ffff);
    assert_eq!(ioapic.get(0), 0xf << 24);
    ioapic.set(1, 0);
    assert_eq!(ioapic.get(1), 0x17_0020);
    for pin in 0..24 {
        assert_eq!((ioapic.get(0x10 + 2 * pin), ioapic.get(0x11 + 2 * pin)), (MASKED, 0));
    }
    ioapic.set(0x3f, 0xffff_ffff);
    ioapic.set(0x3e, 0xffff_ffff);
    assert_eq!((ioapic.get(0x3e), ioapic.get(0x3f)), (0x1_afff, 0xffff_0000));
    // Beyond the last entry there is nothing.
    for index in [0x03, 0x0f, 0x40, 0x41, 0xff] {
        ioapic.set(index, 0xffff_ffff);
        assert_eq!(ioapic.get(index), 0);
    }
    let mut data = [0xaa; 8];
    ioapic.read(0x20, &mut data);
    assert_eq!(data, [0; 8]);
    ioapic.read(0x00, &mut data);
    assert_eq!(data, [0xff, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn an_edge_is_sent_once_and_lost_while_masked() {
    let (ioapic, output) = ioapic();
    ioapic.pulse(4);
    ioapic.set_pin(4, 0x34);
    assert_eq!(output.take(), [0u32; 0]);
    ioapic.set_line(4, true);
    ioapic.set_line(4, true);
    assert_eq!((output.take(), ioapic.remote_irr(4)), (vec![0x34], false));
    ioapic.set_line(4, false);
    ioapic.pulse(4);
    assert_eq!(output.take(), [0x34]);
    ioapic.set_line(24, true);
    ioapic.set_line(255, true);
    assert_eq!(output.take(), [0u32; 0]);
}

#[test]
fn a_level_is_sent_again_at_each_eoi_until_it_falls() {
    let (ioapic, output) = ioapic();
    ioapic.set_line(16, true);
    ioapic.set_pin(16, LEVEL | 0x50);
    assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![0x50], true));
    ioapic.set_line(16, true);
    ioapic.end_of_interrupt(0x51);
    assert_eq!(output.take(), [0u32; 0]);
    ioapic.end_of_interrupt(0x50);
    assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![0x50], true));
    ioapic.set_line(16, false);
    assert!(ioapic.remote_irr(16));
    // By the register, too.
    ioapic.write(0x40, &0x50u32.to_le_bytes());
    assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![], false));
}

#[test]
fn a_masked_level_is_sent_when_it_is_unmasked() {
    let (ioapic, output) = ioapic();
    ioapic.set_pin(16, LEVEL | MASKED | 0x50);
    ioapic.set_line(16, true);
    assert_eq!(output.take(), [0u32; 0]);
    ioapic.set_pin(16, LEVEL | 0x50);
    assert_eq!(output.take(), [0x50]);
    // Masked while in service: its EOI counts, and nothing is sent until it is unmasked.
    ioapic.set_pin(16, LEVEL | MASKED | 0x50);
    assert!(ioapic.remote_irr(16));
    ioapic.end_of_interrupt(0x50);
    assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![], false));
    ioapic.set_pin(16, LEVEL | 0x50);
    assert_eq!(output.take(), [0x50]);
    // How software without the EOI register ends an interrupt: edge, then level again.
    ioapic.set_pin(16, MASKED | 0x50);
    assert!(!ioapic.remote_irr(16));
    ioapic.set_pin(16, LEVEL | 0x50);
    assert_eq!(output.take(), [0x50]);
}

#[test]
fn a_blocked_level_waits_for_no_eoi() {
    let (ioapic, output) = ioapic();
    output.blocked.store(true, Ordering::SeqCst);
    ioapic.set_pin(16, LEVEL | 0x50);
    ioapic.set_line(16, true);
    assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![0x50], false));
}

#[test]
fn ends_are_wanted_of_level_pins_only() {
    let (ioapic, output) = ioapic();
    ioapic.set_pin(3, 0x33);
    ioapic.set_pin(16, LEVEL | MASKED | 0x50);
    ioapic.set(0x10 + 2 * 16 + 1, 0x0200_0000);
    let message = MsiMessage { address: 0xfee0_2000, data: 0xc050 };
    let watched = || output.watched.lock().clone();
    let mut wanted = vec![None; 24];
    wanted[16] = Some(message);
    assert_eq!(watched(), wanted);
    output.watched.lock().clear();
    // No change, no notification.
    ioapic.set_pin(3, 0x33);
    assert_eq!(watched(), []);
    ioapic.interrupts_changed();
    assert_eq!(watched(), wanted);
    // Registered before the interrupt is sent, whatever was registered before.
    ioapic.set_pin(16, LEVEL | 0x50);
    output.watched.lock().clear();
    ioapic.set_line(16, true);
    assert_eq!((watched(), output.take()), (wanted, vec![0x50]));
}

#[test]
fn fields_stand_where_the_data_sheet_puts_them() {
    assert_eq!(RedirectionEntry::new().into_bits(), 1 << 16);
    let zero = RedirectionEntry::from_bits(0);
    assert_eq!(zero.with_delivery_mode(7).into_bits(), 7 << 8);
    assert_eq!(zero.with_logical(true).into_bits(), 1 << 11);
    assert_eq!(zero.with_active_low(true).into_bits(), 1 << 13);
    assert_eq!(zero.with_remote_irr(true).into_bits(), 1 << 14);
    assert_eq!(zero.with_level(true).into_bits(), 1 << 15);
    assert_eq!(zero.with_address(0xffff).into_bits(), 0xffff << 48);
}

#[test]
fn status_is_read_only_and_goes_with_the_level() {
    let waiting = RedirectionEntry::new().with_level(true).with_remote_irr(true);
    let all = RedirectionEntry::new().written(u64::MAX, u64::MAX);
    assert_eq!(all.into_bits(), 0xffff_0000_0001_afff);
    assert!(waiting.written(1 << 15 | 0x41, u32::MAX.into()).remote_irr());
    assert!(!waiting.written(0x41, u32::MAX.into()).remote_irr());
}

#[test]
fn a_message_carries_either_format() {
    let entry = RedirectionEntry::from_bits(0x12 << 56 | 1 << 15 | 1 << 11 | 1 << 8 | 0x41);
    assert_eq!(entry.message(), MsiMessage { address: 0xfee1_2004, data: 0xc141 });
    let remappable = RedirectionEntry::from_bits(0x1234 << 49 | 1 << 48 | 1 << 11 | 0x05);
    let address = RemappableAddress::from_bits(remappable.message().address as u32);
    assert!(address.remappable() && !address.shv());
    assert_eq!(address.handle(), 0x9234);
}

#[test]
fn a_line_is_asserted_until_the_interrupt_ends() {
    let levels = Arc::new(Mutex::new(Vec::new()));
    let seen = levels.clone();
    let router = IntxRouter::new(Arc::new(move |_, level| seen.lock().push(level)));
    let pin = router.pin(Bdf::new(0, 1, 0).unwrap(), []);
    let inputs = pin.gsis().len();
    let line = PinLine::new(pin, LineEvents::new().unwrap());
    let owned = OwnedPinLine(line.clone());
    let took = || {
        let levels = std::mem::take(&mut *levels.lock());
        levels.into_iter().step_by(inputs).collect::<Vec<_>>()
    };
    line.assert();
    assert_eq!(took(), [] as [bool; 0], "nobody wrote");
    owned.assert_event().write(1).unwrap();
    line.assert();
    assert_eq!(took(), [true]);
    line.interrupt_ended();
    assert_eq!((took(), owned.end_event().read().unwrap()), (vec![false], 1));
    // Released with an unread write: it does not take effect later.
    owned.assert_event().write(1).unwrap();
    owned.release();
    line.assert();
    assert_eq!(took(), [] as [bool; 0]);
}
