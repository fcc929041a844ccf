// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the emulated host is made of: IOMMUs, and devices behind them.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::driver::Driver;
use crate::emulated::hardware::Hardware;
use crate::emulated::refusal::{refuse, Outcome};
use crate::emulated::vtd::VtdUnit;
use crate::iommufd::{Errno, Extensions, ObjectId};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::interrupt::INTERRUPT_RANGE;

/// One IOMMU of an emulated host, as [`super::super::EmulatedHost::add_unit`] named it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitId(pub(super) usize);

/// What an emulated device is, as far as an IOMMU is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Width of its PASIDs in bits; 0 when it has no PASID capability.
    pub pasid_bits: u8,
    /// It may ask to execute (PASID capability, Execute Permission Supported).
    pub pasid_exec: bool,
    /// It may ask for privileged access (PASID capability, Privileged Mode Supported).
    pub pasid_priv: bool,
    /// It has a device TLB (ATS).
    pub ats: bool,
    /// IOVAs, in bytes and both ends included, that no IOAS it is attached to can map, besides the
    /// window of interrupt messages (firmware's reserved memory regions).
    pub reserved: Vec<RangeInclusive<u64>>,
}

impl DeviceConfig {
    /// The IOVAs that an IOAS cannot map while the device is attached to it.
    pub(super) fn reserved_regions(&self) -> Vec<RangeInclusive<u64>> {
        let mut regions = self.reserved.clone();
        regions.push(INTERRUPT_RANGE);
        regions
    }
}

/// A machine that cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// There is a device of that name.
    #[error("there is a device named '{0}' already")]
    NameTaken(String),
    /// There is a device of that Requester ID behind the same unit.
    #[error("there is a device with the requester id {0} behind that IOMMU already")]
    RidTaken(Bdf),
    /// The unit belongs to another host.
    #[error("there is no such IOMMU in this host")]
    NoSuchUnit,
    /// PASIDs have at most 20 bits.
    #[error("a PASID has at most 20 bits, not {0}")]
    PasidTooWide(u8),
}

/// One IOMMU.
#[derive(Debug)]
pub(crate) struct Unit {
    pub hardware: Arc<dyn Hardware>,
    pub driver: Driver,
    /// The same hardware, where devices of this process can do DMA through it.
    pub vtd: Option<Arc<VtdUnit>>,
}

/// One device, bound or not.
#[derive(Debug)]
pub(crate) struct Part {
    pub unit: UnitId,
    pub rid: Bdf,
    pub config: DeviceConfig,
    /// Its object, while it is bound.
    pub bound: Option<ObjectId>,
}

/// The IOMMUs and the devices by name.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    units: Vec<Unit>,
    parts: BTreeMap<String, Part>,
}

impl Machine {
    /// Adds an IOMMU that devices of this process can do DMA through.
    pub fn add_vtd(&mut self, unit: Arc<VtdUnit>) -> UnitId {
        self.add(unit.clone(), Some(unit))
    }

    /// Adds an IOMMU that only listens.
    #[cfg(test)]
    pub fn add_hardware(&mut self, hardware: Arc<dyn Hardware>) -> UnitId {
        self.add(hardware, None)
    }

    fn add(&mut self, hardware: Arc<dyn Hardware>, vtd: Option<Arc<VtdUnit>>) -> UnitId {
        let driver = Driver::new(&hardware.info());
        self.units.push(Unit { hardware, driver, vtd });
        UnitId(self.units.len() - 1)
    }

    /// Adds a device.
    pub fn add_device(
        &mut self,
        name: &str,
        unit: UnitId,
        rid: Bdf,
        config: DeviceConfig,
    ) -> Result<(), MachineError> {
        if self.units.get(unit.0).is_none() {
            return Err(MachineError::NoSuchUnit);
        }
        if u32::from(config.pasid_bits) > Pasid::BITS {
            return Err(MachineError::PasidTooWide(config.pasid_bits));
        }
        if self.parts.contains_key(name) {
            return Err(MachineError::NameTaken(name.to_owned()));
        }
        if self.parts.values().any(|part| part.unit == unit && part.rid == rid) {
            return Err(MachineError::RidTaken(rid));
        }
        self.parts.insert(name.to_owned(), Part { unit, rid, config, bound: None });
        Ok(())
    }

    /// What every IOMMU can do beyond real ones.
    pub fn extensions(&self) -> Extensions {
        let each = || self.units.iter().map(|unit| unit.hardware.extensions());
        Extensions {
            guest_second_stage: !self.units.is_empty() && each().all(|it| it.guest_second_stage),
            fault_reports: !self.units.is_empty() && each().all(|it| it.fault_reports),
        }
    }

    /// All IOMMUs.
    pub fn units(&self) -> impl Iterator<Item = &Unit> {
        self.units.iter()
    }

    /// The IOMMU `id`.
    ///
    /// # Errors
    /// `ENODEV`; never for an id that a device or an object of this host keeps.
    pub fn unit(&self, id: UnitId) -> Outcome<&Unit> {
        match self.units.get(id.0) {
            Some(unit) => Ok(unit),
            None => refuse(Errno::ENODEV, "there is no such IOMMU"),
        }
    }

    /// The device `name`.
    ///
    /// # Errors
    /// `ENODEV` there is none.
    pub fn part(&self, name: &str) -> Outcome<&Part> {
        match self.parts.get(name) {
            Some(part) => Ok(part),
            None => refuse(Errno::ENODEV, format!("there is no device '{name}'")),
        }
    }

    /// Says which object `name` is bound as.
    pub fn set_bound(&mut self, name: &str, bound: Option<ObjectId>) {
        if let Some(part) = self.parts.get_mut(name) {
            part.bound = bound;
        }
    }
}
