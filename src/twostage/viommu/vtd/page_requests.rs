// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests: the queue and its event (§7.4, §7.5, §11.4.11), and the responses (§7.6).
//!
//! A group of requests is either in the queue, and *open* until the guest responds, or answered at
//! once: as an invalid request where nothing serves it (translation or the queue is off, or PRE is
//! clear, which is a fault, too), and with success where the queue has overflowed, so that the
//! device tries again. Of a group that is answered by an overflow, the guest may have found a part
//! in the queue, which it discards when it sees PRO. (These are the automatic responses of §7.10,
//! which has software drain again while PRO is set: a device that was told of an invalid request
//! would not ask again. An SMMU's are success, too, for the same reason: IHI 0070 §8.1.)
//!
//! Each group has exactly one answer. A function has at most one open group for each of the 2^9
//! indices that PCIe has, so a guest that never responds costs no more than these: another request
//! with an index that is open ends the former. What the host has answered itself, as it detached
//! the requester, stays open here until the guest responds, to nobody by then.
//!
//! The queue is off while PQA is 0, as after reset: software has no other way to say so.
//!
//! The lock here is taken after that of the registers, for a moment. The host is answered without
//! it.

use std::collections::{BTreeMap, BTreeSet};

use super::fault_log::EventRegisters;
use super::host_side::{PageTicket, Policy};
use super::policy::Blocked;
use super::{Locked, VtdIommu};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::page_request::{PageRequest, PageResponse, PAGE_REQUEST_SIZE};
use crate::spec::vtd::regs::{self, Pqa, Prs, QueuePointer};
use crate::viommu::register_page::Shown;
use crate::viommu::registers::SlotAccess;
use crate::viommu::{MsiMessage, Requester, TableMemory};

/// The registers of the page request queue.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct PageQueue {
    /// PQH: the guest has seen everything before it.
    pub head: QueuePointer,
    /// PQT: where the next request goes.
    pub tail: QueuePointer,
    /// PQA.
    pub address: Pqa,
    /// PRS.
    pub status: Prs,
    /// PECTL, PEDATA, PEADDR, PEUADDR.
    pub event: EventRegisters,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Put {
    /// It is in the queue.
    Queued,
    /// The queue is full, or was.
    Overflow,
    /// There is no queue in memory.
    NoQueue,
}

impl PageQueue {
    /// Bits of PQH and PQT that software can write: descriptors have 32 bytes.
    pub(super) const POINTER: u64 = QueuePointer::WRITABLE & !(PAGE_REQUEST_SIZE - 1);

    /// The guest writes the registers of `access`, with `value` at its place in their slot. Returns
    /// the message of an event that was pending.
    pub(super) fn write(&mut self, access: SlotAccess, value: u64) -> Option<MsiMessage> {
        let (low, high) = access.halves(value);
        let pointer = |old: QueuePointer| {
            QueuePointer::from_bits(access.merge(old.into_bits(), value, Self::POINTER))
        };
        match access.slot {
            regs::PQH => self.head = pointer(self.head),
            regs::PQT => self.tail = pointer(self.tail),
            regs::PQA => {
                let new = access.merge(self.address.into_bits(), value, Pqa::WRITABLE);
                self.address = Pqa::from_bits(new);
            }
            regs::PECTL => return self.event.write_control(low, high),
            regs::PEADDR => self.event.write_address(low, high),
            _ => high.into_iter().for_each(|value| self.write_status(value)),
        }
        None
    }

    /// The guest writes PRS: writing 1 clears a bit, and the event is not pending without its
    /// causes.
    fn write_status(&mut self, value: u32) {
        let clear = Prs::from_bits(value);
        self.status.set_ppr(self.status.ppr() && !clear.ppr());
        self.status.set_pro(self.status.pro() && !clear.pro());
        if self.status == Prs::new() {
            self.event.clear();
        }
    }

    /// Sets bits of PRS; the event is raised if none was set before.
    fn raise(&mut self, status: Prs) -> Option<MsiMessage> {
        let quiet = self.status == Prs::new();
        self.status = Prs::from_bits(self.status.into_bits() | status.into_bits());
        if quiet {
            self.event.raise()
        } else {
            None
        }
    }

    /// Adds `request`, unless the queue has overflowed.
    fn put(
        &mut self,
        memory: &dyn TableMemory,
        request: &PageRequest,
    ) -> (Put, Option<MsiMessage>) {
        if self.status.pro() {
            return (Put::Overflow, None);
        }
        if self.address.base() == 0 {
            return (Put::NoQueue, None);
        }
        // The size is a power of two.
        let within = |offset: u64| offset & (self.address.size() - 1);
        let tail = within(self.tail.offset());
        let next = within(tail + PAGE_REQUEST_SIZE);
        if next == self.head.offset() {
            return (Put::Overflow, self.raise(Prs::new().with_pro(true)));
        }
        let mut bytes = [0; PAGE_REQUEST_SIZE as usize];
        for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(request.encode()) {
            *bytes = word.to_le_bytes();
        }
        let address = self.address.base().checked_add(tail);
        if address.is_none_or(|address| memory.write(address, &bytes).is_err()) {
            return (Put::NoQueue, None);
        }
        self.tail = QueuePointer::from_offset(next);
        (Put::Queued, self.raise(Prs::new().with_ppr(true)))
    }
}

/// A group in the queue.
#[derive(Debug)]
struct Open {
    pasid: Option<Pasid>,
    ticket: PageTicket,
}

/// The queue, and the groups that wait for the guest.
#[derive(Debug, Default)]
pub(super) struct PageRequests {
    pub queue: PageQueue,
    open: BTreeMap<(Bdf, u16), Open>,
    /// Functions that software has not enabled to ask.
    disabled: BTreeSet<Bdf>,
}

impl PageRequests {
    /// Takes the tickets of all open groups, or those of `rid`.
    fn take(&mut self, rid: Option<Bdf>) -> Vec<(Bdf, PageTicket)> {
        let all = std::mem::take(&mut self.open).into_iter();
        let (taken, left): (Vec<_>, _) =
            all.partition(|((of, _), _)| rid.is_none_or(|rid| rid == *of));
        self.open = left.into_iter().collect();
        taken.into_iter().map(|((rid, _), open)| (rid, open.ticket)).collect()
    }
}

impl VtdIommu {
    /// Software has enabled the page requests of `rid` in its configuration space (PCIe 6.0
    /// §10.5.2.2), or disabled them. By default all are enabled, as a device by itself asks only
    /// then. An assigned one asks as soon as its host's driver has enabled that: what it asks while
    /// the guest has not is answered as invalid, and no fault of the guest's.
    pub fn set_page_requests(&self, rid: Bdf, enabled: bool) {
        let mut pages = self.pages();
        match enabled {
            true => pages.disabled.remove(&rid),
            false => pages.disabled.insert(rid),
        };
    }

    pub(super) fn pages(&self) -> Locked<'_, PageRequests> {
        Shown::new(self, self.pages.lock())
    }

    /// See [`super::FaultTarget::page_requests`].
    pub(super) fn take_page_requests(
        &self,
        requests: &[PageRequest],
        ticket: PageTicket,
    ) -> Option<PageResponse> {
        let Some(last) = requests.last() else { return Some(PageResponse::InvalidRequest) };
        let requester = Requester { rid: last.rid, pasid: last.pasid };
        let mut events = Vec::new();
        let mut former = None;
        let mut pages = self.pages_for_event();
        // With the lock, so that what ends all open groups ends this one, too, or it is not opened.
        let served = match pages.disabled.contains(&last.rid) {
            true => Err(None),
            false => self.serves_page_requests(requester),
        };
        let mut put = Put::NoQueue;
        if served.is_ok() {
            for request in requests {
                let (result, event) = pages.queue.put(&*self.memory, request);
                put = result;
                events.extend(event);
            }
        }
        if put == Put::Queued {
            let open = Open { pasid: last.pasid, ticket };
            former = pages.open.insert((last.rid, last.group), open);
        }
        drop(pages);
        events.into_iter().for_each(|event| self.send(Some(event)));
        if let Some(former) = former {
            self.host.respond(last.rid, former.ticket, PageResponse::InvalidRequest);
        }
        let count = requests.len() as u64;
        match (served, put) {
            (Ok(()), Put::Queued) => {
                self.counters.page_requests.add(count);
                None
            }
            (Ok(()), Put::Overflow) => {
                self.counters.page_requests_lost.add(count);
                Some(PageResponse::Success)
            }
            (served, _) => {
                self.counters.page_requests_refused.add(count);
                if let Err(Some(Blocked { reason, fault_disabled })) = served {
                    if reason.is_recorded(fault_disabled) {
                        let recorded = self.fault_log_for_event().record_page_request(last, reason);
                        self.recorded(recorded);
                    }
                }
                Some(PageResponse::InvalidRequest)
            }
        }
    }

    /// Whether page requests of `requester` go to the guest; otherwise why not, if that is a fault
    /// of its tables.
    fn serves_page_requests(&self, requester: Requester) -> Result<(), Option<Blocked>> {
        let standing = self.requesters.standing(requester).filter(|it| it.translating);
        let Some(standing) = standing.filter(|_| !self.is_halted()) else { return Err(None) };
        self.tables(standing.root).page_requests(requester.rid).map_err(Some)?;
        // The host ends the requests of one that it blocks. This one was on its way.
        let stage1 = standing.given.is_some_and(|given| {
            given.applied && matches!(given.decision.policy, Policy::Stage1(_))
        });
        stage1.then_some(()).ok_or(None)
    }

    /// A page group response descriptor. One for a group that is not open has no effect.
    pub(super) fn respond_to_group(&self, who: Requester, group: u16, code: u8) {
        let mut pages = self.pages();
        let key = (who.rid, group);
        if pages.open.get(&key).is_none_or(|open| open.pasid != who.pasid) {
            drop(pages);
            self.log.warn(format_args!("VT-d: a response to {who}, group {group}: not open"));
            return;
        }
        let open = pages.open.remove(&key);
        drop(pages);
        if let Some(open) = open {
            self.host.respond(who.rid, open.ticket, PageResponse::from_code(code));
        }
    }

    /// Ends all open groups, or those of `rid`, as invalid requests.
    pub(super) fn end_page_requests(&self, rid: Option<Bdf>) {
        let ended = self.pages().take(rid);
        for (rid, ticket) in ended {
            self.host.respond(rid, ticket, PageResponse::InvalidRequest);
        }
    }

    /// As after reset, with no open group.
    pub(super) fn reset_page_requests(&self) {
        self.pages().queue = PageQueue::default();
        self.end_page_requests(None);
    }
}
