// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest has said, and so which words of its tables an SMMU may still have in its caches.

use twostage::spec::smmuv3::command::{AddressRange, Command};

use super::naive::{Found, Since, Space};
use crate::models::memory::Moment;

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub struct Account {
    said: Vec<(Command, Moment)>,
    /// Everything was read again, and nothing is cached.
    since: Moment,
    /// Address spaces that were used since the TLB was emptied.
    spaces: Vec<Space>,
    /// What was used since then is not known, or serves every address space.
    is_unknown: bool,
    /// The same of all that was before, of which device TLBs may have something.
    older: Vec<Space>,
    is_older_unknown: bool,
}

impl Account {
    /// The stream table is new to the SMMU.
    pub fn everything(&mut self, now: Moment) {
        self.said.clear();
        self.since = now;
        self.empty();
        self.older.clear();
        self.is_older_unknown = false;
    }

    fn empty(&mut self) {
        self.older.append(&mut self.spaces);
        self.is_older_unknown |= self.is_unknown;
        self.is_unknown = false;
    }

    /// How many commands are complete.
    pub fn said(&self) -> usize {
        self.said.len()
    }

    /// `command` is complete.
    pub fn complete(&mut self, command: Command, now: Moment) {
        if matches!(command, Command::TlbiNhAll { .. } | Command::TlbiNsnhAll) {
            self.empty();
        }
        self.said.push((command, now));
    }

    /// A transaction may have used `found`; `None`: anything.
    pub fn used(&mut self, found: Option<&Found>) {
        self.is_unknown |= found.is_none_or(|found| found.global);
        let Some(space) = found.and_then(|found| found.space) else { return };
        if !self.spaces.contains(&space) {
            self.spaces.push(space);
        }
    }

    /// The other address spaces of which a transaction in `space` may find entries, as they have
    /// its ASID; if `older`, also those of which only a device TLB may have some. `None`: it is not
    /// known.
    pub fn others(&self, space: &Space, older: bool) -> Option<Vec<Space>> {
        if self.is_unknown || older && self.is_older_unknown {
            return None;
        }
        let all = self.spaces.iter().chain(self.older.iter().filter(|_| older));
        let others = all.filter(|it| it.asid == space.asid && *it != space);
        let of_each = others.map(|other| space.with_entries_of(other));
        Some(of_each.collect::<Option<Vec<_>>>()?.concat())
    }

    /// Of the stream `stream`.
    pub fn of(&self, stream: u64) -> OfStream<'_> {
        OfStream { account: self, stream, said: &self.said }
    }

    /// The same for what its device may have cached of `address` for `substream` since the first
    /// `from` commands were complete: what was made from words that counted then, or when the last
    /// CMD_ATC_INV after that was complete.
    pub fn of_device(
        &self,
        stream: u64,
        substream: Option<u32>,
        address: u64,
        from: usize,
    ) -> OfStream<'_> {
        let drops = |(command, _): &(Command, Moment)| match *command {
            Command::AtcInv { stream: of, substream: named, global, address: at, size } => {
                let space = match named {
                    // A request without PASID is of all.
                    None => true,
                    Some(_) if global => substream.is_some(),
                    Some(named) => substream == Some(named.raw()),
                };
                // Without the upper byte, which it may ignore.
                let plain = (address << 8) as i64 >> 8;
                let shift = u32::from(size) + 12;
                let same = |address: u64| shift > 63 || at >> shift == address >> shift;
                u64::from(of.raw()) == stream && space && same(address) && same(plain as u64)
            }
            _ => false,
        };
        let last = self.said.iter().rposition(drops).map_or(0, |last| last + 1);
        let said = &self.said[..last.max(from).min(self.said.len())];
        OfStream { account: self, stream, said }
    }
}

/// The words that count for one stream.
#[derive(Debug, Clone, Copy)]
pub struct OfStream<'a> {
    account: &'a Account,
    stream: u64,
    said: &'a [(Command, Moment)],
}

impl OfStream<'_> {
    fn last(&self, covers: impl Fn(&Command) -> bool) -> Moment {
        let said = self.said.iter().rev().find(|(command, _)| covers(command));
        said.map_or(self.account.since, |(_, at)| *at)
    }
}

/// Range of CMD_CFGI_ALL.
pub const RANGE_ALL: u8 = 31;

/// TTL of `range`: of pages of 16 KiB, that of level 1 is none.
fn level(range: &AddressRange) -> u8 {
    if (range.tg, range.ttl) == (2, 1) {
        0
    } else {
        range.ttl
    }
}

/// Whether `range` is one granule without a level.
pub fn is_reserved(range: &AddressRange) -> bool {
    range.tg != 0 && (level(range), range.num, range.scale) == (0, 0, 0)
}

/// Whether a command for `range` covers the pointers that were followed to `address`, to tables of
/// `1 << granule` bytes, and there to a page at `level`, if to one.
fn has_pointers(range: &AddressRange, address: u64, granule: u32, page: Option<u32>) -> bool {
    let AddressRange { address: start, leaf, tg, num, scale, .. } = *range;
    if tg == 0 {
        return has(range, address, None);
    }
    let of_range = 10 + 2 * u32::from(tg);
    let bytes = (u64::from(num) + 1) << scale << of_range;
    // A level that is not that of the page may be that of nothing.
    let is_level = level(range) == 0 || page == Some(level(range).into());
    !leaf
        && !is_reserved(range)
        && granule == of_range
        && is_level
        && address.checked_sub(start).is_some_and(|offset| offset < bytes)
}

/// Whether a command for `range` covers the page, of `1 << shift` bytes in tables of `1 << granule`
/// bytes, or without a page, the pointers on the way to `address` (§4.4.1).
fn has(range: &AddressRange, address: u64, page: Option<(u32, u32)>) -> bool {
    let AddressRange { address: start, leaf, tg, num, scale, .. } = *range;
    let ttl = level(range);
    match (tg, page) {
        (0, None) => start >> 12 == address >> 12 && !leaf,
        // An entry of any size.
        (0, Some((shift, _))) => start >> shift == address >> shift,
        _ if is_reserved(range) => false,
        // What was found through a pointer may be a page that no range of it covers.
        (_, None) => false,
        (tg, Some((shift, granule))) => {
            let of_range = 10 + 2 * u32::from(tg);
            let bytes = (u64::from(num) + 1) << scale << of_range;
            let (low, level) = ((1 << shift) - 1, 3 - (shift - granule) / (granule - 3));
            granule == of_range
                && (ttl == 0 || u32::from(ttl) == level)
                && start <= address & !low
                && (address | low) - start < bytes
        }
    }
}

impl Since for OfStream<'_> {
    fn stream(&self, first_level: bool) -> Moment {
        self.last(|command| match command {
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
        self.last(|command| match command {
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
        self.last(|command| match command {
            Command::TlbiNhAll { .. } | Command::TlbiNsnhAll => true,
            Command::TlbiNhAsid { asid: of, .. } => *of == asid,
            Command::TlbiNhVa { asid: of, range, .. } => *of == asid && has(range, address, None),
            Command::TlbiNhVaa { range, .. } => has(range, address, None),
            _ => false,
        })
    }

    fn page(&self, asid: u16, address: u64, shift: u32, granule: u32) -> Moment {
        let page = Some((shift, granule));
        self.last(|command| match command {
            Command::TlbiNhAll { .. } | Command::TlbiNsnhAll => true,
            Command::TlbiNhAsid { asid: of, .. } => *of == asid,
            Command::TlbiNhVa { asid: of, range, .. } => *of == asid && has(range, address, page),
            Command::TlbiNhVaa { range, .. } => has(range, address, page),
            _ => false,
        })
    }

    fn kept_pointer(&self, asid: u16, address: u64, granule: u32, page: Option<u32>) -> Moment {
        let has = |range: &AddressRange| has_pointers(range, address, granule, page);
        self.last(|command| match command {
            Command::TlbiNhAll { .. } | Command::TlbiNsnhAll => true,
            Command::TlbiNhAsid { asid: of, .. } => *of == asid,
            Command::TlbiNhVa { asid: of, range, .. } => *of == asid && has(range),
            Command::TlbiNhVaa { range, .. } => has(range),
            _ => false,
        })
    }
}
