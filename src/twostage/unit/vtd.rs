// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual VT-d with its host side.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use super::{
    check_config, check_devices, names_of, offered, AddError, BuildError, Names, NewDevice,
    RemoveError,
};
use crate::iommufd::ObjectId;
use crate::nesting::sides::Sides;
use crate::nesting::vtd::{Nesting, Serving, VtdNesting};
use crate::nesting::{GuestIoas, NestingError};
use crate::spec::pci::Bdf;
use crate::sync::Mutex;
use crate::threads::{StdThreads, ThreadStart};
use crate::viommu::vtd::{FaultTarget, HostVtd, VtdConfig, VtdConfigError, VtdIommu, VtdState};
use crate::viommu::{
    HostSideError, InterruptListener, InterruptRemapper, InterruptSink, Observer, PagedRegisters,
    SnapshotError, TableMemory,
};

const MODEL: &str = "VT-d";

/// See [`VtdBuilder::fault_target`].
type Wrap = Box<dyn FnOnce(Arc<VtdIommu>) -> Arc<dyn FaultTarget>>;

/// Makes a [`Vtd`].
///
/// ```
/// # #[cfg(feature = "test-support")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
/// use twostage::iommufd::HostIommu;
/// use twostage::nesting::GuestIoas;
/// use twostage::spec::pci::Bdf;
/// use twostage::unit::VtdBuilder;
/// use twostage::viommu::InterruptSink;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
/// # use twostage::iommufd::fake::RecordingHost;
///
/// struct Messages;
/// impl InterruptSink for Messages {
///     fn send_msi(&self, _address: u64, _data: u32) {
///         // To the virtual machine's LAPICs.
///     }
/// }
///
/// // A host, and a device bound to it. With the kernel's: `KernelHost` and `device_bind`.
/// # let (recording, nic) = RecordingHost::with_vtd();
/// # let host: Arc<dyn HostIommu> = recording;
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
/// let ioas = GuestIoas::new(host)?;
/// ioas.map_all(&memory)?;
///
/// let slot = Bdf::new(0, 4, 0).ok_or("no such slot")?;
/// let vtd = VtdBuilder::new(ioas, Arc::new(memory), Arc::new(Messages))
///     .device(slot, nic, "nic0")
///     .build()?;
/// // What a vCPU does at the address of the registers:
/// let mut version = [0; 4];
/// vtd.mmio_read(0, &mut version);
/// // When the machine ends:
/// vtd.halt();
/// vtd.shutdown()?;
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "test-support"))]
/// # fn main() {}
/// ```
#[must_use = "nothing exists before build() or restore()"]
pub struct VtdBuilder {
    ioas: Arc<GuestIoas>,
    memory: Arc<dyn TableMemory>,
    interrupts: Arc<dyn InterruptSink>,
    config: Option<VtdConfig>,
    serving: Nesting,
    devices: Vec<NewDevice>,
    without_devices: bool,
    observer: Option<Arc<dyn Observer>>,
    fault_target: Wrap,
    threads: Arc<dyn ThreadStart>,
}

impl VtdBuilder {
    /// For a guest with the memory `ioas` on the host, in which the unit reads tables and queues
    /// through `memory`. `interrupts` receives the unit's own messages.
    pub fn new(
        ioas: Arc<GuestIoas>,
        memory: Arc<dyn TableMemory>,
        interrupts: Arc<dyn InterruptSink>,
    ) -> Self {
        Self {
            ioas,
            memory,
            interrupts,
            config: None,
            serving: Nesting::default(),
            devices: Vec::new(),
            without_devices: false,
            observer: None,
            fault_target: Box::new(|model| model),
            threads: Arc::new(StdThreads),
        }
    }

    /// What the guest is offered, as far as the hosts' units have it; they must have what is
    /// requested by value ([`VtdConfig::intersect`]). Without this call: the default. Before a
    /// restore: the configuration of the snapshot, or no call.
    pub fn config(mut self, config: &VtdConfig) -> Self {
        self.config = Some(config.clone());
        self
    }

    /// Whether hosts nest the guest's tables or have mirrors of them, each host by itself. Without
    /// this call: they nest.
    pub fn nesting(mut self, nesting: Nesting) -> Self {
        self.serving = nesting;
        self
    }

    /// Adds `dev`, a device bound to the host, as the guest's `rid`. Errors call it `name`.
    pub fn device(mut self, rid: Bdf, dev: ObjectId, name: impl Into<String>) -> Self {
        self.devices.push(NewDevice::new(None, rid, dev, name));
        self
    }

    /// The same for a device of another host, on which guest memory is `ioas`.
    pub fn device_on(
        mut self,
        ioas: &Arc<GuestIoas>,
        rid: Bdf,
        dev: ObjectId,
        name: impl Into<String>,
    ) -> Self {
        self.devices.push(NewDevice::new(Some(ioas), rid, dev, name));
        self
    }

    /// The unit may start without devices: its configuration is then not reduced to what hosts
    /// support, and devices that come later have to support all of it.
    pub fn without_devices(mut self) -> Self {
        self.without_devices = true;
        self
    }

    /// Who sees what the unit does.
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Faults of DMA go to what `wrap` makes of the unit, which is to hand them on, rather than
    /// directly to the unit.
    pub fn fault_target(
        mut self,
        wrap: impl FnOnce(Arc<VtdIommu>) -> Arc<dyn FaultTarget> + 'static,
    ) -> Self {
        self.fault_target = Box::new(wrap);
        self
    }

    /// Who starts the unit's threads, one for the page requests of each host; [`StdThreads`]
    /// without this.
    pub fn threads(mut self, threads: Arc<dyn ThreadStart>) -> Self {
        self.threads = threads;
        self
    }

    /// The unit as after power-on, with its devices.
    ///
    /// # Errors
    /// No device was given; one cannot be behind this unit; or the configuration is impossible.
    pub fn build(self) -> Result<Vtd, BuildError> {
        if self.devices.is_empty() && !self.without_devices {
            return Err(BuildError::NoDevices { model: MODEL });
        }
        let wanted = self.config.unwrap_or_default();
        wanted.check().map_err(impossible)?;
        let serving = Serving::new(self.serving, self.memory.clone(), wanted.clone());
        let side = HostSide::new(self.ioas, serving, self.threads, &self.devices)?;
        let lowered = wanted.intersect(&side.hosts);
        let offered = offered(wanted, lowered)?;
        let host = side.sides.clone();
        let model = VtdIommu::new(&offered, self.memory, host, self.interrupts, self.observer)
            .map_err(impossible)?;
        let unit = side.join(model, offered, self.fault_target);
        for device in &self.devices {
            unit.give(device)?;
        }
        Ok(unit)
    }

    /// The unit that `state` is a snapshot of, on this host, with guest memory as it was. Devices
    /// are those of the snapshot, with the same Requester IDs; so is the configuration. See
    /// [`VtdIommu::restore`], also for what is left to do: [`Vtd::drain_queue`].
    ///
    /// # Errors
    /// The snapshot is not one that this release can restore, or the configuration or the places of
    /// devices are not those of the snapshot: the host is not called then. Or a device cannot do
    /// what the guest was offered; or the host refused part of what the unit had.
    pub fn restore(self, state: &VtdState) -> Result<Vtd, BuildError> {
        state.check()?;
        check_config(MODEL, self.config.as_ref(), &state.config)?;
        let functions: Vec<Bdf> = state.functions.iter().map(|function| function.rid).collect();
        check_devices(MODEL, &functions, &self.devices)?;
        let serving = Serving::new(self.serving, self.memory.clone(), state.config.clone());
        let side = HostSide::new(self.ioas, serving, self.threads, &self.devices)?;
        for host in &side.hosts {
            state.config.check_late(host).map_err(AddError::Lacks)?;
        }
        let host = side.sides.clone();
        let model = VtdIommu::restore(state, self.memory, host, self.interrupts, self.observer)?;
        Ok(side.join(model, state.config.clone(), self.fault_target))
    }
}

impl fmt::Debug for VtdBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VtdBuilder").field("devices", &self.devices).finish_non_exhaustive()
    }
}

fn impossible(error: VtdConfigError) -> BuildError {
    BuildError::Config { model: MODEL, what: error.to_string() }
}

/// The host side, with devices.
struct HostSide {
    sides: Arc<Sides<VtdNesting>>,
    names: BTreeMap<Bdf, String>,
    hosts: Vec<HostVtd>,
}

impl HostSide {
    fn new(
        ioas: Arc<GuestIoas>,
        serving: Serving,
        threads: Arc<dyn ThreadStart>,
        devices: &[NewDevice],
    ) -> Result<Self, AddError> {
        let names = names_of(devices)?;
        // Those first for which their host does not nest: it has mirrors for all then.
        let mut devices: Vec<_> = devices.iter().collect();
        if devices.len() > 1 {
            devices.sort_by_cached_key(|device| {
                let host = device.ioas.as_ref().unwrap_or(&ioas).host();
                serving.nests_for(&**host, device.dev)
            });
        }
        let first = VtdNesting::serving(ioas, serving).with_threads(threads);
        let sides = Arc::new(Sides::new(first));
        let mut side = Self { sides, names, hosts: Vec::new() };
        for device in devices {
            side.hosts.push(take_in(&side.sides, device)?);
        }
        Ok(side)
    }

    fn join(self, model: Arc<VtdIommu>, config: VtdConfig, wrap: Wrap) -> Vtd {
        let Self { sides, names, .. } = self;
        let target = wrap(model.clone());
        sides.set_fault_target(Arc::downgrade(&target) as Weak<dyn FaultTarget>);
        let names = Names(Mutex::new(names));
        Vtd { model, sides, config, names, _target: target }
    }
}

/// Adds `device` to the host side. Returns its IOMMU.
fn take_in(sides: &Sides<VtdNesting>, device: &NewDevice) -> Result<HostVtd, AddError> {
    let NewDevice { rid, dev, name, ioas } = device;
    let wrong = || AddError::WrongIommu { device: name.clone(), a_model: "a VT-d" };
    let added = sides.add_device(ioas.as_ref(), *rid, *dev).map_err(|source| match source {
        NestingError::NoVtd(_) => wrong(),
        source => AddError::Nesting { device: name.clone(), source },
    });
    added.and_then(|_| sides.of(*rid).host_unit(*rid, name.clone()).ok_or_else(wrong))
}

/// A virtual VT-d with its host side and devices.
///
/// All verbs may be called from any thread. Adding and removing devices, snapshots and resets
/// exclude each other. On drop, it is halted and shut down; errors are then logged.
///
/// Moved to another host, with guest memory as it was:
///
/// ```
/// # #[cfg(feature = "test-support")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # use std::sync::Arc;
/// # use twostage::iommufd::fake::RecordingHost;
/// # use twostage::nesting::GuestIoas;
/// # use twostage::spec::pci::Bdf;
/// # use twostage::unit::VtdBuilder;
/// # use twostage::viommu::InterruptSink;
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// # struct Messages;
/// # impl InterruptSink for Messages {
/// #     fn send_msi(&self, _: u64, _: u32) {}
/// # }
/// # let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)])?);
/// # let slot = Bdf::new(0, 4, 0).ok_or("no such slot")?;
/// let builder = |host| -> Result<VtdBuilder, Box<dyn std::error::Error>> {
///     Ok(VtdBuilder::new(GuestIoas::new(host)?, memory.clone(), Arc::new(Messages)))
/// };
/// # let (host, nic) = RecordingHost::with_vtd();
/// let vtd = builder(host)?.device(slot, nic, "nic0").build()?;
/// let state = vtd.snapshot()?;
/// vtd.shutdown()?;
///
/// # let (other_host, nic) = RecordingHost::with_vtd();
/// let vtd = builder(other_host)?.device(slot, nic, "nic0").restore(&state)?;
/// vtd.drain_queue();
/// assert_eq!(vtd.snapshot()?, state);
///
/// // Devices come and go while the guest runs.
/// vtd.remove_device(slot)?;
/// vtd.add_device(slot, nic, "nic0")?;
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "test-support"))]
/// # fn main() {}
/// ```
pub struct Vtd {
    model: Arc<VtdIommu>,
    sides: Arc<Sides<VtdNesting>>,
    config: VtdConfig,
    pub(super) names: Names,
    /// Kept alive for nesting, which has a weak reference.
    _target: Arc<dyn FaultTarget>,
}

impl Vtd {
    /// The model, for what has no verb here.
    pub fn model(&self) -> &Arc<VtdIommu> {
        &self.model
    }

    /// The host side on the builder's IOAS, for what has no verb here.
    pub fn nesting(&self) -> &Arc<VtdNesting> {
        self.sides.first()
    }

    /// The host sides: that one, then one for each other IOAS, in the order that devices came.
    pub fn nestings(&self) -> Vec<Arc<VtdNesting>> {
        self.sides.iter().collect()
    }

    /// What the guest is offered.
    pub fn config(&self) -> &VtdConfig {
        &self.config
    }

    /// Reads registers. See [`VtdIommu::mmio_read`].
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.model.mmio_read(offset, data);
    }

    /// Writes registers. See [`VtdIommu::mmio_write`].
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.model.mmio_write(offset, data);
    }

    /// The registers as memory of the guest, for a VMM whose guest is to use them without exits.
    pub fn paged_registers(&self) -> Arc<dyn PagedRegisters> {
        self.model.clone()
    }

    /// Adds `dev`, a device bound to the host, as the guest's `rid`: it passes while translation is
    /// disabled, and follows its tables while it is enabled. Errors call it `name`.
    ///
    /// # Errors
    /// The place is taken; its IOMMU lacks something that the guest was offered; or the host
    /// refuses it.
    pub fn add_device(&self, rid: Bdf, dev: ObjectId, name: &str) -> Result<(), AddError> {
        self.add(NewDevice::new(None, rid, dev, name))
    }

    /// The same for a device of another host, on which guest memory is `ioas`, used by devices
    /// before or not. The unit keeps `ioas` until shutdown.
    ///
    /// # Errors
    /// As [`Vtd::add_device`].
    pub fn add_device_on(
        &self,
        ioas: &Arc<GuestIoas>,
        rid: Bdf,
        dev: ObjectId,
        name: &str,
    ) -> Result<(), AddError> {
        self.add(NewDevice::new(Some(ioas), rid, dev, name))
    }

    fn add(&self, device: NewDevice) -> Result<(), AddError> {
        let add = |device: &NewDevice| {
            let host = take_in(&self.sides, device)?;
            self.config.check_late(&host).map_err(AddError::Lacks)?;
            self.give(device)
        };
        self.names.add(device, add, |rid| self.sides.remove_device(rid))
    }

    /// Gives the model a device that the host side has.
    fn give(&self, device: &NewDevice) -> Result<(), AddError> {
        let refused = |source| AddError::Refused { device: device.name.clone(), source };
        self.model.add_device(device.rid).map_err(refused)
    }

    /// Removes the guest's `rid`, in use or not: when this returns, it does no more DMA, its
    /// requesters are unknown to the unit (invalidations that name it have no effect, or the
    /// time-out of a device that does not answer), and no host object is left that others do not
    /// use. The device object stays with its owner, to be unbound.
    ///
    /// # Errors
    /// There is no such device; or the host does not let go of it. For the guest it is then gone,
    /// too, and the removal can be repeated.
    pub fn remove_device(&self, rid: Bdf) -> Result<(), RemoveError> {
        self.names.remove(rid, |rid| {
            self.model.remove_device(rid);
            self.sides.remove_device(rid)
        })
    }

    /// The state at one moment, for [`VtdBuilder::restore`]. Devices are to be stopped before; the
    /// host has no faults then that were not delivered. See [`VtdIommu::snapshot`].
    ///
    /// # Errors
    /// The unit is halted.
    pub fn snapshot(&self) -> Result<VtdState, SnapshotError> {
        self.names.with_whole_devices(|| self.model.snapshot())
    }

    /// The unit is as after power-on, with the same devices. See [`VtdIommu::reset`].
    ///
    /// # Errors
    /// The host refused part of it; nothing but a repeated reset may follow.
    pub fn reset(&self) -> Result<(), HostSideError> {
        self.names.with_whole_devices(|| self.model.reset())
    }

    /// Goes on with the invalidation queue: once after a restore, when fault targets and interrupt
    /// listeners are in place and before vCPUs start. See [`VtdIommu::drain_queue`].
    pub fn drain_queue(&self) {
        self.model.drain_queue();
    }

    /// The machine is stopping. See [`VtdIommu::halt`].
    pub fn halt(&self) {
        self.model.halt();
    }

    /// Halts, detaches every device and destroys every host object of the unit; the IOAS goes with
    /// its last user. May be called again to retry.
    ///
    /// # Errors
    /// The host refused to release something.
    pub fn shutdown(&self) -> Result<(), NestingError> {
        self.halt();
        self.sides.shutdown()
    }

    /// Who remaps the interrupts of the devices; `None` if that is not offered to the guest.
    pub fn interrupt_remapper(&self) -> Option<Arc<dyn InterruptRemapper>> {
        let remapper: Arc<dyn InterruptRemapper> = self.model.clone();
        self.config.interrupt_remapping.then_some(remapper)
    }

    /// From now on `listener` is told of changes of what interrupts are remapped to, for one that
    /// keeps it; and once before this returns. See [`VtdIommu::add_interrupt_listener`].
    pub fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>) {
        self.model.add_interrupt_listener(listener);
    }
}

impl fmt::Debug for Vtd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, config, names, .. } = self;
        f.debug_struct("Vtd")
            .field("model", model)
            .field("config", config)
            .field("names", names)
            .finish_non_exhaustive()
    }
}

impl Drop for Vtd {
    fn drop(&mut self) {
        // Nesting tries once more when it goes, and logs what stays.
        let _ = self.shutdown();
    }
}
