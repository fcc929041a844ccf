// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each kind of thread asks of the kernel: besides what the library's tables have
//! ([`twostage::jail`]), which say what threads do inside the library.
//!
//! A thread inherits the filter of the one that starts it, so a table implies those of the kinds
//! that are started. docs/security.md lists everything, and in which runs it is seen
//! (`scripts/check/jail-minimal`).

use std::collections::BTreeSet;

use libc::c_long;
use twostage::jail::{Ioctl, ThreadKind, EVENTS, GUEST, QUEUE, REMOVE, SETUP};

use super::ioctls;

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The event loop, and the end of a machine: the main thread, and `release`.
    Main,
    /// Runs the guest.
    Vcpu,
    /// Does a device's work.
    Device,
    /// Waits for a disk.
    Disk,
    /// Writes to a reader who may be slow.
    Output,
    /// Brings events of the host's IOMMU to a virtual one.
    Events,
    /// Waits for a queue of the kernel.
    Queue,
    /// Serves the queues of virtual IOMMUs.
    SideCore,
    /// Waits for signals, and for an end that is overdue.
    Signals,
}

/// What is allowed: system calls, and requests of `ioctl`.
#[derive(Debug, Default)]
pub(super) struct Allowed {
    pub calls: BTreeSet<c_long>,
    pub ioctls: Vec<Ioctl>,
}

/// What a kind of thread does.
struct Table {
    /// Inside the library.
    library: &'static [&'static ThreadKind],
    /// System calls.
    calls: &'static [c_long],
    /// Requests, the most frequent first.
    ioctls: &'static [&'static [Ioctl]],
    /// Threads that it starts.
    starts: &'static [Kind],
}

impl Kind {
    /// Every kind, in order.
    pub const ALL: [Self; 9] = [
        Self::Main,
        Self::Vcpu,
        Self::Device,
        Self::Disk,
        Self::Output,
        Self::Events,
        Self::Queue,
        Self::SideCore,
        Self::Signals,
    ];

    /// The kind of a thread of the library.
    pub fn of_library(kind: &ThreadKind) -> Self {
        match kind.name {
            name if name == EVENTS.name => Self::Events,
            name if name == QUEUE.name => Self::Queue,
            // Inherited, then, whatever it is.
            _ => Self::Main,
        }
    }

    /// What its filter allows. `restarts`: the main thread builds machines again.
    pub(super) fn allowed(self, restarts: bool) -> Allowed {
        let mut allowed = Allowed::default();
        self.add_to(&mut allowed);
        if self == Self::Main && restarts {
            allowed.add(&BUILD);
        }
        allowed
    }

    fn add_to(self, allowed: &mut Allowed) {
        let table = self.table();
        allowed.add(&ANY);
        allowed.add(&table);
        if !table.starts.is_empty() {
            allowed.add(&STARTS_THREADS);
        }
        table.starts.iter().for_each(|kind| kind.add_to(allowed));
    }

    fn table(self) -> Table {
        match self {
            Self::Main => MAIN,
            Self::Vcpu => VCPU,
            Self::Device => DEVICE,
            Self::Disk => DISK,
            Self::Output => OUTPUT,
            Self::Events => HOST_EVENTS,
            Self::Queue => HOST_QUEUE,
            Self::SideCore => SIDE_CORE,
            Self::Signals => SIGNALS,
        }
    }
}

impl Allowed {
    fn add(&mut self, table: &Table) {
        let of_library = table.library.iter().flat_map(|kind| kind.numbers()).map(c_long::from);
        self.calls.extend(of_library.chain(table.calls.iter().copied()));
        let ioctls =
            table.ioctls.iter().copied().chain(table.library.iter().map(|kind| kind.ioctls));
        for ioctl in ioctls.flatten() {
            if !self.ioctls.contains(ioctl) {
                self.ioctls.push(*ioctl);
            }
        }
    }
}

/// Any thread may write to files that are open, and die: of a panic, a signal or a refusal, and
/// then leaves the terminal as it was.
const ANY: Table = Table {
    library: &[&QUEUE],
    calls: &[
        libc::SYS_write,
        // The C library's own last line, such as that it has no memory for a thread.
        libc::SYS_writev,
        libc::SYS_ppoll,
        libc::SYS_exit_group,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_tgkill,
        libc::SYS_rt_sigaction,
        libc::SYS_prctl,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_getpgrp,
        #[cfg(target_arch = "aarch64")]
        libc::SYS_getpgid,
        libc::SYS_sched_getaffinity,
    ],
    ioctls: &[ioctls::TERMINAL],
    starts: &[],
};

const STARTS_THREADS: Table = Table {
    library: &[],
    calls: &[
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        // What the new ones do first.
        libc::SYS_seccomp,
        libc::SYS_capset,
    ],
    ioctls: &[],
    starts: &[],
};

const MAIN: Table = Table {
    library: &[&GUEST, &REMOVE],
    calls: &[
        libc::SYS_read,
        libc::SYS_recvfrom,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_timerfd_settime,
        // Reports.
        libc::SYS_ftruncate,
        libc::SYS_statx,
    ],
    ioctls: &[],
    starts: &[Kind::Vcpu, Kind::SideCore, Kind::Output, Kind::Events, Kind::Queue],
};

const VCPU: Table = Table {
    library: &[&GUEST],
    calls: &[
        // The configuration space of assigned devices.
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        // What a device is started with.
        libc::SYS_eventfd2,
        libc::SYS_timerfd_create,
    ],
    ioctls: &[
        ioctls::RUNNING,
        ioctls::INTERRUPTS,
        ioctls::ROUTING,
        ioctls::WIRING,
        ioctls::MEMORY,
        ioctls::TAP,
        ioctls::ASSIGNED,
    ],
    starts: &[Kind::Device],
};

const DEVICE: Table = Table {
    library: &[],
    calls: &[
        libc::SYS_read,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_timerfd_settime,
        // Disks: pieces of a request that are at hand, and others.
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_io_uring_enter,
    ],
    // One that its machine leaves behind frees its vectors. A fault takes back a page of registers.
    ioctls: &[ioctls::INTERRUPTS, ioctls::ROUTING, ioctls::MEMORY],
    starts: &[Kind::Disk],
};

const DISK: Table = Table {
    library: &[],
    calls: &[libc::SYS_pread64, libc::SYS_pwrite64, libc::SYS_fdatasync],
    ioctls: &[],
    starts: &[],
};

const OUTPUT: Table = Table { library: &[], calls: &[], ioctls: &[], starts: &[] };

const SIGNALS: Table = Table { library: &[], calls: &[], ioctls: &[], starts: &[] };

const HOST_EVENTS: Table =
    Table { library: &[&EVENTS], calls: &[], ioctls: &[ioctls::INTERRUPTS], starts: &[] };

const HOST_QUEUE: Table = Table { library: &[&QUEUE], calls: &[], ioctls: &[], starts: &[] };

const SIDE_CORE: Table = Table {
    library: &[&GUEST],
    calls: &[
        // Its scheduling, from files of procfs and of control groups.
        libc::SYS_pread64,
        // A queue blocks interrupts: those of assigned devices are watched then.
        libc::SYS_epoll_ctl,
    ],
    ioctls: &[ioctls::INTERRUPTS, ioctls::ROUTING, ioctls::LENDING],
    starts: &[],
};

/// Building a machine in the jail (`--on-reset restart`). Without io_uring: a new ring does what
/// no filter sees, and the one who makes it could leave out to restrict it.
const BUILD: Table = Table {
    library: &[&SETUP],
    calls: &[
        libc::SYS_memfd_create,
        libc::SYS_lseek,
        // A side core binds itself before it has its own filter.
        libc::SYS_sched_setaffinity,
        // To find a tap by its name.
        libc::SYS_socket,
    ],
    ioctls: &[ioctls::MACHINE, ioctls::FILES],
    starts: &[],
};

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::fs;
    use std::path::Path;

    use super::super::refusal;
    use super::*;

    const NAMES: [&str; 9] =
        ["main", "vCPU", "device", "disk", "output", "events", "queue", "side core", "signals"];

    /// Calls by name, requests by name and number, and whose filters allow them.
    fn allowed() -> BTreeMap<String, BTreeSet<&'static str>> {
        let mut all = BTreeMap::<_, BTreeSet<_>>::new();
        let names = |allowed: Allowed| -> Vec<String> {
            let call = |number: &c_long| refusal::name(*number as libc::c_int).unwrap().to_owned();
            let calls = allowed.calls.iter().map(call);
            calls.chain(allowed.ioctls.iter().map(named)).collect()
        };
        for (kind, name) in Kind::ALL.into_iter().zip(NAMES) {
            for call in names(kind.allowed(false)) {
                all.entry(call).or_default().insert(name);
            }
        }
        for call in names(Kind::Main.allowed(true)) {
            let threads = all.entry(call).or_default();
            if !threads.contains("main") {
                threads.insert("restart");
            }
        }
        all
    }

    fn named(ioctl: &Ioctl) -> String {
        format!("{} {:#x}", ioctl.name, ioctl.request)
    }

    #[test]
    fn whoever_serves_a_queue_can_move_interrupts() {
        let all = allowed();
        let requests = [ioctls::ROUTING, ioctls::INTERRUPTS].concat();
        let calls = requests.iter().map(named).chain(["epoll_ctl", "write"].map(str::to_owned));
        for call in calls {
            let can: Vec<_> = ["vCPU", "side core"].map(|kind| all[&call].contains(kind)).into();
            assert_eq!(can, [true, true], "{call}");
        }
    }

    #[test]
    fn no_thread_makes_an_io_uring() {
        let all = allowed();
        assert!(!["setup", "register"]
            .iter()
            .any(|it| all.contains_key(&format!("io_uring_{it}"))));
    }

    #[test]
    fn the_documentation_has_what_is_allowed_and_nothing_else() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/security.md");
        let text = fs::read_to_string(path).unwrap();
        let mut written = BTreeMap::new();
        for row in text.lines().filter_map(|line| line.strip_prefix("| ")) {
            let cells: Vec<_> = row.split(" | ").collect();
            let [threads, call, why, seen] = cells[..] else { continue };
            let Some(call) = call.strip_prefix('`') else { continue };
            let call = call.replacen('`', "", 1);
            assert!(!why.is_empty() && seen.len() > " |".len(), "{call}");
            let threads: BTreeSet<_> = match threads {
                "any" => NAMES.into(),
                some => some.split(", ").collect(),
            };
            assert_eq!(written.insert(call.clone(), threads), None, "{call} is there twice");
        }
        let allowed = allowed();
        let wrong = |one: &BTreeMap<String, BTreeSet<_>>, other: &BTreeMap<String, _>| {
            let differs =
                |(call, threads): &(&String, &BTreeSet<_>)| other.get(*call) != Some(*threads);
            one.iter().filter(differs).map(|it| format!("{it:?}")).collect::<Vec<_>>()
        };
        assert_eq!(wrong(&allowed, &written), [""; 0], "allowed, and not written so");
        assert_eq!(wrong(&written, &allowed), [""; 0], "written, and not allowed");
    }
}
