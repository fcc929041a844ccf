// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's invalidations to the host's: one call on the vIOMMU per batch, without the
//! commands that another one makes redundant.

use std::collections::HashSet;
use std::mem::{discriminant, Discriminant};

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

impl State {
    /// See [`crate::viommu::smmuv3::SmmuHostSide::invalidate`].
    pub fn invalidate(&mut self, batch: &[Command]) -> Result<(), Refused> {
        self.counters.commands_in += batch.len() as u64;
        let (commands, foreign) = own(batch);
        let commands = self.needed(commands);
        match (self.forward(&commands), foreign) {
            // Of the two, only this one is not done.
            (Err(silent), Some(foreign)) if silent.done => {
                Err(Refused { unanswered: true, ..foreign })
            }
            (forwarded, foreign) => forwarded.and(foreign.map_or(Ok(()), Err)),
        }
    }

    fn forward(&mut self, commands: &[Numbered]) -> Result<(), Refused> {
        // A stream that could not be blocked when a flush failed is still there.
        let behind = self.flush_due && self.any_translates();
        if commands.is_empty() && !behind {
            return Ok(());
        }
        let all: Vec<Command> = commands.iter().map(|numbered| numbered.command).collect();
        let mut refusal = None;
        if !behind {
            match self.issue(&all) {
                Ok(()) => return Ok(()),
                Err(source) if self.done_despite_silence(&all, &source) => {
                    let error = NestingError::Host { what: "invalidating".into(), source };
                    let (number, still_reachable) = (0, false);
                    let (flushed, unanswered, done) = (false, true, true);
                    return Err(Refused {
                        number,
                        error,
                        flushed,
                        unanswered,
                        done,
                        still_reachable,
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
        let culprit = self.first_refused(&all).or(refusal.map(|source| (0, source)));
        let Some((at, source)) = culprit else { return Ok(()) };
        Err(Refused {
            number: commands.get(at).map_or(0, |command| command.number),
            error: NestingError::Host { what: "invalidating".into(), source },
            flushed: true,
            unanswered: false,
            done: false,
            still_reachable: false,
        })
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

    /// The subset of `commands` that the host must do. For a stream that does not use stage 1 only
    /// translations can be cached; stale ones are flushed before the next stream uses stage 1.
    fn needed(&mut self, mut commands: Vec<Numbered>) -> Vec<Numbered> {
        let translates = self.any_translates();
        let before = commands.len();
        let mut stale = false;
        commands.retain(|command| match cache(&command.command) {
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
        let cached = commands.len();
        self.counters.not_cached += (before - cached) as u64;
        let needed = without_covered(commands);
        self.counters.merged += (cached - needed.len()) as u64;
        needed
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
        Refused {
            number: 0,
            error,
            flushed: false,
            unanswered: false,
            done: false,
            still_reachable,
        }
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
            let piece: Vec<_> = piece.iter().map(words).collect();
            self.objects
                .host()
                .hwpt_invalidate(viommu, InvalidateData::ArmSmmuV3(&piece))
                .map_err(|stopped| stopped.error)?;
            self.counters.commands_out += piece.len() as u64;
        }
        Ok(())
    }
}

/// The commands of `batch` up to the first that is not an invalidation of stage 1, which the
/// virtual SMMU does not pass on; and that one, as an error.
fn own(batch: &[Command]) -> (Vec<Numbered>, Option<Refused>) {
    let own = batch.iter().take_while(|command| cache(command).is_some());
    let own = own.enumerate().map(|(number, &command)| Numbered { number, command });
    let own: Vec<Numbered> = own.collect();
    let number = own.len();
    let foreign = batch.get(number).map(|command| Refused {
        number,
        error: NestingError::NoInvalidation(command.name()),
        flushed: false,
        unanswered: false,
        done: false,
        still_reachable: false,
    });
    (own, foreign)
}

/// A command, with its number in the batch from the virtual SMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Numbered {
    /// Its number in the batch.
    pub number: usize,
    /// The command.
    pub command: Command,
}

/// The cache that a command invalidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cache {
    /// Context descriptors of this stream.
    Configuration(StreamId),
    /// Translations.
    Tlb,
    /// Translations cached by the device of this stream.
    Device(StreamId),
}

/// The cache that `command` invalidates; `None` if it is not an invalidation of stage 1.
fn cache(command: &Command) -> Option<Cache> {
    match *command {
        Command::CfgiCd { stream, .. } | Command::CfgiCdAll { stream } => {
            Some(Cache::Configuration(stream))
        }
        Command::TlbiNhAll { .. }
        | Command::TlbiNhAsid { .. }
        | Command::TlbiNhVa { .. }
        | Command::TlbiNhVaa { .. }
        | Command::TlbiNsnhAll => Some(Cache::Tlb),
        Command::AtcInv { stream, .. } => Some(Cache::Device(stream)),
        _ => None,
    }
}

/// Whether `command` invalidates a device-TLB.
fn is_of_device(command: &Command) -> bool {
    matches!(cache(command), Some(Cache::Device(_)))
}

fn kind(command: &Command) -> Option<Discriminant<Cache>> {
    cache(command).as_ref().map(discriminant)
}

/// `commands`, in order, without those that another one covers.
///
/// The guest wrote every command of a batch, and changed the structures concerned, before the first
/// command reaches the host. So commands for the same cache may be merged as long as no command for
/// another cache is between them. Across caches the order matters: translations are made from
/// context descriptors, and device-TLB entries from translations, so a cache may be refilled from a
/// stale one that is only invalidated later.
fn without_covered(commands: Vec<Numbered>) -> Vec<Numbered> {
    let mut kept = Vec::with_capacity(commands.len());
    for run in commands.chunk_by(|one, next| kind(&one.command) == kind(&next.command)) {
        let all: Vec<&Numbered> = run.iter().filter(|of| is_of_all(&of.command)).collect();
        let mut seen = HashSet::new();
        kept.extend(run.iter().filter(|this| {
            let covered = all.iter().any(|all| covers(&all.command, &this.command));
            !covered && seen.insert(same_for_host(this.command))
        }));
    }
    kept
}

/// The host replaces the guest's VMID with its own, and has one command for all translations.
fn same_for_host(command: Command) -> Command {
    match command {
        Command::TlbiNhAll { .. } | Command::TlbiNsnhAll => Command::TlbiNhAll { vmid: 0 },
        Command::TlbiNhAsid { asid, .. } => Command::TlbiNhAsid { vmid: 0, asid },
        Command::TlbiNhVa { asid, range, .. } => Command::TlbiNhVa { vmid: 0, asid, range },
        Command::TlbiNhVaa { range, .. } => Command::TlbiNhVaa { vmid: 0, range },
        other => other,
    }
}

fn is_of_all(command: &Command) -> bool {
    matches!(command, Command::TlbiNhAll { .. } | Command::TlbiNsnhAll | Command::CfgiCdAll { .. })
}

/// Whether `all`, which [`is_of_all`], also does what the other kind of command does.
/// `TLBI_NH_ASID` covers none: it spares global translations, which invalidations by address drop.
fn covers(all: &Command, command: &Command) -> bool {
    match (all, command) {
        (Command::CfgiCdAll { stream: all }, Command::CfgiCd { stream, .. }) => all == stream,
        (
            Command::TlbiNhAll { .. } | Command::TlbiNsnhAll,
            Command::TlbiNhAsid { .. } | Command::TlbiNhVa { .. } | Command::TlbiNhVaa { .. },
        ) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::smmuv3::command::AddressRange;

    const ALL: Command = Command::TlbiNhAll { vmid: 0 };

    fn page(asid: u16, page: u64) -> Command {
        Command::TlbiNhVa { vmid: 0, asid, range: AddressRange::at(page << 12) }
    }

    fn asid(asid: u16) -> Command {
        Command::TlbiNhAsid { vmid: 0, asid }
    }

    fn cd(stream: u32, substream: u32) -> Command {
        let substream = Pasid::new(substream).unwrap();
        Command::CfgiCd { stream: StreamId(stream), substream, leaf: true }
    }

    fn atc(stream: u32) -> Command {
        let stream = StreamId(stream);
        Command::AtcInv { stream, substream: None, global: false, address: 0, size: 52 }
    }

    /// The numbers of the commands kept.
    fn kept(commands: &[Command]) -> Vec<usize> {
        let numbered =
            commands.iter().enumerate().map(|(number, &command)| Numbered { number, command });
        without_covered(numbered.collect()).iter().map(|command| command.number).collect()
    }

    #[test]
    fn what_is_of_all_covers_the_rest_of_its_run() {
        assert_eq!(kept(&[page(1, 1), asid(1), ALL, page(2, 2)]), [2]);
        assert_eq!(kept(&[ALL, Command::TlbiNsnhAll, page(1, 1)]), [0]);
        let all_of_8 = Command::CfgiCdAll { stream: StreamId(8) };
        assert_eq!(kept(&[cd(8, 0), cd(9, 0), all_of_8, cd(8, 5)]), [1, 2]);
    }

    #[test]
    fn repetitions_go() {
        assert_eq!(kept(&[page(1, 1), page(1, 2), page(1, 1), page(2, 1)]), [0, 1, 3]);
        let other_vmid = Command::TlbiNhAsid { vmid: 7, asid: 1 };
        assert_eq!(kept(&[asid(1), other_vmid, atc(8), atc(8)]), [0, 2]);
    }

    #[test]
    fn an_asid_does_not_cover_addresses_for_they_may_be_global() {
        assert_eq!(kept(&[page(1, 1), asid(1)]), [0, 1]);
    }

    #[test]
    fn nothing_moves_past_another_kind() {
        // Between the first and the last, the TLB may be filled from a stale context descriptor.
        assert_eq!(kept(&[page(1, 1), cd(8, 0), page(1, 1)]), [0, 1, 2]);
        assert_eq!(kept(&[page(1, 1), cd(8, 0), ALL]), [0, 1, 2]);
        assert_eq!(kept(&[atc(8), page(1, 1), atc(8)]), [0, 1, 2]);
    }
}
