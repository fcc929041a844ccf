// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests, their kinds, and permissions.

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
