// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA, compared with the naive walk: which bytes it finds, where its own go, and the fault record
//! of one that is refused.

use twostage::spec::vtd::fault::FaultReason as R;
use twostage::spec::vtd::regs::{self, Cap, FaultRecord, Fsts};
use twostage_emulated::{DmaAttributes, DmaError, DmaFaultReason};

use super::naive::{decide, is_above_pasid_entry, is_recorded, Decision, EntriesSince, Way, Who};
use super::walk::{nothing_below, Kind, Reached, Since, Walk};
use super::world::{World, DEVICES};
use crate::models::beside::Machine;
use crate::models::memory::{is_data, Moment, Places};
use crate::models::oracle::{way, Oracle};

/// What may become of a DMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It gets to this GPA. Where flags of a first stage may have to be set through a second stage
    /// that does not allow that, it may fault instead; `quiet`: FPD.
    Gets { gpa: u64, unless_flags: bool, quiet: bool },
    /// It faults; `quiet`: FPD.
    Faults { reason: R, quiet: bool },
    /// It fails, and the guest is not told: translation is disabled.
    Fails,
}

/// A request of a device.
#[derive(Debug, Clone, Copy)]
pub struct Dma {
    /// The device's number.
    pub device: usize,
    pub pasid: Option<u32>,
    pub iova: u64,
    pub kind: Kind,
}

impl Dma {
    /// What the request has besides its address.
    pub fn attributes(&self) -> DmaAttributes {
        let Kind { privileged, execute, .. } = self.kind;
        DmaAttributes { pasid: self.pasid, privileged, execute }
    }
}

/// Where the interrupts of requests without PASID go.
const INTERRUPTS: std::ops::RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

impl World {
    /// All that may become of `dma`; `None`: not known.
    fn outcomes(&self, dma: &Dma) -> Option<Vec<Outcome>> {
        let Dma { device, pasid, iova, kind } = *dma;
        let who = Who { rid: DEVICES[device], pasid };
        if !self.plugged[device] {
            return Some(vec![Outcome::Fails]);
        }
        if !self.status().tes() {
            // What becomes of requests with PASID is not said.
            return pasid.is_none().then(|| {
                vec![match self.memory.load(iova & !7) {
                    Some(_) => Outcome::Gets { gpa: iova, unless_flags: false, quiet: false },
                    None => Outcome::Fails,
                }]
            });
        }
        let earlier = match self.caching[device] {
            true => Some(self.account.device_tlb_since(who, iova)?),
            false => None,
        };
        let as_of = earlier.unwrap_or(Moment::MAX);
        let mut outcomes = Vec::new();
        for decision in self.decisions(&self.account, who, earlier)? {
            let tagged = self.account.tagged(&decision, as_of);
            let mut by =
                |words: &mut Oracle<'_>| self.outcome(words, &decision, iova, kind, &tagged);
            self.every(&mut by)?.into_iter().for_each(|outcome| {
                if !outcomes.contains(&outcome) {
                    outcomes.push(outcome);
                }
            });
        }
        Some(outcomes)
    }

    fn outcome(
        &self,
        words: &mut Oracle<'_>,
        decision: &Decision,
        iova: u64,
        kind: Kind,
        since: &dyn Since,
    ) -> Outcome {
        let quiet = decision.quiet;
        let legacy = self.is_legacy();
        let is_memory = |gpa: u64| self.memory.load(gpa & !7).is_some();
        let offers = self.offers;
        let at = |address| Ok(Reached { address, unless_flags: false });
        let got = match decision.way {
            Way::Blocked(reason) => Err(reason),
            Way::Bypass if kind.execute => Err(R::ExecuteDisabled),
            Way::Bypass if is_memory(iova) => at(iova),
            Way::Bypass => Err(R::AddressBeyondHost),
            Way::One(stage) => {
                let walk = Walk { offers, stage: &stage, address: iova, kind, since };
                let got = walk.reach(words, &nothing_below);
                got.and_then(|got| match (is_memory(got.address), stage.second) {
                    (true, _) => Ok(got),
                    (false, true) => Err(R::SecondStageDenied),
                    (false, false) if kind.write => Err(R::WriteDenied),
                    (false, false) => Err(R::ReadDenied),
                })
            }
            Way::Nested { first, second } => {
                let through = |words: &mut Oracle<'_>, address, write| {
                    let kind = Kind { write, privileged: false, execute: false };
                    let walk = Walk { offers, stage: &second, address, kind, since };
                    walk.reach(words, &nothing_below)
                };
                let below = |words: &mut Oracle<'_>, top, table| {
                    let unless_flags = through(words, table, true).is_err();
                    match (through(words, table, false), top) {
                        (Ok(got), _) => Ok(Reached { unless_flags, ..got }),
                        (Err(R::AddressBeyondGuest), _) => Err(R::FirstStagePointerBeyond),
                        (Err(R::SecondStageDenied), true) => Err(R::FirstStageTopSecondStageDenied),
                        (Err(R::SecondStageDenied), false) => Err(R::FirstStageSecondStageDenied),
                        (Err(other), _) => Err(other),
                    }
                };
                let walk = Walk { offers, stage: &first, address: iova, kind, since };
                walk.reach(words, &below).and_then(|got| {
                    let to = through(words, got.address, kind.write)?;
                    let reached = Reached { address: to.address, ..got };
                    is_memory(to.address).then_some(reached).ok_or(R::SecondStageDenied)
                })
            }
        };
        match got {
            Ok(Reached { address: gpa, unless_flags }) => {
                Outcome::Gets { gpa, unless_flags, quiet }
            }
            Err(reason) if legacy => Outcome::Faults { reason: of_legacy(reason, kind), quiet },
            Err(reason) => Outcome::Faults { reason, quiet },
        }
    }

    /// The words that `dma` is translated by, and what they say of its requester, as they are now.
    pub fn way_of(&self, dma: &Dma) -> (Vec<u64>, Decision) {
        let Dma { device, pasid, iova, kind } = *dma;
        let who = Who { rid: DEVICES[device], pasid };
        let since = EntriesSince { contexts: Moment::MAX, pasids: Moment::MAX };
        way(&self.memory, |words| {
            let decision = decide(words, self.offers, self.root, who, since);
            self.outcome(words, &decision, iova, kind, &Now);
            decision
        })
    }

    /// Whether `dma` is an interrupt.
    pub fn is_interrupt(&self, dma: &Dma) -> bool {
        dma.pasid.is_none() && INTERRUPTS.contains(&dma.iova)
    }

    /// Where `dma` may go; `None`: it is not known, or it may be elsewhere than in pages for data.
    pub fn data(&self, dma: &Dma) -> Option<Vec<u64>> {
        let gpas = self.outcomes(dma)?.into_iter().filter_map(|outcome| match outcome {
            Outcome::Gets { gpa, .. } => Some(gpa),
            _ => None,
        });
        let gpas: Vec<_> = gpas.collect();
        gpas.iter().all(|gpa| is_data(*gpa)).then_some(gpas)
    }

    /// Does `dma`, of the aligned word at its address.
    pub fn dma(&mut self, dma: Dma) {
        self.clear_faults();
        self.last = Some(dma);
        let may = self.outcomes(&dma);
        let Dma { device, pasid, iova, kind } = dma;
        let attributes = dma.attributes();
        let mut bytes = [0; 8];
        let gpas = may.iter().flatten().filter_map(|outcome| match outcome {
            Outcome::Gets { gpa, .. } => Some(*gpa),
            _ => None,
        });
        let places = Places::new(&self.memory, gpas);
        let value = self.next_value();
        let write = kind.write && may.is_some();
        let done = match write {
            true => self.ports[device].write(attributes, iova, &value.to_le_bytes()),
            false => self.ports[device].read(attributes, iova, &mut bytes),
        };
        crate::models::trace(|| format!("  {dma:x?}: {done:x?}, {may:x?}"));
        let Some(may) = may else {
            if let Err(DmaError::PageRequested { group, .. }) = done {
                self.asked(&Dma { kind: Kind { write, ..kind }, ..dma }, group);
            }
            return;
        };
        let what = || format!("{dma:x?}: {done:x?}, {may:x?}; {:x?}", self.header);
        match done {
            Ok(()) if write => places.written(&mut self.memory, value, what),
            Ok(()) => places.read(&self.memory, u64::from_le_bytes(bytes), what),
            Err(DmaError::Fault { reason: found, .. }) => {
                // Tables that are not mirrored block who uses them, and mirrors have no upper half.
                let blocked = found == DmaFaultReason::Vtd(R::PasidEntryNotPresent)
                    && (self.hosts.fail || self.may_be_too_much());
                let starved = self.header.mirrored
                    && may.iter().all(|outcome| matches!(outcome, Outcome::Gets { .. }))
                    && (blocked || iova >> 63 != 0);
                let faults = self.faults(&dma, &may, starved);
                // A device TLB that gets no translation is no fault: see the section on ATS.
                let silent = may.contains(&Outcome::Fails)
                    || self.caching[device] && self.plugged[device]
                    || self.hosts.fail && !self.status().tes();
                match self.fault_record() {
                    Some(record) => {
                        let reason = R::from_code(record.high.fr());
                        let told = |(because, quiet): &(R, bool)| {
                            reason == Some(*because) && is_recorded(*because, *quiet)
                        };
                        let told = faults.iter().any(told) || self.hosts.fail;
                        assert!(told, "{reason:?} of {faults:?}; {}", what());
                        let of = (record.high.sid(), record.address(), record.high.t1());
                        let expected = (DEVICES[device], iova & !0xfff, !kind.write);
                        assert_eq!(of, expected, "{}", what());
                        let asked = record.high.pp().then_some(record.high.pv());
                        assert_eq!(asked, pasid, "{}", what());
                    }
                    None => {
                        let quiet =
                            faults.iter().any(|(because, quiet)| !is_recorded(*because, *quiet))
                                || self.hosts.fail && self.may_be_quiet(&dma);
                        assert!(silent || quiet, "nothing of {faults:?} is recorded; {}", what());
                    }
                }
            }
            Err(DmaError::Interrupt { .. }) => {
                assert!(self.is_interrupt(&dma), "{}", what());
            }
            Err(DmaError::PageRequested { group, .. }) => {
                let asks = |outcome: &Outcome| match *outcome {
                    Outcome::Faults { reason, .. } => asks_for_page(reason),
                    Outcome::Gets { unless_flags, .. } => unless_flags,
                    Outcome::Fails => false,
                };
                assert!(may.iter().any(asks) || self.hosts.fail, "{}", what());
                self.asked(&dma, group);
            }
            Err(_) => panic!("{}", what()),
        }
    }

    /// The faults that a DMA, of which one of `may` becomes, may be told as, each with its FPD;
    /// `starved`: its tables may not be mirrored.
    fn faults(&self, dma: &Dma, may: &[Outcome], starved: bool) -> Vec<(R, bool)> {
        let mut faults = Vec::new();
        for outcome in may {
            match *outcome {
                Outcome::Faults { reason, quiet } => faults.push((reason, quiet)),
                Outcome::Gets { unless_flags: true, quiet, .. } => {
                    faults.push((R::FirstStageFlagsSecondStageDenied, quiet));
                }
                _ => {}
            }
        }
        let who = Who { rid: DEVICES[dma.device], pasid: dma.pasid };
        let decisions = self.decisions(&self.account, who, None).unwrap_or_default();
        if self.header.mirrored && (starved || !faults.is_empty()) {
            faults = decisions.iter().filter_map(|it| self.as_of_now(dma, it)).collect();
        }
        // A PASID without an entry has nothing to be remembered by: what was wrong above its entry
        // when that was read, and is not any more, is told as no entry.
        let serves_now = decisions.first().is_some_and(|now| !now.is_blocked());
        if self.offers.caching_mode() && who.pasid.is_some() && serves_now {
            let above = |(reason, _): &(R, bool)| is_above_pasid_entry(*reason);
            if faults.iter().any(above) {
                faults.push((R::PasidEntryNotPresent, false));
            }
        }
        faults
    }

    /// Whether FPD may be set for `dma`.
    fn may_be_quiet(&self, dma: &Dma) -> bool {
        let who = Who { rid: DEVICES[dma.device], pasid: dma.pasid };
        let decisions = self.decisions(&self.account, who, None);
        decisions.is_none_or(|all| all.iter().any(|decision| decision.quiet))
    }

    /// The fault of `dma`, by `decision`, where no hardware walks the tables: the reason is that of
    /// the tables as they are when it is told. They may translate by then.
    fn as_of_now(&self, dma: &Dma, decision: &Decision) -> Option<(R, bool)> {
        let Dma { iova, kind, .. } = *dma;
        let by = |words: &mut Oracle<'_>| self.outcome(words, decision, iova, kind, &Now);
        if let [Outcome::Faults { reason, quiet }] = self.every(by)?[..] {
            return Some((reason, quiet));
        }
        let denied = match (decision.way, kind.write) {
            (Way::One(stage), _) if stage.second => R::SecondStageDenied,
            (Way::One(_), true) => R::WriteDenied,
            (Way::One(_), false) => R::ReadDenied,
            _ => return None,
        };
        let denied = if self.is_legacy() { of_legacy(denied, kind) } else { denied };
        Some((denied, decision.quiet))
    }

    /// Clears all fault records, and the overflow.
    pub fn clear_faults(&mut self) {
        let status = Fsts::from_bits(self.read32(regs::FSTS));
        if status.ppf() || status.pfo() {
            let cap = Cap::from_bits(self.offers.cap);
            for index in 0..cap.fault_records() {
                let at = cap.fault_record_offset() + index * regs::FRCD_SIZE;
                self.write32(at + 12, 1 << 31);
            }
            self.write32(regs::FSTS, Fsts::new().with_pfo(true).into_bits());
        }
    }

    /// The first fault record.
    pub fn fault_record(&self) -> Option<FaultRecord> {
        let status = Fsts::from_bits(self.read32(regs::FSTS));
        let cap = Cap::from_bits(self.offers.cap);
        let at = cap.fault_record_offset() + u64::from(status.fri()) * regs::FRCD_SIZE;
        let record = FaultRecord::from_words([self.read64(at), self.read64(at + 8)]);
        status.ppf().then_some(record)
    }
}

/// Nothing that was before counts.
struct Now;

impl Since for Now {
    fn pointer(&self, _: bool, _: u64) -> Moment {
        Moment::MAX
    }

    fn page(&self, _: bool, _: u64, _: u32) -> Moment {
        Moment::MAX
    }
}

/// Whether a device asks for the page that it did not get, for this reason. It asks, too, where a
/// table is not in the guest's memory, which the host's stage 2 does not have.
fn asks_for_page(reason: R) -> bool {
    matches!(
        reason,
        R::FirstStageNotPresent
            | R::FirstStageTopAccess
            | R::FirstStageAccess
            | R::SecondStageTopAccess
            | R::SecondStageAccess
            | R::FirstStageTopSecondStageDenied
            | R::FirstStageSecondStageDenied
            | R::SecondStageDenied
            | R::UserDenied
            | R::WriteDenied
            | R::ReadDenied
            | R::LegacySecondStageAccess
            | R::LegacyWriteDenied
            | R::LegacyReadDenied
    )
}

/// The code of legacy mode for a reason of second-stage tables.
fn of_legacy(reason: R, kind: Kind) -> R {
    match reason {
        R::SecondStageTopAccess | R::SecondStageAccess => R::LegacySecondStageAccess,
        R::SecondStageReserved => R::LegacySecondStageReserved,
        R::AddressBeyondGuest | R::AddressBeyondHost => R::LegacyAddressBeyond,
        R::SecondStageDenied if kind.write => R::LegacyWriteDenied,
        R::SecondStageDenied => R::LegacyReadDenied,
        other => other,
    }
}
