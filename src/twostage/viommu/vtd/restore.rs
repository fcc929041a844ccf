// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshot, restore and reset of a unit.
//!
//! A snapshot has the decisions that the host was given, not what the tables say by then: the guest
//! may have written tables that it has yet to announce. What the host has cached is not part of it.
//! A cache may drop anything at any time (§6.1), so a new host that starts without is one that the
//! guest has to expect. Invalidations under way are not part of it either: IQH points to the first
//! of them, so they are repeated.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::config::{Capabilities, VtdConfigError};
use super::control::UnderWay;
use super::evaluation::{PASID_GONE, PASSING};
use super::fault_log::FaultLog;
use super::host_side::{Invalidation, Progress, VtdHostSide};
use super::page_requests::PageQueue;
use super::policy::{blocked_config, is_possible};
use super::requesters::{can_keep, Given};
use super::state::{FunctionState, PasidState, Registers, VtdState, MODEL};
use super::VtdIommu;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::viommu::ledger::Entries;
use crate::viommu::restore::{check_version, give_all};
use crate::viommu::{
    HostSideError, InterruptSink, Observer, PagedRegisters, Requester, RestoreError, SnapshotError,
    TableMemory,
};

impl VtdIommu {
    /// The state at one moment, for [`VtdIommu::restore`]. A command under way is completed first.
    ///
    /// For a state that is worth restoring, vCPUs and the DMA of devices have been stopped before,
    /// and guest memory is saved after, as this may write status words. No
    /// [`VtdIommu::add_device`] or [`VtdIommu::remove_device`] may be under way: the state would
    /// have a part of the function.
    ///
    /// # Errors
    /// The unit is halted: it may have dropped a command that the guest waits for.
    pub fn snapshot(&self) -> Result<VtdState, SnapshotError> {
        self.take_page_back();
        let registers = self.lock_idle();
        if self.is_halted() {
            return Err(SnapshotError::Halted { model: MODEL });
        }
        let (translating, functions) = self.requesters.snapshot();
        Ok(VtdState {
            version: VtdState::VERSION,
            config: self.config.clone(),
            registers: registers.clone(),
            faults: self.fault_log().clone(),
            page_requests: self.pages().queue.clone(),
            translating,
            unapplied: self.requesters.has_unapplied(),
            functions,
            interrupt_entries: self.remapping.cached(),
        })
    }

    /// A unit that goes on where [`VtdIommu::snapshot`] left off, with guest memory as it was.
    ///
    /// `host` has all of the functions, blocked, and nothing else: it is given every decision
    /// again. It must be able to serve `state.config`:
    /// [`VtdConfig::intersect`](super::VtdConfig::intersect) with its units changes nothing.
    /// Counters start at 0.
    ///
    /// Afterwards, the host is given the unit as its fault target. Then, with interrupt controllers
    /// restored and before vCPUs start, [`VtdIommu::drain_queue`] repeats the invalidations at the
    /// head of the queue: the guest may do nothing but wait for their end.
    ///
    /// # Errors
    /// The state is of another version or not one of a unit, or the host refused part of it. The
    /// host then blocks all that it was given, see [`RestoreError::Refused`].
    pub fn restore(
        state: &VtdState,
        memory: Arc<dyn TableMemory>,
        host: Arc<dyn VtdHostSide>,
        interrupts: Arc<dyn InterruptSink>,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Arc<Self>, RestoreError> {
        state.check()?;
        let unit =
            Self::build(&state.config, memory, host, interrupts, observer).map_err(impossible)?;
        *unit.fault_log() = state.faults.clone();
        unit.pages().queue = state.page_requests.clone();
        unit.remapping.set_cached(&state.interrupt_entries);
        unit.requesters.set_translating(state.translating.enabled, state.translating.root);
        for function in &state.functions {
            unit.requesters.add(function.rid);
        }
        unit.give_again(&state.functions)?;
        if state.unapplied {
            unit.requesters.set_unapplied();
        }
        let mut registers = unit.lock();
        *registers = state.registers.clone();
        unit.publish_remapping(&registers);
        drop(registers);
        Ok(Arc::new(unit))
    }

    /// Gives the decisions of `functions` to the host, or none of them.
    fn give_again(&self, functions: &[FunctionState]) -> Result<(), RestoreError> {
        let give = |requester, given: Given| {
            let result = self.host.configure(requester, &given.decision);
            self.policy_given(requester, &given.decision, &result);
            if result.is_ok() {
                // One that was not applied is given once more when its tables are read again.
                self.requesters.write().set(requester, given);
            }
            self.host.configured();
            result
        };
        give_all(|| decisions(functions), give, |requester| self.take_away(requester)).map_err(
            |(requester, source)| RestoreError::Refused {
                requester: requester.to_string(),
                source,
            },
        )
    }

    /// The unit is as after power-on, with the same functions behind it, and no longer halted.
    ///
    /// All requests without PASID then pass, so what does DMA still has all of guest memory: vCPUs
    /// and devices are to be stopped and bus mastering cleared before. By the time this returns, no
    /// table of the guest is in use.
    ///
    /// # Errors
    /// The host refused part of it. What it did not let go of the tables it blocks, unless the
    /// error says [`HostSideError::still_reachable`]. Until a repeated reset succeeds, nothing else
    /// may be done with the unit: it does not hold up the guest for what the host still owes.
    pub fn reset(&self) -> Result<(), HostSideError> {
        self.take_page_back();
        let mut registers = self.lock();
        if let (Some(observer), true) = (&self.observer, registers.gsts.tes()) {
            observer.disabling_translation();
        }
        *self.under_way() = UnderWay::default();
        *registers = Registers::default();
        // From here on, no new fault is recorded.
        self.requesters.set_translating(false, None);
        *self.fault_log() = FaultLog::new(self.config.fault_records);
        self.reset_page_requests();
        self.remapping.set_cached(&[]);
        self.publish_remapping(&registers);
        let losses = self.requesters.losses();
        let mut result = Ok(());
        for rid in self.requesters.functions() {
            result = result.and(self.leave_tables(rid));
        }
        // Last, as DMA may have filled caches until then.
        result = result.and(self.invalidate_all());
        if result.is_ok() {
            self.requesters.set_reapplied(losses);
            self.halted.store(false, Ordering::Relaxed);
        }
        result
    }

    /// Blocks the PASIDs of `rid`, and lets its other requests pass.
    fn leave_tables(&self, rid: Bdf) -> Result<(), HostSideError> {
        let give = |requester, config, refused| {
            self.try_give(requester, config, refused).inspect_err(|error| {
                // Counted and logged: the caller learns of the first only.
                let _ = self.host_failed(error);
            })
        };
        let mut result = Ok(());
        let mut next = self.requesters.pasid_from(rid, 0);
        while let Some(pasid) = next {
            let requester = Requester { rid, pasid: Some(pasid) };
            let config = blocked_config(requester, PASID_GONE);
            result = result.and(give(requester, config, PASID_GONE.reason));
            if self.requesters.has(requester, config) {
                self.requesters.forget_pasid(rid, pasid);
            }
            next = self.requesters.pasid_from(rid, pasid.raw() + 1);
        }
        let rest = give(Requester::rid(rid), PASSING, FaultReason::RootTableAddressInvalid);
        result.and(rest)
    }

    fn invalidate_all(&self) -> Result<(), HostSideError> {
        let mut progress = Progress::default();
        while !progress.is_done() {
            self.invalidate_host(&[Invalidation::ALL], &mut progress)?;
        }
        Ok(())
    }
}

/// The requesters that have a decision: of each function requests without PASID, then its PASIDs.
fn decisions(
    functions: &[FunctionState],
) -> impl DoubleEndedIterator<Item = (Requester, Given)> + '_ {
    functions.iter().flat_map(|function| {
        let rid = function.rid;
        let without = function.decision.map(|decision| (Requester::rid(rid), decision.into()));
        let pasids = function.pasids.iter().flat_map(move |run| {
            let pasids = (run.first..=run.last).filter_map(Pasid::new);
            pasids.map(move |pasid| (Requester { rid, pasid: Some(pasid) }, given_to(run, pasid)))
        });
        without.into_iter().chain(pasids)
    })
}

/// The decision for one of the PASIDs of `run`.
fn given_to(run: &PasidState, pasid: Pasid) -> Given {
    let mut given = Given::from(run.decision);
    given.decision.tag.pasid = pasid.raw();
    given
}

impl VtdState {
    /// Whether it can be restored, as far as that is known without a host. [`VtdIommu::restore`]
    /// checks that, too; here it is known before devices are bound or attached for it.
    ///
    /// # Errors
    /// It is of another version, or not of a unit.
    pub fn check(&self) -> Result<(), RestoreError> {
        check_version(MODEL, self.version, Self::VERSION)?;
        let caps = self.config.capabilities().map_err(impossible)?;
        check(self, &caps).map_err(|what| RestoreError::Inconsistent { model: MODEL, what })
    }
}

fn impossible(error: VtdConfigError) -> RestoreError {
    RestoreError::Config { model: MODEL, what: error.to_string() }
}

/// Whether a unit can be in this state, which may be from a file that someone changed.
fn check(state: &VtdState, caps: &Capabilities) -> Result<(), String> {
    let VtdState { config, registers, faults, functions, interrupt_entries, .. } = state;
    let records = faults.records.len();
    if records != usize::from(config.fault_records) {
        let configured = config.fault_records;
        return Err(format!("{records} fault records, but {configured} are configured"));
    }
    let next = faults.next;
    if usize::from(next) >= records {
        return Err(format!("fault record {next} is the next one, but there are {records}"));
    }
    let (head, step) = (registers.iqh.offset(), registers.iqa.descriptor_size());
    if !head.is_multiple_of(step) {
        return Err(format!("IQH is {head:#x}, which is inside a descriptor of {step} bytes"));
    }
    if head != 0 && !registers.gsts.qies() {
        return Err(format!("IQH is {head:#x}, but the queue is disabled"));
    }
    check_page_queue(&state.page_requests, config.page_requests)?;
    if !interrupt_entries.is_sorted_by(|one, next| one.index < next.index) {
        return Err("the cached interrupt entries do not ascend".into());
    }
    if !functions.is_sorted_by(|one, next| one.rid < next.rid) {
        return Err("the functions do not ascend".into());
    }
    functions.iter().try_for_each(|function| check_function(function, caps, config.pasids()))
}

/// Whether a unit that offers page requests, or not, can have this queue.
fn check_page_queue(queue: &PageQueue, offered: bool) -> Result<(), String> {
    for (name, pointer) in [("PQH", queue.head), ("PQT", queue.tail)] {
        let value = pointer.into_bits();
        if value & !PageQueue::POINTER != 0 {
            return Err(format!("{name} is {value:#x}, which is no place of a descriptor"));
        }
    }
    if !offered && *queue != PageQueue::default() {
        return Err("there is a page request queue, but no page requests are offered".into());
    }
    Ok(())
}

/// Whether a function can have these decisions.
fn check_function(
    function: &FunctionState,
    caps: &Capabilities,
    pasid_bits: u8,
) -> Result<(), String> {
    let rid = function.rid;
    if let Some(config) = function.decision.map(|decision| decision.config) {
        if !is_possible(config.policy, caps) {
            return Err(format!("{rid} cannot have {config:?}"));
        }
    }
    // PASID 0 is never configured apart from its function.
    let mut from = 1;
    for run in &function.pasids {
        let PasidState { first, last, .. } = *run;
        let pasids = || format!("PASIDs {first:#x} to {last:#x} of {rid}");
        if first < from || last < first {
            return Err(format!("{} do not ascend from {from:#x}", pasids()));
        }
        let (Some(pasid), Some(_)) = (Pasid::new(first), Pasid::new(last)) else {
            return Err(format!("{} have more than {} bits", pasids(), Pasid::BITS));
        };
        if last >> pasid_bits != 0 {
            return Err(format!("{} have more than {pasid_bits} bits", pasids()));
        }
        let config = run.decision.config;
        if !can_keep(pasid, run.decision.into()) || !is_possible(config.policy, caps) {
            return Err(format!("{} cannot have {config:?}", pasids()));
        }
        from = last + 1;
    }
    Ok(())
}
