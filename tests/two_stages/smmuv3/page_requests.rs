// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests: a device asks for a page that is not there, the guest brings it and responds, and
//! the device goes on (§8, §4.5.2).

use super::guest::{Completion, Entry};
use super::machine::{while_reading, Kind, Machine};
use crate::common::{A, B};
use twostage::iommufd::Errno;
use twostage::patience::{wait_for, wait_until};
use twostage::spec::pci::{Bdf, PageResponse};
use twostage::spec::smmuv3::event::EventId;
use twostage::spec::smmuv3::page_request::PageRequest;
use twostage::spec::smmuv3::regs::{self, Idr0};
use twostage::viommu::smmuv3::SmmuConfig;
use twostage_emulated::kit::Mmio;
use twostage_emulated::{DeviceConfig, GraphObject, ObjectKind, SmmuV3UnitConfig};

const IOVA: u64 = 0x12_3456_7000;

fn kind() -> Kind {
    Kind {
        offered: SmmuConfig::default().with_ats(true).with_page_requests(true),
        ..Kind::default()
    }
}

/// A machine whose guest serves page requests of both devices; returns the table that they are on,
/// which maps nothing.
fn machine() -> (Machine, u64) {
    serving(kind().machine())
}

fn serving(machine: Machine) -> (Machine, u64) {
    let guest = &machine.guest;
    let table = guest.page();
    for rid in [A, B] {
        put(&machine, rid, table, 3);
        machine.port(rid).control().set_device_tlb(true);
    }
    guest.start_page_queue();
    guest.enable();
    (machine, table)
}

/// Sets the entry of `rid`, with ATS, to `table`, without invalidation.
fn put(machine: &Machine, rid: Bdf, table: u64, asid: u16) {
    let cd = machine.guest.context(table, asid);
    machine.guest.set_raw_entry(rid.into(), [1 | 5 << 1 | cd, 1 << 28]);
}

/// Waits for a request in the queue.
fn asked(machine: &Machine) -> PageRequest {
    wait_for("a page request", || machine.guest.take_page_request())
}

#[test]
fn page_requests_are_offered_where_they_were_asked_for() {
    let pri = |machine: Machine| Idr0::from_bits(machine.guest.registers.read32(regs::IDR0)).pri();
    assert!(pri(kind().machine()) && !pri(Kind::default().machine()));
    let unit = SmmuV3UnitConfig::default().with_ats(true);
    let without = Kind { unit, ..kind() };
    let (host, unit) = without.host();
    let error = Machine::with(without, host, unit).err().unwrap();
    assert!(error.contains("pri=off"), "{error}");
}

#[test]
fn a_device_asks_for_a_page_and_reads_what_the_guest_brings() {
    let (machine, table) = machine();
    let guest = &machine.guest;
    guest.registers.write64(regs::PRIQ_IRQ_CFG0, 0x808_0040);
    guest.registers.write32(regs::PRIQ_IRQ_CFG1, 0x55);
    guest.registers.write32(regs::IRQ_CTRL, 0b10);
    let page = guest.page();
    guest.store(page + 8, 0x1234);
    let read = while_reading(&machine, A, IOVA + 8, |dma| {
        let request = asked(&machine);
        let group = request.group;
        assert_eq!(
            request,
            PageRequest {
                stream: A.into(),
                substream: None,
                group,
                last: true,
                address: IOVA,
                read: true,
                write: false,
                execute: false,
                privileged: false,
            }
        );
        wait_until("the interrupt", || machine.messages.take() == [(0x808_0040, 0x55)]);
        // Nobody asked for these: another device, another group.
        for other in [
            PageRequest { stream: B.into(), ..request },
            PageRequest { group: group + 1, ..request },
        ] {
            let none = guest.respond(&other, PageResponse::InvalidRequest);
            assert_eq!(none, Completion::Done);
        }
        guest.map(table, IOVA, page, 3, true);
        assert!(!dma.is_finished(), "it waits");
        assert_eq!(guest.respond(&request, PageResponse::Success), Completion::Done);
    });
    assert_eq!(read, Ok(0x1234));
    assert_eq!(machine.read(A, IOVA), Ok(0));
    let counters = guest.registers.counters();
    assert_eq!((counters.page_requests, counters.page_requests_refused), (1, 0));
    // A translation request that fails is no event (§3.9.1).
    assert_eq!(guest.take_event(), None);
    assert_eq!(machine.end(), 0);
}

#[test]
fn an_access_fails_if_the_guest_has_no_page_for_it() {
    for response in [PageResponse::InvalidRequest, PageResponse::Failure] {
        let (machine, _) = machine();
        let read = while_reading(&machine, A, IOVA, |_| {
            let request = asked(&machine);
            assert_eq!(machine.guest.respond(&request, response), Completion::Done);
        });
        assert!(read.is_err());
        assert_eq!(machine.guest.take_event(), None);
        assert_eq!(machine.end(), 0);
    }
}

/// §8.2: no queue, no page.
#[test]
fn without_a_queue_a_device_is_refused() {
    let machine = kind().machine();
    put(&machine, A, machine.guest.page(), 3);
    machine.port(A).control().set_device_tlb(true);
    machine.guest.enable();
    assert!(machine.read(A, IOVA).is_err());
    assert_eq!(machine.guest.registers.counters().page_requests_refused, 1);
    assert_eq!(machine.end(), 0);
}

#[test]
fn a_device_without_page_requests_is_served_beside_one_with_them() {
    let mut kind = kind();
    kind.devices[1] = DeviceConfig::default();
    let (machine, table) = serving(kind.machine());
    let guest = &machine.guest;
    guest.set_entry(B.into(), Entry::Stage1 { cd: guest.context(table, 3) });
    guest.flush_entries(&[B]);
    assert!(machine.read(B, IOVA).is_err());
    let event = machine.event();
    assert_eq!((event.id(), event.stream()), (Some(EventId::Translation), B.into()));
    let page = guest.page();
    let read = while_reading(&machine, A, IOVA, |_| {
        let request = asked(&machine);
        guest.map(table, IOVA, page, 3, true);
        assert_eq!(guest.respond(&request, PageResponse::Success), Completion::Done);
    });
    assert_eq!((read, machine.read(B, IOVA)), (Ok(0), Ok(0)));
    assert_eq!(machine.end(), 0);
}

#[test]
fn whoever_waits_is_answered_when_its_tables_go() {
    type Change = fn(&Machine);
    let changes: [Change; 5] = [
        |machine| machine.guest.set_entry(A.into(), Entry::Abort),
        |machine| put(machine, A, machine.guest.page(), 4),
        |machine| machine.guest.registers.remove_device(A),
        |machine| machine.guest.disable(),
        |machine| machine.guest.registers.halt(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let (machine, _) = machine();
        let read = while_reading(&machine, A, IOVA, |dma| {
            let request = asked(&machine);
            assert!(!dma.is_finished());
            change(&machine);
            if number < 4 {
                machine.guest.flush_entries(&[A]);
            }
            wait_until("the end of the DMA", || dma.is_finished());
            if number < 4 {
                machine.guest.respond(&request, PageResponse::Success);
            }
        });
        assert!(read.is_err(), "change {number}");
        assert_eq!(machine.end(), 0);
    }
}

/// Runs a life with the `n`-th host call failing; returns whether there was such a call.
fn live(n: u64) -> bool {
    let kind = kind();
    let (host, unit) = kind.host();
    host.fail_nth(n, Errno::ENOMEM);
    let machine = match Machine::with(kind, host.clone(), unit) {
        Ok(machine) => machine,
        Err(error) => {
            assert!(error.contains("ENOMEM"), "call {n}: {error}");
            let graph = host.inner().inner().graph();
            let device = |object: &GraphObject| object.kind == ObjectKind::Device;
            assert!(graph.objects.iter().all(device), "call {n} failed, and left\n{graph}");
            return !host.is_armed();
        }
    };
    let (machine, table) = serving(machine);
    let guest = &machine.guest;
    let page = guest.page();
    for rid in [A, B] {
        let read = while_reading(&machine, rid, IOVA, |dma| {
            wait_until("the end of the DMA", || {
                if let Some(request) = guest.take_page_request() {
                    guest.map(table, IOVA, page, 3, true);
                    guest.respond(&request, PageResponse::Success);
                }
                dma.is_finished()
            });
        });
        assert!(read.is_ok() || !host.is_armed(), "{rid}: {read:?}");
    }
    assert_eq!(machine.end(), 0, "call {n} failed, and objects leaked");
    !host.is_armed()
}

#[test]
fn every_host_call_fails_in_turn() {
    let calls = (1..200).find(|n| !live(*n)).expect("a life ends");
    assert!(calls > 12, "only {calls} calls were made to fail");
}
