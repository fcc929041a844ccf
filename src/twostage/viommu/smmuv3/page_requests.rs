// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests: what becomes of a group (§8.1, §8.2), and the responses (CMD_PRI_RESP, §4.5.2).
//!
//! A group of requests is either in the PRI queue, and *open* until the guest responds, or answered
//! at once: with a failure where nothing takes it (translation or the queue is off, or the queue is
//! not in memory), and with success where the queue has overflowed, so that the device tries again.
//! Of a group that is answered by an overflow, the guest may have found a part in the queue, which
//! it discards when it finds no last one (§8.1.1).
//!
//! Each group has exactly one answer. A stream has at most one open group for each of the 2^9
//! indices that PCIe has, so a guest that never responds costs no more than these: another request
//! with an index that is open ends the former. What the host has answered itself, as it replaced
//! what the stream is attached to, stays open here until the guest responds, to nobody by then.
//!
//! The lock here is taken after that of the registers, for a moment, and before that of the queue.
//! The host is answered without it.

use std::collections::BTreeMap;
use std::sync::MutexGuard;

use super::fault_log::Asked;
use super::{Smmu, StreamPolicy};
use crate::spec::pci::PageResponse;
use crate::spec::smmuv3::page_request::PageRequest;
use crate::spec::smmuv3::{StreamId, SubstreamId};
use crate::viommu::PageTicket;

/// A group in the queue.
#[derive(Debug)]
struct Open {
    substream: Option<SubstreamId>,
    ticket: PageTicket,
}

/// The groups that wait for the guest, by stream and PRGIndex.
#[derive(Debug, Default)]
pub(super) struct PageRequests(BTreeMap<(StreamId, u16), Open>);

impl PageRequests {
    /// Takes the tickets of all open groups, or those of `stream`.
    fn take(&mut self, stream: Option<StreamId>) -> Vec<(StreamId, PageTicket)> {
        let of = |it: StreamId| stream.is_none_or(|stream| stream == it);
        let all = std::mem::take(&mut self.0).into_iter();
        let (taken, left): (Vec<_>, _) = all.partition(|((it, _), _)| of(*it));
        self.0 = left.into_iter().collect();
        taken.into_iter().map(|((stream, _), open)| (stream, open.ticket)).collect()
    }
}

impl Smmu {
    fn pages(&self) -> MutexGuard<'_, PageRequests> {
        self.pages.lock()
    }

    /// See [`super::EventTarget::page_requests`].
    pub(super) fn take_page_requests(
        &self,
        requests: &[PageRequest],
        ticket: PageTicket,
    ) -> Option<PageResponse> {
        let Some(last) = requests.last() else { return Some(PageResponse::Failure) };
        let (mut signals, mut former) = (Vec::new(), None);
        let mut asked = Asked::Refused;
        let mut pages = self.pages();
        // With the lock, so that what ends all open groups ends this one, too, or it is not opened.
        if self.serves(last.stream) {
            for request in requests {
                let (result, signal) = self.fault_log().ask(self.offered, &*self.memory, request);
                asked = result;
                signals.extend(signal);
            }
        }
        if asked == Asked::Queued {
            let open = Open { substream: last.substream, ticket };
            former = pages.0.insert((last.stream, last.group), open);
        }
        drop(pages);
        signals.into_iter().for_each(|signal| self.send(Some(signal)));
        if let Some(former) = former {
            self.host.respond(last.stream, former.ticket, PageResponse::InvalidRequest);
        }
        let (counter, answer) = match asked {
            Asked::Queued => (&self.counters.page_requests, None),
            Asked::Overflow => (&self.counters.page_requests_lost, Some(PageResponse::Success)),
            Asked::Refused => (&self.counters.page_requests_refused, Some(PageResponse::Failure)),
        };
        counter.add(requests.len() as u64);
        answer
    }

    /// Whether what `stream` waits for is the guest's to answer.
    pub(super) fn serves(&self, stream: StreamId) -> bool {
        let standing = self.streams.standing(stream).filter(|it| it.table.is_some());
        let given = standing.filter(|_| !self.is_halted()).and_then(|it| it.given);
        // The host ends the requests of one that it blocks. This one was on its way.
        given.is_some_and(|given| {
            given.applied && matches!(given.decision, Ok(StreamPolicy::Stage1 { .. }))
        })
    }

    /// A CMD_PRI_RESP. One for a group that is not open has no effect; none has while translation
    /// is off.
    pub(super) fn respond_to_group(
        &self,
        stream: StreamId,
        substream: Option<SubstreamId>,
        group: u16,
        response: PageResponse,
    ) {
        if !self.streams.is_translating() {
            return;
        }
        let mut pages = self.pages();
        let key = (stream, group);
        let open = match pages.0.get(&key) {
            Some(open) if open.substream == substream => pages.0.remove(&key),
            _ => None,
        };
        drop(pages);
        match open {
            Some(open) => self.host.respond(stream, open.ticket, response),
            None => self.log.warn(format_args!(
                "SMMUv3: a response to stream {stream}, group {group}: not open"
            )),
        }
    }

    /// Ends all open groups, or those of `stream`, with a failure.
    pub(super) fn end_page_requests(&self, stream: Option<StreamId>) {
        let ended = self.pages().take(stream);
        for (stream, ticket) in ended {
            self.host.respond(stream, ticket, PageResponse::Failure);
        }
    }
}
