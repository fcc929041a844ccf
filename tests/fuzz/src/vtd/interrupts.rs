// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts of devices, compared with a naive model of their remapping (§5.1): the entry decides
//! as it is now, or as it was at any time since the guest last had it invalidated.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arbitrary::{Result, Unstructured};
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason as R;
use twostage::spec::vtd::qi::{Descriptor, InterruptEntryScope};
use twostage::spec::vtd::regs;
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};

use super::image::page;
use super::naive::is_recorded;
use super::world::{World, DEVICES, UNKNOWN};
use crate::models::memory::{Moment, PAGE};

/// Entries that are used.
const ENTRIES: u64 = 4;

/// What the guest has said of entries, and who hears of it.
#[derive(Debug, Default)]
pub struct Entries {
    /// IRTA as it was latched.
    pub table: u64,
    since: Moment,
    said: Vec<(u16, u8, Moment)>,
    /// Keeps what [`InterruptRemapper::translate`] returns, if anybody does.
    pub listener: Option<Arc<Listener>>,
}

/// How often it was told of changes.
#[derive(Debug, Default)]
pub struct Listener(AtomicU64);

impl InterruptListener for Listener {
    fn interrupts_changed(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Listener {
    fn told(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Entries {
    /// Nothing of before counts.
    pub fn forget(&mut self, now: Moment) {
        self.since = now;
        self.said.clear();
    }

    /// `descriptor` is complete.
    pub fn complete(&mut self, descriptor: &Descriptor, now: Moment) {
        match *descriptor {
            Descriptor::InterruptEntryCache(InterruptEntryScope::Global) => self.forget(now),
            Descriptor::InterruptEntryCache(InterruptEntryScope::Index { index, mask }) => {
                self.said.push((index, mask, now));
            }
            _ => {}
        }
    }

    fn since(&self, index: u16) -> Moment {
        let covers = |(of, mask, _): &&(u16, u8, Moment)| {
            u32::from(index ^ of).checked_shr(u32::from(*mask)).unwrap_or(0) == 0
        };
        self.said.iter().rev().find(covers).map_or(self.since, |(.., at)| *at)
    }
}

/// What becomes of an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Sent(MsiMessage),
    /// `quiet`: FPD.
    Refused {
        reason: R,
        index: u16,
        quiet: bool,
    },
    /// It is none, but a write to memory.
    None,
}

/// What was sent.
#[derive(Debug, Default)]
struct Sent(Mutex<Vec<MsiMessage>>);

impl InterruptSink for Sent {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().expect("nothing panics with it").push(MsiMessage { address, data });
    }
}

impl World {
    /// All that may become of `message` of `source`; `None`: not known.
    fn interrupt_outcomes(&self, source: u16, message: MsiMessage) -> Option<Vec<Outcome>> {
        let status = self.status();
        if !status.ires() {
            return Some(vec![Outcome::Sent(message)]);
        }
        let MsiMessage { address, data } = message;
        if address >> 20 != 0xfee {
            return Some(vec![Outcome::None]);
        }
        let refused = |reason, index: u32| {
            Some(vec![Outcome::Refused { reason, index: index as u16, quiet: false }])
        };
        let table = self.interrupts.table;
        let extended = table & 1 << 11 != 0;
        if address & 1 << 4 == 0 {
            return match status.cfis() && !extended {
                true => Some(vec![Outcome::Sent(message)]),
                false => refused(R::InterruptCompatibilityBlocked, 0),
            };
        }
        let mut index = (address >> 5 & 0x7fff | (address >> 2 & 1) << 15) as u32;
        if address & 1 << 3 != 0 {
            if data >> 16 != 0 {
                return refused(R::InterruptRequestReserved, 0);
            }
            index += data & 0xffff;
        }
        if index >= 2 << (table & 15) {
            return refused(R::InterruptIndexBeyond, index);
        }
        let at = (table & !0xfff).checked_add(u64::from(index) * 16);
        let Some(at) = at.filter(|at| self.memory.load(*at).is_some()) else {
            return refused(R::InterruptEntryAccess, index);
        };
        if UNKNOWN.contains(&(at / PAGE)) {
            return None;
        }
        let mut outcomes = Vec::new();
        for words in self.memory.pairs(at, self.interrupts.since(index as u16)) {
            let outcome = by_entry(words, extended, source, index as u16);
            // What is not valid, whoever asks, is cached in caching mode only.
            let valid = !matches!(
                outcome,
                Outcome::Refused {
                    reason: R::InterruptEntryNotPresent | R::InterruptEntryReserved,
                    ..
                }
            );
            if outcomes.is_empty() || valid || self.offers.caching_mode() {
                outcomes.push(outcome);
            }
        }
        Some(outcomes)
    }

    /// `source` interrupts.
    fn interrupt(&mut self, source: u16, message: MsiMessage) {
        self.clear_faults();
        let may = self.interrupt_outcomes(source, message);
        let rid = Bdf::from_raw(source);
        let kept = self.iommu.translate(rid, message);
        let sink = Sent::default();
        let done = self.iommu.send_remapped(rid, message, &sink);
        let sent = sink.0.into_inner().expect("nothing panics with it");
        crate::models::trace(|| format!("  {message:x?} {source:x}: {sent:x?}, {may:x?}"));
        let what = || format!("{message:x?} {source:x}: {sent:x?}, {kept:x?}, {may:x?}");
        assert_eq!(sent.len(), usize::from(done), "{}", what());
        let listened = self.interrupts.listener.is_some();
        assert_eq!(kept.as_ref(), sent.first().filter(|_| listened), "{}", what());
        let Some(may) = &may else { return };
        if let Some(sent) = sent.first() {
            return assert!(may.contains(&Outcome::Sent(*sent)), "{}", what());
        }
        let record = self.fault_record();
        let told = |outcome: &Outcome| match (*outcome, record) {
            (Outcome::Sent(_), _) => false,
            (Outcome::None, record) => record.is_none(),
            (Outcome::Refused { reason, quiet, .. }, None) => !is_recorded(reason, quiet),
            (Outcome::Refused { reason, index, quiet }, Some(record)) => {
                let [low, _] = record.to_words();
                let of = (record.high.fr(), record.high.sid(), (low >> 48) as u16);
                is_recorded(reason, quiet) && of == (reason.code(), source, index)
            }
        };
        assert!(may.iter().any(told), "{record:x?}; {}", what());
    }

    /// Whoever keeps translations is told before `descriptors` are complete, if they are.
    fn invalidate_entries(&mut self, descriptors: &[Descriptor]) {
        let told = |world: &Self| world.interrupts.listener.as_ref().map(|it| it.told());
        let before = told(self);
        let accepted = descriptors.iter().all(|descriptor| self.accepts(descriptor));
        self.invalidate(descriptors);
        let accepted = accepted && !self.hosts.fail;
        assert!(!accepted || before.is_none() || told(self) > before, "{descriptors:?}");
    }
}

/// What the entry `words`, whose number is `index`, says to an interrupt of `source` (§9.9).
fn by_entry(words: [u64; 2], extended: bool, source: u16, index: u16) -> Outcome {
    let [low, high] = words;
    let refused = |reason| Outcome::Refused { reason, index, quiet: low & 2 != 0 };
    let mode = low >> 5 & 7;
    let destination = low >> 32;
    let (sid, svt) = (high as u16, high >> 18 & 3);
    if low & 1 == 0 {
        return refused(R::InterruptEntryNotPresent);
    }
    // IM is reserved, too: interrupts are not posted.
    let reserved = low & 0xff00_f000 != 0
        || mode == 3
        || mode == 6
        || !extended && destination & !0xff00 != 0
        || high >> 20 != 0
        || svt == 3;
    if reserved {
        return refused(R::InterruptEntryReserved);
    }
    let ignored = [0, 4, 6, 7][(high >> 16 & 3) as usize];
    let matches = match svt {
        0 => true,
        1 => (sid ^ source) & !ignored == 0,
        _ => (sid >> 8..=sid & 0xff).contains(&(source >> 8)),
    };
    if !matches {
        return refused(R::InterruptSourceMismatch);
    }
    let destination = if extended { destination } else { destination >> 8 };
    let (logical, hint, level) = (low >> 2 & 1, low >> 3 & 1, low >> 4 & 1);
    let address = 0xfee0_0000
        | (destination & !0xff) << 32
        | (destination & 0xff) << 12
        | hint << 3
        | logical << 2;
    let data = 1 << 14 | level << 15 | mode << 8 | low >> 16 & 0xff;
    Outcome::Sent(MsiMessage { address, data: data as u32 })
}

/// An entry that is cached changes, and `said` is enough for it.
fn cached(world: &mut World, source: u16, index: u64, said: Descriptor) {
    let at = page::INTERRUPTS * PAGE + index * 16;
    let message = MsiMessage { address: 0xfee0_0010 | index << 5, data: 0 };
    let entry = |vector: u64| 1 << 40 | vector << 16 | 1;
    world.memory.store(at + 8, 0);
    world.memory.store(at, entry(0x41));
    world.interrupt(source, message);
    world.memory.store(at, entry(0x42));
    world.invalidate_entries(&[said]);
    world.interrupt(source, message);
}

/// One round: the guest sets up its table if there is none, changes a word of it, says so or not,
/// and a device interrupts.
pub fn step(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let [how, what, said, message]: [u8; 4] = input.arbitrary()?;
    let remaps = world.header.remaps;
    if remaps && (!world.status().ires() || how & 0xf0 == 0xf0) {
        let size = [1, 7, 0, 15][usize::from(how >> 1 & 3)];
        let extended = u64::from(how >> 3 & 1) << 11;
        world.write64(regs::IRTA, (page::INTERRUPTS * PAGE) | extended | size);
        world.command(|command| command.with_sirtp(true));
        world.command(|command| command.with_ire(true).with_cfi(how & 1 != 0));
    }
    let index = u64::from(message & 3);
    let at = page::INTERRUPTS * PAGE + index * 16;
    let sid = u64::from(DEVICES[usize::from(what & 1)]);
    match what >> 4 {
        0..=3 => {}
        4..=6 => world.memory.store(at, 1 << 40 | u64::from(what) << 16 | 1),
        7..=9 => world.memory.store(at + 8, sid | 1 << 18 | u64::from(what >> 1 & 3) << 16),
        10 => world.memory.store(at + 8, u64::from(what & 7) | 2 << 18),
        11 => world.memory.store(at, 0),
        12..=14 => {
            let bit = u64::from(what & 31) + u64::from(said & 1) * 32;
            let at = at + u64::from(said >> 1 & 1) * 8;
            let now = world.memory.load(at).unwrap_or(0);
            world.memory.store(at, now ^ 1 << bit);
        }
        _ => world.memory.store(at, input.arbitrary()?),
    }
    let near = |mask: u8, index: u64| {
        Descriptor::InterruptEntryCache(InterruptEntryScope::Index { index: index as u16, mask })
    };
    let global = Descriptor::InterruptEntryCache(InterruptEntryScope::Global);
    match said >> 4 {
        _ if !remaps => {}
        0..=5 => {}
        6..=9 => world.invalidate_entries(&[near(0, index)]),
        10 => world.invalidate_entries(&[near(0, (index + 1) % ENTRIES)]),
        11 | 12 => {
            // They differ in the highest bit of the mask: a smaller one would not join them.
            let mask = said & 3;
            let highest = (1_u64 << mask) / 2;
            let other = index ^ (highest | u64::from(what) & highest.saturating_sub(1));
            cached(world, sid as u16, index, near(mask, other));
        }
        _ => world.invalidate_entries(&[global]),
    }
    let source = match message >> 2 & 7 {
        0..=5 => DEVICES[usize::from(message >> 2 & 1)],
        6 => 0xf8,
        _ => 0x24,
    };
    let handle = index << 5;
    let (address, data) = match message >> 5 {
        0..=3 => (0xfee0_0010 | handle, 0),
        4 => (0xfee0_0018 | (index & 2) << 5, (index & 1) as u32),
        5 => (0xfee0_1000, 0x41),
        6 => (0xfee0_0018 | u64::from(how) << 5, u32::from(said) << (what & 31)),
        _ => (0xfee0_0000 ^ 1 << (how & 63), said.into()),
    };
    world.interrupt(source, MsiMessage { address, data });
    Ok(())
}
