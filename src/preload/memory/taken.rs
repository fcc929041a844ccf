// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports what the program does to pinned memory that a kernel would keep for the devices and this
//! library cannot: the first, second, fourth time and so on.

use std::ffi::c_int;
use std::fmt::Arguments;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
use rustix::fs::Stat;

use twostage_emulated::maps::{self, FileKey};

use crate::memory::pins::Pins;
use crate::{state, sys};

/// How often one thing happened.
type Times = AtomicU64;

fn say(times: &Times, what: Arguments<'_>) {
    let times = times.fetch_add(1, Ordering::Relaxed) + 1;
    if times.is_power_of_two() {
        log::error!("{what} (so far {times} times)");
    }
}

/// The pins, if there may be any.
fn pins() -> Option<&'static Pins> {
    state::begun().map(|state| &*state.pins)
}

/// Whether pages of the file that is open as `fd` are pinned.
fn has_pinned(fd: RawFd) -> bool {
    let key = || sys::status(fd).ok().map(|status| key(&status));
    pins().is_some_and(|pins| key().is_some_and(|key| pins.has_file(&key)))
}

/// The key in lists of mappings of the file with `status`.
pub fn key(status: &Stat) -> FileKey {
    let (major, minor) = (libc::major(status.st_dev), libc::minor(status.st_dev));
    (format!("{major:02x}:{minor:02x}"), status.st_ino)
}

/// `length` bytes at `address` now have the protection `protection`.
pub fn protected(address: u64, length: u64, protection: c_int) {
    static TIMES: Times = Times::new(0);
    let both = libc::PROT_READ | libc::PROT_WRITE;
    if protection & both != both && pins().is_some_and(|pins| pins.seems_held(address, length)) {
        say(
            &TIMES,
            format_args!(
                "private memory at {address:#x} is pinned and now protected: devices can still \
                 access it, but an IOMMU cannot walk tables there"
            ),
        );
    }
}

/// The program gave `advice` on `length` bytes at `address`.
pub fn advised(address: u64, length: u64, advice: c_int) {
    /// `MADV_DONTNEED_LOCKED`, `MADV_GUARD_INSTALL`.
    const OTHERS: [c_int; 2] = [24, 102];
    static TIMES: Times = Times::new(0);
    let Some(pins) = pins() else { return };
    let discards =
        matches!(advice, libc::MADV_DONTNEED | libc::MADV_FREE) || OTHERS.contains(&advice);
    if discards && pins.seems_held(address, length) {
        say(
            &TIMES,
            format_args!(
                "private memory at {address:#x} is pinned and discarded: devices see the new \
                 pages, like the program, while on a kernel they keep the old ones"
            ),
        );
    }
    if advice == libc::MADV_REMOVE {
        let mapping = maps::find(sys::process_id(), address);
        if mapping.is_some_and(|mapping| pins.has_file(&mapping.file)) {
            cut();
        }
    }
}

/// `fallocate(2)` with `mode` was done on `fd`.
pub fn allocated(fd: RawFd, mode: c_int) {
    let cuts = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_ZERO_RANGE;
    if mode & cuts != 0 && has_pinned(fd) {
        cut();
    }
}

/// `fd` is about to be truncated or extended to `length` bytes.
pub fn resized(fd: RawFd, length: i64) {
    let shrinks = || sys::status(fd).is_ok_and(|status| status.st_size > length);
    if pins().is_some() && shrinks() && has_pinned(fd) {
        cut();
    }
}

fn cut() {
    static TIMES: Times = Times::new(0);
    say(
        &TIMES,
        format_args!(
            "a hole is punched in a pinned file: devices lose the pages, like the program, while \
             on a kernel they keep them"
        ),
    );
}
