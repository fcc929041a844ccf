// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The exit codes of the `twostage` command.
//!
//! A guest that ends the machine through the debug-exit port chooses the code itself: the value it
//! wrote, modulo 256; a guest that switches the machine off ends it with 0. The codes below are
//! those of the command; they follow `sysexits.h`.

/// The command line cannot be understood or contradicts itself.
pub const USAGE: u8 = 64;
/// A file that was named is missing, unreadable, or not what it should be.
pub const NO_INPUT: u8 = 66;
/// KVM, or something the machine needs of it or of the host's IOMMU, is not there.
pub const UNAVAILABLE: u8 = 69;
/// A thread of the machine panicked, or something else that is a bug here.
pub const SOFTWARE: u8 = 70;
/// The operating system refused a resource.
pub const OS_ERROR: u8 = 71;
/// A file could not be written.
pub const IO_ERROR: u8 = 74;
/// The guest reset itself: reset register, keyboard controller or triple fault.
pub const GUEST_RESET: u8 = 80;
/// KVM could not go on with the guest: an instruction it cannot run, a failed entry.
pub const GUEST_STUCK: u8 = 81;
/// Added to the number of the signal that ended the machine, as shells do.
pub const SIGNAL_BASE: u8 = 128;
