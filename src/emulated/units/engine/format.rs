// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests, and what the walker needs to know about a format of user-owned tables.

use std::fmt::Debug;
use std::ops::BitAnd;

use bitfield_struct::bitfield;

/// The kind of a request: read or write, user or supervisor, execute or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestKind(u8);

impl RequestKind {
    const WRITE: u8 = 1;
    const PRIVILEGED: u8 = 2;
    const EXECUTE: u8 = 4;

    /// A kind by its three properties.
    #[inline]
    pub fn new(write: bool, privileged: bool, execute: bool) -> Self {
        Self(u8::from(write) | u8::from(privileged) << 1 | u8::from(execute) << 2)
    }

    /// Every kind.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..8).map(Self)
    }

    /// A write (or an atomic).
    pub fn write(self) -> bool {
        self.0 & Self::WRITE != 0
    }

    /// A supervisor request (PCIe: Privileged Mode Requested).
    pub fn privileged(self) -> bool {
        self.0 & Self::PRIVILEGED != 0
    }

    /// An execute request (PCIe: Execute Requested).
    pub fn execute(self) -> bool {
        self.0 & Self::EXECUTE != 0
    }
}

/// One DMA request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    /// Requester id.
    pub rid: u16,
    /// PASID, when it carries one.
    pub pasid: Option<u32>,
    /// IOVA in bytes.
    pub address: u64,
    /// What it wants.
    pub kind: RequestKind,
}

/// The kinds of request that a translation serves without a further walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rights(u8);

impl Rights {
    /// Every kind.
    pub const ALL: Self = Self(u8::MAX);

    /// No kind.
    const NONE: Self = Self(0);

    /// Every kind of write, and every other kind.
    const WRITES: Self = Self(0b1010_1010);
    const READS: Self = Self(!Self::WRITES.0);

    /// Every kind of read if `read`, and of write if `write`.
    #[inline]
    pub fn of_access(read: bool, write: bool) -> Self {
        let reads = if read { Self::READS } else { Self::NONE };
        let writes = if write { Self::WRITES } else { Self::NONE };
        Self(reads.0 | writes.0)
    }

    /// The kinds for which `allowed` holds.
    pub fn of(allowed: impl Fn(RequestKind) -> bool) -> Self {
        Self(
            RequestKind::all().filter(|&kind| allowed(kind)).fold(0, |set, kind| set | 1 << kind.0),
        )
    }

    /// The rights in the lower 8 bits of a cache entry's flags.
    pub fn from_flags(flags: u16) -> Self {
        Self(flags as u8)
    }

    /// The rights as the lower 8 bits of a cache entry's flags.
    pub fn flags(self) -> u16 {
        self.0.into()
    }

    /// Whether `kind` is one of them.
    #[inline]
    pub fn allow(self, kind: RequestKind) -> bool {
        self.0 >> kind.0 & 1 != 0
    }
}

impl BitAnd for Rights {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// Combinations of permissions: a [`Path`] has so many meaningful values.
const PATHS: usize = 1 << 5;

/// The kinds of request that each combination of permissions allows in tables of one format. Made
/// once for a context: asking the format for each kind is too slow for every walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PathRights([Rights; PATHS]);

impl PathRights {
    /// Nothing is allowed.
    pub const NONE: Self = Self([Rights::NONE; PATHS]);

    /// What `tables` allow.
    pub fn of<F: TableFormat>(tables: &F) -> Self {
        Self(std::array::from_fn(|bits| {
            let path = Path::from_bits(bits as u8);
            Rights::of(|kind| {
                tables.check_request(kind).is_ok() && tables.check_path(path, kind).is_ok()
            })
        }))
    }

    /// What is allowed by `path`.
    #[inline]
    pub fn get(&self, path: Path) -> Rights {
        // In bounds: the remainder of a division by the length.
        self.0[usize::from(path.into_bits()) % PATHS]
    }
}

/// What the entries on the way to a page allow, combined.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(crate) struct Path {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// User requests.
    pub user: bool,
    /// Execute requests; those of users, if the format distinguishes them from privileged ones.
    pub execute: bool,
    /// Privileged execute requests, if the format distinguishes them.
    pub execute_privileged: bool,
    #[bits(3)]
    __: u8,
}

impl Path {
    /// No entry has limited anything yet.
    pub const UNLIMITED: Self = Self::new()
        .with_read(true)
        .with_write(true)
        .with_user(true)
        .with_execute(true)
        .with_execute_privileged(true);
}

impl BitAnd for Path {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self::from_bits(self.into_bits() & other.into_bits())
    }
}

/// A present, well-formed entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// It is a page, not a pointer to a table.
    pub leaf: bool,
    /// GPA of the page or the table, in bytes.
    pub address: u64,
    /// What it allows.
    pub path: Path,
    /// A page that is the same in every address space of the tag.
    pub global: bool,
}

/// Why the host's stage 2 stops a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage2Refusal {
    /// The GPA exceeds the width of guest addresses.
    Beyond,
    /// Nothing is mapped there.
    Absent,
    /// Reading, or writing, is not allowed there.
    Denied,
}

/// The position of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct At {
    /// GPA of the table, or of its entry; none if unknown.
    pub gpa: Option<u64>,
    /// The table is the top one.
    pub top: bool,
}

/// A format of tables with eight-byte entries. Levels are numbered from 1, at the leaf; tables of
/// all levels but the top one have the same size.
pub(crate) trait TableFormat {
    /// Why a request is blocked.
    type Fault: Copy + Debug + PartialEq;

    /// GPA of the top table, in bytes.
    fn table(&self) -> u64;

    /// Level of the top table, at most 5.
    fn levels(&self) -> u8;

    /// Size of a page of `level`, as a power of two; level 1 is the size of a table.
    fn shift(&self, level: u8) -> u8;

    /// The index of the entry of `level` on the way to `iova`.
    fn index(&self, iova: u64, level: u8) -> u64;

    /// Whether such requests are served at all.
    fn check_request(&self, kind: RequestKind) -> Result<(), Self::Fault>;

    /// Whether the tables translate such addresses.
    fn check_address(&self, iova: u64) -> Result<(), Self::Fault>;

    /// Decodes an entry of `level`.
    fn decode(&self, word: u64, level: u8) -> Result<Entry, Self::Fault>;

    /// The entry `word` as it must be in memory before a request uses it: with its flags set.
    fn used(&self, word: u64, leaf: bool, write: bool) -> u64;

    /// Whether a leaf `word` serves writes without setting flags.
    fn is_dirty(&self, word: u64) -> bool;

    /// Whether entries with the combined permissions `path` allow a request.
    fn check_path(&self, path: Path, kind: RequestKind) -> Result<(), Self::Fault>;

    /// The kinds of request that pass [`TableFormat::check_request`] and, with the combined
    /// permissions `path`, [`TableFormat::check_path`].
    fn rights(&self, path: Path) -> Rights;

    /// Stage 2 does not allow reading a table.
    fn table_refused(&self, at: At, why: Stage2Refusal) -> Self::Fault;

    /// An entry could not be read though stage 2 allows it.
    fn entry_unreadable(&self, at: At) -> Self::Fault;

    /// Stage 2 does not allow writing the flags of an entry.
    fn flags_refused(&self, at: At) -> Self::Fault;

    /// The flags of an entry could not be updated: it kept changing.
    fn flags_unsettled(&self) -> Self::Fault;

    /// Stage 2 does not allow the access to `gpa` that the tables lead to.
    fn page_refused(&self, gpa: u64, why: Stage2Refusal) -> Self::Fault;
}
