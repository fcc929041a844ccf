// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A batch of the guest's invalidations: what each command invalidates, and which ones another
//! makes redundant.

use std::collections::HashSet;
use std::mem::{discriminant, Discriminant};

use crate::spec::smmuv3::command::Command;
use crate::spec::smmuv3::StreamId;

/// A batch under way. It keeps its memory, so that the next one takes no allocation.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// What the virtual SMMU passes on.
    pub own: Vec<Numbered>,
    /// What the host must do of it.
    pub needed: Vec<Numbered>,
    /// The same, without numbers.
    pub commands: Vec<Command>,
    /// Of one run: what may cover others, and what is needed.
    whole: Vec<Command>,
    seen: HashSet<Command>,
}

/// A command, with its number in the batch from the virtual SMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Numbered {
    /// Its number in the batch.
    pub number: usize,
    /// The command.
    pub command: Command,
}

/// The cache that a command invalidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cache {
    /// Context descriptors of this stream.
    Configuration(StreamId),
    /// Translations.
    Tlb,
    /// Translations cached by the device of this stream.
    Device(StreamId),
}

/// The cache that `command` invalidates; `None` if it is not an invalidation of stage 1.
pub(super) fn cache(command: &Command) -> Option<Cache> {
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
pub(super) fn is_of_device(command: &Command) -> bool {
    matches!(cache(command), Some(Cache::Device(_)))
}

fn kind(command: &Command) -> Option<Discriminant<Cache>> {
    cache(command).as_ref().map(discriminant)
}

impl Scratch {
    /// Starts with the commands of `batch` up to the first that is not an invalidation of stage 1,
    /// which the virtual SMMU does not pass on.
    pub fn start(&mut self, batch: &[Command]) {
        let own = batch.iter().take_while(|command| cache(command).is_some());
        self.own.clear();
        self.own.extend(own.enumerate().map(|(number, &command)| Numbered { number, command }));
    }

    /// Finds what is needed: what is left of the own commands, in order, without those that another
    /// one covers.
    ///
    /// The guest wrote every command of a batch, and changed the structures concerned, before the
    /// first command reaches the host. So commands for the same cache may be merged as long as no
    /// command for another cache is between them. Across caches the order matters: translations are
    /// made from context descriptors, and device-TLB entries from translations, so a cache may be
    /// refilled from a stale one that is only invalidated later.
    pub fn drop_covered(&mut self) {
        let Self { own, needed, commands, whole, seen } = self;
        needed.clear();
        for run in own.chunk_by(|one, next| kind(&one.command) == kind(&next.command)) {
            whole.clear();
            whole.extend(run.iter().map(|of| of.command).filter(is_of_all));
            seen.clear();
            needed.extend(run.iter().filter(|this| {
                let covered = whole.iter().any(|all| covers(all, &this.command));
                !covered && seen.insert(same_for_host(this.command))
            }));
        }
        commands.clear();
        commands.extend(needed.iter().map(|numbered| numbered.command));
    }
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
    use crate::spec::pci::Pasid;
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
        let mut scratch = Scratch::default();
        scratch.start(commands);
        scratch.drop_covered();
        scratch.needed.iter().map(|command| command.number).collect()
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
