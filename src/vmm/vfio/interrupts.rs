// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kind of interrupts that an assigned device uses, according to the guest's capabilities; VFIO
//! has only one kind enabled at a time.

use std::sync::Arc;
use twostage::sync::Mutex;

use super::intx::Intx;
use super::msi::Msi;
use super::vectors::Vectors;
use crate::pci::{ConfigSpace, Msix, MsixCapability, MsixControl};

/// MSI-X of a device.
#[derive(Debug)]
pub struct DeviceMsix {
    /// The capability.
    pub capability: MsixCapability,
    /// The table and the pending bits that the guest sees.
    pub table: Msix,
    /// The destinations of the table's vectors.
    pub vectors: Arc<Vectors>,
}

/// The interrupts of one device: those that it has, one kind of which is enabled.
#[derive(Debug)]
pub struct DeviceInterrupts {
    /// The pin.
    pub intx: Option<Intx>,
    /// MSI.
    pub msi: Option<Msi>,
    /// MSI-X, which has precedence.
    pub msix: Option<DeviceMsix>,
    on: Mutex<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Intx,
    Msi,
    Msix,
}

impl DeviceInterrupts {
    /// Interrupts, all disabled.
    pub fn new(intx: Option<Intx>, msi: Option<Msi>, msix: Option<DeviceMsix>) -> Self {
        Self { intx, msi, msix, on: Mutex::new(Kind::None) }
    }

    /// The guest may have written a capability in `config`.
    pub fn update(&self, config: &ConfigSpace) {
        let mut on = self.on.lock();
        let wanted = self.wanted(config);
        if *on != wanted {
            self.switch_off(*on);
        }
        match wanted {
            Kind::Msix => {
                if let Some(msix) = &self.msix {
                    msix.vectors.enable(msix.table.len());
                    msix.table.set_control(msix.capability.control(config));
                }
            }
            Kind::Msi => self.msi.iter().for_each(|msi| msi.enable(config)),
            Kind::Intx if *on != Kind::Intx => self.intx.iter().for_each(Intx::enable),
            Kind::Intx | Kind::None => {}
        }
        *on = wanted;
    }

    /// Disables all of them.
    pub fn disable(&self) {
        let mut on = self.on.lock();
        self.switch_off(*on);
        *on = Kind::None;
    }

    fn wanted(&self, config: &ConfigSpace) -> Kind {
        if self.msix.as_ref().is_some_and(|msix| msix.capability.control(config).enable()) {
            Kind::Msix
        } else if self.msi.as_ref().is_some_and(|msi| msi.is_enabled(config)) {
            Kind::Msi
        } else if self.intx.is_some() {
            Kind::Intx
        } else {
            Kind::None
        }
    }

    fn switch_off(&self, kind: Kind) {
        match kind {
            Kind::Msix => {
                if let Some(msix) = &self.msix {
                    msix.table.set_control(MsixControl::new());
                    msix.vectors.disable();
                }
            }
            Kind::Msi => self.msi.iter().for_each(Msi::disable),
            Kind::Intx => self.intx.iter().for_each(Intx::disable),
            Kind::None => {}
        }
    }
}
