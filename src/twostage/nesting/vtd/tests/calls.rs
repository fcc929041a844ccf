// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which host calls a configuration costs, and their order.

use super::*;
use crate::iommufd::{Errno, Protection, Verb};

#[test]
fn the_first_attach() {
    let host = RecordingHost::new(Extensions::default());
    let dev = host.add_device(0, hw_info(0, 8));
    let nesting = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
    nesting.ioas().unwrap().map(0, &memory(), Protection::READ_WRITE).unwrap();
    nesting.add_device(A, dev).unwrap();
    let rig = Rig { host, nesting };
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.expect(&[
        "IOAS_ALLOC - = #2",
        "IOAS_MAP #2 0x0+0x10000 rw",
        "GET_HW_INFO #1",
        "HWPT_ALLOC paging NEST_PARENT PASID on #2 for #1 = #3",
        "HWPT_ALLOC VTD_S1(0x1000, 48 bits, flags 0x0) PASID on #3 for #1 = #4",
        "DEVICE_ATTACH #1 to #4",
    ]);
    rig.ends_clean();
}

#[test]
fn a_device_is_blocked_without_a_call_until_it_is_to_pass() {
    let host = RecordingHost::new(Extensions::default());
    let dev = host.add_device(0, hw_info(0, 8));
    let nesting = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
    nesting.add_device(A, dev).unwrap();
    let rig = Rig { host, nesting };
    rig.configure(Requester::rid(A), BLOCKED).unwrap();
    rig.expect(&[
        "IOAS_ALLOC - = #2",
        "GET_HW_INFO #1",
        "HWPT_ALLOC paging NEST_PARENT PASID on #2 for #1 = #3",
    ]);
    // What a virtual IOMMU that is off asks for.
    rig.configure(Requester::rid(A), Policy::Bypass).unwrap();
    rig.expect(&["DEVICE_ATTACH #1 to #3"]);
    rig.configure(Requester::rid(A), BLOCKED).unwrap();
    rig.expect(&["DEVICE_DETACH #1"]);
    rig.ends_clean();
}

#[test]
fn an_unchanged_entry_costs_nothing() {
    let rig = Rig::new();
    for policy in [first_stage(0x1000), Policy::Bypass, BLOCKED] {
        rig.configure(Requester::rid(A), policy).unwrap();
        rig.host.take_log();
        rig.configure(Requester::rid(A), policy).unwrap();
        rig.expect(&[]);
    }
    assert_eq!(rig.nesting.counters().unchanged, 3);
}

#[test]
fn a_changed_pointer_replaces() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.configure(Requester::rid(A), first_stage(0x2000)).unwrap();
    rig.expect(&[
        "HWPT_ALLOC VTD_S1(0x1000, 48 bits, flags 0x0) PASID on #4 for #1 = #5",
        "DEVICE_ATTACH #1 to #5",
        "HWPT_ALLOC VTD_S1(0x2000, 48 bits, flags 0x0) PASID on #4 for #1 = #6",
        "DEVICE_ATTACH #1 to #6",
        "DESTROY #5",
    ]);
    rig.ends_clean();
}

#[test]
fn flags_reach_the_host_in_its_own_bits() {
    let rig = Rig::new();
    let tables = VtdFirstStage {
        table: 0x1000,
        paging_mode: PagingMode::Level5,
        supervisor_requests: true,
        write_protect: true,
        extended_accessed: true,
    };
    let policy = Policy::Stage1(Stage1::VtdFirstStage(tables));
    rig.configure(Requester::rid(A), policy).unwrap();
    let calls = rig.host.take_log();
    assert!(calls[0].contains("VTD_S1(0x1000, 57 bits, flags 0x7)"), "{calls:?}");
}

#[test]
fn a_shared_table_is_one_object_until_its_last_user_leaves() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.configure(Requester::rid(B), first_stage(0x1000)).unwrap();
    rig.configure(Requester::rid(A), Policy::Bypass).unwrap();
    rig.configure(Requester::rid(B), Policy::Bypass).unwrap();
    rig.expect(&[
        "HWPT_ALLOC VTD_S1(0x1000, 48 bits, flags 0x0) PASID on #4 for #1 = #5",
        "DEVICE_ATTACH #1 to #5",
        "DEVICE_ATTACH #2 to #5",
        "DEVICE_ATTACH #1 to #4",
        "DEVICE_ATTACH #2 to #4",
        "DESTROY #5",
    ]);
    let counters = rig.nesting.counters();
    assert_eq!((counters.nested_allocs, counters.nested_shares, counters.replaces), (1, 1, 4));
    rig.ends_clean();
}

#[test]
fn a_table_shared_under_a_new_name_is_flushed_first() {
    let rig = Rig::new();
    let (old, new) = (TAG, DomainTag { domain: 8, pasid: 0 });
    rig.configure_tagged(Requester::rid(A), first_stage(0x1000), old).unwrap();
    rig.host.take_log();
    rig.configure_tagged(Requester::rid(B), first_stage(0x1000), new).unwrap();
    rig.expect(&["HWPT_INVALIDATE #5 [all]", "DEVICE_ATTACH #2 to #5"]);
    // Now both tags are in use: the guest invalidates under each.
    rig.configure_tagged(Requester::rid(A), first_stage(0x1000), new).unwrap();
    rig.expect(&[]);
    // Nothing has the old tag any more: it is new again.
    rig.configure_tagged(Requester::rid(B), first_stage(0x1000), old).unwrap();
    rig.expect(&["HWPT_INVALIDATE #5 [all]"]);
    rig.ends_clean();
}

#[test]
fn a_renamed_requester_that_cannot_be_flushed_is_blocked() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.host.take_log();
    rig.host.fail_invalidation(0, Errno::EIO);
    rig.host.fail_invalidation(0, Errno::EIO);
    let renamed = DomainTag { domain: 8, pasid: 0 };
    rig.configure_tagged(Requester::rid(A), first_stage(0x1000), renamed).unwrap_err();
    rig.expect(&[
        "HWPT_INVALIDATE #5 [all] ! EIO",
        "HWPT_INVALIDATE #5 [all] ! EIO",
        "DEVICE_DETACH #1",
        "DESTROY #5",
    ]);
    assert_eq!(rig.host.reaches(DEV_A, None), None);
}

#[test]
fn a_changed_type_from_stage_1_to_bypass_to_blocked_and_back() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.host.take_log();
    rig.configure(Requester::rid(A), Policy::Bypass).unwrap();
    rig.expect(&["DEVICE_ATTACH #1 to #4", "DESTROY #5"]);
    rig.configure(Requester::rid(A), BLOCKED).unwrap();
    rig.expect(&["DEVICE_DETACH #1"]);
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.expect(&[
        "HWPT_ALLOC VTD_S1(0x1000, 48 bits, flags 0x0) PASID on #4 for #1 = #5",
        "DEVICE_ATTACH #1 to #5",
    ]);
    rig.configure(Requester::rid(A), BLOCKED).unwrap();
    rig.expect(&["DEVICE_DETACH #1", "DESTROY #5"]);
    rig.ends_clean();
}

#[test]
fn a_refused_attach_blocks_and_is_tried_again() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.host.take_log();
    rig.host.fail_next(Verb::DeviceAttach, Errno::EINVAL);
    let error = rig.configure(Requester::rid(A), first_stage(0x2000)).unwrap_err();
    assert!(!error.still_reachable);
    assert!(error.to_string().contains("00:04.0"), "{error}");
    assert!(error.to_string().contains("EINVAL"), "{error}");
    rig.expect(&[
        "HWPT_ALLOC VTD_S1(0x2000, 48 bits, flags 0x0) PASID on #4 for #1 = #6",
        "DEVICE_ATTACH #1 to #6 ! EINVAL",
        "DEVICE_DETACH #1",
        "DESTROY #5",
        "DESTROY #6",
    ]);
    assert_eq!(rig.host.reaches(DEV_A, None), None);
    assert_eq!(rig.nesting.counters().refused_attaches, 1);
    // The same again is not a repetition: it had failed.
    rig.configure(Requester::rid(A), first_stage(0x2000)).unwrap();
    rig.expect(&[
        "HWPT_ALLOC VTD_S1(0x2000, 48 bits, flags 0x0) PASID on #4 for #1 = #5",
        "DEVICE_ATTACH #1 to #5",
    ]);
    rig.ends_clean();
}

#[test]
fn after_a_refused_attach_the_old_tables_can_be_reached_again() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.configure(Requester::rid(B), first_stage(0x1000)).unwrap();
    rig.host.fail_next(Verb::DeviceAttach, Errno::EINVAL);
    rig.configure(Requester::rid(A), first_stage(0x2000)).unwrap_err();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    // Without the detach the host would have ignored this, and left A blocked.
    assert_eq!(rig.host.reaches(DEV_A, None), Some(ObjectId(5)));
    rig.ends_clean();
}

#[test]
fn a_refused_allocation_blocks() {
    let rig = Rig::new();
    rig.host.fail_next(Verb::HwptAlloc, Errno::EOPNOTSUPP);
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap_err();
    rig.expect(&[
        "HWPT_ALLOC VTD_S1(0x1000, 48 bits, flags 0x0) PASID on #4 for #1 ! EOPNOTSUPP",
        "DEVICE_DETACH #1",
    ]);
    rig.ends_clean();
}

#[test]
fn a_detach_that_fails_is_tried_once_more_and_then_first_of_all() {
    let rig = Rig::new();
    rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    rig.configure(Requester::rid(A), BLOCKED).unwrap();
    rig.expect(&["DEVICE_DETACH #1 ! EIO", "DEVICE_DETACH #1"]);

    (0..4).for_each(|_| rig.host.fail_next(Verb::DeviceDetach, Errno::EIO));
    let error = rig.configure(Requester::rid(B), BLOCKED).unwrap_err();
    assert!(error.still_reachable);
    rig.host.take_log();
    // Its attachment is uncertain: not a repetition, although it is still the parent.
    rig.configure(Requester::rid(B), Policy::Bypass).unwrap();
    rig.expect(&["DEVICE_DETACH #2", "DEVICE_ATTACH #2 to #4"]);
    rig.ends_clean();
}

#[test]
fn pasids_have_attachments_of_their_own() {
    let rig = Rig::new();
    rig.configure(pasid(A, 5), first_stage(0x1000)).unwrap();
    rig.configure(pasid(A, 6), Policy::Bypass).unwrap();
    rig.configure(Requester::rid(A), BLOCKED).unwrap();
    rig.expect(&[
        "HWPT_ALLOC VTD_S1(0x1000, 48 bits, flags 0x0) PASID on #4 for #1 = #5",
        "DEVICE_ATTACH #1 PASID 0x5 to #5",
        "DEVICE_ATTACH #1 PASID 0x6 to #4",
        "DEVICE_DETACH #1",
    ]);
    rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    rig.nesting.state().forget_pasids(A).unwrap_err();
    assert!(rig.nesting.state().is_reachable(pasid(A, 5)));
    rig.expect(&[
        "DEVICE_DETACH #1 PASID 0x5 ! EIO",
        "DEVICE_DETACH #1 PASID 0x5 ! EIO",
        "DEVICE_DETACH #1 PASID 0x6",
    ]);
    rig.configure(pasid(A, 6), Policy::Bypass).unwrap();
    rig.host.take_log();
    rig.nesting.state().forget_pasids(A).unwrap();
    rig.expect(&["DEVICE_DETACH #1 PASID 0x5", "DESTROY #5", "DEVICE_DETACH #1 PASID 0x6"]);
    rig.nesting.state().forget_pasids(A).unwrap();
    rig.expect(&[]);
    rig.ends_clean();
}

#[test]
fn pasids_that_the_device_does_not_have_are_refused() {
    let rig = Rig::new();
    let error = rig.configure(pasid(A, 0x100), first_stage(0x1000)).unwrap_err();
    assert!(error.to_string().contains("8-bit PASIDs"), "{error}");
    rig.configure(pasid(A, 0x100), BLOCKED).unwrap();
    rig.expect(&[]);
}

#[test]
fn pasid_zero_is_the_rid_s_on_the_host() {
    let rig = Rig::new();
    rig.configure(pasid(A, 0), first_stage(0x1000)).unwrap_err();
    rig.configure(pasid(A, 0), BLOCKED).unwrap_err();
    rig.expect(&[]);
    assert_eq!(rig.host.reaches(DEV_A, None), Some(PARENT));
}

#[test]
fn second_stage_tables_of_the_guest_need_a_host_that_walks_them() {
    let rig = Rig::new();
    let error = rig.configure(Requester::rid(A), second_stage(0x1000)).unwrap_err();
    assert!(error.to_string().contains("second-stage"), "{error}");
    rig.expect(&["DEVICE_DETACH #1"]);

    let rig = Rig::walking();
    rig.configure(Requester::rid(A), second_stage(0x1000)).unwrap();
    rig.nesting.invalidate(&[Invalidation::ALL]).unwrap();
    rig.expect(&[
        "HWPT_ALLOC second-stage(0x1000, 48 bits) PASID on #4 for #1 = #5",
        "DEVICE_ATTACH #1 to #5",
        "HWPT_INVALIDATE #5 second-stage [all]",
    ]);
}

#[test]
fn both_stages_of_the_guest_are_one_object_that_requesters_share() {
    let rig = Rig::new();
    let error = rig.configure(Requester::rid(A), nested(0x1000, 0x2000)).unwrap_err();
    assert!(error.to_string().contains("second-stage"), "{error}");
    rig.expect(&["DEVICE_DETACH #1"]);

    let rig = Rig::walking();
    rig.configure(Requester::rid(A), nested(0x1000, 0x2000)).unwrap();
    rig.configure(Requester::rid(B), nested(0x1000, 0x2000)).unwrap();
    rig.configure(pasid(B, 3), nested(0x1000, 0x2000)).unwrap();
    // Another first stage on the same second one, and another second stage.
    rig.configure(Requester::rid(A), nested(0x3000, 0x2000)).unwrap();
    rig.configure(Requester::rid(B), nested(0x3000, 0x4000)).unwrap();
    rig.configure(pasid(B, 3), second_stage(0x2000)).unwrap();
    rig.expect(&[
        "HWPT_ALLOC nested(0x1000, 48 bits, over 0x2000, 48 bits) PASID on #4 for #1 = #5",
        "DEVICE_ATTACH #1 to #5",
        "DEVICE_ATTACH #2 to #5",
        // A name of its own, under which nothing is cached in the guest's view.
        "HWPT_INVALIDATE #5 second-stage [all]",
        "DEVICE_ATTACH #2 PASID 0x3 to #5",
        "HWPT_ALLOC nested(0x3000, 48 bits, over 0x2000, 48 bits) PASID on #4 for #1 = #6",
        "DEVICE_ATTACH #1 to #6",
        "HWPT_ALLOC nested(0x3000, 48 bits, over 0x4000, 48 bits) PASID on #4 for #2 = #7",
        "DEVICE_ATTACH #2 to #7",
        "HWPT_ALLOC second-stage(0x2000, 48 bits) PASID on #4 for #2 = #8",
        "DEVICE_ATTACH #2 PASID 0x3 to #8",
        "DESTROY #5",
    ]);
    rig.ends_clean();
}

#[test]
fn flags_of_the_second_stage_reach_the_host() {
    let rig = Rig::walking();
    for policy in [second_stage(0x2000), nested(0x1000, 0x2000)] {
        let Policy::Stage1(mut stage1) = policy else { unreachable!() };
        if let Stage1::VtdSecondStage(second) | Stage1::VtdNested(VtdNested { second, .. }) =
            &mut stage1
        {
            second.accessed_dirty = true;
        }
        rig.configure(Requester::rid(A), policy).unwrap();
        // Without the flags, and with them: other tables.
        let calls = rig.host.take_log();
        assert!(calls[0].starts_with("HWPT_ALLOC") && !calls[0].contains("SSADE"), "{calls:?}");
        rig.configure(Requester::rid(A), Policy::Stage1(stage1)).unwrap();
        let calls = rig.host.take_log();
        assert!(calls[0].starts_with("HWPT_ALLOC") && calls[0].contains("SSADE"), "{calls:?}");
    }
    let counters = rig.nesting.counters();
    assert_eq!((counters.nested_allocs, counters.ssade_allocs), (4, 2));
    rig.ends_clean();
}

#[test]
fn a_table_off_its_page_never_reaches_the_host() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1008)).unwrap_err();
    rig.expect(&["DEVICE_DETACH #1"]);
    let rig = Rig::walking();
    rig.configure(Requester::rid(A), nested(0x1000, 0x2008)).unwrap_err();
    rig.configure(Requester::rid(A), nested(0x1008, 0x2000)).unwrap_err();
    rig.expect(&["DEVICE_DETACH #1"]);
}

#[test]
fn a_requester_without_a_device_is_blocked_already() {
    let rig = Rig::new();
    let nobody = Requester::rid(Bdf::from_raw(0x99));
    rig.configure(nobody, BLOCKED).unwrap();
    let error = rig.configure(nobody, Policy::Bypass).unwrap_err();
    assert!(error.to_string().contains("00:13.1"), "{error}");
    rig.nesting.state().forget_pasids(nobody.rid).unwrap();
    rig.expect(&[]);
}
