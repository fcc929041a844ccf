// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Driver data behind a user pointer.

use super::UserSpace;
use crate::drivers::{UserArray, UserData};
use crate::host::refusal::Outcome;

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
