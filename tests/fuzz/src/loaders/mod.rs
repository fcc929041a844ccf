// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernels with mistakes, and their modules: files that somebody made.
//!
//! An image is refused with a message; or it is in guest memory as a naive reading of its headers
//! says, starts there, and finds the command line, its modules and the memory map as its boot
//! protocol has them.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use rustix::fs::{fcntl_add_seals, memfd_create, MemfdFlags, SealFlags};
use twostage_vmm::inside::{arm64_image, load, MachineMemory, ModuleConfig, PayloadConfig};

use crate::input::Input;

mod images;
mod naive;

/// Bytes of guest memory.
const MEMORY: u64 = 4 << 20;
/// Maximum number of changes of an image.
const MAX_CHANGES: u8 = 16;

/// One execution.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let choice = input.byte();
    let mut image = match choice % 8 {
        0 | 1 => images::multiboot(),
        2 | 3 => images::pvh(),
        4 | 5 => images::bzimage(),
        6 => images::arm64(),
        _ => input.bytes(600),
    };
    let changes = input.byte() % MAX_CHANGES;
    for _ in 0..changes {
        let at = match input.flag() {
            // Headers.
            true => input.below(0x80),
            false => usize::from(input.half()) % image.len().max(1),
        };
        let (size, value) = (input.pick(&[1, 2, 4, 8]), input.number());
        let value = value.to_le_bytes();
        image.iter_mut().skip(at).zip(&value[..size]).for_each(|(to, from)| *to = *from);
    }
    let cut = input.one_in(8);
    if cut {
        image.truncate(usize::from(input.half()));
    }
    if let Ok(header) = arm64_image::Header::parse(&image) {
        assert_eq!(&image[56..60], b"ARMd");
        assert!(header.memory_size >= image.len() as u64, "the image is not in its memory");
    }
    // As it was made, a kernel of this architecture is loaded.
    let kernels = if cfg!(target_arch = "x86_64") { 0..6 } else { 6..7 };
    let sound = changes == 0 && !cut && kernels.contains(&(choice % 8));
    payload(&mut input, &image, sound);
}

/// A file in memory of `length` bytes that starts with these, and its path while it exists.
fn file(bytes: &[u8], length: u64) -> (File, String) {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("fuzz", flags).expect("a file in memory"));
    file.write_all(bytes).expect("memory");
    file.set_len(length).expect("memory");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path)
}

/// A module: the start of a file, the rest of which is zeroes.
struct Module {
    length: u64,
    contents: Vec<u8>,
    path: String,
    /// While this exists.
    _file: File,
}

/// Those of all executions, of different sizes: nobody can write to them.
fn modules() -> &'static [Module; 6] {
    static MODULES: OnceLock<[Module; 6]> = OnceLock::new();
    MODULES.get_or_init(|| {
        [1, 100, 4096, 4097, 70_000, 5 << 20].map(|length: u64| {
            let contents: Vec<_> = (0..length.min(8192)).map(|at| at as u8 | 1).collect();
            let (file, path) = file(&contents, length);
            fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)
                .expect("a file in memory");
            Module { length, contents, path, _file: file }
        })
    })
}

/// Loads `image`, which is `sound` or perhaps not, with modules and a command line.
fn payload(input: &mut Input<'_>, image: &[u8], sound: bool) {
    let choice = input.byte();
    let (kernel, path) = file(image, image.len() as u64);
    let text = |length: usize| "x".repeat(length);
    let module = &modules()[input.below(6)];
    let modules = 0..if choice & 1 == 0 { 0 } else { input.byte() % 35 };
    let modules = modules.map(|number| ModuleConfig {
        path: module.path.clone().into(),
        cmdline: text(usize::from(number)),
    });
    let cmdline = match choice >> 5 {
        0 => text(usize::from(input.half())),
        1 => "a\0b".to_owned(),
        _ => "console=ttyS0".to_owned(),
    };
    let modules: Vec<_> = modules.collect();
    let initramfs = choice & 2 != 0 && modules.is_empty();
    let payload = PayloadConfig {
        kernel: path.into(),
        initramfs: initramfs.then(|| module.path.clone().into()),
        modules,
        cmdline,
    };
    let simple = payload.modules.is_empty() && !initramfs && choice & 0xc0 != 0;
    let memory = MachineMemory::new(if choice & 12 == 12 { 0x10_0000 } else { MEMORY });
    let memory = memory.expect("memory");
    match load(&memory, &payload) {
        Ok(start) => naive::Loaded { memory: &memory, image, payload: &payload, start }
            .check((&module.contents, module.length)),
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with("--"), "{error}");
            assert!(!sound || !simple || choice & 12 == 12, "{error}");
        }
    }
    drop(kernel);
}
