// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The adapter: what a VMM of cloud-hypervisor's types writes to have a virtual VT-d. Those types
//! are memory with an [`AtomicBitmap`], and those of [`super::cloud_hypervisor`].

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::sync::{Arc, Barrier, Weak};

use twostage::iommufd::{HostIommu, ObjectId};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::unit::{Vtd, VtdBuilder};
use twostage::viommu::routes::{
    MsiRoute, MsiRouting, MsiSource, RemappedRoutes, Route, RouteEnd, RouteId, RouteTable,
};
use twostage::viommu::vtd::{VtdConfig, VtdState};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::cloud_hypervisor::{
    BusDeviceSync, InterruptIndex, InterruptSourceConfig, InterruptSourceGroup, Kvm,
};

/// What it calls `GuestMemoryMmap`.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// The unit on the bus.
pub struct OnBus(pub Vtd);

impl BusDeviceSync for OnBus {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        self.0.mmio_read(offset, data);
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) -> Option<Arc<Barrier>> {
        self.0.mmio_write(offset, data);
        None
    }
}

/// The vectors of a device behind the unit.
struct Vectors(Vec<MsiRoute>);

impl InterruptSourceGroup for Vectors {
    fn trigger(&self, index: InterruptIndex) -> io::Result<()> {
        self.0.get(index as usize).map(MsiRoute::fire).ok_or(io::ErrorKind::NotFound.into())
    }

    fn notifier(&self, _: InterruptIndex) -> Option<EventFd> {
        None // Only VFIO and vhost-user ask; see `RouteEnd::unrouting` for them.
    }

    fn update(
        &self,
        index: InterruptIndex,
        config: InterruptSourceConfig,
        masked: bool,
        _set_gsi: bool, // It is set as a whole when it changes.
    ) -> io::Result<()> {
        let InterruptSourceConfig::MsiIrq(to) = config else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let address = u64::from(to.high_addr) << 32 | u64::from(to.low_addr);
        let message = MsiMessage { address, data: to.data };
        let vector = self.0.get(index as usize).ok_or(io::ErrorKind::NotFound)?;
        vector.set((!masked).then_some(message));
        Ok(())
    }

    fn set_gsi(&self) -> io::Result<()> {
        Ok(())
    }
}

impl MsiRouting for Kvm {
    fn set(&self, table: &BTreeMap<RouteId, Route>) -> io::Result<()> {
        let entry = |route: &Route| (route.message.address, route.message.data);
        self.set_gsi_routing(table.iter().map(|(id, route)| (id.0, entry(route))).collect());
        Ok(())
    }
}

impl InterruptSink for Kvm {
    fn send_msi(&self, address: u64, data: u32) {
        self.signal_msi(address, data);
    }
}

/// The irqfd of a vector.
struct Irqfd(Arc<Kvm>, RouteId);

impl RouteEnd for Irqfd {
    fn kick(&self, _: MsiMessage) {
        self.0.write_irqfd(self.1 .0);
    }

    fn send(&self, source: &MsiSource, message: MsiMessage) -> bool {
        source.send(message, &*self.0)
    }
}

/// The part of the device manager that has to do with the unit.
pub struct Vmm {
    pub memory: Memory,
    pub vtd: Arc<OnBus>,
    pub kvm: Arc<Kvm>,
    table: Arc<RouteTable>,
    routes: Arc<RemappedRoutes>,
}

impl Vmm {
    /// With the device `dev` of `host`, which is the guest's `rid`: as after power-on, or as in
    /// `state`.
    pub fn new(
        host: Arc<dyn HostIommu>,
        memory: Memory,
        (rid, dev): (Bdf, ObjectId),
        state: Option<&VtdState>,
    ) -> Result<Self, Box<dyn Error>> {
        let ioas = GuestIoas::new(host)?;
        ioas.map_all(&memory)?;
        let kvm = Arc::new(Kvm::default());
        let builder = VtdBuilder::new(ioas, Arc::new(memory.clone()), kvm.clone());
        let builder = builder.device(rid, dev, "net0");
        let config = VtdConfig::default().with_interrupt_remapping(true);
        let vtd = match state {
            Some(state) => builder.restore(state)?,
            None => builder.config(&config).build()?,
        };
        let table = Arc::new(RouteTable::new(kvm.clone(), 24..4096));
        let routes = RemappedRoutes::new(table.clone());
        let listener = Arc::downgrade(&routes);
        vtd.add_interrupt_listener(listener as Weak<dyn InterruptListener>);
        Ok(Self { memory, vtd: Arc::new(OnBus(vtd)), kvm, table, routes })
    }

    /// The one vector of the guest's `rid`.
    pub fn vectors(&self, rid: Bdf) -> Result<Arc<dyn InterruptSourceGroup>, Box<dyn Error>> {
        let remapper = self.vtd.0.interrupt_remapper();
        let remapper = remapper.map(|it| Arc::downgrade(&it) as Weak<dyn InterruptRemapper>);
        let id = self.table.allocate().ok_or("no GSI is left")?;
        let end = Arc::new(Irqfd(self.kvm.clone(), id));
        Ok(Arc::new(Vectors(vec![self.routes.add(id, MsiSource::new(rid, remapper), end)])))
    }
}
