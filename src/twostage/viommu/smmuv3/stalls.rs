// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Transactions that stall (§3.12.2): their records, and what the guest says about them
//! (CMD_RESUME, CMD_STALL_TERM, §4.7).
//!
//! A stalled transaction is *open* from its record until the guest resumes it. Its record is never
//! lost: while the event queue cannot take it, it is *held*, and written, oldest first, once the
//! queue can (§7.2.1). A CMD_SYNC first takes what the host still has, so that a stream makes
//! progress beside a guest that invalidates without end. What it cannot record before it completes
//! is tried again: a later record could tell of tables that the guest has invalidated (§4.7.3).
//! One that the host reports after the CMD_SYNC, for a fault before it, has a record all the same,
//! as has one whose page is there by now: the guest resumes it, and it is translated anew.
//!
//! Each has exactly one answer. The host answers by itself where it replaces what the stream is
//! attached to, for every substream: with an abort, as Linux does, though the architecture would
//! let it stall on. It stays open here until the guest resumes it, to no effect by then.
//!
//! The lock here is taken after that of the registers, for a moment, and before that of the queue.
//! The host is answered without it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::MutexGuard;

use super::fault_log::{Recorded, Signal};
use super::{Smmu, StalledTransaction};
use crate::spec::pci::PageResponse;
use crate::spec::smmuv3::event::{Event1, EventClass, EventId, EventRecord};
use crate::spec::smmuv3::page_request::Resume;
use crate::spec::smmuv3::regs::STALL_NONE;
use crate::spec::smmuv3::StreamId;
use crate::viommu::{FaultOutcome, PageTicket};

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Stalls {
    /// By stream and stall tag.
    open: BTreeMap<(StreamId, u16), PageTicket>,
    held: VecDeque<(EventRecord, PageTicket)>,
    /// How many CMD_SYNC there were.
    epoch: u64,
}

/// What is to be sent after the lock is released.
#[derive(Debug, Default)]
struct Told {
    signals: Vec<Signal>,
    records: Vec<EventRecord>,
    answers: Vec<(StreamId, PageTicket)>,
}

impl Stalls {
    /// Holds a transaction until the event queue takes its record. Returns the former one with its
    /// tag, if that is held: the host has ended that, or it would not use the tag again.
    fn hold(
        &mut self,
        transaction: &StalledTransaction,
        ticket: PageTicket,
    ) -> Option<(StreamId, PageTicket)> {
        let tag = |record: &EventRecord| (record.stream(), record.qw1.stag());
        let record = record(transaction);
        let former = self.held.iter().position(|(held, _)| tag(held) == tag(&record));
        let former = former.and_then(|number| self.held.remove(number));
        self.held.push_back((record, ticket));
        former.map(|(record, ticket)| (record.stream(), ticket))
    }

    /// Takes the tickets of all, open or held, or those of `stream`.
    fn take(&mut self, stream: Option<StreamId>) -> Vec<(StreamId, PageTicket)> {
        let of = |it: StreamId| stream.is_none_or(|stream| stream == it);
        let all = std::mem::take(&mut self.open).into_iter();
        let (open, left): (Vec<_>, _) = all.partition(|((it, _), _)| of(*it));
        self.open = left.into_iter().collect();
        let open = open.into_iter().map(|((stream, _), ticket)| (stream, ticket));
        let mut taken: Vec<_> = open.collect();
        let all = std::mem::take(&mut self.held).into_iter();
        let (held, left): (Vec<_>, Vec<_>) = all.partition(|(record, _)| of(record.stream()));
        self.held = left.into();
        taken.extend(held.into_iter().map(|(record, ticket)| (record.stream(), ticket)));
        taken
    }
}

impl Smmu {
    fn stalls(&self) -> MutexGuard<'_, Stalls> {
        self.stalls.lock()
    }

    pub(super) fn offers_stalls(&self) -> bool {
        self.caps.idr0.stall_model() != STALL_NONE
    }

    /// See [`super::EventTarget::stall_epoch`].
    pub(super) fn epoch_of_stalls(&self) -> u64 {
        self.stalls().epoch
    }

    /// See [`super::EventTarget::stalled`].
    pub(super) fn take_stalled(
        &self,
        transaction: &StalledTransaction,
        ticket: PageTicket,
        epoch: u64,
    ) -> Option<PageResponse> {
        let mut stalls = self.stalls();
        // With the lock, so that what ends all of them ends this one, too, or it is not opened.
        if !self.offers_stalls() || !self.serves(transaction.stream) {
            drop(stalls);
            self.counters.stalls_refused.count();
            return Some(PageResponse::InvalidRequest);
        }
        if epoch != stalls.epoch {
            drop(stalls);
            self.counters.stalls_retried.count();
            return Some(PageResponse::Success);
        }
        let former = stalls.hold(transaction, ticket);
        let mut told = self.write_held(&mut stalls);
        told.answers.extend(former);
        let held = stalls.held.len() as u64;
        drop(stalls);
        if held != 0 {
            self.counters.stalls_held.count();
        }
        self.tell(told);
        None
    }

    /// The event queue may take records by now.
    pub(super) fn record_held(&self) {
        let mut stalls = self.stalls();
        if stalls.held.is_empty() {
            return;
        }
        let told = self.write_held(&mut stalls);
        drop(stalls);
        self.tell(told);
    }

    /// Writes what is held, as far as the event queue takes it.
    fn write_held(&self, stalls: &mut Stalls) -> Told {
        let mut told = Told::default();
        let mut log = self.fault_log();
        while let Some((record, ticket)) = stalls.held.front().copied() {
            let (recorded, signal) = log.record(self.offered, &*self.memory, record);
            told.signals.extend(signal);
            if recorded != Recorded::Yes {
                break;
            }
            stalls.held.pop_front();
            // A host uses no tag again before its transaction has gone on.
            let key = (record.stream(), record.qw1.stag());
            let former = stalls.open.insert(key, ticket);
            told.answers.extend(former.map(|former| (record.stream(), former)));
            told.records.push(record);
        }
        told
    }

    fn tell(&self, told: Told) {
        let Told { signals, records, answers } = told;
        self.counters.stalls.add(records.len() as u64);
        records.iter().for_each(|record| self.observe_event(record, FaultOutcome::Recorded));
        signals.into_iter().for_each(|signal| self.send(Some(signal)));
        self.answer_stalls(answers, PageResponse::InvalidRequest);
    }

    fn answer_stalls(&self, all: Vec<(StreamId, PageTicket)>, response: PageResponse) {
        all.into_iter().for_each(|(stream, ticket)| self.host.respond(stream, ticket, response));
    }

    /// A CMD_RESUME. One for a transaction that is not open has no effect.
    pub(super) fn resume(&self, stream: StreamId, stag: u16, resume: Resume) {
        let open = self.stalls().open.remove(&(stream, stag));
        let Some(ticket) = open else {
            self.log.warn(format_args!(
                "SMMUv3: CMD_RESUME of stream {stream}, STAG {stag:#x}: nothing is stalled"
            ));
            return;
        };
        let response = match resume {
            Resume::Retry => PageResponse::Success,
            // With stalls, termination is always an abort (IDR0.TERM_MODEL).
            Resume::Abort | Resume::Terminate => PageResponse::InvalidRequest,
        };
        self.host.respond(stream, ticket, response);
    }

    /// Ends everything that is stalled, or what is of `stream`, with an abort.
    pub(super) fn end_stalls(&self, stream: Option<StreamId>) {
        let ended = self.stalls().take(stream);
        self.answer_stalls(ended, PageResponse::InvalidRequest);
    }

    /// Holds what the host has not given yet, and writes what the event queue takes; what is of the
    /// stream `ended` is refused.
    fn hold_unread(&self, ended: Option<StreamId>) -> (MutexGuard<'_, Stalls>, Told) {
        // Before the lock: the host's is not taken with it.
        let unread = self.host.take_unread();
        let (mut stalls, mut refused) = (self.stalls(), Vec::new());
        for (transaction, ticket) in unread {
            let stream = transaction.stream;
            match self.serves(stream) && ended != Some(stream) {
                true => refused.extend(stalls.hold(&transaction, ticket)),
                false => refused.push((stream, ticket)),
            }
        }
        let mut told = self.write_held(&mut stalls);
        told.answers.extend(refused);
        (stalls, told)
    }

    /// A CMD_STALL_TERM: what is stalled of `stream` ends, also what the host has not given yet.
    pub(super) fn terminate_stalls(&self, stream: StreamId) {
        let (stalls, told) = self.hold_unread(Some(stream));
        drop(stalls);
        self.tell(told);
        self.end_stalls(Some(stream));
    }

    /// A CMD_SYNC is about to complete: what is stalled has a record, or is tried again.
    pub(super) fn settle_stalls(&self) {
        if !self.offers_stalls() {
            return;
        }
        let (mut stalls, told) = self.hold_unread(None);
        stalls.epoch = stalls.epoch.wrapping_add(1);
        let held = std::mem::take(&mut stalls.held);
        drop(stalls);
        self.tell(told);
        self.counters.stalls_retried.add(held.len() as u64);
        let of = |(record, ticket): (EventRecord, PageTicket)| (record.stream(), ticket);
        self.answer_stalls(held.into_iter().map(of).collect(), PageResponse::Success);
    }
}

/// The record of a stalled transaction (§7.3.13). Which of the faults that stall it has met, and in
/// which descriptor, hosts do not say: the address is not mapped, or not for that.
fn record(transaction: &StalledTransaction) -> EventRecord {
    let StalledTransaction { stream, substream, stag, address, write, execute, privileged } =
        *transaction;
    let qw1 = Event1::new()
        .with_stag(stag)
        .with_stall(true)
        .with_pnu(privileged)
        .with_ind(execute && !write)
        .with_rnw(!write)
        .with_class(EventClass::Input.into_bits());
    let event = EventRecord::new(EventId::Translation, stream, substream);
    EventRecord { qw1, input_address: address, ..event }
}
