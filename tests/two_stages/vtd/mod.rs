// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! VT-d: architecture-specific tests.

mod at_once;
mod contexts;
mod device_tlb;
mod fail_nth;
mod granularity;
mod late;
mod machine;
mod mirrored;
mod mixed;
mod naive;
mod nested;
mod page_requests;
mod restore;
mod stack;

use crate::common::{A, HIGH, HIGH_SIZE, PAGE};
use crate::conformance::{IOVA, NAME as DOMAIN};
use guest::{Completion, Entry};
use machine::{vtd_config, Machine};
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::{AddressMask, Descriptor, IotlbScope, PasidCacheScope};
use twostage::spec::vtd::regs;
use twostage_emulated::kit::{vtd as guest, Mmio};
use twostage_emulated::{
    ContextInvalidation, DmaError, DmaWay, InvalidatedPages, SanitizerReport, StaleContext,
    VtdUnitConfig,
};

crate::conformance::conformance! { Machine }

/// A machine with device A, without PASID, on the returned table. `IOVA` maps to a page that starts
/// with 1.
fn nested() -> (Machine, u64, u64) {
    let machine = Machine::new();
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.map(table, IOVA, page, 1, true);
    guest.store(page, 1);
    guest.set_entry(A, 0, Entry::FirstStage { table, domain: DOMAIN });
    guest.enable();
    (machine, table, page)
}

fn pages(iova: u64, mask: u8) -> AddressMask {
    AddressMask { address: iova, mask, leaf: true }
}

fn pasid_pages(domain: u16, pasid: u32, range: Option<AddressMask>) -> Descriptor {
    Descriptor::PasidIotlb { domain, pasid: machine::pasid(pasid), range }
}

fn iotlb(scope: IotlbScope) -> Descriptor {
    Descriptor::Iotlb { scope, drain_writes: true, drain_reads: true }
}

#[track_caller]
fn expect_fault(machine: &Machine, reason: FaultReason, address: u64, pasid: Option<u32>) {
    expect_fault_of(machine, A, reason, address, pasid);
}

#[track_caller]
fn expect_fault_of(
    machine: &Machine,
    rid: Bdf,
    reason: FaultReason,
    address: u64,
    pasid: Option<u32>,
) {
    let (record, told) = machine.guest.take_fault().expect("the guest is told");
    assert_eq!(told, Some(reason));
    assert_eq!(record.high.sid(), rid.raw());
    assert_eq!(record.address(), address & !(PAGE - 1));
    assert_eq!(record.high.pp().then(|| record.high.pv()), pasid);
}

#[test]
fn before_translation_a_function_passes_and_pasids_do_not() {
    let machine = Machine::new();
    let page = machine.guest.page();
    machine.guest.store(page, 4);
    assert_eq!(machine.read(A, None, page), Ok(4));
    assert!(machine.read(A, Some(1), page).is_err());
    assert_eq!(machine.guest.take_fault(), None);
}

#[test]
fn without_tables_a_function_is_blocked_from_the_moment_of_enabling() {
    let machine = Machine::new();
    let page = machine.guest.page();
    machine.guest.enable();
    assert!(machine.read(A, None, page).is_err());
    expect_fault(&machine, FaultReason::RootNotPresent, page, None);
    assert!(machine.write(A, Some(3), page, 1).is_err());
    expect_fault(&machine, FaultReason::RootNotPresent, page, Some(3));
    machine.guest.disable();
    assert_eq!(machine.read(A, None, page), Ok(0));
}

#[test]
fn faults_are_in_the_guest_s_records() {
    let (machine, table, page) = nested();
    let guest = &machine.guest;
    assert!(machine.read(A, None, IOVA + PAGE + 0x123).is_err());
    expect_fault(&machine, FaultReason::FirstStageNotPresent, IOVA + PAGE, None);

    guest.map(table, IOVA + 2 * PAGE, page, 1, false);
    assert_eq!(machine.read(A, None, IOVA + 2 * PAGE), Ok(1));
    let error = machine.write(A, None, IOVA + 2 * PAGE, 9).unwrap_err();
    assert!(matches!(error, DmaError::Fault { stage2: false, .. }), "{error}");
    let (record, reason) = guest.take_fault().unwrap();
    assert_eq!((reason, record.high.t1()), (Some(FaultReason::WriteDenied), false));

    // Tables that map what is not memory: stage 2 refuses, but the guest's tables are reported.
    guest.map(table, IOVA + 3 * PAGE, HIGH + HIGH_SIZE, 1, true);
    let error = machine.read(A, None, IOVA + 3 * PAGE).unwrap_err();
    assert!(matches!(error, DmaError::Fault { stage2: true, .. }), "{error}");
    expect_fault(&machine, FaultReason::ReadDenied, IOVA + 3 * PAGE, None);
    assert_eq!(guest.take_fault(), None);
    assert_eq!(guest.load(page), 1);
}

#[test]
fn a_fault_raises_the_fault_event_once_until_it_is_seen() {
    let (machine, _, _) = nested();
    let guest = &machine.guest;
    let (address, data) = (0xfee0_1000, 0x41);
    guest.registers.write32(regs::FEDATA, data);
    guest.registers.write32(regs::FEADDR, address);
    guest.registers.write32(regs::FECTL, 0);
    let fault = || assert!(machine.read(A, None, IOVA + PAGE).is_err());
    let event = vec![(u64::from(address), data)];
    fault();
    assert_eq!(machine.interrupts.take(), event);
    fault();
    assert_eq!(machine.interrupts.take(), []);
    while guest.take_fault().is_some() {}
    fault();
    assert_eq!(machine.interrupts.take(), event);
}

#[test]
fn each_pasid_has_tables_of_its_own() {
    let (machine, _, _) = nested();
    let guest = &machine.guest;
    let tables = [guest.page(), guest.page()];
    for (pasid, table) in [6, 7].into_iter().zip(tables) {
        let page = guest.page();
        guest.store(page, u64::from(pasid));
        guest.map(table, IOVA, page, 1, true);
        guest.set_entry(A, pasid, Entry::FirstStage { table, domain: DOMAIN });
    }
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    assert_eq!(machine.read(A, Some(6), IOVA), Ok(6));
    assert_eq!(machine.read(A, Some(7), IOVA), Ok(7));
    assert!(machine.read(A, Some(8), IOVA).is_err());
    expect_fault(&machine, FaultReason::PasidEntryNotPresent, IOVA, Some(8));

    // An invalidation of one PASID does not affect the others.
    let page = guest.page();
    guest.store(page, 8);
    tables.iter().for_each(|table| guest.map(*table, IOVA, page, 1, true));
    assert_eq!(guest.submit(&[pasid_pages(DOMAIN, 7, None)]), Completion::Done);
    assert_eq!(machine.read(A, Some(6), IOVA), Ok(6));
    assert_eq!(machine.read(A, Some(7), IOVA), Ok(8));

    guest.set_entry(A, 6, Entry::NotPresent);
    let one = PasidCacheScope::Pasid { domain: DOMAIN, pasid: machine::pasid(6) };
    assert_eq!(guest.submit(&[Descriptor::PasidCache(one)]), Completion::Done);
    assert!(machine.read(A, Some(6), IOVA).is_err());
    assert_eq!(machine.read(A, Some(7), IOVA), Ok(8));
    assert_eq!(machine.end(), 0);
}

#[test]
fn a_domain_id_that_changes_leaves_nothing_stale() {
    let (machine, table, _) = nested();
    let guest = &machine.guest;
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    let other = guest.page();
    guest.store(other, 2);
    guest.map(table, IOVA, other, 1, true);
    guest.set_entry(A, 0, Entry::FirstStage { table, domain: DOMAIN + 1 });
    // As §6.5.3.3 requires: the caches of the old domain, of which nothing is left by then.
    let old = Descriptor::PasidCache(PasidCacheScope::Domain(DOMAIN));
    let done = guest.submit(&[old, pasid_pages(DOMAIN, 0, None)]);
    assert_eq!(done, Completion::Done);
    assert_eq!(machine.read(A, None, IOVA), Ok(2));
}

#[test]
fn what_stands_before_an_ordering_point_is_one_host_call() {
    let (machine, _, _) = nested();
    let page = |n| pasid_pages(DOMAIN, 0, Some(pages(IOVA + n * PAGE, 0)));
    let before = machine.nesting.counters();
    let batch: Vec<_> = (0..100).map(page).collect();
    assert_eq!(machine.guest.submit(&batch), Completion::Done);
    let after = machine.nesting.counters();
    assert_eq!(after.host_calls - before.host_calls, 1);
    assert_eq!(after.entries_out - before.entries_out, 1);
    assert_eq!(after.merged - before.merged, 99);
}

#[test]
fn a_refused_attach_is_visible_and_tried_again() {
    let (machine, _, _) = nested();
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.map(table, IOVA, page, 1, true);
    guest.store(page, 2);
    guest.set_entry(A, 0, Entry::FirstStage { table, domain: DOMAIN });
    // HWPT_ALLOC, then DEVICE_ATTACH.
    machine.fail_nth(2);
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    assert_eq!(machine.nesting.counters().refused_attaches, 1);
    assert!(machine.read(A, None, IOVA).is_err());
    expect_fault(&machine, FaultReason::PasidEntryInvalid, IOVA, None);
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    assert_eq!(machine.read(A, None, IOVA), Ok(2));
    assert_eq!(machine.end(), 0);
}

#[test]
fn what_cannot_be_blocked_is_not_told_to_be() {
    // Refused a few times, it is retried; if every attempt is refused, the guest gets an error.
    const EVERY_TIME: u64 = 100;
    for (pasid, failures) in [(None, 2), (None, EVERY_TIME), (Some(7), 2), (Some(7), EVERY_TIME)] {
        let (machine, table, _) = nested();
        let guest = &machine.guest;
        if let Some(pasid) = pasid {
            guest.set_entry(A, pasid, Entry::FirstStage { table, domain: DOMAIN });
            assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        }
        assert_eq!(machine.read(A, pasid, IOVA), Ok(1));
        guest.set_entry(A, pasid.unwrap_or(0), Entry::NotPresent);
        machine.fail_next(failures);
        match guest.flush_pasid_cache() {
            Completion::Done => assert_eq!(failures, 2),
            Completion::Stopped(status) => {
                assert!(failures == EVERY_TIME && status.iqe());
                machine.fail_next(0);
                assert_eq!(guest.resume(), Completion::Done);
            }
        }
        assert!(machine.read(A, pasid, IOVA).is_err());
        assert_eq!(machine.end(), 0);
    }
}

#[test]
fn what_could_not_be_blocked_is_by_a_later_invalidation_that_completes() {
    for pasid in [None, Some(7)] {
        let (machine, table, _) = nested();
        let guest = &machine.guest;
        guest.set_entry(A, pasid.unwrap_or(0), Entry::FirstStage { table, domain: DOMAIN });
        assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        guest.set_entry(A, pasid.unwrap_or(0), Entry::NotPresent);
        machine.fail_next(100);
        assert!(matches!(guest.flush_pasid_cache(), Completion::Stopped(_)));
        machine.fail_next(0);
        // The guest takes back the invalidation that was refused.
        assert_eq!(guest.replace_and_resume(iotlb(IotlbScope::Global)), Completion::Done);
        assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        assert!(machine.read(A, pasid, IOVA).is_err(), "{pasid:?}");
        assert_eq!(machine.end(), 0);
    }
}

/// A machine whose guest may use second-stage tables, and device A is on one.
fn second_stage() -> (Machine, u64) {
    let unit = VtdUnitConfig::default().with_guest_second_stage(true);
    let machine = Machine::with(unit, vtd_config().with_second_stage(true));
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.map_second_stage(table, IOVA, page, true);
    guest.store(page, 1);
    guest.set_entry(A, 0, Entry::SecondStage { table, domain: DOMAIN });
    guest.enable();
    (machine, table)
}

#[test]
fn second_stage_tables_of_the_guest_go_through_the_host_s() {
    let (machine, table) = second_stage();
    let guest = &machine.guest;
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    let other = guest.page();
    guest.store(other, 2);
    guest.map_second_stage(table, IOVA, other, false);
    assert_eq!(machine.read(A, None, IOVA), Ok(1), "hardware caches");
    let exact = iotlb(IotlbScope::Pages { domain: DOMAIN, range: pages(IOVA, 0) });
    assert_eq!(guest.submit(&[exact]), Completion::Done);
    assert_eq!(machine.read(A, None, IOVA), Ok(2));
    assert!(machine.write(A, None, IOVA, 3).is_err());
    expect_fault(&machine, FaultReason::SecondStageDenied, IOVA, None);
    assert_eq!(machine.end(), 0);
}

#[test]
fn second_stage_tables_are_not_offered_where_the_host_cannot_walk_them() {
    let (host, unit) = machine::host(VtdUnitConfig::default().with_guest_second_stage(false));
    let config = vtd_config().with_second_stage(true);
    let error = Machine::on(host, unit, config).err().unwrap();
    assert!(error.contains("lacks guest_second_stage"), "{error}");
}

/// A machine whose unit has the sanitizer; otherwise as [`nested`].
fn sanitized() -> (Machine, u64) {
    let unit = VtdUnitConfig::default().with_sanitize(true);
    let machine = Machine::with(unit, vtd_config());
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.map(table, IOVA, page, 1, true);
    guest.set_entry(A, 0, Entry::FirstStage { table, domain: DOMAIN });
    guest.enable();
    (machine, table)
}

#[test]
fn a_driver_that_invalidates_what_it_changes_is_not_reported() {
    let (machine, table) = sanitized();
    let guest = &machine.guest;
    for mask in [0, 3, 9] {
        machine.read(A, None, IOVA).unwrap();
        guest.map(table, IOVA, guest.page(), 1, true);
        let range = Some(pages(IOVA, mask));
        assert_eq!(guest.submit(&[pasid_pages(DOMAIN, 0, range)]), Completion::Done);
        machine.write(A, None, IOVA, 1).unwrap();
    }
    guest.unmap(table, IOVA);
    assert_eq!(guest.submit(&[iotlb(IotlbScope::Domain(DOMAIN))]), Completion::Done);
    machine.read(A, None, IOVA).unwrap_err();
    assert_eq!(machine.unit.sanitizer_report(), Some(SanitizerReport::default()));
}

#[test]
fn a_driver_that_invalidates_something_else_is_reported_with_what_was_needed() {
    let others: [(Descriptor, Option<InvalidatedPages>); 3] = {
        let of = |address, pages, leaf| InvalidatedPages::Range { address, pages, leaf };
        [
            (pasid_pages(DOMAIN, 0, Some(pages(IOVA + PAGE, 0))), Some(of(IOVA + PAGE, 1, true))),
            // Another PASID, another domain: these tables were not invalidated.
            (pasid_pages(DOMAIN, 1, None), None),
            (iotlb(IotlbScope::Domain(DOMAIN + 1)), None),
        ]
    };
    for (descriptor, last) in others {
        let (machine, table) = sanitized();
        let guest = &machine.guest;
        machine.read(A, None, IOVA).unwrap();
        guest.unmap(table, IOVA);
        assert_eq!(guest.submit(&[descriptor]), Completion::Done);
        machine.read(A, None, IOVA).unwrap();
        let [stale] = machine.unit.sanitizer_report().unwrap().stale[..] else {
            panic!("one page is stale");
        };
        assert_eq!((stale.rid, stale.pasid, stale.iova), (A, None, IOVA));
        assert_eq!((stale.level, stale.new, stale.invalidated_since), (1, Some(0), false));
        let needed = InvalidatedPages::Range { address: IOVA, pages: 1, leaf: true };
        assert_eq!((stale.needed, stale.last), (needed, last));
        assert_eq!(guest.submit(&[pasid_pages(DOMAIN, 0, None)]), Completion::Done);
        machine.read(A, None, IOVA).unwrap_err();
        assert!(machine.unit.sanitizer_report().unwrap().stale[0].invalidated_since);
    }
}

#[test]
fn a_context_that_is_stale_is_reported_and_its_old_tables_are_not() {
    let (machine, table) = sanitized();
    let guest = &machine.guest;
    let other = guest.page();
    guest.map(other, IOVA, guest.page(), 1, true);
    machine.read(A, None, IOVA).unwrap();
    guest.set_entry(A, 0, Entry::FirstStage { table: other, domain: DOMAIN });
    // The old tables are reused for something else.
    guest.unmap(table, IOVA);
    machine.read(A, None, IOVA).unwrap();
    machine.read(A, None, IOVA).unwrap();
    let report = || machine.unit.sanitizer_report().unwrap();
    let stale = StaleContext {
        rid: A,
        pasid: None,
        old: DmaWay::FirstStage(table),
        new: DmaWay::FirstStage(other),
        needed: ContextInvalidation::Vtd,
        uses: 2,
        invalidated_since: false,
    };
    assert_eq!((report().contexts, report().stale), (vec![stale], vec![]));
    assert_eq!(machine.unit.counters().stale_uses, 2);
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    machine.read(A, None, IOVA).unwrap();
    let done = StaleContext { invalidated_since: true, ..stale };
    assert_eq!((report().contexts, report().stale), (vec![done], vec![]));
    // Disabled translation reports nothing, nor do blocking entries.
    guest.set_entry(A, 0, Entry::NotPresent);
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    machine.read(A, None, IOVA).unwrap_err();
    guest.set_entry(A, 0, Entry::FirstStage { table: other, domain: DOMAIN });
    machine.read(A, None, IOVA).unwrap_err();
    guest.disable();
    machine.read(A, None, guest.page()).unwrap();
    assert_eq!((report().contexts, report().stale), (vec![done], vec![]));
}
