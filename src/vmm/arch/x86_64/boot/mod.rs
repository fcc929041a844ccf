// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernel images of a PC, and the state the first vCPU starts in.
//!
//! Three ways: Linux's own protocol for a bzImage, the PVH entry of an ELF64 image, and Multiboot
//! (version 1) for an ELF32 image. All start in 32-bit protected mode with paging off.

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

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub use start_state::StartState;

use crate::boot::BootInfo;
use crate::memory::MachineMemory;
use bzimage::BzImage;
use elf::{Class, ElfImage};

/// Kernels are loaded from here up; the memory below is for what they are told.
pub const KERNEL_START: u64 = 0x10_0000;
/// A machine that boots has more memory than this, in bytes.
pub const MEMORY_MIN: u64 = KERNEL_START;
/// Where the command line goes.
const CMDLINE_START: u64 = 0x2_0000;
/// How long the command line may be, with the zero at its end.
const CMDLINE_SIZE: usize = 0x1_0000;
/// Where the command lines of modules go, with what their files are called: a page for each. Before
/// it is room for what the kernel's file is called.
const MODULE_CMDLINES: u64 = 0x3_1000;
const MODULE_CMDLINE_SIZE: u64 = 0x1000;
/// Modules a kernel may have.
const MODULES_MAX: usize = 32;
/// Longest name of a file (`NAME_MAX`), three bytes for one where it is not text, and a blank.
const NAME_SIZE: usize = 3 * 255 + 1;
/// How long the command line of a module may be, in bytes, without the zero at its end.
pub const MODULE_CMDLINE_MAX: usize = MODULE_CMDLINE_SIZE as usize - NAME_SIZE - 1;

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not a kernel that is known here.
    #[error("neither a bzImage nor an ELF image")]
    Unknown,
    /// Too old a Linux.
    #[error(
        "a Linux kernel of boot protocol {}.{:02}; it takes at least 2.10 and a bzImage",
        .0 >> 8, .0 & 0xff
    )]
    OldBootProtocol(u16),
    /// A bzImage that finds no memory.
    #[error("a kernel that wants to unpack itself to {start:#x}..{end:#x}, which is not RAM")]
    NoRoomToUnpack {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// ELF of the other byte order.
    #[error("a big-endian ELF image; x86 is little-endian")]
    BigEndian,
    /// ELF of no class.
    #[error("ELF class {0}; expected 1 (32-bit) or 2 (64-bit)")]
    Class(u8),
    /// ELF for another processor.
    #[error("an ELF image for machine {0}; expected 3 (i386) or 62 (x86-64)")]
    Machine(u16),
    /// The file is too short for what it says.
    #[error("truncated: {0} lies past the end of the file")]
    Truncated(&'static str),
    /// ELF64 that is not for PVH.
    #[error("an ELF64 image without a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhEntry,
    /// ELF32 that is not for Multiboot.
    #[error("an ELF32 image without a Multiboot header in its first 8 KiB")]
    NoMultibootHeader,
    /// A Multiboot feature that is not here.
    #[error("its Multiboot header asks for {0}, which this loader does not have")]
    MultibootFlag(&'static str),
    /// Nothing to load.
    #[error("no loadable segment")]
    NoSegments,
    /// A segment that is not in memory.
    #[error(
        "a segment of {length:#x} bytes at {start:#x} does not lie in guest memory from \
         {KERNEL_START:#x} up, where kernels are linked to; is it a kernel?"
    )]
    Outside {
        /// Its first address.
        start: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// An entry point that is not code.
    #[error("the entry point {0:#x} is not in a segment")]
    Entry(u64),
    /// linux-loader found something.
    #[error("the ELF loader refused it: {0}")]
    Loader(#[from] linux_loader::loader::Error),
    /// linux-loader could not write.
    #[error("the boot parameters cannot be written: {0}")]
    Parameters(#[from] linux_loader::configurator::Error),
    /// Guest memory could not be written.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

impl ImageError {
    /// Whether the file's first bytes already tell that it is no kernel that is known here.
    pub(crate) fn is_of_no_kernel(&self) -> bool {
        matches!(self, Self::Unknown)
    }
}

/// A kernel image whose headers are sound.
pub(crate) enum Image<'a> {
    /// For Linux's own protocol.
    Linux(BzImage<'a>),
    /// For PVH or Multiboot.
    Elf(ElfImage<'a>),
}

impl<'a> Image<'a> {
    /// The image that the file `bytes` is.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        match BzImage::parse(bytes)? {
            Some(image) => Ok(Self::Linux(image)),
            None => ElfImage::parse(bytes).map(Self::Elf),
        }
    }

    /// What the kernel takes up must lie in RAM, clear of what it is told.
    ///
    /// # Errors
    /// It does not.
    pub fn check(&self, memory: &MachineMemory) -> Result<(), ImageError> {
        match self {
            Self::Linux(image) => image.check(memory),
            Self::Elf(image) => check_segments(memory, image),
        }
    }

    /// How long the command line may be, in bytes, without the zero at its end.
    pub fn cmdline_max(&self) -> usize {
        match self {
            Self::Linux(image) => image.cmdline_max().min(CMDLINE_SIZE - 1),
            Self::Elf(_) => CMDLINE_SIZE - 1,
        }
    }

    /// How many modules the kernel takes: Linux its initramfs alone.
    pub fn modules_max(&self) -> usize {
        match self {
            Self::Linux(_) => 1,
            Self::Elf(_) => MODULES_MAX,
        }
    }

    /// Where a module may be: from the end of the kernel to the last address it can reach, in the
    /// memory below 4 GiB.
    pub fn module_range(&self, memory: &MachineMemory) -> (u64, u64) {
        let low_size = memory.low_size();
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
    ///
    /// # Errors
    /// The kernel cannot be loaded after all.
    pub fn load(&self, info: &BootInfo<'_>) -> Result<StartState, ImageError> {
        start_state::write_gdt(info.memory)?;
        match self {
            Self::Linux(image) => {
                write_text(info.memory, CMDLINE_START, info.cmdline)?;
                image.load(info)
            }
            Self::Elf(image) => match image.class {
                Class::Elf64 => pvh::load(image, info),
                Class::Elf32 => multiboot::load(image, info),
            },
        }
    }
}

/// Writes `text`. Guest memory starts out as zeros: the one at its end is there.
fn write_text(memory: &MachineMemory, at: u64, text: &str) -> Result<(), GuestMemoryError> {
    memory.map().write_slice(text.as_bytes(), GuestAddress(at))
}

/// Where the command lines of the modules go, the first one's first.
fn module_cmdlines() -> impl Iterator<Item = u64> {
    (0..MODULES_MAX as u64).map(|number| MODULE_CMDLINES + MODULE_CMDLINE_SIZE * number)
}

/// Every segment must lie in RAM, clear of what the kernel is told.
fn check_segments(memory: &MachineMemory, image: &ElfImage<'_>) -> Result<(), ImageError> {
    if image.segments.is_empty() {
        return Err(ImageError::NoSegments);
    }
    for segment in &image.segments {
        let (start, length) = (segment.start, segment.memory_size);
        if start < KERNEL_START || !memory.contains(start, length) {
            return Err(ImageError::Outside { start, length });
        }
    }
    Ok(())
}
