// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory that data is in on its way between the guest and the disk.

use std::fmt;

use zerocopy::{FromBytes, FromZeros, IntoBytes, KnownLayout};

/// What `O_DIRECT` may want offsets, lengths and buffers aligned to.
pub(super) const PAGE_SIZE: usize = 4096;
/// Buffers have a power of two of pages: the number of such sizes up to [`LARGEST`].
const SIZES: usize = 9;
/// The largest buffer, in bytes.
pub(super) const LARGEST: usize = PAGE_SIZE << (SIZES - 1);
/// Bytes of all buffers of a disk that are in use, at most; and, likewise, of those kept for later.
const LIMIT: usize = 16 << 20;

/// Memory aligned for `O_DIRECT`.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// A buffer aligned to 4096 bytes.
#[derive(Default)]
pub(super) struct BounceBuffer(Vec<Page>);

impl BounceBuffer {
    /// A buffer of `length` bytes, rounded up to whole pages.
    pub fn new(length: usize) -> Self {
        Self(vec![Page::new_zeroed(); length.div_ceil(PAGE_SIZE)])
    }

    /// All bytes of it.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.0.as_mut_slice().as_mut_bytes()
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.len() * PAGE_SIZE
    }
}

impl fmt::Debug for BounceBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BounceBuffer({} pages)", self.0.len())
    }
}

/// The buffers of a disk: allocated when they are needed first, and then used again.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// Unused ones, by size.
    unused: [Vec<BounceBuffer>; SIZES],
    /// Bytes of these.
    kept: usize,
    /// Bytes of buffers in use.
    lent: usize,
}

impl Buffers {
    /// Whether one more buffer of any size is within the limit.
    pub fn has_room(&self) -> bool {
        self.lent + LARGEST <= LIMIT
    }

    /// A buffer for `length` bytes, at most [`LARGEST`], with old contents.
    pub fn take(&mut self, length: usize) -> BounceBuffer {
        let size = size(length);
        let bytes = PAGE_SIZE << size;
        self.lent += bytes;
        match self.unused.get_mut(size).and_then(Vec::pop) {
            Some(buffer) => {
                self.kept -= bytes;
                buffer
            }
            None => BounceBuffer::new(bytes),
        }
    }

    /// Takes back a buffer that is not used any more; an empty one is none.
    pub fn give_back(&mut self, buffer: BounceBuffer) {
        let bytes = buffer.len();
        if bytes == 0 {
            return;
        }
        self.lent = self.lent.saturating_sub(bytes);
        if self.kept + bytes <= LIMIT {
            if let Some(unused) = self.unused.get_mut(size(bytes)) {
                unused.push(buffer);
                self.kept += bytes;
            }
        }
    }
}

/// The number of the size for `length` bytes.
fn size(length: usize) -> usize {
    let pages = length.div_ceil(PAGE_SIZE).max(1);
    // At most the number of bits of a `usize`.
    pages.next_power_of_two().trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_large_enough_and_used_again() {
        let mut buffers = Buffers::default();
        for (length, bytes) in
            [(1, 4096), (4096, 4096), (4097, 8192), (LARGEST - 1, LARGEST), (LARGEST, LARGEST)]
        {
            let mut buffer = buffers.take(length);
            assert_eq!((buffer.len(), buffer.bytes().len()), (bytes, bytes));
            let at = buffer.bytes().as_ptr();
            assert_eq!(at as usize % 4096, 0);
            buffers.give_back(buffer);
            assert_eq!(buffers.take(length).bytes().as_ptr(), at);
        }
    }

    #[test]
    fn what_is_in_use_and_what_is_kept_are_bounded() {
        let mut buffers = Buffers::default();
        let mut lent = Vec::new();
        while buffers.has_room() {
            lent.push(buffers.take(LARGEST));
        }
        assert_eq!(lent.len() * LARGEST, LIMIT);
        lent.extend((0..10).map(|_| buffers.take(1)));
        lent.into_iter().for_each(|buffer| buffers.give_back(buffer));
        buffers.give_back(BounceBuffer::default());
        assert!(buffers.has_room());
        let kept: usize = buffers.unused.iter().flatten().map(BounceBuffer::len).sum();
        assert_eq!((buffers.kept, buffers.lent), (kept, 0));
        assert!(kept <= LIMIT);
    }
}
