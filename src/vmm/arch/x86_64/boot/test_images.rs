// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Small kernel images for tests, including those of the command line.
#![allow(dead_code)]

/// Where the code of an image is loaded and starts.
pub const CODE_START: u32 = 0x10_0000;
/// Where the Multiboot header of an image is in the file.
pub const MULTIBOOT_HEADER: usize = 0x100;
/// Where the PVH note of an image is in the file.
pub const NOTE: usize = 0x200;
/// Where the code of an image is in the file.
pub const CODE: usize = 0x300;
/// Length of the zeros that follow the code in memory.
pub const ZEROS: u32 = 0x1000;
/// Offset of the first program header in an ELF64 image.
pub const PROGRAM_HEADER_64: usize = 64;
/// Offset of the first program header in an ELF32 image.
pub const PROGRAM_HEADER_32: usize = 52;

const ELF_32: u8 = 1;
const ELF_64: u8 = 2;

fn put(image: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset..end].copy_from_slice(bytes);
}

fn put_words(image: &mut Vec<u8>, offset: usize, words: &[u32]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(image, offset, &bytes);
}

fn put_long_words(image: &mut Vec<u8>, offset: usize, words: &[u64]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(image, offset, &bytes);
}

fn put_half_words(image: &mut Vec<u8>, offset: usize, words: &[u16]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(image, offset, &bytes);
}

fn put_ident(image: &mut Vec<u8>, class: u8, machine: u16) {
    put(image, 0, &[0x7f, b'E', b'L', b'F', class, 1, 1]);
    put_half_words(image, 16, &[2, machine]);
    put_words(image, 20, &[1]);
}

/// An ELF32 image with a Multiboot header of these flags.
pub fn multiboot_with_flags(code: &[u8], flags: u32) -> Vec<u8> {
    let mut image = Vec::new();
    put_ident(&mut image, ELF_32, 3);
    let program_headers = PROGRAM_HEADER_32 as u32;
    put_words(&mut image, 24, &[CODE_START, program_headers, 0, 0]);
    put_half_words(&mut image, 40, &[52, 32, 1]);
    let length = code.len() as u32;
    let load = [1, CODE as u32, CODE_START, CODE_START, length, length + ZEROS, 7, 4];
    put_words(&mut image, PROGRAM_HEADER_32, &load);
    let magic = 0x1bad_b002u32;
    let header = [magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags)];
    put_words(&mut image, MULTIBOOT_HEADER, &header);
    put(&mut image, CODE, code);
    image
}

/// An ELF32 image with a Multiboot header.
pub fn multiboot(code: &[u8]) -> Vec<u8> {
    multiboot_with_flags(code, 0b11)
}

/// An ELF64 image with a PVH entry.
pub fn pvh(code: &[u8]) -> Vec<u8> {
    let mut image = Vec::new();
    put_ident(&mut image, ELF_64, 62);
    let start = u64::from(CODE_START);
    put_long_words(&mut image, 24, &[start, PROGRAM_HEADER_64 as u64, 0]);
    put_half_words(&mut image, 52, &[64, 56, 2]);
    let length = code.len() as u64;
    put_words(&mut image, PROGRAM_HEADER_64, &[1, 7]);
    let load = [CODE as u64, start, start, length, length + u64::from(ZEROS), 4];
    put_long_words(&mut image, PROGRAM_HEADER_64 + 8, &load);
    put_words(&mut image, PROGRAM_HEADER_64 + 56, &[4, 4]);
    put_long_words(&mut image, PROGRAM_HEADER_64 + 64, &[NOTE as u64, 0, 0, 20, 20, 4]);
    put_words(&mut image, NOTE, &[4, 4, 18]);
    put(&mut image, NOTE + 12, b"Xen\0");
    put_words(&mut image, NOTE + 16, &[CODE_START]);
    put(&mut image, CODE, code);
    image
}

/// Offset of a bzImage's code in the file: after the boot sector and one sector of real-mode code.
pub const BZIMAGE_CODE: usize = 1024;
/// Where a bzImage of these tests unpacks itself to.
pub const UNPACKED_START: u32 = 0x20_0000;

/// A bzImage of boot protocol 2.15 whose protected-mode code is `code`, padded to 16 bytes.
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut image = Vec::new();
    let paragraphs = code.len().div_ceil(16);
    // setup_sects; syssize; boot_flag, jump, header, version; loadflags.
    put(&mut image, 0x1f1, &[1]);
    put_words(&mut image, 0x1f4, &[paragraphs as u32]);
    put_half_words(&mut image, 0x1fe, &[0xaa55, 0x66eb]);
    put(&mut image, 0x202, b"HdrS");
    put_half_words(&mut image, 0x206, &[0x020f]);
    put(&mut image, 0x211, &[1]);
    // code32_start; initrd_addr_max, kernel_alignment, relocatable_kernel; cmdline_size.
    put_words(&mut image, 0x214, &[CODE_START]);
    put_words(&mut image, 0x22c, &[0x7fff_ffff, UNPACKED_START, 1]);
    put_words(&mut image, 0x238, &[2047]);
    // pref_address, init_size.
    put_long_words(&mut image, 0x258, &[UNPACKED_START.into()]);
    put_words(&mut image, 0x260, &[0x10_0000]);
    put(&mut image, BZIMAGE_CODE, code);
    image.resize(BZIMAGE_CODE + paragraphs * 16, 0);
    image
}
