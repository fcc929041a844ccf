// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Enabling, disabling, and tables that change.

use super::*;
use crate::spec::vtd::qi::{ContextScope, PasidCacheScope};
use crate::spec::vtd::root::AddressWidth;

fn configured(requester: Requester, policy: Policy) -> Call {
    Call::Configure(requester, policy)
}

#[test]
fn a_new_device_passes_while_translation_is_disabled() {
    let guest = Guest::new(VtdConfig::default());
    guest.iommu.add_device(UPPER_RID).unwrap();
    let bypass = configured(Requester::rid(UPPER_RID), Policy::Bypass);
    assert_eq!(guest.calls(), [bypass]);
    guest.iommu.add_device(UPPER_RID).unwrap();
    assert_eq!(guest.calls(), []);
}

#[test]
fn every_requester_is_blocked_or_served_before_the_enable_is_acknowledged() {
    let guest = Guest::new(VtdConfig::default());
    guest.iommu.add_device(UPPER_RID).unwrap();
    guest.write_tables();
    guest.set_root(0x400);
    guest.calls();
    guest.enable_translation();
    let served = configured(Requester::rid(RID), first_stage(FIRST_STAGE));
    assert_eq!(guest.calls(), [served, configured(Requester::rid(UPPER_RID), blocked(0x39))]);
    assert_eq!(guest.read32(regs::GSTS), 1 << 31 | 1 << 30);
}

#[test]
fn translation_without_a_root_table_blocks() {
    let guest = Guest::new(VtdConfig::default());
    guest.enable_translation();
    assert_eq!(guest.calls(), [configured(Requester::rid(RID), blocked(0x30))]);
    assert_eq!(guest.reason(Requester::rid(RID)), Some(0x30));
}

#[test]
fn disabling_lets_requests_pass_and_blocks_pasids() {
    let guest = Guest::running();
    guest.write_pasid(5, 0x6000);
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
    guest.calls();
    guest.disable_translation();
    let bypass = configured(Requester::rid(RID), Policy::Bypass);
    assert_eq!(guest.calls(), [bypass, configured(with_pasid(5), blocked(0x59))]);
    assert_eq!(guest.read32(regs::GSTS) >> 31, 0);
    assert_eq!(guest.reason(Requester::rid(RID)), None);
}

#[test]
fn a_changed_entry_is_taken_at_its_invalidation_and_not_before() {
    let guest = Guest::running();
    guest.write_pasid(0, 0x6000);
    guest.submit(&[wait(1)]);
    assert_eq!(guest.calls(), []);
    let scope = PasidCacheScope::Pasid { domain: DOMAIN, pasid: pasid(0) };
    guest.submit(&[Descriptor::PasidCache(scope), wait(2)]);
    assert_eq!(guest.calls(), [configured(Requester::rid(RID), first_stage(0x6000))]);
    // Unchanged: nothing for the host.
    guest.submit(&[Descriptor::PasidCache(scope), wait(3)]);
    assert_eq!(guest.calls(), []);
}

#[test]
fn pasids_come_and_go_with_their_entries() {
    let guest = Guest::running();
    guest.write_pasid(5, 0x6000);
    guest.write_pasid(6, 0x6000);
    let one = |value| {
        let scope = PasidCacheScope::Pasid { domain: DOMAIN, pasid: pasid(value) };
        Descriptor::PasidCache(scope)
    };
    guest.submit(&[one(5)]);
    assert_eq!(guest.calls(), [configured(with_pasid(5), first_stage(0x6000))]);
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Domain(DOMAIN))]);
    assert_eq!(guest.calls(), [configured(with_pasid(6), first_stage(0x6000))]);
    guest.write(PASID_TABLE + 64 * 5, &[0]);
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
    assert_eq!(guest.calls(), [configured(with_pasid(5), blocked(0x59))]);
    // The whole table at once.
    guest.write(DIRECTORY, &[0]);
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
    let gone = configured(Requester::rid(RID), blocked(0x51));
    assert_eq!(guest.calls(), [gone, configured(with_pasid(6), blocked(0x51))]);
    assert_eq!(guest.reason(with_pasid(6)), Some(0x51));
}

#[test]
fn pasid_0_is_never_given_apart_from_its_requester() {
    let guest = Guest::running();
    let scope = PasidCacheScope::Pasid { domain: DOMAIN, pasid: pasid(0) };
    guest.submit(&[Descriptor::PasidCache(scope), Descriptor::PasidCache(PasidCacheScope::Global)]);
    assert_eq!(guest.calls(), []);
}

#[test]
fn invalidations_of_another_scope_leave_an_entry_alone() {
    let guest = Guest::running();
    guest.write_pasid(0, 0x6000);
    guest.write(PASID_TABLE + 8, &[0x18]);
    guest.submit(&[
        Descriptor::PasidCache(PasidCacheScope::Domain(0x99)),
        Descriptor::PasidCache(PasidCacheScope::Pasid { domain: DOMAIN, pasid: pasid(1) }),
        Descriptor::ContextCache(ContextScope::Device {
            domain: 0,
            source: UPPER_RID,
            function_mask: 0,
        }),
    ]);
    assert_eq!(guest.calls(), []);
    // By the old domain, and by the new one.
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Domain(0x18))]);
    assert_eq!(guest.calls(), [configured(Requester::rid(RID), first_stage(0x6000))]);
}

#[test]
fn context_invalidations_name_functions_by_mask() {
    for (function_mask, source, named) in [
        (0, 0x0108, true),
        (0, 0x0109, false),
        (1, 0x010c, true),
        (2, 0x010e, true),
        (3, 0x010f, true),
    ] {
        let guest = Guest::running();
        guest.write(CONTEXT + 0x100, &[0]);
        let source = Bdf::from_raw(source);
        let scope = ContextScope::Device { domain: 0, source, function_mask };
        guest.submit(&[Descriptor::ContextCache(scope)]);
        assert_eq!(guest.calls().is_empty(), !named, "{function_mask} {source}");
    }
}

/// Context entries of scalable mode have no domain: each is named by any domain.
#[test]
fn a_domain_names_every_context_of_scalable_mode() {
    let guest = Guest::running();
    guest.write(CONTEXT + 0x100, &[0xa000 | 1 << 3 | 1]);
    guest.submit(&[Descriptor::ContextCache(ContextScope::Domain(DOMAIN + 1)), wait(1)]);
    assert_eq!(guest.calls(), [configured(Requester::rid(RID), blocked(0x51))]);
}

#[test]
fn a_new_root_table_is_taken_while_translating() {
    let guest = Guest::running();
    guest.write(0x9000 + 0x10, &[0, 0]);
    guest.write64(regs::RTADDR, 0x9400);
    assert_eq!(guest.calls(), []);
    guest.command(|enabled| enabled | 1 << 30);
    let gone = configured(Requester::rid(RID), blocked(0x39));
    assert_eq!(guest.calls(), [Call::Invalidate(vec![Invalidation::ALL]), gone]);
}

#[test]
fn a_refused_requester_is_blocked_and_asked_again() {
    let guest = Guest::running();
    guest.refuse(true);
    guest.write_pasid(0, 0x6000);
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global), wait(1)]);
    assert_eq!(guest.calls(), [configured(Requester::rid(RID), first_stage(0x6000))]);
    assert_eq!(guest.status(), 1);
    assert_eq!(guest.reason(Requester::rid(RID)), Some(0x5b));
    assert_eq!(guest.iommu.counters().host_errors, 1);
    guest.refuse(false);
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
    assert_eq!(guest.calls(), [configured(Requester::rid(RID), first_stage(0x6000))]);
    assert_eq!(guest.reason(Requester::rid(RID)), Some(0x71));
}

#[test]
fn a_block_that_the_host_refused_is_asked_again() {
    let guest = Guest::running();
    guest.write(PASID_TABLE, &[0]);
    guest.refuse(true);
    let again = [configured(Requester::rid(RID), blocked(0x59))];
    for refuse in [false, true] {
        guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
        assert_eq!(guest.calls(), again);
        assert_eq!(guest.reason(Requester::rid(RID)), Some(0x59));
        guest.refuse(refuse);
    }
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
    assert_eq!(guest.calls(), []);
}

#[test]
fn a_fault_during_the_blocking_is_told_why() {
    let guest = Guest::running();
    guest.write(PASID_TABLE, &[0]);
    *guest.host.faulting.lock() = Some(guest.iommu.clone());
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
    *guest.host.faulting.lock() = None;
    assert_eq!(guest.fault_record(0).high.fr(), 0x59);
}

#[test]
fn a_device_that_comes_and_goes_while_translating() {
    let guest = Guest::running();
    guest.write_pasid(5, 0x6000);
    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
    guest.calls();
    guest.iommu.remove_device(RID);
    let gone = blocked(0x41);
    let calls = [with_pasid(5), Requester::rid(RID)].map(|requester| configured(requester, gone));
    assert_eq!(guest.calls(), calls);
    guest.write(PASID_TABLE + 64 * 5, &[0]);
    guest.iommu.remove_device(RID);
    assert_eq!(guest.calls(), []);
    guest.write_pasid(1, 0x6000);
    guest.iommu.add_device(RID).unwrap();
    let served = configured(Requester::rid(RID), first_stage(FIRST_STAGE));
    assert_eq!(guest.calls(), [served, configured(with_pasid(1), first_stage(0x6000))]);
}

#[test]
fn legacy_tables_are_served_where_second_stage_tables_are_offered() {
    let guest = Guest::new(VtdConfig { second_stage: true, ..Default::default() });
    guest.write(ROOT + 0x10, &[CONTEXT | 1, 0]);
    guest.write(CONTEXT + 0x80, &[0x5001, u64::from(DOMAIN) << 8 | 2]);
    guest.set_root(0);
    guest.calls();
    guest.enable_translation();
    let tables = crate::viommu::vtd::VtdSecondStage {
        table: 0x5000,
        address_width: AddressWidth::Bits48,
        accessed_dirty: false,
    };
    let policy = Policy::Stage1(Stage1::VtdSecondStage(tables));
    assert_eq!(guest.calls(), [configured(Requester::rid(RID), policy)]);
    // By register, as the queue is off: the entry is gone.
    guest.write(CONTEXT + 0x80, &[0, 0]);
    guest.write64(regs::CCMD, 1 << 63 | 2 << 61 | u64::from(DOMAIN));
    assert_eq!(guest.calls(), [configured(Requester::rid(RID), blocked(0x02))]);
    assert_eq!(guest.read64(regs::CCMD) >> 59, 0b01010);
}

#[test]
fn commands_are_not_acknowledged_while_requesters_are_reachable() {
    const TES: u32 = 1 << 31;
    const RTPS: u32 = 1 << 30;
    let guest = Guest::new(VtdConfig::default());
    guest.write_tables();
    guest.fail_to_block(true);
    guest.set_root(0x400);
    assert_eq!(guest.read32(regs::GSTS) & RTPS, 0);
    guest.fail_to_block(false);
    guest.set_root(0x400);
    assert_eq!(guest.read32(regs::GSTS) & RTPS, RTPS);

    guest.fail_to_block(true);
    guest.enable_translation();
    assert_eq!(guest.read32(regs::GSTS) & TES, 0);
    guest.fail_to_block(false);
    // Withdrawn, and configured again.
    guest.calls();
    guest.disable_translation();
    assert_eq!(guest.calls()[0], configured(Requester::rid(RID), Policy::Bypass));
    guest.enable_translation();
    assert_eq!(guest.read32(regs::GSTS) & TES, TES);
    assert_eq!(guest.reason(Requester::rid(RID)), Some(0x71));

    guest.fail_to_block(true);
    guest.disable_translation();
    assert_eq!(guest.read32(regs::GSTS) & TES, TES);
    guest.fail_to_block(false);
    guest.disable_translation();
    assert_eq!(guest.read32(regs::GSTS) & TES, 0);
}

#[test]
fn what_cannot_be_disabled_for_all_is_enabled_for_all() {
    const TES: u32 = 1 << 31;
    let guest = Guest::new(VtdConfig::default());
    guest.iommu.add_device(UPPER_RID).unwrap();
    guest.write_tables();
    guest.set_root(0x400);
    guest.enable_translation();
    guest.calls();
    // One requester passes already, the other does not.
    guest.host.refusals.block_nothing(true);
    guest.host.refusals.after(1);
    guest.disable_translation();
    assert_eq!(guest.read32(regs::GSTS) & TES, TES);
    let [rid, upper] = [RID, UPPER_RID].map(Requester::rid);
    let passing = [rid, upper].map(|requester| configured(requester, Policy::Bypass));
    let again = [configured(rid, first_stage(FIRST_STAGE)), configured(upper, blocked(0x39))];
    assert_eq!(guest.calls(), [&passing[..], &again].concat());
    // The guest has thought better of it.
    guest.enable_translation();
    assert_eq!((guest.read32(regs::GSTS) & TES, guest.calls()), (TES, vec![]));
    guest.disable_translation();
    assert_eq!(guest.read32(regs::GSTS) & TES, 0);
}

#[test]
fn what_cannot_be_enabled_again_for_all_is_so_before_anything_is_complete() {
    for by_queue in [false, true] {
        let guest = Guest::new(VtdConfig::default());
        guest.iommu.add_device(UPPER_RID).unwrap();
        guest.write_tables();
        guest.set_root(0x400);
        guest.enable_queue(0x400);
        guest.enable_translation();
        guest.calls();
        guest.host.refusals.block_nothing(true);
        guest.host.refusals.everything(true);
        guest.disable_translation();
        assert_eq!((guest.read32(regs::GSTS) >> 31, guest.calls().len()), (1, 4));
        guest.host.refusals.everything(false);
        match by_queue {
            false => guest.enable_translation(),
            true => guest.submit(&[wait(1)]),
        }
        let [rid, upper] = [RID, UPPER_RID].map(Requester::rid);
        let again = [configured(rid, first_stage(FIRST_STAGE)), configured(upper, blocked(0x39))];
        assert_eq!(guest.calls(), again, "{by_queue}");
    }
}
