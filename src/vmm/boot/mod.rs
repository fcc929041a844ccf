// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Boot: a kernel image in guest memory, what it is told about the machine, and the state its
//! first vCPU starts in.
//!
//! Three ways: Linux's own protocol for a bzImage, the PVH entry of an ELF64 image, and Multiboot
//! (version 1) for an ELF32 image. All start in 32-bit protected mode with paging off. An image is
//! somebody's file: every number in it is checked against the file and against guest memory.
#![forbid(unsafe_code)]

mod bzimage;
mod elf;
mod memory_map;
mod multiboot;
mod pvh;
mod start_state;
#[cfg(test)]
mod test_images;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

pub use start_state::StartState;

use super::config::PayloadConfig;
use super::memory::MachineMemory;
use bzimage::BzImage;
use elf::{Class, ElfImage};

/// Kernels are loaded from here up; the memory below is for what they are told.
pub const KERNEL_START: u64 = 0x10_0000;
/// Where the command line goes.
const CMDLINE_START: u64 = 0x2_0000;
/// How long the command line may be, with the zero at its end.
const CMDLINE_SIZE: usize = 0x1_0000;
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

/// What is wrong with a file, or with the memory it should go to.
#[derive(Debug, thiserror::Error)]
enum Reason {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("not a regular file")]
    NotAFile,
    #[error("neither a bzImage nor an ELF image")]
    Unknown,
    #[error(
        "a Linux kernel of boot protocol {}.{:02}; it takes at least 2.10 and a bzImage",
        .0 >> 8, .0 & 0xff
    )]
    OldBootProtocol(u16),
    #[error("a kernel that wants to unpack itself to {start:#x}..{end:#x}, which is not RAM")]
    NoRoomToUnpack { start: u64, end: u64 },
    #[error("a big-endian ELF image; x86 is little-endian")]
    BigEndian,
    #[error("ELF class {0}; expected 1 (32-bit) or 2 (64-bit)")]
    Class(u8),
    #[error("an ELF image for machine {0}; expected 3 (i386) or 62 (x86-64)")]
    Machine(u16),
    #[error("truncated: {0} lies past the end of the file")]
    Truncated(&'static str),
    #[error("an ELF64 image without a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhEntry,
    #[error("an ELF32 image without a Multiboot header in its first 8 KiB")]
    NoMultibootHeader,
    #[error("its Multiboot header asks for {0}, which this loader does not have")]
    MultibootFlag(&'static str),
    #[error("no loadable segment")]
    NoSegments,
    #[error(
        "a segment of {length:#x} bytes at {start:#x} does not lie in guest memory from \
         {KERNEL_START:#x} up, where kernels are linked to; is it a kernel?"
    )]
    Outside { start: u64, length: u64 },
    #[error("the entry point {0:#x} is not in a segment")]
    Entry(u64),
    #[error("the ELF loader refused it: {0}")]
    Loader(#[from] linux_loader::loader::Error),
    #[error("the boot parameters cannot be written: {0}")]
    Parameters(#[from] linux_loader::configurator::Error),
    #[error("{length} bytes; the kernel has room for {max}")]
    CmdlineTooLong { length: usize, max: usize },
    #[error("contains a zero byte")]
    CmdlineZero,
    #[error("{0} bytes do not fit into guest memory beside the kernel")]
    NoRoom(u64),
    #[error(
        "{0:#x} bytes of guest memory are too few to boot; it takes more than {KERNEL_START:#x}"
    )]
    MemoryTooSmall(u64),
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Memory that holds a file for the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Module {
    start: u64,
    length: u64,
}

/// What a kernel is told, whatever the protocol.
struct BootInfo<'a> {
    memory: &'a MachineMemory,
    cmdline: u64,
    module: Option<Module>,
}

/// A kernel image whose headers are sound.
enum Image<'a> {
    Linux(BzImage<'a>),
    Elf(ElfImage<'a>),
}

impl<'a> Image<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Reason> {
        match BzImage::parse(bytes)? {
            Some(image) => Ok(Self::Linux(image)),
            None => ElfImage::parse(bytes).map(Self::Elf),
        }
    }

    /// What the kernel takes up must lie in RAM, clear of what it is told.
    fn check(&self, memory: &MachineMemory) -> Result<(), Reason> {
        match self {
            Self::Linux(image) => image.check(memory),
            Self::Elf(image) => check_segments(memory, image),
        }
    }

    /// How long the command line may be, in bytes, without the zero at its end.
    fn cmdline_max(&self) -> usize {
        match self {
            Self::Linux(image) => image.cmdline_max().min(CMDLINE_SIZE - 1),
            Self::Elf(_) => CMDLINE_SIZE - 1,
        }
    }

    /// Where a module may be: from the end of the kernel to the last address it can reach, in the
    /// first `low_size` bytes of memory.
    fn module_range(&self, low_size: u64) -> (u64, u64) {
        match self {
            Self::Linux(image) => (image.end(), low_size.min(image.module_end())),
            Self::Elf(image) => {
                let ends = image.segments.iter().map(|s| s.start + s.memory_size);
                let kernel_end = ends.filter(|end| *end <= low_size).max();
                (kernel_end.unwrap_or(KERNEL_START), low_size)
            }
        }
    }

    /// Loads the kernel and tells it `info`.
    fn load(&self, info: &BootInfo<'_>) -> Result<StartState, Reason> {
        match self {
            Self::Linux(image) => image.load(info),
            Self::Elf(image) => match image.class {
                Class::Elf64 => pvh::load(image, info),
                Class::Elf32 => multiboot::load(image, info),
            },
        }
    }
}

/// Loads `payload` into `memory`.
///
/// # Errors
/// Which file, and what is wrong with it.
pub fn load(memory: &MachineMemory, payload: &PayloadConfig) -> Result<StartState, BootError> {
    if !memory.contains(0, KERNEL_START + 1) {
        let reason = Reason::MemoryTooSmall(memory.low_size());
        return Err(BootError { what: "--memory", path: None, reason });
    }
    let in_kernel =
        |reason| BootError { what: "--kernel", path: Some(payload.kernel.clone()), reason };
    let bytes = read_file(&payload.kernel).map_err(in_kernel)?;
    let image = Image::parse(&bytes).map_err(in_kernel)?;
    image.check(memory).map_err(in_kernel)?;

    let cmdline = write_cmdline(memory, &payload.cmdline, image.cmdline_max())
        .map_err(|reason| BootError { what: "--cmdline", path: None, reason })?;
    let module = payload
        .initramfs
        .as_ref()
        .map(|path| {
            place_module(memory, image.module_range(memory.low_size()), path).map_err(|reason| {
                BootError { what: "--initramfs", path: Some(path.clone()), reason }
            })
        })
        .transpose()?;
    start_state::write_gdt(memory).map_err(|error| in_kernel(error.into()))?;
    image.load(&BootInfo { memory, cmdline, module }).map_err(in_kernel)
}

fn read_file(path: &Path) -> Result<Vec<u8>, Reason> {
    // A directory or a device would be read for ever, or not at all.
    if !std::fs::metadata(path)?.is_file() {
        return Err(Reason::NotAFile);
    }
    Ok(std::fs::read(path)?)
}

/// Every segment must lie in RAM, clear of what the kernel is told.
fn check_segments(memory: &MachineMemory, image: &ElfImage<'_>) -> Result<(), Reason> {
    if image.segments.is_empty() {
        return Err(Reason::NoSegments);
    }
    for segment in &image.segments {
        let (start, length) = (segment.start, segment.memory_size);
        if start < KERNEL_START || !memory.contains(start, length) {
            return Err(Reason::Outside { start, length });
        }
    }
    Ok(())
}

fn write_cmdline(memory: &MachineMemory, cmdline: &str, max: usize) -> Result<u64, Reason> {
    let bytes = cmdline.as_bytes();
    if bytes.len() > max {
        return Err(Reason::CmdlineTooLong { length: bytes.len(), max });
    }
    if bytes.contains(&0) {
        return Err(Reason::CmdlineZero);
    }
    // Guest memory starts out as zeros: the one at the end is there.
    memory.map().write_slice(bytes, GuestAddress(CMDLINE_START))?;
    Ok(CMDLINE_START)
}

/// Puts a file as high as it goes in `range`, which lies below 4 GiB.
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
