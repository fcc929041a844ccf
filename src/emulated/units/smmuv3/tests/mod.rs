// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the unit as a whole, and a small machine to do them on.

mod attachments;
mod device_tlb;
mod flags;
mod reference;
mod sanitizer;
mod staleness;
mod stalls;

use std::ops::Deref;
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::*;
use crate::units::engine::testing::{self, *};
use crate::units::engine::{IovaRange, TlbInvalidation};
use crate::units::hardware::CacheTag;
use crate::{DmaAttributes, DmaError, DmaFaultReason};
use twostage::spec::smmuv3::command::AddressRange;
use twostage::spec::smmuv3::context::{Cd, Cd0, Cd1, Cd2, CD_SIZE};
use twostage::spec::smmuv3::event::{EventId, EventRecord};
use twostage::spec::smmuv3::stream_table::{S1Format, Ste0, Ste1, StreamConfig};
use twostage::spec::smmuv3::translation::{Descriptor, Granule, LAST_LEVEL};

/// StreamID of the machine's device.
pub const SID: u16 = 0x0018;
/// VMID of the machine's guest.
pub const VMID: CacheTag = CacheTag(3);
/// ASID of the machine's address space.
pub const ASID: u16 = 7;
/// A page that anybody may read, write and execute, of one ASID.
pub const RW: Descriptor =
    Descriptor::new().with_valid(true).with_af(true).with_ng(true).with_ap_unprivileged(true);

/// Guest memory, a unit, and tables as a guest would write them.
#[derive(Debug)]
pub struct Machine {
    pub unit: Arc<SmmuV3Unit>,
    memory: Memory,
}

/// The machine's memory is accessed through the machine.
impl Deref for Machine {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.memory
    }
}

impl Machine {
    pub fn new(config: SmmuV3UnitConfig) -> Self {
        Self { unit: SmmuV3Unit::new(config), memory: Memory::new() }
    }

    pub fn port(&self) -> DmaPort {
        self.unit.port(SID)
    }

    /// Writes the context descriptor at `gpa`.
    pub fn poke_cd(&self, gpa: u64, cd: &Cd) {
        for (at, word) in (gpa..).step_by(8).zip(cd.to_words()) {
            self.poke(at, word);
        }
    }

    /// Attaches the stream (or the host's substream `pasid` of it) to a stream table entry.
    pub fn install(&self, pasid: Option<u32>, tag: CacheTag, stage1: Option<[u64; 2]>) {
        self.install_with(true, pasid, tag, stage1);
    }

    /// The same, to one that answers translation requests, or does not.
    pub fn install_with(
        &self,
        ats: bool,
        pasid: Option<u32>,
        tag: CacheTag,
        stage1: Option<[u64; 2]>,
    ) {
        let stage2 = Arc::clone(&self.stage2);
        self.unit.install(SID, pasid, StreamEntry { tag, stage2, dirty: None, stage1, ats });
    }

    /// Attaches the device to one context descriptor at a new place; returns its GPA.
    pub fn attach(&self, cd: &Cd) -> u64 {
        let gpa = self.table(CD_SIZE);
        self.poke_cd(gpa, cd);
        self.install(None, VMID, Some(ste(gpa, 0, S1Format::Linear, 0)));
        gpa
    }

    /// Attaches the device to new, empty tables of this granule.
    pub fn tables(&self, granule: Granule) -> Tables<'_> {
        let input_bits = if granule == Granule::K64 { 42 } else { 48 };
        self.tables_of(granule, input_bits, false)
    }

    /// Attaches the device to new, empty tables, of TTB1 if they are `upper`.
    pub fn tables_of(&self, granule: Granule, input_bits: u32, upper: bool) -> Tables<'_> {
        let tables =
            Tables { machine: self, root: self.table(granule.size()), granule, input_bits, upper };
        self.attach(&tables.cd());
        tables
    }

    pub fn invalidate(&self, invalidation: Invalidation) {
        self.unit.invalidate(&[invalidation]);
    }

    /// The result of a read, or the event.
    pub fn read(&self, port: &mut DmaPort, attributes: DmaAttributes, iova: u64) -> Outcome {
        testing::read(port, attributes, iova).map_err(event)
    }

    /// The written word, or the event of the write.
    pub fn write(
        &self,
        port: &mut DmaPort,
        attributes: DmaAttributes,
        iova: u64,
        word: u64,
    ) -> Outcome {
        testing::write(port, attributes, iova, word).map_err(event)
    }

    /// A sink of the device's events.
    pub fn sink(&self) -> Arc<Sink<EventRecord>> {
        let sink = Arc::new(Sink::default());
        self.unit.set_event_sink(SID, sink.clone());
        sink
    }
}

/// Tables of stage 1 in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Tables<'a> {
    pub machine: &'a Machine,
    pub root: u64,
    pub granule: Granule,
    pub input_bits: u32,
    pub upper: bool,
}

impl Tables<'_> {
    /// A context descriptor with these tables only.
    pub fn cd(&self) -> Cd {
        let (size, table) = ((64 - self.input_bits) as u8, self.root >> 4);
        let word = cd0().with_epd0(self.upper).with_epd1(!self.upper);
        let qw0 = match self.upper {
            false => word.with_t0sz(size).with_tg0(self.granule.tg0()),
            true => word.with_t1sz(size).with_tg1(self.granule.tg1()),
        };
        Cd {
            qw0,
            qw1: Cd1::new().with_ttb0(table),
            qw2: Cd2::new().with_ttb1(table),
            ..Cd::default()
        }
    }

    /// GPA of the descriptor of `level` on the way to `iova`, creating missing tables.
    pub fn entry(&self, iova: u64, level: u8) -> u64 {
        let Self { machine, granule, input_bits, .. } = *self;
        let mut table = self.root;
        for above in granule.start_level(input_bits)..level {
            let entry = table + granule.index(iova, above, input_bits) * 8;
            if machine.peek(entry) == 0 {
                let next = machine.table(granule.size());
                let pointer = Descriptor::new().with_valid(true).with_table(true);
                machine.poke(entry, pointer.with_address(granule, next).into_bits());
            }
            table = Descriptor::from_bits(machine.peek(entry)).with_table(true).address(
                granule,
                above,
                twostage::spec::smmuv3::translation::DescriptorKind::Table,
            );
        }
        table + granule.index(iova, level, input_bits) * 8
    }

    /// Maps the page or block of `level` at `iova` to `gpa`; returns the descriptor's GPA.
    pub fn map(&self, iova: u64, level: u8, gpa: u64, leaf: Descriptor) -> u64 {
        let entry = self.entry(iova, level);
        let start = gpa & !(self.granule.level_size(level) - 1);
        let leaf = leaf.with_table(level == LAST_LEVEL).with_address(self.granule, start);
        self.machine.poke(entry, leaf.into_bits());
        entry
    }
}

/// A valid first word of a context descriptor, without tables.
pub fn cd0() -> Cd0 {
    Cd0::new()
        .with_v(true)
        .with_a(true)
        .with_r(true)
        .with_aa64(true)
        .with_ips(6)
        .with_epd0(true)
        .with_epd1(true)
        .with_asid(ASID)
}

/// A stream table entry of stage 1, with 2^`s1cdmax` context descriptors at `table`.
pub fn ste(table: u64, s1cdmax: u8, format: S1Format, s1dss: u8) -> [u64; 2] {
    let low = Ste0::new()
        .with_v(true)
        .with_config(StreamConfig::Stage1.into_bits())
        .with_s1fmt(format.into_bits())
        .with_s1contextptr(table >> 6)
        .with_s1cdmax(s1cdmax);
    [low.into_bits(), Ste1::new().with_s1dss(s1dss).into_bits()]
}

/// The word read or written; or the event, and whether it was stage 2's.
pub type Outcome = Result<u64, (Option<EventId>, bool)>;

/// What stopped a request; anything but an event or an abort fails the test.
pub fn event(error: DmaError) -> (Option<EventId>, bool) {
    match error {
        DmaError::Fault { reason: DmaFaultReason::SmmuV3(id), stage2, .. } => (Some(id), stage2),
        DmaError::Fault { reason: DmaFaultReason::SmmuV3Abort, stage2, .. } => (None, stage2),
        other => panic!("{other}"),
    }
}

/// An event of stage 1 or of the configuration.
pub fn stage1_event(id: EventId) -> Outcome {
    Err((Some(id), false))
}

/// An event of stage 2.
pub fn stage2_event(id: EventId) -> Outcome {
    Err((Some(id), true))
}

impl EventSink for Sink<EventRecord> {
    fn event(&self, record: &EventRecord) {
        self.put(*record);
    }
}

/// All translations of the guest.
pub const ALL: Invalidation = Invalidation::All { tag: VMID };

/// CMD_TLBI_NH_VA of the page of `address`.
pub fn va(address: u64, leaf: bool) -> Invalidation {
    let range = AddressRange { leaf, ..AddressRange::at(address & !0xfff) };
    Invalidation::Va { tag: VMID, asid: ASID, range }
}
