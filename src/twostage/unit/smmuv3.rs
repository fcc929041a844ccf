// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual SMMUv3 with its host side.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use super::{
    check_config, check_devices, names_of, offered, AddError, BuildError, Names, NewDevice,
    RemoveError,
};
use crate::iommufd::ObjectId;
use crate::nesting::sides::Sides;
use crate::nesting::smmuv3::{SmmuNesting, DEFAULT_EVENT_DEPTH};
use crate::nesting::{host_smmu, GuestIoas, NestingError};
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::StreamId;
use crate::sync::Mutex;
use crate::threads::{StdThreads, ThreadStart};
use crate::viommu::smmuv3::{
    EventTarget, HostSmmu, Smmu, SmmuConfig, SmmuConfigError, SmmuInterrupts, SmmuState,
};
use crate::viommu::{
    HostSideError, InterruptListener, InterruptRemapper, Observer, PagedRegisters, SnapshotError,
    TableMemory,
};

const MODEL: &str = "SMMUv3";

/// See [`Smmuv3Builder::fault_target`].
type Wrap = Box<dyn FnOnce(Arc<Smmu>) -> Arc<dyn EventTarget>>;

/// Makes a [`Smmuv3`].
///
/// Used like [`VtdBuilder`](super::VtdBuilder), which has an example.
///
/// ```
/// # #[cfg(feature = "test-support")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
/// use twostage::iommufd::{Protection, UserMemory};
/// use twostage::nesting::GuestIoas;
/// use twostage::spec::pci::Bdf;
/// use twostage::unit::Smmuv3Builder;
/// use twostage::viommu::smmuv3::{SmmuInterrupt, SmmuInterrupts};
/// use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
/// # use twostage::iommufd::fake::RecordingHost;
///
/// struct Interrupts;
/// impl SmmuInterrupts for Interrupts {
///     fn message(&self, _address: u64, _data: u32) -> bool {
///         true // The virtual machine's interrupt controller took it.
///     }
///     fn wire(&self, _interrupt: SmmuInterrupt) {
///         // Only if the guest has not set up messages.
///     }
/// }
///
/// // A host, and a device bound to it. With the kernel's: `KernelHost` and `device_bind`.
/// # let (host, nic) = RecordingHost::with_smmuv3();
/// let region = Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x10_0000, None)?);
/// let memory = GuestMemoryMmap::from_arc_regions(vec![region.clone()])?;
/// let ioas = GuestIoas::new(host)?;
/// ioas.map(0, &UserMemory::whole(region), Protection::READ_WRITE)?;
///
/// // Its Requester ID is also its StreamID.
/// let slot = Bdf::new(0, 4, 0).ok_or("no such slot")?;
/// let smmu = Smmuv3Builder::new(ioas, Arc::new(memory), Arc::new(Interrupts))
///     .device(slot, nic, "nic0")
///     .build()?;
/// assert!(smmu.config().granule_4k);
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "test-support"))]
/// # fn main() {}
/// ```
#[must_use = "nothing exists before build() or restore()"]
pub struct Smmuv3Builder {
    ioas: Arc<GuestIoas>,
    memory: Arc<dyn TableMemory>,
    interrupts: Arc<dyn SmmuInterrupts>,
    config: Option<SmmuConfig>,
    event_depth: u32,
    threads: Arc<dyn ThreadStart>,
    devices: Vec<NewDevice>,
    without_devices: bool,
    observer: Option<Arc<dyn Observer>>,
    fault_target: Wrap,
}

impl Smmuv3Builder {
    /// For a guest with the memory `ioas` on the host, in which the unit reads tables and queues
    /// through `memory`. `interrupts` receives the unit's own interrupts.
    pub fn new(
        ioas: Arc<GuestIoas>,
        memory: Arc<dyn TableMemory>,
        interrupts: Arc<dyn SmmuInterrupts>,
    ) -> Self {
        Self {
            ioas,
            memory,
            interrupts,
            config: None,
            event_depth: DEFAULT_EVENT_DEPTH,
            threads: Arc::new(StdThreads),
            devices: Vec::new(),
            without_devices: false,
            observer: None,
            fault_target: Box::new(|model| model),
        }
    }

    /// What the guest is offered, as far as the hosts' units have it; they must have what is
    /// requested by value ([`SmmuConfig::intersect`]). Without this call: the default. Before a
    /// restore: the configuration of the snapshot, or no call.
    pub fn config(mut self, config: &SmmuConfig) -> Self {
        self.config = Some(config.clone());
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
        wrap: impl FnOnce(Arc<Smmu>) -> Arc<dyn EventTarget> + 'static,
    ) -> Self {
        self.fault_target = Box::new(wrap);
        self
    }

    /// Who starts the unit's thread, the one that delivers events; [`StdThreads`] without this.
    pub fn threads(mut self, threads: Arc<dyn ThreadStart>) -> Self {
        self.threads = threads;
        self
    }

    /// How many unread events the host keeps for the guest; [`DEFAULT_EVENT_DEPTH`] without this.
    pub fn event_depth(mut self, events: u32) -> Self {
        self.event_depth = events;
        self
    }

    /// The unit as after power-on, with its devices.
    ///
    /// # Errors
    /// No device was given; one cannot be behind this unit; or the configuration is impossible.
    pub fn build(self) -> Result<Smmuv3, BuildError> {
        if self.devices.is_empty() && !self.without_devices {
            return Err(BuildError::NoDevices { model: MODEL });
        }
        let wanted = self.config.unwrap_or_default();
        wanted.check().map_err(impossible)?;
        let nesting = SmmuNesting::with_event_depth(self.ioas, self.event_depth);
        let nesting = nesting.with_threads(self.threads).serving(&wanted);
        let side = HostSide::new(nesting, &self.devices)?;
        let lowered = wanted.intersect(&side.hosts);
        let offered = offered(wanted, lowered)?;
        let host = side.sides.clone();
        let model = Smmu::new(&offered, self.memory, host, self.interrupts, self.observer)
            .map_err(impossible)?;
        let unit = side.join(model, offered, self.fault_target);
        for device in &self.devices {
            unit.give(device)?;
        }
        Ok(unit)
    }

    /// The unit that `state` is a snapshot of, on this host, with guest memory as it was. Devices
    /// are those of the snapshot, with the same Requester IDs; so is the configuration. See
    /// [`Smmu::restore`], also for what is left to do: [`Smmuv3::drain_queue`].
    ///
    /// # Errors
    /// The snapshot is not one that this release can restore, or the configuration or the places of
    /// devices are not those of the snapshot: the host is not called then. Or a device cannot do
    /// what the guest was offered; or the host refused part of what the unit had.
    pub fn restore(self, state: &SmmuState) -> Result<Smmuv3, BuildError> {
        state.check()?;
        check_config(MODEL, self.config.as_ref(), &state.config)?;
        let streams = state.streams.iter().map(|stream| stream.stream);
        let streams: Vec<Bdf> = streams.map(rid_of).collect::<Result<_, _>>()?;
        check_devices(MODEL, &streams, &self.devices)?;
        let nesting = SmmuNesting::with_event_depth(self.ioas, self.event_depth);
        let nesting = nesting.with_threads(self.threads).serving(&state.config);
        let side = HostSide::new(nesting, &self.devices)?;
        for host in &side.hosts {
            state.config.check_late(host).map_err(AddError::Lacks)?;
        }
        let host = side.sides.clone();
        let model = Smmu::restore(state, self.memory, host, self.interrupts, self.observer)?;
        Ok(side.join(model, state.config.clone(), self.fault_target))
    }
}

impl fmt::Debug for Smmuv3Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Smmuv3Builder").field("devices", &self.devices).finish_non_exhaustive()
    }
}

/// The function with a StreamID.
fn rid_of(stream: StreamId) -> Result<Bdf, BuildError> {
    let absent = || BuildError::Absent { model: MODEL, requester: format!("stream {stream}") };
    stream.bdf().ok_or_else(absent)
}

fn impossible(error: SmmuConfigError) -> BuildError {
    BuildError::Config { model: MODEL, what: error.to_string() }
}

/// The host side, with devices.
struct HostSide {
    sides: Arc<Sides<SmmuNesting>>,
    names: BTreeMap<Bdf, String>,
    hosts: Vec<HostSmmu>,
}

impl HostSide {
    fn new(nesting: SmmuNesting, devices: &[NewDevice]) -> Result<Self, AddError> {
        let (names, sides) = (names_of(devices)?, Arc::new(Sides::new(nesting)));
        let mut side = Self { sides, names, hosts: Vec::new() };
        for device in devices {
            side.hosts.push(take_in(&side.sides, device)?);
        }
        Ok(side)
    }

    fn join(self, model: Arc<Smmu>, config: SmmuConfig, wrap: Wrap) -> Smmuv3 {
        let Self { sides, names, .. } = self;
        let target = wrap(model.clone());
        sides.set_fault_target(Arc::downgrade(&target) as Weak<dyn EventTarget>);
        let names = Names(Mutex::new(names));
        Smmuv3 { model, sides, config, names, _target: target }
    }
}

/// Adds `device` to the host side. Returns its IOMMU.
fn take_in(sides: &Sides<SmmuNesting>, device: &NewDevice) -> Result<HostSmmu, AddError> {
    let NewDevice { rid, dev, name, ioas } = device;
    let wrong = || AddError::WrongIommu { device: name.clone(), a_model: "an SMMUv3" };
    let added = sides.add_device(ioas.as_ref(), *rid, *dev).map_err(|source| match source {
        NestingError::NoSmmu(_) => wrong(),
        source => AddError::Nesting { device: name.clone(), source },
    });
    added
        .and_then(|(info, extensions)| host_smmu(name.clone(), &info, extensions).ok_or_else(wrong))
}

/// A virtual SMMUv3 with its host side and devices.
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
/// # use twostage::unit::Smmuv3Builder;
/// # use twostage::viommu::smmuv3::{SmmuInterrupt, SmmuInterrupts};
/// # use vm_memory::{GuestAddress, GuestMemoryMmap};
/// # struct Messages;
/// # impl SmmuInterrupts for Messages {
/// #     fn message(&self, _: u64, _: u32) -> bool {
/// #         true
/// #     }
/// #     fn wire(&self, _: SmmuInterrupt) {}
/// # }
/// # let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)])?);
/// # let slot = Bdf::new(0, 4, 0).ok_or("no such slot")?;
/// let builder = |host| -> Result<Smmuv3Builder, Box<dyn std::error::Error>> {
///     Ok(Smmuv3Builder::new(GuestIoas::new(host)?, memory.clone(), Arc::new(Messages)))
/// };
/// # let (host, nic) = RecordingHost::with_smmuv3();
/// let smmu = builder(host)?.device(slot, nic, "nic0").build()?;
/// let state = smmu.snapshot()?;
/// smmu.shutdown()?;
///
/// # let (other_host, nic) = RecordingHost::with_smmuv3();
/// let smmu = builder(other_host)?.device(slot, nic, "nic0").restore(&state)?;
/// smmu.drain_queue();
/// assert_eq!(smmu.snapshot()?, state);
///
/// // Devices come and go while the guest runs.
/// smmu.remove_device(slot)?;
/// smmu.add_device(slot, nic, "nic0")?;
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "test-support"))]
/// # fn main() {}
/// ```
pub struct Smmuv3 {
    model: Arc<Smmu>,
    sides: Arc<Sides<SmmuNesting>>,
    config: SmmuConfig,
    pub(super) names: Names,
    /// Kept alive for nesting, which has a weak reference.
    _target: Arc<dyn EventTarget>,
}

impl Smmuv3 {
    /// The model, for what has no verb here.
    pub fn model(&self) -> &Arc<Smmu> {
        &self.model
    }

    /// The host side on the builder's IOAS, for what has no verb here.
    pub fn nesting(&self) -> &Arc<SmmuNesting> {
        self.sides.first()
    }

    /// The host sides: that one, then one for each other IOAS, in the order that devices came.
    pub fn nestings(&self) -> Vec<Arc<SmmuNesting>> {
        self.sides.iter().collect()
    }

    /// What the guest is offered.
    pub fn config(&self) -> &SmmuConfig {
        &self.config
    }

    /// Reads registers. See [`Smmu::mmio_read`].
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.model.mmio_read(offset, data);
    }

    /// Writes registers. See [`Smmu::mmio_write`].
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.model.mmio_write(offset, data);
    }

    /// The registers as memory of the guest, for a VMM whose guest is to use them without exits.
    pub fn paged_registers(&self) -> Arc<dyn PagedRegisters> {
        self.model.clone()
    }

    /// Adds `dev`, a device bound to the host, as the guest's `rid`, which is its StreamID: it
    /// follows GBPA while translation is disabled, and its stream table entry while it is enabled.
    /// Errors call it `name`.
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
    /// As [`Smmuv3::add_device`].
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
    /// stream is unknown to the unit (commands that name it have no effect), and no host object is
    /// left that others do not use. The device object stays with its owner, to be unbound.
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

    /// The state at one moment, for [`Smmuv3Builder::restore`], after the events that the host has
    /// for the guest were delivered. Devices are to be stopped before. See [`Smmu::snapshot`].
    ///
    /// # Errors
    /// The unit is halted, or events are not delivered in time.
    pub fn snapshot(&self) -> Result<SmmuState, SnapshotError> {
        let pending =
            |error: NestingError| SnapshotError::Pending { model: MODEL, what: error.to_string() };
        self.sides.quiesce().map_err(pending)?;
        self.names.with_whole_devices(|| self.model.snapshot())
    }

    /// The unit is as after power-on, with the same devices. See [`Smmu::reset`].
    ///
    /// # Errors
    /// The host refused part of it; nothing but a repeated reset may follow.
    pub fn reset(&self) -> Result<(), HostSideError> {
        self.names.with_whole_devices(|| self.model.reset())
    }

    /// Goes on with the command queue: once after a restore, when fault targets and interrupt
    /// listeners are in place and before vCPUs start. See [`Smmu::drain_queue`].
    pub fn drain_queue(&self) {
        self.model.drain_queue();
    }

    /// The machine is stopping. See [`Smmu::halt`].
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

    /// Nobody: an SMMU translates the messages of devices like any write.
    pub fn interrupt_remapper(&self) -> Option<Arc<dyn InterruptRemapper>> {
        None
    }

    /// Tells `listener` once: nothing changes later, as nothing is remapped.
    pub fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>) {
        if let Some(listener) = listener.upgrade() {
            listener.interrupts_changed();
        }
    }
}

impl fmt::Debug for Smmuv3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, config, names, .. } = self;
        f.debug_struct("Smmuv3")
            .field("model", model)
            .field("config", config)
            .field("names", names)
            .finish_non_exhaustive()
    }
}

impl Drop for Smmuv3 {
    fn drop(&mut self) {
        // Nesting tries once more when it goes, and logs what stays.
        let _ = self.shutdown();
    }
}
