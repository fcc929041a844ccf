// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The whole stack in one process: guest, virtual VT-d, nesting, emulated host, devices.

use std::fmt::Display;
use std::sync::{Arc, Mutex, Weak};
use std::thread;

use twostage::iommufd::{Errno, FailNth, HostIommu, ObjectId, Protection};
use twostage::nesting::vtd::{Nesting, Serving, VtdNesting};
use twostage::nesting::{GuestIoas, NestingError};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::viommu::vtd::{FaultTarget, Policy, Stage1, VtdNested};
use twostage::viommu::vtd::{VtdConfig, VtdIommu, VtdState};
use twostage::viommu::{InterruptSink, Requester, RestoreError};
use twostage_emulated::kit::vtd::Driver;
use twostage_emulated::{
    ContextTables, DeviceConfig, DmaAttributes, DmaError, DmaPort, DmaWay, EmulatedHost,
    ObjectGraph, VtdUnit, VtdUnitConfig,
};

use crate::common::{Host, Memory, A, B};

/// The most pieces of mirrors.
const PIECES: u64 = 1000;
/// Width of their PASIDs.
const PASID_BITS: u8 = 8;

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

/// A machine whose host nests the guest's tables.
pub type Machine = MachineOf<false>;

/// The tables that the architecture-independent tests use.
pub const FIRST_STAGE: u8 = 0;
pub const SECOND_STAGE: u8 = 1;
/// Second-stage tables in legacy mode.
pub const LEGACY: u8 = 2;

/// Host, unit, nesting, virtual unit and guest; `MIRRORED`: the guest's tables are mirrored, though
/// the host could nest them. `TABLES`: see [`FIRST_STAGE`].
pub struct MachineOf<const MIRRORED: bool, const TABLES: u8 = FIRST_STAGE> {
    pub guest: Driver<Arc<VtdIommu>>,
    pub memory: Memory,
    pub iommu: Arc<VtdIommu>,
    pub nesting: Arc<VtdNesting>,
    pub host: Arc<Host>,
    pub unit: Arc<VtdUnit>,
    pub interrupts: Arc<Interrupts>,
    devices: Vec<ObjectId>,
    _contexts: Arc<Contexts>,
}

/// What a VMM has before there is a virtual unit: guest memory in the host, and bound devices.
pub struct Ground {
    pub host: Arc<Host>,
    pub unit: Arc<VtdUnit>,
    ioas: Arc<GuestIoas>,
    memory: Memory,
    /// The device objects of [`A`] and [`B`].
    devices: Vec<ObjectId>,
}

impl Ground {
    /// On `host`, with the memory that `memory` maps.
    fn new(
        host: Arc<Host>,
        unit: Arc<VtdUnit>,
        memory: impl FnOnce(&GuestIoas) -> Result<Memory, NestingError>,
    ) -> Result<Self, String> {
        let ioas = GuestIoas::new(host.clone()).map_err(text)?;
        let memory = memory(&ioas).map_err(text)?;
        let devices = ["a", "b"].into_iter().map(|name| host.device_bind(name));
        let devices = devices.collect::<Result<_, _>>().map_err(text)?;
        Ok(Self { host, unit, ioas, memory, devices })
    }

    /// Nesting with both devices, which are blocked.
    pub fn nest(&self) -> Result<Arc<VtdNesting>, String> {
        self.serve(Nesting::On, &vtd_config())
    }

    /// The same, in the way of `nesting`, for a virtual unit of `config`.
    fn serve(&self, nesting: Nesting, config: &VtdConfig) -> Result<Arc<VtdNesting>, String> {
        let serving = Serving::new(nesting, self.memory.map.clone(), config.clone());
        let nesting = Arc::new(VtdNesting::serving(self.ioas.clone(), serving));
        for (rid, dev) in [A, B].into_iter().zip(&self.devices) {
            nesting.add_device(rid, *dev).map_err(text)?;
        }
        Ok(nesting)
    }
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
            Policy::Stage1(Stage1::VtdNested(VtdNested { first, second })) => {
                DmaWay::Nested { first: first.table, second: second.table }
            }
        })
    }
}

/// The virtual unit's configuration, as far as the host supports it.
pub fn vtd_config() -> VtdConfig {
    VtdConfig::default().with_pasid_bits(Some(PASID_BITS))
}

/// A host with one unit and two unbound devices; every call of it can be made to fail.
pub fn host(config: VtdUnitConfig) -> (Arc<Host>, Arc<VtdUnit>) {
    host_of(config, [true, true])
}

/// The same, with devices that make page requests or do not.
pub fn host_of(config: VtdUnitConfig, pri: [bool; 2]) -> (Arc<Host>, Arc<VtdUnit>) {
    let unit = VtdUnit::new(config);
    let host = EmulatedHost::new();
    let id = host.add_unit(unit.clone());
    for ((name, rid), pri) in [("a", A), ("b", B)].into_iter().zip(pri) {
        let config =
            DeviceConfig::default().with_pasid_bits(PASID_BITS).with_ats(true).with_pri(pri);
        host.add_device(name, id, rid, config).unwrap();
    }
    (Arc::new(FailNth::new(Arc::new(FailNth::new(host)))), unit)
}

impl<const MIRRORED: bool, const TABLES: u8> MachineOf<MIRRORED, TABLES> {
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
        let ground = Ground::new(host, unit, |ioas| {
            Memory::new(|start, region| ioas.map(start, region, Protection::READ_WRITE))
        })?;
        let way = if MIRRORED { Nesting::Off { pieces: PIECES } } else { Nesting::On };
        // These guests invalidate what becomes present in a first stage, too.
        let config = config.with_first_stage(MIRRORED.then_some(true));
        let nesting = ground.serve(way, &config)?;
        let units = [A, B].map(|rid| nesting.host_unit(rid, rid.to_string()).expect("added"));
        let config = config.intersect(&units).map_err(text)?;
        let interrupts = Arc::new(Interrupts::default());
        let map = ground.memory.map.clone();
        let iommu =
            VtdIommu::new(&config, map, nesting.clone(), interrupts.clone(), None).map_err(text)?;
        iommu.add_device(A).map_err(text)?;
        iommu.add_device(B).map_err(text)?;
        let guest = Driver::new(ground.memory.pages.clone(), iommu);
        Ok(Self::joined(&ground, nesting, interrupts, guest))
    }

    /// A host with a copy of this machine's memory, for a machine that goes on where this one is.
    pub fn next_ground(&self) -> Ground {
        let (host, unit) = host(VtdUnitConfig::default());
        let copied = |ioas: &GuestIoas| {
            self.memory.copied(|start, region| ioas.map(start, region, Protection::READ_WRITE))
        };
        Ground::new(host, unit, copied).unwrap()
    }

    /// This machine as it was at `state`, on `ground` with `nesting`, which blocks its devices.
    pub fn restored(
        &self,
        state: &VtdState,
        ground: &Ground,
        nesting: Arc<VtdNesting>,
    ) -> Result<Self, RestoreError> {
        let interrupts = Arc::new(Interrupts::default());
        let map = ground.memory.map.clone();
        let iommu = VtdIommu::restore(state, map, nesting.clone(), interrupts.clone(), None)?;
        let guest = self.guest.moved(ground.memory.pages.clone(), iommu);
        Ok(Self::joined(ground, nesting, interrupts, guest))
    }

    fn joined(
        ground: &Ground,
        nesting: Arc<VtdNesting>,
        interrupts: Arc<Interrupts>,
        guest: Driver<Arc<VtdIommu>>,
    ) -> Self {
        let Ground { host, unit, devices, .. } = ground;
        let iommu = guest.registers.clone();
        nesting.set_fault_target(Arc::downgrade(&iommu) as Weak<dyn FaultTarget>);
        let contexts = Arc::new(Contexts(Arc::downgrade(&iommu)));
        unit.set_context_tables(Arc::downgrade(&contexts) as Weak<dyn ContextTables>);
        let (host, unit, devices) = (host.clone(), unit.clone(), devices.clone());
        let memory = ground.memory.clone();
        let _contexts = contexts;
        Self { guest, memory, iommu, nesting, host, unit, interrupts, devices, _contexts }
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
        read(&self.unit, rid, pasid, iova)
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
        // Ends the thread that delivers page requests, which may hold the virtual VT-d for a while.
        // The requested failure may come as late as here.
        if nesting.shutdown().is_err() {
            nesting.shutdown().unwrap();
        }
        drop((guest, iommu));
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
            self.0.iommu.halt();
        }
    }
}

/// Eight bytes read by `rid` (or its `pasid`) at `iova`.
pub fn read(unit: &Arc<VtdUnit>, rid: Bdf, pasid: Option<u32>, iova: u64) -> Result<u64, DmaError> {
    let mut bytes = [0; 8];
    let attributes = DmaAttributes { pasid, ..DmaAttributes::default() };
    unit.port(rid.raw()).read(attributes, iova, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn text(error: impl Display) -> String {
    error.to_string()
}

/// The PASID `raw`, of at most 20 bits.
pub fn pasid(raw: u32) -> Pasid {
    Pasid::new(raw).unwrap()
}
