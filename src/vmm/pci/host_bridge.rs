// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host bridge, 00:00.0, without any function.

use twostage::sync::Mutex;

use super::{ConfigSpace, Identity, PciFunction};

/// An Intel virtual PCI Express host bridge.
const IDENTITY: Identity =
    Identity { vendor: 0x8086, device: 0x0d57, class: 0x06_0000, revision: 0 };

/// The host bridge.
#[derive(Debug)]
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        Self { config: Mutex::new(ConfigSpace::new(IDENTITY)) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn read_bar(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        // It has no BAR.
        data.fill(0xff);
    }

    fn write_bar(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}
