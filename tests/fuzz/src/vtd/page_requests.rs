// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests of devices, compared with what the registers of their queue say: each is in the
//! queue until the guest responds, or is answered at once, and never both. One that the guest's
//! tables refuse is in the fault records. The host ends those of an attachment that ends, which it
//! does if the entries of its requester have changed, and for nothing else.

use arbitrary::{Result, Unstructured};
use twostage::iommufd::PageResponseCode;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::fault::FaultReason as R;
use twostage::spec::vtd::page_request::{PageRequest, PAGE_REQUEST_SIZE};
use twostage::spec::vtd::qi::Descriptor;
use twostage::spec::vtd::regs;
use twostage_emulated::DmaServices;

use super::dma::Dma;
use super::image::page;
use super::naive::{decide, is_recorded, EntriesSince, Way, Who, ADDRESS};
use super::walk::Kind;
use super::world::{World, DEVICES, PASIDS, UNKNOWN};
use crate::models::memory::{Moment, PAGE};
use crate::models::oracle::way;

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
    /// How often something happened by which any attachment may have ended.
    pub changes: u32,
}

/// A group that waits for the guest.
#[derive(Debug, Clone, Copy)]
struct Open {
    device: usize,
    pasid: Option<u32>,
    group: u16,
    changes: u32,
    /// What the entries of its requester were then, they have been since.
    since: Moment,
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

    /// Why the guest's tables as they are now refuse requests of the device of `dma` for pages, and
    /// FPD; `None`: PRE of its context entry is set.
    fn refusal(&self, dma: &Dma) -> Option<(R, bool)> {
        let device = dma.device;
        let decision = self.way_of(dma).1;
        match decision.way {
            Way::Blocked(R::RootTableAddressInvalid) => {
                return Some((R::RootTableAddressInvalid, false));
            }
            _ if self.is_legacy() => return Some((R::PageRequestInLegacyMode, false)),
            // Of root tables, and context entries.
            Way::Blocked(reason) if matches!(reason.code(), 0x38..=0x42) => {
                return Some((reason, decision.quiet));
            }
            _ => {}
        }
        let (bus, devfn) = (u64::from(DEVICES[device] >> 8), u64::from(DEVICES[device] & 0xff));
        let half = self.memory.load((self.root? & ADDRESS) + bus * 16 + devfn / 128 * 8)?;
        let context = self.memory.load((half & ADDRESS) + devfn % 128 * 32)?;
        (context >> 4 & 1 == 0).then_some((R::PageRequestDisabled, context >> 1 & 1 != 0))
    }

    /// Whether the attachment of `open` may have ended since.
    fn may_have_ended(&self, open: &Open) -> bool {
        let who = Who { rid: DEVICES[open.device], pasid: open.pasid };
        let now = EntriesSince { contexts: Moment::MAX, pasids: Moment::MAX };
        let (words, _) = way(&self.memory, |it| decide(it, self.offers, self.root, who, now));
        let has_changed = |gpa: &u64| {
            let mut last = 0;
            self.memory.past(*gpa, |_, until| last = last.max(until));
            last > open.since || UNKNOWN.contains(&(gpa / PAGE))
        };
        open.changes != self.asked.changes || words.iter().any(has_changed)
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
        let listens = self.status().tes() && !self.asked.disabled[device];
        let refusal = self.refusal(dma).filter(|_| listens);
        let invalid = Becomes::Answered(PageResponseCode::Invalid);
        let success = Becomes::Answered(PageResponseCode::Success);
        let (becomes, after) = match () {
            () if !listens || refusal.is_some() => (invalid, before),
            () if status & OVERFLOWN != 0 => (success, before),
            () if base == 0 => (invalid, before),
            () if next == head => (success, Queue { status: status | OVERFLOWN, ..before }),
            () if !is_memory => (invalid, before),
            () => (Becomes::Queued, Queue { tail: next, status: status | PENDING, ..before }),
        };
        let drained = self.say(&[DRAIN]);
        if self.hosts.fail {
            // Its device may have been blocked meanwhile.
            return;
        }
        assert!(drained, "requests cannot be drained");
        let answer = self.ports[device].page_response(group);
        let found = answer.map_or(Becomes::Queued, Becomes::Answered);
        let queue = self.request_queue();
        let what = || format!("{dma:x?} in {group}: {found:x?}, {before:x?}, {queue:x?}");
        assert_eq!((found, queue), (becomes, after), "{}", what());
        let told = refusal.filter(|(reason, quiet)| is_recorded(*reason, *quiet));
        // T1 and T2: a page request.
        let address = iova & !(PAGE - 1);
        let told = told.map(|(reason, _)| (reason.code(), DEVICES[device], address, pasid, 0b01));
        let record = self.fault_record().map(|record| {
            let kind = u8::from(record.high.t1()) << 1 | u8::from(record.high.t2());
            let pasid = record.high.pp().then_some(record.high.pv());
            (record.high.fr(), record.high.sid(), record.address(), pasid, kind)
        });
        assert_eq!(record, told, "{}", what());
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
            let entries = self.account.since(Who { rid: DEVICES[device], pasid });
            let since = entries.contexts.min(entries.pasids);
            self.asked.open.push(Open { device, pasid, group, changes, since });
        }
    }

    /// The guest responds to a group, or to none that there is, if not `right`.
    fn respond(&mut self, number: u8, code: u8, right: bool) {
        let count = self.asked.open.len();
        if count == 0 {
            return;
        }
        let number = usize::from(number) % count;
        let open = self.asked.open[number];
        let Open { device, pasid, group, .. } = open;
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
        let ended = answer == Some(PageResponseCode::Invalid) && self.may_have_ended(&open);
        assert!(
            answer == expected || ended || self.hosts.fail,
            "{response:x?}: {answer:?}, {open:x?}"
        );
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
