// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process around the machine: signals, named files, its jail and limits, stop reasons, and
//! exit codes.

pub(crate) mod bell;
pub(crate) mod disposition;
pub(crate) mod event_loop;
pub(crate) mod heap;
pub(crate) mod jail;
pub(crate) mod last_line;
pub(crate) mod limits;
pub(crate) mod named_file;
pub(crate) mod overdue;
pub(crate) mod signals;
pub(crate) mod stack;
pub(crate) mod stop;

/// The exit codes of the `twostage` command.
///
/// A guest that ends the machine through the debug-exit port chooses the code: the value it wrote,
/// modulo 256; powering off gives 0. The codes below are those of the command; they follow
/// `sysexits.h`.
pub mod exit_code {
    /// The command line is invalid or contradicts itself.
    pub const USAGE: u8 = 64;
    /// A named file is missing, unreadable, or invalid.
    pub const NO_INPUT: u8 = 66;
    /// KVM, or a required feature of it or of the host's IOMMU, is missing.
    pub const UNAVAILABLE: u8 = 69;
    /// A thread of the machine panicked, or another bug.
    pub const SOFTWARE: u8 = 70;
    /// The operating system refused a resource, or does not answer after `Ctrl-A x`.
    pub const OS_ERROR: u8 = 71;
    /// A file could not be written.
    pub const IO_ERROR: u8 = 74;
    /// The jail refused a system call: an attack, or a bug.
    pub const REFUSED: u8 = 77;
    /// The guest reset itself: reset register, keyboard controller or triple fault.
    pub const GUEST_RESET: u8 = 80;
    /// KVM could not run the guest: an instruction it cannot emulate, a failed entry.
    pub const GUEST_STUCK: u8 = 81;
    /// Added to the number of the signal that ended the machine, as shells do.
    pub const SIGNAL_BASE: u8 = 128;
}
