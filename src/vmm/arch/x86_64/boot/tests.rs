// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images that boot, and invalid files: each refused with its error, without a panic.

use std::io::Write;

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::test_images::*;
use super::*;
use crate::arch::x86_64::acpi::RSDP_ADDRESS;
use crate::boot::{load, BootError};
use crate::config::{ModuleConfig, PayloadConfig};

const RAM: u64 = 0x40_0000;

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn load_with(
    memory: &MachineMemory,
    image: &[u8],
    initramfs: Option<&[u8]>,
    cmdline: &str,
) -> Result<StartState, BootError> {
    let kernel = file(image);
    let initramfs = initramfs.map(file);
    let payload = PayloadConfig {
        kernel: kernel.path().to_owned(),
        initramfs: initramfs.as_ref().map(|file| file.path().to_owned()),
        cmdline: cmdline.to_owned(),
        ..PayloadConfig::default()
    };
    load(memory, &payload)
}

fn load_image(image: &[u8]) -> Result<StartState, BootError> {
    load_with(&MachineMemory::new(RAM).unwrap(), image, None, "")
}

fn word(memory: &MachineMemory, address: u64) -> u32 {
    memory.map().read_obj(GuestAddress(address)).unwrap()
}

fn string(memory: &MachineMemory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.map().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn text(memory: &MachineMemory, address: u32) -> String {
    let byte = |at| memory.map().read_obj::<u8>(GuestAddress(at)).unwrap();
    let bytes: Vec<u8> = (u64::from(address)..).map(byte).take_while(|byte| *byte != 0).collect();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_pvh_image_is_told_of_the_machine() {
    let memory = MachineMemory::new(RAM).unwrap();
    let start = load_with(&memory, &pvh(b"\xf4code"), Some(b"files"), "a=1 b").unwrap();
    assert_eq!(start.rip, u64::from(CODE_START));
    assert_eq!(string(&memory, start.rip, 5), b"\xf4code");
    let info = start.rbx;
    assert_eq!(word(&memory, info), 0x336e_c578);
    assert_eq!(word(&memory, info + 32), RSDP_ADDRESS as u32);
    // One module, whose address and size the list has.
    assert_eq!(word(&memory, info + 12), 1);
    let modules = u64::from(word(&memory, info + 16));
    assert_eq!(word(&memory, modules + 8), 5);
    assert_eq!(string(&memory, u64::from(word(&memory, modules)), 5), b"files");
    assert_eq!(string(&memory, u64::from(word(&memory, info + 24)), 6), b"a=1 b\0");
    // The memory map covers all RAM.
    let map = u64::from(word(&memory, info + 40));
    let entries = u64::from(word(&memory, info + 48));
    let ram: u64 = (0..entries)
        .map(|entry| map + entry * 24)
        .filter(|entry| word(&memory, entry + 16) == 1)
        .map(|entry| u64::from(word(&memory, entry + 8)))
        .sum();
    assert_eq!(ram, RAM - 0x6_0400);
}

#[test]
fn a_multiboot_image_is_told_of_the_machine() {
    let memory = MachineMemory::new(RAM).unwrap();
    let start = load_with(&memory, &multiboot(b"\xf4code"), Some(b"files"), "a=1 b").unwrap();
    assert_eq!((start.rip, start.rax), (u64::from(CODE_START), 0x2bad_b002));
    assert_eq!(string(&memory, start.rip, 5), b"\xf4code");
    let info = start.rbx;
    assert_eq!(word(&memory, info) & 0b100_1101, 0b100_1101);
    assert_eq!(word(&memory, info + 4), 639);
    assert_eq!(word(&memory, info + 8), 3 * 1024);
    // The name of the file, then the command line.
    let cmdline = text(&memory, word(&memory, info + 16));
    let (name, cmdline) = cmdline.split_once(' ').unwrap();
    assert!(name.starts_with(".tmp"), "{name}");
    assert_eq!(cmdline, "a=1 b");
    assert_eq!(text(&memory, word(&memory, info + 64)), "twostage");
    assert_eq!(word(&memory, info + 20), 1);
    let module = u64::from(word(&memory, info + 24));
    let (from, to) = (word(&memory, module), word(&memory, module + 4));
    assert_eq!(to - from, 5);
    assert_eq!(from % 4096, 0);
    assert_eq!(string(&memory, from.into(), 5), b"files");
    // The entries of the map fill its length.
    let (length, map) = (word(&memory, info + 44), word(&memory, info + 48));
    let mut at = 0;
    while at < length {
        at += word(&memory, u64::from(map + at)) + 4;
    }
    assert_eq!(at, length);
}

#[test]
fn a_multiboot_image_without_modules_has_the_command_line_as_it_is() {
    let memory = MachineMemory::new(RAM).unwrap();
    let start = load_with(&memory, &multiboot(b"\xf4"), None, "a=1 b").unwrap();
    assert_eq!(text(&memory, word(&memory, start.rbx + 16)), "a=1 b");
}

/// Two modules with command lines, and the memory and boot information of `image` with them.
fn load_modules(image: &[u8]) -> (MachineMemory, u64) {
    let memory = MachineMemory::new(RAM).unwrap();
    let (kernel, files) = (file(image), [file(b"kernel"), file(&[7; 5000])]);
    let modules = files.iter().zip(["a=1,2 b", ""]).map(|(file, cmdline)| ModuleConfig {
        path: file.path().to_owned(),
        cmdline: cmdline.to_owned(),
    });
    let (modules, kernel) = (modules.collect(), kernel.path().to_owned());
    let cmdline = "x".repeat(CMDLINE_SIZE - 1);
    let payload = PayloadConfig { kernel, modules, cmdline, ..PayloadConfig::default() };
    let start = load(&memory, &payload).unwrap();
    (memory, start.rbx)
}

#[test]
fn a_multiboot_image_has_modules_in_order() {
    let (memory, info) = load_modules(&multiboot(b"\xf4"));
    assert_eq!(word(&memory, info + 20), 2);
    let list = u64::from(word(&memory, info + 24));
    let entry = |number: u64| {
        let at = |field| word(&memory, list + number * 16 + field);
        let cmdline = text(&memory, at(8));
        (at(0), at(4), cmdline.split_once(' ').unwrap().1.to_owned())
    };
    let (first, second) = (entry(0), entry(1));
    assert_eq!(string(&memory, first.0.into(), 6), b"kernel");
    assert_eq!((first.1 - first.0, &*first.2), (6, "a=1,2 b"));
    assert_eq!(string(&memory, second.0.into(), 5000), [7; 5000]);
    assert_eq!((second.1 - second.0, &*second.2), (5000, ""));
    assert!(first.1 <= second.0 || second.1 <= first.0, "{first:x?} {second:x?}");
    assert!(text(&memory, word(&memory, info + 16)).ends_with(&"x".repeat(CMDLINE_SIZE - 1)));
}

#[test]
fn a_pvh_image_has_modules_in_order() {
    let (memory, info) = load_modules(&pvh(b"\xf4"));
    assert_eq!(word(&memory, info + 12), 2);
    let list = u64::from(word(&memory, info + 16));
    let entry = |number: u64| {
        let at = |field| word(&memory, list + number * 32 + field);
        (string(&memory, at(0).into(), 6), at(8), text(&memory, at(16)))
    };
    assert_eq!(entry(0), (b"kernel".to_vec(), 6, "a=1,2 b".to_owned()));
    assert_eq!(entry(1), (vec![7; 6], 5000, String::new()));
}

#[test]
fn modules_that_cannot_be_are_refused_by_name() {
    let refused = |image: &[u8], modules: Vec<ModuleConfig>| {
        let kernel = file(image);
        let kernel = kernel.path().to_owned();
        let payload = PayloadConfig { kernel, modules, ..PayloadConfig::default() };
        load(&MachineMemory::new(RAM).unwrap(), &payload).unwrap_err().to_string()
    };
    let there = file(b"module");
    let module =
        |cmdline: &str| ModuleConfig { path: there.path().to_owned(), cmdline: cmdline.to_owned() };
    let error = refused(&bzimage(b"\xf4"), vec![module("")]);
    assert!(error.contains("--module") && error.contains("say --initramfs"), "{error}");
    let error = refused(&multiboot(b"\xf4"), vec![module(""); MODULES_MAX + 1]);
    assert!(error.contains("one too many: there is room for 32"), "{error}");
    let error = refused(&pvh(b"\xf4"), vec![module(&"x".repeat(MODULE_CMDLINE_MAX + 1))]);
    assert!(error.contains("--module") && error.contains("3330 bytes"), "{error}");
    assert!(refused(&pvh(b"\xf4"), vec![module("a\0b")]).contains("zero byte"));
    let nowhere = ModuleConfig { path: "/nonexistent".into(), cmdline: String::new() };
    assert!(refused(&pvh(b"\xf4"), vec![nowhere]).contains("--module /nonexistent: No such"));
}

#[test]
fn a_bzimage_is_told_of_the_machine() {
    let memory = MachineMemory::new(RAM).unwrap();
    let start = load_with(&memory, &bzimage(b"\xf4code"), Some(b"files"), "a=1 b").unwrap();
    assert_eq!(start.rip, u64::from(CODE_START));
    assert_eq!(string(&memory, start.rip, 5), b"\xf4code");
    let zero_page = start.rsi;
    // The setup header is the file's, with the loader's fields filled in.
    assert_eq!(string(&memory, zero_page + 0x202, 4), b"HdrS");
    assert_eq!(word(&memory, zero_page + 0x210) & 0xff, 0xff);
    assert_eq!(word(&memory, zero_page + 0x70), RSDP_ADDRESS as u32);
    let cmdline = word(&memory, zero_page + 0x228);
    assert_eq!(string(&memory, cmdline.into(), 6), b"a=1 b\0");
    let (ramdisk, size) = (word(&memory, zero_page + 0x218), word(&memory, zero_page + 0x21c));
    assert_eq!(string(&memory, ramdisk.into(), 5), b"files");
    assert_eq!(size, 5);
    assert!(ramdisk >= UNPACKED_START + 0x10_0000, "the kernel would unpack itself over it");
    // The memory map covers all RAM.
    let entries = u64::from(word(&memory, zero_page + 0x1e8) & 0xff);
    let ram: u32 = (0..entries)
        .map(|entry| zero_page + 0x2d0 + entry * 20)
        .filter(|entry| word(&memory, entry + 16) == 1)
        .map(|entry| word(&memory, entry + 8))
        .sum();
    assert_eq!(u64::from(ram), RAM - 0x6_0400);
}

#[test]
fn bzimages_that_cannot_boot_are_refused_by_name() {
    let image = || bzimage(b"\xf4");
    refused(&image()[..0x240], "truncated: the setup header");
    refused(&image()[..BZIMAGE_CODE], "truncated: the kernel");
    refused(&patched(image(), 0x1f4, &[0xff; 4]), "truncated: the kernel");
    refused(&patched(image(), 0x206, &[0x09, 0x02]), "boot protocol 2.09");
    refused(&patched(image(), 0x211, &[0]), "boot protocol 2.15");
    refused(&patched(image(), 0x260, &[0xff; 4]), "unpack itself to 0x200000..0x1001fffff");
    refused(&patched(image(), 0x258, &[0xff; 8]), "which is not RAM");
    refused(&patched(image(), 0x202, b"HdrX"), "neither a bzImage");

    let memory = MachineMemory::new(RAM).unwrap();
    let error = load_with(&memory, &image(), None, &"x".repeat(2048)).unwrap_err().to_string();
    assert!(error.contains("--cmdline: 2048 bytes; the kernel has room for 2047"), "{error}");
    let large = vec![0; 0x10_0001];
    let error = load_with(&memory, &image(), Some(&large), "").unwrap_err().to_string();
    assert!(error.contains("--initramfs") && error.contains("do not fit"), "{error}");
}

#[test]
fn an_initramfs_stays_where_the_kernel_can_reach_it() {
    let memory = MachineMemory::new(0x80_0000).unwrap();
    let image = patched(bzimage(b"\xf4"), 0x22c, &0x3f_ffffu32.to_le_bytes());
    let start = load_with(&memory, &image, Some(b"files"), "").unwrap();
    assert_eq!(word(&memory, start.rsi + 0x218), 0x3f_f000);
}

#[test]
fn without_an_initramfs_there_is_no_module() {
    let memory = MachineMemory::new(RAM).unwrap();
    let start = load_with(&memory, &multiboot(b"\xf4"), None, "").unwrap();
    assert_eq!(word(&memory, start.rbx + 20), 0);
    let memory = MachineMemory::new(RAM).unwrap();
    let start = load_with(&memory, &pvh(b"\xf4"), None, "").unwrap();
    assert_eq!(word(&memory, start.rbx + 12), 0);
}

fn refused(image: &[u8], hint: &str) {
    let error = load_image(image).unwrap_err().to_string();
    assert!(error.starts_with("--kernel "), "{error}");
    assert!(error.contains(hint), "{error} does not say '{hint}'");
    assert!(!error.contains('\n'), "{error}");
}

fn patched(mut image: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn foreign_files_are_refused_by_name() {
    refused(b"", "neither a bzImage nor an ELF image");
    refused(b"#!/bin/sh\n", "neither a bzImage nor an ELF image");
    refused(b"\x7fELF", "truncated");
    refused(&patched(pvh(b"\xf4"), 4, &[7]), "class 7");
    refused(&patched(pvh(b"\xf4"), 5, &[2]), "big-endian");
    refused(&patched(pvh(b"\xf4"), 5, &[9]), "neither a bzImage nor an ELF image");
    refused(&patched(pvh(b"\xf4"), 18, &[183, 0]), "machine 183");
    refused(&patched(pvh(b"\xf4"), 18, &[3, 0]), "machine 3");
    refused(&patched(pvh(b"\xf4"), NOTE + 8, &[17]), "without a PVH entry");
    refused(&patched(multiboot(b"\xf4"), MULTIBOOT_HEADER + 8, &[0]), "Multiboot header");
    refused(&multiboot_with_flags(b"\xf4", 1 << 2), "a video mode");
    refused(&multiboot_with_flags(b"\xf4", 1 << 9), "a later version");
    refused(&multiboot_with_flags(b"\xf4", 1 << 16), "load addresses");
}

#[test]
fn images_that_do_not_fit_are_refused_by_name() {
    let header = PROGRAM_HEADER_32;
    let image = || multiboot(b"\xf4");
    refused(&patched(image(), header, &[0]), "no loadable segment");
    refused(&patched(image(), header + 4, &[0xff; 4]), "truncated: a segment");
    refused(&patched(image(), header + 16, &[0xff; 4]), "truncated: a segment");
    refused(&patched(image(), header + 20, &[0; 4]), "no loadable segment");
    refused(&patched(image(), header + 12, &[0, 0x60, 0, 0]), "0x6000 does not lie");
    refused(&patched(image(), header + 12, &[0xff; 4]), "0xffffffff does not lie");
    refused(&patched(image(), header + 20, &[0xff; 4]), "does not lie in guest memory");
    refused(&patched(image(), 24, &[0; 4]), "entry point 0x0");
    refused(&patched(image(), 28, &[0xff; 4]), "program header table");
    refused(&patched(image(), 42, &[1, 0]), "program header table");
    refused(&patched(image(), 44, &[0xff; 2]), "program header table");
    refused(&patched(pvh(b"\xf4"), NOTE + 16, &[0; 4]), "entry point 0x0");
    let physical = PROGRAM_HEADER_64 + 24;
    refused(&patched(pvh(b"\xf4"), physical, &[0xff; 8]), "does not lie in guest memory");
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    for image in [pvh(&[0xf4; 32]), multiboot(&[0xf4; 32])] {
        for length in 0..image.len() {
            assert!(load_image(&image[..length]).is_err(), "{length} bytes were taken");
        }
        load_image(&image).unwrap();
    }
}

#[test]
fn paths_and_sizes_are_checked() {
    let memory = MachineMemory::new(RAM).unwrap();
    let payload =
        |kernel: &str| PayloadConfig { kernel: kernel.into(), ..PayloadConfig::default() };
    let error = load(&memory, &payload("/nonexistent/kernel")).unwrap_err().to_string();
    assert!(error.contains("--kernel /nonexistent/kernel: No such file"), "{error}");
    let error = load(&memory, &payload("/")).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");

    let image = multiboot(b"\xf4");
    let long = "x".repeat(CMDLINE_SIZE);
    let error = load_with(&memory, &image, None, &long).unwrap_err().to_string();
    assert!(error.contains("--cmdline: 65536 bytes"), "{error}");
    let error = load_with(&memory, &image, None, "a\0b").unwrap_err().to_string();
    assert!(error.contains("zero byte"), "{error}");
    let large = vec![0; RAM as usize - CODE_START as usize];
    let error = load_with(&memory, &image, Some(&large), "").unwrap_err().to_string();
    assert!(error.contains("--initramfs") && error.contains("do not fit"), "{error}");
    let small = MachineMemory::new(0x10_0000).unwrap();
    let error = load_with(&small, &image, None, "").unwrap_err().to_string();
    assert!(error.contains("too few to boot"), "{error}");
}

proptest! {
    /// Headers with arbitrary contents are accepted or refused, without side effects.
    #[test]
    fn damaged_images_do_no_harm(
        which in 0..3,
        damage in prop::collection::vec((0usize..CODE, any::<u8>()), 1..16),
    ) {
        let mut image = match which {
            0 => pvh(&[0xf4; 16]),
            1 => multiboot(&[0xf4; 16]),
            _ => bzimage(&[0xf4; 16]),
        };
        for (offset, byte) in damage {
            image[offset] = byte;
        }
        let _ = load_image(&image);
    }
}

#[test]
fn the_map_names_ram_and_configuration_space() {
    let map = memory_map(&MachineMemory::new(0x200_0000).unwrap());
    assert_eq!(
        map,
        [
            MapEntry { start: 0, length: 0x9_fc00, kind: super::RAM },
            MapEntry { start: 0x9_fc00, length: 0x6_0400, kind: RESERVED },
            MapEntry { start: 0x10_0000, length: 0x1f0_0000, kind: super::RAM },
            MapEntry { start: ECAM_START, length: ECAM_SIZE, kind: RESERVED },
        ]
    );
}
