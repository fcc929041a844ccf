// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What every virtual IOMMU guarantees to its guest, on any architecture.

use std::cell::Cell;
use std::fmt::Debug;
use std::sync::Arc;
use std::thread;

use twostage::iommufd::{FaultQueue, PageResponseCode};
use twostage::spec::pci::Bdf;
use twostage_emulated::kit::Pages;
use twostage_emulated::{DmaError, GraphObject, ObjectGraph, ObjectKind};

use crate::common::{A, B, HIGH, HIGH_SIZE, PAGE};

/// An address without guest memory, which only stage 1 can map.
pub const IOVA: u64 = 0x7000_1234_5000;
/// The name of a stage 1 in invalidations: a domain ID, an ASID.
pub const NAME: u16 = 5;

/// Where a device's DMA goes according to the guest's tables.
#[derive(Debug, Clone, Copy)]
pub enum Way {
    Nowhere,
    Bypass,
    Stage1 { table: u64, name: u16 },
}

/// What a leaf of stage 1 maps.
#[derive(Debug, Clone, Copy)]
pub enum Leaf {
    /// 4 KiB.
    Page,
    /// 2 MiB.
    Large,
}

/// The unit's response to commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// They are complete.
    Done,
    /// One failed, and the guest gets an error.
    Stopped,
}

/// The reason for a failed DMA, as reported to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    NotMapped,
    WriteDenied,
    Other,
}

/// The report of a failed DMA to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub rid: Bdf,
    /// Of the page.
    pub address: u64,
    pub cause: Cause,
}

/// A whole stack in one process: a guest with its driver, a virtual IOMMU, nesting, an emulated
/// host with devices A and B.
pub trait Stack: Sized + Sync {
    /// A command that invalidates translations.
    type Invalidation: Copy + Debug;

    /// Whether an invalidation refused by the host is an error to the guest even if it was
    /// recovered.
    const REFUSALS_ARE_SHOWN: bool;

    /// Both devices added, translation disabled. Host call `failing` fails, counted from 1; 0:
    /// none.
    ///
    /// # Errors
    /// The graph of the host's objects after the failure.
    fn start(failing: u64) -> Result<Self, (String, ObjectGraph)>;

    fn memory(&self) -> &Pages;
    /// Enables translation, with tables that block every device except as set before.
    fn enable(&self);
    fn disable(&self);
    /// Maps `gpa` at `iova` in the stage 1 at `table`, initially a zeroed page.
    fn map(&self, table: u64, iova: u64, gpa: u64, leaf: Leaf, writable: bool);
    /// Unmaps a page.
    fn unmap(&self, table: u64, iova: u64);
    /// Changes the guest's tables, without invalidation.
    fn set(&self, rid: Bdf, way: Way);
    /// Invalidates the unit's cached tables of devices.
    fn flush_tables(&self) -> Completion;
    /// Invalidates translations.
    fn forget(&self, commands: &[Self::Invalidation]) -> Completion;
    /// Resumes after an error.
    fn resume(&self) -> Completion;
    /// The exact invalidation of a page of a stage 1.
    fn page_of(name: u16, iova: u64) -> Self::Invalidation;
    /// The invalidation of all of a stage 1.
    fn all_of(name: u16) -> Self::Invalidation;
    /// Commands that each cover the page at [`IOVA`] of [`NAME`].
    fn enough() -> Vec<Self::Invalidation>;
    /// Commands that do not.
    fn not_enough() -> Vec<Self::Invalidation>;
    /// Waits for the report of a failed DMA.
    fn fault(&self) -> Fault;
    /// Discards reports.
    fn drop_faults(&self);
    fn read(&self, rid: Bdf, iova: u64) -> Result<u64, DmaError>;
    fn write(&self, rid: Bdf, iova: u64, value: u64) -> Result<(), DmaError>;
    /// Removes a device, calls `between`, and adds it again: to the host, and to the virtual IOMMU.
    fn replug(&self, rid: Bdf, between: impl FnOnce(&Self));
    fn unmap_memory(&self, gpa: u64, length: u64);
    /// Attaches a device to the stage 1 at `table`, without the virtual unit's knowledge. Its page
    /// requests go to the returned queue.
    fn serve_page_requests(&self, rid: Bdf, table: u64) -> Arc<dyn FaultQueue>;
    /// Makes the `n`-th host call from now on (1 is the next) fail.
    fn fail_nth(&self, n: u64);
    /// Makes the next two host calls fail.
    fn fail_twice(&self);
    /// Whether a failure is still pending.
    fn is_armed(&self) -> bool;
    fn graph(&self) -> ObjectGraph;
    fn host_calls(&self) -> u64;
    fn refused_attaches(&self) -> u64;
    /// Ends everything, and returns the number of objects left in the host.
    fn end(self) -> usize;

    fn new() -> Self {
        Self::start(0).unwrap_or_else(|(error, _)| panic!("{error}"))
    }
}

/// A stack with device A on the returned table. [`IOVA`] maps to a page that starts with 1.
pub fn nested<S: Stack>() -> (S, u64, u64) {
    let stack = S::new();
    let (table, page) = (stack.memory().page(), stack.memory().page());
    stack.map(table, IOVA, page, Leaf::Page, true);
    stack.memory().store(page, 1);
    stack.set(A, Way::Stage1 { table, name: NAME });
    stack.enable();
    (stack, table, page)
}

/// A page that starts with `value`.
fn page_with<S: Stack>(stack: &S, value: u64) -> u64 {
    let page = stack.memory().page();
    stack.memory().store(page, value);
    page
}

pub fn a_dma_goes_through_both_stages<S: Stack>() {
    let (stack, _, page) = nested::<S>();
    assert_eq!(stack.read(A, IOVA), Ok(1));
    stack.write(A, IOVA + 8, 2).unwrap();
    assert_eq!(stack.memory().load(page + 8), 2);
    let graph = stack.graph();
    let parent = graph.of_kind(ObjectKind::HwptPaging).next().unwrap();
    assert!(parent.flags.contains(&"NEST_PARENT"), "{graph}");
    assert!(graph.of_kind(ObjectKind::HwptNested).next().is_some(), "{graph}");
    assert_eq!(stack.end(), 0);
}

pub fn large_pages_and_memory_above_4_gib<S: Stack>() {
    let (stack, table, _) = nested::<S>();
    let iova = 0x6000_0000_0000;
    stack.map(table, iova, HIGH, Leaf::Large, true);
    stack.forget(&[S::all_of(NAME)]);
    stack.memory().store(HIGH + 0x12_3458, 3);
    assert_eq!(stack.read(A, iova + 0x12_3458), Ok(3));
}

pub fn before_translation_a_device_passes<S: Stack>() {
    let stack = S::new();
    let page = page_with(&stack, 4);
    assert_eq!(stack.read(A, page), Ok(4));
}

pub fn without_tables_a_device_is_blocked_from_the_moment_of_enabling<S: Stack>() {
    let stack = S::new();
    let page = page_with(&stack, 4);
    stack.enable();
    assert!(stack.read(A, page).is_err() && stack.write(B, page, 1).is_err());
    stack.disable();
    assert_eq!(stack.read(A, page), Ok(4));
}

pub fn bypass_is_a_decision<S: Stack>() {
    let stack = S::new();
    let page = page_with(&stack, 5);
    stack.set(A, Way::Bypass);
    stack.enable();
    assert_eq!(stack.read(A, page), Ok(5));
    assert!(stack.read(B, page).is_err());
    stack.set(B, Way::Bypass);
    stack.set(A, Way::Nowhere);
    assert_eq!(stack.flush_tables(), Completion::Done);
    assert_eq!(stack.read(B, page), Ok(5));
    assert!(stack.read(A, page).is_err());
}

pub fn a_changed_leaf_is_stale_before_the_invalidation_and_new_after<S: Stack>() {
    for command in S::enough() {
        let (stack, table, _) = nested::<S>();
        let other = page_with(&stack, 2);
        assert_eq!(stack.read(A, IOVA), Ok(1));
        stack.map(table, IOVA, other, Leaf::Page, true);
        assert_eq!(stack.read(A, IOVA), Ok(1), "hardware caches");
        assert_eq!(stack.forget(&S::not_enough()), Completion::Done);
        assert_eq!(stack.read(A, IOVA), Ok(1), "nobody asked for this page");
        assert_eq!(stack.forget(&[command]), Completion::Done);
        assert_eq!(stack.read(A, IOVA), Ok(2), "{command:?}");
        stack.unmap(table, IOVA);
        assert_eq!(stack.forget(&[command]), Completion::Done);
        assert!(stack.read(A, IOVA).is_err());
        let fault = Fault { rid: A, address: IOVA, cause: Cause::NotMapped };
        assert_eq!(stack.fault(), fault);
    }
}

pub fn faults_reach_the_guest<S: Stack>() {
    let (stack, table, page) = nested::<S>();
    assert!(stack.read(A, IOVA + PAGE + 0x120).is_err());
    let fault = Fault { rid: A, address: IOVA + PAGE, cause: Cause::NotMapped };
    assert_eq!(stack.fault(), fault);
    stack.map(table, IOVA + 2 * PAGE, page, Leaf::Page, false);
    stack.forget(&[S::all_of(NAME)]);
    assert_eq!(stack.read(A, IOVA + 2 * PAGE), Ok(1));
    assert!(stack.write(A, IOVA + 2 * PAGE, 9).is_err());
    let fault = Fault { rid: A, address: IOVA + 2 * PAGE, cause: Cause::WriteDenied };
    assert_eq!(stack.fault(), fault);
    assert_eq!(stack.memory().load(page), 1);
    // Tables that map what is not guest memory.
    stack.map(table, IOVA + 3 * PAGE, HIGH + HIGH_SIZE, Leaf::Page, true);
    let error = stack.read(A, IOVA + 3 * PAGE).unwrap_err();
    assert!(matches!(error, DmaError::Fault { stage2: true, .. }), "{error}");
}

pub fn a_device_asks_for_a_page_and_goes_on<S: Stack>() {
    let (stack, table, _) = nested::<S>();
    assert!(stack.read(A, IOVA + PAGE).is_err(), "nobody serves page requests");
    let queue = stack.serve_page_requests(A, table);
    let page = stack.memory().page();
    thread::scope(|scope| {
        let dma = scope.spawn(|| stack.write(A, IOVA + PAGE + 8, 7));
        let group = loop {
            match queue.next_group().unwrap() {
                Some(group) => break group,
                None => assert!(!dma.is_finished(), "the device asks for no page"),
            }
            thread::yield_now();
        };
        let request = group.requests[0];
        assert!(request.permissions.write() && request.flags.last_page());
        assert_eq!((request.address, stack.memory().load(page + 8)), (IOVA + PAGE, 0));
        stack.map(table, IOVA + PAGE, page, Leaf::Page, true);
        queue.respond(group.cookie, PageResponseCode::Success).unwrap();
        assert_eq!(dma.join().unwrap(), Ok(()));
    });
    assert_eq!(stack.memory().load(page + 8), 7);
    assert_eq!(stack.read(A, IOVA), Ok(1));
}

pub fn changed_tables_count_from_their_flush_on<S: Stack>() {
    let (stack, _, _) = nested::<S>();
    let (table, page) = (stack.memory().page(), page_with(&stack, 2));
    stack.map(table, IOVA, page, Leaf::Page, true);
    stack.set(A, Way::Stage1 { table, name: NAME });
    assert_eq!(stack.read(A, IOVA), Ok(1));
    assert_eq!(stack.flush_tables(), Completion::Done);
    assert_eq!(stack.forget(&[S::all_of(NAME)]), Completion::Done);
    assert_eq!(stack.read(A, IOVA), Ok(2));
}

pub fn devices_with_the_same_tables_share_one_object<S: Stack>() {
    let (stack, table, _) = nested::<S>();
    let nested = |stack: &S| stack.graph().of_kind(ObjectKind::HwptNested).count();
    let before = nested(&stack);
    stack.set(B, Way::Stage1 { table, name: NAME });
    assert_eq!(stack.flush_tables(), Completion::Done);
    assert_eq!(stack.read(B, IOVA), Ok(1));
    assert!(nested(&stack) <= before, "{}", stack.graph());
    stack.map(table, IOVA, page_with(&stack, 2), Leaf::Page, true);
    assert_eq!(stack.forget(&[S::all_of(NAME)]), Completion::Done);
    assert_eq!((stack.read(A, IOVA), stack.read(B, IOVA)), (Ok(2), Ok(2)));
}

pub fn what_stands_before_an_ordering_point_is_one_host_call<S: Stack>() {
    let (stack, _, _) = nested::<S>();
    let before = stack.host_calls();
    let batch: Vec<_> = (0..100).map(|n| S::page_of(NAME, IOVA + n * PAGE)).collect();
    assert_eq!(stack.forget(&batch), Completion::Done);
    assert_eq!(stack.host_calls() - before, 1);
    // Unchanged tables only cost the invalidation of what they refer to.
    assert_eq!(stack.flush_tables(), Completion::Done);
    assert!(stack.host_calls() - before <= 2);
}

pub fn a_refused_attach_blocks_and_is_tried_again<S: Stack>() {
    let (stack, _, _) = nested::<S>();
    let (table, page) = (stack.memory().page(), page_with(&stack, 2));
    stack.map(table, IOVA, page, Leaf::Page, true);
    stack.set(A, Way::Stage1 { table, name: NAME });
    // HWPT_ALLOC, then DEVICE_ATTACH.
    stack.fail_nth(2);
    let told = stack.flush_tables();
    assert_eq!(stack.refused_attaches(), 1);
    assert!(stack.read(A, IOVA).is_err());
    stack.drop_faults();
    if told == Completion::Stopped {
        assert_eq!(stack.resume(), Completion::Done);
    }
    assert_eq!(stack.flush_tables(), Completion::Done);
    assert_eq!(stack.forget(&[S::all_of(NAME)]), Completion::Done);
    assert_eq!(stack.read(A, IOVA), Ok(2));
    assert_eq!(stack.end(), 0);
}

pub fn an_invalidation_that_fails_once_is_made_good<S: Stack>() {
    let (stack, table, _) = nested::<S>();
    assert_eq!(stack.read(A, IOVA), Ok(1));
    stack.unmap(table, IOVA);
    stack.fail_nth(1);
    let told = stack.forget(&[S::all_of(NAME)]);
    assert!(stack.read(A, IOVA).is_err());
    if S::REFUSALS_ARE_SHOWN {
        assert_eq!(told, Completion::Stopped);
        assert_eq!(stack.resume(), Completion::Done);
    } else {
        assert_eq!(told, Completion::Done);
    }
}

pub fn an_invalidation_that_cannot_be_done_stops_the_queue_and_leaves_nothing_stale<S: Stack>() {
    let (stack, table, _) = nested::<S>();
    assert_eq!(stack.read(A, IOVA), Ok(1));
    stack.map(table, IOVA, page_with(&stack, 2), Leaf::Page, true);
    stack.fail_twice();
    assert_eq!(stack.forget(&[S::all_of(NAME)]), Completion::Stopped);
    assert!(stack.read(A, IOVA).is_err(), "blocked, not stale");
    stack.drop_faults();
    assert_eq!(stack.resume(), Completion::Done);
    // Without another request: what was blocked because of the failure is served.
    assert_eq!(stack.read(A, IOVA), Ok(2));
}

pub fn a_device_that_comes_while_translation_is_enabled_is_blocked_all_along<S: Stack>() {
    let (stack, _, _) = nested::<S>();
    let page = page_with(&stack, 6);
    stack.replug(B, |stack| assert!(stack.read(B, page).is_err()));
    assert!(stack.read(B, page).is_err());
    stack.disable();
    assert_eq!(stack.read(B, page), Ok(6));
}

pub fn memory_that_is_taken_away_is_not_reached_any_more<S: Stack>() {
    let (stack, table, _) = nested::<S>();
    stack.map(table, IOVA, HIGH, Leaf::Page, true);
    assert_eq!(stack.forget(&[S::all_of(NAME)]), Completion::Done);
    assert_eq!(stack.read(A, IOVA), Ok(0));
    stack.unmap_memory(HIGH, HIGH_SIZE);
    let error = stack.read(A, IOVA).unwrap_err();
    assert!(matches!(error, DmaError::Fault { stage2: true, .. }), "{error}");
}

/// Faults are delivered to the guest while invalidations hold every lock above the host and wait
/// for DMA: with one lock too many, this test hangs.
pub fn faults_and_invalidations_do_not_wait_for_each_other<S: Stack>() {
    let (stack, _, _) = nested::<S>();
    std::thread::scope(|scope| {
        let faults = scope.spawn(|| {
            for _ in 0..2000 {
                assert!(stack.read(A, IOVA + PAGE).is_err());
            }
        });
        while !faults.is_finished() {
            assert_eq!(stack.forget(&[S::all_of(NAME)]), Completion::Done);
            stack.drop_faults();
        }
    });
}

/// Every host call of a guest's life fails in turn: no panic, no leak; completed invalidations are
/// never stale; what does not work is blocked.
pub fn every_host_call_fails_in_turn<S: Stack>() {
    let calls = (1..1000).find(|n| !live::<S>(*n)).expect("a life ends");
    assert!(calls > 20, "only {calls} calls were made to fail");
}

/// Runs a life with the `n`-th call failing; returns whether there was such a call.
fn live<S: Stack>(n: u64) -> bool {
    let stack = match S::start(n) {
        Ok(stack) => stack,
        Err((error, graph)) => {
            assert!(error.contains("ENOMEM"), "call {n}: {error}");
            let device = |object: &GraphObject| object.kind == ObjectKind::Device;
            assert!(graph.objects.iter().all(device), "call {n} failed, and left\n{graph}");
            return true;
        }
    };
    let memory = stack.memory();
    let tables = [memory.page(), memory.page()];
    for (table, value) in tables.into_iter().zip([1, 2]) {
        stack.map(table, IOVA, page_with(&stack, value), Leaf::Page, true);
    }
    // Resuming after an error also informs the guest.
    let done = |completion| {
        if completion == Completion::Stopped {
            assert_eq!(stack.resume(), Completion::Done, "call {n}");
        }
    };
    let armed = Cell::new(true);
    // Each finds what the guest's tables say; or, if a call failed in this step, is blocked, and
    // finds it after the next invalidation.
    let check = |step: &str, finds: [Option<u64>; 2]| {
        let failed = armed.replace(stack.is_armed()) && !stack.is_armed();
        let read = || [A, B].map(|rid| stack.read(rid, IOVA).ok());
        let first = read();
        for (found, finds) in first.into_iter().zip(finds) {
            let blocked = failed && found.is_none();
            assert!(found == finds || blocked, "call {n}: {step}: {first:?}");
        }
        if first != finds {
            done(stack.flush_tables());
            done(stack.forget(&[NAME, NAME + 1, NAME + 2].map(S::all_of)));
            assert_eq!(read(), finds, "call {n}: {step}, and invalidated again");
        }
        stack.drop_faults();
    };
    let set = |rid, table: usize, name| {
        stack.set(rid, Way::Stage1 { table: tables[table], name });
        done(stack.flush_tables());
        done(stack.forget(&[S::all_of(name)]));
    };
    stack.enable();
    check("enabled", [None, None]);
    set(A, 0, NAME);
    check("A nested", [Some(1), None]);
    set(B, 0, NAME + 2);
    check("shared", [Some(1), Some(1)]);
    stack.map(tables[0], IOVA, page_with(&stack, 3), Leaf::Page, true);
    done(stack.forget(&[NAME, NAME + 2].map(|name| S::page_of(name, IOVA))));
    check("changed leaf", [Some(3), Some(3)]);
    set(A, 1, NAME + 1);
    check("changed table", [Some(2), Some(3)]);
    stack.unmap(tables[1], IOVA);
    done(stack.forget(&[S::all_of(NAME + 1)]));
    check("unmapped", [None, Some(3)]);
    stack.set(B, Way::Nowhere);
    done(stack.flush_tables());
    check("B gone", [None, None]);
    set(A, 0, NAME);
    check("A back", [Some(3), None]);
    stack.disable();
    assert!(stack.read(A, IOVA).is_err());
    let armed = stack.is_armed();
    assert_eq!(stack.end(), 0, "call {n} failed, and objects leaked");
    !armed
}

/// The tests above, for the stack `$stack`.
macro_rules! conformance {
    ($stack:ty: $($case:ident)*) => {
        mod conformance {
            use super::*;

            $(#[test]
            fn $case() {
                crate::conformance::$case::<$stack>();
            })*
        }
    };
    ($stack:ty) => {
        $crate::conformance::conformance! { $stack, mirrored and
            a_dma_goes_through_both_stages a_device_asks_for_a_page_and_goes_on
            devices_with_the_same_tables_share_one_object a_refused_attach_blocks_and_is_tried_again
            what_stands_before_an_ordering_point_is_one_host_call
        }
    };
    // Without those that count calls of nesting, or use its objects themselves.
    ($stack:ty, mirrored $(and $($case:ident)*)?) => {
        $crate::conformance::conformance! { $stack:
            $($($case)*)?
            large_pages_and_memory_above_4_gib
            before_translation_a_device_passes
            without_tables_a_device_is_blocked_from_the_moment_of_enabling
            bypass_is_a_decision
            a_changed_leaf_is_stale_before_the_invalidation_and_new_after
            faults_reach_the_guest
            changed_tables_count_from_their_flush_on
            an_invalidation_that_fails_once_is_made_good
            an_invalidation_that_cannot_be_done_stops_the_queue_and_leaves_nothing_stale
            a_device_that_comes_while_translation_is_enabled_is_blocked_all_along
            memory_that_is_taken_away_is_not_reached_any_more
            faults_and_invalidations_do_not_wait_for_each_other
            every_host_call_fails_in_turn
        }
    };
}
pub(crate) use conformance;
