// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The boot protocols of ELF images: PVH starts an ELF64 image at its 32-bit physical entry, and
//! Multiboot an ELF32 image with a header near its start.
//!
//! Source: Xen, `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`; Multiboot
//! Specification 0.6.96, §3.1 (header), §3.2 (machine state), §3.3 (boot information).

use std::io::Cursor;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::KernelLoader;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::elf::{Class, ElfImage};
use super::{
    memory_map, module_cmdlines, write_text, BootInfo, ImageError, StartState, CMDLINE_START,
};
use crate::arch::x86_64::acpi::RSDP_ADDRESS;
use crate::arch::x86_64::layout::BASE_MEMORY_KIB;
use crate::boot::Module;

/// Guest-physical addresses of the boot information and its parts, the same for both.
const INFORMATION: u64 = 0x6000;
const LOADER_NAME: u64 = 0x6700;
const MODULE_LIST: u64 = 0x6800;
const MEMORY_MAP: u64 = 0x7000;

/// Loads `image` and passes it `info`.
pub(super) fn load(image: &ElfImage<'_>, info: &BootInfo<'_>) -> Result<StartState, ImageError> {
    match image.class {
        Class::Elf64 => load_pvh(image, info),
        Class::Elf32 => load_multiboot(image, info),
    }
}

/// PVH: magic number and version of the boot information.
const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;

/// Loads `image` through its PVH entry.
fn load_pvh(image: &ElfImage<'_>, info: &BootInfo<'_>) -> Result<StartState, ImageError> {
    let loaded = Elf::load(info.memory.map(), None, &mut Cursor::new(image.bytes), None)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(ImageError::NoPvhEntry);
    };
    if !image.covers(entry.0) {
        return Err(ImageError::Entry(entry.0));
    }
    let map: Vec<_> = memory_map(info.memory)
        .into_iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.length,
            type_: entry.kind,
            reserved: 0,
        })
        .collect();
    write_text(info.memory, CMDLINE_START, info.cmdline)?;
    let mut modules = Vec::new();
    for (module, cmdline) in info.modules.iter().zip(module_cmdlines()) {
        write_text(info.memory, cmdline, module.cmdline)?;
        modules.push(hvm_modlist_entry {
            paddr: module.memory.start,
            size: module.memory.length,
            cmdline_paddr: cmdline,
            ..hvm_modlist_entry::default()
        });
    }
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULE_LIST },
        cmdline_paddr: CMDLINE_START,
        rsdp_paddr: RSDP_ADDRESS,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(INFORMATION));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(MODULE_LIST));
    PvhBootConfigurator::write_bootparams(&params, info.memory.map())?;
    Ok(StartState { rip: entry.0, rax: 0, rbx: INFORMATION, rsi: 0 })
}

/// Multiboot: the header must be within so many bytes of the file's start.
const SEARCH: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u32 = 0x2bad_b002;

/// Header flags: an image with an unsupported flag in bits 0 to 15 must be refused.
const HEADER_VIDEO: u32 = 1 << 2;
const HEADER_ADDRESSES: u32 = 1 << 16;
/// Page-aligned modules, and memory information: both are always given.
const HEADER_HONOURED: u32 = 0b11;
const HEADER_REQUIRED: u32 = 0xffff;

/// Flags of the boot information: which of its fields are valid.
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFORMATION_GIVEN: u32 =
    INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: U32,
    flags: U32,
    checksum: U32,
}

/// Multiboot §3.3, up to the last field used here.
#[derive(Default, IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Information {
    flags: U32,
    /// KiB from 0 up.
    mem_lower: U32,
    /// KiB from 1 MiB up.
    mem_upper: U32,
    boot_device: U32,
    cmdline: U32,
    mods_count: U32,
    mods_addr: U32,
    syms: [U32; 4],
    mmap_length: U32,
    mmap_addr: U32,
    drives: [U32; 2],
    config_table: U32,
    boot_loader_name: U32,
    _rest: [U32; 7],
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ModuleEntry {
    mod_start: U32,
    mod_end: U32,
    string: U32,
    reserved: U32,
}

/// `size` does not count itself.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct MemoryMapEntry {
    size: U32,
    base_addr: U64,
    length: U64,
    kind: U32,
}

/// Loads `image` as its Multiboot header asks.
fn load_multiboot(image: &ElfImage<'_>, info: &BootInfo<'_>) -> Result<StartState, ImageError> {
    let flags = find_header(image.bytes).ok_or(ImageError::NoMultibootHeader)?;
    if flags & HEADER_ADDRESSES != 0 {
        return Err(ImageError::MultibootFlag(
            "load addresses other than the ELF program headers'",
        ));
    }
    if flags & HEADER_VIDEO != 0 {
        return Err(ImageError::MultibootFlag("a video mode"));
    }
    if flags & HEADER_REQUIRED & !HEADER_HONOURED != 0 {
        return Err(ImageError::MultibootFlag("a feature of a later version"));
    }
    if !image.covers(image.entry) {
        return Err(ImageError::Entry(image.entry));
    }
    let memory = info.memory.map();
    for segment in &image.segments {
        // The rest is zero, as guest memory is initially.
        memory.write_slice(segment.bytes, GuestAddress(segment.start))?;
    }

    let map: Vec<u8> = memory_map(info.memory)
        .into_iter()
        .flat_map(|entry| {
            let entry = MemoryMapEntry {
                size: ((size_of::<MemoryMapEntry>() - size_of::<U32>()) as u32).into(),
                base_addr: entry.start.into(),
                length: entry.length.into(),
                kind: entry.kind.into(),
            };
            entry.as_bytes().to_vec()
        })
        .collect();
    memory.write_slice(&map, GuestAddress(MEMORY_MAP))?;
    let mut information = Information {
        flags: INFORMATION_GIVEN.into(),
        mem_lower: u32::from(BASE_MEMORY_KIB).into(),
        mem_upper: kib_above_1_mib(info.memory.low_size()).into(),
        cmdline: low(CMDLINE_START),
        mmap_length: (map.len() as u32).into(),
        mmap_addr: low(MEMORY_MAP),
        boot_loader_name: low(LOADER_NAME),
        ..Information::default()
    };
    // With modules, each string begins with the file name, as boot loaders of this protocol have
    // always done: kernels that load modules skip the first word (Xen). A kernel without modules
    // gets its command line as it is.
    let cmdline = match info.modules.is_empty() {
        true => info.cmdline.to_owned(),
        false => format!("{} {}", info.name, info.cmdline),
    };
    write_text(info.memory, CMDLINE_START, &cmdline)?;
    write_text(info.memory, LOADER_NAME, "twostage")?;
    let mut list = Vec::new();
    for (module, string) in info.modules.iter().zip(module_cmdlines()) {
        write_text(info.memory, string, &format!("{} {}", module.name, module.cmdline))?;
        let Module { start, length } = module.memory;
        let entry = ModuleEntry {
            mod_start: low(start),
            mod_end: low(start + length),
            string: low(string),
            reserved: 0.into(),
        };
        list.extend_from_slice(entry.as_bytes());
        information.mods_addr = low(MODULE_LIST);
    }
    memory.write_slice(&list, GuestAddress(MODULE_LIST))?;
    information.mods_count = (info.modules.len() as u32).into();
    memory.write_slice(information.as_bytes(), GuestAddress(INFORMATION))?;
    Ok(StartState { rip: image.entry, rax: LOADER_MAGIC.into(), rbx: INFORMATION, rsi: 0 })
}

/// The flags of the header, which is 4-byte aligned and whose words sum to 0.
fn find_header(bytes: &[u8]) -> Option<u32> {
    let bytes = &bytes[..bytes.len().min(SEARCH)];
    (0..bytes.len()).step_by(4).find_map(|offset| {
        let (header, _) = Header::ref_from_prefix(bytes.get(offset..)?).ok()?;
        let sum = header.magic.get().wrapping_add(header.flags.get());
        (header.magic == HEADER_MAGIC && sum.wrapping_add(header.checksum.get()) == 0)
            .then(|| header.flags.get())
    })
}

/// An address below 4 GiB, as are all addresses of the protocol.
fn low(address: u64) -> U32 {
    (address as u32).into()
}

/// `mem_upper` for `low_size` bytes of memory below 4 GiB.
fn kib_above_1_mib(low_size: u64) -> u32 {
    // Less than 4 GiB, so the KiB fit.
    (low_size.saturating_sub(1 << 20) >> 10) as u32
}
