// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts: messages, wires, and messages to nowhere.

use super::*;

fn sync_message(address: u64) -> Command {
    Command::Sync { signal: SyncSignal::Interrupt { address, data: 9 } }
}

#[test]
fn a_sync_can_interrupt() {
    let guest = Guest::running();
    guest.submit(&[tlbi(1), sync_message(DOORBELL)]);
    assert_eq!(guest.interrupts(), [Interrupt::Message(9)]);
    guest.submit(&[sync_message(WORD)]);
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(WORD)).unwrap(), 9);
    assert_eq!(guest.interrupts(), []);
    // Without an address it is the wire.
    guest.submit(&[sync_message(0)]);
    assert_eq!(guest.interrupts(), [Interrupt::Wire(SmmuInterrupt::CommandSync)]);
    guest.submit(&[Command::Sync { signal: SyncSignal::Event }]);
    assert_eq!((guest.interrupts(), guest.consumed()), (vec![], (5, None)));
}

#[test]
fn without_messages_there_are_wires() {
    let guest = Guest::new(&SmmuConfig { msi: false, ..Default::default() });
    guest.start();
    guest.smmu.event(translation_fault(STREAM).to_words());
    guest.submit_words(&[sync_message(DOORBELL).encode(), [0, 0]]);
    assert_eq!(
        guest.interrupts(),
        [SmmuInterrupt::EventQueue, SmmuInterrupt::CommandSync, SmmuInterrupt::GlobalError]
            .map(Interrupt::Wire)
    );
}

#[test]
fn a_message_without_address_is_a_wire() {
    let guest = Guest::running();
    guest.write32(regs::IRQ_CTRL, 0);
    guest.write64(regs::EVENTQ_IRQ_CFG0, 0);
    guest.write32(regs::IRQ_CTRL, 0b101);
    guest.smmu.event(translation_fault(STREAM).to_words());
    assert_eq!(guest.interrupts(), [Interrupt::Wire(SmmuInterrupt::EventQueue)]);
}

#[test]
fn messages_that_nothing_takes_are_global_errors() {
    let guest = Guest::running();
    guest.submit(&[sync_message(0x9_0000_0000), SYNC]);
    // MSI_CMDQ_ABT_ERR; the queue continues.
    assert_eq!((guest.errors(), guest.consumed()), (1 << 4, (2, None)));
    assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
    guest.write32(regs::IRQ_CTRL, 0);
    guest.write64(regs::EVENTQ_IRQ_CFG0, 0x9_0000_0000);
    guest.write64(regs::GERROR_IRQ_CFG0, 0x9_0000_0000);
    guest.acknowledge_errors();
    guest.write32(regs::IRQ_CTRL, 0b101);
    guest.smmu.event(translation_fault(STREAM).to_words());
    // MSI_EVENTQ_ABT_ERR, whose own message goes nowhere: MSI_GERROR_ABT_ERR.
    assert_eq!((guest.errors(), guest.interrupts()), (1 << 5 | 1 << 7, vec![]));
}

#[test]
fn what_came_to_pass_while_interrupts_were_off_is_told_when_they_are_on() {
    let guest = Guest::running();
    guest.write32(regs::IRQ_CTRL, 0);
    guest.smmu.event(translation_fault(STREAM).to_words());
    guest.submit_words(&[[0, 0]]);
    assert_eq!(guest.interrupts(), []);
    guest.write32(regs::IRQ_CTRL, 0b100);
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
    guest.write32(regs::IRQ_CTRL, 0b101);
    assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
    // Nothing new.
    guest.write32(regs::IRQ_CTRL, 0b101);
    assert_eq!(guest.interrupts(), []);
    guest.take_event();
    guest.acknowledge_errors();
    guest.interrupts();
    guest.write32(regs::IRQ_CTRL, 0);
    guest.write(COMMANDS, &SYNC.encode());
    guest.acknowledge_errors();
    guest.write32(regs::IRQ_CTRL, 0b101);
    assert_eq!(guest.interrupts(), []);
}
