// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault queues and vEVENTQs as files.
//!
//! A file is read as far as possible, and records are returned one by one. Readiness comes from a
//! thread that polls the file; notifications are sent under the lock of the read records, after
//! polling the file again, so that the last one is always right. A file that polls as broken is
//! reported as readable, so that the reader finds the error.

use crate::jail;
use crate::sync::Mutex;
use crate::threads::{Started, ThreadStart};
use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::{Arc, MutexGuard};

use iommufd_bindings::*;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::iommufd::{
    Errno, EventQueue, FaultQueue, HostError, ObjectId, PageRequest, PageRequestFlags,
    PageRequestGroup, PageRequestPermissions, PageResponseCode, Readiness, Result, Verb, Vevent,
};

/// Maximum read size in bytes: a whole number of page requests. A longer group of page requests
/// cannot be read.
const READ: usize = 1024 * PAGE_REQUEST;

/// An open queue of `T`s.
pub(super) struct Queue<T> {
    object: ObjectId,
    /// The verb for reading it.
    verb: Verb,
    shared: Arc<Shared<T>>,
    threads: Arc<dyn ThreadStart>,
    poller: Mutex<Option<Poller>>,
}

/// Shared with the thread.
struct Shared<T> {
    file: File,
    parse: Parse<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Read but not returned yet.
    pending: VecDeque<T>,
    buffer: Box<[u8]>,
    watcher: Option<Arc<dyn Readiness>>,
    /// The watcher's last notification.
    told: bool,
    /// The file polled as broken: nothing more will come.
    broken: bool,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock()
    }

    /// Reads what is available. An interrupted read is retried.
    fn fill(&self, state: &mut State<T>) -> io::Result<()> {
        let length = loop {
            match (&self.file).read(&mut state.buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break 0,
                result => break result?,
            }
        };
        if length == 0 && state.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // A read returns no more than fits.
        let records = (self.parse)(&state.buffer[..length]);
        state.pending.extend(records.ok_or(io::ErrorKind::InvalidData)?);
        Ok(())
    }

    /// Whether a read would return something.
    fn readable(&self, state: &State<T>) -> bool {
        !state.pending.is_empty() || is_readable(&self.file).unwrap_or(false)
    }

    /// Notifies the watcher of a change.
    fn tell(&self, state: &mut State<T>, readable: bool) {
        if let Some(watcher) = state.watcher.as_ref().filter(|_| state.told != readable) {
            watcher.changed(readable);
            state.told = readable;
        }
    }
}

/// Whether `file` polls as readable.
fn is_readable(file: &File) -> io::Result<bool> {
    let epoll = Epoll::new()?;
    epoll.ctl(ControlOperation::Add, file.as_raw_fd(), EpollEvent::new(EventSet::IN, FILE))?;
    Ok(epoll.wait(0, &mut [EpollEvent::default()])? > 0)
}

impl<T: Send + 'static> Queue<T> {
    /// The queue `object`, which `verb` reads from `file`; one of `threads` waits for it.
    pub fn new(
        object: ObjectId,
        verb: Verb,
        file: File,
        parse: Parse<T>,
        threads: Arc<dyn ThreadStart>,
    ) -> Self {
        let buffer = vec![0; READ].into_boxed_slice();
        let state =
            State { pending: VecDeque::new(), buffer, watcher: None, told: false, broken: false };
        let shared = Arc::new(Shared { file, parse, state: Mutex::new(state) });
        Self { object, verb, shared, threads, poller: Mutex::new(None) }
    }

    fn next(&self) -> Result<Option<T>> {
        let mut state = self.shared.state();
        if state.pending.is_empty() {
            self.shared.fill(&mut state).map_err(|error| {
                let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
                HostError::new(self.verb, self.object, errno, format!("read: {error}"))
            })?;
        }
        let next = state.pending.pop_front();
        if next.is_none() {
            self.shared.tell(&mut state, false);
        }
        Ok(next)
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) {
        {
            let mut state = self.shared.state();
            let readable = self.shared.readable(&state);
            watcher.changed(readable);
            (state.watcher, state.told) = (Some(watcher), readable);
        }
        let mut poller = self.poller.lock();
        if poller.is_none() {
            match Poller::start(&*self.threads, self.object, self.shared.clone()) {
                Ok(started) => *poller = Some(started),
                Err(error) => log::error!("queue {} is not read: {error}", self.object),
            }
        }
    }
}

impl<T> fmt::Debug for Queue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("object", &self.object).finish_non_exhaustive()
    }
}

/// The thread that polls a queue. Dropping it ends the thread and releases the file.
struct Poller {
    stop: EventFd,
    thread: Option<Started>,
}

/// The file is readable.
const FILE: u64 = 0;
const STOP: u64 = 1;

impl Poller {
    fn start<T: Send + 'static>(
        threads: &dyn ThreadStart,
        object: ObjectId,
        shared: Arc<Shared<T>>,
    ) -> io::Result<Self> {
        let stop = EventFd::new(0)?;
        let epoll = Epoll::new()?;
        // An edge for each addition, even with unread data.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, FILE);
        epoll.ctl(ControlOperation::Add, shared.file.as_raw_fd(), event)?;
        let event = EpollEvent::new(EventSet::IN, STOP);
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event)?;
        let name = format!("queue {object}");
        let wait = move || {
            if let Err(error) = wait(&epoll, &shared) {
                log::error!("queue {object} is no longer read: {error}");
            }
        };
        let thread = Started::new(threads, name, &jail::QUEUE, wait)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

/// Notifies the watcher of `shared` until told to stop.
fn wait<T>(epoll: &Epoll, shared: &Shared<T>) -> io::Result<()> {
    let mut events = [EpollEvent::default(); 2];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        if events.iter().take(count).any(|event| event.data() == STOP) {
            return Ok(());
        }
        let mut state = shared.state();
        let broken = EventSet::ERROR | EventSet::HANG_UP;
        state.broken |= events.iter().take(count).any(|event| event.event_set().intersects(broken));
        if shared.readable(&state) {
            shared.tell(&mut state, true);
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            log::error!("the thread of a queue cannot be told to stop: {error}");
            return;
        }
        // A watcher may drop the queue from the thread, which then does not wait for itself.
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

impl FaultQueue for Queue<PageRequestGroup> {
    fn object(&self) -> ObjectId {
        self.object
    }

    fn next_group(&self) -> Result<Option<PageRequestGroup>> {
        self.next()
    }

    fn respond(&self, cookie: u32, code: PageResponseCode) -> Result<()> {
        let code = match code {
            PageResponseCode::Success => iommufd_page_response_code_IOMMUFD_PAGE_RESP_SUCCESS,
            PageResponseCode::Invalid => iommufd_page_response_code_IOMMUFD_PAGE_RESP_INVALID,
        };
        // struct iommu_hwpt_page_response
        let mut response = [0; size_of::<iommu_hwpt_page_response>()];
        let (first, second) = response.split_at_mut(size_of::<u32>());
        first.copy_from_slice(&cookie.to_ne_bytes());
        second.copy_from_slice(&code.to_ne_bytes());
        (&self.shared.file).write_all(&response).map_err(|error| {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            let detail = match errno {
                Errno::EINVAL => {
                    format!("no page request group {cookie} is waiting for a response")
                }
                _ => format!("group {cookie}: {error}"),
            };
            HostError::new(Verb::PageResponse, self.object, errno, detail)
        })
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) {
        self.watch(watcher);
    }
}

impl EventQueue for Queue<Vevent> {
    fn object(&self) -> ObjectId {
        self.object
    }

    fn next_event(&self) -> Result<Option<Vevent>> {
        self.next()
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) {
        self.watch(watcher);
    }
}

/// The parser for events of a type (`enum iommu_veventq_type`), if their length is known.
#[allow(non_upper_case_globals)] // bindgen's names
pub(super) fn vevent_parser(kind: u32) -> Option<Parse<Vevent>> {
    match kind {
        iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 => {
            Some(vevents::<iommu_vevent_arm_smmuv3>)
        }
        iommu_veventq_type_IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV => {
            Some(vevents::<iommu_vevent_tegra241_cmdqv>)
        }
        _ => None,
    }
}

/// Bytes of a page request.
const PAGE_REQUEST: usize = size_of::<iommu_hwpt_pgfault>();
/// Bytes before an event's data.
const VEVENT_HEADER: usize = size_of::<iommufd_vevent_header>();

/// Parses what was read from a queue; `None` if it is invalid.
pub(super) type Parse<T> = fn(&[u8]) -> Option<Vec<T>>;

fn u32_at(record: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*record.get(offset..)?.first_chunk()?))
}

fn u64_at(record: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*record.get(offset..)?.first_chunk()?))
}

/// Whole groups of `struct iommu_hwpt_pgfault`: adjacent ones with the same cookie.
pub(super) fn page_requests(bytes: &[u8]) -> Option<Vec<PageRequestGroup>> {
    let mut groups: Vec<PageRequestGroup> = Vec::new();
    for record in bytes.chunks(PAGE_REQUEST) {
        let cookie = u32_at(record, offset_of!(iommu_hwpt_pgfault, cookie))?;
        let dev = ObjectId(u32_at(record, offset_of!(iommu_hwpt_pgfault, dev_id))?);
        let request = PageRequest {
            flags: PageRequestFlags::from(u32_at(record, offset_of!(iommu_hwpt_pgfault, flags))?),
            pasid: u32_at(record, offset_of!(iommu_hwpt_pgfault, pasid))?,
            group: u32_at(record, offset_of!(iommu_hwpt_pgfault, grpid))?,
            permissions: PageRequestPermissions::from(u32_at(
                record,
                offset_of!(iommu_hwpt_pgfault, perm),
            )?),
            address: u64_at(record, offset_of!(iommu_hwpt_pgfault, addr))?,
        };
        match groups.last_mut() {
            Some(group) if group.cookie == cookie => group.requests.push(request),
            _ => groups.push(PageRequestGroup { cookie, dev, requests: vec![request] }),
        }
    }
    Some(groups)
}

/// Events whose data is a `T`.
fn vevents<T>(mut bytes: &[u8]) -> Option<Vec<Vevent>> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let flags = u32_at(bytes, offset_of!(iommufd_vevent_header, flags))?;
        let sequence = u32_at(bytes, offset_of!(iommufd_vevent_header, sequence))?;
        let after = bytes.get(VEVENT_HEADER..)?;
        if flags & iommu_veventq_flag_IOMMU_VEVENTQ_FLAG_LOST_EVENTS != 0 {
            events.push(Vevent::Lost { sequence });
            bytes = after;
        } else {
            let (data, rest) = after.split_at_checked(size_of::<T>())?;
            events.push(Vevent::Event { sequence, data: data.to_vec() });
            bytes = rest;
        }
    }
    Some(events)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::StdThreads;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::sync::mpsc::{channel, Sender};

    struct Told(Mutex<Sender<bool>>);

    impl Readiness for Told {
        fn changed(&self, readable: bool) {
            self.0.lock().send(readable).unwrap();
        }
    }

    /// A queue of SMMU events, and a socket for adding some: like the kernel's, it never blocks.
    fn queue() -> (Queue<Vevent>, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let parse = vevent_parser(iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3).unwrap();
        let file = File::from(OwnedFd::from(theirs));
        (Queue::new(ObjectId(1), Verb::Vevent, file, parse, Arc::new(StdThreads)), ours)
    }

    fn event(sequence: u32) -> Vec<u8> {
        let header = [0u32, sequence].into_iter().flat_map(u32::to_ne_bytes);
        header.chain([7; size_of::<iommu_vevent_arm_smmuv3>()]).collect()
    }

    fn sequence(queue: &Queue<Vevent>) -> Option<u32> {
        queue.next().unwrap().map(|event| match event {
            Vevent::Event { sequence, .. } | Vevent::Lost { sequence } => sequence,
        })
    }

    #[test]
    fn a_watcher_hears_of_every_change_and_of_nothing_else() {
        let (queue, more) = queue();
        let (sender, told) = channel();
        queue.watch(Arc::new(Told(Mutex::new(sender))));
        assert_eq!(told.recv(), Ok(false));
        for round in 0..100 {
            more.send(&[event(round), event(round + 1)].concat()).unwrap();
            assert_eq!(told.recv(), Ok(true));
            assert_eq!(sequence(&queue), Some(round));
            assert_eq!(sequence(&queue), Some(round + 1));
            assert_eq!(sequence(&queue), None);
            assert_eq!(sequence(&queue), None);
            assert_eq!(told.recv(), Ok(false));
        }
        drop(queue);
        assert!(told.recv().is_err(), "nobody is left who could tell");
        assert!(more.send(&event(0)).is_err(), "the file is closed");
    }

    #[test]
    fn what_is_no_event_is_an_error() {
        let (queue, more) = queue();
        more.send(&[1, 2, 3]).unwrap();
        assert_eq!(queue.next().unwrap_err().errno, Errno::EIO);
        more.send(&event(5)).unwrap();
        assert_eq!(sequence(&queue), Some(5));
    }

    #[test]
    fn a_file_that_breaks_is_told_and_cannot_be_read_any_more() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let parse = vevent_parser(iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3).unwrap();
        let file = File::from(OwnedFd::from(theirs));
        let threads = Arc::new(StdThreads);
        let queue = Queue::new(ObjectId(7), Verb::Vevent, file, parse, threads);
        let (sender, told) = channel();
        queue.watch(Arc::new(Told(Mutex::new(sender))));
        assert_eq!(told.recv(), Ok(false));
        (&ours).write_all(&event(1)).unwrap();
        assert_eq!(told.recv(), Ok(true));
        assert_eq!(sequence(&queue), Some(1));
        assert_eq!(sequence(&queue), None);
        assert_eq!(told.recv(), Ok(false));
        drop(ours);
        assert_eq!(told.recv(), Ok(true));
        let error = queue.next().unwrap_err();
        assert_eq!((error.errno, error.object), (Errno::EIO, Some(ObjectId(7))), "{error}");
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn requests_of_one_cookie_are_one_group() {
        // flags, dev_id, pasid, grpid, perm, reserved, addr (two words), length, cookie
        let record = |flags, addr, cookie| words(&[flags, 7, 5, 9, 3, 0, addr, 0, 0, cookie]);
        let bytes = [record(1, 0x1000, 1), record(3, 0x2000, 1), record(3, 0x3000, 2)].concat();
        let groups = page_requests(&bytes).unwrap();
        assert_eq!(groups.len(), 2);
        assert_eq!((groups[0].cookie, groups[0].dev), (1, ObjectId(7)));
        let addresses: Vec<u64> = groups[0].requests.iter().map(|each| each.address).collect();
        assert_eq!(addresses, [0x1000, 0x2000]);
        let last = groups[1].requests[0];
        assert!(last.flags.last_page() && last.flags.pasid_valid());
        assert!(last.permissions.read() && last.permissions.write());
        assert_eq!((last.pasid, last.group), (5, 9));
        assert_eq!(page_requests(&[]), Some(vec![]));
        assert_eq!(page_requests(&bytes[..60]), None);
    }

    #[test]
    fn events_and_lost_ones() {
        let data = |byte: u8| [byte; size_of::<iommu_vevent_arm_smmuv3>()].to_vec();
        let bytes = [words(&[0, 4]), data(1), words(&[0, 5]), data(2), words(&[1, 9])].concat();
        let events = vevents::<iommu_vevent_arm_smmuv3>(&bytes).unwrap();
        assert_eq!(
            events,
            [
                Vevent::Event { sequence: 4, data: data(1) },
                Vevent::Event { sequence: 5, data: data(2) },
                Vevent::Lost { sequence: 9 }
            ]
        );
        assert_eq!(vevents::<iommu_vevent_arm_smmuv3>(&bytes[..20]), None);
        assert_eq!(vevents::<iommu_vevent_arm_smmuv3>(&bytes[..4]), None);
    }
}
