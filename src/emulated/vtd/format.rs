// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a format of user-owned tables tells the walker.
#![forbid(unsafe_code)]

use std::ops::BitAnd;

use bitfield_struct::bitfield;

use super::rights::RequestKind;
use crate::spec::vtd::fault::FaultReason;

/// What the entries on the way allow, all of them together.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(super) struct Path {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// User requests.
    pub user: bool,
    /// Execute requests.
    pub execute: bool,
    #[bits(4)]
    __: u8,
}

impl Path {
    /// What no entry has limited yet.
    pub const UNLIMITED: Self =
        Self::new().with_read(true).with_write(true).with_user(true).with_execute(true);
}

impl BitAnd for Path {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self::from_bits(self.into_bits() & other.into_bits())
    }
}

/// A present, well-formed entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// It is a page and not a pointer to a table.
    pub leaf: bool,
    /// GPA of the page or the table, in bytes.
    pub address: u64,
    /// What it allows.
    pub path: Path,
}

/// Why a walk fails, for causes that every format has.
#[derive(Debug)]
pub(super) struct Reasons {
    /// The top table is beyond what stage 2 translates.
    pub top_beyond: FaultReason,
    /// Another table is.
    pub beyond: FaultReason,
    /// Stage 2 does not let the top table be read.
    pub top_denied: FaultReason,
    /// Stage 2 does not let another table be read.
    pub denied: FaultReason,
    /// An entry of the top table could not be read.
    pub top_access: FaultReason,
    /// An entry of another table could not be read.
    pub access: FaultReason,
    /// Stage 2 does not let the flags of an entry be written.
    pub flags_denied: FaultReason,
    /// The flags of an entry could not be updated: it kept changing.
    pub flags_update: FaultReason,
}

/// A format of tables of 512 eight-byte entries. Levels are numbered from the leaf up, from 1.
pub(super) trait TableFormat {
    /// The format's reasons.
    const REASONS: Reasons;

    /// GPA of the top table, in bytes.
    fn table(&self) -> u64;

    /// Level of the top table.
    fn levels(&self) -> u8;

    /// Whether such requests are served at all.
    fn check_request(&self, kind: RequestKind) -> Result<(), FaultReason>;

    /// Whether the tables translate such addresses.
    fn check_address(&self, iova: u64) -> Result<(), FaultReason>;

    /// What an entry of `level` says.
    fn decode(&self, word: u64, level: u8) -> Result<Entry, FaultReason>;

    /// The flags that must be set in an entry before a request uses it.
    fn flags(&self, leaf: bool, write: bool) -> u64;

    /// Whether a leaf with `word` can serve writes without further ado.
    fn is_dirty(&self, word: u64) -> bool;

    /// Whether entries that together allow `path` allow a request.
    fn check_path(&self, path: Path, kind: RequestKind) -> Result<(), FaultReason>;
}
