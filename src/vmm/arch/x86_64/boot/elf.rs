// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ELF images: headers, checked against the file.
//!
//! Source: Tool Interface Standard, Executable and Linking Format 1.2, and the 64-bit draft 2.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::ImageError;

const MAGIC: [u8; 4] = *b"\x7fELF";
const DATA_LITTLE_ENDIAN: u8 = 1;
const DATA_BIG_ENDIAN: u8 = 2;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;

/// Identification, the same for both classes; `machine` follows `e_type`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Ident {
    magic: [u8; 4],
    class: u8,
    data: u8,
    _version_abi_padding: [u8; 10],
    _type: U16,
    machine: U16,
    _version: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header32 {
    _ident: [u8; 24],
    entry: U32,
    program_headers: U32,
    _section_headers: U32,
    _flags: U32,
    _header_size: U16,
    program_header_size: U16,
    program_header_count: U16,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header64 {
    _ident: [u8; 24],
    entry: U64,
    program_headers: U64,
    _section_headers: U64,
    _flags: U32,
    _header_size: U16,
    program_header_size: U16,
    program_header_count: U16,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ProgramHeader32 {
    kind: U32,
    offset: U32,
    _virtual_address: U32,
    physical_address: U32,
    file_size: U32,
    memory_size: U32,
    _flags: U32,
    _alignment: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ProgramHeader64 {
    kind: U32,
    _flags: U32,
    offset: U64,
    _virtual_address: U64,
    physical_address: U64,
    file_size: U64,
    memory_size: U64,
    _alignment: U64,
}

/// Width of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Elf32,
    Elf64,
}

/// A segment to be loaded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Segment<'a> {
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// The part that is in the file.
    pub bytes: &'a [u8],
    /// Its length in memory, at least that of `bytes`; the rest is zero.
    pub memory_size: u64,
}

/// An x86 image whose loadable segments are within the file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ElfImage<'a> {
    /// The whole file.
    pub bytes: &'a [u8],
    pub class: Class,
    /// `e_entry`.
    pub entry: u64,
    /// Non-empty segments of type PT_LOAD, in file order.
    pub segments: Vec<Segment<'a>>,
}

impl<'a> ElfImage<'a> {
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let magic = bytes.get(..MAGIC.len()).ok_or(ImageError::Unknown)?;
        if magic != MAGIC {
            return Err(ImageError::Unknown);
        }
        let (ident, _) =
            Ident::ref_from_prefix(bytes).map_err(|_| ImageError::Truncated("the ELF header"))?;
        debug_assert_eq!(ident.magic, MAGIC);
        let class = match ident.class {
            1 => Class::Elf32,
            2 => Class::Elf64,
            other => return Err(ImageError::Class(other)),
        };
        match ident.data {
            DATA_LITTLE_ENDIAN => {}
            DATA_BIG_ENDIAN => return Err(ImageError::BigEndian),
            _ => return Err(ImageError::Unknown),
        }
        match (class, ident.machine.get()) {
            (Class::Elf32, MACHINE_386 | MACHINE_X86_64) | (Class::Elf64, MACHINE_X86_64) => {}
            (_, other) => return Err(ImageError::Machine(other)),
        }
        let (entry, segments) = match class {
            Class::Elf32 => {
                let (header, _) = Header32::ref_from_prefix(bytes)
                    .map_err(|_| ImageError::Truncated("the ELF header"))?;
                let table = Table {
                    offset: header.program_headers.get().into(),
                    entry_size: header.program_header_size.get().into(),
                    count: header.program_header_count.get().into(),
                };
                let segments = table.segments(bytes, |entry: &ProgramHeader32| RawSegment {
                    kind: entry.kind.get(),
                    offset: entry.offset.get().into(),
                    start: entry.physical_address.get().into(),
                    file_size: entry.file_size.get().into(),
                    memory_size: entry.memory_size.get().into(),
                })?;
                (header.entry.get().into(), segments)
            }
            Class::Elf64 => {
                let (header, _) = Header64::ref_from_prefix(bytes)
                    .map_err(|_| ImageError::Truncated("the ELF header"))?;
                let table = Table {
                    offset: header.program_headers.get(),
                    entry_size: header.program_header_size.get().into(),
                    count: header.program_header_count.get().into(),
                };
                let segments = table.segments(bytes, |entry: &ProgramHeader64| RawSegment {
                    kind: entry.kind.get(),
                    offset: entry.offset.get(),
                    start: entry.physical_address.get(),
                    file_size: entry.file_size.get(),
                    memory_size: entry.memory_size.get(),
                })?;
                (header.entry.get(), segments)
            }
        };
        Ok(Self { bytes, class, entry, segments })
    }

    /// Whether `address` is in a segment.
    pub fn covers(&self, address: u64) -> bool {
        self.segments.iter().any(|segment| {
            address.checked_sub(segment.start).is_some_and(|offset| offset < segment.memory_size)
        })
    }
}

/// A program header of either class.
struct RawSegment {
    kind: u32,
    offset: u64,
    start: u64,
    file_size: u64,
    memory_size: u64,
}

/// The program header table, as described by the ELF header.
struct Table {
    offset: u64,
    entry_size: usize,
    count: usize,
}

impl Table {
    fn segments<'a, E>(
        &self,
        bytes: &'a [u8],
        raw: impl Fn(&E) -> RawSegment,
    ) -> Result<Vec<Segment<'a>>, ImageError>
    where
        E: FromBytes + Immutable + KnownLayout + Unaligned + 'a,
    {
        const TABLE: ImageError = ImageError::Truncated("the program header table");
        if self.count == 0 {
            return Ok(Vec::new());
        }
        if self.entry_size < size_of::<E>() {
            return Err(TABLE);
        }
        let table = usize::try_from(self.offset)
            .ok()
            .and_then(|offset| bytes.get(offset..))
            .and_then(|rest| rest.get(..self.entry_size.checked_mul(self.count)?))
            .ok_or(TABLE)?;
        let mut segments = Vec::new();
        for entry in table.chunks_exact(self.entry_size) {
            let (entry, _) = E::ref_from_prefix(entry).map_err(|_| TABLE)?;
            segments.extend(raw(entry).load(bytes)?);
        }
        Ok(segments)
    }
}

impl RawSegment {
    /// The segment, if it is to be loaded.
    fn load(self, bytes: &[u8]) -> Result<Option<Segment<'_>>, ImageError> {
        if self.kind != SEGMENT_LOAD || self.memory_size == 0 {
            return Ok(None);
        }
        let file = self
            .offset
            .checked_add(self.file_size)
            .and_then(|end| {
                let range = usize::try_from(self.offset).ok()?..usize::try_from(end).ok()?;
                bytes.get(range)
            })
            .ok_or(ImageError::Truncated("a segment"))?;
        if self.memory_size < self.file_size {
            return Err(ImageError::Truncated("a segment longer in the file than in memory"));
        }
        Ok(Some(Segment { start: self.start, bytes: file, memory_size: self.memory_size }))
    }
}
