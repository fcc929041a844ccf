// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each kind of thread asks of the kernel: tables to build a VMM's seccomp filters from.
//!
//! A [`ThreadKind`] lists the ioctls that the library makes on such a thread, on a kernel's host
//! ([`crate::iommufd::KernelHost`]), and its system calls besides `ioctl`. [`EVENTS`] and [`QUEUE`]
//! are threads that the library starts: [`crate::threads`] tells the VMM, which can install a
//! filter there. The others are what the VMM's own threads do inside the library; a thread of
//! several kinds needs the union. One that calls verbs itself, to track dirty pages or to answer
//! page requests, for example, needs their [ioctls](crate::iommufd::Verb::ioctls), too.
//!
//! # What is in the tables
//! * Both architectures, glibc (2.34 and later), debug and release builds; a system call that a
//!   machine does not have has no number there. A few calls are what musl makes instead of others,
//!   but nothing is tested with it.
//! * Not what glibc asks `/proc` and `/sys` once in a process, on whichever thread needs memory:
//!   [`prepare`] has that done before there is a filter.
//! * Not what the VMM does when it is called: its interrupt sinks, observers, watchers and its
//!   logger (the library logs errors, and warnings at a limited rate).
//! * Not what ends the process: a panic or an abort (`exit_group`, `tgkill`).
//! * Nothing of the emulated host, which makes no system calls but those in [`COMMON`].
//!
//! Filters are inherited: a new thread has that of the thread that started it, and its own on top.
//! [`SETUP`] therefore has everything that [`EVENTS`] and [`QUEUE`] need, and what the C library
//! does on a new thread before any hook.
//!
//! The tables are kept true by tests, in which threads live under filters that were built from
//! them.
//!
//! # Example
//! A filter, in the form of the crate `seccompiler`:
//! ```
//! use std::collections::BTreeMap;
//! use std::io;
//! use std::thread;
//! use seccompiler::{
//!     apply_filter, BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
//!     SeccompCondition, SeccompFilter, SeccompRule,
//! };
//! use twostage::jail::{ThreadKind, IOCTL};
//! use twostage::threads::{NewThread, ThreadStart};
//!
//! fn filter(kind: &ThreadKind) -> Result<BpfProgram, BackendError> {
//!     let any = kind.numbers().map(|number| (number.into(), Vec::new()));
//!     let mut rules: BTreeMap<i64, Vec<SeccompRule>> = any.collect();
//!     let second_is = |request: u32| {
//!         SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request.into())
//!             .and_then(|condition| SeccompRule::new(vec![condition]))
//!     };
//!     // No rules would mean any ioctl.
//!     if let (Some(number), [_, ..]) = (IOCTL.number(), kind.ioctls) {
//!         let ioctls = kind.ioctls.iter().map(|ioctl| second_is(ioctl.request));
//!         rules.insert(number.into(), ioctls.collect::<Result<_, _>>()?);
//!     }
//!     // Here the VMM adds its own: what its interrupt sink and its logger do, for example.
//!     let arch = std::env::consts::ARCH.try_into()?;
//!     let (otherwise, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
//!     SeccompFilter::new(rules, otherwise, listed, arch)?.try_into()
//! }
//!
//! /// For `KernelHost::with_threads` and `Smmuv3Builder::threads`.
//! #[derive(Debug)]
//! struct Jailed;
//!
//! impl ThreadStart for Jailed {
//!     fn start(&self, thread: NewThread) -> io::Result<()> {
//!         let filter = filter(thread.kind()).map_err(io::Error::other)?;
//!         let builder = thread::Builder::new().name(thread.name().to_owned());
//!         let jailed = move || match apply_filter(&filter) {
//!             Ok(()) => thread.run(),
//!             Err(error) => eprintln!("{thread:?} does not run, as it has no jail: {error}"),
//!         };
//!         builder.spawn(jailed).map(drop)
//!     }
//! }
//! // Before the first filter.
//! twostage::jail::prepare()?;
//! # let filter = filter(&twostage::jail::SETUP)?;
//! # thread::spawn(move || apply_filter(&filter)).join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod once;

pub use once::prepare;

/// An ioctl.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ioctl {
    /// The name in `linux/iommufd.h` or `linux/vfio.h`.
    pub name: &'static str,
    /// The second argument of `ioctl`, of which the kernel looks at 32 bits.
    pub request: u32,
}

/// A system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Syscall {
    /// Linux's name.
    pub name: &'static str,
    /// The number on x86-64, if it has one.
    pub x86_64: Option<u32>,
    /// The number on arm64, if it has one.
    pub aarch64: Option<u32>,
}

impl Syscall {
    /// The number on the machine that this is compiled for.
    pub const fn number(&self) -> Option<u32> {
        if cfg!(target_arch = "x86_64") {
            self.x86_64
        } else if cfg!(target_arch = "aarch64") {
            self.aarch64
        } else {
            None
        }
    }
}

/// What a kind of thread asks of the kernel.
#[derive(Debug)]
#[non_exhaustive]
pub struct ThreadKind {
    /// A name, to select a filter by.
    pub name: &'static str,
    /// Its ioctls.
    pub ioctls: &'static [Ioctl],
    /// Its system calls, besides [`IOCTL`] and those in [`COMMON`].
    pub own: &'static [Syscall],
}

impl ThreadKind {
    /// All its system calls besides `ioctl`.
    pub fn syscalls(&self) -> impl Iterator<Item = &'static Syscall> {
        COMMON.iter().chain(self.own)
    }

    /// Their numbers on the machine that this is compiled for.
    pub fn numbers(&self) -> impl Iterator<Item = u32> {
        self.syscalls().filter_map(Syscall::number)
    }
}

/// Opens hosts, binds devices, maps and unmaps memory, surveys, builds and restores units, and adds
/// devices, at any time.
pub static SETUP: ThreadKind = ThreadKind {
    name: "setup",
    ioctls: &[
        DESTROY,
        IOAS_ALLOC,
        IOAS_IOVA_RANGES,
        IOAS_MAP,
        IOAS_COPY,
        IOAS_UNMAP,
        HWPT_ALLOC,
        // To add a device while a flush of the SMMU's TLB is due.
        HWPT_INVALIDATE,
        GET_HW_INFO,
        FAULT_QUEUE_ALLOC,
        IOAS_MAP_FILE,
        VIOMMU_ALLOC,
        VDEVICE_ALLOC,
        VEVENTQ_ALLOC,
        BIND,
        ATTACH,
        DETACH,
    ],
    own: &[
        // Paths: devices and what sysfs tells of them.
        OPENAT,
        OPEN,
        STATX,
        NEWFSTATAT,
        FSTAT,
        STAT,
        GETDENTS64,
        READLINK,
        READLINKAT,
        // Whether memory is that of a file.
        FSTATFS,
        // Threads.
        CLONE3,
        CLONE,
        SET_ROBUST_LIST,
        RSEQ,
        GETTID,
        PRCTL,
        // glibc, before the first thread of a process.
        RT_SIGACTION,
        EVENTFD2,
        // What the new threads do.
        READ,
        WRITE,
        CLOSE,
        FCNTL,
        EPOLL_CREATE1,
        EPOLL_CTL,
        EPOLL_WAIT,
        EPOLL_PWAIT,
    ],
};

/// Brings register accesses of the guest, and drains the unit's queue: vCPU threads. Also snapshots
/// and resets.
pub static GUEST: ThreadKind = ThreadKind {
    name: "guest",
    ioctls: &[
        DESTROY,
        // Mirrors of tables, where the host does not nest them.
        IOAS_ALLOC,
        IOAS_COPY,
        IOAS_UNMAP,
        HWPT_ALLOC,
        HWPT_INVALIDATE,
        ATTACH,
        DETACH,
    ],
    // Responses to page requests.
    own: &[WRITE],
};

/// Brings events to a virtual SMMU, or page requests to a virtual VT-d, and answers those that are
/// not for the guest: threads of the library, `smmu-events` and `page-requests`.
///
/// If the VMM drops the unit's parts without `shutdown` while an event is on its way, this thread
/// releases them: it is then of the kind [`REMOVE`], too. [`Smmuv3`](crate::unit::Smmuv3) does not
/// let that happen.
pub static EVENTS: ThreadKind = ThreadKind {
    name: "events",
    ioctls: &[],
    // It closes its queue at the end, and with it ends the thread that waits for the queue.
    own: &[READ, WRITE, CLOSE, FCNTL],
};

/// Waits for a queue of the kernel: a thread of the library, `queue N`.
pub static QUEUE: ThreadKind = ThreadKind {
    name: "queue",
    ioctls: &[],
    // Who is told of an event may drop the queue here.
    own: &[WRITE, CLOSE, FCNTL, EPOLL_WAIT, EPOLL_PWAIT],
};

/// Removes and unbinds devices, shuts units down, and drops what they were made of.
pub static REMOVE: ThreadKind = ThreadKind {
    name: "remove",
    ioctls: &[DESTROY, IOAS_UNMAP, ATTACH, DETACH],
    // Dropping a queue ends the thread that waits for it.
    own: &[WRITE, CLOSE, FCNTL],
};

/// Every kind.
pub static KINDS: [&ThreadKind; 5] = [&SETUP, &GUEST, &EVENTS, &QUEUE, &REMOVE];

/// `ioctl` itself, for the filter of a kind that has some.
pub const IOCTL: Syscall = both("ioctl", 16, 29);

/// What any thread may do: wait for others, use memory, handle a signal, and end.
pub static COMMON: [Syscall; 18] = [
    FUTEX,
    // The emulated host's invalidations and detachments: DMA that is going on ends first.
    SCHED_YIELD,
    CLOCK_NANOSLEEP,
    NANOSLEEP,
    // Mostly without a system call.
    CLOCK_GETTIME,
    // malloc, and its arenas.
    MMAP,
    MUNMAP,
    MREMAP,
    MPROTECT,
    MADVISE,
    BRK,
    SCHED_GETAFFINITY,
    // The keys of hash tables.
    GETRANDOM,
    RT_SIGRETURN,
    RT_SIGPROCMASK,
    RESTART_SYSCALL,
    SIGALTSTACK,
    EXIT,
];

const FUTEX: Syscall = both("futex", 202, 98);
const SCHED_YIELD: Syscall = both("sched_yield", 24, 124);
const CLOCK_NANOSLEEP: Syscall = both("clock_nanosleep", 230, 115);
const NANOSLEEP: Syscall = both("nanosleep", 35, 101);
const CLOCK_GETTIME: Syscall = both("clock_gettime", 228, 113);
const MMAP: Syscall = both("mmap", 9, 222);
const MUNMAP: Syscall = both("munmap", 11, 215);
const MREMAP: Syscall = both("mremap", 25, 216);
const MPROTECT: Syscall = both("mprotect", 10, 226);
const MADVISE: Syscall = both("madvise", 28, 233);
const BRK: Syscall = both("brk", 12, 214);
const SCHED_GETAFFINITY: Syscall = both("sched_getaffinity", 204, 123);
const GETRANDOM: Syscall = both("getrandom", 318, 278);
const RT_SIGRETURN: Syscall = both("rt_sigreturn", 15, 139);
const RT_SIGPROCMASK: Syscall = both("rt_sigprocmask", 14, 135);
const RESTART_SYSCALL: Syscall = both("restart_syscall", 219, 128);
const SIGALTSTACK: Syscall = both("sigaltstack", 131, 132);
const EXIT: Syscall = both("exit", 60, 93);
const READ: Syscall = both("read", 0, 63);
const WRITE: Syscall = both("write", 1, 64);
const CLOSE: Syscall = both("close", 3, 57);
// Duplicates an adopted device's; and a debug build checks descriptors before it closes them.
const FCNTL: Syscall = both("fcntl", 72, 25);
const OPENAT: Syscall = both("openat", 257, 56);
const STATX: Syscall = both("statx", 332, 291);
const NEWFSTATAT: Syscall = both("newfstatat", 262, 79);
const FSTAT: Syscall = both("fstat", 5, 80);
const FSTATFS: Syscall = both("fstatfs", 138, 44);
const GETDENTS64: Syscall = both("getdents64", 217, 61);
const READLINKAT: Syscall = both("readlinkat", 267, 78);
const EVENTFD2: Syscall = both("eventfd2", 290, 19);
const EPOLL_CREATE1: Syscall = both("epoll_create1", 291, 20);
const EPOLL_CTL: Syscall = both("epoll_ctl", 233, 21);
const EPOLL_PWAIT: Syscall = both("epoll_pwait", 281, 22);
const CLONE: Syscall = both("clone", 56, 220);
const CLONE3: Syscall = both("clone3", 435, 435);
const SET_ROBUST_LIST: Syscall = both("set_robust_list", 273, 99);
const RSEQ: Syscall = both("rseq", 334, 293);
const GETTID: Syscall = both("gettid", 186, 178);
const PRCTL: Syscall = both("prctl", 157, 167);
const RT_SIGACTION: Syscall = both("rt_sigaction", 13, 134);
// The generic table of arm64 has newer ones in their place.
const OPEN: Syscall = x86("open", 2);
const STAT: Syscall = x86("stat", 4);
const READLINK: Syscall = x86("readlink", 89);
const EPOLL_WAIT: Syscall = x86("epoll_wait", 232);

const fn both(name: &'static str, x86_64: u32, aarch64: u32) -> Syscall {
    Syscall { name, x86_64: Some(x86_64), aarch64: Some(aarch64) }
}

const fn x86(name: &'static str, number: u32) -> Syscall {
    Syscall { name, x86_64: Some(number), aarch64: None }
}

pub(crate) const DESTROY: Ioctl = ioctl("IOMMU_DESTROY", 0x3b80);
pub(crate) const IOAS_ALLOC: Ioctl = ioctl("IOMMU_IOAS_ALLOC", 0x3b81);
pub(crate) const IOAS_ALLOW_IOVAS: Ioctl = ioctl("IOMMU_IOAS_ALLOW_IOVAS", 0x3b82);
pub(crate) const IOAS_COPY: Ioctl = ioctl("IOMMU_IOAS_COPY", 0x3b83);
pub(crate) const IOAS_IOVA_RANGES: Ioctl = ioctl("IOMMU_IOAS_IOVA_RANGES", 0x3b84);
pub(crate) const IOAS_MAP: Ioctl = ioctl("IOMMU_IOAS_MAP", 0x3b85);
pub(crate) const IOAS_UNMAP: Ioctl = ioctl("IOMMU_IOAS_UNMAP", 0x3b86);
pub(crate) const HWPT_ALLOC: Ioctl = ioctl("IOMMU_HWPT_ALLOC", 0x3b89);
pub(crate) const GET_HW_INFO: Ioctl = ioctl("IOMMU_GET_HW_INFO", 0x3b8a);
pub(crate) const HWPT_SET_DIRTY_TRACKING: Ioctl = ioctl("IOMMU_HWPT_SET_DIRTY_TRACKING", 0x3b8b);
pub(crate) const HWPT_GET_DIRTY_BITMAP: Ioctl = ioctl("IOMMU_HWPT_GET_DIRTY_BITMAP", 0x3b8c);
pub(crate) const HWPT_INVALIDATE: Ioctl = ioctl("IOMMU_HWPT_INVALIDATE", 0x3b8d);
pub(crate) const FAULT_QUEUE_ALLOC: Ioctl = ioctl("IOMMU_FAULT_QUEUE_ALLOC", 0x3b8e);
pub(crate) const IOAS_MAP_FILE: Ioctl = ioctl("IOMMU_IOAS_MAP_FILE", 0x3b8f);
pub(crate) const VIOMMU_ALLOC: Ioctl = ioctl("IOMMU_VIOMMU_ALLOC", 0x3b90);
pub(crate) const VDEVICE_ALLOC: Ioctl = ioctl("IOMMU_VDEVICE_ALLOC", 0x3b91);
pub(crate) const VEVENTQ_ALLOC: Ioctl = ioctl("IOMMU_VEVENTQ_ALLOC", 0x3b93);
pub(crate) const BIND: Ioctl = ioctl("VFIO_DEVICE_BIND_IOMMUFD", 0x3b76);
pub(crate) const ATTACH: Ioctl = ioctl("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 0x3b77);
pub(crate) const DETACH: Ioctl = ioctl("VFIO_DEVICE_DETACH_IOMMUFD_PT", 0x3b78);

const fn ioctl(name: &'static str, request: u32) -> Ioctl {
    Ioctl { name, request }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use iommufd_bindings::*;

    use super::*;
    use crate::iommufd::Verb;

    /// Checks numbers while it is compiled, so for every machine; the names of what it checked.
    macro_rules! syscalls {
        ($($known:ident $number:ident,)*) => {{
            $(const _: () = match $known.number() {
                Some(number) => assert!(number as i64 == libc::$number as i64, stringify!($known)),
                None => panic!(stringify!($known)),
            };)*
            [$($known.name),*]
        }};
    }

    macro_rules! ioctls {
        ($($known:ident $number:ident,)*) => {{
            $(const _: () = assert!(
                $known.request == (IOMMUFD_TYPE as u32) << 8 | $number,
                stringify!($known)
            );)*
            [$($known.name),*]
        }};
    }

    #[test]
    fn numbers_are_those_of_libc() {
        let mut checked = BTreeSet::from(syscalls! {
            IOCTL SYS_ioctl, FUTEX SYS_futex, SCHED_YIELD SYS_sched_yield,
            CLOCK_NANOSLEEP SYS_clock_nanosleep, NANOSLEEP SYS_nanosleep,
            CLOCK_GETTIME SYS_clock_gettime, MMAP SYS_mmap, MUNMAP SYS_munmap,
            MREMAP SYS_mremap, MPROTECT SYS_mprotect, MADVISE SYS_madvise, BRK
            SYS_brk, SCHED_GETAFFINITY SYS_sched_getaffinity, GETRANDOM
            SYS_getrandom, RT_SIGRETURN SYS_rt_sigreturn, RT_SIGPROCMASK
            SYS_rt_sigprocmask, RESTART_SYSCALL SYS_restart_syscall, SIGALTSTACK
            SYS_sigaltstack, EXIT SYS_exit, READ SYS_read, WRITE SYS_write, CLOSE
            SYS_close, FCNTL SYS_fcntl, OPENAT SYS_openat, STATX SYS_statx,
            NEWFSTATAT SYS_newfstatat, FSTAT SYS_fstat, FSTATFS SYS_fstatfs,
            GETDENTS64 SYS_getdents64, READLINKAT SYS_readlinkat, EVENTFD2
            SYS_eventfd2, EPOLL_CREATE1 SYS_epoll_create1, EPOLL_CTL SYS_epoll_ctl,
            EPOLL_PWAIT SYS_epoll_pwait, CLONE SYS_clone, CLONE3 SYS_clone3,
            SET_ROBUST_LIST SYS_set_robust_list, RSEQ SYS_rseq, GETTID SYS_gettid, PRCTL SYS_prctl,
            RT_SIGACTION SYS_rt_sigaction,
        });
        // On any machine, as arm64 has none of them.
        let of_x86 = [OPEN, STAT, READLINK, EPOLL_WAIT];
        #[cfg(target_arch = "x86_64")]
        checked.extend(syscalls! {
            OPEN SYS_open, STAT SYS_stat, READLINK SYS_readlink, EPOLL_WAIT
            SYS_epoll_wait,
        });
        #[cfg(not(target_arch = "x86_64"))]
        checked.extend(of_x86.map(|syscall| syscall.name));
        assert!(of_x86.iter().all(|syscall| syscall.aarch64.is_none()));
        let used = KINDS.iter().flat_map(|kind| kind.syscalls()).chain([&IOCTL]);
        assert_eq!(used.map(|syscall| syscall.name).collect::<BTreeSet<_>>(), checked);
    }

    #[test]
    fn requests_are_those_of_the_kernels_headers() {
        let mut checked = BTreeSet::from(ioctls! {
            DESTROY IOMMUFD_CMD_DESTROY, IOAS_ALLOC IOMMUFD_CMD_IOAS_ALLOC,
            IOAS_ALLOW_IOVAS IOMMUFD_CMD_IOAS_ALLOW_IOVAS, IOAS_COPY
            IOMMUFD_CMD_IOAS_COPY, IOAS_IOVA_RANGES IOMMUFD_CMD_IOAS_IOVA_RANGES,
            IOAS_MAP IOMMUFD_CMD_IOAS_MAP, IOAS_UNMAP IOMMUFD_CMD_IOAS_UNMAP,
            HWPT_ALLOC IOMMUFD_CMD_HWPT_ALLOC, GET_HW_INFO IOMMUFD_CMD_GET_HW_INFO,
            HWPT_SET_DIRTY_TRACKING IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING,
            HWPT_GET_DIRTY_BITMAP IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, HWPT_INVALIDATE
            IOMMUFD_CMD_HWPT_INVALIDATE, FAULT_QUEUE_ALLOC
            IOMMUFD_CMD_FAULT_QUEUE_ALLOC, IOAS_MAP_FILE IOMMUFD_CMD_IOAS_MAP_FILE,
            VIOMMU_ALLOC IOMMUFD_CMD_VIOMMU_ALLOC, VDEVICE_ALLOC
            IOMMUFD_CMD_VDEVICE_ALLOC, VEVENTQ_ALLOC IOMMUFD_CMD_VEVENTQ_ALLOC,
        });
        // As in linux/vfio.h: _IO(VFIO_TYPE, VFIO_BASE + 18) and the next ones.
        for (ioctl, number) in [(BIND, 18), (ATTACH, 19), (DETACH, 20)] {
            assert_eq!(ioctl.request, u32::from(b';') << 8 | (100 + number), "{}", ioctl.name);
            checked.insert(ioctl.name);
        }
        let of_kinds = KINDS.iter().flat_map(|kind| kind.ioctls);
        let of_verbs = Verb::ALL.iter().flat_map(|verb| verb.ioctls());
        let used: BTreeSet<_> = of_kinds.chain(of_verbs).map(|ioctl| ioctl.name).collect();
        assert_eq!(used, checked);
    }

    #[test]
    fn each_ioctl_of_a_kind_is_that_of_a_verb() {
        let of_verbs: BTreeSet<_> = Verb::ALL.iter().flat_map(|verb| verb.ioctls()).collect();
        for kind in KINDS {
            let twice = kind.ioctls.len() - kind.ioctls.iter().collect::<BTreeSet<_>>().len();
            assert_eq!(twice, 0, "{}", kind.name);
            assert!(kind.ioctls.iter().all(|ioctl| of_verbs.contains(ioctl)), "{}", kind.name);
        }
    }

    #[test]
    fn new_threads_can_live_under_the_filter_of_their_starter() {
        let names = |kind: &'static ThreadKind| -> BTreeSet<_> {
            kind.syscalls().map(|syscall| syscall.name).collect()
        };
        for kind in [&EVENTS, &QUEUE] {
            assert!(names(kind).is_subset(&names(&SETUP)), "{}", kind.name);
            assert_eq!(kind.ioctls, [], "{}", kind.name);
        }
    }
}
