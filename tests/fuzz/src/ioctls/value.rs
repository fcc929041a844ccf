// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Values that are often meaningful, and otherwise arbitrary.

use arbitrary::{Result, Unstructured};

/// Size of a page.
pub const PAGE: u64 = 0x1000;
/// Pages of memory of a process.
pub const PAGES: u64 = 16;
/// Its address in the table of values: [`super::process::Process`] inserts the real address.
pub const MEMORY: u64 = 0x7100_0000_0000;

/// What a value is.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Id of an object.
    Id,
    /// Flags, with these known.
    Flags(u64),
    /// One of a list from 0 to this.
    Choice(u64),
    /// A number that is small.
    Count,
    /// An IOVA in bytes.
    Iova,
    /// A length in bytes.
    Length,
    /// An address in the process.
    Pointer,
    /// A descriptor.
    Fd,
    /// A PASID.
    Pasid,
    /// A word of a table or of a structure.
    Word,
}

/// IOVAs near boundaries.
const EDGES: [u64; 8] = [
    0xfee0_0000,
    0xfedf_f000,
    0x7fff_ffff_f000,
    0x8000_0000_0000,
    0xffff_ffff_f000,
    u64::MAX - 0xfff,
    u64::MAX,
    0x2000_0000,
];

/// A value of `kind`, from one byte unless the byte asks for more.
pub fn value(input: &mut Unstructured, kind: Kind) -> Result<u64> {
    let byte: u8 = input.arbitrary()?;
    if byte >= 0xf8 {
        return input.arbitrary();
    }
    let small = u64::from(byte);
    Ok(match kind {
        Kind::Id => small % 32,
        Kind::Flags(known) => small & known,
        Kind::Choice(last) => small % (last + 1),
        Kind::Count => small,
        Kind::Fd => small % 3,
        Kind::Pasid => small % 18,
        Kind::Length if byte < 0xc0 => (small % PAGES + 1) * PAGE,
        Kind::Length if byte < 0xe0 => small,
        Kind::Iova if byte < 0xe0 => small % 32 * PAGE,
        Kind::Iova | Kind::Length => EDGES[usize::from(byte) % EDGES.len()],
        // Sixteen places in a page.
        Kind::Pointer => MEMORY + small * (PAGE / 16),
        Kind::Word if byte < 0x40 => small,
        // Entries of tables: a page, or a pointer to a table.
        Kind::Word if byte < 0x80 => (small % PAGES * PAGE) | 0x67,
        Kind::Word if byte < 0xc0 => (small % PAGES * PAGE) | 0x27,
        Kind::Word if byte < 0xe0 => small % PAGES * PAGE,
        Kind::Word => [48, 57, u64::MAX, 0x83, 0xe7, 1 << 48, 39, 3][usize::from(byte) % 8],
    })
}
