// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! bzImage: Linux's image, started at the 32-bit entry of its boot protocol.
//!
//! Source: Linux, `Documentation/arch/x86/boot.rst` and `zero-page.rst`.

use std::io::Cursor;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage;
use linux_loader::loader::KernelLoader;
use vm_memory::{ByteValued, GuestAddress};

use super::{memory_map, BootInfo, ImageError, StartState, CMDLINE_START, KERNEL_START};
use crate::arch::x86_64::acpi::RSDP_ADDRESS;
use crate::memory::MachineMemory;

/// Address of the boot parameters ("zero page").
const ZERO_PAGE: u64 = 0x7000;
/// Offset of the setup header in the file.
const SETUP_HEADER: usize = 0x1f1;
const SECTOR: usize = 512;
/// `boot_flag` and `header` of every kernel with a setup header.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The first version that says how much memory the kernel needs for unpacking, and where.
const VERSION_2_10: u16 = 0x020a;
/// `loadflags`: the protected-mode code is loaded at 1 MiB, which makes the image a bzImage.
const LOADED_HIGH: u8 = 1 << 0;
/// `setup_sects` of 0 stands for this many.
const DEFAULT_SETUP_SECTORS: usize = 4;
/// Unit of `syssize`.
const PARAGRAPH: usize = 16;
/// `type_of_loader` of a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `vid_mode`: keep the current mode.
const VIDEO_NORMAL: u16 = 0xffff;

/// A bzImage whose parts are within the file.
pub(crate) struct BzImage<'a> {
    bytes: &'a [u8],
    header: setup_header,
}

impl<'a> BzImage<'a> {
    /// Parses the image, if the file is for Linux's boot protocol at all.
    pub fn parse(bytes: &'a [u8]) -> Result<Option<Self>, ImageError> {
        let half_word =
            |offset: usize| Some(u16::from_le_bytes(*bytes.get(offset..)?.first_chunk()?));
        let word = |offset: usize| Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?));
        if half_word(0x1fe) != Some(BOOT_FLAG) || word(0x202) != Some(HEADER_MAGIC) {
            return Ok(None);
        }
        let header = *bytes
            .get(SETUP_HEADER..)
            .and_then(|rest| rest.get(..size_of::<setup_header>()))
            .and_then(setup_header::from_slice)
            .ok_or(ImageError::Truncated("the setup header"))?;
        if header.version < VERSION_2_10 || header.loadflags & LOADED_HIGH == 0 {
            return Err(ImageError::OldBootProtocol(header.version));
        }
        let image = Self { bytes, header };
        // Both numbers have at most 32 bits: the sum does not overflow.
        if bytes.len() < image.setup_size() + header.syssize as usize * PARAGRAPH {
            return Err(ImageError::Truncated("the kernel"));
        }
        Ok(Some(image))
    }

    /// Length of the boot sector and the real-mode code, which are not loaded.
    fn setup_size(&self) -> usize {
        let sectors = match self.header.setup_sects {
            0 => DEFAULT_SETUP_SECTORS,
            sectors => sectors.into(),
        };
        (1 + sectors) * SECTOR
    }

    /// Where the kernel unpacks itself, unless it randomizes the address.
    fn unpacked_start(&self) -> u64 {
        let alignment = u64::from(self.header.kernel_alignment).max(1);
        match self.header.relocatable_kernel {
            0 => self.header.pref_address,
            // At least 1 MiB, aligned; no preferred address is below that.
            _ => KERNEL_START.next_multiple_of(alignment).max(self.header.pref_address),
        }
    }

    /// End address, exclusive, of the memory that the kernel uses before it knows its memory map.
    pub fn end(&self) -> u64 {
        let loaded = KERNEL_START + (self.bytes.len() - self.setup_size()) as u64;
        self.unpacked_start().saturating_add(self.header.init_size.into()).max(loaded)
    }

    /// End address, exclusive, for an initramfs.
    pub fn module_end(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// Maximum length of the command line, in bytes, without the zero at its end.
    pub fn cmdline_max(&self) -> usize {
        self.header.cmdline_size as usize
    }

    /// The packed and the unpacked kernel must be in RAM.
    pub fn check(&self, memory: &MachineMemory) -> Result<(), ImageError> {
        let end = self.end();
        if memory.contains(KERNEL_START, end - KERNEL_START) {
            Ok(())
        } else {
            Err(ImageError::NoRoomToUnpack { start: self.unpacked_start(), end })
        }
    }

    /// Loads the kernel and passes it `info`.
    pub fn load(&self, info: &BootInfo<'_>) -> Result<StartState, ImageError> {
        let memory = info.memory.map();
        let mut file = Cursor::new(self.bytes);
        let loaded =
            bzimage::BzImage::load(memory, Some(GuestAddress(KERNEL_START)), &mut file, None)?;
        let mut params = boot_params { hdr: self.header, ..boot_params::default() };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.vid_mode = VIDEO_NORMAL;
        // All these addresses are below 4 GiB.
        params.hdr.code32_start = loaded.kernel_load.0 as u32;
        params.hdr.cmd_line_ptr = CMDLINE_START as u32;
        if let Some(module) = info.initramfs() {
            params.hdr.ramdisk_image = module.start as u32;
            params.hdr.ramdisk_size = module.length as u32;
        }
        params.acpi_rsdp_addr = RSDP_ADDRESS;
        let mut table = params.e820_table;
        let mut entries = 0;
        for (slot, entry) in table.iter_mut().zip(memory_map(info.memory)) {
            *slot = boot_e820_entry { addr: entry.start, size: entry.length, r#type: entry.kind };
            entries += 1;
        }
        params.e820_table = table;
        params.e820_entries = entries;
        let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
        LinuxBootConfigurator::write_bootparams(&params, memory)?;
        Ok(StartState { rip: loaded.kernel_load.0, rax: 0, rbx: 0, rsi: ZERO_PAGE })
    }
}
