// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA, compared with the naive walk: which bytes it finds, where its own go, and the event of one
//! that is refused.

use std::ops::Range;

use twostage::spec::smmuv3::event::EventId as E;
use twostage::spec::smmuv3::regs::{self, Gbpa};
use twostage_emulated::{DmaAttributes, DmaError};

use super::account::{Account, OfStream};
use super::image::page;
use super::naive::{End, Found, Kind, Since, Walk};
use super::world::{World, DEVICES};
use crate::models::beside::Machine;
use crate::models::memory::{is_data, Moment, Places};
use crate::models::oracle::{every, way};

/// Pages, by number, that the SMMU writes to.
pub const UNKNOWN: Range<u64> = page::COMMANDS..page::REQUESTS + 1;

/// A transaction of a device.
#[derive(Debug, Clone, Copy)]
pub struct Dma {
    /// The device's number.
    pub device: usize,
    pub substream: Option<u32>,
    pub address: u64,
    pub kind: Kind,
}

impl Dma {
    /// What the request has besides its address.
    pub fn attributes(&self) -> DmaAttributes {
        let Kind { privileged, execute, .. } = self.kind;
        DmaAttributes { pasid: self.substream, privileged, execute }
    }
}

/// Nothing that was before counts.
struct Now;

impl Since for Now {
    fn stream(&self, _: bool) -> Moment {
        Moment::MAX
    }

    fn context(&self, _: u32, _: bool) -> Moment {
        Moment::MAX
    }

    fn pointer(&self, _: u16, _: u64) -> Moment {
        Moment::MAX
    }

    // Nothing is cached, so nothing must be.
    fn kept_pointer(&self, _: u16, _: u64, _: u32, _: Option<u32>) -> Moment {
        0
    }

    fn page(&self, _: u16, _: u64, _: u32, _: u32) -> Moment {
        Moment::MAX
    }
}

/// Since when words count for `dma`; if the device has had a TLB since `from`, for what it has in
/// that.
fn since_of<'a>(account: &'a Account, dma: &Dma, from: Option<usize>) -> OfStream<'a> {
    let stream = u64::from(DEVICES[dma.device]);
    match from {
        None => account.of(stream),
        Some(from) => account.of_device(stream, dma.substream, dma.address, from),
    }
}

impl World {
    /// All that may become of `dma`; `None`: not known.
    fn outcomes(&mut self, dma: &Dma) -> Option<Vec<Found>> {
        let Dma { device, substream, address, .. } = *dma;
        if !self.plugged[device] {
            return Some(vec![Found::without_tables(Err(End::Silent))]);
        }
        // Not done yet, as a verb has failed: for some streams, perhaps.
        let is_done = self.read32(regs::CR0) == self.read32(regs::CR0ACK);
        if !is_done && self.header.fails {
            self.account.used(None);
            return None;
        }
        if !self.is_enabled() {
            let gbpa = Gbpa::from_bits(self.read32(regs::GBPA));
            if gbpa.update() {
                return None;
            }
            let end = if gbpa.abort() { Err(End::Silent) } else { Ok(address) };
            return substream.is_none().then(|| vec![Found::without_tables(end)]);
        }
        let Some(mut all) = self.found(dma, None) else {
            self.account.used(None);
            return None;
        };
        if let Some(from) = self.device_tlbs[device] {
            let older = self.found(dma, Some(from))?;
            all.extend(older.into_iter().filter(|found| found.ats && found.end.is_ok()));
        }
        Some(all)
    }

    /// All that `dma` may find; if the device has had a TLB since `from`, by what may be in that.
    fn found(&mut self, dma: &Dma, from: Option<usize>) -> Option<Vec<Found>> {
        let Dma { device, substream, address, kind } = *dma;
        let (registers, stream) = (self.registers(), u64::from(DEVICES[device]));
        let since = since_of(&self.account, dma, from);
        let mut all = every(&self.memory, UNKNOWN, |words| {
            let mut walk = Walk { words, registers, since: &since };
            walk.translate(stream, substream, address, kind)
        })?;
        all.iter().for_each(|found| self.account.used(Some(found)));
        for Found { space, ats, .. } in all.clone() {
            let Some(space) = space else { continue };
            for other in self.account.others(&space, from.is_some())? {
                let since = since_of(&self.account, dma, from);
                let found = every(&self.memory, UNKNOWN, |words| {
                    let mut walk = Walk { words, registers, since: &since };
                    walk.within_space(other, ats, address, kind)
                })?;
                all.extend(found);
            }
        }
        all.retain(|found| found.end != Err(End::Never));
        Some(all)
    }

    /// The words that `dma` is translated by, and what they come to, as they are now.
    pub fn way_of(&self, dma: &Dma) -> (Vec<u64>, Found) {
        let Dma { device, substream, address, kind } = *dma;
        way(&self.memory, |words| {
            let mut walk = Walk { words, registers: self.registers(), since: &Now };
            walk.translate(u64::from(DEVICES[device]), substream, address, kind)
        })
    }

    /// Where `dma` may go; `None`: it is not known, or it may be elsewhere than in pages for data.
    pub fn data(&mut self, dma: &Dma) -> Option<Vec<u64>> {
        let found = self.outcomes(dma)?;
        let gpas: Vec<_> = found.iter().filter_map(|found| found.end.ok()).collect();
        gpas.iter().all(|gpa| is_data(*gpa)).then_some(gpas)
    }

    /// Does `dma`, of the aligned word at its address.
    pub fn dma(&mut self, dma: Dma) {
        self.let_wait();
        self.last = Some(dma);
        let may = self.outcomes(&dma);
        let refused = |found: &Found| found.end.is_err() || self.is_outside(found);
        let is_refused = may.as_ref().is_some_and(|may| may.iter().any(refused));
        // One that is not refused has none.
        let has_event = self.has_events() && is_refused && !self.failures.may_block;
        let next = has_event.then(|| self.drop_events());
        self.is_quiet &= may.is_some();
        let Dma { device, address, kind, .. } = dma;
        let attributes = dma.attributes();
        let mut bytes = [0; 8];
        let gpas = may.iter().flatten().filter_map(|found| found.end.ok());
        let places = Places::new(&self.memory, gpas);
        let value = self.next_value();
        let write = kind.write && may.is_some();
        let done = match write {
            true => self.ports[device].write(attributes, address, &value.to_le_bytes()),
            false => self.ports[device].read(attributes, address, &mut bytes),
        };
        crate::models::trace(|| format!("  {dma:x?}: {done:x?}, {may:x?}"));
        if let Err(DmaError::PageRequested { group, .. }) = done {
            let waits = |found: &Found| match found.end {
                Err(End::Event(E::Translation | E::Access | E::Permission)) => self.header.requests,
                // Not in the host's stage 2, or not recorded.
                Err(End::Outside | End::Unrecorded) => self.header.requests,
                Ok(_) => self.header.requests && self.is_outside(found),
                end => end == Err(End::Stalls),
            };
            let may_wait = may.as_ref().is_none_or(|may| may.iter().any(waits));
            assert!(may_wait, "{dma:x?}, {may:x?}; {:x?}", self.header);
            if self.header.requests {
                return self.asked(&Dma { kind: Kind { write, ..kind }, ..dma }, group);
            }
            return self.waits(Dma { kind: Kind { write, ..kind }, ..dma }, group);
        }
        let Some(may) = may else { return };
        let what = || format!("{dma:x?}: {done:x?}, {may:x?}; {:x?}", self.header);
        match done {
            Ok(()) if write => places.written(&mut self.memory, value, what),
            Ok(()) => places.read(&self.memory, u64::from_le_bytes(bytes), what),
            Err(DmaError::Fault { .. }) => {
                let blocked = self.failures.may_block;
                let refused = blocked
                    || may.iter().any(|found| match found.end {
                        Ok(_) => self.is_outside(found),
                        Err(end) => end != End::Stalls,
                    });
                assert!(refused, "{}", what());
                if let Some(next) = next {
                    self.expect_event(&dma, &may, next);
                }
            }
            Err(_) => panic!("{}", what()),
        }
    }

    /// Whether `found` is an address that is not memory: the host's stage 2 refuses it.
    fn is_outside(&self, found: &Found) -> bool {
        found.end.is_ok_and(|gpa| self.memory.load(gpa & !7).is_none())
    }

    /// The event of `dma`, which was refused as one of `may`, is what it is to be, and the only
    /// one; `next`: where it is to be.
    fn expect_event(&mut self, dma: &Dma, may: &[Found], next: u32) {
        let what = || format!("{dma:x?}, {may:x?}; {:x?}", self.header);
        // Linux keeps those of its own stage 2. A device that asks for translations is told of a
        // missing one, and nobody else is.
        let asks = self.device_tlbs[dma.device].is_some();
        let silent = |found: &Found| match found.end {
            Err(End::Event(E::Translation | E::Access | E::Permission)) => asks && found.ats,
            Err(End::Event(_)) => false,
            _ => true,
        };
        let (events, event) = self.events_since(next);
        if events == 0 {
            assert!(may.iter().any(silent), "no event: {}", what());
            return;
        }
        assert_eq!(events, 1, "more events for {}", what());
        let id = event.id().unwrap_or_else(|| panic!("{event:x?} for {}", what()));
        assert!(
            may.iter().any(|found| found.end == Err(End::Event(id))),
            "{event:x?} for {}",
            what()
        );
        assert_eq!(event.stream().raw(), u32::from(DEVICES[dma.device]), "{}", what());
        if id.has_substream() {
            let substream = event.substream().map(|substream| substream.raw());
            // That of C_BAD_SUBSTREAMID is 0 if there is none.
            let of_none = (id == E::BadSubstreamId).then_some(0);
            assert_eq!(substream, dma.substream.or(of_none), "{event:x?} for {}", what());
        }
        if id.has_input() {
            let access = event.qw1;
            let told = (event.input_address, access.rnw(), access.pnu(), access.ind());
            let Kind { write, privileged, execute } = dma.kind;
            assert_eq!(told, (dma.address, !write, privileged, execute), "{}", what());
        }
    }
}
