// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA, compared with the naive walk: which bytes it finds, where its own go, and the event of one
//! that is refused.

use std::ops::Range;

use twostage::spec::smmuv3::event::EventId;
use twostage::spec::smmuv3::regs::{self, Gbpa};
use twostage_emulated::{DmaAttributes, DmaError};

use super::image::page;
use super::naive::{End, Found, Kind, Since, Walk};
use super::world::{World, DEVICES};
use crate::models::memory::{Moment, Places};
use crate::models::oracle::{every, way};

/// Pages, by number, that the SMMU writes to.
const UNKNOWN: Range<u64> = page::COMMANDS..page::REQUESTS + 1;

/// A transaction of a device.
#[derive(Debug, Clone, Copy)]
pub struct Dma {
    /// The device's number.
    pub device: usize,
    pub substream: Option<u32>,
    pub address: u64,
    pub kind: Kind,
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

    fn page(&self, _: u16, _: u64, _: u32, _: u32) -> Moment {
        Moment::MAX
    }
}

impl World {
    /// All that may become of `dma`; `None`: not known.
    fn outcomes(&mut self, dma: &Dma) -> Option<Vec<Result<u64, End>>> {
        let Dma { device, substream, address, kind } = *dma;
        if !self.plugged[device] {
            return Some(vec![Err(End::Silent)]);
        }
        if !self.is_enabled() {
            let gbpa = Gbpa::from_bits(self.read32(regs::GBPA));
            return substream.is_none().then(|| {
                vec![match gbpa.abort() {
                    true => Err(End::Silent),
                    false => Ok(address),
                }]
            });
        }
        let registers = self.registers();
        let since = self.account.of(u64::from(DEVICES[device]));
        let found = every(&self.memory, UNKNOWN, |words| {
            let mut walk = Walk { words, registers, since: &since };
            walk.translate(u64::from(DEVICES[device]), substream, address, kind)
        });
        let Some(mut all) = found else {
            self.account.used(None);
            return None;
        };
        all.iter().for_each(|found| self.account.used(Some(found)));
        for space in all.clone().iter().filter_map(|found| found.space) {
            for other in self.account.others(&space)? {
                let since = self.account.of(u64::from(DEVICES[device]));
                let found = every(&self.memory, UNKNOWN, |words| {
                    let mut walk = Walk { words, registers, since: &since };
                    walk.within_space(other, address, kind)
                })?;
                all.extend(found);
            }
        }
        Some(all.into_iter().map(|found| found.end).collect())
    }

    /// The words that `dma` is translated by, and what they come to, as they are now.
    pub fn way_of(&self, dma: &Dma) -> (Vec<u64>, Found) {
        let Dma { device, substream, address, kind } = *dma;
        way(&self.memory, |words| {
            let mut walk = Walk { words, registers: self.registers(), since: &Now };
            walk.translate(u64::from(DEVICES[device]), substream, address, kind)
        })
    }

    /// Does `dma`, of the aligned word at its address.
    pub fn dma(&mut self, dma: Dma) {
        self.last = Some(dma);
        let may = self.outcomes(&dma);
        // One that is not refused has none.
        let is_refused = |may: &Vec<_>| may.iter().any(Result::is_err);
        let has_event = self.has_events() && may.as_ref().is_some_and(is_refused);
        let next = has_event.then(|| self.drop_events());
        self.is_quiet &= may.is_some();
        let Dma { device, substream: pasid, address, kind } = dma;
        let attributes =
            DmaAttributes { pasid, privileged: kind.privileged, execute: kind.execute };
        let mut bytes = [0; 8];
        let gpas = may.iter().flatten().filter_map(|end| end.ok());
        let places = Places::new(&self.memory, gpas);
        self.serial += 1;
        let value = 0x5e_0000_0000_0000 | self.serial << 12;
        let write = kind.write && may.is_some();
        let done = match write {
            true => self.ports[device].write(attributes, address, &value.to_le_bytes()),
            false => self.ports[device].read(attributes, address, &mut bytes),
        };
        crate::models::trace(|| format!("  {dma:x?}: {done:x?}, {may:x?}"));
        let Some(may) = may else { return };
        let what = || format!("{dma:x?}: {done:x?}, {may:x?}; {:x?}", self.header);
        match done {
            Ok(()) if write => places.written(&mut self.memory, value, what),
            Ok(()) => places.read(&self.memory, u64::from_le_bytes(bytes), what),
            Err(DmaError::Fault { .. }) => {
                let outside = |gpa: &u64| self.memory.load(*gpa & !7).is_none();
                let refused = may.iter().any(|end| end.as_ref().ok().is_none_or(outside));
                assert!(refused, "{}", what());
                if let Some(next) = next {
                    self.expect_event(&dma, &may, next);
                }
            }
            Err(_) => panic!("{}", what()),
        }
    }

    /// The event of `dma`, which was refused as one of `may`, is what it is to be, and the only
    /// one; `next`: where it is to be.
    fn expect_event(&mut self, dma: &Dma, may: &[Result<u64, End>], next: u32) {
        let what = || format!("{dma:x?}, {may:x?}; {:x?}", self.header);
        // Linux keeps those of its own stage 2.
        let silent = |end: &Result<u64, End>| !matches!(end, Err(End::Event(_)));
        let (events, event) = self.events_since(next);
        if events == 0 {
            assert!(may.iter().any(silent), "no event: {}", what());
            return;
        }
        assert_eq!(events, 1, "more events for {}", what());
        let id = event.id().unwrap_or_else(|| panic!("{event:x?} for {}", what()));
        assert!(may.contains(&Err(End::Event(id))), "{event:x?} for {}", what());
        assert_eq!(event.stream().raw(), u32::from(DEVICES[dma.device]), "{}", what());
        if id.has_substream() {
            let substream = event.substream().map(|substream| substream.raw());
            // That of C_BAD_SUBSTREAMID is 0 if there is none.
            let of_none = (id == EventId::BadSubstreamId).then_some(0);
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
