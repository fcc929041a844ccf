// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernel images for a PC, and the first vCPU's initial state.
//!
//! Three protocols: Linux's own for a bzImage, the PVH entry of an ELF64 image, and Multiboot
//! (version 1) for an ELF32 image. All start in 32-bit protected mode with paging disabled.

mod bzimage;
mod elf;
mod elf_protocols;
mod start_state;
#[cfg(test)]
mod test_images;
#[cfg(test)]
mod tests;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub use start_state::StartState;

use super::layout::{ECAM_SIZE, ECAM_START, EXTENDED_BIOS_DATA};
use crate::boot::BootInfo;
use crate::memory::MachineMemory;
use bzimage::BzImage;
use elf::ElfImage;

/// Kernels are loaded from here up; the boot information is below.
pub const KERNEL_START: u64 = 0x10_0000;
/// A machine that boots has more memory than this, in bytes.
pub const MEMORY_MIN: u64 = KERNEL_START;
/// Address of the command line.
const CMDLINE_START: u64 = 0x2_0000;
/// Maximum length of the command line, including the zero at its end.
const CMDLINE_SIZE: usize = 0x1_0000;
/// Address of the modules' command lines with their file names: a page each. The kernel's file name
/// is before it.
const MODULE_CMDLINES: u64 = 0x3_1000;
const MODULE_CMDLINE_SIZE: u64 = 0x1000;
/// Maximum number of modules.
const MODULES_MAX: usize = 32;
/// Longest file name (`NAME_MAX`), three bytes for each that is not text, and a blank.
const NAME_SIZE: usize = 3 * 255 + 1;
/// Maximum length of a module's command line, in bytes, without the zero at its end.
pub const MODULE_CMDLINE_MAX: usize = MODULE_CMDLINE_SIZE as usize - NAME_SIZE - 1;

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not a kernel known here.
    #[error("neither a bzImage nor an ELF image")]
    Unknown,
    /// A Linux that is too old.
    #[error(
        "a Linux kernel of boot protocol {}.{:02}; it takes at least 2.10 and a bzImage",
        .0 >> 8, .0 & 0xff
    )]
    OldBootProtocol(u16),
    /// There is no memory for a bzImage.
    #[error("a kernel that wants to unpack itself to {start:#x}..{end:#x}, which is not RAM")]
    NoRoomToUnpack {
        /// First address.
        start: u64,
        /// End address, exclusive.
        end: u64,
    },
    /// ELF in the other byte order.
    #[error("a big-endian ELF image; x86 is little-endian")]
    BigEndian,
    /// ELF of an unknown class.
    #[error("ELF class {0}; expected 1 (32-bit) or 2 (64-bit)")]
    Class(u8),
    /// ELF for another processor.
    #[error("an ELF image for machine {0}; expected 3 (i386) or 62 (x86-64)")]
    Machine(u16),
    /// The file is shorter than its headers say.
    #[error("truncated: {0} lies past the end of the file")]
    Truncated(&'static str),
    /// ELF64 that is not for PVH.
    #[error("an ELF64 image without a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhEntry,
    /// ELF32 that is not for Multiboot.
    #[error("an ELF32 image without a Multiboot header in its first 8 KiB")]
    NoMultibootHeader,
    /// A Multiboot feature that is not supported.
    #[error("its Multiboot header asks for {0}, which this loader does not have")]
    MultibootFlag(&'static str),
    /// There is nothing to load.
    #[error("no loadable segment")]
    NoSegments,
    /// A segment that is not in guest memory.
    #[error(
        "a segment of {length:#x} bytes at {start:#x} does not lie in guest memory from \
         {KERNEL_START:#x} up, where kernels are linked to; is it a kernel?"
    )]
    Outside {
        /// Its first address.
        start: u64,
        /// Its size in bytes.
        length: u64,
    },
    /// An entry point outside of the segments.
    #[error("the entry point {0:#x} is not in a segment")]
    Entry(u64),
    /// An error of linux-loader.
    #[error("the ELF loader refused it: {0}")]
    Loader(#[from] linux_loader::loader::Error),
    /// linux-loader could not write the parameters.
    #[error("the boot parameters cannot be written: {0}")]
    Parameters(#[from] linux_loader::configurator::Error),
    /// Guest memory could not be written.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

impl ImageError {
    /// Whether the file's first bytes show that it is not a kernel known here.
    pub(crate) fn is_of_no_kernel(&self) -> bool {
        matches!(self, Self::Unknown)
    }
}

/// A kernel image with valid headers.
pub(crate) enum Image<'a> {
    /// For Linux's own protocol.
    Linux(BzImage<'a>),
    /// For PVH or Multiboot.
    Elf(ElfImage<'a>),
}

impl<'a> Image<'a> {
    /// Parses the file `bytes`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        match BzImage::parse(bytes)? {
            Some(image) => Ok(Self::Linux(image)),
            None => ElfImage::parse(bytes).map(Self::Elf),
        }
    }

    /// Checks that the kernel's memory is RAM and does not overlap the boot information.
    ///
    /// # Errors
    /// It does not.
    pub fn check(&self, memory: &MachineMemory) -> Result<(), ImageError> {
        match self {
            Self::Linux(image) => image.check(memory),
            Self::Elf(image) => check_segments(memory, image),
        }
    }

    /// Maximum length of the command line, in bytes, without the zero at its end.
    pub fn cmdline_max(&self) -> usize {
        match self {
            Self::Linux(image) => image.cmdline_max().min(CMDLINE_SIZE - 1),
            Self::Elf(_) => CMDLINE_SIZE - 1,
        }
    }

    /// Maximum number of modules; Linux only takes its initramfs.
    pub fn modules_max(&self) -> usize {
        match self {
            Self::Linux(_) => 1,
            Self::Elf(_) => MODULES_MAX,
        }
    }

    /// Allowed range for a module: from the end of the kernel to the last address it can reach, in
    /// the memory below 4 GiB.
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

    /// Loads the kernel and passes it `info`.
    ///
    /// # Errors
    /// The kernel cannot be loaded.
    pub fn load(&self, info: &BootInfo<'_>) -> Result<StartState, ImageError> {
        start_state::write_gdt(info.memory)?;
        match self {
            Self::Linux(image) => {
                write_text(info.memory, CMDLINE_START, info.cmdline)?;
                image.load(info)
            }
            Self::Elf(image) => elf_protocols::load(image, info),
        }
    }
}

/// Writes `text`. Guest memory is initially zero, so it is zero-terminated.
fn write_text(memory: &MachineMemory, at: u64, text: &str) -> Result<(), GuestMemoryError> {
    memory.map().write_slice(text.as_bytes(), GuestAddress(at))
}

/// Addresses of the modules' command lines, in order.
fn module_cmdlines() -> impl Iterator<Item = u64> {
    (0..MODULES_MAX as u64).map(|number| MODULE_CMDLINES + MODULE_CMDLINE_SIZE * number)
}

/// Every segment must be in RAM and not overlap the boot information.
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

/// Type numbers of a PC's BIOS, which all protocols use: usable memory.
const RAM: u32 = 1;
/// Reserved.
const RESERVED: u32 = 2;
/// Start of the legacy area: the BIOS's extended data, video and option ROMs.
const LEGACY_START: u64 = EXTENDED_BIOS_DATA;
/// End of the legacy area.
const LEGACY_END: u64 = 0x10_0000;

/// One range of the memory map for a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MapEntry {
    start: u64,
    length: u64,
    kind: u32,
}

/// The map of `memory`, ascending.
fn memory_map(memory: &MachineMemory) -> Vec<MapEntry> {
    let mut entries = vec![
        MapEntry { start: 0, length: LEGACY_START, kind: RAM },
        MapEntry { start: LEGACY_START, length: LEGACY_END - LEGACY_START, kind: RESERVED },
    ];
    for (start, length) in memory.ranges() {
        // The first region contains the legacy area: a machine that boots has more memory than
        // that.
        let skipped = if start == 0 { LEGACY_END } else { 0 };
        entries.push(MapEntry {
            start: start + skipped,
            length: length.saturating_sub(skipped),
            kind: RAM,
        });
    }
    entries.push(MapEntry { start: ECAM_START, length: ECAM_SIZE, kind: RESERVED });
    entries.sort_by_key(|entry| entry.start);
    entries
}
