// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests of devices, compared with what the registers of their queue say: each is in the
//! queue until the guest responds, or is answered at once, and never both.

use arbitrary::{Result, Unstructured};
use twostage::iommufd::PageResponseCode;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::page_request::{PageRequest, PAGE_REQUEST_SIZE};
use twostage::spec::vtd::qi::Descriptor;
use twostage::spec::vtd::regs;
use twostage_emulated::DmaServices;

use super::dma::Dma;
use super::image::page;
use super::naive::{Way, ADDRESS};
use super::walk::Kind;
use super::world::{World, DEVICES, PASIDS};
use crate::models::memory::PAGE;

/// PRO and PPR.
const OVERFLOWN: u32 = 2;
const PENDING: u32 = 1;
/// Bits of PQH and PQT.
const POINTER: u64 = 0x7_ffe0;

/// What the devices have asked for.
#[derive(Debug, Default)]
pub struct Asked {
    open: Vec<Open>,
    /// Functions that software has disabled to ask.
    disabled: [bool; 2],
    /// The queue before a device asks.
    before: Queue,
    /// How often something happened by which the host may have ended requests.
    pub changes: u32,
}

/// A group that waits for the guest.
#[derive(Debug, Clone, Copy)]
struct Open {
    device: usize,
    pasid: Option<u32>,
    group: u16,
    changes: u32,
}

/// The registers of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Queue {
    head: u64,
    tail: u64,
    base: u64,
    size: u64,
    status: u32,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Becomes {
    Queued,
    Answered(PageResponseCode),
}

/// Everything that was asked for before is where it belongs.
const DRAIN: Descriptor =
    Descriptor::Wait { status: None, interrupt: false, fence: false, drain_page_requests: true };

impl World {
    fn request_queue(&self) -> Queue {
        let address = self.read64(regs::PQA);
        Queue {
            head: self.read64(regs::PQH) & POINTER,
            tail: self.read64(regs::PQT) & POINTER,
            base: address & !(PAGE - 1),
            size: PAGE << (address & 7),
            status: self.read32(regs::PRS) & 3,
        }
    }

    /// PRE of the context entry of the device of `dma`, if that is right as it is now.
    fn may_ask(&self, dma: &Dma) -> bool {
        let device = dma.device;
        match self.way_of(dma).1.way {
            // Of root tables, and context entries.
            Way::Blocked(reason) if matches!(reason.code(), 0x30..=0x42) => return false,
            _ => {}
        }
        let (bus, devfn) = (u64::from(DEVICES[device] >> 8), u64::from(DEVICES[device] & 0xff));
        let Some(root) = self.root.filter(|_| !self.is_legacy()) else { return false };
        let half = self.memory.load((root & ADDRESS) + bus * 16 + devfn / 128 * 8);
        let context = |half: u64| self.memory.load((half & ADDRESS) + devfn % 128 * 32);
        half.and_then(context).is_some_and(|low| low >> 4 & 1 != 0)
    }

    /// Does `dma`, of a device that asks for what it does not find.
    fn ask(&mut self, dma: Dma) {
        let services = |page_requests| DmaServices { page_requests, wait_for_pages: false };
        self.ports[dma.device].set_services(services(true));
        self.settle();
        self.asked.before = self.request_queue();
        self.dma(dma);
        self.ports[dma.device].set_services(services(false));
    }

    /// `dma` has asked for its page, in `group`.
    pub fn asked(&mut self, dma: &Dma, group: u16) {
        let Dma { device, pasid, iova, kind } = *dma;
        assert!(self.header.requests && !kind.execute && !kind.privileged, "{dma:x?}");
        let before = self.asked.before;
        let Queue { head, tail, base, size, status } = before;
        let at = tail & (size - 1);
        let next = (at + PAGE_REQUEST_SIZE) & (size - 1);
        let is_memory = base.checked_add(at).is_some_and(|at| self.memory.load(at).is_some());
        let serves = self.status().tes() && self.may_ask(dma) && !self.asked.disabled[device];
        let invalid = Becomes::Answered(PageResponseCode::Invalid);
        let success = Becomes::Answered(PageResponseCode::Success);
        let (becomes, after) = match () {
            () if !serves => (invalid, before),
            () if status & OVERFLOWN != 0 => (success, before),
            () if base == 0 => (invalid, before),
            () if next == head => (success, Queue { status: status | OVERFLOWN, ..before }),
            () if !is_memory => (invalid, before),
            () => (Becomes::Queued, Queue { tail: next, status: status | PENDING, ..before }),
        };
        assert!(self.say(&[DRAIN]), "requests cannot be drained");
        let answer = self.ports[device].page_response(group);
        let found = answer.map_or(Becomes::Queued, Becomes::Answered);
        let queue = self.request_queue();
        let what = || format!("{dma:x?} in {group}: {found:x?}, {before:x?}, {queue:x?}");
        assert_eq!((found, queue), (becomes, after), "{}", what());
        if becomes == Becomes::Queued {
            let word = |of: u64| self.memory.load(base + at + of * 8).unwrap_or(0);
            let request = PageRequest {
                rid: Bdf::from_raw(DEVICES[device]),
                pasid: pasid.and_then(Pasid::new),
                group,
                last: true,
                address: iova & !(PAGE - 1),
                read: !kind.write,
                write: kind.write,
                execute: false,
                privileged: false,
            };
            let words = [word(0), word(1), word(2), word(3)];
            assert_eq!(PageRequest::decode(words), Some(request), "{words:x?}; {}", what());
            let changes = self.asked.changes;
            self.asked.open.push(Open { device, pasid, group, changes });
        }
    }

    /// The guest responds to a group, or to none that there is, if not `right`.
    fn respond(&mut self, number: u8, code: u8, right: bool) {
        let count = self.asked.open.len();
        if count == 0 {
            return;
        }
        let number = usize::from(number) % count;
        let Open { device, pasid, group, changes } = self.asked.open[number];
        let named = if right { pasid } else { pasid.map_or(Some(1), |_| None) };
        let response = Descriptor::PageGroupResponse {
            requester: Bdf::from_raw(DEVICES[device]),
            pasid: named.and_then(Pasid::new),
            group,
            code,
        };
        let accepted = self.accepts(&response);
        self.invalidate(&[response]);
        let answer = self.ports[device].page_response(group);
        let expected = match (right && accepted, code) {
            (false, _) => None,
            (true, 0) => Some(PageResponseCode::Success),
            (true, _) => Some(PageResponseCode::Invalid),
        };
        // The host answers, too, when an attachment ends.
        let ended = changes != self.asked.changes && answer == Some(PageResponseCode::Invalid);
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
    let [how, of, code]: [u8; 3] = input.arbitrary()?;
    if !world.header.requests || !world.status().tes() || !world.accepts(&DRAIN) {
        return Ok(());
    }
    if world.read64(regs::PQA) < PAGE && how & 0xf0 != 0xf0 {
        world.write64(regs::PQA, page::REQUESTS * PAGE);
    }
    match how & 15 {
        0..=7 => {
            let pasid = Some(u32::from(of >> 1 & 3)).filter(|pasid| (1..PASIDS).contains(pasid));
            let kind = Kind { write: of & 8 != 0, privileged: false, execute: false };
            let again = world.last.filter(|_| of & 0x80 != 0);
            let iova = match of >> 4 & 7 {
                // Mostly nothing is there.
                0..=3 => (page::DATA + 8 + u64::from(code & 15)) * PAGE,
                _ => super::iova(input)?,
            };
            world.ask(again.unwrap_or(Dma { device: usize::from(of & 1), pasid, iova, kind }));
        }
        8..=10 => world.respond(of, [0, 0, 1, 15][usize::from(code & 3)], code & 0xf0 != 0xf0),
        11 => {
            let tail = world.read64(regs::PQT);
            world.write64(regs::PQH, tail);
            world.write32(regs::PRS, u32::from(code & 3));
        }
        12 => {
            let tail = world.read64(regs::PQT);
            let room = PAGE_REQUEST_SIZE * (u64::from(of & 1) + 1);
            world.write64(regs::PQH, (tail + room) & (PAGE - 1));
        }
        13 => {
            let at = page::CONTEXT * PAGE + u64::from(DEVICES[usize::from(of & 1)]) * 32;
            let now = world.memory.load(at).unwrap_or(0);
            world.memory.store(at, now ^ 1 << 4);
        }
        14 => {
            let device = usize::from(of & 1);
            let enabled = world.asked.disabled[device];
            world.iommu.set_page_requests(Bdf::from_raw(DEVICES[device]), enabled);
            world.asked.disabled[device] = !enabled;
        }
        _ => world.write32(regs::PRS, u32::from(code)),
    }
    Ok(())
}
