// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An arm64 machine: Linux's Image.
//!
//! Source: Linux, `Documentation/arch/arm64/booting.rst`.

use std::ops::Range;

use twostage_vmm::inside::StartState;

use super::Loaded;

/// First address of RAM.
const RAM: u64 = 0x4000_0000;
/// What a kernel is placed by, and how much of the device tree it maps.
const STEP: u64 = 2 << 20;

impl Loaded<'_> {
    /// The kernel is in memory, and the file beside it, and nothing else: so many bytes, of which
    /// these are the first, are in that.
    pub fn check(&self, (contents, length): (&[u8], u64)) {
        let StartState { pc, device_tree, initramfs } = self.start;
        let field =
            |at: usize| u64::from_le_bytes(self.image[at..at + 8].try_into().expect("eight bytes"));
        let file = self.image.len() as u64;
        // An old one that says no size does not say where it belongs, either.
        let (offset, size) = match field(16) {
            0 => (0x8_0000, file),
            size => (field(8), size),
        };
        assert!(size >= file, "{size:#x} bytes for {file:#x}");
        assert!(pc >= RAM + offset && (pc - offset) % STEP == 0, "{offset:#x} at {pc:#x}");
        let mut taken = vec![device_tree..device_tree + STEP, pc..pc + size];
        assert!(device_tree % 8 == 0, "{device_tree:#x}");

        let memory: u64 = self.memory.ranges().map(|(_, length)| length).sum();
        let mut expected = vec![0; memory as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            expected[(at - RAM) as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        put(pc, self.image);
        assert!(self.payload.modules.is_empty(), "no protocol has them");
        assert_eq!(initramfs.is_some(), self.payload.initramfs.is_some());
        if let Some(initramfs) = initramfs {
            assert_eq!(initramfs.length, length);
            // The rest of the file is zeroes.
            put(initramfs.start, contents);
            taken.push(initramfs.start..initramfs.start + length);
        }
        taken.sort_by_key(|place| place.start);
        let apart = |pair: &[Range<u64>]| pair[0].end <= pair[1].start;
        assert!(taken.windows(2).all(apart), "{taken:x?}");
        let in_ram = |place: &Range<u64>| place.start >= RAM && place.end <= RAM + memory;
        assert!(taken.iter().all(in_ram), "{taken:x?}");
        // The device tree is written later.
        assert!(self.bytes(RAM, memory as usize) == expected, "something else is in memory");
    }
}
