// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine of one execution: a guest, the virtual unit, its host, two devices.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use twostage::iommufd::{HostIommu, ObjectId, Protection};
use twostage::nesting::vtd::{Nesting, Serving, VtdNesting};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::qi::{Descriptor, InterruptEntryScope, IotlbScope, StatusWrite};
use twostage::spec::vtd::regs::{self, Fsts, Gcmd, Gsts, Iqa, Rtaddr};
use twostage::viommu::vtd::{FaultTarget, VtdIommu};
use twostage::viommu::InterruptSink;
use twostage_emulated::{DeviceConfig, DmaPort, DmaServices, EmulatedHost, ObjectGraph, VtdUnit};

use super::account::Account;
use super::dma::Dma;
use super::header::Header;
use super::image::{image, page};
use super::interrupts::{Entries, Listener};
use super::naive::{decide, Decision, Offers, Who};
use super::page_requests::Asked;
use super::register_page::Paged;
use crate::models::memory::{Memory, PAGE};
use crate::models::oracle::{every, Oracle};

/// The functions.
pub const DEVICES: [u16; 2] = [0x20, 0x28];
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
    pub nesting: Arc<VtdNesting>,
    pub unit: Arc<VtdUnit>,
    host: Arc<EmulatedHost>,
    pub devices: [ObjectId; 2],
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
    pub fn new(header: Header) -> Self {
        let (start, levels) = (header.start, header.levels());
        let memory = Memory::new(("vtd", start as u64 * 8 + levels), || image(start, levels));
        let unit = VtdUnit::new(header.unit());
        let host = EmulatedHost::new();
        let id = host.add_unit(unit.clone());
        let devices = ["a", "b"].map(|name| {
            let rid = Bdf::from_raw(DEVICES[usize::from(name == "b")]);
            let config = DeviceConfig::default().with_pasid_bits(4).with_pasid_priv(true);
            let config = config.with_ats(true).with_pri(header.requests);
            host.add_device(name, id, rid, config).expect("a new device");
            host.device_bind(name).expect("it is there")
        });
        let ioas = GuestIoas::new(host.clone()).expect("an IOAS");
        ioas.map(0, &memory.user_memory(), Protection::READ_WRITE).expect("it is mapped");
        let way = match header.mirrored {
            true => Nesting::Off { pieces: header.pieces },
            false => Nesting::On,
        };
        let offered = header.offered();
        let serving = Serving::new(way, memory.map.clone(), offered.clone());
        let nesting = Arc::new(VtdNesting::serving(ioas, serving));
        for (rid, dev) in DEVICES.into_iter().zip(devices) {
            nesting.add_device(Bdf::from_raw(rid), dev).expect("it is added");
        }
        let units = DEVICES.map(|rid| {
            nesting.host_unit(Bdf::from_raw(rid), String::new()).expect("it is behind a VT-d")
        });
        let config = offered.intersect(&units).expect("the host has it all");
        let (side, sink) = (nesting.clone(), Arc::<Interrupts>::default());
        let iommu = VtdIommu::new(&config, memory.map.clone(), side, sink, None);
        let iommu = iommu.expect("a configuration");
        nesting.set_fault_target(Arc::downgrade(&iommu) as Weak<dyn FaultTarget>);
        for rid in DEVICES {
            iommu.add_device(Bdf::from_raw(rid)).expect("the host serves it");
        }
        let capabilities = iommu.capabilities();
        let offers =
            Offers { cap: capabilities.cap.into_bits(), ecap: capabilities.ecap.into_bits() };
        let mut world = Self {
            header,
            memory,
            nesting,
            host,
            devices,
            ports: DEVICES.map(|rid| {
                let mut port = unit.port(rid);
                port.set_services(DmaServices { page_requests: false, wait_for_pages: false });
                port
            }),
            iommu,
            unit,
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
        let command = Gcmd::from_bits(u32::from_le_bytes(low));
        self.settle();
        let (root, before) = (self.read64(regs::RTADDR), self.status());
        let interrupts = self.read64(regs::IRTA);
        self.put_registers(offset, bytes);
        self.settle();
        let after = self.status();
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
    /// mirrored and have too much, they may fail.
    pub fn invalidate(&mut self, descriptors: &[Descriptor]) {
        let accepted = descriptors.iter().all(|descriptor| self.accepts(descriptor));
        let done = self.say(descriptors);
        let failed = accepted && !done && self.header.mirrored && self.may_be_too_much();
        assert!(done == accepted || failed, "{done}: {descriptors:x?}; {:x?}", self.header);
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
        let rid = Bdf::from_raw(DEVICES[number]);
        if self.plugged[number] {
            self.iommu.remove_device(rid);
            self.nesting.remove_device(rid).expect("the host does not fail");
            self.ended_requests(Some(number));
        } else {
            self.nesting.add_device(rid, self.devices[number]).expect("it is added");
            self.iommu.add_device(rid).expect("it is served");
        }
        self.plugged[number] ^= true;
        let now = self.memory.tick();
        let of_function = |who: &Who| who.rid == rid.raw();
        let all: Vec<_> = Self::everyone().into_iter().filter(of_function).collect();
        self.account.entries(&all, now);
    }

    /// The machine is reset.
    pub fn reset(&mut self) {
        self.iommu.reset().expect("the host does not fail");
        self.ended_requests(None);
        (self.root, self.interrupts.table) = (None, 0);
        let now = self.memory.tick();
        self.interrupts.forget(now);
        self.account.everything(now);
        self.account.entries(&Self::everyone(), now);
    }

    /// Ends everything; nothing may be left.
    pub fn end(self) {
        let Self { iommu, nesting, host, devices, ports, .. } = self;
        nesting.shutdown().expect("the host does not fail");
        drop((iommu, ports));
        assert!(Arc::into_inner(nesting).is_some(), "somebody still holds nesting");
        for dev in devices {
            host.device_unbind(dev).expect("it is bound");
        }
        assert_eq!(host.graph(), ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
    }
}
