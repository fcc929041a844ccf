// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole stack in one process: guest, virtual SMMUv3, nesting, emulated host, devices.

use std::fmt::Display;
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, ScopedJoinHandle};

use twostage::iommufd::{FailNth, HostIommu, ObjectId, Protection};
use twostage::nesting::smmuv3::SmmuNesting;
use twostage::nesting::{host_smmu, GuestIoas, NestingError};
use twostage::patience::wait_for;
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::event::EventRecord;
use twostage::viommu::smmuv3::{
    EventTarget, Smmu, SmmuConfig, SmmuInterrupt, SmmuInterrupts, SmmuState,
};
use twostage::viommu::RestoreError;
use twostage_emulated::kit::smmuv3::Driver;
use twostage_emulated::{
    DeviceConfig, DmaAttributes, DmaError, DmaPort, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig,
};

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
    pub guest: Driver<Arc<Smmu>>,
    pub memory: Memory,
    pub nesting: Arc<SmmuNesting>,
    pub host: Arc<Host>,
    pub messages: Arc<Messages>,
    pub unit: Arc<SmmuV3Unit>,
    kind: Kind,
    devices: Vec<ObjectId>,
}

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct Kind {
    pub unit: SmmuV3UnitConfig,
    /// Of [`A`] and [`B`].
    pub devices: [DeviceConfig; 2],
    /// What the guest is offered, as far as the unit has it.
    pub offered: SmmuConfig,
}

impl Default for Kind {
    fn default() -> Self {
        let device = DeviceConfig::default().with_ats(true).with_pri(true);
        Self {
            unit: SmmuV3UnitConfig::default().with_ats(true).with_page_requests(true),
            devices: [device.clone(), device],
            offered: SmmuConfig::default(),
        }
    }
}

impl Kind {
    /// A host with one unit and two unbound devices; every call of it can be made to fail.
    pub fn host(&self) -> (Arc<Host>, Arc<SmmuV3Unit>) {
        let unit = SmmuV3Unit::new(self.unit.clone());
        let host = EmulatedHost::new();
        let id = host.add_unit(unit.clone());
        for ((name, rid), config) in [("a", A), ("b", B)].into_iter().zip(&self.devices) {
            host.add_device(name, id, rid, config.clone()).unwrap();
        }
        (Arc::new(FailNth::new(Arc::new(FailNth::new(host)))), unit)
    }

    /// A machine of this kind.
    pub fn machine(self) -> Machine {
        let (host, unit) = self.host();
        Machine::with(self, host, unit).unwrap()
    }
}

/// See [`Kind::host`], of the default kind.
pub fn host() -> (Arc<Host>, Arc<SmmuV3Unit>) {
    Kind::default().host()
}

/// What a VMM has before there is a virtual SMMU: guest memory in the host, and bound devices.
pub struct Ground {
    pub host: Arc<Host>,
    pub unit: Arc<SmmuV3Unit>,
    kind: Kind,
    ioas: Arc<GuestIoas>,
    memory: Memory,
    /// The device objects of [`A`] and [`B`].
    devices: Vec<ObjectId>,
}

impl Ground {
    /// On `host`, with the memory that `memory` maps.
    fn new(
        kind: Kind,
        host: Arc<Host>,
        unit: Arc<SmmuV3Unit>,
        memory: impl FnOnce(&GuestIoas) -> Result<Memory, NestingError>,
    ) -> Result<Self, String> {
        let ioas = GuestIoas::new(host.clone()).map_err(text)?;
        let memory = memory(&ioas).map_err(text)?;
        let devices = ["a", "b"].into_iter().map(|name| host.device_bind(name));
        let devices = devices.collect::<Result<_, _>>().map_err(text)?;
        Ok(Self { host, unit, kind, ioas, memory, devices })
    }

    /// Nesting with both devices, which are blocked.
    pub fn nest(&self) -> Result<Arc<SmmuNesting>, String> {
        let nesting = SmmuNesting::new(self.ioas.clone()).serving(&self.kind.offered);
        let nesting = Arc::new(nesting);
        for (rid, dev) in [A, B].into_iter().zip(&self.devices) {
            nesting.add_device(rid, *dev).map_err(text)?;
        }
        Ok(nesting)
    }
}

impl Machine {
    /// Builds everything on `host`, as a VMM does before it starts its guest.
    pub fn on(host: Arc<Host>, unit: Arc<SmmuV3Unit>) -> Result<Self, String> {
        Self::with(Kind::default(), host, unit)
    }

    /// The same, of a `kind` that `host` is of.
    pub fn with(kind: Kind, host: Arc<Host>, unit: Arc<SmmuV3Unit>) -> Result<Self, String> {
        let extensions = host.extensions();
        let offered = kind.offered.clone();
        let ground = Ground::new(kind, host, unit, |ioas| {
            Memory::new(|start, region| ioas.map(start, region, Protection::READ_WRITE))
        })?;
        let nesting = ground.nest()?;
        let units: Vec<_> = nesting
            .hw_infos()
            .iter()
            .filter_map(|device| host_smmu(device.rid.to_string(), &device.info, extensions))
            .collect();
        let config = offered.intersect(&units).map_err(text)?;
        let messages = Arc::<Messages>::default();
        let map = ground.memory.map.clone();
        let smmu =
            Smmu::new(&config, map, nesting.clone(), messages.clone(), None).map_err(text)?;
        smmu.add_device(A).map_err(text)?;
        smmu.add_device(B).map_err(text)?;
        let guest = Driver::new(ground.memory.pages.clone(), smmu);
        Ok(Self::joined(&ground, nesting, messages, guest))
    }

    /// A host with a copy of this machine's memory, for a machine that goes on where this one is.
    pub fn next_ground(&self) -> Ground {
        let (host, unit) = self.kind.host();
        let copied = |ioas: &GuestIoas| {
            self.memory.copied(|start, region| ioas.map(start, region, Protection::READ_WRITE))
        };
        Ground::new(self.kind.clone(), host, unit, copied).unwrap()
    }

    /// This machine as it was at `state`, on `ground` with `nesting`, which blocks its devices.
    pub fn restored(
        &self,
        state: &SmmuState,
        ground: &Ground,
        nesting: Arc<SmmuNesting>,
    ) -> Result<Self, RestoreError> {
        let messages = Arc::<Messages>::default();
        let map = ground.memory.map.clone();
        let smmu = Smmu::restore(state, map, nesting.clone(), messages.clone(), None)?;
        let guest = self.guest.moved(ground.memory.pages.clone(), smmu);
        Ok(Self::joined(ground, nesting, messages, guest))
    }

    fn joined(
        ground: &Ground,
        nesting: Arc<SmmuNesting>,
        messages: Arc<Messages>,
        guest: Driver<Arc<Smmu>>,
    ) -> Self {
        let Ground { host, unit, kind, devices, .. } = ground;
        nesting.set_fault_target(Arc::downgrade(&guest.registers) as Weak<dyn EventTarget>);
        let (host, unit, devices) = (host.clone(), unit.clone(), devices.clone());
        let (memory, kind) = (ground.memory.clone(), kind.clone());
        Self { guest, memory, nesting, host, messages, unit, kind, devices }
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
        read(&self.unit, rid, iova)
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

/// A test that fails leaves devices that wait for its guest, and it waits for their threads. As it
/// drops this, the guest is halted, and whoever waits is answered.
pub struct Served<'a>(pub &'a Machine);

impl Drop for Served<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.guest.registers.halt();
        }
    }
}

pub type Reading<'a> = ScopedJoinHandle<'a, Result<u64, DmaError>>;

/// Has `rid` read at `iova` while `guest` serves it; returns what it has read.
pub fn while_reading(
    machine: &Machine,
    rid: Bdf,
    iova: u64,
    guest: impl FnOnce(&Reading<'_>),
) -> Result<u64, DmaError> {
    thread::scope(|scope| {
        let _served = Served(machine);
        let dma = scope.spawn(|| machine.read(rid, iova));
        guest(&dma);
        dma.join().unwrap()
    })
}

/// Eight bytes read by `rid` at `iova`.
pub fn read(unit: &Arc<SmmuV3Unit>, rid: Bdf, iova: u64) -> Result<u64, DmaError> {
    let mut bytes = [0; 8];
    unit.port(rid.raw()).read(DmaAttributes::default(), iova, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn text(error: impl Display) -> String {
    error.to_string()
}
