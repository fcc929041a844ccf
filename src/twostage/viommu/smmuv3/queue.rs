// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command queue (§3.5, §4, §7.1), and the action for each command.
//!
//! Invalidations are batched up to the next CMD_SYNC, change of configuration or the end of the
//! queue, and given to the host in one call. CMDQ_CONS moves past a command only when it is done,
//! so a CMD_SYNC has nothing to wait for when its turn comes.
//!
//! CMDQ_CONS stops at a command that is wrong or that the host refuses; all before it is done.
//! Consumption resumes at that command once GERROR.CMDQ_ERR is acknowledged. That holds even if the
//! host made a refusal good by flushing everything: CERROR_ILL then points to the first of the
//! batch, as none is known to have been accepted, and a driver that skips it, or repeats all of
//! them, loses nothing.
//!
//! If a device does not answer a CMD_ATC_INV, the next CMD_SYNC stops the queue with
//! CERROR_ATC_INV_SYNC, and completes when it is consumed again.
//!
//! The queue is processed in slices, up to a CMD_SYNC, a change of configuration or a number of
//! commands.
//!
//! Changes to the configuration of streams are executed here. Invalidations of hardware caches go
//! to the host: as decoded commands, so that no bit outside a known field reaches it.

use super::apply::Scope;
use super::fault_log::{Signal, SmmuInterrupt};
use super::state::Registers;
use super::Smmu;
use crate::spec::pci::PageResponse;
use crate::spec::smmuv3::command::{AddressRange, Command, SyncSignal, Words, ATC_SIZE_ALL};
use crate::spec::smmuv3::page_request::{page_response, Resume};
use crate::spec::smmuv3::queue::{CmdqCons, CommandError, QueueLayout, COMMAND_SIZE};
use crate::spec::smmuv3::regs::Gerror;
use crate::spec::smmuv3::{StreamId, SubstreamId};
use crate::viommu::ledger::NotApplied;
use crate::viommu::register_page::Show;

/// The maximum cost of a slice, and so of a host call, in commands; commands that may make a host
/// search its whole cache count four times, as more would hold the registers for long.
const SLICE: u32 = 256;

/// Ranges up to this size a host looks up page by page.
const FEW_PAGES: u64 = 64 << 12;

/// The cost of `command` in a slice.
fn cost(command: &Command) -> u32 {
    match command {
        Command::TlbiNhVa { range, .. } | Command::TlbiNhVaa { range, .. }
            if range.bytes().is_some_and(|bytes| bytes > FEW_PAGES) =>
        {
            4
        }
        Command::TlbiNhAll { .. } | Command::TlbiNhAsid { .. } | Command::TlbiNsnhAll => 4,
        _ => 1,
    }
}

/// What is left of the queue after a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slice {
    /// Possibly more commands.
    More,
    /// None, or none before the guest has acknowledged an error.
    Done,
}

/// Why consumption stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// The command at the fetch index is wrong, or not in memory.
    Guest(CommandError),
    /// The host did not do the command at this index.
    Host(u32),
    /// A device did not answer what this CMD_SYNC at the fetch index waits for.
    Unanswered,
    /// The SMMU was halted.
    Halted,
}

/// One slice of the queue.
struct Pass {
    queue: QueueLayout,
    /// Index of the next command to fetch.
    fetch: u32,
    /// The guest's CMDQ_PROD: the index behind the last command.
    end: u32,
    /// Invalidations batched and not done yet.
    batch: Batch,
}

/// Invalidations to be done together. Empty, it keeps its memory for the next slice.
#[derive(Debug, Default)]
pub(super) struct Batch {
    commands: Vec<Command>,
    /// The index of each of them.
    indices: Vec<u32>,
}

impl Batch {
    fn clear(&mut self) {
        self.commands.clear();
        self.indices.clear();
    }
}

impl Smmu {
    /// Works through the queue up to the end of a slice, its end or its first error.
    pub(super) fn run_slice(&self, registers: &mut Registers) -> Slice {
        if !registers.cr0ack.cmdqen() || self.fault_log().errors.active().cmdq_err() {
            return Slice::Done;
        }
        let queue = registers.cmdq_base.layout(COMMAND_SIZE, self.caps.idr1.cmdqs());
        let fetch = queue.truncate(registers.cmdq_cons.rd());
        let end = queue.truncate(registers.cmdq_prod.wr());
        if fetch == end {
            return Slice::Done;
        }
        let batch = std::mem::take(&mut *self.batch.lock());
        let mut pass = Pass { queue, fetch, end, batch };
        let slice = self.walk(registers, &mut pass).unwrap_or_else(|stop| {
            self.stop_queue(registers, &mut pass, stop);
            Slice::Done
        });
        // What a stop has left is fetched again.
        pass.batch.clear();
        *self.batch.lock() = pass.batch;
        slice
    }

    fn walk(&self, registers: &mut Registers, pass: &mut Pass) -> Result<Slice, Stop> {
        // Invalid indices, further apart than the queue's size, only cause commands to be fetched
        // twice: the end is met before the wrap bit comes round.
        let mut left = SLICE;
        while left > 0 {
            if pass.fetch == pass.end {
                self.flush_batch(registers, pass)?;
                return Ok(Slice::Done);
            }
            let command = self.fetch(pass).map_err(Stop::Guest)?;
            left = left.saturating_sub(cost(&command));
            let action = self.action(&command).map_err(Stop::Guest)?;
            if !matches!(action, Action::Invalidate | Action::Nothing) {
                self.flush(registers, pass)?;
            }
            if matches!(action, Action::Sync(_)) && std::mem::take(&mut registers.unanswered) {
                return Err(Stop::Unanswered);
            }
            if self.is_halted() {
                return Err(Stop::Halted);
            }
            self.counters.command(&command);
            if let Some(observer) = &self.observer {
                observer.descriptor(command.name(), &command);
            }
            match action {
                Action::Nothing => {}
                Action::Invalidate => {
                    pass.batch.commands.push(command);
                    pass.batch.indices.push(pass.fetch);
                }
                Action::Configure(scope) => self
                    .configure(registers, scope)
                    .map_err(|not_applied| Stop::of(not_applied, pass.fetch))?,
                Action::Answer(answer) => self.answer(answer),
                Action::Sync(_) => self.settle_stalls(),
            }
            pass.fetch = pass.queue.next(pass.fetch);
            if pass.batch.commands.is_empty() {
                registers.cmdq_cons = CmdqCons::new().with_rd(pass.fetch);
            }
            if let Action::Sync(signal) = action {
                // Whoever sees the signal finds the index behind the command.
                self.show(registers);
                self.complete_sync(signal);
            }
            if matches!(action, Action::Configure(_) | Action::Sync(_)) {
                return Ok(Slice::More);
            }
        }
        self.flush_batch(registers, pass)?;
        Ok(Slice::More)
    }

    /// Reads and decodes the command at the fetch index.
    fn fetch(&self, pass: &Pass) -> Result<Command, CommandError> {
        // The guest no longer writes what is before the end: words need not be read one by one.
        let mut bytes = [0; COMMAND_SIZE as usize];
        let address = pass.queue.address(pass.fetch);
        self.memory.read(address, &mut bytes).map_err(|_| CommandError::Abort)?;
        let mut words: Words = Words::default();
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Command::decode(words).map_err(|error| {
            self.log.warn(format_args!("SMMUv3: {error}"));
            CommandError::Illegal
        })
    }

    /// [`Smmu::flush`], unless the batch is empty: no command could be blamed for a failure.
    fn flush_batch(&self, registers: &mut Registers, pass: &mut Pass) -> Result<(), Stop> {
        if pass.batch.commands.is_empty() {
            return Ok(());
        }
        self.flush(registers, pass)
    }

    /// Gives the batch, and what must be given again, to the host; CMDQ_CONS then follows. A
    /// failure is blamed on a batched command, or else on the one at the fetch index.
    fn flush(&self, registers: &mut Registers, pass: &mut Pass) -> Result<(), Stop> {
        let Batch { commands, indices } = &pass.batch;
        let blamed = indices.first().copied().unwrap_or(pass.fetch);
        let result = self.invalidate_host(commands);
        let refused = |number: usize| indices.get(number).copied().unwrap_or(blamed);
        let result = result.map_err(|error| (refused(error.refused), error));
        pass.batch.clear();
        if let Err((refused, error)) = result {
            registers.unanswered |= error.unanswered;
            if !error.done {
                return Err(Stop::Host(refused));
            }
        }
        self.reapply(registers).map_err(|not_applied| Stop::of(not_applied, blamed))?;
        registers.cmdq_cons = CmdqCons::new().with_rd(pass.fetch);
        Ok(())
    }

    fn complete_sync(&self, signal: SyncSignal) {
        match signal {
            // No processor here waits for an event: all poll CMDQ_CONS.
            SyncSignal::None | SyncSignal::Event => {}
            SyncSignal::Interrupt { address, data } => {
                let address = (self.caps.idr0.msi() && address != 0).then_some(address);
                self.send(Some(Signal::new(SmmuInterrupt::CommandSync, address, data)));
            }
        }
    }

    fn stop_queue(&self, registers: &mut Registers, pass: &mut Pass, stop: Stop) {
        // Commands before a wrong one are still done.
        let stop = match stop {
            Stop::Guest(error) => {
                self.flush_batch(registers, pass).err().unwrap_or(Stop::Guest(error))
            }
            stop => stop,
        };
        let (index, error) = match stop {
            Stop::Guest(error) => (pass.fetch, error),
            Stop::Host(index) => (index, CommandError::Illegal),
            Stop::Unanswered => (pass.fetch, CommandError::AtcInvSync),
            Stop::Halted => return,
        };
        self.counters.command_errors.count();
        self.log.warn(format_args!("SMMUv3: {error} at {:#x}", pass.queue.address(index)));
        registers.cmdq_cons = CmdqCons::new().with_rd(index).with_err(error.code());
        // Whoever sees the error finds where it is.
        self.show(registers);
        self.raise(Gerror::new().with_cmdq_err(true));
    }
}

impl Stop {
    /// The command at `index` was not done.
    fn of(not_applied: NotApplied, index: u32) -> Self {
        match not_applied {
            NotApplied::Host => Self::Host(index),
            NotApplied::Halted => Self::Halted,
        }
    }
}

/// The action for a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// None: a hint, or an unknown stream.
    Nothing,
    /// The host executes the command.
    Invalidate,
    /// Stream table entries are read again.
    Configure(Scope),
    /// A device that waits goes on. After the invalidations before it, so that these are not done
    /// twice, and then it.
    Answer(Answer),
    /// All earlier commands are complete: signal it.
    Sync(SyncSignal),
}

/// What a device that waits is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// CMD_PRI_RESP.
    Pages { stream: StreamId, substream: Option<SubstreamId>, group: u16, response: PageResponse },
    /// CMD_RESUME.
    Resume { stream: StreamId, stag: u16, resume: Resume },
    /// CMD_STALL_TERM.
    Terminate { stream: StreamId },
}

impl Smmu {
    fn answer(&self, answer: Answer) {
        match answer {
            Answer::Pages { stream, substream, group, response } => {
                self.respond_to_group(stream, substream, group, response);
            }
            Answer::Resume { stream, stag, resume } => self.resume(stream, stag, resume),
            Answer::Terminate { stream } => self.terminate_stalls(stream),
        }
    }

    /// The action for `command`.
    ///
    /// # Errors
    /// The SMMU does not support it.
    fn action(&self, command: &Command) -> Result<Action, CommandError> {
        let idr0 = self.caps.idr0;
        let invalidate = Action::Invalidate;
        match *command {
            Command::PrefetchConfig { .. } | Command::PrefetchAddr { .. } => Ok(Action::Nothing),
            Command::CfgiSte { stream, .. } => Ok(Action::Configure(Scope::One(stream))),
            Command::CfgiSteRange { stream, range } => {
                Ok(Action::Configure(Scope::range(stream, range)))
            }
            Command::CfgiCd { stream, .. } | Command::CfgiCdAll { stream } => {
                offered(idr0.s1p(), self.of_stream(stream, invalidate))
            }
            Command::TlbiNhAll { .. } => offered(idr0.s1p(), invalidate),
            Command::TlbiNhAsid { asid, .. } => offered(idr0.s1p(), self.of_asid(asid, invalidate)),
            Command::TlbiNhVa { asid, range, .. } => {
                let offers = idr0.s1p() && self.offers_range(range);
                offered(offers, self.of_asid(asid, invalidate))
            }
            Command::TlbiNhVaa { range, .. } => {
                offered(idr0.s1p() && self.offers_range(range), invalidate)
            }
            Command::TlbiNsnhAll => Ok(invalidate),
            Command::TlbiEl2All | Command::TlbiEl2Asid { .. } => offered(idr0.hyp(), invalidate),
            Command::TlbiEl2Va { range, .. } | Command::TlbiEl2Vaa { range } => {
                offered(idr0.hyp() && self.offers_range(range), invalidate)
            }
            Command::TlbiS12Vmall { .. } => offered(idr0.s2p(), invalidate),
            Command::TlbiS2Ipa { range, .. } => {
                offered(idr0.s2p() && self.offers_range(range), invalidate)
            }
            // Larger sizes may be refused: they always are, whatever the host's hardware does.
            Command::AtcInv { size, .. } if size > ATC_SIZE_ALL => Err(CommandError::Illegal),
            Command::AtcInv { stream, .. } => {
                let translating = self.streams.is_translating();
                let action = if translating { invalidate } else { Action::Nothing };
                offered(idr0.ats(), self.of_stream(stream, action))
            }
            Command::PriResp { stream, substream, group, response } => {
                let response = page_response(response).ok_or(CommandError::Illegal)?;
                let answer = Answer::Pages { stream, substream, group, response };
                offered(idr0.pri(), Action::Answer(answer))
            }
            Command::Resume { stream, stag, response } => {
                let resume = Resume::from_bits(response);
                let answer = Answer::Resume { stream, stag, resume };
                offered(self.offers_stalls(), Action::Answer(answer))
            }
            Command::StallTerm { stream } => {
                offered(self.offers_stalls(), Action::Answer(Answer::Terminate { stream }))
            }
            Command::Sync { signal } => Ok(Action::Sync(signal)),
        }
    }

    /// `action` if `stream` exists: nothing is cached for another one.
    fn of_stream(&self, stream: StreamId, action: Action) -> Action {
        if self.streams.contains(stream) {
            action
        } else {
            Action::Nothing
        }
    }

    /// `action` if the ASID is valid: with 8-bit ASIDs, nothing has a larger one.
    fn of_asid(&self, asid: u16, action: Action) -> Action {
        if self.caps.idr0.asid16() || asid <= u8::MAX.into() {
            action
        } else {
            Action::Nothing
        }
    }

    /// Whether the SMMU supports the fields of `range`. Without IDR3.RIL they are reserved;
    /// ignoring them would leave most of the range stale.
    fn offers_range(&self, range: AddressRange) -> bool {
        (self.caps.idr3.ril() || !range.needs_ril()) && !range.is_reserved()
    }
}

fn offered(offered: bool, action: Action) -> Result<Action, CommandError> {
    offered.then_some(action).ok_or(CommandError::Illegal)
}
