// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest has said, and so which words of its tables an SMMU may still have in its caches.

use twostage::spec::smmuv3::command::{AddressRange, Command, RANGE_ALL};
use twostage::spec::smmuv3::translation::Granule;

use super::naive::{Since, Space};
use crate::models::memory::Moment;

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub struct Account {
    said: Vec<(Command, Moment)>,
    /// Everything was read again, and nothing is cached.
    since: Moment,
    /// Address spaces that were used since the TLB was emptied.
    spaces: Vec<Space>,
    /// Since then what a transaction finds may be of another space: two have one ASID, or share
    /// pages.
    is_mixed: bool,
}

impl Account {
    /// The stream table is new to the SMMU.
    pub fn everything(&mut self, now: Moment) {
        self.said.clear();
        self.since = now;
        self.empty();
    }

    fn empty(&mut self) {
        self.spaces.clear();
        self.is_mixed = false;
    }

    /// `command` is complete.
    pub fn complete(&mut self, command: Command, now: Moment) {
        if matches!(command, Command::TlbiNhAll { .. } | Command::TlbiNsnhAll) {
            self.empty();
        }
        self.said.push((command, now));
    }

    /// A transaction may have used `space`; `global`: a page of all spaces.
    pub fn used(&mut self, space: Option<Space>, global: bool) {
        self.is_mixed |= global;
        let Some(space) = space else { return };
        self.is_mixed |= self.spaces.iter().any(|it| it.asid == space.asid && *it != space);
        if !self.spaces.contains(&space) {
            self.spaces.push(space);
        }
    }

    /// Whether what a transaction finds may be of another space.
    pub fn is_mixed(&self) -> bool {
        self.is_mixed
    }

    fn last(&self, covers: impl Fn(&Command) -> bool) -> Moment {
        let said = self.said.iter().rev().find(|(command, _)| covers(command));
        said.map_or(self.since, |(_, at)| *at)
    }

    /// Of the stream `stream`.
    pub fn of(&self, stream: u64) -> OfStream<'_> {
        OfStream { account: self, stream }
    }
}

/// The words that count for one stream.
#[derive(Debug, Clone, Copy)]
pub struct OfStream<'a> {
    account: &'a Account,
    stream: u64,
}

/// Whether a command for `range` covers the page, or what is below the pointer (`shift` is none).
fn has(range: &AddressRange, address: u64, page: Option<(u32, Granule)>) -> bool {
    let start = range.address;
    match (range.bytes(), page) {
        (None, None) => start >> 12 == address >> 12 && !range.leaf,
        // An entry of any size.
        (None, Some((shift, _))) => start >> shift == address >> shift,
        (Some(_), None) => false,
        (Some(bytes), Some((shift, granule))) => {
            let low = (1 << shift) - 1;
            let of_granule = range.granule_shift() == Some(granule.shift());
            let level = 3 - (shift - granule.shift()) / granule.index_bits();
            let of_level = range.ttl == 0 || u32::from(range.ttl) == level;
            let within = start <= address & !low && (address | low) - start < bytes;
            of_granule && of_level && within && !range.is_reserved()
        }
    }
}

impl Since for OfStream<'_> {
    fn stream(&self, first_level: bool) -> Moment {
        self.account.last(|command| match command {
            Command::CfgiSte { stream, leaf } => {
                u64::from(stream.raw()) == self.stream && !(first_level && *leaf)
            }
            Command::CfgiSteRange { stream, range } => {
                let bits = u32::from(*range) + 1;
                *range == RANGE_ALL || u64::from(stream.raw()) >> bits == self.stream >> bits
            }
            _ => false,
        })
    }

    fn context(&self, substream: u32, first_level: bool) -> Moment {
        self.account.last(|command| match command {
            Command::CfgiCd { stream, substream: of, leaf } => {
                u64::from(stream.raw()) == self.stream
                    && of.raw() == substream
                    && !(first_level && *leaf)
            }
            Command::CfgiCdAll { stream } => u64::from(stream.raw()) == self.stream,
            Command::CfgiSteRange { range, .. } => *range == RANGE_ALL,
            _ => false,
        })
    }

    fn pointer(&self, asid: u16, address: u64) -> Moment {
        self.account.last(|command| match command {
            Command::TlbiNhAll { .. } | Command::TlbiNsnhAll => true,
            Command::TlbiNhAsid { asid: of, .. } => *of == asid,
            Command::TlbiNhVa { asid: of, range, .. } => *of == asid && has(range, address, None),
            Command::TlbiNhVaa { range, .. } => has(range, address, None),
            _ => false,
        })
    }

    fn page(&self, asid: u16, address: u64, shift: u32, granule: Granule) -> Moment {
        let page = Some((shift, granule));
        self.account.last(|command| match command {
            Command::TlbiNhAll { .. } | Command::TlbiNsnhAll => true,
            Command::TlbiNhAsid { asid: of, .. } => *of == asid,
            Command::TlbiNhVa { asid: of, range, .. } => *of == asid && has(range, address, page),
            Command::TlbiNhVaa { range, .. } => has(range, address, page),
            _ => false,
        })
    }
}
