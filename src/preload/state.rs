// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated files of this process: its own, and those of other processes.
//!
//! A descriptor of an emulated file is one end of a socket pair. The owner keeps the other end: it
//! hangs up when the last descriptor is closed, in any process, and receives the calls of other
//! processes ([`crate::callers::calls`]). Its name identifies the file to processes that did not
//! open it.
#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use twostage::sync::Mutex;

use rustix::event::PollFlags;
use twostage::iommufd::Errno;
use twostage_emulated::MmapRequest;

use crate::callers::process::Processes;
use crate::files::file::{File, Pages, Service, Waiting};
use crate::files::iommufd::Windows;
use crate::memory::accounts::Accounts;
use crate::memory::pins::Pins;
use crate::sys::{self, Mark};
use crate::sysfs::Sysfs;
use crate::table::{self, Entry, Internal};
use crate::world::World;

/// The prefix of the names of the owner's ends.
const NAME_PREFIX: &str = "twostage-iommufd/";

/// The state of one process. A child starts with a new one.
#[derive(Debug)]
pub struct State {
    pid: i32,
    /// Set in this process only.
    mark: Result<Mark, Errno>,
    files: Mutex<Files>,
    /// The pins.
    pub pins: Arc<Pins>,
    /// The mappings of iommufds and devices.
    pub windows: Windows,
    /// The accounts of locked memory.
    pub accounts: Accounts,
    /// The processes on whose behalf calls are made.
    pub processes: Processes,
    world: OnceLock<Result<World, Errno>>,
    sysfs: OnceLock<Option<Sysfs>>,
    service: OnceLock<Result<Service, Errno>>,
    opened: AtomicU64,
    /// The files that wait for a call on another one.
    pub waiting: Waiting,
    /// Held while using a file without a descriptor of it, so that a closed file ends in time.
    serving: Mutex<()>,
}

/// The files, by number.
#[derive(Debug, Default)]
struct Files {
    slots: Vec<Option<Slot>>,
    /// Some removed files are still ending: whoever closed the last descriptor of one waits.
    ending: bool,
}

/// A file with descriptors.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Inode of the descriptors' end.
    inode: u64,
    /// Its owner.
    pub kind: Kind,
}

impl Slot {
    /// Whether the last descriptor of this process's file is closed.
    fn is_hung_up(&self) -> bool {
        match &self.kind {
            Kind::Own(own) => sys::events(own.end.raw()).contains(PollFlags::HUP),
            Kind::Foreign => false,
        }
    }
}

/// The owner of a file.
#[derive(Debug, Clone)]
pub enum Kind {
    /// This process.
    Own(Arc<Own>),
    /// Another process.
    Foreign,
}

/// A file of this process.
#[derive(Debug)]
pub struct Own {
    /// The file.
    pub file: Arc<dyn File>,
    /// The owner's end.
    pub end: Arc<Internal>,
}

static STATE: AtomicPtr<State> = AtomicPtr::new(std::ptr::null_mut());

/// The state of this process.
pub fn current() -> &'static State {
    let state = STATE.load(Ordering::Acquire);
    // SAFETY: states are never freed.
    match unsafe { state.as_ref() } {
        Some(found) if found.is_here() => found,
        _ => begin(state),
    }
}

/// The state of this process, if it exists already.
pub fn begun() -> Option<&'static State> {
    (!STATE.load(Ordering::Acquire).is_null()).then(current)
}

/// Whether `fd` is a descriptor of an emulated file, of this process or another.
pub fn is_emulated(fd: RawFd) -> bool {
    sys::peer_name(fd).is_some_and(|name| name.starts_with(NAME_PREFIX.as_bytes()))
}

/// Creates the state of this process, replacing `inherited`: that of the process that forked it. It
/// may be locked by a thread that does not exist here, so it is not accessed.
fn begin(inherited: *mut State) -> &'static State {
    let state = State {
        pid: sys::process_id(),
        mark: Mark::new(),
        files: Mutex::default(),
        pins: Arc::default(),
        windows: Windows::default(),
        accounts: Accounts::default(),
        processes: Processes::default(),
        world: OnceLock::new(),
        sysfs: OnceLock::new(),
        service: OnceLock::new(),
        opened: AtomicU64::new(0),
        waiting: Waiting::default(),
        serving: Mutex::default(),
    };
    let new = Box::into_raw(Box::new(state));
    let published = STATE.compare_exchange(inherited, new, Ordering::AcqRel, Ordering::Acquire);
    // Another thread may have been first; then this one is not used.
    let state = published.map_or_else(|other| other, |_| new);
    // SAFETY: it is not null, and states are never freed.
    let state = unsafe { &*state };
    if published.is_err() {
        return state;
    }
    if inherited.is_null() {
        sys::at_fork_in_child(begin_in_child);
    } else {
        state.inherit();
    }
    state
}

extern "C" fn begin_in_child() {
    current();
}

impl State {
    /// Whether this is its address space.
    fn is_here(&self) -> bool {
        match &self.mark {
            Ok(mark) => mark.is_set(),
            // A kernel without MADV_WIPEONFORK: a vfork is mistaken for a fork.
            Err(_) => self.pid == sys::process_id(),
        }
    }

    /// Whether the current descriptors are those of the state: not in a child of vfork, which
    /// shares its parent's memory but not its descriptors, nor in a thread that unshared them.
    pub fn has_descriptors(&self) -> bool {
        self.pid == sys::process_id() && !table::is_apart()
    }

    /// Whether the program has no other thread.
    pub fn is_alone(&self) -> bool {
        table::is_alone(self.service.get().is_some_and(Result::is_ok).into())
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock()
    }

    /// The emulated machine of this process, created on first use.
    ///
    /// # Errors
    /// `ENODEV` its description is invalid, which has been reported then.
    pub fn world(&self) -> Result<&World, Errno> {
        self.world
            .get_or_init(|| World::from_environment(&self.pins))
            .as_ref()
            .map_err(|errno| *errno)
    }

    /// The machine's `/sys`, made on first use; none if that fails, which has been reported then.
    pub fn sysfs(&self) -> Option<&Sysfs> {
        let make = || {
            let world = self.world().ok()?;
            Sysfs::new(world.devices(), world.iommus())
                .inspect_err(|error| log::error!("the machine's /sys cannot be shown: {error}"))
                .ok()
        };
        // A child of vfork has other descriptors than the lock's.
        if self.has_descriptors() {
            return self.sysfs.get_or_init(make).as_ref();
        }
        self.made_sysfs()
    }

    /// The machine's `/sys`, if it is made.
    pub fn made_sysfs(&self) -> Option<&Sysfs> {
        self.sysfs.get()?.as_ref()
    }

    /// Starts the service, which `serve`s files, unless it is running.
    ///
    /// # Errors
    /// As [`Service::start`].
    pub fn start_service(&self, serve: fn(u64)) -> Result<(), Errno> {
        let service = self.service.get_or_init(|| Service::start(serve));
        service.as_ref().map(|_| ()).map_err(|errno| *errno)
    }

    /// The service, if it is running.
    pub fn service(&self) -> Option<&Service> {
        self.service.get()?.as_ref().ok()
    }

    /// Takes over the descriptors after a fork: their files belong to another process now.
    fn inherit(&self) {
        for (fd, entry) in table::ours(0, u32::MAX) {
            table::set(fd, Entry::NotOurs);
            match entry {
                Entry::Internal => sys::close_number(fd),
                Entry::File(_) | Entry::Closing => drop(self.recognise(fd)),
                Entry::NotOurs => {}
            }
        }
    }

    /// Adds `file` to this process, with a new descriptor.
    ///
    /// # Errors
    /// The kernel's error if there are no more descriptors; `ENODEV` the service is not started.
    pub fn install(&self, file: Arc<dyn File>, close_on_exec: bool) -> Result<RawFd, Errno> {
        let (fd, slot) = self.publish(file)?;
        sys::set_flags(fd.as_raw_fd(), close_on_exec, false)?;
        if table::set(fd.as_raw_fd(), Entry::File(slot)).is_none() {
            drop(fd);
            self.released(slot);
            return Err(Errno::from_raw(libc::EMFILE));
        }
        Ok(fd.into_raw_fd())
    }

    /// Makes `file` one of this process's: returns the end for descriptors, and the number of the
    /// file.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn publish(&self, file: Arc<dyn File>) -> Result<(OwnedFd, u32), Errno> {
        let service = self.service.get().ok_or(Errno::ENODEV)?.as_ref().map_err(|errno| *errno)?;
        let (fd, end) = sys::socket_pair()?;
        sys::give_up_soon(fd.as_raw_fd())?;
        let end = Arc::new(Internal::new(end));
        let number = self.opened.fetch_add(1, Ordering::Relaxed);
        let name = format!("{NAME_PREFIX}{}/{number}/{}", self.pid, file.name());
        let inode = sys::inode(fd.as_raw_fd())?;
        let own = Arc::new(Own { file, end });
        // Before it is named: a file with such a name must be known.
        let slot = self.insert(Slot { inode, kind: Kind::Own(own.clone()) });
        let named = sys::bind_name(own.end.raw(), name.as_bytes());
        if let Err(errno) = named.and_then(|()| service.watch(own.end.raw(), inode)) {
            drop(fd);
            self.released(slot);
            return Err(errno);
        }
        own.file.opened(&own.end);
        Ok((fd, slot))
    }

    fn insert(&self, slot: Slot) -> u32 {
        let slots = &mut self.files().slots;
        let free = slots.iter().position(Option::is_none).unwrap_or(slots.len());
        match slots.get_mut(free) {
            Some(place) => *place = Some(slot),
            None => slots.push(Some(slot)),
        }
        free as u32
    }

    /// The slot of `fd`; none if it is no file of ours. The number may have been closed and reused
    /// without a hook, or concurrently.
    ///
    /// # Errors
    /// `EBADF` it is being closed.
    pub fn find(&self, fd: RawFd) -> Result<Option<Slot>, Errno> {
        /// In each iteration but the last, the number had changed meanwhile.
        const TURNS: usize = 16;
        const CLOSED: Errno = Errno::from_raw(libc::EBADF);
        for _ in 0..TURNS {
            let entry = table::get(fd);
            let number = match entry {
                Entry::File(number) => number,
                Entry::Closing if is_emulated(fd) => return Err(CLOSED),
                Entry::Closing | Entry::Internal | Entry::NotOurs => return Ok(None),
            };
            let slot = self.files().slots.get(number as usize).cloned().flatten();
            if let Some(slot) = slot.filter(|slot| sys::inode(fd) == Ok(slot.inode)) {
                return Ok(Some(slot));
            }
            // A child of vfork, or a thread apart, has closed it: the table belongs to others.
            if !self.has_descriptors() {
                return Ok(None);
            }
            if table::replace(fd, entry, Entry::NotOurs) && self.recognise(fd).is_none() {
                return Ok(None);
            }
        }
        Err(CLOSED)
    }

    /// Checks whether `fd`, which is not known, is a descriptor of an emulated file: one that came
    /// through exec, a socket, or a call without a hook. Returns its slot.
    pub fn recognise(&self, fd: RawFd) -> Option<u32> {
        if !is_emulated(fd) {
            return None;
        }
        let inode = sys::inode(fd).ok()?;
        let known = self.number_of(inode);
        let slot = known.unwrap_or_else(|| self.insert(Slot { inode, kind: Kind::Foreign }));
        table::set(fd, Entry::File(slot)).map(|_| slot)
    }

    fn number_of(&self, inode: u64) -> Option<u32> {
        let same = |slot: &Option<Slot>| slot.as_ref().is_some_and(|slot| slot.inode == inode);
        self.files().slots.iter().position(same).map(|number| number as u32)
    }

    /// The file of this process whose descriptors have `inode`.
    pub fn own(&self, inode: u64) -> Option<Arc<Own>> {
        let number = self.number_of(inode)?;
        match self.files().slots.get(number as usize)?.as_ref()?.kind {
            Kind::Own(ref own) => Some(own.clone()),
            Kind::Foreign => None,
        }
    }

    /// A descriptor of the file `slot` was closed: when this returns, the file has ended if that
    /// was the last one.
    pub fn released(&self, slot: u32) {
        let place = slot as usize;
        let files = self.files();
        let stays = |slot: &Slot| !slot.is_hung_up();
        // An empty slot may be that of a file that the service took, and has not ended yet.
        if !files.ending
            && files.slots.get(place).is_none_or(|slot| slot.as_ref().is_none_or(stays))
        {
            return;
        }
        drop(files);
        self.end(place..place + 1);
    }

    /// Ends the files whose last descriptors were closed in other processes, as far as the service
    /// has not.
    pub fn end_hung_up(&self) {
        self.end(0..usize::MAX);
    }

    /// Ends those of the files `numbers` whose last descriptors are closed; when it returns none is
    /// ending.
    fn end(&self, numbers: Range<usize>) {
        // The effects of closing are complete when close returns: whoever is serving drops the file
        // first.
        let _served = self.serving();
        let mut files = self.files();
        let places = files.slots.iter_mut().skip(numbers.start).take(numbers.len());
        let take = |place: &mut Option<Slot>| place.take_if(|slot| slot.is_hung_up());
        let ended: Vec<Slot> = places.filter_map(take).collect();
        files.ending = !ended.is_empty();
        drop(files);
        drop(ended);
        self.pins.sweep();
        self.files().ending = false;
    }

    /// How many files have descriptors.
    #[cfg(feature = "server")]
    pub fn open_files(&self) -> usize {
        self.files().slots.iter().flatten().count()
    }

    /// The last descriptor of the file with `inode` was closed, perhaps in another process.
    pub fn hung_up(&self, inode: u64) {
        if let Some(slot) = self.number_of(inode) {
            self.released(slot);
        }
    }

    /// Prevents closed files from ending.
    pub fn serving(&self) -> MutexGuard<'_, ()> {
        self.serving.lock()
    }

    /// What to map instead of `fd`; `None` if it is not ours.
    pub fn map(&self, fd: RawFd, request: MmapRequest) -> Option<Result<Pages, Errno>> {
        let slot = self.find(fd).transpose()?;
        Some(slot.and_then(|slot| match slot.kind {
            Kind::Own(own) => own.file.clone().map(request),
            // The owner could not see it unmapped.
            Kind::Foreign => Err(Errno::ENODEV),
        }))
    }

    /// The name of the file of `fd`; none if it is no file of ours.
    ///
    /// # Errors
    /// `EBADF` it is being closed.
    pub fn name(&self, fd: RawFd) -> Result<Option<String>, Errno> {
        let name = self.find(fd)?.and_then(|_| String::from_utf8(sys::peer_name(fd)?).ok());
        Ok(name.and_then(|name| name.splitn(4, '/').nth(3).map(str::to_owned)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::{channel, Receiver, Sender};
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::files::file::{Answer, Call, Caller};

    /// A file that takes time to end.
    #[derive(Debug)]
    struct Slow {
        ends: Sender<()>,
        may_end: Mutex<Receiver<()>>,
        ended: Arc<AtomicBool>,
    }

    impl File for Slow {
        fn name(&self) -> String {
            "slow".to_owned()
        }

        fn call(&self, _: &dyn Caller, _: Call) -> Result<Answer, Errno> {
            Err(Errno::ENOTTY)
        }
    }

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.ends.send(());
            let _ = self.may_end.get_mut().recv();
            self.ended.store(true, Ordering::SeqCst);
        }
    }

    /// The service may see the last descriptor closed before the hook of `close` continues.
    #[test]
    fn a_file_that_another_thread_ends_has_ended_when_close_returns() {
        let state = current();
        state.start_service(|_| {}).unwrap();
        let (ends, it_ends) = channel();
        let (let_it_end, may_end) = channel();
        let ended = Arc::<AtomicBool>::default();
        let file = Slow { ends, may_end: Mutex::new(may_end), ended: ended.clone() };
        let (fd, slot) = state.publish(Arc::new(file)).unwrap();
        drop(fd);
        thread::scope(|scope| {
            scope.spawn(|| state.end_hung_up());
            it_ends.recv().unwrap();
            let closed = scope.spawn(|| {
                state.released(slot);
                ended.load(Ordering::SeqCst)
            });
            // Time for a call that does not wait to return.
            thread::sleep(Duration::from_millis(100));
            let_it_end.send(()).unwrap();
            assert!(closed.join().unwrap(), "close waits until the file has ended");
        });
    }
}
