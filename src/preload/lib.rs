// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `libtwostage_iommufd.so`: a program started with it in `LD_PRELOAD` sees `/dev/iommu`,
//! `/dev/vfio/vfio` and the VFIO devices of an emulated machine.
//!
//! ```text
//! program ──open, ioctl, read, mmap…──► hooks ──not ours──► the next library (libc)
//!                                         │ a descriptor of ours
//!                                         ▼
//!                   table: number → file; state: the files of this process
//!                                         │
//!                        own ◄────────────┴────────────► foreign: forwarded to the owner
//!                         ▼
//!                  devices: iommufd and VFIO devices over `twostage_emulated`
//! ```
//!
//! # What is promised
//!
//! * A descriptor of an emulated file is a real one: one end of a socket pair. It can be duplicated
//!   and polled, has close-on-exec as requested, and is counted by the kernel: the file ends with
//!   the last descriptor, in whichever process.
//! * The machine is created at the first open, and lives in the process that created it (the
//!   *owner*). Calls on a descriptor inherited through fork or exec, or received through a socket,
//!   are forwarded to the owner; if that is gone they fail with `ENODEV`. What a child opens itself
//!   is separate.
//! * exec ends the machine of the process that calls it. A program started by exec sees devices
//!   only if `LD_PRELOAD` is in its environment.
//! * A DMA that waits for a page (PRI) continues within the call that brings the response, in
//!   whichever process.
//! * Pinned memory stays: shared mappings are mapped a second time; private ones are kept when the
//!   program unmaps them, and accessed whatever protection the program sets (`memory/pins.rs`).
//!   `/proc/PID/status` shows the amount.
//! * The PCI bus, `vfio-dev`, IOMMU groups and IOMMUs in `/sys`, and the folders of `/dev/vfio`,
//!   are the machine's: those of the kernel are not visible. They are files in a folder that only
//!   this process uses (`sysfs.rs`).
//! * A call concurrent with `close`, `close_range` or `dup2` of its descriptor in another thread
//!   completes or fails with `EBADF`: it does not block.
//! * A process on whose behalf calls are made is identified by a pidfd: a later process with the
//!   same ID is another one.
//! * All other calls go unchanged to the next library. Nothing is set up before the first open;
//!   then a thread is started, which takes no signals. The first use of a path in the machine's
//!   `/sys`, or of a folder of `/dev/vfio`, allocates memory and makes files: not for a signal
//!   handler.
//!
//! # What is not
//!
//! * Calls that bypass libc's exported functions are not seen: direct system calls, and those
//!   within libc (`free` of pinned memory, `fopen` of a device).
//! * Paths are matched literally, as they are written from the root on: `/dev/iommu`, not `iommu`
//!   in `/dev`, nor anything relative to the current folder, nor through `..` or a link elsewhere.
//!   What is relative to an open folder of `/dev/vfio` or of the machine's `/sys` is found, and
//!   there `//`, `.` and `..` mean what they mean to the kernel. `/dev` does not list `iommu`.
//! * Not led to the machine's `/sys` and `/dev/vfio`: `chdir`, `creat`, `openat2`, `statfs`,
//!   `eaccess`, `scandirat`, `inotify_add_watch`, and `__xstat` and its kin (programs built for a
//!   glibc before 2.33). `preadv2` and `pwritev2` do not know the descriptors. With `O_PATH` a
//!   device is opened as without it.
//! * `glob`, `ftw` and `fts` look for files within libc, and see the kernel's `/sys`.
//! * Pages that the program discards (`MADV_DONTNEED` and similar, for private memory), or punches
//!   out of a file (holes, `MADV_REMOVE`, a shorter file), are lost to devices, too: they see what
//!   the program sees, while a kernel leaves them the pinned pages. Tables that an IOMMU walks must
//!   be in memory that stays readable and writable. Violations by `madvise`, `fallocate`,
//!   `ftruncate` and `mprotect` are reported on standard error (`memory/taken.rs`); others are not
//!   seen: `truncate` by path, `O_TRUNC`, `process_madvise`, or another process's `ftruncate`.
//! * A file sealed against writing (`F_SEAL_WRITE`, `F_SEAL_FUTURE_WRITE`) can be mapped for
//!   devices only for reading: `EINVAL`.
//! * Private memory of another process cannot be pinned: `EFAULT`. Pinned private memory cannot be
//!   moved or mapped over: `ENOMEM`. Descriptors of another process cannot be mapped: `ENODEV`.
//! * A socket polls as writable, so every descriptor does.
//! * A thread that unshares its descriptors (`CLOSE_RANGE_UNSHARE`) can keep using the files that
//!   it has, and exec; but what it opens from then on is not visible to this library's thread.
#![deny(missing_docs)]
// The hooks, which use everything else, are not exported in tests, and are not there for fuzzers.
#![cfg_attr(any(test, feature = "server"), allow(dead_code))]

mod callers;
mod config;
mod files;
#[cfg(not(feature = "server"))]
mod hooks;
mod logger;
mod memory;
mod next;
#[cfg(feature = "server")]
pub mod server;
mod state;
mod sys;
mod sysfs;
mod table;
mod trace;
mod world;
