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
//! * A descriptor of an emulated file is a real one: one end of a socket pair. It is dup-able,
//!   pollable, closed on exec as asked, and counted by the kernel: the file ends with the last
//!   descriptor, in whichever process.
//! * The machine is made at the first open, and lives in the process that made it (the *owner*).
//!   Calls on a descriptor that was inherited through fork, exec or a socket are forwarded to the
//!   owner; when that is gone they fail with `ENODEV`. What a child opens itself is its own.
//! * exec ends the machine of the process that calls it. A program started by exec sees devices
//!   only when `LD_PRELOAD` is in its environment.
//! * A DMA that waits for a page (PRI) goes on within the call that brings the answer, in whichever
//!   process that is made.
//! * Memory that is pinned stays: shared mappings are mapped a second time, private ones are kept
//!   when the program unmaps them, and reached whatever rights it leaves itself (`memory/pins.rs`).
//!   `/proc/PID/status` says how much it is.
//! * A call beside `close`, `close_range` or `dup2` of its descriptor, in another thread, is done
//!   or fails with `EBADF`: it does not wait.
//! * A process that calls are forwarded for is known by a pidfd: what has its number later is
//!   another one.
//! * All other calls go to the next library as they are. Nothing is set up before the first open;
//!   then a thread is, which takes no signals.
//!
//! # What is not
//!
//! * Calls that do not go through libc's exported functions are not seen: system calls made by
//!   hand, and those that libc makes inside itself (`free` of pinned memory, `fopen` of a device).
//! * Paths are known as they stand: `/dev/iommu`, not `iommu` in `/dev`. `/dev/vfio` and `/sys`
//!   list none of the devices.
//! * Pages that the program discards (`MADV_DONTNEED` and the like of private memory), or cuts out
//!   of a file (holes, `MADV_REMOVE`, a shorter file), are gone for devices, too: they find what
//!   the program finds, where a kernel leaves them the pages that they had. Tables that an IOMMU
//!   walks must be in memory that stays readable and writable. Whenever that does not hold,
//!   standard error says so (`memory/taken.rs`).
//! * A file that is sealed against writing (`F_SEAL_WRITE`, `F_SEAL_FUTURE_WRITE`) can be mapped
//!   for devices to read only: `EINVAL`.
//! * Private memory of another process cannot be pinned: `EFAULT`. Pinned private memory cannot be
//!   moved or mapped over: `ENOMEM`. Descriptors of another process cannot be mapped: `ENODEV`.
//! * A socket polls as writable, so every descriptor does.
//! * A thread that takes descriptors of its own while the program has others
//!   (`CLOSE_RANGE_UNSHARE`) can go on with the files that it has, and exec; what it opens from
//!   then on does not reach this library's thread.
#![deny(missing_docs)]
// The hooks, which all else is for, are not exported from a test.
#![cfg_attr(test, allow(dead_code))]

mod callers;
mod config;
mod files;
mod hooks;
mod internal;
mod logger;
mod memory;
mod next;
mod sharing;
mod state;
mod sys;
mod table;
mod world;
