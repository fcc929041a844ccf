// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault queues and vEVENTQs as files.
//!
//! A file is read as far as possible, and records are returned one by one. Readiness comes from a
//! thread that polls the file; notifications are sent under the lock of the read records, after
//! polling the file again, so that the last one is always right. All descriptors that this needs
//! are there from the start. A file that polls as broken, or cannot be polled, is reported as
//! readable, so that the reader finds the error.

#[cfg(test)]
mod tests;

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

    /// Whether a read would return something, by `level`.
    fn readable(&self, state: &State<T>, level: &Epoll) -> bool {
        let polled = || level.wait(0, &mut [EpollEvent::default()]);
        !state.pending.is_empty() || polled().map_or(true, |count| count > 0)
    }

    /// Notifies the watcher of a change.
    fn tell(&self, state: &mut State<T>, readable: bool) {
        if let Some(watcher) = state.watcher.as_ref().filter(|_| state.told != readable) {
            watcher.changed(readable);
            state.told = readable;
        }
    }
}

/// The errno of `error`.
fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
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
                let detail = format!("read: {error}");
                HostError::new(self.verb, self.object, errno_of(&error), detail)
            })?;
        }
        let next = state.pending.pop_front();
        if next.is_none() {
            self.shared.tell(&mut state, false);
        }
        Ok(next)
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) -> Result<()> {
        let level = {
            let mut poller = self.poller.lock();
            let running = match poller.take() {
                Some(running) => running,
                None => Poller::start(&*self.threads, self.object, self.shared.clone()).map_err(
                    |error| {
                        let detail = format!("no thread can wait for the queue: {error}");
                        HostError::new(self.verb, self.object, errno_of(&error), detail)
                    },
                )?,
            };
            poller.insert(running).level.clone()
        };
        let mut state = self.shared.state();
        let readable = self.shared.readable(&state, &level);
        watcher.changed(readable);
        (state.watcher, state.told) = (Some(watcher), readable);
        Ok(())
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
    /// Of the file alone: readable as long as that is.
    level: Arc<Epoll>,
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
        let level = Arc::new(Epoll::new()?);
        let event = EpollEvent::new(EventSet::IN, FILE);
        level.ctl(ControlOperation::Add, shared.file.as_raw_fd(), event)?;
        let epoll = Epoll::new()?;
        // An edge for each addition, even with unread data.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, FILE);
        epoll.ctl(ControlOperation::Add, shared.file.as_raw_fd(), event)?;
        let event = EpollEvent::new(EventSet::IN, STOP);
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event)?;
        let name = format!("queue {object}");
        let polled = level.clone();
        let wait = move || {
            if let Err(error) = wait(&epoll, &polled, &shared) {
                log::error!("queue {object} is no longer read: {error}");
            }
        };
        let thread = Started::new(threads, name, &jail::QUEUE, wait)?;
        Ok(Self { stop, level, thread: Some(thread) })
    }
}

/// Notifies the watcher of `shared`, whose file `level` polls, until told to stop.
fn wait<T>(epoll: &Epoll, level: &Epoll, shared: &Shared<T>) -> io::Result<()> {
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
        if shared.readable(&state, level) {
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
            let errno = errno_of(&error);
            let detail = match errno {
                Errno::EINVAL => {
                    format!("no page request group {cookie} is waiting for a response")
                }
                _ => format!("group {cookie}: {error}"),
            };
            HostError::new(Verb::PageResponse, self.object, errno, detail)
        })
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) -> Result<()> {
        self.watch(watcher)
    }
}

impl EventQueue for Queue<Vevent> {
    fn object(&self) -> ObjectId {
        self.object
    }

    fn next_event(&self) -> Result<Option<Vevent>> {
        self.next()
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) -> Result<()> {
        self.watch(watcher)
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
