// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's invalidations to the host's: one call on the vIOMMU per batch, without the
//! commands that another one makes redundant.

use super::flush_set::{cache, is_of_device, Cache, Scratch};
use super::state::{self, Device, State};
use crate::iommufd::{iommu_viommu_arm_smmuv3_invalidate, Errno, HostError, InvalidateData};
use crate::nesting::{NestingError, Result};
use crate::spec::pci::Pasid;
use crate::spec::smmuv3::command::{Command, ATC_SIZE_ALL};
use crate::spec::smmuv3::StreamId;

/// Commands per host call at most: the host copies them into contiguous memory.
const MAX_COMMANDS: usize = 4096;

/// A batch was not done as given.
#[derive(Debug)]
pub(super) struct Refused {
    /// The number of the command that the host refused; earlier ones are complete. The first
    /// command if it is not known which one failed.
    pub number: usize,
    /// The error.
    pub error: NestingError,
    /// Everything was flushed instead.
    pub flushed: bool,
    /// A device did not answer.
    pub unanswered: bool,
    /// Nothing but that: all is done.
    pub done: bool,
    /// A stream could not be blocked, and may continue to use stale translations.
    pub still_reachable: bool,
}

impl Refused {
    /// The command with this number was not done, because of `error`; no other effects.
    fn of(number: usize, error: NestingError) -> Self {
        Self {
            number,
            error,
            flushed: false,
            unanswered: false,
            done: false,
            still_reachable: false,
        }
    }
}

impl State {
    /// See [`crate::viommu::smmuv3::SmmuHostSide::invalidate`].
    pub fn invalidate(&mut self, batch: &[Command]) -> Result<(), Refused> {
        self.counters.commands_in += batch.len() as u64;
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.start(batch);
        let number = scratch.own.len();
        let foreign = batch
            .get(number)
            .map(|command| Refused::of(number, NestingError::NoInvalidation(command.name())));
        self.needed(&mut scratch);
        let forwarded = self.forward(&scratch);
        self.scratch = scratch;
        match (forwarded, foreign) {
            // Of the two, only this one is not done.
            (Err(silent), Some(foreign)) if silent.done => {
                Err(Refused { unanswered: true, ..foreign })
            }
            (forwarded, foreign) => forwarded.and(foreign.map_or(Ok(()), Err)),
        }
    }

    fn forward(&mut self, Scratch { needed, commands, .. }: &Scratch) -> Result<(), Refused> {
        // A stream that could not be blocked when a flush failed is still there.
        let behind = self.flush_due && self.any_translates();
        if commands.is_empty() && !behind {
            return Ok(());
        }
        let mut refusal = None;
        if !behind {
            match self.issue(commands) {
                Ok(()) => return Ok(()),
                Err(source) if self.done_despite_silence(commands, &source) => {
                    return Err(Refused {
                        unanswered: true,
                        done: true,
                        ..Refused::of(0, invalidating(source))
                    });
                }
                Err(error) => refusal = Some(error),
            }
        }
        // How far the host got is unknown: the number it reports is too large after a command that
        // it does not accept. A flush of everything does what the whole batch asks for, ...
        if let Err(error) = self.flush_everything() {
            return Err(self.give_up(error));
        }
        // ... but the guest must be told: with the command to blame, or, if the host accepts all of
        // them now, with the first, as any of them may have failed.
        let culprit = self.first_refused(commands).or(refusal.map(|source| (0, source)));
        let Some((at, source)) = culprit else { return Ok(()) };
        let number = needed.get(at).map_or(0, |command| command.number);
        Err(Refused { flushed: true, ..Refused::of(number, invalidating(source)) })
    }

    /// Has the host do `commands` once more, which it did not because of `error`, if that says that
    /// a device did not answer: it may have done a part, or all. Returns whether they are done, but
    /// for devices that do not answer.
    fn done_despite_silence(&mut self, commands: &[Command], error: &HostError) -> bool {
        if error.errno != Errno::ETIMEDOUT {
            return false;
        }
        let (of_devices, others): (Vec<Command>, Vec<Command>) =
            commands.iter().partition(|command| is_of_device(command));
        !of_devices.is_empty()
            && (others.is_empty() || self.issue(&others).is_ok())
            && of_devices.iter().all(|command| {
                let result = self.issue(std::slice::from_ref(command));
                result.is_ok() || result.is_err_and(|error| error.errno == Errno::ETIMEDOUT)
            })
    }

    /// Finds what the host must do of the own commands. For a stream that does not use stage 1 only
    /// translations can be cached; stale ones are flushed before the next stream uses stage 1.
    fn needed(&mut self, scratch: &mut Scratch) {
        let translates = self.any_translates();
        let before = scratch.own.len();
        let mut stale = false;
        scratch.own.retain(|command| match cache(&command.command) {
            Some(Cache::Configuration(stream)) => {
                self.device(stream).is_some_and(|device| self.may_translate(device))
            }
            Some(Cache::Device(stream)) => self.device(stream).is_some_and(|device| {
                device.unsettled || self.entry_of(device).is_some_and(state::uses_ats)
            }),
            Some(Cache::Tlb) | None => {
                stale |= !translates;
                translates
            }
        });
        self.flush_due |= stale && self.tlb_used;
        let cached = scratch.own.len();
        self.counters.not_cached += (before - cached) as u64;
        scratch.drop_covered();
        self.counters.merged += (cached - scratch.needed.len()) as u64;
    }

    fn device(&self, stream: StreamId) -> Option<&Device> {
        self.devices.get(&stream)
    }

    /// Flushes everything of stage 1 that may be cached for streams.
    pub fn flush_everything(&mut self) -> Result<()> {
        let mut commands = vec![Command::TlbiNhAll { vmid: 0 }];
        let streams = self.devices.iter().filter(|(_, device)| self.may_translate(device));
        for (&stream, device) in streams.clone() {
            commands.push(Command::CfgiCdAll { stream });
            let entry = self.entry_of(device);
            if entry.is_some_and(state::uses_ats) {
                let all = |substream| Command::AtcInv {
                    stream,
                    substream,
                    global: substream.is_some(),
                    address: 0,
                    size: ATC_SIZE_ALL,
                };
                commands.push(all(None));
                if entry.is_some_and(state::has_substreams) {
                    commands.push(all(Pasid::new(0)));
                }
            }
        }
        // Translations are made from context descriptors, and device-TLB entries from translations.
        commands.sort_by_key(|command| match cache(command) {
            Some(Cache::Configuration(_)) => 0,
            Some(Cache::Tlb) | None => 1,
            Some(Cache::Device(_)) => 2,
        });
        self.counters.full_flushes += 1;
        self.flush_due = true;
        self.issue(&commands)
            .map_err(|source| NestingError::Host { what: "flushing everything".into(), source })?;
        self.flush_due = false;
        self.tlb_used = self.any_translates();
        Ok(())
    }

    /// What cannot be invalidated must not be used.
    fn give_up(&mut self, error: NestingError) -> Refused {
        let streams: Vec<StreamId> = self.devices.keys().copied().collect();
        let mut still_reachable = false;
        for stream in streams {
            let translates = |state: &Self| {
                state.device(stream).is_some_and(|device| state.may_translate(device))
            };
            if translates(self) {
                self.block(stream);
                still_reachable |= translates(self);
            }
        }
        Refused { still_reachable, ..Refused::of(0, error) }
    }

    /// Has the host repeat `commands`, bisecting down to the one that it refuses. `None` if it
    /// accepts all of them now.
    fn first_refused(&mut self, commands: &[Command]) -> Option<(usize, HostError)> {
        // All before `from` are done; the host is known to stop somewhere before `to`.
        let mut from = 0;
        let mut to = commands.len();
        while from < commands.len() {
            let middle = from + (to - from).div_ceil(2);
            // Never empty, as from < to: true at the start, and `to` is only lowered to a middle
            // above `from`.
            let piece = commands.get(from..middle)?;
            match self.issue(piece) {
                Ok(()) if middle == to => (from, to) = (middle, commands.len()),
                Ok(()) => from = middle,
                Err(error) if piece.len() == 1 => return Some((from, error)),
                Err(_) => to = middle,
            }
        }
        None
    }

    /// Has the host do `commands`, in order; twice if its SMMU may miss some of them, each time
    /// completely, and before the device-TLBs of the same translations are invalidated.
    fn issue(&mut self, commands: &[Command]) -> crate::iommufd::Result<()> {
        let Some(unit) = &self.unit else { return Ok(()) };
        if !unit.misses_invalidations() {
            return self.issue_once(commands);
        }
        for run in commands.chunk_by(|one, next| is_of_device(one) == is_of_device(next)) {
            for piece in run.chunks(MAX_COMMANDS) {
                self.issue_once(piece)?;
                if !piece.first().is_some_and(is_of_device) {
                    self.issue_once(piece)?;
                }
            }
        }
        Ok(())
    }

    /// Has the host do `commands`, in order. They are encoded here.
    fn issue_once(&mut self, commands: &[Command]) -> crate::iommufd::Result<()> {
        let Some(unit) = &self.unit else { return Ok(()) };
        let viommu = unit.viommu();
        for piece in commands.chunks(MAX_COMMANDS) {
            let words =
                |command: &Command| iommu_viommu_arm_smmuv3_invalidate { cmd: command.encode() };
            self.words.clear();
            self.words.extend(piece.iter().map(words));
            self.objects
                .host()
                .hwpt_invalidate(viommu, InvalidateData::ArmSmmuV3(&self.words))
                .map_err(|stopped| stopped.error)?;
            self.counters.commands_out += piece.len() as u64;
        }
        Ok(())
    }
}

fn invalidating(source: HostError) -> NestingError {
    NestingError::Host { what: "invalidating".into(), source }
}
