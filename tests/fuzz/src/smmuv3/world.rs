// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine of one execution: a guest, the virtual SMMU, its host, two devices.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use twostage::iommufd::{HostIommu, ObjectId, Protection};
use twostage::nesting::smmuv3::SmmuNesting;
use twostage::nesting::{host_smmu, GuestIoas};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::regs::{self, Cr0};
use twostage::spec::smmuv3::translation::Granule;
use twostage::spec::smmuv3::StreamId;
use twostage::threads::ThreadStart;
use twostage::viommu::smmuv3::{EventTarget, Smmu, SmmuConfig, SmmuInterrupt, SmmuInterrupts};
use twostage_emulated::kit::Mmio;
use twostage_emulated::{
    DeviceConfig, DmaPort, DmaServices, EmulatedHost, ObjectGraph, SmmuV3Unit, SmmuV3UnitConfig,
};

use super::account::Account;
use super::dma::Dma;
use super::failures::Failures;
use super::image::{image, page};
use super::naive::{Registers, OUTPUT_BITS};
use super::page_requests::Asked;
use super::stalls::Waiting;
use crate::models::memory::{Memory, PAGE, SIZE};
use crate::models::threads::{IdleThreads, NoThreads};

/// The functions, whose StreamIDs are their Requester IDs.
pub const DEVICES: [u16; 2] = [0x20, 0x28];
/// Binary logarithm of the entries of the stream table.
const STREAM_BITS: u32 = 6;

/// What an execution is made of.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub granule: Granule,
    pub two_levels: bool,
    pub small_caches: bool,
    /// Events are delivered, by a thread: slow.
    pub events: bool,
    pub ranges: bool,
    /// Translation is enabled at the start.
    pub enabled: bool,
    pub ats: bool,
    /// Stale translations are found while they are used.
    pub sanitized: bool,
    /// Transactions of the devices may stall.
    pub stalls: bool,
    /// Devices can ask for pages.
    pub requests: bool,
    /// Verbs of the host may fail.
    pub fails: bool,
}

impl Header {
    pub fn of([first, second]: [u8; 2]) -> Self {
        let bit = |bit: u8| first >> bit & 1 != 0;
        Self {
            granule: [Granule::K4, Granule::K16, Granule::K4, Granule::K64][usize::from(first & 3)],
            two_levels: bit(2),
            small_caches: bit(3),
            events: second & 0x0f == 0x0f,
            ranges: !bit(4),
            enabled: second & 0xf0 != 0xf0,
            // A device that has a TLB of its own does not stall.
            ats: bit(5) && second & 0x0f != 0x0c,
            sanitized: bit(6),
            stalls: second & 0x0f == 0x0c,
            requests: bit(5) && second & 0x0f == 0x0d,
            fails: second & 0x0f == 0x0b,
        }
    }
}

/// Registers that say where the SMMU writes: events, page requests, messages.
const OUTPUTS: [u64; 5] = [
    regs::EVENTQ_BASE,
    regs::PRIQ_BASE,
    regs::GERROR_IRQ_CFG0,
    regs::EVENTQ_IRQ_CFG0,
    regs::PRIQ_IRQ_CFG0,
];

/// Whether what `register` has is not where tables are.
fn is_apart(register: u64, value: u64) -> bool {
    let (at, last) = match register {
        regs::EVENTQ_BASE | regs::PRIQ_BASE => {
            let at = value & 0x000f_ffff_ffff_ffe0;
            // No entry is larger than 32 bytes, and the queue is aligned.
            let size = 32 << (value & 31);
            (at & !(size - 1), at | (size - 1))
        }
        _ => (value, value),
    };
    let own = page::EVENTS * PAGE..(page::REQUESTS + 1) * PAGE;
    last < PAGE || at >= SIZE || own.contains(&at) && own.contains(&last)
}

/// Takes interrupts, and counts those of the PRI queue that are no messages.
#[derive(Debug, Default)]
pub struct Messages(AtomicU64);

impl Messages {
    pub fn of_pages(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl SmmuInterrupts for Messages {
    fn message(&self, _: u64, _: u32) -> bool {
        true
    }

    fn wire(&self, interrupt: SmmuInterrupt) {
        let of_pages = interrupt == SmmuInterrupt::PageQueue;
        self.0.fetch_add(of_pages.into(), Ordering::Relaxed);
    }
}

/// See the [module's documentation](self).
pub struct World {
    pub header: Header,
    pub memory: Memory,
    pub smmu: Arc<Smmu>,
    pub nesting: Arc<SmmuNesting>,
    host: Arc<EmulatedHost>,
    unit: Arc<SmmuV3Unit>,
    devices: [ObjectId; 2],
    pub ports: [DmaPort; 2],
    pub account: Account,
    /// Functions that are there.
    pub plugged: [bool; 2],
    /// The last value that a device wrote.
    pub serial: u64,
    /// The last DMA.
    pub last: Option<Dma>,
    /// The event queue is empty, and nothing has happened since of which there may be events.
    pub is_quiet: bool,
    /// How many commands were complete when a device's own TLB was enabled, if it is.
    pub device_tlbs: [Option<usize>; 2],
    /// Devices that do not answer when they are told to forget what is in it.
    pub silent: [bool; 2],
    /// One may not have answered, of which no CMD_SYNC has told.
    pub is_unanswered: bool,
    /// Transactions that stall.
    pub waiting: Vec<Waiting>,
    /// Page requests.
    pub asked: Asked,
    pub messages: Arc<Messages>,
    pub failures: Failures,
}

impl World {
    pub fn new(header: Header) -> Self {
        let Header { granule, two_levels, .. } = header;
        let kind = [two_levels, header.stalls, header.ats].map(u64::from);
        let kind = kind[0] | kind[1] << 1 | kind[2] << 2;
        let number = ("smmuv3", u64::from(granule.shift()) << 3 | kind);
        let memory = Memory::new(number, || image(granule, two_levels, header.stalls, header.ats));
        let entries = if header.small_caches { 2 } else { 16 };
        let unit = SmmuV3UnitConfig::default()
            .with_ssid_bits(4)
            .with_ats(header.ats)
            .with_page_requests(header.requests)
            .with_stalls(header.stalls)
            .with_sanitize(header.sanitized)
            .with_range_invalidation(header.ranges)
            .with_iotlb_entries(entries)
            .with_paging_structure_entries(entries)
            .with_stage2_entries(entries);
        let unit = SmmuV3Unit::new(unit);
        let host = EmulatedHost::new();
        let id = host.add_unit(unit.clone());
        let devices = ["a", "b"].map(|name| {
            let rid = Bdf::from_raw(DEVICES[usize::from(name == "b")]);
            let config = DeviceConfig::default()
                .with_pasid_bits(4)
                .with_pasid_priv(true)
                .with_pasid_exec(true)
                .with_ats(header.ats)
                .with_pri(header.requests)
                .with_stalls(header.stalls);
            host.add_device(name, id, rid, config).expect("a new device");
            host.device_bind(name).expect("it is there")
        });
        let failures = Failures::new(host.clone());
        let ioas = GuestIoas::new(failures.host()).expect("an IOAS");
        ioas.map(0, &memory.user_memory(), Protection::READ_WRITE).expect("it is mapped");
        let offered = SmmuConfig::default()
            .with_ats(header.ats)
            .with_page_requests(header.requests)
            .with_stalls(header.stalls)
            .with_range_invalidation(header.ranges);
        let threads: Arc<dyn ThreadStart> = match header.events || header.requests {
            true => Arc::new(IdleThreads),
            false => Arc::new(NoThreads),
        };
        let nesting = Arc::new(SmmuNesting::new(ioas).serving(&offered).with_threads(threads));
        for (rid, dev) in DEVICES.into_iter().zip(devices) {
            nesting.add_device(Bdf::from_raw(rid), dev).expect("it is added");
        }
        let units: Vec<_> = nesting
            .hw_infos()
            .iter()
            .filter_map(|device| host_smmu(String::new(), &device.info, host.extensions()))
            .collect();
        let config = offered.intersect(&units).expect("the host has it all");
        let (side, messages) = (nesting.clone(), Arc::<Messages>::default());
        let smmu = Smmu::new(&config, memory.map.clone(), side, messages.clone(), None);
        let smmu = smmu.expect("a configuration");
        nesting.set_fault_target(Arc::downgrade(&smmu) as Weak<dyn EventTarget>);
        for rid in DEVICES {
            smmu.add_device(Bdf::from_raw(rid)).expect("the host serves it");
        }
        let mut world = Self {
            header,
            memory,
            nesting,
            host,
            devices,
            ports: DEVICES.map(|rid| {
                let mut port = unit.port(rid);
                let page_requests = !header.requests;
                port.set_services(DmaServices { page_requests, wait_for_pages: false });
                port
            }),
            unit,
            smmu,
            account: Account::default(),
            plugged: [true; 2],
            serial: 0,
            last: None,
            is_quiet: false,
            device_tlbs: [None; 2],
            silent: [false; 2],
            is_unanswered: false,
            waiting: Vec::new(),
            asked: Asked::default(),
            messages,
            failures,
        };
        if header.enabled {
            world.set_tables();
            world.start_queue();
            world.enable(true);
        }
        world
    }

    pub fn read32(&self, offset: u64) -> u32 {
        self.smmu.read32(offset)
    }

    pub fn read64(&self, offset: u64) -> u64 {
        self.smmu.read64(offset)
    }

    pub fn write32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    pub fn write64(&mut self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Any write of registers, with what it means for the account.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.is_quiet = false;
        self.may_end();
        let before = self.is_enabled();
        // The slot of 64 bits, if it is one of these.
        let output = OUTPUTS.into_iter().find(|register| offset & !7 == *register);
        let kept = output.map(|register| (register, self.read64(register)));
        self.smmu.mmio_write(offset, bytes);
        if let Some((register, kept)) = kept {
            // The SMMU writes to pages of its own only: not to tables, whose past is known.
            if !is_apart(register, self.read64(register)) {
                self.smmu.mmio_write(register, &kept.to_le_bytes());
            }
        }
        if before != self.is_enabled() {
            // The entries of all streams are read; context descriptors may be those of before.
            let now = self.memory.tick();
            self.account.complete(Command::CfgiSteRange { stream: StreamId(0), range: 30 }, now);
            self.asked.may_have_ended_all();
            if before {
                self.ended_requests(None);
            }
        }
    }

    /// SMMUEN, as it is acknowledged.
    pub fn is_enabled(&self) -> bool {
        Cr0::from_bits(self.read32(regs::CR0ACK)).smmuen()
    }

    pub fn cr0(&self) -> Cr0 {
        Cr0::from_bits(self.read32(regs::CR0))
    }

    /// Sets or clears SMMUEN.
    pub fn enable(&mut self, enabled: bool) {
        let cr0 = self.cr0().with_smmuen(enabled);
        self.write32(regs::CR0, cr0.into_bits());
    }

    pub fn set_tables(&mut self) {
        self.write64(regs::STRTAB_BASE, page::STREAMS * PAGE);
        let levels = if self.header.two_levels { 1 << 16 | 6 << 6 } else { 0 };
        self.write32(regs::STRTAB_BASE_CFG, levels | STREAM_BITS);
    }

    /// The registers that matter to a walk.
    pub fn registers(&self) -> Registers {
        Registers {
            base: self.read64(regs::STRTAB_BASE),
            config: self.read32(regs::STRTAB_BASE_CFG),
            idr0: self.read32(regs::IDR0),
            idr1: self.read32(regs::IDR1),
            output_bits: OUTPUT_BITS[(self.read32(regs::IDR5) & 7) as usize],
        }
    }

    /// A function goes, or comes back.
    pub fn plug(&mut self, number: usize) {
        self.may_end();
        self.is_quiet = false;
        let rid = Bdf::from_raw(DEVICES[number]);
        let (smmu, nesting, device) = (&self.smmu, &self.nesting, self.devices[number]);
        if self.plugged[number] {
            smmu.remove_device(rid);
            self.failures.insist(|| nesting.remove_device(rid));
            self.ended_requests(Some(number));
        } else {
            self.failures.insist(|| nesting.add_device(rid, device));
            self.failures.insist(|| smmu.add_device(rid));
        }
        self.plugged[number] ^= true;
        let now = self.memory.tick();
        let stream = StreamId(u32::from(DEVICES[number]));
        self.account.complete(Command::CfgiSte { stream, leaf: false }, now);
    }

    /// The machine is reset.
    pub fn reset(&mut self) {
        self.may_end();
        self.is_quiet = false;
        self.failures.insist(|| self.smmu.reset());
        self.ended_requests(None);
        let now = self.memory.tick();
        self.account.everything(now);
        self.device_tlbs = self.device_tlbs.map(|from| from.map(|_| 0));
    }

    /// The guest enables or disables the device's own TLB, in its configuration space.
    pub fn set_device_tlb(&mut self, number: usize, enabled: bool) {
        self.ports[number].control().set_device_tlb(enabled);
        let from = self.device_tlbs[number].unwrap_or(self.account.said());
        self.device_tlbs[number] = (enabled && self.header.ats).then_some(from);
    }

    /// How often devices have found something in their own TLBs.
    fn device_tlb_hits(&self) -> u64 {
        self.unit.counters().device_tlb_hits
    }

    /// What a device has cached stays when it is told to forget something else: another address, or
    /// if `of_substream`, what is of another substream.
    pub fn keeps(&mut self, of_substream: bool) {
        let has_tlb = |dma: &Dma| self.device_tlbs[dma.device].is_some();
        let Some(dma) = self.last.filter(|dma| has_tlb(dma) && !self.failures.may_block) else {
            return;
        };
        self.dma(dma);
        let before = self.device_tlb_hits();
        self.dma(dma);
        let then = self.device_tlb_hits();
        let (stream, other) = (StreamId(u32::from(DEVICES[dma.device])), dma.address ^ 1 << 40);
        let (substream, address) = match (of_substream, dma.substream) {
            (true, Some(substream)) => (Pasid::new(substream ^ 4), dma.address),
            (true, None) => (Pasid::new(1), dma.address),
            (false, substream) => (substream.and_then(Pasid::new), other),
        };
        let address = address & !(PAGE - 1);
        let command = Command::AtcInv { stream, substream, global: false, address, size: 0 };
        // If it had something, and has not been sent elsewhere.
        if then > before && self.say(&[command]) {
            self.dma(dma);
            assert!(self.device_tlb_hits() > then, "{command:x?} drops what {dma:x?} found");
        }
    }

    /// From now on, the device answers or does not.
    pub fn set_silent(&mut self, number: usize, silent: bool) {
        self.ports[number].control().set_silent(silent);
        self.silent[number] = silent;
    }

    /// Ends everything; nothing may be left.
    pub fn end(mut self) {
        self.failures.insist(|| self.nesting.shutdown());
        self.ended_requests(None);
        let Self { smmu, nesting, host, unit, devices, ports, waiting, failures, .. } = self;
        waiting.iter().for_each(|waiting| waiting.has_ended(&ports));
        drop((smmu, ports, unit, failures));
        assert!(Arc::into_inner(nesting).is_some(), "somebody still holds nesting");
        for dev in devices {
            host.device_unbind(dev).expect("it is bound");
        }
        assert_eq!(host.graph(), ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
    }
}
