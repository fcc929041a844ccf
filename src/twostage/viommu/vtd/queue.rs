// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The invalidation queue (§6.5.2), and the action for each descriptor.
//!
//! IOTLB invalidations are batched up to the next ordering point (a wait, an invalidation of the
//! context, PASID or interrupt entry cache, the tail) and given to the host in one call; those of
//! device TLBs follow, as devices ask the IOTLB (§6.5.2.5). Invalidations of the context and PASID
//! caches are batched up to any other descriptor, and tables are read once for all of them. IQH
//! moves past a descriptor only when it is done; a wait is answered before that. If the host cannot
//! do a batch, IQH stays at its first descriptor and the queue stops.
//!
//! The queue is processed in slices, from one ordering point to the next, up to a maximum number of
//! descriptors; a wait belongs to the slice that it ends. Reading the tables of many requesters
//! takes slices of its own, with IQH unchanged, and so do many device TLBs. A wait that drains page
//! requests waits for them between slices, with the registers unlocked.

use super::apply::{Scope, Scopes};
use super::evaluation::{Budget, By, Evaluation};
use super::fault_log::QueueError;
use super::host_side::{Invalidation, Progress};
use super::state::Registers;
use super::VtdIommu;
use std::time::{Duration, Instant};

use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::qi::{
    DecodeError, Descriptor, DeviceTlbRange, PasidCacheScope, StatusWrite, Words, WORDS,
};
use crate::spec::vtd::regs::{IqErrorInfo, QueuePointer, Rtaddr, TranslationTableMode};
use crate::viommu::ahead::{Ahead, Tally};
use crate::viommu::ledger::NotApplied;
use crate::viommu::register_page::Show;
use crate::viommu::Requester;

/// What is left of the queue after a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slice {
    /// Descriptors before the tail.
    More,
    /// Nothing, or nothing before the guest has cleared an error.
    Done,
    /// A wait, once the host side has drained page requests, which is this far.
    Draining(Progress),
}

/// Why the queue stops before the tail.
enum Stop {
    /// The descriptor at the fetch pointer, or a register of the queue, is wrong.
    Guest(IqErrorInfo),
    /// The host could not do the batch.
    Host,
    /// The unit was halted.
    Halted,
    /// A wait followed a device-TLB invalidation that no device answered.
    TimeOut(Bdf),
}

/// How much of the batch is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flushed {
    All,
    /// Some: the registers are unlocked before the rest.
    Some,
}

/// Maximum number of descriptors in one slice.
const SLICE: usize = 1024;

/// Device TLBs that are invalidated in one slice: each may wait for a request of its device.
const DEVICES: usize = 32;

/// How long page requests are drained before the queue stops: they come from a thread that never
/// blocks.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// One slice of the queue. Invalidations of one kind at a time are batched.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// Offset of the next descriptor to fetch, in bytes.
    fetch: u64,
    /// IOTLB invalidations since the last ordering point.
    batch: Vec<Invalidation>,
    /// How much of them is done.
    progress: Progress,
    /// Device-TLB invalidations since then.
    devices: Vec<(Bdf, Option<Pasid>, DeviceTlbRange)>,
    /// Invalidations of the context and PASID caches since then.
    scopes: Scopes,
    /// The one in progress.
    evaluation: Option<Evaluation>,
    /// How far page requests are drained for the wait to fetch next, and since when.
    draining: Option<(Progress, Instant)>,
}

impl Pass {
    fn is_empty(&self) -> bool {
        self.has_no_invalidations() && self.scopes.is_empty() && self.evaluation.is_none()
    }

    fn has_no_invalidations(&self) -> bool {
        self.batch.is_empty() && self.devices.is_empty()
    }

    /// Whether the batch must be done before `descriptor`.
    fn is_ordered_before(&self, descriptor: &Descriptor) -> bool {
        match descriptor {
            Descriptor::Iotlb { .. }
            | Descriptor::PasidIotlb { .. }
            | Descriptor::DeviceTlb { .. }
            | Descriptor::PasidDeviceTlb { .. } => !self.scopes.is_empty(),
            Descriptor::ContextCache(_) | Descriptor::PasidCache(_) => !self.has_no_invalidations(),
            Descriptor::Wait { .. }
            | Descriptor::InterruptEntryCache(_)
            | Descriptor::PageGroupResponse { .. } => !self.is_empty(),
        }
    }
}

impl VtdIommu {
    /// Works through the queue up to the next ordering point, its tail or its first error. A
    /// command under way comes first: invalidations depend on its outcome.
    pub(super) fn run_slice(&self, registers: &mut Registers) -> Slice {
        if self.run_command(registers) == Slice::More {
            return Slice::More;
        }
        if !registers.gsts.qies() || self.fault_log().holds_queue() {
            return Slice::Done;
        }
        let begun = self.under_way().queue.take();
        // A slice that ended at the tail may have left an error to raise.
        if begun.is_none() && registers.iqh == registers.iqt && registers.unanswered.is_none() {
            return Slice::Done;
        }
        let mut pass = begun.unwrap_or_else(|| {
            let spare = self.under_way().spare.take().unwrap_or_default();
            Pass { fetch: registers.iqh.offset(), ..spare }
        });
        let result = check_queue(registers, self.caps.ecap.smts())
            .map_err(Stop::Guest)
            .and_then(|()| self.walk(registers, &mut pass));
        match result {
            Ok(slice) => {
                let done = pass.is_empty() && pass.draining.is_none();
                let mut under_way = self.under_way();
                let kept = if done { &mut under_way.spare } else { &mut under_way.queue };
                *kept = Some(pass);
                slice
            }
            Err(stop) => self.stop_queue(registers, pass, stop),
        }
    }

    fn walk(&self, registers: &mut Registers, pass: &mut Pass) -> Result<Slice, Stop> {
        if !pass.is_empty() && self.flush(registers, pass)? == Flushed::Some {
            return Ok(Slice::More);
        }
        let size = registers.iqa.size();
        let step = registers.iqa.descriptor_size();
        let draining = pass.draining.take();
        let tail = registers.iqt.offset();
        let mut ahead = Ahead::default();
        let mut tally = Tally::default();
        for _ in 0..SLICE {
            if pass.fetch == tail {
                let flushed = self.flush(registers, pass)?;
                return match registers.unanswered {
                    _ if flushed == Flushed::Some => Ok(Slice::More),
                    Some(device) => Err(Stop::TimeOut(device)),
                    None => Ok(Slice::Done),
                };
            }
            let descriptor = self.fetch(registers, pass.fetch, &mut ahead).map_err(Stop::Guest)?;
            if pass.is_ordered_before(&descriptor) {
                let flushed = self.flush(registers, pass)?;
                // A wait is little work: it ends this slice, rather than being fetched again.
                if flushed == Flushed::Some || !matches!(descriptor, Descriptor::Wait { .. }) {
                    return Ok(Slice::More);
                }
            }
            if self.is_halted() {
                return Err(Stop::Halted);
            }
            if let Some((progress, since)) = self.drain_before(registers, &descriptor, draining) {
                if since.elapsed() > DRAIN_TIME {
                    return Err(Stop::Host);
                }
                pass.draining = Some((progress, since));
                return Ok(Slice::Draining(progress));
            }
            tally.count(self.counters.of(&descriptor));
            if let Some(observer) = &self.observer {
                observer.descriptor(descriptor.name(), &descriptor);
            }
            let next = (pass.fetch + step) % size;
            if matches!(descriptor, Descriptor::Wait { .. }) {
                // Whoever sees its status finds the head behind it.
                registers.iqh = QueuePointer::from_offset(next);
            }
            self.perform(registers, pass, &descriptor);
            pass.fetch = next;
            if pass.is_empty() {
                registers.iqh = QueuePointer::from_offset(pass.fetch);
            }
            match (&descriptor, registers.unanswered) {
                (Descriptor::Wait { .. }, Some(device)) => return Err(Stop::TimeOut(device)),
                (Descriptor::Wait { .. } | Descriptor::InterruptEntryCache(_), _)
                    if pass.fetch != tail =>
                {
                    return Ok(Slice::More);
                }
                _ => {}
            }
        }
        // The end of the queue may be left to a later slice, too.
        self.flush(registers, pass)?;
        Ok(Slice::More)
    }

    /// Reads and decodes the descriptor at `offset` of the queue.
    fn fetch(
        &self,
        registers: &Registers,
        offset: u64,
        ahead: &mut Ahead,
    ) -> Result<Descriptor, IqErrorInfo> {
        let (tail, end) = (registers.iqt.offset(), registers.iqa.size());
        let until = if offset < tail { tail } else { end };
        let size = registers.iqa.descriptor_size() as usize;
        let bytes = ahead.entry(&*self.memory, registers.iqa.base(), offset, until, size);
        let bytes = bytes.ok_or(IqErrorInfo::FetchError)?;
        // There are two or four words.
        let mut words: Words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let descriptor = Descriptor::decode(words).map_err(|error| match error {
            DecodeError::Type(_) => IqErrorInfo::InvalidType,
            DecodeError::Reserved(_) => IqErrorInfo::ReservedField,
        })?;
        let scalable = mode(registers) == Some(TranslationTableMode::Scalable);
        self.caps.check(scalable, &descriptor)?;
        Ok(descriptor)
    }

    /// Executes `descriptor`, or adds it to the batch.
    fn perform(&self, registers: &mut Registers, pass: &mut Pass, descriptor: &Descriptor) {
        match *descriptor {
            Descriptor::Iotlb { scope, .. } => pass.batch.push(Invalidation::of_scope(scope)),
            Descriptor::PasidIotlb { domain, pasid, range } => {
                pass.batch.push(Invalidation::of_pasid(domain, pasid, range));
            }
            Descriptor::DeviceTlb { source, range, .. } => {
                self.tell_device(registers, pass, (source, None, range));
            }
            Descriptor::PasidDeviceTlb { source, pasid, global, range, .. } => {
                let pasid = (!global).then_some(pasid);
                self.tell_device(registers, pass, (source, pasid, range));
            }
            Descriptor::ContextCache(scope) => {
                pass.scopes.add(Scope::of_contexts(scope, mode(registers)));
            }
            Descriptor::PasidCache(scope) => pass.scopes.add(scope.into()),
            Descriptor::InterruptEntryCache(scope) => self.invalidate_interrupt_entries(scope),
            Descriptor::Wait { status, interrupt, .. } => {
                // A wait after a device that did not answer is aborted: no status, no interrupt.
                if registers.unanswered.is_none() {
                    self.complete_wait(registers, status, interrupt);
                }
            }
            Descriptor::PageGroupResponse { requester: rid, pasid, group, code } => {
                self.respond_to_group(Requester { rid, pasid }, group, code);
            }
        }
    }

    /// Drains page requests if `descriptor` is a wait for that, which got as far as `draining`.
    /// Returns how far that is now, unless it is over. A wait that is aborted needs none.
    fn drain_before(
        &self,
        registers: &Registers,
        descriptor: &Descriptor,
        draining: Option<(Progress, Instant)>,
    ) -> Option<(Progress, Instant)> {
        let Descriptor::Wait { drain_page_requests: true, .. } = descriptor else { return None };
        if !self.caps.ecap.prs() || registers.unanswered.is_some() {
            return None;
        }
        let (mut progress, since) =
            draining.unwrap_or_else(|| (Progress::default(), Instant::now()));
        self.host.drain_page_requests(&mut progress, Duration::ZERO);
        (!progress.is_done()).then_some((progress, since))
    }

    /// Adds a device-TLB invalidation to the batch; a device that is not there never answers. DTE
    /// does not matter: the host is not told of it, so a device may have a TLB without.
    fn tell_device(
        &self,
        registers: &mut Registers,
        pass: &mut Pass,
        of: (Bdf, Option<Pasid>, DeviceTlbRange),
    ) {
        match self.requesters.contains(of.0) {
            true => pass.devices.push(of),
            false => _ = registers.unanswered.get_or_insert(of.0),
        }
    }

    /// Gives the batch to the host, as far as possible in one slice; when all is done, IQH follows.
    fn flush(&self, registers: &mut Registers, pass: &mut Pass) -> Result<Flushed, Stop> {
        if !pass.batch.is_empty() {
            let result = self.invalidate_host(&pass.batch, &mut pass.progress);
            result.map_err(|_| Stop::Host)?;
            if !pass.progress.is_done() {
                return Ok(Flushed::Some);
            }
            pass.batch.clear();
            pass.progress = Progress::default();
        }
        let now = pass.devices.len().min(DEVICES);
        for (source, pasid, range) in pass.devices.drain(..now) {
            if !self.host.invalidate_device_tlb(source, pasid.map(Pasid::raw), range.into()) {
                registers.unanswered.get_or_insert(source);
            }
        }
        if !pass.devices.is_empty() {
            return Ok(Flushed::Some);
        }
        if !registers.gsts.tes() {
            // Started before translation was disabled: tables are not used any more.
            pass.evaluation = None;
        }
        let mut budget = Budget::default();
        while let Some(mut evaluation) =
            pass.evaluation.take().or_else(|| self.next_evaluation(registers, pass))
        {
            match self.evaluate(&mut evaluation, registers.root, &mut budget) {
                Some(applied) => applied?,
                None => {
                    pass.evaluation = Some(evaluation);
                    return Ok(Flushed::Some);
                }
            }
        }
        registers.iqh = QueuePointer::from_offset(pass.fetch);
        Ok(Flushed::All)
    }

    /// The next requesters to read tables for. While translation is disabled, tables are not used.
    fn next_evaluation(&self, registers: &Registers, pass: &mut Pass) -> Option<Evaluation> {
        if self.must_reapply(registers) {
            return Some(Evaluation::new(Scope::Unapplied, By::Tables));
        }
        if !registers.gsts.tes() {
            while pass.scopes.take().is_some() {}
        }
        let scope = pass.scopes.take()?;
        self.counters.evaluations.count();
        Some(Evaluation::new(scope, By::Tables))
    }

    fn complete_wait(
        &self,
        registers: &mut Registers,
        status: Option<StatusWrite>,
        interrupt: bool,
    ) {
        self.show(registers);
        if let Some(StatusWrite { address, data }) = status {
            if let Err(error) = self.memory.store_u32(address, data) {
                self.guest_error(format_args!("the status of a wait cannot be written: {error}"));
            }
        }
        if interrupt && !registers.ics.iwc() {
            self.prepare_invalidation_event(registers);
            registers.ics.set_iwc(true);
            let msi = registers.invalidation_event.raise();
            self.show(registers);
            self.send(msi);
        }
    }

    fn raise_queue_error(&self, registers: &Registers, error: QueueError) {
        // Whoever sees the error finds where it is.
        self.show(registers);
        let msi = self.fault_log_for_event().queue_error(error);
        self.send(msi);
    }

    fn stop_queue(&self, registers: &mut Registers, mut pass: Pass, stop: Stop) -> Slice {
        // Descriptors before a wrong one are still done.
        let stop = match stop {
            Stop::Guest(info) => match self.flush(registers, &mut pass) {
                Ok(Flushed::All) => Stop::Guest(info),
                Ok(Flushed::Some) => {
                    // Then that descriptor is fetched again.
                    self.under_way().queue = Some(pass);
                    return Slice::More;
                }
                Err(stop) => stop,
            },
            stop => stop,
        };
        if matches!(stop, Stop::Halted) {
            return Slice::Done;
        }
        let mut unanswered = registers.unanswered.take();
        let head = registers.iqh.offset();
        self.counters.queue_errors.count();
        match stop {
            Stop::Guest(info) => {
                registers.iqercd.set_iqei(info.code());
                self.raise_queue_error(registers, QueueError::Queue);
                self.log
                    .warn(format_args!("VT-d: invalidation queue error at {head:#x}: {info:?}"));
            }
            Stop::Host => {
                // The specification has no code for a failure of the unit itself.
                registers.iqercd.set_iqei(0);
                self.raise_queue_error(registers, QueueError::Queue);
                self.log.warn(format_args!("VT-d: the invalidations at {head:#x} failed"));
            }
            Stop::TimeOut(device) => {
                registers.iqh = QueuePointer::from_offset(pass.fetch);
                unanswered = Some(device);
            }
            Stop::Halted => {}
        }
        if let Some(device) = unanswered {
            registers.iqercd.set_itesid(device.raw());
            self.raise_queue_error(registers, QueueError::TimeOut);
            self.log.warn(format_args!("VT-d: device-TLB invalidation of {device} timed out"));
        }
        Slice::Done
    }
}

impl From<NotApplied> for Stop {
    fn from(not_applied: NotApplied) -> Self {
        match not_applied {
            NotApplied::Host => Self::Host,
            NotApplied::Halted => Self::Halted,
        }
    }
}

impl From<PasidCacheScope> for Scope {
    fn from(scope: PasidCacheScope) -> Self {
        match scope {
            PasidCacheScope::Global => Self::Global,
            PasidCacheScope::Domain(domain) => Self::Domain(domain),
            // For any domain: an entry that becomes present changes domains.
            PasidCacheScope::Pasid { pasid, .. } => Self::Pasid(pasid),
        }
    }
}

fn mode(registers: &Registers) -> Option<TranslationTableMode> {
    registers.root.map(Rtaddr::mode)
}

/// Whether queue and translation table mode match, and the tail is inside the queue.
fn check_queue(registers: &Registers, scalable_mode: bool) -> Result<(), IqErrorInfo> {
    let Registers { iqa, iqt, .. } = registers;
    let width_allowed = match mode(registers) {
        // Without ECAP.ADMS, there is no mode that aborts DMA.
        Some(TranslationTableMode::Reserved | TranslationTableMode::AbortDma) => {
            return Err(IqErrorInfo::InvalidTtm);
        }
        Some(TranslationTableMode::Scalable) => iqa.dw(),
        _ => scalable_mode || !iqa.dw(),
    };
    if !width_allowed {
        return Err(IqErrorInfo::InvalidWidth);
    }
    if iqt.offset() >= iqa.size() {
        return Err(IqErrorInfo::InvalidTail);
    }
    if iqt.offset() % iqa.descriptor_size() != 0 {
        return Err(IqErrorInfo::TailMisaligned);
    }
    Ok(())
}
