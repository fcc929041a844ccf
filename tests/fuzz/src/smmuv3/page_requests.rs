// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests of devices, compared with what the registers of their queue say: each is in the
//! queue until the guest responds, or is answered at once, and never both.

use std::thread;
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use twostage::iommufd::PageResponseCode;
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::page_request::{PageRequest, PAGE_REQUEST_SIZE};
use twostage::spec::smmuv3::regs;
use twostage::spec::smmuv3::StreamId;
use twostage_emulated::DmaServices;

use super::dma::Dma;
use super::image::page;
use super::naive::Kind;
use super::world::{World, DEVICES};
use crate::models::memory::PAGE;

/// OVFLG of PRIQ_PROD, and OVACKFLG of PRIQ_CONS.
const OVERFLOW: u32 = 1 << 31;
/// PRIQ_ABT_ERR.
const ABORT_ERROR: u32 = 1 << 3;
/// LO of PRIQ_IRQ_CFG2: interrupts are of the last request of a group.
const LAST_ONLY: u32 = 1 << 31;
const PRIQ_IRQ_CFG2: u64 = regs::PRIQ_IRQ_CFG1 + 4;
/// How long the thread that reads the host's queue may take.
const DELIVERY_TIME: Duration = Duration::from_secs(10);

/// What the devices have asked for.
#[derive(Debug, Default)]
pub struct Asked {
    open: Vec<Open>,
    /// The queue before a device asks.
    before: Queue,
    /// How many requests were in the queue then, of all time.
    queued: u64,
    interrupts: u64,
    /// How often something happened by which the host may have ended the requests of each device.
    changes: [u32; DEVICES.len()],
}

impl Asked {
    /// The host may have ended the requests of the streams that `commands` name.
    pub fn may_have_ended(&mut self, commands: &[Command]) {
        for (device, rid) in DEVICES.into_iter().enumerate() {
            let names = |command: &Command| match *command {
                Command::CfgiSte { stream, .. } => stream.raw() == u32::from(rid),
                Command::CfgiSteRange { stream, range } => {
                    let bits = u32::from(range) + 1;
                    bits >= 32 || (stream.raw() ^ u32::from(rid)) >> bits == 0
                }
                _ => false,
            };
            self.changes[device] += u32::from(commands.iter().any(names));
        }
    }

    /// The same of all streams.
    pub fn may_have_ended_all(&mut self) {
        self.changes.iter_mut().for_each(|changes| *changes += 1);
    }
}

/// A group that waits for the guest.
#[derive(Debug, Clone, Copy)]
struct Open {
    device: usize,
    substream: Option<u32>,
    group: u16,
    changes: u32,
}

/// The registers of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Queue {
    enabled: bool,
    base: u64,
    /// Binary logarithm of its entries.
    bits: u64,
    prod: u32,
    cons: u32,
    /// It could not be written to.
    error: bool,
}

impl Queue {
    fn has_overflow(&self) -> bool {
        (self.prod ^ self.cons) & OVERFLOW != 0
    }

    /// The indices, with the bit that says which round it is.
    fn indices(&self) -> [u32; 2] {
        [self.prod, self.cons].map(|index| index & ((2 << self.bits) - 1))
    }

    fn is_full(&self) -> bool {
        let [prod, cons] = self.indices();
        // More than that is no sense, and no room.
        prod.wrapping_sub(cons) & ((2 << self.bits) - 1) >= 1 << self.bits
    }

    fn is_empty(&self) -> bool {
        let [prod, cons] = self.indices();
        prod == cons
    }

    fn next_place(&self) -> u64 {
        let [prod, _] = self.indices();
        self.base + u64::from(prod & ((1 << self.bits) - 1)) * PAGE_REQUEST_SIZE
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Becomes {
    Queued,
    Answered(PageResponseCode),
}

impl World {
    fn request_queue(&self) -> Queue {
        let base = self.read64(regs::PRIQ_BASE);
        let most = u64::from(self.read32(regs::IDR1) >> 11 & 31);
        let bits = (base & 31).min(most);
        let size = PAGE_REQUEST_SIZE << bits;
        let errors = self.read32(regs::GERROR) ^ self.read32(regs::GERRORN);
        Queue {
            enabled: self.read32(regs::CR0ACK) & 2 != 0,
            base: base & 0x000f_ffff_ffff_ffe0 & !(size - 1),
            bits,
            prod: self.read32(regs::PRIQ_PROD),
            cons: self.read32(regs::PRIQ_CONS),
            error: errors & ABORT_ERROR != 0,
        }
    }

    /// Does `dma`, of a device that asks for what it does not find.
    fn ask(&mut self, dma: Dma) {
        let services = |page_requests| DmaServices { page_requests, wait_for_pages: false };
        self.ports[dma.device].set_services(services(true));
        self.asked.before = self.request_queue();
        self.asked.queued = self.smmu.counters().page_requests;
        self.asked.interrupts = self.messages.of_pages();
        self.dma(dma);
        self.ports[dma.device].set_services(services(false));
    }

    /// Waits until the request in `group` of `device` is in the queue, or answered.
    fn becomes(&self, device: usize, group: u16) -> Becomes {
        let end = Instant::now() + DELIVERY_TIME;
        loop {
            // In this order: one that is answered is not in the queue.
            if let Some(code) = self.ports[device].page_response(group) {
                return Becomes::Answered(code);
            }
            if self.smmu.counters().page_requests != self.asked.queued {
                return Becomes::Queued;
            }
            assert!(Instant::now() < end, "a page request of {device} gets nowhere");
            thread::yield_now();
        }
    }

    /// `dma` has asked for its page, in `group`.
    pub fn asked(&mut self, dma: &Dma, group: u16) {
        let Dma { device, substream, address, kind } = *dma;
        assert!(self.header.requests, "{dma:x?}");
        let before = self.asked.before;
        let place = before.next_place();
        let is_memory = self.memory.load(place).is_some();
        let invalid = Becomes::Answered(PageResponseCode::Invalid);
        let success = Becomes::Answered(PageResponseCode::Success);
        let (becomes, after) = match () {
            () if before.error || !before.enabled => (invalid, before),
            () if before.has_overflow() => (success, before),
            () if before.is_full() => (success, Queue { prod: before.prod ^ OVERFLOW, ..before }),
            () if !is_memory => (invalid, Queue { error: true, ..before }),
            () => {
                let next = (before.indices()[0] + 1) & ((2 << before.bits) - 1);
                let prod = next | before.prod & OVERFLOW;
                (Becomes::Queued, Queue { prod, ..before })
            }
        };
        let found = self.becomes(device, group);
        let queue = self.request_queue();
        let what = || format!("{dma:x?} in {group}: {found:x?}, {before:x?}, {queue:x?}");
        assert_eq!((found, queue), (becomes, after), "{}", what());
        let last_only = self.read32(PRIQ_IRQ_CFG2) & LAST_ONLY != 0;
        let interrupts = match becomes {
            Becomes::Queued => last_only || before.is_empty(),
            _ => becomes == success && last_only,
        };
        // A message may be to memory.
        let enabled = self.read32(regs::IRQ_CTRL) & 2 != 0;
        if self.read64(regs::PRIQ_IRQ_CFG0) == 0 {
            let sent = self.messages.of_pages() - self.asked.interrupts;
            assert_eq!(sent, u64::from(interrupts && enabled), "interrupts; {}", what());
        }
        if becomes == Becomes::Queued {
            let words = [0, 8].map(|at| self.memory.load(place + at).unwrap_or(0));
            let request = PageRequest {
                stream: StreamId(DEVICES[device].into()),
                substream: substream.and_then(Pasid::new),
                group,
                last: true,
                address: address & !(PAGE - 1),
                read: !kind.write,
                write: kind.write,
                execute: kind.execute,
                privileged: kind.privileged,
            };
            assert_eq!(PageRequest::decode(words), request, "{words:x?}; {}", what());
            let changes = self.asked.changes[device];
            self.asked.open.push(Open { device, substream, group, changes });
        }
    }

    /// The guest responds to a group, or to none that there is, if not `right`.
    fn respond(&mut self, number: u8, response: u8, right: bool) {
        let count = self.asked.open.len();
        if count == 0 {
            return;
        }
        let number = usize::from(number) % count;
        let Open { device, substream, group, changes } = self.asked.open[number];
        let named = if right { substream } else { substream.map_or(Some(1), |_| None) };
        let response = Command::PriResp {
            stream: StreamId(DEVICES[device].into()),
            substream: named.and_then(Pasid::new),
            group,
            response,
        };
        let accepted = self.accepts(&response);
        self.command(&[response]);
        let answer = self.ports[device].page_response(group);
        let expected = match (right && accepted, response) {
            (false, _) => None,
            (true, Command::PriResp { response: 2, .. }) => Some(PageResponseCode::Success),
            (true, _) => Some(PageResponseCode::Invalid),
        };
        // The host answers, too, when an attachment ends.
        let ended =
            changes != self.asked.changes[device] && answer == Some(PageResponseCode::Invalid);
        assert!(answer == expected || ended, "{response:x?}: {answer:?}");
        if answer.is_some() {
            self.asked.open.swap_remove(number);
        }
    }

    /// Nobody waits for the guest's response any more, of `device` or of all.
    pub fn ended_requests(&mut self, device: Option<usize>) {
        let ends = |open: &Open| device.is_none_or(|device| device == open.device);
        for open in self.asked.open.extract_if(.., |open| ends(open)) {
            let answer = self.ports[open.device].page_response(open.group);
            assert_eq!(answer, Some(PageResponseCode::Invalid), "{open:?}");
        }
    }
}

/// A device asks, or the guest responds, or uses its queue.
pub fn step(world: &mut World, input: &mut Unstructured) -> Result<()> {
    let [how, of, at]: [u8; 3] = input.arbitrary()?;
    if !world.is_enabled() {
        return Ok(());
    }
    if !world.cr0().priqen() && how & 0xf0 != 0xf0 {
        world.write64(regs::PRIQ_BASE, (page::REQUESTS * PAGE) | u64::from(how >> 4 & 3));
        world.write32(regs::CR0, world.cr0().with_priqen(true).into_bits());
    }
    match how & 15 {
        0..=7 => {
            let substream = Some(u32::from(of >> 1 & 3)).filter(|number| (1..4).contains(number));
            let kind = Kind {
                write: of & 0x18 == 0x08,
                privileged: of & 0x30 == 0x30 && substream.is_some(),
                execute: of & 0x18 == 0x18 && substream.is_some(),
            };
            let again = world.last.filter(|_| of & 0x80 != 0);
            let address = match of >> 5 & 3 {
                // Mostly nothing is there.
                0..=2 => (0x400 + u64::from(at)) << 16,
                _ => super::address(world, input)?,
            };
            world.ask(again.unwrap_or(Dma {
                device: usize::from(of & 1),
                substream,
                address,
                kind,
            }));
        }
        8 | 9 => {
            world.respond(of, [2, 2, 0, 1, 2, 3, 2, 0][usize::from(at & 7)], at & 0xf0 != 0xf0)
        }
        10 | 11 => {
            // All that it has read, or not the last ones.
            let prod = world.read32(regs::PRIQ_PROD);
            let left = if of & 0xc0 == 0 { u32::from(of & 3) } else { 0 };
            let cons = if of & 0x30 == 0x30 { 0 } else { prod & OVERFLOW };
            world.write32(regs::PRIQ_CONS, cons | (prod & !OVERFLOW).wrapping_sub(left) & 0xf_ffff);
        }
        12 => {
            let enabled = world.cr0().priqen();
            world.write32(regs::CR0, world.cr0().with_priqen(!enabled).into_bits());
        }
        13 => {
            let errors = world.read32(regs::GERROR);
            world.write32(regs::GERRORN, errors);
        }
        14 => {
            // Not memory.
            let base = if of & 1 != 0 { 1 << 40 } else { page::REQUESTS * PAGE };
            world.write32(regs::CR0, world.cr0().with_priqen(false).into_bits());
            world.write64(regs::PRIQ_BASE, base | u64::from(of >> 1 & 3));
        }
        _ => {
            world.write32(regs::IRQ_CTRL, 0);
            world.write32(PRIQ_IRQ_CFG2, u32::from(of & 1) << 31);
            world.write32(regs::IRQ_CTRL, u32::from(of >> 1 & 7));
        }
    }
    Ok(())
}
