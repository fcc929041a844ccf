// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests and stalled transactions, as an SMMUv3 has them. The way to the virtual SMMU and
//! back is in [`crate::nesting::page_route`].
//!
//! A host does not say which of the two something in its fault queue is. Only a device with ATS
//! makes page requests, and such a device must not be stalled.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use super::faults::EventRoute;
use crate::iommufd::{ObjectId, PageRequestGroup};
use crate::nesting::page_route::PageRoute;
use crate::spec::pci::PageResponse;
use crate::spec::smmuv3::page_request::PageRequest;
use crate::spec::smmuv3::{StreamId, SubstreamId};
use crate::sync::RwLock;
use crate::viommu::smmuv3::StalledTransaction;
use crate::viommu::PageTicket;

/// Indices of groups have 9 bits.
const GROUPS: u32 = 1 << 9;

/// A device of which there may be something in the fault queue.
#[derive(Debug, Clone, Copy)]
struct Source {
    stream: StreamId,
    /// What is there of it are stalled transactions.
    stalls: bool,
}

/// Finds the guest's stream of each group in the fault queue, and passes that to the virtual SMMU.
/// Its own lock is held during a look-up only.
pub(super) struct PageRouter {
    events: Arc<EventRoute>,
    sources: RwLock<HashMap<ObjectId, Source>>,
    /// Where groups come from, and responses go.
    pub route: PageRoute,
}

impl PageRouter {
    /// To the target of `events`.
    pub fn new(events: Arc<EventRoute>) -> Self {
        Self { events, sources: RwLock::default(), route: PageRoute::default() }
    }

    /// What is of `dev` belongs to the guest's `stream`, which may be one that `stalls`.
    pub fn add(&self, dev: ObjectId, stream: StreamId, stalls: bool) {
        self.sources.write().insert(dev, Source { stream, stalls });
    }

    /// What is of `dev` is refused from now on.
    pub fn remove(&self, dev: ObjectId) {
        self.sources.write().remove(&dev);
    }

    fn source(&self, group: &PageRequestGroup) -> Option<Source> {
        self.sources.read().get(&group.dev).copied()
    }

    /// Delivers all groups that are in the queue. Returns whether there was any.
    pub fn bring(&self) -> crate::iommufd::Result<bool> {
        let target = self.events.target();
        // Before the queue is read.
        let epoch = target.as_ref().map_or(0, |target| target.stall_epoch());
        self.route.bring(|ticket, group| {
            let source = self.source(&group);
            let answer = match (source, &target) {
                (Some(Source { stream, stalls: true }), Some(target)) => {
                    match stalled(stream, &group) {
                        Some(transaction) => target.stalled(&transaction, ticket, epoch),
                        None => Some(PageResponse::InvalidRequest),
                    }
                }
                (Some(Source { stream, stalls: false }), Some(target)) => {
                    match requests(stream, &group) {
                        Some(requests) => target.page_requests(&requests, ticket),
                        None => Some(PageResponse::InvalidRequest),
                    }
                }
                _ => Some(PageResponse::InvalidRequest),
            };
            if let Some(answer) = answer {
                self.route.respond(ticket, answer);
            }
        })
    }

    /// See [`SmmuHostSide::take_unread`](crate::viommu::smmuv3::SmmuHostSide::take_unread).
    pub fn take_unread(&self) -> Vec<(StalledTransaction, PageTicket)> {
        let stalls = |group: &PageRequestGroup| self.source(group).filter(|source| source.stalls);
        let groups = self.route.take_unread(|group| stalls(group).is_some());
        let mut taken = Vec::with_capacity(groups.len());
        for (ticket, group) in groups {
            match stalls(&group).and_then(|source| stalled(source.stream, &group)) {
                Some(transaction) => taken.push((transaction, ticket)),
                None => self.route.respond(ticket, PageResponse::InvalidRequest),
            }
        }
        taken
    }
}

impl fmt::Debug for PageRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sources, route, .. } = self;
        let mut shown = f.debug_struct("PageRouter");
        shown.field("sources", sources).field("route", route).finish_non_exhaustive()
    }
}

/// The SubstreamID of a request; `None` if it is none.
fn substream(of: &crate::iommufd::PageRequest) -> Option<Option<SubstreamId>> {
    match of.flags.pasid_valid() {
        true => SubstreamId::new(of.pasid).map(Some),
        false => Some(None),
    }
}

/// The requests of a group of `stream`, as the architecture has them; `None` if that has no such.
fn requests(stream: StreamId, group: &PageRequestGroup) -> Option<Vec<PageRequest>> {
    let last = group.requests.len().checked_sub(1)?;
    let request = |(number, of): (usize, &crate::iommufd::PageRequest)| {
        Some(PageRequest {
            stream,
            substream: substream(of)?,
            group: u16::try_from(of.group).ok().filter(|_| of.group < GROUPS)?,
            last: number == last,
            address: of.address,
            read: of.permissions.read(),
            write: of.permissions.write(),
            execute: of.permissions.execute(),
            privileged: of.permissions.privileged(),
        })
    };
    group.requests.iter().enumerate().map(request).collect()
}

/// The stalled transaction of `stream` that a group stands for: the number of the group is its
/// STAG. `None` if there is no such.
fn stalled(stream: StreamId, group: &PageRequestGroup) -> Option<StalledTransaction> {
    let [of] = &*group.requests else { return None };
    Some(StalledTransaction {
        stream,
        substream: substream(of)?,
        stag: u16::try_from(of.group).ok()?,
        address: of.address,
        write: of.permissions.write(),
        execute: of.permissions.execute(),
        privileged: of.permissions.privileged(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommufd::{PageRequest as HostRequest, PageRequestFlags, PageRequestPermissions};

    const STREAM: StreamId = StreamId(0x20);

    fn group(addresses: &[u64]) -> PageRequestGroup {
        let request = |address: &u64| HostRequest {
            flags: PageRequestFlags::new().with_pasid_valid(true),
            pasid: 5,
            group: 0x1ff,
            permissions: PageRequestPermissions::new().with_write(true),
            address: *address,
        };
        let requests = addresses.iter().map(request).collect();
        PageRequestGroup { cookie: 1, dev: ObjectId(2), requests }
    }

    #[test]
    fn a_group_has_the_architectures_form_or_none() {
        let three = group(&[0x1000, 0x2000, 0x3000]);
        let of_guest = requests(STREAM, &three).unwrap();
        let places: Vec<_> = of_guest.iter().map(|it| (it.address, it.last)).collect();
        assert_eq!(places, [(0x1000, false), (0x2000, false), (0x3000, true)]);
        let PageRequest { stream, substream, group: index, read, write, .. } = of_guest[0];
        let five = SubstreamId::new(5);
        assert_eq!((stream, substream, index, read, write), (STREAM, five, 0x1ff, false, true));
        let mut wrong = three.clone();
        wrong.requests[1].group = 0x200;
        assert_eq!(requests(STREAM, &wrong), None);
        wrong.requests[1] = HostRequest { pasid: 1 << 20, ..three.requests[0] };
        assert_eq!(requests(STREAM, &wrong), None);
        wrong.requests.clear();
        assert_eq!(requests(STREAM, &wrong), None);
    }

    #[test]
    fn a_stalled_transaction_is_a_group_of_one() {
        assert_eq!(stalled(STREAM, &group(&[0, 0])), None);
        let mut one = group(&[0x1234]);
        one.requests[0].group = 0xffff;
        let transaction = StalledTransaction {
            stream: STREAM,
            substream: SubstreamId::new(5),
            stag: 0xffff,
            address: 0x1234,
            write: true,
            execute: false,
            privileged: false,
        };
        assert_eq!(stalled(STREAM, &one), Some(transaction));
        one.requests[0].flags = PageRequestFlags::new();
        let plain = StalledTransaction { substream: None, ..transaction };
        assert_eq!(stalled(STREAM, &one), Some(plain));
        one.requests[0].group = 0x1_0000;
        assert_eq!(stalled(STREAM, &one), None);
    }
}
