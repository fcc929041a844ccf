// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the tables of a requester lead, read without any cache, to the page.

use twostage::spec::vtd::fault::FaultReason as R;

use super::naive::{Offers, Stage, ADDRESS};
use crate::models::memory::Moment;
use crate::models::oracle::Oracle;

/// A DMA request, after its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    pub write: bool,
    pub privileged: bool,
    pub execute: bool,
}

/// From when on words of tables count, by what a word is and what address it translates.
pub trait Since {
    /// Pointers to tables, of the first stage or the second.
    fn pointer(&self, second: bool, address: u64) -> Moment;
    /// Pages of `1 << shift` bytes.
    fn page(&self, second: bool, address: u64, shift: u32) -> Moment;
}

/// What a walk of a stage reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reached {
    pub address: u64,
    /// The stage below may not allow that flags are set in a table on the way.
    pub unless_flags: bool,
}

/// What the addresses of a stage's tables are translated to by the stage below; first whether it is
/// the top table, then the address.
pub type Below<'a> = &'a dyn Fn(&mut Oracle<'_>, bool, u64) -> Result<Reached, R>;

/// Addresses of tables are those of memory.
pub fn nothing_below(_: &mut Oracle<'_>, _: bool, address: u64) -> Result<Reached, R> {
    Ok(Reached { address, unless_flags: false })
}

/// What entries on the way allow.
#[derive(Debug, Clone, Copy)]
struct Rights {
    user: bool,
    read: bool,
    write: bool,
}

/// A request on its way through a stage.
#[derive(Clone, Copy)]
pub struct Walk<'a> {
    pub offers: Offers,
    pub stage: &'a Stage,
    pub address: u64,
    pub kind: Kind,
    pub since: &'a dyn Since,
}

impl Walk<'_> {
    /// Where it leads.
    pub fn reach(&self, words: &mut Oracle<'_>, below: Below<'_>) -> Result<Reached, R> {
        let Self { offers, stage, address, kind, .. } = *self;
        let second = stage.second;
        if kind.execute {
            return Err(R::ExecuteDisabled);
        }
        if kind.privileged && !second && !stage.supervisor {
            return Err(R::SupervisorDisabled);
        }
        let bits = 12 + 9 * stage.levels;
        // MGAW
        let width = (offers.cap >> 16 & 63) as u32 + 1;
        if second && address >> bits.min(width) != 0 {
            return Err(R::AddressBeyondGuest);
        }
        let high = (address as i64) >> (bits - 1);
        if !second && high != 0 && high != -1 {
            return Err(R::NotCanonical);
        }
        let rights = Rights { user: true, read: true, write: true };
        self.from(words, stage.levels, stage.top, rights, below)
    }

    /// Where it leads from the table at `table` on, which is of `level`.
    fn from(
        &self,
        words: &mut Oracle<'_>,
        level: u32,
        table: u64,
        rights: Rights,
        below: Below<'_>,
    ) -> Result<Reached, R> {
        let Rights { user, read, write } = rights;
        let flags = [self.stage.second, self.kind.write, user, read, write];
        let flags = flags.iter().fold(0, |all, flag| all << 1 | u64::from(*flag));
        words.part([u64::from(level) << 8 | flags, table, self.address], |words| {
            self.step(words, level, table, rights, below)
        })
    }

    fn step(
        &self,
        words: &mut Oracle<'_>,
        level: u32,
        table: u64,
        mut rights: Rights,
        below: Below<'_>,
    ) -> Result<Reached, R> {
        let Self { offers, stage, address, kind, since } = *self;
        let second = stage.second;
        let pick = |first, other| if second { other } else { first };
        let top = level == stage.levels;
        let shift = 12 + 9 * (level - 1);
        let through = below(words, top, table)?;
        let at = through.address + (address >> shift & 511) * 8;
        let is_leaf = |word: u64| level == 1 || word >> 7 & 1 != 0 && matches!(level, 2 | 3);
        let present = |word: u64| word & if second { 3 } else { 1 } != 0;
        let may = |word: u64, until: Moment| match (present(word), is_leaf(word)) {
            // What is not present is cached in caching mode only.
            (false, _) => offers.caching_mode() && until > since.pointer(second, address),
            (true, true) => until > since.page(second, address, shift),
            (true, false) => until > since.pointer(second, address),
        };
        let word = words.load(at, may).ok_or(match top {
            true => pick(R::FirstStageTopAccess, R::SecondStageTopAccess),
            false => pick(R::FirstStageAccess, R::SecondStageAccess),
        })?;
        crate::models::trace(|| format!("    level {level} at {at:x}: {word:x}"));
        if !present(word) {
            return Err(pick(R::FirstStageNotPresent, R::SecondStageDenied));
        }
        // FS1GP; SSLPS has both.
        let huge = second || offers.cap >> 56 & 1 != 0;
        let large = word >> 7 & 1 != 0;
        let reserved = match level {
            1 => 0,
            2 if large && second => 0x1f_f000,
            2 if large => 0x1f_e000,
            3 if large && second => 0x3fff_f000,
            3 if large && huge => 0x3fff_e000,
            2 | 3 if !large => 0,
            _ => 1 << 7,
        };
        // TM, until revision 3.1.
        let transient = if second { 1 << 62 } else { 0 };
        if word & (reserved | transient) != 0 {
            return Err(pick(R::FirstStageReserved, R::SecondStageReserved));
        }
        rights.user &= second || word & 4 != 0;
        rights.read &= !second || word & 1 != 0;
        rights.write &= word & 2 != 0;
        let next = word & ADDRESS;
        if !is_leaf(word) {
            let reached = self.from(words, level - 1, next, rights, below)?;
            let unless_flags = through.unless_flags || reached.unless_flags;
            return Ok(Reached { unless_flags, ..reached });
        }
        match (second, kind.write) {
            (true, true) if !rights.write => return Err(R::SecondStageDenied),
            (true, false) if !rights.read => return Err(R::SecondStageDenied),
            (false, _) if !kind.privileged && !rights.user => return Err(R::UserDenied),
            (false, true) if !rights.write && (!kind.privileged || stage.write_protect) => {
                return Err(R::WriteDenied);
            }
            _ => {}
        }
        let span = (1 << shift) - 1;
        Ok(Reached { address: next & !span | address & span, unless_flags: through.unless_flags })
    }
}
