// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC: Linux's own boot protocol, PVH and Multiboot.

use std::ffi::CStr;
use std::ops::Range;

use twostage_vmm::inside::{MachineMemory, StartState};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Loaded;

/// Below are the firmware's data, video memory and option ROMs; kernels are above.
const MEBIBYTE: u64 = 0x10_0000;
/// The kind of usable memory.
const RAM: u32 = 1;

/// A module as the kernel finds it: its bytes, and its command line.
type Found = (Range<u64>, Option<String>);

impl Loaded<'_> {
    fn word(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at, 4).try_into().expect("four bytes"))
    }

    fn wide(&self, at: u64) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
    }

    /// A text that ends with a zero.
    fn text(&self, at: u64) -> String {
        // Most are short.
        let text = |length| CStr::from_bytes_until_nul(&self.bytes(at, length)).map(CStr::to_owned);
        let text = text(0x100).or_else(|_| text(0x1_0400)).expect("it has an end");
        text.into_string().expect("text")
    }

    /// The kernel is in memory, and what it is told is true: so many bytes, of which these are the
    /// first, are in each module.
    pub fn check(&self, (contents, length): (&[u8], u64)) {
        let StartState { rax, rbx, rsi, .. } = self.start;
        let found = match (self.image.starts_with(b"\x7fELF"), rax) {
            (false, _) => self.linux(rsi),
            (true, 0) => self.pvh(rbx),
            (true, _) => self.multiboot(rbx, rax),
        };
        let files = self.payload.modules.len() + usize::from(self.payload.initramfs.is_some());
        assert_eq!(found.len(), files);
        let kernel = self.kernel();
        let mut taken = kernel.clone();
        for (number, (at, cmdline)) in found.into_iter().enumerate() {
            assert!(at.start % 4096 == 0 && at.start >= MEBIBYTE, "{at:x?}");
            assert!(taken.iter().all(|it| it.start >= at.end || at.start >= it.end), "{at:x?}");
            assert_eq!(at.end - at.start, length);
            // The rest of the file is zeroes.
            let mut bytes = self.bytes(at.start, length as usize);
            let rest = bytes.split_off(contents.len());
            assert!(bytes == contents && is_zero(&rest), "another module");
            if let Some(module) = self.payload.modules.get(number) {
                // Of the protocol that has them.
                let name = module.path.file_name().expect("a file").to_str().expect("a number");
                let cmdline = cmdline.expect("this protocol has them");
                let told = cmdline.strip_prefix(&format!("{name} ")).unwrap_or(&cmdline);
                assert_eq!(told, module.cmdline);
            }
            taken.push(at);
        }
    }

    /// Where the kernel is: it is as in its file.
    fn kernel(&self) -> Vec<Range<u64>> {
        let entry = self.start.rip;
        if !self.image.starts_with(b"\x7fELF") {
            let sectors = if self.image[0x1f1] == 0 { 4 } else { usize::from(self.image[0x1f1]) };
            let code = &self.image[(sectors + 1) * 512..];
            assert_eq!(entry, MEBIBYTE);
            assert!(self.bytes(entry, code.len()) == code, "other code");
            return std::iter::once(entry..entry + code.len() as u64).collect();
        }
        let segments = segments(self.image);
        let over =
            |one: &Range<u64>, other: &Range<u64>| one.start < other.end && other.start < one.end;
        let places: Vec<_> = segments.iter().map(|(at, _, size)| *at..at + size).collect();
        assert!(places.iter().any(|place| place.contains(&entry)), "nothing is at {entry:#x}");
        for (number, (start, bytes, size)) in segments.iter().enumerate() {
            let place = &places[number];
            // What a later one overwrites is not looked at.
            if places[number + 1..].iter().any(|later| over(place, later)) {
                continue;
            }
            let loaded = self.bytes(*start, *size as usize);
            assert!(loaded.starts_with(bytes), "a segment at {start:#x} is something else");
            let before = places[..number].iter().any(|earlier| over(place, earlier));
            let zeros = &loaded[bytes.len()..];
            assert!(before || is_zero(zeros), "no zeros after {start:#x}");
        }
        places
    }

    /// Linux's own protocol: the boot parameters are at `page`.
    fn linux(&self, page: u64) -> Vec<Found> {
        let header = self.bytes(page + 0x1f1, 0x26c - 0x1f1);
        let mut expected = self.image[0x1f1..0x26c].to_vec();
        let mut put = |at: usize, bytes: &[u8]| {
            expected[at - 0x1f1..][..bytes.len()].copy_from_slice(bytes);
        };
        // The current video mode; a loader without a number; where the kernel is.
        put(0x1fa, &[0xff; 2]);
        put(0x210, &[0xff]);
        put(0x214, &(self.start.rip as u32).to_le_bytes());
        let (initramfs, length) = (self.word(page + 0x218), self.word(page + 0x21c));
        let cmdline = self.word(page + 0x228);
        put(0x228, &cmdline.to_le_bytes());
        let has_initramfs = self.payload.initramfs.is_some();
        if has_initramfs {
            put(0x218, &initramfs.to_le_bytes());
            put(0x21c, &length.to_le_bytes());
        }
        assert_eq!(header, expected, "the setup header");
        assert_eq!(self.text(cmdline.into()), self.payload.cmdline);
        let entries = self.bytes(page + 0x1e8, 1)[0];
        self.map((0..u64::from(entries)).map(|number| {
            let at = page + 0x2d0 + 20 * number;
            (self.wide(at), self.wide(at + 8), self.word(at + 16))
        }));
        let start = u64::from(initramfs);
        let found = (start..start + u64::from(length), None);
        std::iter::once(found).filter(|_| has_initramfs).collect()
    }

    /// PVH: the information is at `info`.
    fn pvh(&self, info: u64) -> Vec<Found> {
        assert_eq!((self.word(info), self.word(info + 4)), (0x336e_c578, 1));
        assert_eq!(self.text(self.wide(info + 24)), self.payload.cmdline);
        let map = self.wide(info + 40);
        self.map((0..self.word(info + 48)).map(|number| {
            let at = map + 24 * u64::from(number);
            (self.wide(at), self.wide(at + 8), self.word(at + 16))
        }));
        let list = self.wide(info + 16);
        let module = |number: u32| {
            let at = list + 32 * u64::from(number);
            let start = self.wide(at);
            (start..start + self.wide(at + 8), Some(self.text(self.wide(at + 16))))
        };
        (0..self.word(info + 12)).map(module).collect()
    }

    /// Multiboot: the information is at `info`, and `magic` says so.
    fn multiboot(&self, info: u64, magic: u64) -> Vec<Found> {
        assert_eq!(magic, 0x2bad_b002);
        // Memory, command line, modules and map are there.
        assert_eq!(self.word(info) & 0x4d, 0x4d);
        let size = map_size(self.memory);
        assert_eq!(u64::from(self.word(info + 8)), (size - MEBIBYTE) >> 10);
        let cmdline = self.text(self.word(info + 16).into());
        let name = self.payload.kernel.file_name().expect("a file").to_str().expect("a number");
        match self.word(info + 20) {
            0 => assert_eq!(cmdline, self.payload.cmdline),
            _ => assert_eq!(cmdline, format!("{name} {}", self.payload.cmdline)),
        }
        let (length, map) = (self.word(info + 44), u64::from(self.word(info + 48)));
        assert_eq!(length % 24, 0);
        self.map((0..u64::from(length / 24)).map(|number| {
            let at = map + 24 * number;
            assert_eq!(self.word(at), 20, "the size of an entry");
            (self.wide(at + 4), self.wide(at + 12), self.word(at + 20))
        }));
        let list = u64::from(self.word(info + 24));
        let module = |number: u32| {
            let at = list + 16 * u64::from(number);
            let (start, end) = (self.word(at), self.word(at + 4));
            (start.into()..end.into(), Some(self.text(self.word(at + 8).into())))
        };
        (0..self.word(info + 20)).map(module).collect()
    }

    /// The memory map: all memory but the firmware's, once.
    fn map(&self, entries: impl Iterator<Item = (u64, u64, u32)>) {
        let (mut last, mut low, mut high) = (0, 0, 0);
        for (start, length, kind) in entries {
            assert!(start >= last, "entries overlap");
            last = start + length;
            match (kind, start) {
                (RAM, 0) => low = last,
                (RAM, _) => {
                    assert_eq!(start, MEBIBYTE);
                    high = last;
                }
                (2, _) => {}
                _ => panic!("memory of kind {kind}"),
            }
        }
        assert!((0x8_0000..=0xa_0000).contains(&low));
        assert_eq!(high, map_size(self.memory));
    }
}

/// Whether all are zeroes, which is not asked one by one.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(0x1000).all(|piece| *piece == [0; 0x1000][..piece.len()])
}

/// Bytes of memory.
fn map_size(memory: &MachineMemory) -> u64 {
    memory.map().iter().map(|region| region.len()).sum()
}

/// Loadable segments: address, bytes in the file, and size in memory.
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
