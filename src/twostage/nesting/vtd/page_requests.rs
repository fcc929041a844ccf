// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests: from the host's fault queue to the virtual IOMMU, and the responses back.
//!
//! A host has one fault queue for all devices, read by one thread. The host numbers the groups in
//! it by cookies, and gives a cookie again once it has answered a group by itself, as its
//! attachment has ended. The guest's response to that one must not be taken for one to the next
//! with its cookie, so the virtual IOMMU gets tickets, which are never given again.
//!
//! What is here has one lock, held while the queue is read or answered, which never blocks, and
//! not across a call to the virtual IOMMU.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::iommufd::{Errno, FaultQueue, HostError, ObjectId, PageRequestGroup, PageResponseCode};
use crate::nesting::reader::{drain, Drained, QueueThread, Signal};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::page_request::{PageRequest, PageResponse};
use crate::sync::Mutex;
use crate::threads::ThreadStart;
use crate::viommu::vtd::PageTicket;
use crate::warn_limited;

/// How long [`PageRoute::drain`] waits, for a thread that never blocks.
const DELIVERY_TIME: Duration = Duration::from_secs(5);
/// Indices of groups have 9 bits.
const GROUPS: u32 = 1 << 9;

/// The fault queue of a host, and the groups read from it that are not answered here.
#[derive(Default)]
pub(super) struct PageRoute(Mutex<Route>);

#[derive(Default)]
struct Route {
    queue: Option<Arc<dyn FaultQueue>>,
    signal: Option<Arc<Signal>>,
    /// The last ticket.
    last: u64,
    cookies: BTreeMap<PageTicket, u32>,
    tickets: BTreeMap<u32, PageTicket>,
}

impl PageRoute {
    /// Waits until all that is in the queue now has been delivered.
    pub fn drain(&self) {
        let signal = self.0.lock().signal.clone();
        if signal.is_some_and(|signal| !signal.quiesce(DELIVERY_TIME)) {
            warn_limited!("page requests are still on their way to the guest, which drains them");
        }
    }

    /// Responds to the group of `ticket`, unless the host or somebody else has.
    pub fn respond(&self, ticket: PageTicket, response: PageResponse) {
        let mut route = self.0.lock();
        let Some(cookie) = route.cookies.remove(&ticket) else { return };
        route.tickets.remove(&cookie);
        let code = match response {
            PageResponse::Success => PageResponseCode::Success,
            // User space cannot stop a device that others may share the interface of.
            PageResponse::InvalidRequest | PageResponse::Failure => PageResponseCode::Invalid,
        };
        match route.queue.as_ref().map(|queue| queue.respond(cookie, code)) {
            // Its attachment has ended, and the host has answered.
            Some(Err(error)) if error.errno != Errno::EINVAL => {
                warn_limited!("a device waits for a page request in vain: {error}");
            }
            _ => {}
        }
    }

    /// Reads all groups that are there, each with its ticket: all at once, as the host may give the
    /// cookie of any of them again as soon as it was read.
    pub fn read(&self) -> (Vec<(PageTicket, PageRequestGroup)>, crate::iommufd::Result<()>) {
        let mut route = self.0.lock();
        let mut groups = Vec::new();
        let Some(queue) = route.queue.clone() else { return (groups, Ok(())) };
        loop {
            match queue.next_group() {
                Ok(Some(group)) => {
                    route.last += 1;
                    let ticket = PageTicket(route.last);
                    if let Some(former) = route.tickets.insert(group.cookie, ticket) {
                        route.cookies.remove(&former);
                    }
                    route.cookies.insert(ticket, group.cookie);
                    groups.push((ticket, group));
                }
                Ok(None) => return (groups, Ok(())),
                Err(error) => return (groups, Err(error)),
            }
        }
    }

    /// Closes the queue.
    pub fn close(&self) {
        let mut route = self.0.lock();
        *route = Route { last: route.last, ..Route::default() };
    }
}

/// Has `threads` start a thread that delivers the groups of `queue`, which becomes that of `route`:
/// `bring` reads and delivers what is there, and returns whether that was anything.
///
/// # Errors
/// There is no thread for it, or none that waits for the queue. The queue is closed.
pub(super) fn deliver(
    threads: &dyn ThreadStart,
    queue: Arc<dyn FaultQueue>,
    route: &PageRoute,
    mut bring: impl FnMut() -> crate::iommufd::Result<bool> + Send + 'static,
) -> io::Result<QueueThread> {
    let object = queue.object();
    let read = move |pause: &dyn Fn(Duration) -> bool| {
        let drained = drain(&mut bring, pause);
        if let Drained::Broken(error) = &drained {
            log::error!("{}", Unreadable(error));
        }
        drained
    };
    route.0.lock().queue = Some(queue.clone());
    let started =
        QueueThread::start(threads, "page-requests", object, |signal| queue.watch(signal), read);
    match &started {
        Ok(thread) => route.0.lock().signal = Some(thread.signal()),
        Err(_) => route.close(),
    }
    started
}

/// The requests of a group of the guest's `rid`, as the architecture has them; `None` if that has
/// no such.
pub(super) fn requests(rid: Bdf, group: &PageRequestGroup) -> Option<Vec<PageRequest>> {
    let last = group.requests.len().checked_sub(1)?;
    let request = |(number, of): (usize, &crate::iommufd::PageRequest)| {
        let pasid = if of.flags.pasid_valid() { Some(Pasid::new(of.pasid)?) } else { None };
        Some(PageRequest {
            rid,
            pasid,
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

/// The user's message about a queue that cannot be read.
struct Unreadable<'a>(&'a HostError);

impl fmt::Display for Unreadable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: page requests of the devices behind this virtual VT-d are no longer served; \
             devices that make one wait until the guest detaches them. Restart the guest to get \
             them back",
            self.0
        )
    }
}

impl fmt::Debug for PageRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let route = self.0.lock();
        let queue: Option<ObjectId> = route.queue.as_ref().map(|queue| queue.object());
        f.debug_struct("PageRoute")
            .field("queue", &queue)
            .field("open", &route.cookies.len())
            .finish_non_exhaustive()
    }
}
