// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest's tables say, read without any cache: from the stream table to the page.

use twostage::spec::smmuv3::event::EventId as E;

use crate::models::memory::Moment;
use crate::models::oracle::Oracle;

/// Registers that say where the stream table is, and what the SMMU can.
#[derive(Debug, Clone, Copy)]
pub struct Registers {
    pub base: u64,
    pub config: u32,
    pub idr0: u32,
    pub idr1: u32,
    pub output_bits: u32,
}

/// Why a transaction ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With this event.
    Event(E),
    /// By the host's stage 2, or memory that is not there.
    Outside,
    /// Without an event.
    Silent,
    /// By a fault that is not to be recorded (CD.R).
    Unrecorded,
    /// It does not: it stalls.
    Stalls,
    /// It cannot come to this: what it was made from is cached nowhere.
    Never,
}

/// Since when words count, by what they are.
pub trait Since {
    /// Stream table entries, and the first level of their table.
    fn stream(&self, first_level: bool) -> Moment;
    /// The context descriptor of a substream, and the first level of its table.
    fn context(&self, substream: u32, first_level: bool) -> Moment;
    /// Pointers to tables, of an ASID, whether they are cached or pages are that were found through
    /// them.
    fn pointer(&self, asid: u16, address: u64) -> Moment;
    /// Pointers that are cached, to tables of `1 << granule` bytes, on the way to a page of this
    /// level, or to none.
    fn kept_pointer(&self, asid: u16, address: u64, granule: u32, page: Option<u32>) -> Moment;
    /// Pages of `1 << shift` bytes, in tables of `1 << granule` bytes.
    fn page(&self, asid: u16, address: u64, shift: u32, granule: u32) -> Moment;
}

/// Config of a stream table entry, of which other values abort (§5.2).
const BYPASS: u64 = 4;
const STAGE1: u64 = 5;

/// Binary logarithms of the granules that TG0 and TG1 of a context descriptor select (§5.4).
const TG0: [Option<u32>; 4] = [Some(12), Some(16), Some(14), None];
const TG1: [Option<u32>; 4] = [None, Some(14), Some(12), Some(16)];
/// Bits of addresses, by IDR5.OAS and by IPS.
pub const OUTPUT_BITS: [u32; 8] = [32, 36, 40, 42, 44, 48, 52, 52];

/// An address space, as far as it is one to the TLB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub asid: u16,
    pub words: [u64; 3],
}

impl Space {
    /// IPS, AFFD, WXN, PAN, HD and HA, which may count as they were when an entry got into the TLB,
    /// or as they are: a page that is found through a cached pointer is read now.
    const CACHED: u64 = 7 << 32 | 3 << 35 | 1 << 40 | 3 << 42;
    /// T0SZ, TG0, EPD0, and the same of the other half: which entries a table has.
    const SHAPE: u64 = 0x40ff_40ff;

    /// What a transaction in this space may find that is in the TLB of `other`, as spaces;
    /// `None`: not known.
    pub fn with_entries_of(&self, other: &Self) -> Option<Vec<Self>> {
        let ([low, ..], [of_other, table0, table1]) = (self.words, other.words);
        let same = (low ^ of_other) & Self::SHAPE == 0;
        let then = low & !Self::CACHED | of_other & Self::CACHED;
        let with = |low| Self { asid: self.asid, words: [low, table0, table1] };
        same.then(|| if then == low { vec![with(low)] } else { vec![with(then), with(low)] })
    }
}

/// What the walk of a transaction came to: the address, and the space that translated it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    pub end: Result<u64, End>,
    pub space: Option<Space>,
    /// A page that every address space of the SMMU shares was used.
    pub global: bool,
    /// The stream's device may cache it.
    pub ats: bool,
}

impl Found {
    const NOTHING: Self = Self { end: Err(End::Silent), space: None, global: false, ats: false };

    /// What needs no tables.
    pub fn without_tables(end: Result<u64, End>) -> Self {
        Self { end, ..Self::NOTHING }
    }
}

/// A transaction, after its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    pub write: bool,
    pub privileged: bool,
    pub execute: bool,
}

/// A walk of one transaction.
pub struct Walk<'a, 'b> {
    pub words: &'a mut Oracle<'b>,
    pub registers: Registers,
    pub since: &'a dyn Since,
}

impl Walk<'_, '_> {
    fn load(&mut self, gpa: u64, since: Moment) -> Option<u64> {
        self.words.load(gpa, |_, until| until > since)
    }

    fn within(&self, address: u64) -> u64 {
        address & ((1 << self.registers.output_bits) - 1)
    }

    /// The address where stage 1 is bypassed.
    fn untranslated(&self, address: u64) -> Result<u64, End> {
        match address >> self.registers.output_bits {
            0 => Ok(address),
            _ => Err(End::Event(E::AddressSize)),
        }
    }

    /// Words 0 and 1 of the entry of `stream`.
    fn entry(&mut self, stream: u64) -> Result<[u64; 2], E> {
        let Registers { base, config, idr1, .. } = self.registers;
        let log2size = u64::from(config & 63);
        if stream >> log2size.min(u64::from(idr1 & 63)) != 0 {
            return Err(E::BadStreamId);
        }
        let base = self.within(base & 0x000f_ffff_ffff_ffc0);
        let aligned = |log2: u64| {
            let log2 = log2.max(6);
            if log2 > 63 {
                0
            } else {
                base >> log2 << log2
            }
        };
        let at = if config >> 16 & 3 == 1 {
            let split = match config >> 6 & 31 {
                split @ (8 | 10) => u64::from(split),
                _ => 6,
            };
            let at = aligned((log2size + 3).saturating_sub(split)) + (stream >> split) * 8;
            let descriptor = self.load(at, self.since.stream(true)).ok_or(E::SteFetch)?;
            crate::models::trace(|| format!("    first level at {at:x}: {descriptor:x}"));
            let span = descriptor & 31;
            let index = stream & ((1 << split) - 1);
            if span == 0 || span > split + 1 || index >= 1 << (span - 1) {
                return Err(E::BadStreamId);
            }
            // The table is aligned to its size.
            let table = descriptor & 0x000f_ffff_ffff_ffc0;
            let log2 = 5 + span;
            self.within(table >> log2 << log2) + index * 64
        } else {
            aligned(log2size + 6) + stream * 64
        };
        let since = self.since.stream(false);
        let low = self.load(at, since).ok_or(E::SteFetch)?;
        crate::models::trace(|| format!("    entry at {at:x}: {low:x}"));
        Ok([low, self.load(at + 8, since).ok_or(E::SteFetch)?])
    }

    /// Where `address` of `stream` leads.
    pub fn translate(
        &mut self,
        stream: u64,
        substream: Option<u32>,
        address: u64,
        kind: Kind,
    ) -> Found {
        let mut found = Found::NOTHING;
        let end = self.translated(stream, substream, address, kind, &mut found);
        Found { end, ..found }
    }

    /// Where `address` leads in `space`, by an entry with this EATS.
    pub fn within_space(&mut self, space: Space, ats: bool, address: u64, kind: Kind) -> Found {
        let mut found = Found { ats, ..Found::NOTHING };
        let end = self.by_context(space.words, true, address, kind, &mut found);
        Found { end, ..found }
    }

    /// The entry of `stream`, if by that it uses stage 1, or bypasses it. Streams whose entry is
    /// wrong abort: no host reports that.
    fn valid_entry(&mut self, stream: u64) -> Result<[u64; 2], End> {
        let [low, high] = self.entry(stream).map_err(|_| End::Silent)?;
        let Registers { idr0, idr1, output_bits, .. } = self.registers;
        let (count, ssid_bits) = (low >> 59, u64::from(idr1 >> 6 & 31));
        let ats = idr0 >> 10 & 1 != 0;
        let is_wrong = count > ssid_bits && ssid_bits > 0
            || (low & 0x000f_ffff_ffff_ffc0) >> output_bits != 0
            || high >> 27 & 1 != 0 && idr0 >> 24 & 3 == 1
            || ats && high >> 28 & 3 == 2;
        match low >> 1 & 7 {
            BYPASS if low & 1 != 0 => Ok([low, high]),
            STAGE1 if low & 1 != 0 && !is_wrong => Ok([low, high]),
            _ => Err(End::Silent),
        }
    }

    /// Whether the device of `stream` may cache translations.
    pub fn may_cache(&mut self, stream: u64) -> bool {
        let entry = self.valid_entry(stream);
        entry.is_ok_and(|[low, high]| low >> 1 & 7 == STAGE1 && high >> 28 & 3 != 0)
    }

    fn translated(
        &mut self,
        stream: u64,
        substream: Option<u32>,
        address: u64,
        kind: Kind,
        found: &mut Found,
    ) -> Result<u64, End> {
        let [low, high] = self.valid_entry(stream)?;
        if low >> 1 & 7 == BYPASS {
            return match substream {
                None => self.untranslated(address),
                // Substreams are of stage 1.
                Some(_) => Err(End::Event(E::BadSubstreamId)),
            };
        }
        found.ats = high >> 28 & 3 != 0;
        let Registers { idr1, output_bits, .. } = self.registers;
        let ssid_bits = u64::from(idr1 >> 6 & 31);
        let mut count = low >> 59;
        let contexts = low & 0x000f_ffff_ffff_ffc0;
        if ssid_bits == 0 {
            count = 0;
        }
        let format = match low >> 4 & 3 {
            _ if count == 0 => 0,
            3 => 0,
            format => format,
        };
        let default = match high & 3 {
            // Reserved: as 0.
            3 => 0,
            default => default,
        };
        let number = match substream {
            None if count == 0 || default == 2 => 0,
            None if default == 1 => return self.untranslated(address),
            None => return Err(End::Event(E::StreamDisabled)),
            Some(substream) if count == 0 || u64::from(substream) >> count != 0 => {
                return Err(End::Event(E::BadSubstreamId));
            }
            Some(0) if default == 2 => return Err(End::Event(E::StreamDisabled)),
            Some(substream) => substream,
        };
        let at = match format {
            0 => contexts + u64::from(number) * 64,
            format => {
                let bits = if format == 1 { 6 } else { 10 };
                let at = contexts + u64::from(number >> bits) * 8;
                let since = self.since.context(number, true);
                let descriptor = self.load(at, since).ok_or(End::Outside)?;
                let leaf = descriptor & 0x000f_ffff_ffff_f000;
                if descriptor & 1 == 0 || leaf >> output_bits != 0 {
                    return Err(End::Event(E::BadSubstreamId));
                }
                leaf + u64::from(number & ((1 << bits) - 1)) * 64
            }
        };
        let since = self.since.context(number, false);
        let mut cd = [0; 3];
        for (word, of) in cd.iter_mut().zip(0..) {
            *word = self.load(at + of * 8, since).ok_or(End::Outside)?;
        }
        self.load(at + 56, since).ok_or(End::Outside)?;
        self.by_context(cd, high >> 27 & 1 == 0, address, kind, found)
    }

    fn by_context(
        &mut self,
        cd: [u64; 3],
        may_stall: bool,
        address: u64,
        kind: Kind,
        found: &mut Found,
    ) -> Result<u64, End> {
        let [low, ..] = cd;
        let bit = |bit: u32| low >> bit & 1 != 0;
        let bad = End::Event(E::BadCd);
        let httu = self.registers.idr0 >> 6 & 3;
        let endless = bit(14) && bit(30);
        let stalls = bit(44);
        let legal = bit(31)
            && bit(46)
            && (!stalls || may_stall && self.registers.idr0 >> 24 & 3 == 0)
            && (endless || !bit(15))
            && bit(41)
            && (!bit(43) || httu >= 1)
            && (!bit(42) || httu >= 2);
        if !legal {
            return Err(bad);
        }
        let output_bits = match low >> 32 & 7 {
            ips @ 0..=5 => OUTPUT_BITS[ips as usize].min(self.registers.output_bits),
            _ => self.registers.output_bits,
        };
        let recorded = bit(45);
        let fault = |id| match recorded {
            _ if stalls => End::Stalls,
            true => End::Event(id),
            false => End::Unrecorded,
        };
        // Both halves are looked at.
        let granule0 = TG0[(low >> 6 & 3) as usize];
        let granule1 = TG1[(low >> 22 & 3) as usize];
        let mut halves = [None; 2];
        for (half, (disabled, granule, size, table)) in
            [(bit(14), granule0, low & 63, cd[1]), (bit(30), granule1, low >> 16 & 63, cd[2])]
                .into_iter()
                .enumerate()
        {
            if disabled {
                continue;
            }
            let granule = granule.ok_or(bad)?;
            let (bits, table) = (64 - size as u32, table & 0x000f_ffff_ffff_fff0);
            let table_bits = if granule == 16 { 52 } else { 48 }.min(output_bits);
            if !(25..=48).contains(&bits) || table >> table_bits != 0 {
                return Err(bad);
            }
            halves[half] = Some((granule, bits, table));
        }
        let half = (address >> 55 & 1) as usize;
        let address = match bit(38 + half as u32) {
            true => ((address << 8) as i64 >> 8) as u64,
            false => address,
        };
        // Before the address is looked at: a TLB may know it by the ASID, of another space.
        let asid = (low >> 48) as u16;
        found.space = Some(Space { asid, words: [low, cd[1], cd[2]] });
        let absent = fault(E::Translation);
        let (granule, bits, table) = halves[half].ok_or(absent)?;
        if (if half == 1 { !address } else { address }) >> bits != 0 {
            return Err(absent);
        }
        let (ha, hd) = (bit(43), bit(43) && bit(42));
        // Each level translates as many bits as a table has entries of eight bytes; level 3 is the
        // last one, and the first one has what is left.
        let each = granule - 3;
        let mut level = 4 - (bits - granule).div_ceil(each);
        let top = (bits - (granule + each * (3 - level))).max(3) + 3;
        let mut table = table >> top << top;
        let (mut user, mut write, mut run, mut run_privileged) = (true, true, true, true);
        // Until when all pointers were there.
        let mut pointers = Moment::MAX;
        loop {
            let shift = granule + each * (3 - level);
            let within = address & ((1 << bits) - 1);
            let at = table + (within >> shift & ((1 << each) - 1)) * 8;
            let is_leaf = |word: u64| level == 3 || word & 2 == 0;
            let since = self.since;
            let may = |word: u64, until: Moment| match word & 1 != 0 && is_leaf(word) {
                true => until > since.page(asid, address, shift, granule),
                false => until > since.pointer(asid, address),
            };
            let word = self.words.load(at, may).ok_or(End::Outside)?;
            crate::models::trace(|| format!("    level {level} at {at:x}: {word:x}"));
            let (page, of_page) = match word & 1 != 0 && is_leaf(word) {
                true => (Some(level), since.page(asid, address, shift, granule)),
                false => (None, Moment::MAX),
            };
            let is_next = word & 1 != 0 && !is_leaf(word);
            if is_next {
                pointers = pointers.min(self.words.until(at, word));
            } else if pointers <= since.kept_pointer(asid, address, granule, page)
                && pointers <= of_page
            {
                return Err(End::Never);
            }
            let blocks = level == 2 || level == 1 && granule == 12;
            let valid =
                word & 1 != 0 && if level == 3 { word & 2 != 0 } else { word & 2 != 0 || blocks };
            if !valid {
                return Err(absent);
            }
            let field = word & 0x0000_ffff_ffff_f000;
            let full = match granule {
                16 => field & !0xf000 | (field & 0xf000) << 36,
                _ => field,
            };
            let size = 1 << if is_leaf(word) { shift } else { granule };
            let next = full & !(size - 1);
            if next >> output_bits != 0 {
                return Err(fault(E::AddressSize));
            }
            if !is_leaf(word) {
                write &= word >> 62 & 1 == 0;
                user &= word >> 61 & 1 == 0;
                run &= word >> 60 & 1 == 0;
                run_privileged &= word >> 59 & 1 == 0;
                (table, level) = (next, level + 1);
                continue;
            }
            // AF, unless AFFD or HA.
            if word >> 10 & 1 == 0 && !bit(35) && !ha {
                return Err(fault(E::Access));
            }
            let clean = hd && word >> 51 & 1 != 0;
            write &= word >> 7 & 1 == 0 || clean;
            user &= word >> 6 & 1 != 0;
            run &= word >> 54 & 1 == 0;
            run_privileged &= word >> 53 & 1 == 0;
            found.global |= word >> 11 & 1 == 0;
            // WXN and PAN.
            let (no_run, never) = (bit(36), bit(40));
            let allowed = match (kind.privileged, kind.write, kind.execute) {
                (_, true, _) if !write => false,
                (false, false, true) => run && !(no_run && write && user),
                (false, ..) => user,
                (true, false, true) => run_privileged && !(write && (user || no_run)),
                (true, ..) => !(never && user),
            };
            if !allowed {
                return Err(fault(E::Permission));
            }
            return Ok(next | address & (size - 1));
        }
    }
}
