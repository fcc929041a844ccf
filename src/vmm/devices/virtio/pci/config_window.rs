// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A window in configuration space for accesses to the BAR (virtio 1.3 §4.1.4.9), for software that
//! cannot access memory yet.

use super::layout::{BAR, BAR_SIZE};
use crate::pci::ConfigSpace;

/// Type of the capability.
const PCI_CFG: u8 = 5;
// From the start of the capability.
const BAR_REGISTER: u16 = 4;
const OFFSET: u16 = 8;
const LENGTH: u16 = 12;
const DATA: u16 = 16;

/// The capability.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConfigWindow {
    offset: u16,
}

/// An access set up by software.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WindowAccess {
    pub bar: usize,
    pub offset: u64,
    /// 1, 2 or 4.
    pub length: usize,
}

impl ConfigWindow {
    /// Adds the capability to `config`.
    pub fn add(config: &mut ConfigSpace) -> Self {
        // Type, BAR, ID, padding; then offset, length and data.
        let mut body = [0; 17];
        body[0] = PCI_CFG;
        let mut writable = [0xff; 17];
        writable[0] = 0;
        writable[2..5].fill(0);
        Self { offset: config.add_vendor_capability(&body, &writable) }
    }

    /// Whether a configuration access is to the window's data.
    pub fn is_data(&self, offset: u16, length: usize) -> bool {
        let data = usize::from(self.offset + DATA);
        let offset = usize::from(offset);
        offset < data + 4 && data < offset + length
    }

    /// The access, if it is valid for the device.
    pub fn access(&self, config: &ConfigSpace) -> Option<WindowAccess> {
        let bar = config.u32(self.offset + BAR_REGISTER) as u8;
        let offset = config.u32(self.offset + OFFSET);
        let length = config.u32(self.offset + LENGTH);
        let possible = bar == BAR
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && offset < BAR_SIZE;
        possible.then_some(WindowAccess {
            bar: bar.into(),
            offset: offset.into(),
            length: length as usize,
        })
    }

    /// The data written by software.
    pub fn data(&self, config: &ConfigSpace) -> [u8; 4] {
        config.u32(self.offset + DATA).to_le_bytes()
    }

    /// Sets the data that software will read.
    pub fn set_data(&self, config: &mut ConfigSpace, data: [u8; 4]) {
        config.set_u32(self.offset + DATA, u32::from_le_bytes(data));
    }
}
