// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the structures of a device are, the capabilities that describe this (virtio 1.3 §4.1.4),
//! and the one that is a window to them.

use super::common::COMMON_SIZE;
use crate::pci::{ConfigSpace, MsixPlace};

/// The one BAR of a device.
pub(super) const BAR: u8 = 0;
/// Its length in bytes.
pub const BAR_SIZE: u32 = 0x8000;
/// Each structure has a page of its own, so that each can be trapped or mapped separately.
const PAGE: u64 = 0x1000;
/// Notification: queue `n` is notified at offset `n` times this.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

/// A structure in the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Structure {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
}

impl Structure {
    /// The structure at `offset` of the BAR, and the offset in it.
    pub fn at(offset: u64) -> Option<(Self, u64)> {
        let structure = match offset / PAGE {
            0 => Self::Common,
            1 => Self::Isr,
            2 => Self::Device,
            3 => Self::Notify,
            4 => Self::MsixTable,
            5 => Self::MsixPending,
            _ => return None,
        };
        Some((structure, offset % PAGE))
    }

    /// Its offset in the BAR.
    pub fn start(self) -> u32 {
        let page = match self {
            Self::Common => 0,
            Self::Isr => 1,
            Self::Device => 2,
            Self::Notify => 3,
            Self::MsixTable => 4,
            Self::MsixPending => 5,
        };
        page * PAGE as u32
    }

    /// Its place as MSI-X describes it.
    pub fn msix_place(self) -> MsixPlace {
        MsixPlace { bar: BAR, offset: self.start() }
    }
}

// Structure types in capabilities.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// Adds the capabilities of a device with `queues` queues and `config` bytes of configuration.
pub(super) fn add_structures(space: &mut ConfigSpace, queues: u32, config: u32) {
    let notify_length = queues * NOTIFY_MULTIPLIER;
    let structures = [
        (COMMON_CFG, Structure::Common, COMMON_SIZE),
        (ISR_CFG, Structure::Isr, 1),
        (NOTIFY_CFG, Structure::Notify, notify_length),
        (DEVICE_CFG, Structure::Device, config),
    ];
    for (kind, structure, length) in structures.into_iter().filter(|(_, _, length)| *length != 0) {
        let mut body = vec![kind, BAR, 0, 0, 0];
        body.extend(structure.start().to_le_bytes());
        body.extend(length.to_le_bytes());
        if structure == Structure::Notify {
            body.extend(NOTIFY_MULTIPLIER.to_le_bytes());
        }
        space.add_vendor_capability(&body, &[]);
    }
}

// From the start of the capability.
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// A window in configuration space for accesses to the BAR (§4.1.4.9), for software that cannot
/// access memory yet: its capability.
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
        let data = usize::from(self.offset + WINDOW_DATA);
        let offset = usize::from(offset);
        offset < data + 4 && data < offset + length
    }

    /// The access, if it is valid for the device.
    pub fn access(&self, config: &ConfigSpace) -> Option<WindowAccess> {
        let bar = config.u32(self.offset + WINDOW_BAR) as u8;
        let offset = config.u32(self.offset + WINDOW_OFFSET);
        let length = config.u32(self.offset + WINDOW_LENGTH);
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
        config.u32(self.offset + WINDOW_DATA).to_le_bytes()
    }

    /// Sets the data that software will read.
    pub fn set_data(&self, config: &mut ConfigSpace, data: [u8; 4]) {
        config.set_u32(self.offset + WINDOW_DATA, u32::from_le_bytes(data));
    }
}
