// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Access objects during unmaps: when an unmap returns, nobody uses what it removed.
//!
//! Mediated devices on several threads continuously pin a page, write to its memory, and unpin it;
//! others read and write by IOVA. A user maps and unmaps memory there, each time another page of
//! it, and quarantines the old page: it must not change.
//!
//! The last test shows that a device that keeps using unpinned memory is caught.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;

use twostage::iommufd::{Errno, HostIommu, MapTarget, ObjectId, Protection, UserMemory};
use twostage_emulated::{Access, AccessUnmap, EmulatedHost};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

const PAGE: u64 = 0x1000;
const IOVA: u64 = 0x10_0000;
const PLACES: u64 = 4;
const ROUNDS: usize = 3000;
/// Rounds within which misuse of a page must be noticed, generously.
const ROUNDS_TO_NOTICE: usize = 100_000;
const DEVICE_DATA: u8 = 0x22;
const QUARANTINE: u8 = 0xee;

/// A mediated device with its pinned page.
#[derive(Debug, Default)]
struct Mediated {
    access: OnceLock<Access>,
    /// Held while the page is used.
    pinned: Mutex<Option<UserMemory>>,
    /// Unpins on request, but keeps using the page.
    cheats: bool,
}

#[derive(Debug)]
struct Listener(Weak<Mediated>);

impl AccessUnmap for Listener {
    fn unmap(&self, _: u64, _: u64) {
        let Some(device) = self.0.upgrade() else { return };
        let mut pinned = device.pinned();
        let taken = if device.cheats { pinned.clone() } else { pinned.take() };
        if taken.is_some() {
            // Fails if a cheating device was asked before.
            let _ = device.access().unpin_pages(IOVA, PAGE);
        }
    }
}

impl Mediated {
    fn new(host: &Arc<EmulatedHost>, ioas: ObjectId, cheats: bool) -> Arc<Self> {
        let device = Arc::new(Self { cheats, ..Self::default() });
        let listener = Arc::new(Listener(Arc::downgrade(&device)));
        let access = host.access_create(Some(listener)).unwrap();
        access.attach(ioas).unwrap();
        device.access.set(access).unwrap();
        device
    }

    fn access(&self) -> &Access {
        self.access.get().expect("it was set when the device was made")
    }

    fn pinned(&self) -> MutexGuard<'_, Option<UserMemory>> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins the page if necessary, and writes to it.
    fn work(&self) {
        let mut pinned = self.pinned();
        if pinned.is_none() {
            match self.access().pin_pages(IOVA, PAGE, true) {
                Ok(mut pages) => *pinned = pages.pop(),
                Err(error) => assert!([Errno::ENOENT, Errno::EINVAL].contains(&error.errno)),
            }
        }
        if let Some(page) = &*pinned {
            page.slice().write_slice(&[DEVICE_DATA; 8], 8).unwrap();
        }
    }

    /// Unpins the page, if it is pinned. Nobody can observe it as given up but still pinned: an
    /// unmap waits for that no longer than for a listener that does nothing.
    fn rest(&self) {
        let mut pinned = self.pinned();
        if !self.cheats && pinned.take().is_some() {
            self.access().unpin_pages(IOVA, PAGE).unwrap();
        }
    }
}

/// Stops all threads, also when a check has failed: otherwise the test would wait for them forever.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Maps and unmaps while devices work; returns whether a page changed after it was unmapped.
fn run(rounds: usize, cheats: bool) -> bool {
    let host = EmulatedHost::new();
    let ioas = host.ioas_alloc().unwrap();
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), (PLACES * PAGE) as usize, None);
    let region = Arc::new(region.unwrap());
    let devices = [Mediated::new(&host, ioas, cheats), Mediated::new(&host, ioas, false)];
    let stop = AtomicBool::new(false);
    let mut stale = false;
    thread::scope(|scope| {
        let _stop_on_drop = StopOnDrop(&stop);
        for device in &devices {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    device.work();
                    device.rest();
                    thread::yield_now();
                }
            });
        }
        let reader = host.access_create(None).unwrap();
        let stopped = &stop;
        scope.spawn(move || {
            reader.attach(ioas).unwrap();
            let mut bytes = [0; 8];
            while !stopped.load(Ordering::Acquire) {
                if reader.read(IOVA + 8, &mut bytes).is_ok() {
                    assert!(!bytes.contains(&QUARANTINE), "a page that is not mapped was read");
                }
                let _ = reader.write(IOVA + 8, &[DEVICE_DATA; 8]);
                thread::yield_now();
            }
        });
        for round in 0..rounds as u64 {
            let place = round % PLACES * PAGE;
            let page = UserMemory::new(region.clone(), place, PAGE).unwrap();
            region.write_slice(&[0; PAGE as usize], MemoryRegionAddress(place)).unwrap();
            host.ioas_map(ioas, &page, MapTarget::Fixed(IOVA), Protection::READ_WRITE).unwrap();
            thread::yield_now();
            assert_eq!(host.ioas_unmap(ioas, IOVA, PAGE).unwrap(), PAGE);
            region.write_slice(&[QUARANTINE; PAGE as usize], MemoryRegionAddress(place)).unwrap();
            // It is checked when its turn comes again, or after the last round.
            let next = (round + 1) % PLACES * PAGE;
            stale |= round + 1 >= PLACES && changed(&region, next);
            if stale {
                break;
            }
        }
    });
    assert_eq!(host.pinned_bytes(), 0);
    stale
}

fn changed(region: &GuestRegionMmap, place: u64) -> bool {
    let mut bytes = [0; PAGE as usize];
    region.read_slice(&mut bytes, MemoryRegionAddress(place)).unwrap();
    bytes.iter().any(|byte| *byte != QUARANTINE)
}

#[test]
fn nothing_is_used_after_it_was_unmapped() {
    assert!(!run(ROUNDS, false));
}

#[test]
fn a_device_that_does_not_let_go_is_caught() {
    assert!(run(ROUNDS_TO_NOTICE, true));
}
