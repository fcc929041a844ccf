// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole stack in one process: guest, virtual SMMUv3, nesting, emulated host, devices.

use std::fmt::Display;
use std::sync::{Arc, Mutex, Weak};

use twostage::iommufd::{FailNth, HostIommu, ObjectId, Protection};
use twostage::nesting::host_smmu;
use twostage::nesting::smmuv3::{SmmuNesting, DEFAULT_EVENT_DEPTH};
use twostage::nesting::GuestIoas;
use twostage::patience::wait_for;
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::event::EventRecord;
use twostage::viommu::smmuv3::{EventTarget, Smmu, SmmuConfig, SmmuInterrupt, SmmuInterrupts};
use twostage_emulated::{
    DeviceConfig, DmaAttributes, DmaError, DmaPort, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig,
};

use super::guest::Guest;
use crate::common::{Host, Memory, A, B};

/// The MSIs of the virtual SMMU: address and data.
#[derive(Debug, Default)]
pub struct Messages(Mutex<Vec<(u64, u32)>>);

impl Messages {
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl SmmuInterrupts for Messages {
    fn message(&self, address: u64, data: u32) -> bool {
        self.0.lock().unwrap().push((address, data));
        true
    }

    fn wire(&self, interrupt: SmmuInterrupt) {
        panic!("{interrupt:?} has a message");
    }
}

/// Host, unit, nesting, virtual SMMU and guest.
pub struct Machine {
    pub guest: Guest,
    pub nesting: Arc<SmmuNesting>,
    pub host: Arc<Host>,
    pub messages: Arc<Messages>,
    pub unit: Arc<SmmuV3Unit>,
    devices: Vec<ObjectId>,
}

/// A host with one unit and two unbound devices; every call of it can be made to fail.
pub fn host() -> (Arc<Host>, Arc<SmmuV3Unit>) {
    let config = SmmuV3UnitConfig { ats: true, page_requests: true, ..Default::default() };
    let unit = SmmuV3Unit::new(config);
    let host = EmulatedHost::new();
    let id = host.add_unit(unit.clone());
    for (name, rid) in [("a", A), ("b", B)] {
        let config = DeviceConfig { ats: true, pri: true, ..Default::default() };
        host.add_device(name, id, rid, config).unwrap();
    }
    (Arc::new(FailNth::new(Arc::new(FailNth::new(host)))), unit)
}

impl Machine {
    /// Builds everything on `host`, as a VMM does before it starts its guest.
    pub fn on(host: Arc<Host>, unit: Arc<SmmuV3Unit>) -> Result<Self, String> {
        let text = |error: &dyn Display| error.to_string();
        let ioas = GuestIoas::new(host.clone()).map_err(|error| text(&error))?;
        let memory = Memory::new(|start, region| ioas.map(start, region, Protection::READ_WRITE))
            .map_err(|error| text(&error))?;
        let nesting = Arc::new(SmmuNesting::new(ioas, DEFAULT_EVENT_DEPTH));
        let mut devices = Vec::new();
        for (name, rid) in [("a", A), ("b", B)] {
            let dev = host.device_bind(name).map_err(|error| text(&error))?;
            devices.push(dev);
            nesting.add_device(rid, dev).map_err(|error| text(&error))?;
        }
        let units: Vec<_> = nesting
            .hw_infos()
            .iter()
            .filter_map(|device| host_smmu(device.rid.to_string(), &device.info))
            .collect();
        let config = SmmuConfig::default().intersect(&units).map_err(|error| text(&error))?;
        let messages = Arc::<Messages>::default();
        let smmu = Smmu::new(&config, memory.map.clone(), nesting.clone(), messages.clone(), None)
            .map_err(|error| text(&error))?;
        nesting.set_event_target(Arc::downgrade(&smmu) as Weak<dyn EventTarget>);
        smmu.add_stream(A.into());
        smmu.add_stream(B.into());
        let guest = Guest::new(memory, smmu);
        Ok(Self { guest, nesting, host, messages, unit, devices })
    }

    /// The device object of `rid`.
    pub fn device(&self, rid: Bdf) -> ObjectId {
        self.nesting.hw_infos().iter().find(|info| info.rid == rid).unwrap().dev
    }

    /// The DMA port of `rid`.
    pub fn port(&self, rid: Bdf) -> DmaPort {
        self.unit.port(rid.raw())
    }

    /// Eight bytes read by `rid` at `iova`.
    pub fn read(&self, rid: Bdf, iova: u64) -> Result<u64, DmaError> {
        let mut bytes = [0; 8];
        self.port(rid).read(DmaAttributes::default(), iova, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Makes `rid` write eight bytes at `iova`.
    pub fn write(&self, rid: Bdf, iova: u64, value: u64) -> Result<(), DmaError> {
        self.port(rid).write(DmaAttributes::default(), iova, &value.to_le_bytes())
    }

    /// The next event in the guest's queue; waits for the thread that delivers it.
    #[track_caller]
    pub fn event(&self) -> EventRecord {
        wait_for("an event for the guest", || self.guest.take_event())
    }

    /// Ends the machine, and returns the number of objects left in the host.
    pub fn end(self) -> usize {
        let Self { guest, nesting, host, devices, .. } = self;
        // Ends the thread that delivers events, which may hold the virtual SMMU for a moment. The
        // requested failure may come as late as here.
        if nesting.shutdown().is_err() {
            nesting.shutdown().unwrap();
        }
        drop(guest);
        assert!(Arc::into_inner(nesting).is_some(), "somebody still holds nesting");
        for dev in devices {
            if host.device_unbind(dev).is_err() {
                host.device_unbind(dev).unwrap();
            }
        }
        host.inner().inner().live_objects()
    }
}
