// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! SMMUv3: architecture-specific tests.

mod flags;
mod granularity;
mod machine;
mod mixed;
mod page_requests;
mod restore;
mod stack;
mod stalls;
mod substreams;
mod waiting;

use twostage::iommufd::{Errno, HostIommu as _};
use twostage::nesting::smmuv3::SmmuNesting;
use twostage::nesting::{GuestIoas, NestingError};
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::{AddressRange, Command};
use twostage::spec::smmuv3::event::{EventId, EventRecord};
use twostage::spec::smmuv3::queue::CommandError;
use twostage::spec::smmuv3::stream_table::{Ste0, StreamConfig};
use twostage::spec::smmuv3::StreamId;
use twostage_emulated::kit::smmuv3 as guest;
use twostage_emulated::{DeviceConfig, DmaAttributes, ObjectKind, SmmuV3Unit, SmmuV3UnitConfig};

use crate::common::{A, B, PAGE};
use crate::conformance::{nested, Leaf, Stack, Way, IOVA, NAME};
use guest::{cfgi_cd, Completion, Entry};
use machine::Machine;

crate::conformance::conformance! { Machine }

fn page_of(iova: u64) -> Command {
    Command::TlbiNhVa { vmid: 0, asid: NAME, range: AddressRange::at(iova) }
}

#[test]
fn an_event_names_stream_address_and_access() {
    let (machine, table, page) = nested::<Machine>();
    machine.read(A, IOVA + PAGE + 0x120).unwrap_err();
    let event = machine.event();
    let expected = EventRecord::new(EventId::Translation, StreamId(0x20), None);
    assert_eq!((event.qw0, event.input_address), (expected.qw0, IOVA + PAGE + 0x120));
    assert!(event.qw1.rnw() && !event.qw1.s2() && !event.qw1.stall());

    machine.guest.map(table, IOVA + PAGE, page, 3, false);
    machine.write(A, IOVA + PAGE, 1).unwrap_err();
    let event = machine.event();
    assert_eq!((event.id(), event.stream()), (Some(EventId::Permission), StreamId(0x20)));
    assert!(!event.qw1.rnw());
}

#[test]
fn an_event_raises_its_message() {
    let (machine, _, _) = nested::<Machine>();
    let message = (0x808_0040, 0x41);
    machine.guest.enable_event_interrupt(message.0, message.1);
    machine.read(A, IOVA + PAGE).unwrap_err();
    machine.event();
    assert_eq!(machine.messages.take(), [message]);
}

#[test]
fn a_stream_that_aborts_is_no_event_and_one_with_a_bad_entry_is() {
    let (machine, _, page) = nested::<Machine>();
    machine.guest.set_entry(A.into(), Entry::Abort);
    assert_eq!(machine.guest.flush_entries(&[A]), Completion::Done);
    machine.read(A, page).unwrap_err();
    machine.read(A, IOVA).unwrap_err();
    // Guest-owned stage 2 is not supported.
    let stage2 = Ste0::new().with_v(true).with_config(StreamConfig::Stage2.into_bits());
    machine.guest.set_raw_entry(A.into(), [stage2.into_bits(), 0]);
    assert_eq!(machine.guest.flush_entries(&[A]), Completion::Done);
    machine.read(A, page).unwrap_err();
    let event = machine.event();
    assert_eq!((event.id(), event.stream()), (Some(EventId::BadSte), A.into()));
}

/// Bypass by an entry raises events like stage 1 (§3.4, §7.3.9); bypass by a disabled SMMU does
/// not.
#[test]
fn a_stream_that_bypasses_has_events_while_translation_is_on() {
    let machine = Machine::new();
    let guest = &machine.guest;
    let beyond = 1 << 48;
    let with_pasid = DmaAttributes { pasid: Some(5), ..DmaAttributes::default() };
    machine.read(A, beyond).unwrap_err();
    guest.set_entry(A.into(), Entry::Bypass);
    guest.enable();
    machine.read(A, beyond).unwrap_err();
    // The first in the queue: the previous one was not recorded.
    let event = machine.event();
    assert_eq!((event.id(), event.stream()), (Some(EventId::AddressSize), A.into()));
    assert_eq!(event.input_address, beyond);
    assert!(event.qw1.rnw() && !event.qw1.s2());
    machine.port(A).read(with_pasid, guest.page(), &mut [0; 8]).unwrap_err();
    let event = machine.event();
    assert_eq!((event.id(), event.stream()), (Some(EventId::BadSubstreamId), A.into()));
    assert_eq!(event.substream(), Pasid::new(5));

    guest.disable();
    machine.read(A, beyond).unwrap_err();
    guest.enable();
    machine.port(A).read(with_pasid, guest.page(), &mut [0; 8]).unwrap_err();
    assert_eq!(machine.event().id(), Some(EventId::BadSubstreamId));
    assert_eq!(machine.end(), 0);
}

#[test]
fn a_changed_context_descriptor_counts_from_its_invalidation_on() {
    let (machine, old, _) = nested::<Machine>();
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.map(table, IOVA, page, 3, true);
    guest.store(page, 2);
    assert_eq!(machine.read(A, IOVA), Ok(1));
    guest.write_context(guest.context(old, NAME), table, NAME);
    assert_eq!(guest.submit(&[Command::TlbiNhAll { vmid: 0 }]), Completion::Done);
    assert_eq!(machine.read(A, IOVA), Ok(1), "hardware caches the context descriptor");
    assert_eq!(guest.submit(&[cfgi_cd(B), Command::TlbiNhAll { vmid: 0 }]), Completion::Done);
    assert_eq!(machine.read(A, IOVA), Ok(1), "that is another stream's");
    let flush = [cfgi_cd(A), Command::TlbiNhAsid { vmid: 0, asid: NAME }];
    assert_eq!(guest.submit(&flush), Completion::Done);
    assert_eq!(machine.read(A, IOVA), Ok(2));
}

#[test]
fn an_asid_that_comes_back_finds_nothing_that_was_invalidated_meanwhile() {
    let (machine, table, _) = nested::<Machine>();
    let guest = &machine.guest;
    assert_eq!(machine.read(A, IOVA), Ok(1));
    let stage1 = Way::Stage1 { table, name: NAME };
    machine.set(A, Way::Bypass);
    assert_eq!(guest.flush_entries(&[A]), Completion::Done);
    let other = guest.page();
    guest.store(other, 2);
    guest.map(table, IOVA, other, 3, true);
    // No stream uses stage 1, but the TLB still has it.
    assert_eq!(guest.submit(&[page_of(IOVA)]), Completion::Done);
    machine.set(A, stage1);
    assert_eq!(guest.flush_entries(&[A]), Completion::Done);
    assert_eq!(machine.read(A, IOVA), Ok(2));
}

#[test]
fn a_wrong_command_stops_the_queue_where_it_stands() {
    for wrong in [
        // Not supported: EL2, stage 2, stalls.
        Command::TlbiEl2All,
        Command::TlbiS12Vmall { vmid: 0 },
        Command::Resume { stream: A.into(), stag: 0, response: 0 },
    ] {
        let (machine, table, _) = nested::<Machine>();
        let guest = &machine.guest;
        assert_eq!(machine.read(A, IOVA), Ok(1));
        guest.unmap(table, IOVA);
        let stopped = guest.submit(&[page_of(IOVA), wrong, page_of(IOVA)]);
        assert_eq!(stopped, Completion::Stopped(1, CommandError::Illegal));
        // The commands before it are complete.
        machine.read(A, IOVA).unwrap_err();
        assert_eq!(guest.resume(), Completion::Stopped(1, CommandError::Illegal));
    }
}

#[test]
fn a_command_that_the_host_refuses_is_shown_and_nothing_is_stale() {
    let (machine, table, _) = nested::<Machine>();
    let guest = &machine.guest;
    assert_eq!(machine.read(A, IOVA), Ok(1));
    guest.unmap(table, IOVA);
    // The batch fails; then everything is flushed; then the first command fails by itself.
    machine.host.fail_nth(1, Errno::EIO);
    machine.host.inner().fail_nth(2, Errno::EIO);
    let stopped = guest.submit(&[page_of(IOVA), page_of(IOVA + PAGE)]);
    assert_eq!(stopped, Completion::Stopped(0, CommandError::Illegal));
    machine.read(A, IOVA).unwrap_err();
    // The stream is not blocked: its other pages are accessible.
    machine.map(table, IOVA + 8 * PAGE, guest.page(), Leaf::Page, true);
    assert_eq!(machine.read(A, IOVA + 8 * PAGE), Ok(0));
    assert_eq!(guest.resume(), Completion::Done);
    assert_eq!(machine.nesting.counters().full_flushes, 1);
}

/// A driver that replaces the refused command, as Linux does, loses nothing: all of the batch is
/// complete.
#[test]
fn a_batch_that_the_host_refuses_once_is_shown_and_nothing_of_it_is_stale() {
    let (machine, table, page) = nested::<Machine>();
    let guest = &machine.guest;
    let iovas: Vec<_> = (0..4).map(|n| IOVA + n * PAGE).collect();
    for &iova in &iovas {
        guest.map(table, iova, page, 3, true);
        machine.read(A, iova).unwrap();
        guest.unmap(table, iova);
    }
    for failing in [Errno::ENOMEM, Errno::EIO, Errno::EBUSY] {
        machine.host.fail_nth(1, failing);
        let batch: Vec<_> = iovas.iter().map(|iova| page_of(*iova)).collect();
        assert_eq!(guest.submit(&batch), Completion::Stopped(0, CommandError::Illegal));
        for &iova in &iovas {
            machine.read(A, iova).unwrap_err();
        }
        assert_eq!(guest.resume(), Completion::Done);
    }
    assert_eq!(machine.nesting.counters().full_flushes, 3);
}

#[test]
fn every_stream_has_a_vdevice_of_one_viommu() {
    let (machine, _, _) = nested::<Machine>();
    let graph = machine.graph();
    let count = |kind| graph.of_kind(kind).count();
    assert_eq!((count(ObjectKind::Viommu), count(ObjectKind::Vdevice)), (1, 2), "{graph}");
    let objects = machine.nesting.objects();
    let viommu = objects.unit.unwrap().viommu;
    let nested: Vec<_> = graph.of_kind(ObjectKind::HwptNested).collect();
    assert!(nested.iter().all(|hwpt| hwpt.on[0].to == viommu), "{graph}");
    assert_eq!(nested.len(), objects.nested.len());
    assert_eq!(machine.end(), 0);
}

#[test]
fn a_device_behind_another_smmu_is_named_and_has_its_own_virtual_one() {
    let (host, _) = machine::host();
    let emulated = host.inner().inner();
    let other = emulated.add_unit(SmmuV3Unit::new(SmmuV3UnitConfig::default()));
    emulated.add_device("far", other, B, DeviceConfig::default()).unwrap();
    let (near, far) = (host.device_bind("a").unwrap(), host.device_bind("far").unwrap());
    let first = SmmuNesting::new(GuestIoas::new(host.clone()).unwrap());
    first.add_device(A, near).unwrap();
    let before = emulated.live_objects();
    assert_eq!(first.add_device(B, far), Err(NestingError::OtherSmmu { rid: B, first: A }));
    assert_eq!(emulated.live_objects(), before);
    let second = SmmuNesting::new(first.ioas().unwrap());
    second.add_device(B, far).unwrap();
}

/// The cost of a strict guest: one call per unmap and nothing else. There are three objects: a
/// nesting parent, used until translation is enabled, and entries that abort and translate.
#[test]
fn the_host_calls_of_a_guest() {
    let machine = Machine::new();
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.enable();
    // As Linux attaches a domain: the context descriptor, its invalidation, then the entry.
    let cd = guest.context(table, NAME);
    assert_eq!(guest.submit(&[cfgi_cd(A)]), Completion::Done);
    guest.set_entry(A.into(), Entry::Stage1 { cd });
    assert_eq!(guest.flush_entries(&[A]), Completion::Done);
    let at_rest = machine.nesting.counters();
    assert_eq!((at_rest.nested_allocs, at_rest.commands_out, at_rest.full_flushes), (2, 0, 0));
    for n in 0..100 {
        guest.map(table, IOVA + n * PAGE, page, 3, true);
        machine.write(A, IOVA + n * PAGE, n).unwrap();
        guest.unmap(table, IOVA + n * PAGE);
        assert_eq!(guest.submit(&[page_of(IOVA + n * PAGE)]), Completion::Done);
    }
    let after = machine.nesting.counters();
    assert_eq!(after.host_calls - at_rest.host_calls, 100);
    // A lazy guest: as many pages, one batch.
    let batch: Vec<_> = (0..100).map(|n| page_of(IOVA + n * PAGE)).collect();
    assert_eq!(guest.submit(&batch), Completion::Done);
    assert_eq!(machine.nesting.counters().host_calls - after.host_calls, 1);
    assert_eq!(machine.end(), 0);
}
