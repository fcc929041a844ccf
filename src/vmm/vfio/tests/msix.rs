// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MSI-X and MSI that a device says to have, and which cannot be used.

use super::*;

/// The MSI-X structures of [`nvme`] are at these registers of its capability.
const TABLE: u16 = MSIX + 4;
const PENDING: u16 = MSIX + 8;

/// IDs of the capabilities that the guest sees.
fn list(machine: &Machine) -> Vec<u8> {
    let (mut found, mut at) = (Vec::new(), machine.read(0x34) as u16);
    while at != 0 {
        found.push(machine.read(at) as u8);
        at = machine.read(at) as u16 >> 8;
    }
    found
}

fn place(device: &FakeDevice, register: u16, value: u32) {
    device.put(CONFIG, register.into(), &value.to_le_bytes());
}

/// What an access to the table at 0x2000 of BAR 0 finds is nothing.
fn nothing_is_at_the_table(machine: &Machine) {
    let function = machine.function();
    machine.device.put(0, 0x1ffc, &[1, 2, 3, 4, 5, 6, 7, 8]);
    for offset in [0x2000, 0x1ffc] {
        let mut data = [0; 8];
        function.read_bar(0, offset, &mut data);
        assert_eq!(data, [0xff; 8], "{offset:#x}");
        function.write_bar(0, offset, &[9; 8]);
    }
    assert_eq!(machine.device.get(0, 0x1ffc, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn a_table_in_no_bar_is_not_used() {
    let device = nvme();
    place(&device, TABLE, 0x2002);
    let machine = machine(device);
    assert_eq!(list(&machine), [0x01, 0x05, 0x10, 0x09], "the guest does not see it");
    machine.write(MSIX + 2, &[0, 0x80]);
    assert_eq!(machine.read(MSIX), 0);
    assert_eq!(machine.device.take_calls(), ["reset", "Intx 0: [on]", "Intx unmask"]);
    machine.write(4, &[2, 0]);
    assert_eq!(machine.lender.lent(), [(0xe000_0000, 0x3000)], "without the pending bits");
}

/// As Chelsio's virtual functions say, or Baidu's.
#[test]
fn pending_bits_that_are_said_to_be_in_no_bar_are_behind_the_table() {
    // In no BAR; behind the end of the BAR.
    for pending in [0x3003, 0x4000, 0xffff_fff8] {
        let device = nvme();
        place(&device, PENDING, pending);
        let machine = machine(device);
        assert_eq!(list(&machine), [0x01, 0x05, 0x10, 0x11, 0x09], "{pending:#x}");
        assert_eq!((machine.read(TABLE), machine.read(PENDING)), (0x2000, 0x2100));
        let around = [(0xe000_0000, 0x2000), (0xe000_3000, 0x1000)];
        assert_eq!(machine.lender.lent(), around, "{pending:#x}");
        // An interrupt while its vector is masked.
        machine.write(MSIX + 2, &[0, 0x80]);
        let function = machine.function();
        function.write_bar(0, 0x2028, &[7, 0, 0, 0, 0, 0, 0, 0]);
        function.write_bar(0, 0x202c, &[1, 0, 0, 0]);
        machine.vectors.event(0).write(1).unwrap();
        let mut data = [0; 8];
        function.read_bar(0, 0x2100, &mut data);
        assert_eq!(data, [1 << 2, 0, 0, 0, 0, 0, 0, 0], "{pending:#x}");
    }
}

#[test]
fn a_table_is_not_lent_if_the_pending_bits_have_no_place() {
    let device = nvme();
    // Its last vector ends where the page does.
    place(&device, TABLE, 0x2f00);
    place(&device, PENDING, 0x4000);
    let machine = machine(device);
    assert_eq!(list(&machine), [0x01, 0x05, 0x10, 0x09]);
    assert_eq!(machine.lender.lent(), [(0xe000_0000, 0x2000), (0xe000_3000, 0x1000)]);
    let mut data = [0; 8];
    machine.function().read_bar(0, 0x2f00, &mut data);
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn a_table_that_lies_in_part_in_a_bar_is_not_lent() {
    let device = nvme();
    place(&device, TABLE, 0x3fc0);
    place(&device, PENDING, 0);
    let machine = machine(device);
    assert_eq!(list(&machine), [0x01, 0x05, 0x10, 0x09]);
    assert_eq!(machine.lender.lent(), [(0xe000_1000, 0x2000)]);
}

#[test]
fn a_table_is_not_lent_if_its_capability_has_no_room() {
    let device = nvme();
    // The next capability begins within it.
    device.put(CONFIG, (MSIX + 1).into(), &[MSIX as u8 + 8]);
    place(&device, PENDING, 0x09);
    let machine = machine(device);
    assert_eq!(list(&machine), [0x01, 0x05, 0x10, 0x09]);
    assert_eq!(machine.lender.lent()[0], (0xe000_0000, 0x2000));
    nothing_is_at_the_table(&machine);
}

#[test]
fn what_vfio_has_no_vectors_for_is_hidden() {
    let mut device = nvme();
    device.add_irq(Irq::Msix, 0);
    device.add_irq(Irq::Msi, 0);
    let machine = machine(device);
    assert_eq!(list(&machine), [0x01, 0x10, 0x09]);
    machine.write(MSIX + 2, &[0, 0x80]);
    machine.write(MSI + 2, &[1, 0]);
    assert_eq!(machine.device.take_calls(), ["reset", "Intx 0: [on]", "Intx unmask"]);
    nothing_is_at_the_table(&machine);
}

#[test]
fn what_vfio_does_not_know_is_hidden() {
    let mut device = nvme();
    let (invalid, no_call) = (libc::EINVAL, libc::ENOTTY);
    device.irq_errors = vec![(Irq::Intx, invalid), (Irq::Msix, invalid), (Irq::Msi, no_call)];
    let machine = machine(device);
    assert_eq!(list(&machine), [0x01, 0x10, 0x09]);
    assert_eq!(machine.read(0x3c) >> 8 & 0xff, 0, "no pin");
    assert_eq!(machine.device.take_calls(), ["reset"]);
    nothing_is_at_the_table(&machine);
}

#[test]
#[should_panic(expected = "Input/output error")]
fn a_device_that_does_not_answer_about_its_interrupts_is_refused() {
    let mut device = nvme();
    device.irq_errors = vec![(Irq::Msix, libc::EIO)];
    machine(device);
}

#[test]
fn the_guest_sees_no_more_vectors_than_vfio_has() {
    let mut device = nvme();
    device.add_irq(Irq::Msix, 5);
    device.add_irq(Irq::Msi, 7);
    // 16 of MSI.
    device.put(CONFIG, (MSI + 2).into(), &[8]);
    let machine = machine(device);
    assert_eq!(machine.read(MSIX) >> 16 & 0x7ff, 4);
    assert_eq!(machine.read(MSI) >> 17 & 7, 2, "four");
    // The table is as long as the device's.
    machine.function().write_bar(0, 0x20f0, &[1; 4]);
    assert_eq!(machine.device.get(0, 0x20f0, 4), [0; 4]);
}
