// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshot, restore and reset of an SMMU.
//!
//! A snapshot has the decisions that the host was given, not what the stream table says by then:
//! the guest may have written entries that it has yet to announce. What the host has cached is not
//! part of it. A cache may drop anything at any time (§3.17), so a new host that starts without is
//! one that the guest has to expect. Nor are page requests and stalled transactions without an
//! answer: devices make them again on the new host, and what the guest says to the former ones has
//! no effect, unless the new host gives a tag or an index again that is in one of these records.
//! Between two slices of the command queue nothing is under way.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::config::{Capabilities, SmmuConfigError};
use super::fault_log::{FaultLog, InterruptConfig};
use super::output_queue::OutputQueue;
use super::policy::{is_possible, policy_while_disabled};
use super::state::{DecisionState, Registers, SmmuState, StreamState, MODEL};
use super::{ConfigFault, Smmu, SmmuHostSide, SmmuInterrupts, StreamPolicy};
use crate::spec::smmuv3::command::Command;
use crate::spec::smmuv3::event::EventId;
use crate::viommu::ledger::Entries;
use crate::viommu::restore::{check_version, give_all};
use crate::viommu::{
    HostSideError, Observer, PagedRegisters, RestoreError, SnapshotError, TableMemory,
};

impl Smmu {
    /// The state at one moment, for [`Smmu::restore`].
    ///
    /// For a state that is worth restoring, vCPUs and the DMA of devices have been stopped before,
    /// and events that the host had for them were delivered. No [`Smmu::add_device`] or
    /// [`Smmu::remove_device`] may be under way: the state may or may not have the stream.
    ///
    /// # Errors
    /// The SMMU is halted: it may have dropped a command that the guest waits for.
    pub fn snapshot(&self) -> Result<SmmuState, SnapshotError> {
        self.take_page_back();
        let registers = self.lock();
        if self.is_halted() {
            return Err(SnapshotError::Halted { model: MODEL });
        }
        let (table, streams) = self.streams.snapshot();
        Ok(SmmuState {
            version: SmmuState::VERSION,
            config: self.config.clone(),
            registers: registers.clone(),
            faults: self.fault_log().clone(),
            table,
            unapplied: self.streams.has_unapplied(),
            streams,
        })
    }

    /// An SMMU that goes on where [`Smmu::snapshot`] left off, with guest memory as it was.
    ///
    /// `host` has all of the streams, blocked, and nothing else: it is given every decision again.
    /// It must be able to serve `state.config`:
    /// [`SmmuConfig::intersect`](super::SmmuConfig::intersect) with its SMMUs changes nothing.
    /// Counters start at 0.
    ///
    /// Afterwards, the host is given the SMMU as its fault target. Then, with interrupt controllers
    /// restored and before vCPUs start, [`Smmu::drain_queue`] goes on with the command queue: the
    /// guest may do nothing but wait for its end.
    ///
    /// # Errors
    /// The state is of another version or not one of an SMMU, or the host refused part of it. The
    /// host then blocks all that it was given, see [`RestoreError::Refused`].
    pub fn restore(
        state: &SmmuState,
        memory: Arc<dyn TableMemory>,
        host: Arc<dyn SmmuHostSide>,
        interrupts: Arc<dyn SmmuInterrupts>,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Arc<Self>, RestoreError> {
        state.check()?;
        let smmu =
            Self::build(&state.config, memory, host, interrupts, observer).map_err(impossible)?;
        *smmu.lock() = state.registers.clone();
        *smmu.fault_log() = state.faults.clone();
        smmu.streams.set_table(state.table);
        smmu.streams.set_recording_bad_streams(state.registers.cr2.recinvsid());
        for stream in &state.streams {
            smmu.streams.add(stream.stream);
        }
        smmu.give_again(&state.streams)?;
        if state.unapplied {
            smmu.streams.set_unapplied();
        }
        Ok(Arc::new(smmu))
    }

    /// Gives the decisions of `streams` to the host, or none of them.
    fn give_again(&self, streams: &[StreamState]) -> Result<(), RestoreError> {
        let decisions = || streams.iter().filter_map(|it| Some((it.stream, it.decision?)));
        let give = |stream, decision: DecisionState| {
            let policy = decision.policy.unwrap_or(StreamPolicy::Abort);
            let result = self.host.configure(stream, &policy);
            self.policy_given(stream, &policy, &result);
            if result.is_ok() {
                // One that was not applied is given once more when its entry is read again.
                self.streams.write().set(stream, decision.into());
            }
            result
        };
        give_all(decisions, give, |stream| self.take_away(stream)).map_err(|(stream, source)| {
            RestoreError::Refused { requester: format!("stream {stream}"), source }
        })
    }

    /// The SMMU is as after power-on, with the same streams behind it, and no longer halted.
    ///
    /// All transactions then pass, so what does DMA still has all of guest memory: vCPUs and
    /// devices are to be stopped and bus mastering cleared before. By the time this returns, no
    /// table of the guest is in use.
    ///
    /// # Errors
    /// The host refused part of it. What it did not let go of the tables it blocks, unless the
    /// error says [`HostSideError::still_reachable`]. Until a repeated reset succeeds, nothing else
    /// may be done with the SMMU.
    pub fn reset(&self) -> Result<(), HostSideError> {
        self.take_page_back();
        let mut registers = self.lock();
        if let (Some(observer), true) = (&self.observer, registers.cr0ack.smmuen()) {
            observer.disabling_translation();
        }
        *registers = Registers::default();
        // From here on, no new event is recorded.
        self.streams.set_table(None);
        self.streams.set_recording_bad_streams(false);
        *self.fault_log() = FaultLog::default();
        self.end_page_requests(None);
        self.end_stalls(None);
        let losses = self.streams.losses();
        let mut result = Ok(());
        let mut commands = vec![Command::TlbiNsnhAll];
        for stream in self.streams.all() {
            let given = self.try_give(stream, Ok(policy_while_disabled(registers.gbpa)));
            result = result.and(given.inspect_err(|error| {
                // Counted and logged: the caller learns of the first only.
                let _ = self.host_failed(error);
            }));
            commands.push(Command::CfgiCdAll { stream });
        }
        // Last, as DMA may have filled caches until then; they outlive the stream's policy.
        let invalidated = match self.invalidate_host(&commands) {
            Err(error) if !error.flushed => Err(error.error),
            _ => Ok(()),
        };
        result = result.and(invalidated);
        if result.is_ok() {
            self.streams.set_reapplied(losses);
            self.halted.store(false, Ordering::Relaxed);
        }
        result
    }
}

impl SmmuState {
    /// Whether it can be restored, as far as that is known without a host. [`Smmu::restore`]
    /// checks that, too; here it is known before devices are bound or attached for it.
    ///
    /// # Errors
    /// It is of another version, or not of an SMMU.
    pub fn check(&self) -> Result<(), RestoreError> {
        check_version(MODEL, self.version, Self::VERSION)?;
        let caps = self.config.capabilities().map_err(impossible)?;
        check(self, &caps).map_err(|what| RestoreError::Inconsistent { model: MODEL, what })
    }
}

fn impossible(error: SmmuConfigError) -> RestoreError {
    RestoreError::Config { model: MODEL, what: error.to_string() }
}

/// Whether an SMMU can be in this state, which may be from a file that someone changed.
fn check(state: &SmmuState, caps: &Capabilities) -> Result<(), String> {
    if !state.streams.is_sorted_by(|one, next| one.stream < next.stream) {
        return Err("the streams do not ascend".into());
    }
    let FaultLog { pages, pages_interrupt, .. } = &state.faults;
    let unused = (OutputQueue::default(), InterruptConfig::default());
    if !state.config.page_requests && (pages, pages_interrupt) != (&unused.0, &unused.1) {
        return Err("the PRI queue is in use, but no page requests are offered".into());
    }
    state.streams.iter().try_for_each(|stream| check_stream(stream, caps))
}

/// Whether a stream can have this decision.
fn check_stream(state: &StreamState, caps: &Capabilities) -> Result<(), String> {
    let StreamState { stream, decision } = *state;
    let Some(decision) = decision else { return Ok(()) };
    let bits = caps.idr1.sidsize();
    match decision.policy {
        // One beyond the table can be behind an SMMU all the same, but no entry is for it.
        Ok(StreamPolicy::Bypass | StreamPolicy::Stage1 { .. })
            if u64::from(stream.raw()) >> bits != 0 =>
        {
            Err(format!("stream {stream} has an entry, but StreamIDs have {bits} bits"))
        }
        Ok(StreamPolicy::Stage1 { ste }) if !is_possible(ste, caps) => {
            let [qw0, qw1] = ste;
            Err(format!("stream {stream} cannot have a stage 1 of {qw0:#x} {qw1:#x}"))
        }
        Err(ConfigFault { event, .. })
            if ![EventId::BadStreamId, EventId::SteFetch, EventId::BadSte].contains(&event) =>
        {
            let event = event.name();
            Err(format!("stream {stream} is blocked by {event}, which no entry causes"))
        }
        _ => Ok(()),
    }
}
