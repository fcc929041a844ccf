// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a machine boots.

use std::path::PathBuf;

/// The payload of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PayloadConfig {
    /// A kernel that [`arch::boot`](crate::arch::boot) supports: on a PC, a bzImage, an ELF64 image
    /// with a PVH entry, or an ELF32 image with a Multiboot header.
    pub kernel: PathBuf,
    /// The kernel's initial file system. For a Multiboot or PVH kernel it is the first module, with
    /// the kernel's command line.
    pub initramfs: Option<PathBuf>,
    /// The modules of a Multiboot or PVH kernel, after that.
    pub modules: Vec<ModuleConfig>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// A file for a kernel that takes several, such as a hypervisor and its first guest's kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleConfig {
    /// The file.
    pub path: PathBuf,
    /// Its command line.
    pub cmdline: String,
}
