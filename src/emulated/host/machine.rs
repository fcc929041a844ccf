// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The basis of emulated hosts: IOMMUs, and devices behind them.
//!
//! A machine outlives the iommufds that are opened on it. Any number of them share its IOMMUs; a
//! device, and its IOMMU group, is bound to one of them at a time. Devices can be added and removed
//! at run time.
//!
//! Its lock is only held for lookups: nothing else is locked or called with it held.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use crate::dma::DmaPort;
use crate::drivers::{CacheTags, Driver, SmmuDriver, VtdDriver};
use crate::host::device::{DeviceConfig, Requester};
use crate::host::refusal::{refuse, Outcome};
use crate::units::smmuv3::SmmuV3Unit;
use crate::units::vtd::VtdUnit;
use twostage::iommufd::{Errno, Extensions};
use twostage::spec::pci::{Bdf, Pasid};

/// An emulated IOMMU of either architecture.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EmulatedUnit {
    /// Intel VT-d.
    Vtd(Arc<VtdUnit>),
    /// Arm SMMUv3.
    SmmuV3(Arc<SmmuV3Unit>),
}

impl From<Arc<VtdUnit>> for EmulatedUnit {
    fn from(unit: Arc<VtdUnit>) -> Self {
        Self::Vtd(unit)
    }
}

impl From<Arc<SmmuV3Unit>> for EmulatedUnit {
    fn from(unit: Arc<SmmuV3Unit>) -> Self {
        Self::SmmuV3(unit)
    }
}

impl EmulatedUnit {
    /// Its port for DMA by requester ID `rid`.
    pub fn port(&self, rid: u16) -> DmaPort {
        match self {
            Self::Vtd(unit) => unit.port(rid),
            Self::SmmuV3(unit) => unit.port(rid),
        }
    }

    /// Its driver, whose page tables get their tags from `tags`.
    fn driver(&self, tags: Arc<CacheTags>) -> Arc<dyn Driver> {
        match self {
            Self::Vtd(unit) => Arc::new(VtdDriver::new(unit.clone(), tags)),
            Self::SmmuV3(unit) => Arc::new(SmmuDriver::new(unit.clone(), tags)),
        }
    }
}

/// One IOMMU of a machine, as returned by [`Machine::add_unit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitId(pub(crate) usize);

/// One IOMMU group of a machine. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct GroupId(u64);

/// One iommufd opened on a machine. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContextId(u64);

/// An open iommufd, for its machine.
pub(crate) trait Opened: Debug + Send + Sync {
    /// The pages mapped by its IOASes: each set of pages once.
    #[cfg(feature = "selftest")]
    fn pages(&self) -> Vec<Arc<crate::ioas::Pages>>;
}

/// An invalid machine, or an impossible change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// There is already a device of that name.
    #[error("there is a device named '{0}' already")]
    NameTaken(String),
    /// There is already a device with that Requester ID behind the unit.
    #[error("there is a device with the requester id {0} behind that IOMMU already")]
    RidTaken(Bdf),
    /// The unit belongs to another machine.
    #[error("there is no such IOMMU in this machine")]
    NoSuchUnit,
    /// PASIDs have at most 20 bits.
    #[error("a PASID has at most 20 bits, not {0}")]
    PasidTooWide(u8),
    /// A device without a device TLB sends no page requests (PCIe 6.0 §10.4).
    #[error("PRI needs ATS")]
    PriWithoutAts,
    /// Devices that have ATS must not be stalled.
    #[error("a device with ATS cannot be stalled")]
    StallsWithAts,
    /// There is no device of that name.
    #[error("there is no device named '{0}'")]
    NoSuchDevice(String),
    /// A device of the group is bound: the group can neither grow nor shrink.
    #[error("a device of the IOMMU group of '{0}' is bound")]
    GroupInUse(String),
}

/// One device, bound or not.
#[derive(Debug)]
pub(crate) struct Part {
    pub name: String,
    pub unit: UnitId,
    /// The driver of the unit.
    pub driver: Arc<dyn Driver>,
    pub requester: Requester,
    pub group: GroupId,
}

impl Part {
    /// Width of the PASIDs that both the device and its IOMMU support, in bits.
    pub fn pasid_bits(&self) -> u8 {
        self.requester.config.pasid_bits.min(self.driver.pasid_bits())
    }

    /// The IOVAs that an IOAS cannot map while the device is attached to it.
    pub fn reserved_regions(&self) -> Vec<RangeInclusive<u64>> {
        self.driver.reserved_regions(&self.requester)
    }
}

/// IOMMUs, and devices by name. It outlives the iommufds that are opened on it, any number of them;
/// each device is bound to one of them at a time.
///
/// ```
/// use twostage_emulated::{DeviceConfig, Machine, VtdUnit, VtdUnitConfig};
/// use twostage::iommufd::HostIommu;
/// use twostage::spec::pci::Bdf;
///
/// let machine = Machine::new();
/// let unit = machine.add_unit(VtdUnit::new(VtdUnitConfig::default()));
/// for (function, name) in [(0, "disk"), (1, "net")] {
///     let rid = Bdf::new(0, 4, function).expect("a PCI address");
///     machine.add_device(name, unit, rid, DeviceConfig::default())?;
/// }
/// let (first, second) = (machine.open(), machine.open());
/// first.device_bind("disk")?;
/// assert!(second.device_bind("disk").is_err());
/// second.device_bind("net")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Machine {
    state: Mutex<State>,
    tags: Arc<CacheTags>,
    contexts: AtomicU64,
    /// Every iommufd opened here; some may be gone.
    opened: Mutex<Vec<Weak<dyn Opened>>>,
}

#[derive(Debug, Default)]
struct State {
    units: Vec<Unit>,
    places: BTreeMap<String, Place>,
    last_group: u64,
}

#[derive(Debug)]
struct Unit {
    driver: Arc<dyn Driver>,
    /// For DMA of devices of this process.
    hardware: Option<EmulatedUnit>,
}

/// A device and its owner.
#[derive(Debug)]
struct Place {
    part: Arc<Part>,
    bound: Option<ContextId>,
}

impl Machine {
    /// A machine without IOMMUs and devices.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds an IOMMU, which belongs to this machine only.
    pub fn add_unit(&self, unit: impl Into<EmulatedUnit>) -> UnitId {
        let unit = unit.into();
        self.add(unit.driver(self.tags.clone()), Some(unit))
    }

    /// Adds an IOMMU without DMA by devices of this process.
    #[cfg(test)]
    pub(crate) fn add_driver(&self, driver: Arc<dyn Driver>) -> UnitId {
        self.add(driver, None)
    }

    /// The IOMMU whose driver is a `D`, added if there is none; devices of this process do no DMA
    /// through it.
    #[cfg(feature = "selftest")]
    pub(crate) fn unit_of<D: Driver + Default>(&self) -> (UnitId, Arc<D>) {
        let mut state = self.state();
        let driver_of = |unit: &Unit| {
            let driver: Arc<dyn std::any::Any + Send + Sync> = unit.driver.clone();
            driver.downcast::<D>().ok()
        };
        let units = state.units.iter().enumerate();
        let found = units.filter_map(|(at, unit)| Some((UnitId(at), driver_of(unit)?))).next();
        found.unwrap_or_else(|| {
            let driver = Arc::new(D::default());
            state.units.push(Unit { driver: driver.clone(), hardware: None });
            (UnitId(state.units.len() - 1), driver)
        })
    }

    /// The tags of its page tables, for a driver to be added.
    #[cfg(test)]
    pub(crate) fn cache_tags(&self) -> Arc<CacheTags> {
        self.tags.clone()
    }

    fn add(&self, driver: Arc<dyn Driver>, hardware: Option<EmulatedUnit>) -> UnitId {
        let mut state = self.state();
        state.units.push(Unit { driver, hardware });
        UnitId(state.units.len() - 1)
    }

    /// Adds a device behind `unit`, to be bound by `name`.
    ///
    /// # Errors
    /// The name or the Requester ID is taken, `config` is invalid, or the group is in use.
    pub fn add_device(
        &self,
        name: &str,
        unit: UnitId,
        rid: Bdf,
        config: DeviceConfig,
    ) -> Result<(), MachineError> {
        let mut state = self.state();
        let Some(driver) = state.units.get(unit.0).map(|unit| unit.driver.clone()) else {
            return Err(MachineError::NoSuchUnit);
        };
        if u32::from(config.pasid_bits) > Pasid::BITS {
            return Err(MachineError::PasidTooWide(config.pasid_bits));
        }
        if config.pri && !config.ats {
            return Err(MachineError::PriWithoutAts);
        }
        if config.stalls && config.ats {
            return Err(MachineError::StallsWithAts);
        }
        if state.places.contains_key(name) {
            return Err(MachineError::NameTaken(name.to_owned()));
        }
        let behind = |place: &&Place| place.part.unit == unit;
        if state.places.values().filter(behind).any(|place| place.part.requester.rid == rid) {
            return Err(MachineError::RidTaken(rid));
        }
        let same = |place: &&Place| {
            config.group.is_some() && place.part.requester.config.group == config.group
        };
        let sibling = state.places.values().filter(behind).find(same);
        let group = match sibling.map(|sibling| sibling.part.group) {
            Some(group) if state.group_owner(group).is_some() => {
                return Err(MachineError::GroupInUse(name.to_owned()));
            }
            Some(group) => group,
            None => {
                state.last_group += 1;
                GroupId(state.last_group)
            }
        };
        let requester = Requester { rid, config };
        let part = Part { name: name.to_owned(), unit, driver, requester, group };
        let place = Place { part: Arc::new(part), bound: None };
        state.places.insert(name.to_owned(), place);
        Ok(())
    }

    /// Removes a device. Its ports stay, but are blocked.
    ///
    /// # Errors
    /// There is no such device, or one of its group is bound.
    pub fn remove_device(&self, name: &str) -> Result<(), MachineError> {
        let port = self.dma_port(name);
        let mut state = self.state();
        let Some(place) = state.places.get(name) else {
            return Err(MachineError::NoSuchDevice(name.to_owned()));
        };
        if state.group_owner(place.part.group).is_some() {
            return Err(MachineError::GroupInUse(name.to_owned()));
        }
        let removed = state.places.remove(name);
        drop(state);
        if let Some(device) = port.map(|port| port.control()) {
            // Another device may get its Requester ID.
            device.set_device_tlb(false);
            device.set_silent(false);
        }
        if let Some(Place { part, .. }) = removed {
            part.driver.removed(&part.requester);
        }
        Ok(())
    }

    /// The DMA port of the device `name`, bound or not; `None` if there is no such device.
    pub fn dma_port(&self, name: &str) -> Option<DmaPort> {
        let state = self.state();
        let part = &state.places.get(name)?.part;
        let unit = state.units.get(part.unit.0)?;
        unit.hardware.as_ref().map(|unit| unit.port(part.requester.rid.raw()))
    }

    /// What every IOMMU supports beyond real ones.
    pub(crate) fn extensions(&self) -> Extensions {
        let drivers = self.drivers();
        let all = |has: fn(Extensions) -> bool| {
            !drivers.is_empty() && drivers.iter().all(|driver| has(driver.extensions()))
        };
        Extensions::default()
            .with_guest_second_stage(all(|it| it.guest_second_stage))
            .with_fault_reports(all(|it| it.fault_reports))
            .with_device_tlbs(all(|it| it.device_tlbs))
            .with_table_updates(all(|it| it.table_updates))
            .with_smmu_faults(all(|it| it.smmu_faults))
    }

    /// The drivers of all IOMMUs.
    pub(crate) fn drivers(&self) -> Vec<Arc<dyn Driver>> {
        self.state().units.iter().map(|unit| unit.driver.clone()).collect()
    }

    /// Registers an open iommufd.
    pub(crate) fn opened(&self, iommufd: Weak<dyn Opened>) {
        let mut opened = self.opened.lock();
        opened.retain(|iommufd| iommufd.strong_count() > 0);
        opened.push(iommufd);
    }

    /// The pages mapped by the IOASes of all its iommufds.
    #[cfg(feature = "selftest")]
    pub(crate) fn pages(&self) -> Vec<Arc<crate::ioas::Pages>> {
        let opened: Vec<_> = self.opened.lock().iter().filter_map(Weak::upgrade).collect();
        // Their locks are taken one after the other.
        opened.iter().flat_map(|iommufd| iommufd.pages()).collect()
    }

    /// An ID for a new iommufd.
    pub(crate) fn next_context(&self) -> ContextId {
        ContextId(self.contexts.fetch_add(1, Ordering::Relaxed))
    }

    /// The device `name`.
    ///
    /// # Errors
    /// `ENODEV` there is none.
    pub(crate) fn part(&self, name: &str) -> Outcome<Arc<Part>> {
        self.state().place(name).map(|place| place.part.clone())
    }

    /// All devices of a group, ascending by name.
    pub(crate) fn group(&self, group: GroupId) -> Vec<Arc<Part>> {
        let state = self.state();
        let parts = state.places.values().map(|place| &place.part);
        parts.filter(|part| part.group == group).cloned().collect()
    }

    /// Binds the device `name` in `context`.
    ///
    /// # Errors
    /// `ENODEV` there is none; `EBUSY` it is bound; `EPERM` another context owns its group.
    pub(crate) fn claim(&self, name: &str, context: ContextId) -> Outcome<Arc<Part>> {
        let mut state = self.state();
        let place = state.place(name)?;
        if place.bound.is_some() {
            return refuse(Errno::EBUSY, format!("'{name}' is bound already"));
        }
        let part = place.part.clone();
        if state.group_owner(part.group).is_some_and(|owner| owner != context) {
            return refuse(
                Errno::EPERM,
                format!("another iommufd has a device of the group of '{name}'"),
            );
        }
        if let Some(place) = state.places.get_mut(name) {
            place.bound = Some(context);
        }
        Ok(part)
    }

    /// Unbinds the device `name`.
    pub(crate) fn release(&self, name: &str) {
        if let Some(place) = self.state().places.get_mut(name) {
            place.bound = None;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn place(&self, name: &str) -> Outcome<&Place> {
        match self.places.get(name) {
            Some(place) => Ok(place),
            None => refuse(Errno::ENODEV, format!("there is no device '{name}'")),
        }
    }

    /// The iommufd that owns a device of `group`.
    fn group_owner(&self, group: GroupId) -> Option<ContextId> {
        let mut of_group = self.places.values().filter(|place| place.part.group == group);
        of_group.find_map(|place| place.bound)
    }
}
