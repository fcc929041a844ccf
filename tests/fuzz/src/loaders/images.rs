// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Small kernels of each kind.

const CODE: u32 = 0x10_0000;

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
pub fn multiboot() -> Vec<u8> {
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
pub fn pvh() -> Vec<u8> {
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
pub fn bzimage() -> Vec<u8> {
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
pub fn arm64() -> Vec<u8> {
    let mut image = vec![0; 64];
    put(&mut image, 8, 0x8_0000_u64.to_le_bytes());
    put(&mut image, 16, 0x1_0000_u64.to_le_bytes());
    put(&mut image, 24, [0x0a]);
    put(&mut image, 56, *b"ARMd");
    put(&mut image, 64, [0; 64]);
    image
}
