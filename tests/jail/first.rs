// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the C library does only once in a process, in jails of processes that have done nothing
//! else yet. It has its own main function, as a test harness has started threads before a test; the
//! processes are this program, started again.

mod filter;

use std::env;
use std::hint::black_box;
use std::process::{self, Command};
use std::sync::{Arc, Barrier};
use std::thread;

use seccompiler::{apply_filter, SeccompAction};
use twostage::iommufd::HostIommu;
use twostage::jail::{self, ThreadKind, GUEST, SETUP};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::unit::Smmuv3Builder;
use twostage::viommu::smmuv3::{SmmuInterrupt, SmmuInterrupts};
use twostage_emulated::{DeviceConfig, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use filter::filter;

struct NoInterrupts;

impl SmmuInterrupts for NoInterrupts {
    fn message(&self, _: u64, _: u32) -> bool {
        true
    }

    fn wire(&self, _: SmmuInterrupt) {}
}

/// From now on this thread is of that kind, and may end the process.
fn enter(kind: &ThreadKind) {
    let filter = filter(kind, &[libc::SYS_exit_group], SeccompAction::KillProcess);
    apply_filter(&filter.unwrap()).unwrap();
}

/// The main thread is in a jail when the library starts the first thread besides it.
fn the_first_thread() {
    enter(&SETUP);
    let (host, rid) = (EmulatedHost::new(), Bdf::from_raw(0x20));
    let unit = host.add_unit(SmmuV3Unit::new(SmmuV3UnitConfig::default()));
    host.add_device("nic", unit, rid, DeviceConfig::default()).unwrap();
    let dev = host.device_bind("nic").unwrap();
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let ioas = GuestIoas::new(host).unwrap();
    let unit = Smmuv3Builder::new(ioas, Arc::new(memory), Arc::new(NoInterrupts));
    drop(unit.device(rid, dev, "nic").build().unwrap());
}

/// A thread that may do little returns memory to the kernel.
fn the_first_return_of_memory() {
    jail::prepare().unwrap();
    let guest = thread::spawn(|| {
        enter(&GUEST);
        drop([(); 4].map(|()| black_box(vec![1u8; 100_000])));
    });
    guest.join().unwrap();
}

/// Threads that may do little have memory of their own, more of them than the C library takes
/// without asking how many processors there are.
fn memory_of_many_threads() {
    const MANY: usize = 20;
    jail::prepare().unwrap();
    let threads = [libc::SYS_clone3, libc::SYS_set_robust_list, libc::SYS_rseq];
    let own = [&threads[..], &[libc::SYS_prctl, libc::SYS_gettid, libc::SYS_exit_group]].concat();
    apply_filter(&filter(&GUEST, &own, SeccompAction::KillProcess).unwrap()).unwrap();
    let all = Barrier::new(MANY);
    thread::scope(|scope| {
        for _ in 0..MANY {
            scope.spawn(|| {
                drop(black_box(vec![1u8; 1000]));
                all.wait();
            });
        }
    });
}

const FIRST: [(&str, fn()); 3] = [
    ("the-first-thread", the_first_thread),
    ("the-first-return-of-memory", the_first_return_of_memory),
    ("memory-of-many-threads", memory_of_many_threads),
];

fn main() {
    let asked = env::args().nth(1);
    if let Some((_, first)) = FIRST.iter().find(|(name, _)| asked.as_deref() == Some(name)) {
        first();
        process::exit(0);
    }
    for (name, _) in FIRST {
        let status = Command::new(env::current_exe().unwrap()).arg(name).status().unwrap();
        assert!(status.success(), "{name}: {status}; strace -f shows which call is in no table");
    }
    eprintln!("what happens once in a process, in jails: ok");
}
