// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine of one execution: a guest, the virtual unit, its hosts, two devices.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use twostage::nesting::vtd::Nesting;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::qi::{
    ContextScope, Descriptor, InterruptEntryScope, IotlbScope, PasidCacheScope, StatusWrite,
};
use twostage::spec::vtd::regs::{self, Fsts, Gcmd, Gsts, Iqa, Rtaddr};
use twostage::unit::{Vtd, VtdBuilder};
use twostage::viommu::vtd::VtdIommu;
use twostage::viommu::InterruptSink;
use twostage_emulated::{DmaPort, DmaServices};

use super::account::Account;
use super::dma::Dma;
use super::header::Header;
use super::hosts::Hosts;
use super::image::{image, page};
use super::interrupts::{Entries, Listener};
use super::iotlb;
use super::naive::{decide, Decision, Offers, Who};
use super::page_requests::Asked;
use super::register_page::Paged;
use crate::models::memory::{Memory, PAGE};
use crate::models::oracle::{every, Oracle};

/// The functions.
pub const DEVICES: [u16; 2] = [0x20, 0x28];
/// What they are called.
pub const NAMES: [&str; 2] = ["a", "b"];
/// PASIDs that requests have.
pub const PASIDS: u32 = 4;
/// The status of a wait that is complete.
const DONE: u32 = 0x600d;
/// Pages, by number, that the unit writes to.
pub const UNKNOWN: std::ops::Range<u64> = page::QUEUE..page::REQUESTS + 1;

/// Counts what it is sent.
#[derive(Debug, Default)]
pub struct Interrupts(AtomicU64);

impl InterruptSink for Interrupts {
    fn send_msi(&self, _: u64, _: u32) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// See the [module's documentation](self).
pub struct World {
    pub header: Header,
    pub memory: Memory,
    pub iommu: Arc<VtdIommu>,
    unit: Vtd,
    pub hosts: Hosts,
    pub ports: [DmaPort; 2],
    pub offers: Offers,
    /// RTADDR as it was latched.
    pub root: Option<u64>,
    pub account: Account,
    pub interrupts: Entries,
    pub paged: Option<Paged>,
    pub asked: Asked,
    /// Functions with a device TLB.
    pub caching: [bool; 2],
    /// Functions that are there.
    pub plugged: [bool; 2],
    /// The last value that a device wrote.
    pub serial: u64,
    /// The last DMA.
    pub last: Option<Dma>,
}

impl World {
    /// `fails`: see [`Hosts::new`].
    pub fn new(header: Header, fails: u8) -> Self {
        let (start, levels) = (header.start, header.levels());
        let memory = Memory::new(("vtd", start as u64 * 8 + levels), || image(start, levels));
        let hosts = Hosts::new(&header, &memory, fails);
        let way = match header.mirrored {
            true => Nesting::Off { pieces: header.pieces },
            false => Nesting::On,
        };
        let build = || {
            let (ioas, sink) = (hosts.ioas(0).clone(), Arc::<Interrupts>::default());
            let builder = VtdBuilder::new(ioas, memory.map.clone(), sink);
            let mut builder = builder.config(&header.offered()).nesting(way);
            for (number, rid) in DEVICES.into_iter().enumerate() {
                let (rid, dev) = (Bdf::from_raw(rid), hosts.devices[number]);
                builder = builder.device_on(hosts.ioas(number), rid, dev, NAMES[number]);
            }
            builder.build()
        };
        let unit = hosts.retried(build);
        let iommu = unit.model().clone();
        let capabilities = iommu.capabilities();
        let offers =
            Offers { cap: capabilities.cap.into_bits(), ecap: capabilities.ecap.into_bits() };
        let mut world = Self {
            header,
            memory,
            ports: [0, 1].map(|number| {
                let mut port = hosts.unit(number).port(DEVICES[number]);
                port.set_services(DmaServices { page_requests: false, wait_for_pages: false });
                port
            }),
            iommu,
            unit,
            hosts,
            offers,
            root: None,
            account: Account::default(),
            interrupts: Entries::default(),
            paged: None,
            asked: Asked::default(),
            caching: [false; 2],
            plugged: [true; 2],
            serial: 0,
            last: None,
        };
        if header.remaps {
            let listener = world.interrupts.listener.insert(Arc::<Listener>::default());
            let listener = Arc::downgrade(listener);
            world.iommu.add_interrupt_listener(listener);
        }
        if header.requests {
            for rid in DEVICES {
                let at = page::CONTEXT * PAGE + u64::from(rid) * 32;
                let low = world.memory.load(at).unwrap_or(0);
                // PRE
                world.memory.store(at, low | 1 << 4);
            }
        }
        if header.enabled {
            world.set_root(header.start.is_legacy());
            world.start_queue();
            world.command(|command| command.with_te(true));
        }
        world
    }

    /// All who may ask.
    pub fn everyone() -> Vec<Who> {
        let of = |rid| {
            let pasids = [None].into_iter().chain((1..PASIDS).map(Some));
            pasids.map(move |pasid| Who { rid, pasid })
        };
        DEVICES.into_iter().flat_map(of).collect()
    }

    pub fn write32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    pub fn write64(&mut self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    pub fn status(&self) -> Gsts {
        Gsts::from_bits(self.read32(regs::GSTS))
    }

    /// Any write of registers, with what it means for the account.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        if bytes.len() < 4 {
            self.settle();
            if let Some((word, value)) = self.merged(offset, bytes) {
                // Memory does not tell that what it has was written again.
                return if self.read32(word) != value {
                    self.write32(word, value)
                };
            }
        }
        let is_access = matches!(bytes.len(), 4 | 8) && offset.is_multiple_of(bytes.len() as u64);
        // GCMD is the lower half of its slot.
        if !is_access || offset != regs::GCMD {
            self.put_registers(offset, bytes);
            return self.settle();
        }
        let mut low = [0; 4];
        low.copy_from_slice(&bytes[..4]);
        let mut command = Gcmd::from_bits(u32::from_le_bytes(low));
        self.settle();
        let (root, before) = (self.read64(regs::RTADDR), self.status());
        let interrupts = self.read64(regs::IRTA);
        self.put_registers(offset, bytes);
        self.settle();
        let mut after = self.status();
        let is_done = after.tes() == command.te() && (after.rtps() || !command.srtp());
        if self.hosts.fail && !is_done {
            // Once more, when nothing fails, or not at all.
            self.hosts.stop_failing();
            if before.tes() && self.hosts.thinks_better {
                command.set_te(true);
            }
            self.put_registers(offset, &command.into_bits().to_le_bytes());
            self.settle();
            after = self.status();
        }
        assert_eq!(after.tes(), command.te(), "{before:?} {command:?}");
        assert_eq!(after.qies(), command.qie(), "{before:?} {command:?}");
        let now = self.memory.tick();
        if command.srtp() {
            assert!(after.rtps());
            self.root = Some(root);
            // CAP.ESRTPS
            self.account.everything(now);
        }
        if command.sirtp() && self.header.remaps {
            assert!(after.irtps());
            // CAP.ESIRTPS
            self.interrupts.table = interrupts;
            self.interrupts.forget(now);
        }
        if command.srtp() || before.tes() != after.tes() {
            self.asked.changes += 1;
            self.account.entries(&Self::everyone(), now);
        }
    }

    /// Writes GCMD: what is enabled, with a change.
    pub fn command(&mut self, change: impl FnOnce(Gcmd) -> Gcmd) {
        let status = self.status();
        let now = Gcmd::new()
            .with_te(status.tes())
            .with_qie(status.qies())
            .with_ire(status.ires())
            .with_cfi(status.cfis());
        self.write32(regs::GCMD, change(now).into_bits());
    }

    pub fn set_root(&mut self, legacy: bool) {
        let rtaddr = Rtaddr::new().with_rta(page::ROOT).with_ttm(u8::from(!legacy));
        self.write64(regs::RTADDR, rtaddr.into_bits());
        self.command(|command| command.with_srtp(true));
    }

    /// Whether RTADDR as it was latched is of legacy mode.
    pub fn is_legacy(&self) -> bool {
        self.root.is_none_or(|root| root >> 10 & 3 == 0)
    }

    /// Whether it is a reserved one, with which the queue stops.
    pub fn is_reserved_mode(&self) -> bool {
        self.root.is_some_and(|root| root >> 11 & 1 != 0)
    }

    /// Whether the unit executes `descriptor` (§6.5.2), and if it is for a device, that answers.
    pub fn accepts(&self, descriptor: &Descriptor) -> bool {
        let Offers { cap, ecap } = self.offers;
        let offers = |bit: u32| ecap >> bit & 1 != 0;
        let is_there = |source: Bdf| {
            DEVICES.iter().zip(self.plugged).any(|(rid, there)| *rid == source.raw() && there)
        };
        let scalable = !self.is_legacy();
        // DT, IR, PRS and PDS; MAMV and MHMV.
        !self.is_reserved_mode()
            && match *descriptor {
                Descriptor::Iotlb { scope: IotlbScope::Pages { range, .. }, .. } => {
                    u64::from(range.mask) <= cap >> 48 & 63
                }
                Descriptor::Iotlb { .. } | Descriptor::ContextCache(_) => true,
                Descriptor::PasidIotlb { .. } | Descriptor::PasidCache(_) => scalable,
                Descriptor::DeviceTlb { source, .. } => offers(2) && is_there(source),
                Descriptor::PasidDeviceTlb { source, .. } => {
                    scalable && offers(2) && is_there(source)
                }
                Descriptor::InterruptEntryCache(InterruptEntryScope::Global) => offers(3),
                Descriptor::InterruptEntryCache(InterruptEntryScope::Index { mask, .. }) => {
                    offers(3) && u64::from(mask) <= ecap >> 20 & 15
                }
                Descriptor::Wait { drain_page_requests, .. } => !drain_page_requests || offers(42),
                Descriptor::PageGroupResponse { .. } => scalable && offers(29),
            }
    }

    fn queue_address(&self) -> Iqa {
        let wide = !(self.header.narrow_descriptors && self.is_legacy());
        Iqa::new().with_iqa(page::QUEUE).with_dw(wide)
    }

    pub fn start_queue(&mut self) {
        if self.status().qies() {
            self.command(|command| command.with_qie(false));
        }
        self.write32(regs::FSTS, u32::MAX);
        self.write64(regs::IQT, 0);
        self.write64(regs::IQA, self.queue_address().into_bits());
        self.command(|command| command.with_qie(true));
    }

    /// Puts `descriptors` into the queue, with a wait if `wait`, and writes the tail. Whether the
    /// wait is complete.
    pub fn submit(&mut self, descriptors: &[[u64; 4]], wait: bool) -> bool {
        self.settle();
        let iqa = self.queue_address();
        let faults = Fsts::from_bits(self.read32(regs::FSTS));
        let mut tail = self.read64(regs::IQT);
        let size = iqa.descriptor_size();
        let is_usable = self.status().qies()
            && !(faults.iqe() || faults.ite())
            && self.read64(regs::IQA) == iqa.into_bits()
            && tail.is_multiple_of(size)
            && tail < iqa.size();
        if !is_usable {
            self.start_queue();
            tail = 0;
        }
        self.memory.put(page::STATUS * PAGE, 0);
        let status = Some(StatusWrite { address: page::STATUS * PAGE, data: DONE });
        let end =
            Descriptor::Wait { status, interrupt: false, fence: false, drain_page_requests: false };
        let end = wait.then(|| end.encode());
        for words in descriptors.iter().chain(end.as_ref()) {
            for (number, word) in words.iter().take(size as usize / 8).enumerate() {
                self.memory.put(page::QUEUE * PAGE + tail + number as u64 * 8, *word);
            }
            tail = (tail + size) % iqa.size();
        }
        self.write64(regs::IQT, tail);
        self.memory.load(page::STATUS * PAGE) == Some(u64::from(DONE))
    }

    /// Submits `descriptors`, which are complete if the unit accepts them all. Where tables are
    /// mirrored and have too much, or hosts fail, they may fail.
    pub fn invalidate(&mut self, descriptors: &[Descriptor]) {
        let accepted = descriptors.iter().all(|descriptor| self.accepts(descriptor));
        let done = self.say(descriptors);
        let too_much = || self.header.mirrored && self.may_be_too_much();
        let failed = accepted && !done && (self.hosts.fail || too_much());
        assert!(done == accepted || failed, "{done}: {descriptors:x?}; {:x?}", self.header);
    }

    /// Invalidates everything.
    pub fn flush(&mut self) {
        let everything = [
            Descriptor::ContextCache(ContextScope::Global),
            Descriptor::PasidCache(PasidCacheScope::Global),
            iotlb(IotlbScope::Global),
        ];
        match self.is_legacy() {
            true => self.invalidate(&[everything[0], everything[2]]),
            false => self.invalidate(&everything),
        }
    }

    /// Submits `descriptors`, and if they are complete, has the account know.
    pub fn say(&mut self, descriptors: &[Descriptor]) -> bool {
        let words: Vec<_> = descriptors.iter().map(Descriptor::encode).collect();
        let done = self.submit(&words, true);
        if done {
            let now = self.memory.tick();
            let mut account = std::mem::take(&mut self.account);
            for descriptor in descriptors {
                let decisions = |account: &Account, who| self.decisions(account, who, None);
                let legacy = self.is_legacy();
                account.complete(descriptor, legacy, now, &Self::everyone(), &decisions);
                self.interrupts.complete(descriptor, now);
            }
            self.account = account;
        }
        done
    }

    /// All that may be decided of `who`, by entries since the last invalidation that names them, or
    /// since `earlier`; `None`: not known.
    pub fn decisions(
        &self,
        account: &Account,
        who: Who,
        earlier: Option<u32>,
    ) -> Option<Vec<Decision>> {
        let mut since = account.since(who);
        if let Some(earlier) = earlier {
            since.contexts = since.contexts.min(earlier);
            since.pasids = since.pasids.min(earlier);
        }
        let decide = |words: &mut Oracle<'_>| decide(words, self.offers, self.root, who, since);
        let mut all = every(&self.memory, UNKNOWN, decide)?;
        if !self.offers.caching_mode() {
            // What blocks is not cached: it counts as it is now, which is the first.
            let now = all[0];
            all.retain(|decision| !decision.is_blocked() || *decision == now);
        }
        Some(all)
    }

    /// All ways in which `walk` may end.
    pub fn every<T: PartialEq>(&self, walk: impl FnMut(&mut Oracle<'_>) -> T) -> Option<Vec<T>> {
        every(&self.memory, UNKNOWN, walk)
    }

    /// A function goes, or comes back.
    pub fn plug(&mut self, number: usize) {
        let Self { unit, hosts, .. } = self;
        let rid = Bdf::from_raw(DEVICES[number]);
        if self.plugged[number] {
            hosts.retried(|| unit.remove_device(rid));
            self.ended_requests(Some(number));
        } else {
            let (ioas, dev) = (hosts.ioas(number), hosts.devices[number]);
            hosts.retried(|| unit.add_device_on(ioas, rid, dev, NAMES[number]));
        }
        self.plugged[number] ^= true;
        let now = self.memory.tick();
        let of_function = |who: &Who| who.rid == rid.raw();
        let all: Vec<_> = Self::everyone().into_iter().filter(of_function).collect();
        self.account.entries(&all, now);
    }

    /// The machine is reset.
    pub fn reset(&mut self) {
        self.hosts.retried(|| self.unit.reset());
        self.ended_requests(None);
        (self.root, self.interrupts.table) = (None, 0);
        let now = self.memory.tick();
        self.interrupts.forget(now);
        self.account.everything(now);
        self.account.entries(&Self::everyone(), now);
    }

    /// Ends everything; nothing may be left.
    pub fn end(self) {
        let Self { iommu, unit, mut hosts, ports, .. } = self;
        drop((iommu, ports));
        hosts.give_up_memory();
        hosts.retried(|| unit.shutdown());
        drop(unit);
        hosts.end();
    }
}
