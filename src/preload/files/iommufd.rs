// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `/dev/iommu`, and `/dev/vfio/vfio`, which is the same with VFIO's ioctls; the program's mappings
//! of them, and the other descriptors that they give it: event queues, and files of test
//! operations.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use twostage::iommufd::{Errno, Readiness};
use twostage_emulated::uapi::TestFile;
use twostage_emulated::{EmulatedHost, EventFile, MmapRequest};

use crate::files::file::{Answer, Argument, Call, Caller, Excess, File, Pages};
use crate::sys;
use crate::table::Internal;

/// The first ioctl number of iommufd (`IOMMUFD_CMD_BASE`); those below are VFIO's.
const FIRST_OWN: u32 = 0x80;

/// An open iommufd. It stays alive while devices are bound to it.
#[derive(Debug)]
pub struct Iommufd {
    name: &'static str,
    host: Arc<EmulatedHost>,
}

impl Iommufd {
    /// `host`, opened as `name`.
    pub fn new(name: &'static str, host: Arc<EmulatedHost>) -> Self {
        Self { name, host }
    }
}

impl File for Iommufd {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
        let process = caller.process();
        let Call::Ioctl { request, argument } = call else { return Err(Errno::EINVAL) };
        if request & 0xff < FIRST_OWN {
            let result = self.host.vfio_ioctl(request, argument, caller)?;
            return Ok(i64::from(result).into());
        }
        let mut argument = Argument::copy_in(process, argument, Excess::Zero)?;
        let result = self.host.ioctl(request, &mut argument.bytes, caller);
        // Some errors also write results back.
        argument.copy_out(process)?;
        result.map(|value| i64::from(value).into())
    }

    fn map(self: Arc<Self>, request: MmapRequest) -> Result<Pages, Errno> {
        self.host.mmap(request).map(Pages::Iommu)
    }

    fn as_iommufd(&self) -> Option<&Arc<EmulatedHost>> {
        Some(&self.host)
    }
}

const PAGE_SIZE: u64 = 4096;

/// One process's mappings of its iommufds and devices: these objects are in use until they are
/// unmapped.
#[derive(Debug, Default)]
pub struct Windows {
    /// Their number: most programs have none.
    count: AtomicUsize,
    list: Mutex<Vec<Window>>,
}

#[derive(Debug)]
struct Window {
    /// The remaining address ranges: each first, and one past each last.
    addresses: Vec<(u64, u64)>,
    /// Dropped when none is left.
    _pages: Pages,
}

impl Windows {
    /// `pages` were mapped at `address`, with `length` bytes.
    pub fn add(&self, address: u64, length: u64, pages: Pages) {
        let addresses = vec![(address, address.saturating_add(length))];
        let window = Window { addresses, _pages: pages };
        let mut list = self.list.lock();
        list.push(window);
        self.count.store(list.len(), Ordering::Release);
    }

    /// `length` bytes at `address` were unmapped or replaced.
    pub fn remove(&self, address: u64, length: u64) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        // In whole pages, as munmap does it.
        let gone =
            (address, address.saturating_add(length).div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE));
        let mut list = self.list.lock();
        for window in list.iter_mut() {
            window.addresses =
                window.addresses.drain(..).flat_map(|range| without(range, gone)).collect();
        }
        let (left, unmapped) =
            list.drain(..).partition(|window: &Window| !window.addresses.is_empty());
        *list = left;
        self.count.store(list.len(), Ordering::Release);
        drop(list);
        // Objects may be destroyed with them.
        drop::<Vec<_>>(unmapped);
    }
}

/// `range` without `gone`: at most two pieces.
fn without(range: (u64, u64), gone: (u64, u64)) -> impl Iterator<Item = (u64, u64)> {
    let before = (range.0, range.1.min(gone.0));
    let after = (range.0.max(gone.1), range.1);
    [before, after].into_iter().filter(|(start, end)| start < end)
}

/// An open fault queue or vEVENTQ, which polls as readable when there is something to read.
///
/// While there is, a message of the owner is pending in the descriptor's socket. A read that takes
/// the last event also takes the message. Events that are dropped unread leave it behind: the
/// descriptor then polls as readable once more, and the read finds nothing. A socket is always
/// writable, so a vEVENTQ polls as writable, unlike Linux's.
#[derive(Debug)]
pub struct Events {
    file: EventFile,
    told: Arc<Mutex<Told>>,
}

/// What the queue has told the descriptor.
#[derive(Debug, Default)]
struct Told {
    /// A message is pending.
    pending: bool,
    /// How often there was something to read.
    times: u64,
}

impl Events {
    /// The descriptor's side of `file`.
    pub fn new(file: EventFile) -> Self {
        Self { file, told: Arc::default() }
    }
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock()
}

impl File for Events {
    fn name(&self) -> String {
        "events".to_owned()
    }

    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno> {
        let done = match call {
            Call::Read { to, count, offset: None } => self.file.read(caller, to, count as usize)?,
            Call::Write { from, count, offset: None } => {
                self.file.write(caller, from, count as usize)?
            }
            Call::Read { .. } | Call::Write { .. } => return Err(Errno::from_raw(libc::ESPIPE)),
            Call::Ioctl { .. } => return Err(Errno::ENOTTY),
        };
        loop {
            // The queue tells with its own lock held, so it is asked without this one.
            let times = lock(&self.told).times;
            let readable = self.file.readable();
            let mut told = lock(&self.told);
            if told.times == times {
                let take_message = told.pending && !readable;
                told.pending &= !take_message;
                return Ok(Answer { value: done as i64, take_message });
            }
        }
    }

    fn opened(&self, end: &Arc<Internal>) {
        let (told, end) = (self.told.clone(), Arc::downgrade(end));
        self.file.watch(Arc::new(Watcher { told, end }));
    }
}

/// Keeps the descriptor in sync with the queue.
struct Watcher {
    told: Arc<Mutex<Told>>,
    end: Weak<Internal>,
}

impl Readiness for Watcher {
    fn changed(&self, readable: bool) {
        let mut told = lock(&self.told);
        told.times += u64::from(readable);
        let Some(end) = self.end.upgrade().filter(|_| readable && !told.pending) else { return };
        // Fails if the last descriptor is closed: then nobody polls.
        told.pending = sys::send(end.raw(), &[0], None, true).is_ok();
    }
}

/// An open file of a test operation of Linux's selftests, or a dma-buf. Programs only close it, or
/// pass it to other operations.
#[derive(Debug)]
pub struct OpenTestFile(pub Arc<dyn TestFile>);

impl File for OpenTestFile {
    fn name(&self) -> String {
        self.0.name().to_owned()
    }

    fn call(&self, _: &dyn Caller, _: Call) -> Result<Answer, Errno> {
        Err(Errno::EINVAL)
    }

    fn as_test_file(&self) -> Option<&Arc<dyn TestFile>> {
        Some(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, OwnedFd};

    use rustix::event::PollFlags;

    #[test]
    fn pieces_that_are_left() {
        let left = |start, end| without((10, 20), (start, end)).collect::<Vec<_>>();
        assert_eq!(left(0, 10), [(10, 20)]);
        assert_eq!(left(20, 30), [(10, 20)]);
        assert_eq!(left(12, 14), [(10, 12), (14, 20)]);
        assert_eq!(left(5, 15), [(15, 20)]);
        assert_eq!(left(15, 25), [(10, 15)]);
        assert!(left(10, 20).is_empty());
    }

    fn polls_readable(fd: &OwnedFd) -> bool {
        sys::events(fd.as_raw_fd()).contains(PollFlags::IN)
    }

    #[test]
    fn a_descriptor_polls_as_readable_while_a_message_waits() {
        let (fd, end) = sys::socket_pair().unwrap();
        let end = Arc::new(Internal::new(end));
        let told: Arc<Mutex<Told>> = Arc::default();
        let watcher = Watcher { told: told.clone(), end: Arc::downgrade(&end) };
        watcher.changed(false);
        assert!(!polls_readable(&fd));
        watcher.changed(true);
        watcher.changed(true);
        assert!(polls_readable(&fd));
        // As done by a read that takes the last event.
        lock(&told).pending = false;
        assert_eq!(sys::receive(fd.as_raw_fd(), &mut [0], false).unwrap().unwrap().0, 1);
        assert!(!polls_readable(&fd), "one message, however often it is told");
        watcher.changed(true);
        assert!(polls_readable(&fd));
        drop(end);
        watcher.changed(true);
    }
}
