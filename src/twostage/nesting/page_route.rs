// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests, and transactions that an SMMU stalls: from the host's fault queue to the virtual
//! IOMMU, and the responses back. Files named `page_requests` in `vtd` and `smmuv3` have what
//! differs.
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

use super::reader::{drain, Drained, QueueThread, Signal};
use crate::iommufd::{
    Errno, FaultQueue, HostError, ObjectId, PageRequestGroup, PageResponseCode, Readiness,
};
use crate::spec::pci::PageResponse;
use crate::sync::{Condvar, Mutex};
use crate::threads::ThreadStart;
use crate::viommu::PageTicket;
use crate::warn_limited;

/// The fault queue of a host, and the groups read from it that are not answered here.
#[derive(Default)]
pub(super) struct PageRoute {
    route: Mutex<Route>,
    /// A pass has ended.
    passed: Condvar,
}

#[derive(Default)]
struct Route {
    queue: Option<Arc<dyn FaultQueue>>,
    signal: Option<Arc<Signal>>,
    /// The last ticket.
    last: u64,
    cookies: BTreeMap<PageTicket, u32>,
    tickets: BTreeMap<u32, PageTicket>,
    /// Read, and to be delivered in the next pass.
    kept: Vec<(PageTicket, PageRequestGroup)>,
    passes: Passes,
}

/// Passes of the thread, each of which reads and delivers all that is in the queue.
#[derive(Debug, Clone, Copy, Default)]
struct Passes {
    /// How many have begun.
    begun: u64,
    /// The last one that has ended well.
    ended: u64,
}

impl PageRoute {
    /// Waits, for `time` at most, until what was in the queue at the first call, which is the one
    /// without `pass`, was read and delivered: by the first pass that begins after it, however much
    /// comes meanwhile. Returns the `pass` to go on with, or that it was.
    pub fn drain(&self, pass: Option<u64>, time: Duration) -> Option<u64> {
        let route = self.route.lock();
        let awaited = pass.unwrap_or(route.passes.begun + 1);
        if let (None, Some(signal)) = (pass, &route.signal) {
            signal.changed(true);
        }
        let waits = |route: &mut Route| {
            let goes_on = route.signal.as_ref().is_some_and(|signal| !signal.is_over());
            goes_on && route.passes.ended < awaited
        };
        let (_route, late) = self.passed.wait_timeout_while(route, time, waits);
        late.then_some(awaited)
    }

    /// Takes the groups that are there and not read, if they are `stalled`; the thread delivers the
    /// others. Does not wait.
    pub fn take_unread(
        &self,
        stalled: impl Fn(&PageRequestGroup) -> bool,
    ) -> Vec<(PageTicket, PageRequestGroup)> {
        let mut route = self.route.lock();
        let Some(queue) = route.queue.clone() else { return Vec::new() };
        let mut taken = Vec::new();
        // An error is the thread's to tell.
        while let Ok(Some(group)) = queue.next_group() {
            let ticket = route.ticket(group.cookie);
            match stalled(&group) {
                true => taken.push((ticket, group)),
                false => route.kept.push((ticket, group)),
            }
        }
        if let Some(signal) = route.signal.as_ref().filter(|_| !route.kept.is_empty()) {
            signal.changed(true);
        }
        taken
    }

    /// Has `deliver` deliver all groups that are there. Returns whether there was any. By one
    /// thread only.
    pub fn bring(
        &self,
        mut deliver: impl FnMut(PageTicket, PageRequestGroup),
    ) -> crate::iommufd::Result<bool> {
        let (groups, read) = self.read();
        let some = !groups.is_empty();
        groups.into_iter().for_each(|(ticket, group)| deliver(ticket, group));
        read?;
        // No other pass has begun meanwhile.
        let passes = &mut self.route.lock().passes;
        passes.ended = passes.begun;
        self.passed.notify_all();
        Ok(some)
    }

    /// Responds to the group of `ticket`, unless the host or somebody else has.
    pub fn respond(&self, ticket: PageTicket, response: PageResponse) {
        let mut route = self.route.lock();
        let Some(cookie) = route.cookies.remove(&ticket) else { return };
        route.tickets.remove(&cookie);
        let code = match response {
            PageResponse::Success => PageResponseCode::Success,
            // User space cannot stop a device that others may share the interface of.
            PageResponse::InvalidRequest | PageResponse::Failure => PageResponseCode::Invalid,
        };
        if let Some(queue) = &route.queue {
            not_in_vain(queue.respond(cookie, code));
        }
    }

    /// Reads all groups that are there, each with its ticket: all at once, as the host may give the
    /// cookie of any of them again as soon as it was read.
    fn read(&self) -> (Vec<(PageTicket, PageRequestGroup)>, crate::iommufd::Result<()>) {
        let mut route = self.route.lock();
        route.passes.begun += 1;
        let mut groups = std::mem::take(&mut route.kept);
        let Some(queue) = route.queue.clone() else { return (groups, Ok(())) };
        loop {
            match queue.next_group() {
                Ok(Some(group)) => {
                    groups.push((route.ticket(group.cookie), group));
                }
                Ok(None) => return (groups, Ok(())),
                Err(error) => return (groups, Err(error)),
            }
        }
    }

    /// Closes the queue.
    pub fn close(&self) {
        let mut route = self.route.lock();
        *route = Route { last: route.last, passes: route.passes, ..Route::default() };
        self.passed.notify_all();
    }
}

impl Route {
    /// The ticket of a group that was just read with `cookie`.
    fn ticket(&mut self, cookie: u32) -> PageTicket {
        self.forget(cookie);
        self.last += 1;
        let ticket = PageTicket(self.last);
        self.tickets.insert(cookie, ticket);
        self.cookies.insert(ticket, cookie);
        ticket
    }

    /// A group was just read with `cookie`: the host has answered the one that had it before.
    fn forget(&mut self, cookie: u32) {
        if let Some(former) = self.tickets.remove(&cookie) {
            self.cookies.remove(&former);
        }
    }
}

fn not_in_vain(responded: crate::iommufd::Result<()>) {
    match responded {
        // Its attachment has ended, and the host has answered.
        Err(error) if error.errno != Errno::EINVAL => {
            warn_limited!("a device waits for a page request in vain: {error}");
        }
        _ => {}
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
    route.route.lock().queue = Some(queue.clone());
    let started =
        QueueThread::start(threads, "page-requests", object, |signal| queue.watch(signal), read);
    match &started {
        Ok(thread) => route.route.lock().signal = Some(thread.signal()),
        Err(_) => route.close(),
    }
    started
}

/// The user's message about a queue that cannot be read.
struct Unreadable<'a>(&'a HostError);

impl fmt::Display for Unreadable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: page requests of the devices behind this virtual IOMMU are no longer served; \
             devices that make one wait until the guest detaches them. Restart the guest to get \
             them back",
            self.0
        )
    }
}

impl fmt::Debug for PageRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let route = self.route.lock();
        let queue: Option<ObjectId> = route.queue.as_ref().map(|queue| queue.object());
        f.debug_struct("PageRoute")
            .field("queue", &queue)
            .field("open", &route.cookies.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Weak;
    use std::thread;
    use std::time::Instant;

    use super::*;
    use crate::iommufd::{
        PageRequest as HostRequest, PageRequestFlags, PageRequestPermissions, Verb,
    };
    use crate::threads::StdThreads;

    /// Returns its scripted groups, then is empty.
    #[derive(Debug, Default)]
    struct Script {
        groups: Mutex<VecDeque<PageRequestGroup>>,
        broken: bool,
        answers: Mutex<Vec<(u32, PageResponseCode)>>,
    }

    impl FaultQueue for Script {
        fn object(&self) -> ObjectId {
            ObjectId(6)
        }

        fn next_group(&self) -> crate::iommufd::Result<Option<PageRequestGroup>> {
            match self.groups.lock().pop_front() {
                None if self.broken => {
                    Err(HostError::new(Verb::PageRequest, ObjectId(6), Errno::EIO, "read: refused"))
                }
                group => Ok(group),
            }
        }

        fn respond(&self, cookie: u32, code: PageResponseCode) -> crate::iommufd::Result<()> {
            self.answers.lock().push((cookie, code));
            Ok(())
        }

        fn watch(&self, watcher: Arc<dyn Readiness>) -> crate::iommufd::Result<()> {
            watcher.changed(true);
            Ok(())
        }
    }

    fn group(cookie: u32, addresses: &[u64]) -> PageRequestGroup {
        let request = |address: &u64| HostRequest {
            flags: PageRequestFlags::new().with_pasid_valid(true),
            pasid: 5,
            group: 0x1ff,
            permissions: PageRequestPermissions::new().with_write(true),
            address: *address,
        };
        let requests = addresses.iter().map(request).collect();
        PageRequestGroup { cookie, dev: ObjectId(2), requests }
    }

    fn route(groups: impl IntoIterator<Item = PageRequestGroup>) -> (PageRoute, Arc<Script>) {
        let groups = Mutex::new(groups.into_iter().collect());
        let queue = Arc::new(Script { groups, ..Script::default() });
        let route = PageRoute::default();
        route.route.lock().queue = Some(queue.clone());
        (route, queue)
    }

    fn tickets(route: &PageRoute) -> Vec<PageTicket> {
        route.read().0.into_iter().map(|(ticket, _)| ticket).collect()
    }

    #[test]
    fn a_response_is_for_its_own_group_though_the_host_uses_the_cookie_again() {
        let (route, queue) = route([group(1, &[0]), group(2, &[0])]);
        let first = tickets(&route);
        // The host has answered the first one by itself.
        queue.groups.lock().push_back(group(1, &[0]));
        let second = tickets(&route);
        assert_eq!((first.len(), second.len()), (2, 1));
        route.respond(first[0], PageResponse::InvalidRequest);
        assert_eq!(*queue.answers.lock(), []);
        for (ticket, response) in [
            (second[0], PageResponse::Success),
            (second[0], PageResponse::InvalidRequest),
            (first[1], PageResponse::Failure),
        ] {
            route.respond(ticket, response);
        }
        let answers = [(1, PageResponseCode::Success), (2, PageResponseCode::Invalid)];
        assert_eq!(*queue.answers.lock(), answers);
        route.close();
        assert_eq!(tickets(&route), []);
    }

    #[test]
    fn what_nobody_has_read_is_taken_if_it_is_stalled() {
        let (route, queue) = route([group(1, &[0])]);
        let first = tickets(&route);
        // The host has answered the first one by itself.
        queue.groups.lock().extend([group(1, &[0x1000]), group(2, &[0]), group(3, &[0x1000])]);
        let taken = route.take_unread(|group| group.requests[0].address == 0x1000);
        assert_eq!(taken.iter().map(|(_, group)| group.cookie).collect::<Vec<_>>(), [1, 3]);
        taken.iter().for_each(|(ticket, _)| route.respond(*ticket, PageResponse::Success));
        let answers = [1, 3].map(|cookie| (cookie, PageResponseCode::Success));
        assert_eq!(*queue.answers.lock(), answers);
        let kept = tickets(&route);
        assert_eq!((kept.len(), tickets(&route)), (1, vec![]));
        route.respond(first[0], PageResponse::Success);
        route.respond(kept[0], PageResponse::Failure);
        assert_eq!(queue.answers.lock()[2..], [(2, PageResponseCode::Invalid)]);
    }

    #[test]
    fn what_was_read_before_an_error_is_delivered() {
        let (route, _) = route([]);
        let groups = Mutex::new([group(1, &[0])].into());
        let broken = Script { groups, broken: true, ..Script::default() };
        route.route.lock().queue = Some(Arc::new(broken));
        let (groups, read) = route.read();
        assert_eq!((groups.len(), read.map_err(|error| error.errno)), (1, Err(Errno::EIO)));
    }

    /// How far a delivery is.
    #[derive(Default)]
    struct Delivery {
        /// Allowed, and over.
        state: Mutex<(bool, bool)>,
        changed: Condvar,
    }

    fn drains(route: &PageRoute, time: Duration) -> bool {
        let begun = Instant::now();
        let mut pass = route.drain(None, Duration::ZERO);
        while pass.is_some() && begun.elapsed() < time {
            pass = route.drain(pass, Duration::from_millis(10));
        }
        pass.is_none()
    }

    #[test]
    fn a_drain_waits_for_no_more_than_what_was_there() {
        let (route, queue) = route([]);
        assert!(drains(&route, Duration::ZERO), "of nothing");
        let (route, of_reader) = (Arc::new(route), Arc::<Mutex<Weak<PageRoute>>>::default());
        *of_reader.lock() = Arc::downgrade(&route);
        // There is always another group when one was read, as long as the test runs.
        let bring = move || {
            let Some(route) = of_reader.lock().upgrade() else { return Ok(false) };
            thread::sleep(Duration::from_millis(1));
            let some = route.bring(|_, _| ())?;
            Ok(some || route.route.lock().queue.is_some())
        };
        let reader = deliver(&StdThreads, queue, &route, bring).unwrap();
        assert!(drains(&route, Duration::from_secs(60)));
        route.close();
        assert!(drains(&route, Duration::ZERO), "of a queue that is closed");
        reader.stop();
    }

    #[test]
    fn a_drain_waits_for_a_read_that_failed_and_not_for_one_that_never_comes() {
        let (route, _) = route([]);
        let broken = Arc::new(Script { broken: true, ..Script::default() });
        route.route.lock().queue = Some(broken.clone());
        assert!(route.bring(|_, _| ()).is_err());
        assert_eq!(route.route.lock().passes.ended, 0);
        let route = Arc::new(route);
        let of_reader = route.clone();
        let reader =
            deliver(&StdThreads, broken, &route, move || of_reader.bring(|_, _| ())).unwrap();
        assert!(drains(&route, Duration::from_secs(60)));
        reader.stop();
    }

    #[test]
    fn a_drain_waits_until_what_was_read_is_delivered() {
        let (route, queue) = route([group(1, &[0])]);
        let (route, delivery) = (Arc::new(route), Arc::<Delivery>::default());
        let (of_reader, at_reader) = (route.clone(), delivery.clone());
        let bring = move || {
            of_reader.bring(|_, _| {
                let waits = |state: &mut (bool, bool)| !state.0;
                at_reader.changed.wait_while(at_reader.state.lock(), waits).1 = true;
            })
        };
        let reader = deliver(&StdThreads, queue.clone(), &route, bring).unwrap();
        thread::scope(|scope| {
            let drained = scope.spawn(|| {
                assert!(drains(&route, Duration::from_secs(60)));
                delivery.state.lock().1
            });
            crate::patience::wait_until("the read", || queue.groups.lock().is_empty());
            thread::sleep(Duration::from_millis(20));
            assert!(!drained.is_finished());
            delivery.state.lock().0 = true;
            delivery.changed.notify_all();
            assert!(drained.join().unwrap(), "delivered before the drain was over");
        });
        assert_eq!(reader.stop(), ObjectId(6));
    }

    #[test]
    fn what_is_said_of_a_queue_that_cannot_be_read() {
        let error = HostError::new(Verb::PageRequest, ObjectId(6), Errno::EIO, "read: refused");
        let said = Unreadable(&error).to_string();
        assert!(said.contains("page requests of the devices behind this virtual IOMMU"), "{said}");
    }
}
