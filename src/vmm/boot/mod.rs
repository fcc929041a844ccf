// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Boot: a kernel image in guest memory, and what its first vCPU starts with.
//!
//! What an image is, and what it is told and how, is the architecture's
//! ([`arch::boot`](super::arch::boot)). An image is somebody's file: every number in it is checked
//! against the file and against guest memory.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::arch::boot::{Image, ImageError, StartState, MEMORY_MIN};
use super::config::PayloadConfig;
use super::memory::MachineMemory;

/// Alignment of the initramfs, in bytes.
const MODULE_ALIGNMENT: u64 = 4096;

/// Why a machine cannot boot what it was given.
#[derive(Debug)]
pub struct BootError {
    what: &'static str,
    path: Option<PathBuf>,
    reason: Reason,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{} {}: {}", self.what, path.display(), self.reason),
            None => write!(f, "{}: {}", self.what, self.reason),
        }
    }
}

impl std::error::Error for BootError {}

impl BootError {
    /// Whether `--memory` is what is wrong, and no file.
    pub fn is_of_memory_size(&self) -> bool {
        matches!(self.reason, Reason::MemoryTooSmall(_))
    }
}

/// What is wrong with a file, or with the memory it should go to.
#[derive(Debug, thiserror::Error)]
enum Reason {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("not a regular file")]
    NotAFile,
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{length} bytes; the kernel has room for {max}")]
    CmdlineTooLong { length: usize, max: usize },
    #[error("contains a zero byte")]
    CmdlineZero,
    #[error("{0} bytes do not fit into guest memory beside the kernel")]
    NoRoom(u64),
    #[error(
        "{0:#x} bytes of guest memory are too few to boot; it takes more than {MEMORY_MIN:#x}"
    )]
    MemoryTooSmall(u64),
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Memory that holds a file for the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Module {
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

/// What a kernel is told, whatever the protocol.
#[derive(Debug, Clone, Copy)]
pub struct BootInfo<'a> {
    /// The machine's memory.
    pub memory: &'a MachineMemory,
    /// The command line, as long as the image takes at the most, without a zero byte.
    pub cmdline: &'a str,
    /// The initramfs.
    pub module: Option<Module>,
}

/// Loads `payload` into `memory`.
///
/// # Errors
/// Which file, and what is wrong with it.
pub fn load(memory: &MachineMemory, payload: &PayloadConfig) -> Result<StartState, BootError> {
    if memory.low_size() <= MEMORY_MIN {
        let reason = Reason::MemoryTooSmall(memory.low_size());
        return Err(BootError { what: "--memory", path: None, reason });
    }
    let in_kernel =
        |reason| BootError { what: "--kernel", path: Some(payload.kernel.clone()), reason };
    let in_image = |error: ImageError| in_kernel(error.into());
    let bytes = read_file(&payload.kernel).map_err(in_kernel)?;
    let image = Image::parse(&bytes).map_err(in_image)?;
    image.check(memory).map_err(in_image)?;

    check_cmdline(&payload.cmdline, image.cmdline_max()).map_err(|reason| BootError {
        what: "--cmdline",
        path: None,
        reason,
    })?;
    let module = payload
        .initramfs
        .as_ref()
        .map(|path| {
            place_module(memory, image.module_range(memory), path).map_err(|reason| BootError {
                what: "--initramfs",
                path: Some(path.clone()),
                reason,
            })
        })
        .transpose()?;
    image.load(&BootInfo { memory, cmdline: &payload.cmdline, module }).map_err(in_image)
}

fn read_file(path: &Path) -> Result<Vec<u8>, Reason> {
    // A directory or a device would be read for ever, or not at all.
    if !std::fs::metadata(path)?.is_file() {
        return Err(Reason::NotAFile);
    }
    Ok(std::fs::read(path)?)
}

fn check_cmdline(cmdline: &str, max: usize) -> Result<(), Reason> {
    let length = cmdline.len();
    if length > max {
        return Err(Reason::CmdlineTooLong { length, max });
    }
    if cmdline.as_bytes().contains(&0) {
        return Err(Reason::CmdlineZero);
    }
    Ok(())
}

/// Puts a file as high as it goes in `range`, from its first address to its end.
fn place_module(memory: &MachineMemory, range: (u64, u64), path: &Path) -> Result<Module, Reason> {
    let bytes = read_file(path)?;
    let length = bytes.len() as u64;
    let (first, end) = range;
    let start = end
        .checked_sub(length)
        .map(|start| start & !(MODULE_ALIGNMENT - 1))
        .filter(|start| *start >= first)
        .ok_or(Reason::NoRoom(length))?;
    memory.map().write_slice(&bytes, GuestAddress(start))?;
    Ok(Module { start, length })
}
