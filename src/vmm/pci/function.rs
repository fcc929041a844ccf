// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a bus needs of a function.

use std::sync::Arc;
use twostage::sync::Mutex;

use super::{ConfigSpace, Way};

/// Where a function with one BAR is.
#[derive(Debug, Clone)]
pub struct Location {
    /// The bridge that it is behind.
    pub way: Option<Arc<Way>>,
    /// The address of its BAR.
    pub bar: u32,
}

/// A PCI function. Any vCPU thread may call it at any time.
pub trait PciFunction: Send + Sync {
    /// Its configuration space.
    fn config(&self) -> &Mutex<ConfigSpace>;

    /// Whether software may read configuration space without this being told: each read returns
    /// what is there. May become false with a write, for good.
    fn config_is_memory(&self) -> bool {
        false
    }

    /// Called before software reads `length` bytes at `offset` of configuration space, which is not
    /// locked.
    fn config_reading(&self, _offset: u16, _length: usize) {}

    /// Called after software wrote `length` bytes at `offset` of configuration space, which is not
    /// locked. Returns whether it reset the function, and BARs with it.
    fn config_written(&self, _offset: u16, _length: usize) -> bool {
        false
    }

    /// Conventional reset (§6.6.1), as by the bridge that the function is behind: when this
    /// returns, it is as after power-on, and its BARs do not decode.
    fn reset(&self);

    /// Software reads `data.len()` bytes at `offset` of memory BAR `bar`.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Software writes `data` at `offset` of memory BAR `bar`.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);
}
