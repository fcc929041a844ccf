// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PVH boot protocol: an ELF64 image with a 32-bit physical entry.
//!
//! Source: Xen, `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`.

use std::io::Cursor;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::KernelLoader;
use vm_memory::GuestAddress;

use super::elf::ElfImage;
use super::memory_map::memory_map;
use super::{module_cmdlines, write_text, BootInfo, ImageError, StartState, CMDLINE_START};
use crate::arch::x86_64::acpi::RSDP_ADDRESS;

const START_INFO: u64 = 0x6000;
const MODULE_LIST: u64 = 0x6800;
const MEMORY_MAP: u64 = 0x7000;
const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;

/// Loads `image` and passes it `info`.
pub(super) fn load(image: &ElfImage<'_>, info: &BootInfo<'_>) -> Result<StartState, ImageError> {
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
    let mut params = BootParams::new(&start_info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(MODULE_LIST));
    PvhBootConfigurator::write_bootparams(&params, info.memory.map())?;
    Ok(StartState { rip: entry.0, rax: 0, rbx: START_INFO, rsi: 0 })
}
