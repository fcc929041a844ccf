// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of the architecture that drivers do not rely on every day.

use super::*;
use crate::spec::smmuv3::command::ATC_SIZE_ALL;

/// [`Guest::running`] with another configuration.
fn running(config: SmmuConfig) -> Guest {
    let guest = Guest::new(&config);
    guest.start();
    guest
}

fn atc_inv(size: u8) -> Command {
    Command::AtcInv { stream: STREAM, substream: None, global: false, address: 0, size }
}

/// The host calls for `command` alone.
fn forwarded(guest: &Guest, command: Command) -> Vec<Call> {
    guest.submit(&[command, SYNC]);
    assert_eq!(guest.consumed(), (guest.read32(regs::CMDQ_PROD), None));
    guest.calls()
}

/// §4.5.1.
#[test]
fn device_tlbs_have_at_most_all_addresses() {
    let guest = running(SmmuConfig { ats: true, ..Default::default() });
    let all = atc_inv(ATC_SIZE_ALL);
    assert_eq!(forwarded(&guest, all), [Call::Invalidate(vec![all])]);
    guest.submit(&[atc_inv(ATC_SIZE_ALL + 1), SYNC]);
    assert_eq!(guest.consumed(), (2, Some(CommandError::Illegal)));
    assert_eq!(guest.calls(), []);
}

/// §4.5.1.
#[test]
fn device_tlbs_are_left_alone_while_translation_is_disabled() {
    let guest = running(SmmuConfig { ats: true, ..Default::default() });
    guest.write32(regs::CR0, 0b1100);
    guest.calls();
    assert_eq!(forwarded(&guest, atc_inv(0)), []);
    assert_eq!(forwarded(&guest, tlbi(1)), [Call::Invalidate(vec![tlbi(1)])]);
}

/// §4.4.
#[test]
fn asids_that_do_not_exist_are_not_invalidated() {
    let guest = running(SmmuConfig { asid16: false, ..Default::default() });
    assert_eq!(forwarded(&guest, tlbi(0xff)), [Call::Invalidate(vec![tlbi(0xff)])]);
    assert_eq!(forwarded(&guest, tlbi(0x100)), []);
    assert_eq!(forwarded(&guest, Command::TlbiNhAsid { vmid: 0, asid: 0x1ff }), []);
    let guest = Guest::running();
    assert_eq!(forwarded(&guest, tlbi(0x100)), [Call::Invalidate(vec![tlbi(0x100)])]);
}

/// §7.2.1.
#[test]
fn after_an_aborted_write_the_event_queue_waits_for_the_guest() {
    let guest = Guest::running();
    guest.write32(regs::CR0, 0b1001);
    guest.write64(regs::EVENTQ_BASE, MEMORY_SIZE | 4);
    guest.write32(regs::CR0, 0b1101);
    guest.smmu.event(translation_fault(STREAM).to_words());
    assert_eq!(guest.errors(), 0b100);
    guest.write32(regs::CR0, 0b1001);
    guest.write64(regs::EVENTQ_BASE, EVENTS | 4);
    guest.write32(regs::CR0, 0b1101);
    assert_eq!(guest.told(STREAM), None);
    guest.acknowledge_errors();
    assert_eq!(guest.told(STREAM), Some(EventId::Translation));
}

/// §7.3: fields without meaning in an event of stage 1 may hold host addresses.
#[test]
fn no_address_of_the_hosts_is_told() {
    let guest = Guest::running();
    for &id in EventId::ALL {
        let record = EventRecord::new(id, STREAM, None);
        let record = EventRecord { second_address: 0xdead_b000, ..record };
        guest.smmu.event(record.to_words());
        let told = guest.take_event().unwrap();
        assert_eq!((told.id(), told.second_address), (Some(id), 0));
    }
}

/// §4.4.1: the 16 KiB granule has no level 1 to describe a range of one granule.
#[test]
fn a_range_that_the_host_would_refuse_does_not_reach_it() {
    let guest = Guest::running();
    let range = |tg, ttl| AddressRange { tg, ttl, ..AddressRange::at(0x10_0000) };
    let of = |range| Command::TlbiNhVaa { vmid: 0, range };
    let level1 = of(range(3, 1));
    assert_eq!(forwarded(&guest, level1), [Call::Invalidate(vec![level1])]);
    for refused in [range(2, 1), range(1, 0)] {
        let prod = guest.read32(regs::CMDQ_PROD);
        guest.submit(&[of(refused)]);
        assert_eq!(guest.consumed(), (prod, Some(CommandError::Illegal)));
        guest.write(COMMANDS + 16 * u64::from(prod), &SYNC.encode());
        guest.acknowledge_errors();
        assert_eq!(guest.calls(), []);
    }
}
