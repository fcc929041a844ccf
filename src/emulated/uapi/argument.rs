// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The argument structure of an ioctl: sizes, zero-extension, fields; and the driver data that it
//! points to.

use super::UserSpace;
use crate::drivers::{UserArray, UserData};
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, ObjectId};

/// Larger than every structure of the uAPI, in bytes.
const CAPACITY: usize = 80;

/// A copy of a structure, in the size of this version of the uAPI. Fields are accessed by offset
/// (`offset_of!`), in host byte order.
#[derive(Debug)]
pub(crate) struct Argument {
    bytes: [u8; CAPACITY],
    size: usize,
    answer: bool,
    result: i32,
}

impl Argument {
    /// The size that the structure declares in its first four bytes.
    pub fn declared_size(user: &[u8]) -> Result<usize, Errno> {
        let size = user.first_chunk().ok_or(Errno::EFAULT)?;
        usize::try_from(u32::from_ne_bytes(*size)).map_err(|_| Errno::EFAULT)
    }

    /// Copies the structure of `declared` bytes at the start of `user`. If it is shorter than
    /// `size`, it is zero-extended.
    ///
    /// # Errors
    /// `EINVAL` shorter than its first version; `EFAULT` longer than `user`; `E2BIG` longer than
    /// `size`, with nonzero excess bytes.
    pub fn copy_in(
        user: &[u8],
        declared: usize,
        size: usize,
        min_size: usize,
    ) -> Result<Self, Errno> {
        debug_assert!(size <= CAPACITY);
        if declared < min_size {
            return Err(Errno::EINVAL);
        }
        let structure = user.get(..declared).ok_or(Errno::EFAULT)?;
        let (known, excess) = structure.split_at(declared.min(size));
        if excess.iter().any(|byte| *byte != 0) {
            return Err(Errno::E2BIG);
        }
        let mut bytes = [0; CAPACITY];
        for (to, from) in bytes.iter_mut().zip(known) {
            *to = *from;
        }
        Ok(Self { bytes, size, answer: false, result: 0 })
    }

    /// Writes the structure back, in the size that the user knows.
    pub fn copy_out(&self, user: &mut [u8], declared: usize) {
        let known = self.size.min(declared);
        for (to, from) in user.iter_mut().zip(&self.bytes).take(known) {
            *to = *from;
        }
    }

    /// Writes the structure back even if the ioctl fails.
    pub fn answer_anyhow(&mut self) {
        self.answer = true;
    }

    /// Whether [`Self::answer_anyhow`] was called.
    pub fn is_answer(&self) -> bool {
        self.answer
    }

    /// All bytes from `offset` on.
    #[cfg(feature = "selftest")]
    pub fn rest(&self, offset: usize) -> &[u8] {
        self.bytes.get(offset..).unwrap_or_default()
    }

    /// Sets the return value of the ioctl.
    #[cfg(feature = "selftest")]
    pub fn set_result(&mut self, result: i32) {
        self.result = result;
    }

    /// The return value of the ioctl: 0 unless an operation sets it.
    pub fn result(&self) -> i32 {
        self.result
    }

    /// The bytes of the field at `offset`; zeroes beyond the structure.
    pub fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        let field = self.bytes.get(offset..).and_then(|rest| rest.first_chunk());
        field.copied().unwrap_or([0; N])
    }

    /// The 32-bit field at `offset`.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_ne_bytes(self.bytes(offset))
    }

    /// The 64-bit field at `offset`.
    pub fn u64(&self, offset: usize) -> u64 {
        u64::from_ne_bytes(self.bytes(offset))
    }

    /// The object id at `offset`.
    pub fn id(&self, offset: usize) -> ObjectId {
        ObjectId(self.u32(offset))
    }

    /// Sets the field at `offset`.
    pub fn set<const N: usize>(&mut self, offset: usize, value: [u8; N]) {
        if let Some(field) = self.bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) {
            *field = value;
        }
    }

    /// Sets the 32-bit field at `offset`.
    pub fn set_u32(&mut self, offset: usize, value: u32) {
        self.set(offset, value.to_ne_bytes());
    }

    /// Sets the 64-bit field at `offset`.
    pub fn set_u64(&mut self, offset: usize, value: u64) {
        self.set(offset, value.to_ne_bytes());
    }

    /// Refuses a reserved field that is not zero.
    pub fn reserved(&self, offset: usize) -> Outcome<()> {
        self.flags(offset, 0).map(drop)
    }

    /// The flags at `offset`, which must be within `known`.
    pub fn flags(&self, offset: usize, known: u32) -> Outcome<u32> {
        let flags = self.u32(offset);
        if flags & !known != 0 {
            return refuse(Errno::EOPNOTSUPP, format!("{:#x} is not supported", flags & !known));
        }
        Ok(flags)
    }
}

/// A structure at a user address.
pub(super) struct PointedData<'a> {
    pub user: &'a dyn UserSpace,
    pub data_type: u32,
    pub length: u32,
    pub address: u64,
}

impl UserData for PointedData<'_> {
    fn data_type(&self) -> u64 {
        self.data_type.into()
    }

    fn length(&self) -> usize {
        self.length as usize
    }

    fn read(&self, bytes: &mut [u8]) -> Outcome<()> {
        Ok(self.user.read(self.address, bytes)?)
    }

    #[cfg(any(test, feature = "selftest"))]
    fn write(&self, bytes: &[u8]) -> Outcome<()> {
        Ok(self.user.write(self.address, bytes)?)
    }
}

/// An array of structures at a user address.
pub(super) struct PointedArray<'a> {
    pub user: &'a dyn UserSpace,
    pub data_type: u32,
    pub entry_length: u32,
    pub count: u32,
    pub address: u64,
}

impl UserArray for PointedArray<'_> {
    fn data_type(&self) -> u64 {
        self.data_type.into()
    }

    fn entry_length(&self) -> usize {
        self.entry_length as usize
    }

    fn count(&self) -> usize {
        self.count as usize
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Outcome<()> {
        // If the address wraps, the access fails.
        Ok(self.user.read(self.address.wrapping_add(offset), bytes)?)
    }
}
