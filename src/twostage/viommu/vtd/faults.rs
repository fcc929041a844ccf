// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA faults reported by the host, and what the guest is told of them (§7).
//!
//! For a requester blocked by the virtual unit: the reason of the block. For one that uses the
//! guest's tables: the reason of the walk, expressed in terms of the guest's own tables, as if the
//! host's stage 2 were the memory that contains them.
//!
//! # Tables that start to serve a requester without an invalidation
//! Without caching mode (CAP.CM, §6.1), entries that are not present or programmed wrongly are not
//! cached: software changes them without an invalidation, and the next request follows the new
//! entry. So before a request of a blocked requester fails, the tables are read again. A requester
//! that is served, whose entries may be cached, is not looked at.
//!
//! Each blocked request costs one read of the tables, however many requests there are and whoever
//! makes them; only those that are found to be served take the lock of the registers, for less than
//! a slice of other work.

use super::apply::is_blocked;
use super::host_side::{DmaFault, FaultTarget, PageTicket, Policy, RequesterConfig, Stage1};
use super::policy::{Blocked, Tables};
use super::requesters::{Given, Standing};
use super::{walk, VtdIommu};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::page_request::{PageRequest, PageResponse};
use crate::spec::vtd::regs::{Rtaddr, TranslationTableMode};
use crate::viommu::{FaultOutcome, MsiMessage, Requester};

impl FaultTarget for VtdIommu {
    fn dma_fault(&self, fault: &DmaFault) {
        let Some(standing) = self.requesters.standing(fault.requester) else {
            self.log.warn(format_args!("VT-d: a fault of the unknown device {}", fault.requester));
            return;
        };
        let explained = explain(standing, &self.tables(standing.root), fault);
        let outcome = match explained {
            Some(Blocked { reason, fault_disabled }) if reason.is_recorded(fault_disabled) => {
                let recorded = self.fault_log_for_event().record(fault, reason);
                self.recorded(recorded)
            }
            _ => {
                self.counters.faults_suppressed.count();
                FaultOutcome::Suppressed
            }
        };
        let reason = explained.map(|blocked| blocked.reason).or(fault.reason);
        if let Some(observer) = &self.observer {
            observer.fault(fault, reason, outcome);
        }
    }

    fn page_requests(&self, requests: &[PageRequest], ticket: PageTicket) -> Option<PageResponse> {
        self.take_page_requests(requests, ticket)
    }

    fn served_late(&self, requester: Requester) -> bool {
        if self.caps.cap.cm() || self.is_halted() {
            return false;
        }
        let Some(standing) = self.requesters.standing(requester) else { return false };
        // Another thread may have found it, and anything published as served has been applied by
        // the host.
        if !standing.translating || is_served(standing.given) {
            return standing.translating;
        }
        if is_blocked(&self.tables(standing.root).config(requester)) {
            return false;
        }
        // The caller delays others while it waits, so it waits for the lock only, and not for a
        // command to complete. What is configured here is withdrawn by a command that has yet to
        // process the requester, ...
        let registers = self.lock();
        // Everything may have changed since, and the function may be gone.
        let Some(standing) = self.requesters.standing(requester) else { return false };
        if !standing.translating || self.is_halted() {
            return false;
        }
        // ... and must not be configured if a command that disables translation has already
        // processed the requester.
        if !is_served(standing.given) && !self.under_way().has_disabled(requester) {
            // The caller gets the result; nothing is acknowledged to the guest.
            let _ = self.reevaluate_requester(requester, registers.root);
        }
        let served = is_served(self.requesters.given(requester));
        self.counters.found_served.add(served.into());
        served
    }
}

impl VtdIommu {
    /// Counts the outcome in the fault log, and sends its event.
    pub(super) fn recorded(&self, (recorded, msi): (bool, Option<MsiMessage>)) -> FaultOutcome {
        self.send(msi);
        if recorded {
            self.counters.faults_recorded.count();
            FaultOutcome::Recorded
        } else {
            self.counters.faults_lost.count();
            FaultOutcome::Lost
        }
    }
}

/// Whether the requester has a configuration other than a block, and the host has applied it.
fn is_served(given: Option<Given>) -> bool {
    given.is_some_and(|given| given.applied && !is_blocked(&given.decision))
}

/// Explains `fault`, given the state of its requester; `None` if the guest is told nothing, as
/// translation is not enabled.
fn explain(standing: Standing, tables: &Tables<'_>, fault: &DmaFault) -> Option<Blocked> {
    if !standing.translating {
        return None;
    }
    let config = match standing.given {
        Some(given) if is_blocked(&given.decision) && !tables.caps.cap.cm() => {
            // Blocking entries are not cached: these are the ones that blocked the request, unless
            // the host refused.
            let now = tables.config(fault.requester);
            if is_blocked(&now) {
                now
            } else {
                given.decision
            }
        }
        Some(given) => given.decision,
        None => tables.config_without_entry(fault.requester),
    };
    let legacy = standing.root.map(Rtaddr::mode) == Some(TranslationTableMode::Legacy);
    let reason = of_top_table(&config, tables, fault).or(fault.reason);
    let fault = &DmaFault { reason: reason.or_else(|| walked(&config, tables, fault)), ..*fault };
    let reason = match config.policy {
        Policy::Blocked(reason) => reason,
        // Nobody is offered execute requests (ECAP.ERS), and no table is asked.
        _ if fault.execute => FaultReason::ExecuteDisabled,
        Policy::Bypass if legacy => FaultReason::LegacyAddressBeyond,
        Policy::Bypass => FaultReason::AddressBeyondHost,
        Policy::Stage1(Stage1::VtdFirstStage(_)) => first_stage(fault),
        Policy::Stage1(Stage1::VtdSecondStage(_)) if legacy => legacy_second_stage(fault),
        Policy::Stage1(Stage1::VtdSecondStage(_)) => second_stage(fault),
        Policy::Stage1(Stage1::VtdNested(_)) => nested(fault),
    };
    Some(Blocked { reason, fault_disabled: config.fault_disabled })
}

/// The reason that the guest's tables have for the fault, if the host does not walk them and so has
/// none.
fn walked(config: &RequesterConfig, tables: &Tables<'_>, fault: &DmaFault) -> Option<FaultReason> {
    let Policy::Stage1(stage1) = config.policy else { return None };
    let cap = tables.caps.cap;
    let of_guest = walk::Tables::new(&stage1, cap.fs1gp(), cap.guest_address_width())?;
    of_guest.refusal(tables.memory, fault.address, fault.write)
}

/// The reason of the top first-stage table, if the fault is of that. A host has one reason for all
/// tables beyond its stage 2 (SFS.5); to the guest they are not memory, and of its tables the top
/// one has a reason of its own (SFS.4).
fn of_top_table(
    config: &RequesterConfig,
    tables: &Tables<'_>,
    fault: &DmaFault,
) -> Option<FaultReason> {
    let Policy::Stage1(Stage1::VtdFirstStage(first)) = config.policy else { return None };
    let beyond = fault.stage2 && fault.reason == Some(FaultReason::FirstStagePointerBeyond);
    (beyond && tables.memory.load_u64(first.table).is_err())
        .then_some(FaultReason::FirstStageTopAccess)
}

fn denied(fault: &DmaFault) -> FaultReason {
    if fault.write {
        FaultReason::WriteDenied
    } else {
        FaultReason::ReadDenied
    }
}

/// Through first-stage tables.
fn first_stage(fault: &DmaFault) -> FaultReason {
    use FaultReason as R;
    let host = fault.reason;
    if !fault.stage2 {
        return host.unwrap_or_else(|| denied(fault));
    }
    match host {
        Some(R::FirstStageTopAccess | R::FirstStageTopSecondStageDenied) => R::FirstStageTopAccess,
        Some(R::FirstStageAccess | R::FirstStagePointerBeyond | R::FirstStageSecondStageDenied) => {
            R::FirstStageAccess
        }
        Some(R::FirstStageFlagsSecondStageDenied | R::FirstStageFlagsUpdate) => {
            R::FirstStageFlagsUpdate
        }
        // The page itself is not memory that the request may access.
        _ => denied(fault),
    }
}

/// Through second-stage tables, in scalable mode.
fn second_stage(fault: &DmaFault) -> FaultReason {
    use FaultReason as R;
    match fault.reason {
        Some(reason) if !fault.stage2 => reason,
        Some(
            reason @ (R::SecondStageTopAccess | R::SecondStageAccess | R::SecondStageFlagsUpdate),
        ) => reason,
        _ => R::SecondStageDenied,
    }
}

/// Through first-stage tables over second-stage tables. The host tells which of the two refused;
/// where its own stage 2 did, the guest's second stage leads to what is not memory: a table of
/// either stage, or the page.
fn nested(fault: &DmaFault) -> FaultReason {
    use FaultReason as R;
    match fault.reason {
        None if !fault.stage2 => denied(fault),
        Some(
            R::FirstStageTopAccess
            | R::FirstStageAccess
            | R::FirstStagePointerBeyond
            | R::FirstStageTopSecondStageDenied
            | R::FirstStageSecondStageDenied
            | R::FirstStageFlagsSecondStageDenied
            | R::FirstStageFlagsUpdate,
        ) => first_stage(fault),
        _ => second_stage(fault),
    }
}

/// Through second-stage tables, in legacy mode: the same faults with their legacy codes.
fn legacy_second_stage(fault: &DmaFault) -> FaultReason {
    use FaultReason as R;
    match fault.reason {
        Some(R::SecondStageTopAccess | R::SecondStageAccess | R::LegacySecondStageAccess) => {
            R::LegacySecondStageAccess
        }
        Some(R::SecondStageReserved | R::LegacySecondStageReserved) if !fault.stage2 => {
            R::LegacySecondStageReserved
        }
        Some(R::AddressBeyondGuest | R::LegacyAddressBeyond) if !fault.stage2 => {
            R::LegacyAddressBeyond
        }
        Some(R::OutputInterruptRange | R::LegacyOutputInterruptRange) if !fault.stage2 => {
            R::LegacyOutputInterruptRange
        }
        _ if fault.write => R::LegacyWriteDenied,
        _ => R::LegacyReadDenied,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::pci::{Bdf, Pasid};
    use crate::spec::vtd::pasid::PagingMode;
    use crate::spec::vtd::root::AddressWidth;
    use crate::viommu::vtd::config::VtdConfig;
    use crate::viommu::vtd::host_side::{DomainTag, VtdFirstStage, VtdNested, VtdSecondStage};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const FIRST: Policy = Policy::Stage1(Stage1::VtdFirstStage(VtdFirstStage {
        table: 0x1000,
        paging_mode: PagingMode::Level4,
        supervisor_requests: false,
        write_protect: false,
        extended_accessed: false,
    }));
    const SECOND: Policy = Policy::Stage1(Stage1::VtdSecondStage(VtdSecondStage {
        table: 0,
        address_width: AddressWidth::Bits48,
        accessed_dirty: false,
    }));

    const NESTED: Policy = match (FIRST, SECOND) {
        (
            Policy::Stage1(Stage1::VtdFirstStage(first)),
            Policy::Stage1(Stage1::VtdSecondStage(second)),
        ) => Policy::Stage1(Stage1::VtdNested(VtdNested { first, second })),
        _ => unreachable!(),
    };

    fn of(policy: Policy, ttm: u8, fault: DmaFault, fault_disabled: bool) -> Option<Blocked> {
        with_memory(0x1000, policy, ttm, fault, fault_disabled)
    }

    fn with_memory(
        size: usize,
        policy: Policy,
        ttm: u8,
        fault: DmaFault,
        fault_disabled: bool,
    ) -> Option<Blocked> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let caps = VtdConfig::default().capabilities().unwrap();
        let root = Some(Rtaddr::new().with_ttm(ttm));
        let tables = Tables { memory: &memory, caps: &caps, root };
        let tag = DomainTag { domain: 1, pasid: 0 };
        let config = RequesterConfig { policy, tag, fault_disabled };
        let given = Some(Given::applied(config));
        explain(Standing { translating: true, root, given }, &tables, &fault)
    }

    fn fault(reason: u8, write: bool, stage2: bool) -> DmaFault {
        DmaFault {
            requester: Requester::rid(Bdf::from_raw(8)),
            address: 0x1000,
            write,
            execute: false,
            privileged: false,
            reason: FaultReason::from_code(reason),
            stage2,
        }
    }

    fn code(policy: Policy, ttm: u8, reason: u8, write: bool, stage2: bool) -> u8 {
        of(policy, ttm, fault(reason, write, stage2), false).unwrap().reason.code()
    }

    #[test]
    fn a_blocked_requester_gets_the_reason_of_its_blocking() {
        let policy = Policy::Blocked(FaultReason::ContextNotPresent);
        assert_eq!(code(policy, 1, 0x77, true, true), 0x41);
    }

    #[test]
    fn fpd_is_told_of_whatever_blocks() {
        let disabled = |policy, reason, fault_disabled| {
            of(policy, 1, fault(reason, true, false), fault_disabled).unwrap().fault_disabled
        };
        for fault_disabled in [false, true] {
            let blocked = Policy::Blocked(FaultReason::ContextNotPresent);
            assert_eq!(disabled(blocked, 0, fault_disabled), fault_disabled);
            assert_eq!(disabled(FIRST, 0x71, fault_disabled), fault_disabled);
        }
    }

    /// Whatever the host says of it: one that has mirrors, or nothing but its stage 2, has no
    /// reason or another one.
    #[test]
    fn an_execute_request_is_told_as_one() {
        for policy in [FIRST, SECOND, NESTED, Policy::Bypass] {
            for (reason, stage2) in [(0, false), (0x5c, false), (0x79, true)] {
                let fault = DmaFault { execute: true, ..fault(reason, false, stage2) };
                let explained = of(policy, 1, fault, false).unwrap();
                assert_eq!(explained.reason, FaultReason::ExecuteDisabled, "{policy:?} {reason}");
            }
        }
        let fault = DmaFault { execute: true, ..fault(0, false, false) };
        let blocked = Policy::Blocked(FaultReason::ContextNotPresent);
        assert_eq!(of(blocked, 1, fault, false).unwrap().reason.code(), 0x41);
    }

    #[test]
    fn first_stage_reasons_pass() {
        for reason in [0x71, 0x72, 0x80, 0x81, 0x85, 0x86] {
            assert_eq!(code(FIRST, 1, reason, true, false), reason);
        }
        // A host that gives no reason, or an undefined one: what the tables say, which are not
        // memory here, and the first of which translates nothing.
        assert_eq!(code(FIRST, 1, 0, true, false), 0x73);
        assert_eq!(code(FIRST, 1, 0xff, false, false), 0x73);
        assert_eq!(code(SECOND, 1, 0, true, false), 0x79);
        assert_eq!(code(SECOND, 0, 0, true, false), 0x05);
    }

    #[test]
    fn a_refusal_of_the_hosts_stage_2_is_told_as_the_guests_own() {
        let cases = [(0x73, 0x73), (0x75, 0x73), (0x70, 0x70), (0x76, 0x70)];
        for (host, guest) in cases.into_iter().chain([(0x77, 0x91), (0x91, 0x91), (0x79, 0x85)]) {
            assert_eq!(code(FIRST, 1, host, true, true), guest, "{host:#x}");
        }
        assert_eq!(code(FIRST, 1, 0x78, false, true), 0x86);
        for (host, guest) in [(0x7b, 0x7b), (0x78, 0x78), (0x79, 0x79), (0x84, 0x79)] {
            assert_eq!(code(SECOND, 1, host, true, true), guest, "{host:#x}");
        }
        assert_eq!(code(SECOND, 1, 0x7d, true, true), 0x7d);
        assert_eq!(code(Policy::Bypass, 1, 0x79, true, true), 0x83);
        assert_eq!(code(Policy::Bypass, 0, 0x79, true, true), 0x04);
    }

    /// The top table is at 0x1000.
    #[test]
    fn a_table_beyond_the_hosts_stage_2_is_the_top_one_if_that_is_no_memory() {
        for (size, reason) in [(0x1000, 0x73), (0x2000, 0x70)] {
            let explained = with_memory(size, FIRST, 1, fault(0x74, true, true), false).unwrap();
            assert_eq!(explained.reason.code(), reason, "{size:#x} bytes of memory");
        }
    }

    #[test]
    fn nested_reasons_are_those_of_the_stage_that_refused() {
        // The guest's stages, including what its second stage does to tables of its first.
        let of_the_guest = [0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a];
        for reason in of_the_guest.into_iter().chain([0x7b, 0x7d, 0x80, 0x81, 0x84, 0x85, 0x91]) {
            assert_eq!(code(NESTED, 1, reason, true, false), reason);
        }
        assert_eq!(code(NESTED, 1, 0, true, false), 0x85);
        // The host's stage 2 has no memory: for tables of the first stage, of the second, a page.
        let first = [(0x73, 0x73), (0x75, 0x73), (0x70, 0x70), (0x76, 0x70), (0x77, 0x91)];
        let second = [(0x7b, 0x7b), (0x78, 0x78), (0x7d, 0x7d), (0x79, 0x79), (0x84, 0x79)];
        for (host, guest) in first.into_iter().chain(second).chain([(0x85, 0x79), (0, 0x79)]) {
            assert_eq!(code(NESTED, 1, host, true, true), guest, "{host:#x}");
        }
    }

    #[test]
    fn legacy_mode_has_codes_of_its_own() {
        let cases = [(0x78, 7), (0x7b, 7), (0x7a, 0xc), (0x84, 4), (0x87, 0xe), (0x79, 5), (0, 5)];
        for (host, guest) in cases {
            assert_eq!(code(SECOND, 0, host, true, false), guest, "{host:#x}");
        }
        assert_eq!(code(SECOND, 0, 0x79, false, false), 0x06);
        assert_eq!(code(SECOND, 0, 0x79, false, true), 0x06);
    }

    #[test]
    fn without_translation_the_guest_is_told_nothing() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let caps = VtdConfig::default().capabilities().unwrap();
        let tables = Tables { memory: &memory, caps: &caps, root: None };
        let standing = Standing { translating: false, root: None, given: None };
        assert_eq!(explain(standing, &tables, &fault(0x71, true, false)), None);
    }

    #[test]
    fn a_pasid_that_was_given_nothing_is_explained_by_the_tables() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let caps = VtdConfig::default().capabilities().unwrap();
        let root = Some(Rtaddr::new().with_ttm(1));
        let tables = Tables { memory: &memory, caps: &caps, root };
        let standing = Standing { translating: true, root, given: None };
        let requester = Requester { rid: Bdf::from_raw(8), pasid: Pasid::new(3) };
        let fault = DmaFault { requester, ..fault(0, true, false) };
        let explained = explain(standing, &tables, &fault);
        assert_eq!(explained, Some(Blocked::recorded(FaultReason::RootNotPresent)));
    }
}
