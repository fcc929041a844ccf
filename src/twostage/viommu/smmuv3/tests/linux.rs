// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The behaviour of Linux's driver, in order.

use super::*;

/// The driver waits for CR0ACK.
fn write_cr0(guest: &Guest, value: u32) {
    guest.write32(regs::CR0, value);
    assert_eq!(guest.read32(regs::CR0ACK), value);
}

/// The driver waits for a CMD_SYNC through CMDQ_CONS.
fn command_with_sync(guest: &Guest, command: Command) {
    guest.submit(&[command, SYNC]);
    assert_eq!(guest.consumed(), (guest.read32(regs::CMDQ_PROD), None));
}

#[test]
fn reset_and_the_life_of_a_device() {
    let guest = Guest::new(&SmmuConfig::default());
    // The firmware left nothing enabled.
    assert_eq!(guest.read32(regs::CR0) & 1, 0);
    write_cr0(&guest, 0);
    guest.write32(regs::IRQ_CTRL, 0);
    guest.write32(regs::CR1, 0xd75);
    guest.write32(regs::CR2, 0b110);
    // Every entry aborts until its device has a driver.
    for stream in [STREAM, OTHER] {
        guest.write_entry(stream, [1, 0]);
    }
    guest.write64(regs::STRTAB_BASE, 1 << 62 | STREAM_TABLE);
    guest.write32(regs::STRTAB_BASE_CFG, 4);
    guest.write64(regs::CMDQ_BASE, 1 << 62 | COMMANDS | 8);
    guest.write32(regs::CMDQ_PROD, 0);
    guest.write32(regs::CMDQ_CONS, 0);
    write_cr0(&guest, 0b1000);
    command_with_sync(&guest, CFGI_ALL);
    assert_eq!(guest.calls(), []);
    command_with_sync(&guest, Command::TlbiNsnhAll);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![Command::TlbiNsnhAll])]);
    guest.write64(regs::EVENTQ_BASE, 1 << 62 | EVENTS | 4);
    guest.write32(regs::EVENTQ_PROD, 0);
    guest.write32(regs::EVENTQ_CONS, 0);
    write_cr0(&guest, 0b1100);
    guest.set_interrupts();
    assert_eq!(guest.calls(), []);
    write_cr0(&guest, 0b1101);
    let abort = StreamPolicy::Abort;
    assert_eq!(guest.calls(), [Call::Configure(STREAM, abort), Call::Configure(OTHER, abort)]);

    // A device is attached: word 1 first, which changes nothing, then word 0.
    let [word0, word1] = stage1_entry(CONTEXTS);
    guest.write_entry(STREAM, [1, word1]);
    command_with_sync(&guest, cfgi_ste(STREAM));
    assert_eq!(guest.calls(), []);
    guest.write_entry(STREAM, [word0, word1]);
    command_with_sync(&guest, cfgi_ste(STREAM));
    assert_eq!(guest.calls(), [Call::Configure(STREAM, stage1(CONTEXTS))]);
    // Its context descriptor changes.
    let substream = crate::spec::pci::Pasid::new(0).unwrap();
    let cd = Command::CfgiCd { stream: STREAM, substream, leaf: true };
    command_with_sync(&guest, cd);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![cd])]);
    // Pages are unmapped.
    let pages: Vec<_> = (0..40).map(tlbi).collect();
    guest.submit(&[pages.as_slice(), &[SYNC]].concat());
    assert_eq!(guest.calls(), [Call::Invalidate(pages)]);
    // A fault is reported.
    assert_eq!(guest.told(STREAM), Some(EventId::Translation));
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
    // The device is detached.
    guest.write_entry(STREAM, [1, word1]);
    command_with_sync(&guest, cfgi_ste(STREAM));
    assert_eq!(guest.calls(), [Call::Configure(STREAM, abort)]);

    // The next kernel finds the SMMU enabled, and aborts through GBPA before it disables it.
    guest.write32(regs::GBPA, guest.read32(regs::GBPA) | 1 << 31 | 1 << 20);
    assert_eq!(guest.read32(regs::GBPA), 0x10_1000);
    write_cr0(&guest, 0);
    assert_eq!(guest.calls(), []);
    assert_eq!(guest.smmu.counters().guest_errors, 0);
    assert_eq!(guest.smmu.counters().host_errors, 0);
}

#[test]
fn a_wrong_command_is_replaced_by_a_sync() {
    let guest = Guest::running();
    guest.submit_words(&[tlbi(1).encode(), [0xfe, 7], tlbi(2).encode(), SYNC.encode()]);
    assert_eq!(guest.consumed(), (1, Some(CommandError::Illegal)));
    assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1)])]);
    // A new tail has no effect.
    guest.submit(&[SYNC]);
    assert_eq!(guest.consumed(), (1, Some(CommandError::Illegal)));
    guest.write(COMMANDS + 16, &SYNC.encode());
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (5, None));
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(2)])]);
}

#[test]
fn a_sync_can_write_its_own_place_in_the_queue() {
    let guest = Guest::running();
    let signal = SyncSignal::Interrupt { address: COMMANDS + 16, data: 0 };
    guest.submit(&[tlbi(1), Command::Sync { signal }]);
    // The low half of the first word, with the opcode.
    let word: u32 = guest.memory.read_obj(GuestAddress(COMMANDS + 16)).unwrap();
    assert_eq!((word, guest.consumed()), (0, (2, None)));
    assert_eq!(guest.interrupts(), []);
}
