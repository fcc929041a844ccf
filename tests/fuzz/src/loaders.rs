// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernels with mistakes, and their modules: files that somebody made.
//!
//! An image is refused with a message; or it is in guest memory as a naive reading of its headers
//! says, and starts there.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use rustix::fs::{memfd_create, MemfdFlags};
use twostage_vmm::inside::{arm64_image, load, MachineMemory, ModuleConfig, PayloadConfig};
#[cfg(target_arch = "x86_64")]
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;

/// Bytes of guest memory.
const MEMORY: u64 = 4 << 20;
const CODE: u32 = 0x10_0000;
/// Maximum number of changes of an image.
const MAX_CHANGES: u8 = 16;

/// One execution.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.byte();
    let mut image = match choice % 8 {
        0 | 1 => multiboot(),
        2 | 3 => pvh(),
        4 | 5 => bzimage(),
        6 => arm64(),
        _ => input.bytes(600),
    };
    for _ in 0..input.byte() % MAX_CHANGES {
        let at = match input.flag() {
            // Headers.
            true => input.below(0x80),
            false => usize::from(input.half()) % image.len().max(1),
        };
        let (size, value) = (input.pick(&[1, 2, 4, 8]), input.number());
        let value = value.to_le_bytes();
        image.iter_mut().skip(at).zip(&value[..size]).for_each(|(to, from)| *to = *from);
    }
    if input.one_in(8) {
        image.truncate(usize::from(input.half()));
    }
    if let Ok(header) = arm64_image::Header::parse(&image) {
        assert_eq!(&image[56..60], b"ARMd");
        assert!(header.memory_size >= image.len() as u64, "the image is not in its memory");
    }
    payload(&mut input, &image);
}

/// A file in memory, and its path while it exists.
fn file(bytes: &[u8]) -> (File, String) {
    let mut file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.write_all(bytes).expect("memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path)
}

fn payload(input: &mut Input<'_>, image: &[u8]) {
    let choice = input.byte();
    let (kernel, path) = file(image);
    let text = |length: usize| "x".repeat(length);
    let contents = vec![0xa5; input.pick(&[1, 100, 4096, 4097, 70_000, 5 << 20])];
    let (module, module_path) = file(&contents);
    let modules = 0..if choice & 1 == 0 { 0 } else { input.byte() % 35 };
    let modules = modules.map(|number| ModuleConfig {
        path: module_path.clone().into(),
        cmdline: text(usize::from(number)),
    });
    let cmdline = match choice >> 5 {
        0 => text(usize::from(input.half())),
        1 => "a\0b".to_owned(),
        _ => "console=ttyS0".to_owned(),
    };
    let payload = PayloadConfig {
        kernel: path.into(),
        initramfs: (choice & 2 != 0).then(|| module_path.clone().into()),
        modules: modules.collect(),
        cmdline,
    };
    let memory = MachineMemory::new(if choice & 12 == 12 { 0x10_0000 } else { MEMORY });
    let memory = memory.expect("memory");
    match load(&memory, &payload) {
        Ok(_start) => {
            #[cfg(target_arch = "x86_64")]
            check(&memory, image, &payload, &contents, _start.rip);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    drop((kernel, module));
}

/// The image was loaded, and starts at `entry`.
#[cfg(target_arch = "x86_64")]
fn check(
    memory: &MachineMemory,
    image: &[u8],
    payload: &PayloadConfig,
    contents: &[u8],
    entry: u64,
) {
    let modules = payload.modules.len() + usize::from(payload.initramfs.is_some());
    if image.starts_with(b"\x7fELF") {
        let segments = segments(image);
        let mut covered = false;
        for (at, (start, bytes, size)) in segments.iter().enumerate() {
            covered |= (*start..start + size).contains(&entry);
            // What a later segment or a module overwrites is not looked at.
            let later = segments[at + 1..].iter();
            if modules > 0 || later.clone().any(|(s, _, l)| *s < start + size && *start < s + l) {
                continue;
            }
            let mut loaded = vec![0; *size as usize];
            memory.map().read_slice(&mut loaded, GuestAddress(*start)).expect("it is in memory");
            assert!(loaded.starts_with(bytes), "a segment at {start:#x} is something else");
            let zeros = &loaded[bytes.len()..];
            let before = segments[..at].iter().any(|(s, _, l)| *s < start + size && *start < s + l);
            assert!(before || zeros.iter().all(|byte| *byte == 0), "no zeros after {start:#x}");
        }
        assert!(covered, "it starts at {entry:#x}, where nothing is");
    }
    if modules > 0 {
        // Somewhere, at a page.
        let mut page = [0; 64];
        let start = contents.len().min(64);
        let found = (0..MEMORY / 4096).any(|number| {
            let at = GuestAddress(number * 4096);
            memory.map().read_slice(&mut page[..start], at).is_ok()
                && page[..start] == contents[..start]
        });
        assert!(found, "no module is in memory");
    }
}

/// Loadable segments: address, bytes in the file, and size in memory.
#[cfg(target_arch = "x86_64")]
fn segments(image: &[u8]) -> Vec<(u64, &[u8], u64)> {
    let wide = image[4] == 2;
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&image[at..at + size]);
        u64::from_le_bytes(bytes)
    };
    let (table, entry, count) = match wide {
        true => (number(32, 8), number(54, 2), number(56, 2)),
        false => (number(28, 4), number(42, 2), number(44, 2)),
    };
    let mut all = Vec::new();
    for index in 0..count {
        let at = (table + index * entry) as usize;
        if number(at, 4) != 1 {
            continue;
        }
        let (offset, address, in_file, in_memory) = match wide {
            true => (number(at + 8, 8), number(at + 24, 8), number(at + 32, 8), number(at + 40, 8)),
            false => {
                (number(at + 4, 4), number(at + 12, 4), number(at + 16, 4), number(at + 20, 4))
            }
        };
        let bytes = &image[offset as usize..(offset + in_file) as usize];
        if in_memory > 0 {
            all.push((address, bytes, in_memory));
        }
    }
    all
}

fn put<const N: usize>(image: &mut Vec<u8>, at: usize, bytes: [u8; N]) {
    if image.len() < at + N {
        image.resize(at + N, 0);
    }
    image[at..at + N].copy_from_slice(&bytes);
}

fn words(image: &mut Vec<u8>, at: usize, words: &[u32]) {
    for (word, at) in words.iter().zip((at..).step_by(4)) {
        put(image, at, word.to_le_bytes());
    }
}

/// An ELF32 image with a Multiboot header.
fn multiboot() -> Vec<u8> {
    let mut image = Vec::new();
    put(&mut image, 0, *b"\x7fELF\x01\x01\x01");
    put(&mut image, 16, [2, 0, 3, 0, 1]);
    words(&mut image, 24, &[CODE, 52]);
    put(&mut image, 40, [52, 0, 32, 0, 1]);
    words(&mut image, 52, &[1, 0x300, CODE, CODE, 16, 0x1000, 7, 1]);
    let (magic, flags) = (0x1bad_b002_u32, 3_u32);
    words(&mut image, 0x100, &[magic, flags, 0_u32.wrapping_sub(magic.wrapping_add(flags))]);
    put(&mut image, 0x300, [0xf4; 16]);
    image
}

/// An ELF64 image with the note of a PVH entry.
fn pvh() -> Vec<u8> {
    let mut image = Vec::new();
    put(&mut image, 0, *b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, [2, 0, 62, 0, 1]);
    words(&mut image, 24, &[CODE, 0, 64, 0]);
    put(&mut image, 52, [64, 0, 56, 0, 2]);
    words(&mut image, 64, &[1, 7, 0x300, 0, CODE, 0, CODE, 0, 16, 0, 0x1000, 0, 0x1000, 0]);
    words(&mut image, 120, &[4, 4, 0x200, 0, 0, 0, 0, 0, 20, 0, 20, 0, 4, 0]);
    words(&mut image, 0x200, &[4, 4, 18]);
    put(&mut image, 0x20c, *b"Xen\0");
    words(&mut image, 0x210, &[CODE]);
    put(&mut image, 0x300, [0xf4; 16]);
    image
}

/// A Linux of boot protocol 2.15.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024];
    put(&mut image, 0x1f1, [1]);
    put(&mut image, 0x1fe, [0x55, 0xaa]);
    put(&mut image, 0x201, [0x6a]);
    put(&mut image, 0x202, *b"HdrS");
    put(&mut image, 0x206, [0x0f, 2]);
    put(&mut image, 0x211, [1]);
    words(&mut image, 0x214, &[CODE]);
    words(&mut image, 0x22c, &[0x7fff_ffff, 0x20_0000]);
    put(&mut image, 0x234, [1, 21]);
    words(&mut image, 0x238, &[2047]);
    put(&mut image, 0x258, (0x20_0000_u64).to_le_bytes());
    words(&mut image, 0x260, &[0x1_0000]);
    put(&mut image, 1024, [0xf4; 64]);
    image
}

/// An Image for arm64.
fn arm64() -> Vec<u8> {
    let mut image = vec![0; 64];
    put(&mut image, 8, 0x8_0000_u64.to_le_bytes());
    put(&mut image, 16, 0x1_0000_u64.to_le_bytes());
    put(&mut image, 24, [0x0a]);
    put(&mut image, 56, *b"ARMd");
    put(&mut image, 64, [0; 64]);
    image
}
