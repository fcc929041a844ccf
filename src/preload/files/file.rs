// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Emulated files: their calls and callers, those that wait for a call on another one, and the
//! thread that serves them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, MutexGuard, Weak};
use std::thread;
use twostage::sync::Mutex;

use twostage::iommufd::Errno;
use twostage_emulated::uapi::{self, TestFile, UserSpace};
use twostage_emulated::{EmulatedHost, MappedPages, MmapRequest};

use crate::callers::process::Process;
use crate::sys;
use crate::table::Internal;

/// A call on a descriptor. Addresses are the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `ioctl(2)`.
    Ioctl { request: u32, argument: u64 },
    /// `read(2)`; `pread(2)` if there is an offset.
    Read { to: u64, count: u64, offset: Option<u64> },
    /// `write(2)`, likewise.
    Write { from: u64, count: u64, offset: Option<u64> },
}

/// The result of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// Its return value.
    pub value: i64,
    /// A message of the owner must be taken from the descriptor: see
    /// [`crate::files::iommufd::Events`].
    pub take_message: bool,
}

impl From<i64> for Answer {
    fn from(value: i64) -> Self {
        Self { value, take_message: false }
    }
}

/// The caller of a call: a process, and how it receives descriptors.
pub trait Caller: uapi::Process {
    /// The process.
    fn process(&self) -> &Process;

    /// Gives the process a descriptor for `file`, with close-on-exec; returns its number there.
    ///
    /// # Errors
    /// `EMFILE`, or another error.
    fn open(&self, file: Arc<dyn File>) -> Result<i32, Errno>;

    /// The emulated file of this process that the process has open as `fd`.
    ///
    /// # Errors
    /// `EBADF` nothing is open there; `EINVAL` something else is.
    fn file_at(&self, fd: i32) -> Result<Arc<dyn File>, Errno>;
}

/// What to map instead of an emulated file.
#[derive(Debug)]
pub enum Pages {
    /// Pages of an IOMMU: all of their file.
    Iommu(MappedPages),
    /// Memory of a device: a file, from `offset` on.
    Device {
        memory: Arc<Internal>,
        offset: u64,
        /// It stays open as long as this.
        _file: Arc<dyn File>,
    },
}

impl Pages {
    /// The descriptor to map, and from where on.
    pub fn source(&self) -> (RawFd, u64) {
        match self {
            Self::Iommu(pages) => (pages.file().as_raw_fd(), 0),
            Self::Device { memory, offset, .. } => (memory.raw(), *offset),
        }
    }
}

/// An open emulated file. Dropping it closes it.
pub trait File: Debug + Send + Sync {
    /// Its name, for logs and identification.
    fn name(&self) -> String;

    /// Handles a call of `caller`.
    ///
    /// # Errors
    /// Linux's.
    fn call(&self, caller: &dyn Caller, call: Call) -> Result<Answer, Errno>;

    /// Continues what waited for a call on another file, if possible; returns whether something is
    /// still waiting.
    fn resume(&self) -> bool {
        false
    }

    /// An eventfd for which [`Self::woken`] is to be called when it is written, if there is a new
    /// one since the last call.
    fn wake_event(&self) -> Option<Arc<Internal>> {
        None
    }

    /// That eventfd may have been written.
    fn woken(&self) {}

    /// It now belongs to this process, and `end` is the owner's end of its descriptors.
    fn opened(&self, end: &Arc<Internal>) {
        let _ = end;
    }

    /// What to map instead of the file (`mmap(2)`).
    ///
    /// # Errors
    /// Linux's; `ENODEV` for a file that cannot be mapped.
    fn map(self: Arc<Self>, request: MmapRequest) -> Result<Pages, Errno> {
        let _ = request;
        Err(Errno::ENODEV)
    }

    /// The file of a test operation, if it is one.
    fn as_test_file(&self) -> Option<&Arc<dyn TestFile>> {
        None
    }

    /// The iommufd, if it is one.
    fn as_iommufd(&self) -> Option<&Arc<EmulatedHost>> {
        None
    }
}

/// An ioctl's argument for the emulated host: a copy, to be written back.
///
/// The host needs the structure in its declared length; of one longer than any structure, only the
/// beginning is copied.
#[derive(Debug)]
pub struct Argument {
    address: u64,
    before: Vec<u8>,
    /// For the host to read and write.
    pub bytes: Vec<u8>,
}

/// More than any structure has, in bytes.
const LONGEST: usize = 4096;

/// The requirement for the bytes of a structure beyond its known version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Excess {
    /// iommufd's rule: they must be zero.
    Zero,
    /// VFIO's: they are ignored.
    Ignored,
}

impl Argument {
    /// Copies the structure at `address`, whose first four bytes are its length. As much as can be
    /// read: the host handles a shorter one.
    ///
    /// # Errors
    /// `E2BIG` the excess is not zero; `EFAULT` it cannot be read.
    pub fn copy_in(process: &Process, address: u64, excess: Excess) -> Result<Self, Errno> {
        let mut bytes = vec![0; LONGEST];
        let mut length = process.read_some(address, &mut bytes);
        let declared = bytes.first_chunk().filter(|_| length >= size_of::<u32>());
        let declared = declared.map_or(0, |size| u32::from_ne_bytes(*size)) as usize;
        if declared > LONGEST && length == LONGEST {
            if excess == Excess::Zero {
                check_zero(process, address + LONGEST as u64, declared - LONGEST)?;
            }
            for (to, from) in bytes.iter_mut().zip((LONGEST as u32).to_ne_bytes()) {
                *to = from;
            }
        } else {
            length = length.min(declared.max(size_of::<u32>()));
        }
        bytes.truncate(length);
        let mut before = bytes.clone();
        // The size is written back unchanged.
        for (to, from) in before.iter_mut().zip((declared as u32).to_ne_bytes()) {
            *to = from;
        }
        Ok(Self { address, before, bytes })
    }

    /// Writes back what the host changed, from the first changed byte to the last.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn copy_out(&self, process: &Process) -> Result<(), Errno> {
        let after = self.bytes.get(size_of::<u32>()..).unwrap_or_default();
        let before = self.before.get(size_of::<u32>()..).unwrap_or_default();
        let differs = || after.iter().zip(before).map(|(after, before)| after != before);
        let (Some(first), Some(last)) =
            (differs().position(|differs| differs), differs().rposition(|differs| differs))
        else {
            return Ok(());
        };
        let address = self.address + (size_of::<u32>() + first) as u64;
        let changed = after.get(first..=last).unwrap_or_default();
        process.write(address, changed).map_err(|_| Errno::EFAULT)
    }
}

/// Whether `length` bytes at `address` are zero.
fn check_zero(process: &Process, address: u64, length: usize) -> Result<(), Errno> {
    let mut piece = [0; LONGEST];
    for start in (0..length).step_by(LONGEST) {
        let wanted = LONGEST.min(length - start);
        let Some(piece) = piece.get_mut(..wanted) else { break };
        let read = process.read_some(address + start as u64, piece);
        if piece.iter().take(read).any(|byte| *byte != 0) {
            return Err(Errno::E2BIG);
        }
        if read < wanted {
            return Err(Errno::EFAULT);
        }
    }
    Ok(())
}

/// The files that wait for a call on another one: a DMA, for the response to its page requests.
#[derive(Debug, Default)]
pub struct Waiting(Mutex<Vec<Weak<dyn File>>>);

impl Waiting {
    /// `file` was written to, and may be waiting from now on.
    pub fn written(&self, file: &Arc<dyn File>) {
        // What it waits for may have come before it is registered.
        if file.resume() {
            let file = Arc::downgrade(file);
            let mut files = self.files();
            if !files.iter().any(|known| known.ptr_eq(&file)) {
                files.push(file);
            }
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.files().is_empty()
    }

    /// Continues every file that can. Nobody else sees the list empty, or accesses it, before that
    /// is done.
    pub fn resume(&self) {
        self.files().retain(|file| file.upgrade().is_some_and(|file| file.resume()));
    }

    fn files(&self) -> MutexGuard<'_, Vec<Weak<dyn File>>> {
        self.0.lock()
    }
}

/// An owner's thread that notices descriptors closed elsewhere, and serves the calls of other
/// processes. It is started with the first file.
#[derive(Debug)]
pub struct Service {
    epoll: Arc<Internal>,
    /// The files to wake, by the key of their eventfd.
    woken: Mutex<BTreeMap<u64, Woken>>,
}

/// A file to wake, and its eventfd.
type Woken = (Weak<dyn File>, Arc<Internal>);

/// Set in the keys of eventfds: no inode is as large.
const EVENT: u64 = 1 << 63;

impl Service {
    /// Starts the thread, which calls `serve` for a file, by the inode of its descriptors, whenever
    /// it has an event. It takes no signals.
    ///
    /// # Errors
    /// `EAGAIN` no more threads; the kernel's error if there are no more descriptors.
    pub fn start(serve: fn(u64)) -> Result<Self, Errno> {
        let epoll = Arc::new(Internal::new(sys::epoll()?));
        let builder = thread::Builder::new().name("twostage-iommufd".to_owned());
        let events = epoll.clone();
        sys::with_signals_blocked(|| builder.spawn(move || watch(&events, serve)))
            .map_err(|_| Errno::from_raw(libc::EAGAIN))?;
        Ok(Self { epoll, woken: Mutex::default() })
    }

    /// Watches the owner's end `end` of the file whose descriptors have `inode`.
    ///
    /// # Errors
    /// The error of `epoll_ctl(2)`.
    pub fn watch(&self, end: RawFd, inode: u64) -> Result<(), Errno> {
        sys::watch(self.epoll.raw(), end, inode)
    }

    /// Wakes `file` whenever `event`, its eventfd, is written, instead of an older one.
    ///
    /// # Errors
    /// As [`Self::watch`].
    pub fn watch_event(&self, event: &Arc<Internal>, file: &Arc<dyn File>) -> Result<(), Errno> {
        let key = EVENT | u64::from(event.raw().unsigned_abs());
        let file = Arc::downgrade(file);
        let mut woken = self.woken.lock();
        // Also those of files that are gone. The program's descriptors of an eventfd would keep it
        // watched when ours is closed.
        woken.retain(|_, (other, event)| {
            let stays = other.strong_count() > 0 && !other.ptr_eq(&file);
            if !stays {
                // It is watched, unless that failed.
                let _ = sys::unwatch(self.epoll.raw(), event.raw());
            }
            stays
        });
        woken.insert(key, (file, event.clone()));
        sys::watch_edges(self.epoll.raw(), event.raw(), key)
    }

    /// Wakes the file whose eventfd has this key; returns whether it is the key of one.
    pub fn wake(&self, key: u64) -> bool {
        let file = self.woken.lock().get(&key).and_then(|(file, _)| file.upgrade());
        if let Some(file) = file {
            file.woken();
        }
        key & EVENT != 0
    }
}

fn watch(epoll: &Internal, serve: fn(u64)) {
    // Fails if the process has lost the descriptor: nothing is served then.
    while let Ok(inode) = sys::next_event(epoll.raw()) {
        serve(inode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    fn structure(size: u32, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        bytes[..4].copy_from_slice(&size.to_ne_bytes());
        bytes
    }

    #[test]
    fn as_much_as_the_structure_says() {
        let process = Process::own();
        let user = structure(16, 64);
        let argument = Argument::copy_in(&process, user.as_ptr() as u64, Excess::Zero).unwrap();
        assert_eq!(argument.bytes, user[..16]);
        assert!(Argument::copy_in(&process, 0, Excess::Zero).unwrap().bytes.is_empty());
    }

    #[test]
    fn zeroes_past_every_structure_are_cut_off() {
        let process = Process::own();
        let mut user = structure(10_000, 10_000);
        let argument = Argument::copy_in(&process, user.as_ptr() as u64, Excess::Zero).unwrap();
        assert_eq!(argument.bytes.len(), LONGEST);
        assert_eq!(argument.bytes[..4], (LONGEST as u32).to_ne_bytes());
        argument.copy_out(&process).unwrap();
        assert_eq!(user[..4], 10_000u32.to_ne_bytes(), "the size stays");
        user[9_999] = 1;
        let address = user.as_ptr() as u64;
        let refused = Argument::copy_in(&process, address, Excess::Zero).unwrap_err();
        assert_eq!(refused, Errno::E2BIG);
        assert!(Argument::copy_in(&process, address, Excess::Ignored).is_ok());
    }

    #[test]
    fn only_what_changed_is_written() {
        let process = Process::own();
        let mut user = structure(16, 16);
        let address = user.as_mut_ptr() as u64;
        let mut argument = Argument::copy_in(&process, address, Excess::Zero).unwrap();
        argument.bytes[8] = 7;
        argument.bytes[10] = 9;
        user[15] = 5;
        argument.copy_out(&process).unwrap();
        assert_eq!(user[8..], [7, 0, 9, 0, 0, 0, 0, 5]);
    }

    #[derive(Debug, Default)]
    struct Device {
        waits: AtomicBool,
        resumed: AtomicU32,
    }

    impl File for Device {
        fn name(&self) -> String {
            "device".into()
        }

        fn call(&self, _: &dyn Caller, _: Call) -> Result<Answer, Errno> {
            Err(Errno::ENOTTY)
        }

        fn resume(&self) -> bool {
            self.resumed.fetch_add(1, Ordering::Relaxed);
            self.waits.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn only_what_waits_goes_on() {
        let (waiting, idle, device) = (Waiting::default(), Arc::default(), Arc::default());
        let (idle, device): (Arc<Device>, Arc<Device>) = (idle, device);
        let files: [Arc<dyn File>; 2] = [idle.clone(), device.clone()];
        device.waits.store(true, Ordering::Relaxed);
        files.iter().for_each(|file| waiting.written(file));
        waiting.written(&files[1]);
        let resumed = || [&idle, &device].map(|device| device.resumed.load(Ordering::Relaxed));
        assert_eq!((waiting.is_empty(), resumed()), (false, [1, 2]));
        waiting.resume();
        assert_eq!(
            (waiting.is_empty(), resumed()),
            (false, [1, 3]),
            "once, though it is known twice"
        );
        device.waits.store(false, Ordering::Relaxed);
        waiting.resume();
        waiting.resume();
        assert_eq!((waiting.is_empty(), resumed()), (true, [1, 4]));
    }

    #[test]
    fn an_eventfd_is_watched_as_long_as_it_is_the_file_s() {
        let epoll = Arc::new(Internal::new(sys::epoll().unwrap()));
        let service = Service { epoll: epoll.clone(), woken: Mutex::default() };
        let ready = || sys::events(epoll.raw()).contains(rustix::event::PollFlags::IN);
        let event = Internal::new(sys::eventfd().unwrap());
        let set = |file: &Arc<dyn File>| {
            let duplicate = Internal::new(sys::duplicate(event.raw()).unwrap());
            service.watch_event(&Arc::new(duplicate), file).unwrap();
        };
        let device: Arc<dyn File> = Arc::new(Device::default());
        sys::write_number(event.raw(), 1).unwrap();
        for time in ["first", "again"] {
            set(&device);
            assert!(ready(), "{time}: it is written already");
            assert!(service.wake(sys::next_event(epoll.raw()).unwrap()));
            assert!(!ready(), "{time}: once");
        }
        let gone: Arc<dyn File> = Arc::new(Device::default());
        set(&gone);
        drop(gone);
        set(&device);
        assert_eq!(service.woken.lock().len(), 1);
        assert!(sys::next_event(epoll.raw()).is_ok() && !ready(), "watched once");
    }

    #[test]
    fn a_file_that_waits_is_not_kept() {
        let waiting = Waiting::default();
        let device = Arc::new(Device { waits: true.into(), ..Device::default() });
        let file: Arc<dyn File> = device.clone();
        waiting.written(&file);
        drop(file);
        assert_eq!(Arc::strong_count(&device), 1);
        drop(device);
        waiting.resume();
        assert!(waiting.is_empty());
    }
}
