// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Image: Linux's own kernel image for arm64.
//!
//! Source: Linux, `Documentation/arch/arm64/booting.rst`, "Call the kernel image".

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"ARM\x64";
/// Kernels before Linux 3.17 give neither their size nor a reliable load offset.
const TEXT_OFFSET_OF_OLD: u64 = 0x8_0000;
/// Flag: the kernel is big-endian.
const BIG_ENDIAN: u64 = 1 << 0;

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not a kernel that is known here.
    #[error(
        "not an arm64 Linux Image{hint}",
        hint = .0.map_or(String::new(), |kind| format!(", but {kind}"))
    )]
    Unknown(Option<&'static str>),
    /// A kernel of the other byte order.
    #[error("a big-endian kernel; this machine is little-endian")]
    BigEndian,
    /// The file is longer than the memory that the kernel claims.
    #[error("{file} bytes, more than the {memory} that its header declares")]
    TooLong {
        /// Length of the file.
        file: u64,
        /// Bytes of memory.
        memory: u64,
    },
    /// There is no memory for the kernel.
    #[error("a kernel that occupies {start:#x}..{end:#x}, which is not RAM")]
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code, reason = "nothing is loaded"))]
    NoRoom {
        /// First address.
        start: u64,
        /// End address, exclusive.
        end: u64,
    },
    /// Guest memory could not be written.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

impl ImageError {
    /// Whether the file's first bytes show that it is not a kernel known here.
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code, reason = "for arm64's loader"))]
    pub(crate) fn is_of_no_kernel(&self) -> bool {
        matches!(self, Self::Unknown(_))
    }
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    code: [U32; 2],
    text_offset: U64,
    image_size: U64,
    flags: U64,
    reserved: [U64; 3],
    magic: [u8; 4],
    pe_header: U32,
}

/// The fields of an image's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Offset of the image from a 2 MiB boundary; it starts there.
    pub text_offset: u64,
    /// Memory that the kernel uses from there on before it knows its memory map, in bytes.
    pub memory_size: u64,
}

impl Header {
    /// Parses the header of the file `bytes`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        let unknown = || ImageError::Unknown(known_mistake(bytes));
        let (header, _) = RawHeader::ref_from_prefix(bytes).map_err(|_| unknown())?;
        if header.magic != MAGIC {
            return Err(unknown());
        }
        if header.flags.get() & BIG_ENDIAN != 0 {
            return Err(ImageError::BigEndian);
        }
        let file = bytes.len() as u64;
        match header.image_size.get() {
            0 => Ok(Self { text_offset: TEXT_OFFSET_OF_OLD, memory_size: file }),
            memory if memory < file => Err(ImageError::TooLong { file, memory }),
            memory_size => Ok(Self { text_offset: header.text_offset.get(), memory_size }),
        }
    }
}

/// The type of the file, if it is a known one.
fn known_mistake(bytes: &[u8]) -> Option<&'static str> {
    const GZIP: &[u8] = &[0x1f, 0x8b];
    const ELF: &[u8] = b"\x7fELF";
    const EFI_ZBOOT: &[u8] = b"zimg";
    if bytes.starts_with(GZIP) {
        Some("a gzip file: gunzip it first")
    } else if bytes.starts_with(ELF) {
        Some("an ELF file: use arch/arm64/boot/Image, not vmlinux")
    } else if bytes.get(4..8) == Some(EFI_ZBOOT) {
        Some("a compressed EFI program: unpack it first")
    } else {
        None
    }
}

/// Images for tests.
#[cfg(test)]
pub(crate) mod testing {
    /// An image that goes to `text_offset` and takes `memory_size` bytes; `code` follows its
    /// header.
    pub fn image(text_offset: u64, memory_size: u64, code: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 64];
        image[8..16].copy_from_slice(&text_offset.to_le_bytes());
        image[16..24].copy_from_slice(&memory_size.to_le_bytes());
        image[56..60].copy_from_slice(b"ARM\x64");
        image.extend_from_slice(code);
        image
    }
}

#[cfg(test)]
mod tests {
    use super::testing::image;
    use super::*;

    #[test]
    fn the_header_says_where_and_how_much() {
        let header = Header::parse(&image(0x1000, 0x2_0000, b"code")).unwrap();
        assert_eq!(header, Header { text_offset: 0x1000, memory_size: 0x2_0000 });
        let old = Header::parse(&image(0x1000, 0, b"code")).unwrap();
        assert_eq!(old, Header { text_offset: 0x8_0000, memory_size: 68 });
    }

    #[test]
    fn what_is_no_image_is_named() {
        let mut big_endian = image(0, 0x1000, b"");
        big_endian[24] = 1;
        for (bytes, hint) in [
            (&b""[..], "not an arm64 Linux Image"),
            (&[0; 63], "not an arm64 Linux Image"),
            (&image(0, 0x1000, b"")[..60], "not an arm64 Linux Image"),
            (b"\x1f\x8b\x08", "gunzip"),
            (b"\x7fELF\x02", "not vmlinux"),
            (b"MZ\0\0zimg", "unpack it"),
            (&big_endian, "big-endian"),
            (&image(0, 67, b"code"), "68 bytes, more than the 67"),
        ] {
            let error = Header::parse(bytes).unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
        assert!(Header::parse(b"").unwrap_err().is_of_no_kernel());
        assert!(!Header::parse(&big_endian).unwrap_err().is_of_no_kernel());
    }
}
