// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The adapter: what a VMM of cloud-hypervisor's types writes to have a virtual VT-d. Those types
//! are memory with an [`AtomicBitmap`], and the traits of its `vm-device`, declared here again.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::sync::{Arc, Barrier, Mutex, Weak};

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

/// What it calls `GuestMemoryMmap`.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// A device on its buses.
pub trait BusDeviceSync: Send + Sync {
    fn read(&self, base: u64, offset: u64, data: &mut [u8]);
    fn write(&self, base: u64, offset: u64, data: &[u8]) -> Option<Arc<Barrier>>;
}

/// A vector as a device's MSI-X table has it.
pub struct MsiIrqSourceConfig {
    pub high_addr: u32,
    pub low_addr: u32,
    pub data: u32,
}

/// The vectors of a device.
pub trait InterruptSourceGroup: Send + Sync {
    fn trigger(&self, index: u32) -> io::Result<()>;
    fn update(&self, index: u32, to: MsiIrqSourceConfig, masked: bool, set: bool)
        -> io::Result<()>;
}

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
    fn trigger(&self, index: u32) -> io::Result<()> {
        self.0.get(index as usize).map(MsiRoute::fire).ok_or(io::ErrorKind::NotFound.into())
    }

    fn update(&self, index: u32, to: MsiIrqSourceConfig, masked: bool, _: bool) -> io::Result<()> {
        let address = u64::from(to.high_addr) << 32 | u64::from(to.low_addr);
        let message = MsiMessage { address, data: to.data };
        let vector = self.0.get(index as usize).ok_or(io::ErrorKind::NotFound)?;
        vector.set((!masked).then_some(message));
        Ok(())
    }
}

/// KVM, in a test: what it was told to send.
#[derive(Default)]
pub struct Kvm(pub Mutex<Vec<(u64, u32)>>);

impl MsiRouting for Kvm {
    fn set(&self, _table: &BTreeMap<RouteId, Route>) -> io::Result<()> {
        Ok(()) // KVM_SET_GSI_ROUTING.
    }
}

impl RouteEnd for Kvm {
    fn kick(&self, message: MsiMessage) {
        self.send_msi(message.address, message.data); // A write to the eventfd.
    }

    fn send(&self, source: &MsiSource, message: MsiMessage) -> bool {
        source.send(message, self)
    }
}

impl InterruptSink for Kvm {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().unwrap().push((address, data)); // KVM_SIGNAL_MSI.
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
        let vtd = match state {
            Some(state) => builder.restore(state)?,
            None => {
                let config = VtdConfig::default().with_interrupt_remapping(true);
                builder.config(&config).build()?
            }
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
        let remapper =
            remapper.map(|remapper| Arc::downgrade(&remapper) as Weak<dyn InterruptRemapper>);
        let id = self.table.allocate().ok_or("no GSI is left")?;
        let route = self.routes.add(id, MsiSource::new(rid, remapper), self.kvm.clone());
        Ok(Arc::new(Vectors(vec![route])))
    }
}
