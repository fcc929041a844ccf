// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole stack in one process: guest, virtual VT-d, nesting, emulated host, devices.

use std::sync::{Arc, Mutex, Weak};

use twostage::iommufd::{Errno, Extensions, FailNth, HostIommu, ObjectId, Protection};
use twostage::nesting::vtd::VtdNesting;
use twostage::nesting::GuestIoas;
use twostage::nesting::{host_vtd, DeviceInfo};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::viommu::vtd::{FaultTarget, Policy, Stage1};
use twostage::viommu::vtd::{HostUnit, VtdConfig, VtdIommu};
use twostage::viommu::{InterruptSink, Requester};
use twostage_emulated::{
    ContextTables, DeviceConfig, DmaAttributes, DmaError, DmaPort, DmaWay, EmulatedHost,
    ObjectGraph, VtdUnit, VtdUnitConfig,
};

use super::guest::{Guest, Registers};
use crate::common::{Host, Memory, A, B};

/// Width of their PASIDs.
const PASID_BITS: u8 = 8;

impl Registers for Arc<VtdIommu> {
    fn read(&self, offset: u64, bytes: &mut [u8]) {
        self.mmio_read(offset, bytes);
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.mmio_write(offset, bytes);
    }
}

/// The interrupts of the virtual unit: address and data.
#[derive(Debug, Default)]
pub struct Interrupts(Mutex<Vec<(u64, u32)>>);

impl Interrupts {
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl InterruptSink for Interrupts {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().unwrap().push((address, data));
    }
}

/// Host, unit, nesting, virtual unit and guest.
pub struct Machine {
    pub guest: Guest<Arc<VtdIommu>>,
    pub iommu: Arc<VtdIommu>,
    pub nesting: Arc<VtdNesting>,
    pub host: Arc<Host>,
    pub unit: Arc<VtdUnit>,
    pub interrupts: Arc<Interrupts>,
    devices: Vec<ObjectId>,
    _contexts: Arc<Contexts>,
}

/// The guest's context and PASID tables, for the sanitizer.
#[derive(Debug)]
struct Contexts(Weak<VtdIommu>);

impl ContextTables for Contexts {
    fn way(&self, rid: Bdf, pasid: Option<u32>) -> Option<DmaWay> {
        let requester = Requester { rid, pasid: pasid.map(self::pasid) };
        Some(match self.0.upgrade()?.policy_by_tables(requester)? {
            Policy::Blocked(_) => DmaWay::Blocked,
            Policy::Bypass => DmaWay::Bypass,
            Policy::Stage1(Stage1::VtdFirstStage(tables)) => DmaWay::FirstStage(tables.table),
            Policy::Stage1(Stage1::VtdSecondStage(tables)) => DmaWay::SecondStage(tables.table),
        })
    }
}

/// The virtual unit's configuration, as far as the host supports it.
pub fn vtd_config() -> VtdConfig {
    VtdConfig { pasid_bits: PASID_BITS, ..VtdConfig::default() }
}

/// A host with one unit and two unbound devices; every call of it can be made to fail.
pub fn host(config: VtdUnitConfig) -> (Arc<Host>, Arc<VtdUnit>) {
    let unit = VtdUnit::new(config);
    let host = EmulatedHost::new();
    let id = host.add_unit(unit.clone());
    for (name, rid) in [("a", A), ("b", B)] {
        let config =
            DeviceConfig { pasid_bits: PASID_BITS, ats: true, pri: true, ..Default::default() };
        host.add_device(name, id, rid, config).unwrap();
    }
    (Arc::new(FailNth::new(Arc::new(FailNth::new(host)))), unit)
}

impl Machine {
    pub fn new() -> Self {
        Self::with(VtdUnitConfig::default(), vtd_config())
    }

    /// On a host with one unit configured by `unit`, with a virtual unit configured by `config`.
    pub fn with(unit: VtdUnitConfig, config: VtdConfig) -> Self {
        let (host, unit) = host(unit);
        Self::on(host, unit, config).unwrap()
    }

    /// Builds everything on `host`, as a VMM does before it starts its guest.
    pub fn on(host: Arc<Host>, unit: Arc<VtdUnit>, config: VtdConfig) -> Result<Self, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let ioas = GuestIoas::new(host.clone()).map_err(|error| text(&error))?;
        let memory = Memory::new(|start, region| ioas.map(start, region, Protection::READ_WRITE))
            .map_err(|error| text(&error))?;
        let nesting = Arc::new(VtdNesting::new(ioas));
        let mut devices = Vec::new();
        for (name, rid) in [("a", A), ("b", B)] {
            let dev = host.device_bind(name).map_err(|error| text(&error))?;
            devices.push(dev);
            nesting.add_device(rid, dev).map_err(|error| text(&error))?;
        }
        let config =
            config.intersect(&units(&nesting, host.extensions())).map_err(|error| text(&error))?;
        let interrupts = Arc::new(Interrupts::default());
        let iommu =
            VtdIommu::new(config, memory.map.clone(), nesting.clone(), interrupts.clone(), None)
                .map_err(|error| text(&error))?;
        nesting.set_fault_target(Arc::downgrade(&iommu) as Weak<dyn FaultTarget>);
        iommu.add_device(A);
        iommu.add_device(B);
        let guest = Guest::new(memory, iommu.clone());
        let contexts = Arc::new(Contexts(Arc::downgrade(&iommu)));
        unit.set_context_tables(Arc::downgrade(&contexts) as Weak<dyn ContextTables>);
        Ok(Self { guest, iommu, nesting, host, unit, interrupts, devices, _contexts: contexts })
    }

    /// The device object of `rid`.
    pub fn device(&self, rid: Bdf) -> ObjectId {
        self.nesting.hw_infos().iter().find(|info| info.rid == rid).unwrap().dev
    }

    /// The DMA port of `rid`.
    pub fn port(&self, rid: Bdf) -> DmaPort {
        self.unit.port(rid.raw())
    }

    /// Eight bytes read by `rid` (or its `pasid`) at `iova`.
    pub fn read(&self, rid: Bdf, pasid: Option<u32>, iova: u64) -> Result<u64, DmaError> {
        let mut bytes = [0; 8];
        let attributes = DmaAttributes { pasid, ..DmaAttributes::default() };
        self.port(rid).read(attributes, iova, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Makes `rid` (or its `pasid`) write eight bytes at `iova`.
    pub fn write(
        &self,
        rid: Bdf,
        pasid: Option<u32>,
        iova: u64,
        value: u64,
    ) -> Result<(), DmaError> {
        let attributes = DmaAttributes { pasid, ..DmaAttributes::default() };
        self.port(rid).write(attributes, iova, &value.to_le_bytes())
    }

    /// Makes the `n`-th host call from now on (1 is the next) fail.
    pub fn fail_nth(&self, n: u64) {
        self.host.fail_nth(n, Errno::ENOMEM);
    }

    /// Makes the next `count` host calls fail.
    pub fn fail_next(&self, count: u64) {
        self.host.fail_next(count, Errno::ENOMEM);
    }

    /// The host's objects.
    pub fn graph(&self) -> ObjectGraph {
        self.host.inner().inner().graph()
    }

    /// Ends the machine, and returns the number of objects left in the host.
    pub fn end(self) -> usize {
        let Self { guest, iommu, nesting, host, devices, .. } = self;
        drop((guest, iommu));
        assert!(Arc::into_inner(nesting).is_some(), "somebody still holds nesting");
        for dev in devices {
            // The requested failure may come as late as here.
            if host.device_unbind(dev).is_err() {
                host.device_unbind(dev).unwrap();
            }
        }
        host.inner().inner().live_objects()
    }
}

/// The host's units, for the virtual unit's configuration.
fn units(nesting: &VtdNesting, extensions: Extensions) -> Vec<HostUnit> {
    let unit = |device: &DeviceInfo| host_vtd(device.rid.to_string(), &device.info, extensions);
    nesting.hw_infos().iter().filter_map(unit).collect()
}

/// The PASID `raw`, of at most 20 bits.
pub fn pasid(raw: u32) -> Pasid {
    Pasid::new(raw).unwrap()
}
