// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bytes of an execution as numbers, most of which mean something.

use arbitrary::Unstructured;

/// The bytes that are left. After the last one, all are zero.
pub struct Input<'a>(Unstructured<'a>);

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(Unstructured::new(bytes))
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// The next bytes, as many as `bytes` has.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        // Zeroes behind the last one, and no error.
        let _ = self.0.fill_buffer(bytes);
    }

    /// True or false.
    pub fn flag(&mut self) -> bool {
        self.byte() & 1 != 0
    }

    /// True in one case of `count`, which is at most 256.
    pub fn one_in(&mut self, count: u8) -> bool {
        self.byte().is_multiple_of(count)
    }

    /// Two bytes.
    pub fn half(&mut self) -> u16 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(if end <= 0x100 { self.byte().into() } else { self.half() }) % end
    }

    /// One of `values`, of which there is one at least.
    pub fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// A small number, a page, a power of two, all bits below one, or any number.
    pub fn number(&mut self) -> u64 {
        match self.byte() % 8 {
            0..=3 => self.byte().into(),
            4 => 0x1000 * u64::from(self.byte()),
            5 => 1 << (self.byte() % 64),
            6 => u64::MAX >> (self.byte() % 64),
            _ => self.0.arbitrary().unwrap_or_default(),
        }
    }

    /// At most `most` bytes.
    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most + 1).min(self.0.len());
        self.0.bytes(length).unwrap_or_default().to_vec()
    }
}
