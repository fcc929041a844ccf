// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects of one iommufd, the devices and the IOMMUs: the rules, with Linux's errno.
//!
//! All of it is under one lock of the emulated host. A rule checks everything first, in the order
//! in which Linux does, and only then changes anything; a call that fails has changed nothing.
//! Every device is an IOMMU group of its own.
#![forbid(unsafe_code)]

mod accounting;
mod destroy;
mod device;
mod driver;
mod fill;
mod hwpt;
mod invalidate;
mod ioas;
mod machine;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod unmap;
mod viommu;

use std::collections::BTreeSet;
use std::sync::Arc;

pub(crate) use hwpt::HwptRequest;
pub(crate) use invalidate::{Entries, InvalidateFormat, MAX_INVALIDATE_ENTRIES};
pub(crate) use ioas::MapRequest;
pub use machine::{DeviceConfig, MachineError, UnitId};
pub(crate) use table::Object;
pub use table::ObjectKind;
pub(crate) use unmap::{Stop, Unmap};

use super::ioas::{PinAccount, RlimitMode};
use driver::PagingDomain;
use machine::Machine;
use table::Table;

/// Everything that one lock protects.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    /// What the host is made of; its parts outlive the objects.
    machine: Machine,
    /// What the user made.
    table: Table,
    /// The cache tag given out last.
    last_tag: u32,
    /// Cache tags of the living HWPTs.
    tags: BTreeSet<u32>,
    account: Arc<PinAccount>,
    /// On whose account what is mapped from now on is pinned.
    rlimit_mode: RlimitMode,
    /// How often the iommufd was closed: object ids from before mean nothing.
    closed: u64,
}

impl Objects {
    /// The machine, to build it.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The objects.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Changes when the iommufd is closed, and with it every object id.
    pub fn epoch(&self) -> u64 {
        self.closed
    }

    /// Bytes of pinned memory.
    pub fn pinned_bytes(&self) -> u64 {
        self.account.bytes()
    }
}
