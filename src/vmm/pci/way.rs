// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The way between the root bus and functions behind bridges: what bridges let through, as software
//! has programmed them.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use twostage::sync::Mutex;

use twostage::viommu::bridges::BridgeKind;

/// What software has programmed into a bridge.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Programmed {
    /// The bus on its other side, and the last one behind it.
    pub buses: (u8, u8),
    /// The memory that it forwards to its other side; nothing while memory space is disabled.
    pub windows: Vec<RangeInclusive<u64>>,
    /// It forwards requests of functions behind it: bus mastering.
    pub requests: bool,
}

/// A bridge, to functions behind it.
pub struct Way {
    kind: BridgeKind,
    /// The number of the bus behind it that its IOMMU knows.
    bus: u8,
    programmed: Mutex<Programmed>,
    /// The bridge that this one is behind.
    up: Option<Arc<Way>>,
}

impl Way {
    /// A bridge of `kind` behind `up`, which forwards nothing yet. Requests of functions behind it
    /// are known by the bus number `bus`.
    pub fn new(kind: BridgeKind, bus: u8, up: Option<Arc<Way>>) -> Self {
        Self { kind, bus, programmed: Mutex::default(), up }
    }

    /// Software has programmed it so. Returns whether anything changed.
    pub(super) fn program(&self, new: Programmed) -> bool {
        let mut programmed = self.programmed.lock();
        let changed = *programmed != new;
        *programmed = new;
        changed
    }

    /// The bus behind it, and the last one.
    pub(super) fn buses(&self) -> (u8, u8) {
        self.programmed.lock().buses
    }

    /// The number of the bus behind it that the IOMMU knows.
    pub(super) fn known_bus(&self) -> u8 {
        self.bus
    }

    /// Whether functions behind it are conventional ones: a bridge on the way leads to PCI.
    pub fn is_conventional(&self) -> bool {
        self.kind != BridgeKind::Port || self.up.as_ref().is_some_and(|up| up.is_conventional())
    }

    /// Whether accesses to the memory from `start` to `last` get through.
    pub(super) fn reaches(&self, start: u64, last: u64) -> bool {
        let within =
            |window: &RangeInclusive<u64>| window.contains(&start) && window.contains(&last);
        let here = self.programmed.lock().windows.iter().any(within);
        here && self.up.as_ref().is_none_or(|up| up.reaches(start, last))
    }

    /// Whether requests get through. With another bus number than the IOMMU knows they would be
    /// another function's, so they do not.
    pub(super) fn takes_requests(&self) -> bool {
        let here = {
            let programmed = self.programmed.lock();
            programmed.requests && programmed.buses.0 == self.bus
        };
        here && self.up.as_ref().is_none_or(|up| up.takes_requests())
    }
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Way")
            .field("kind", &self.kind)
            .field("programmed", &self.programmed)
            .finish()
    }
}
