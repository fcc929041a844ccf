// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtio over PCI (virtio 1.3 §4.1), without the legacy interface and without INTx.

mod common;
mod layout;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;
use twostage::sync::Mutex;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use self::common::{CommonConfig, Effect};
use self::layout::{ConfigWindow, Structure, NOTIFY_MULTIPLIER};
use super::backend::{Backend, Features, Model};
use super::chain::Broken;
use super::link::{Link, QueueCounters, RequestCounters};
use super::memory::DeviceMemory;
use super::queue::Virtqueue;
use super::worker::{Device, Ended, Worker};
use crate::arch::layout::{PCI_MMIO_LAST, PCI_MMIO_START};
use crate::pci::{
    BarPlacement, ConfigSpace, ExpressCapability, Identity, InterruptVector, Location, Msix,
    MsixCapability, PciFunction,
};
use crate::process::limits;
use crate::trace::Trace;
use crate::Result;
use twostage::warn_limited;

pub use layout::BAR_SIZE;

/// Vendor of all virtio devices.
const VENDOR: u16 = 0x1af4;
/// Device ID for device type 0; others follow.
const DEVICE_BASE: u16 = 0x1040;
/// 0x40 and above means that there is no legacy interface (§4.1.2.1).
const SUBSYSTEM: u16 = 0x40;

/// How long a driver's write of 0 to the status, or of a function-level reset, is delayed so that
/// the reset is over when it returns. Drivers should poll the status until it is 0 (§4.1.4.3.2),
/// but some do not.
const RESET_PATIENCE: Duration = Duration::from_millis(200);

/// A virtio device as a PCI function. Dropping it stops it.
///
/// Lock order: the transport, then configuration space. The worker takes neither.
pub struct VirtioPci {
    model: Model,
    served_by: Option<&'static str>,
    config: Mutex<ConfigSpace>,
    msix: MsixCapability,
    window: ConfigWindow,
    express: ExpressCapability,
    link: Arc<Link>,
    transport: Mutex<Transport>,
    doorbells: Arc<dyn Doorbells>,
}

/// What vCPU threads work on.
struct Transport {
    common: CommonConfig,
    // The worker is dropped before the device that it uses.
    worker: Option<Worker>,
    device: Arc<Mutex<Device>>,
    /// What of the host it uses.
    host: Arc<str>,
    /// The driver has requested a reset, which is over when the worker has ended.
    resetting: bool,
    /// The machine is stopping: no worker is started.
    halted: bool,
    /// When notifications are doorbells: the address of the first.
    attached: Option<u64>,
}

impl VirtioPci {
    /// The device `backend` at `location`, named `name` in logs and `trace`. `vector` creates each
    /// vector.
    ///
    /// # Errors
    /// The process is out of file descriptors, or `vector` fails.
    pub fn new(
        name: String,
        backend: Box<dyn Backend>,
        memory: DeviceMemory,
        location: Location,
        vector: &dyn Fn() -> Result<Arc<dyn InterruptVector>>,
        doorbells: Arc<dyn Doorbells>,
        trace: Option<Arc<Trace>>,
    ) -> Result<Self> {
        let (model, served_by, host) = (backend.model(), backend.served_by(), backend.host());
        let queues = model.queue_sizes.len();
        // One for each queue, one for the configuration.
        let vectors = queues + 1;
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + model.device_type,
            class: model.class,
            revision: 1,
        });
        config.behind(location.way);
        config.set_subsystem(VENDOR, SUBSYSTEM);
        config.add_bar(layout::BAR.into(), BAR_SIZE, location.bar);
        layout::add_structures(&mut config, queues as u32, model.config.len() as u32);
        let msix = MsixCapability::add(
            &mut config,
            vectors as u16,
            Structure::MsixTable.msix_place(),
            Structure::MsixPending.msix_place(),
        );
        let window = ConfigWindow::add(&mut config);
        let express = ExpressCapability::add(&mut config);
        let vectors = (0..vectors).map(|_| vector()).collect::<Result<_>>()?;
        let link = Arc::new(Link::new(name, queues, Msix::new(vectors), memory.gate(), trace)?);
        link.set_bus_master(false);
        let offered =
            Features(model.features.0 | Features::of_transport(memory.is_behind_iommu()).0);
        let transport = Transport {
            common: CommonConfig::new(offered, model.queue_sizes),
            worker: None,
            device: Arc::new(Mutex::new(Device { backend, memory })),
            host: host.into(),
            resetting: false,
            halted: false,
            attached: None,
        };
        let placements = config.bar_placements();
        let device = Self {
            model,
            served_by,
            config: Mutex::new(config),
            msix,
            window,
            express,
            link,
            transport: Mutex::new(transport),
            doorbells,
        };
        // The BAR responds from the start.
        device.move_doorbells(&mut device.transport(), &placements);
        Ok(device)
    }

    /// The device type, for reports.
    pub fn model(&self) -> &'static str {
        self.model.name
    }

    /// What of the host serves its requests, for reports.
    pub fn served_by(&self) -> Option<&'static str> {
        self.served_by
    }

    /// Request statistics.
    pub fn counters(&self) -> &RequestCounters {
        &self.link.counters
    }

    /// Queue statistics.
    pub fn queue_counters(&self) -> &[QueueCounters] {
        &self.link.queue_counters
    }

    /// The machine is stopping: when this returns, the device makes no more requests, and its
    /// thread ends soon.
    pub fn halt(&self) {
        let mut transport = self.transport();
        transport.halted = true;
        if let Some(worker) = &mut transport.worker {
            worker.tell_to_stop();
        }
    }

    /// Serves what was notified, and with `input`, what the host and time would tell, where devices
    /// have no threads ([`without_threads`](crate::devices::threadless)). Returns whether anything
    /// was notified.
    #[cfg(feature = "test-support")]
    pub fn turn(&self, input: bool) -> bool {
        let mut transport = self.transport();
        transport.worker.as_mut().is_some_and(|worker| worker.turn(input))
    }

    fn transport(&self) -> MutexGuard<'_, Transport> {
        let mut transport = self.transport.lock();
        transport.settle(&self.link);
        transport
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut transport = self.transport();
        if transport.resetting {
            // Another reset is the one under way, which may be a function-level one.
            if !CommonConfig::is_reset(offset, data) {
                self.link.mistake(&"the driver does not wait until the status is 0 after a reset");
            }
            return;
        }
        let written = transport.common.write(offset, data.len(), number(data), &self.link);
        match written {
            Ok(Effect::None) => {}
            Ok(Effect::Start) if transport.halted => {}
            Ok(Effect::Start) => {
                if let Err(broken) = transport.start(&self.link) {
                    self.link.set_needs_reset(&broken);
                }
            }
            Ok(Effect::Reset) => self.reset_device(transport),
            Err(mistake) => self.link.mistake(&mistake),
        }
    }

    /// Resets the device: it makes no more requests when this returns, also if its worker has not
    /// ended within [`RESET_PATIENCE`], as the host takes long to read or write. Then the status is
    /// not 0, and writes of it have no effect, until the worker has ended.
    fn reset_device(&self, mut transport: MutexGuard<'_, Transport>) {
        if let Some(ended) = transport.reset(&self.link) {
            // A disk may take long: do not make others wait for it.
            drop(transport);
            ended.wait(RESET_PATIENCE);
        }
    }

    /// Function-level reset: no request or message is outstanding when this returns, and none
    /// follows, also if the device's reset is not over yet ([`VirtioPci::reset_device`]).
    fn reset_function(&self, mut transport: MutexGuard<'_, Transport>) {
        self.config.lock().reset();
        self.link.set_bus_master(false);
        self.link.msix.reset();
        self.move_doorbells(&mut transport, &[]);
        self.reset_device(transport);
    }

    /// Moves the doorbells to where the BAR is now.
    fn move_doorbells(&self, transport: &mut Transport, placements: &[BarPlacement]) {
        let place = placements
            .first()
            .filter(|bar| bar.start >= PCI_MMIO_START && bar.last <= PCI_MMIO_LAST)
            .map(|bar| bar.start + u64::from(Structure::Notify.start()));
        if place == transport.attached {
            return;
        }
        self.detach_doorbells(transport);
        if let Some(first) = place {
            let attached: Vec<_> = self
                .addresses(first)
                .map(|(address, event)| self.doorbells.attach(address, event))
                .collect();
            if attached.iter().all(|attached| *attached) {
                transport.attached = place;
            } else {
                let some = self.addresses(first).zip(attached).filter(|(_, attached)| *attached);
                some.for_each(|((address, event), _)| self.doorbells.detach(address, event));
            }
        }
    }

    fn detach_doorbells(&self, transport: &mut Transport) {
        if let Some(first) = transport.attached.take() {
            self.addresses(first)
                .for_each(|(address, event)| self.doorbells.detach(address, event));
        }
    }

    /// The notification address of each queue, starting with `first`, and its event.
    fn addresses(&self, first: u64) -> impl Iterator<Item = (u64, &EventFd)> {
        let addresses = (first..).step_by(NOTIFY_MULTIPLIER as usize);
        addresses.zip(self.link.queue_events())
    }
}

impl Transport {
    /// Starts the device with the queues that the driver set up.
    fn start(&mut self, link: &Arc<Link>) -> std::result::Result<(), Broken> {
        let features = self.common.accepted();
        let event_index = features.has(VIRTIO_RING_F_EVENT_IDX);
        let mut queues = Vec::new();
        for (number, setup) in self.common.queues().iter().enumerate() {
            queues.push(Virtqueue::new(setup, event_index, number, link.clone())?);
        }
        // Not locked: an earlier worker has ended.
        let mut device = self.device.lock();
        device.backend.start(features)?;
        drop(device);
        let failed = |error: io::Error| {
            Broken::Device(limits::with_advice(&format!("starting its thread: {error}")))
        };
        let (device, host) = (self.device.clone(), self.host.clone());
        let worker = Worker::start(device, host, queues, link.clone());
        self.worker = Some(worker.map_err(failed)?);
        Ok(())
    }

    /// Resets the device: it makes no more requests when this returns. The reset is over, and the
    /// status 0, when its worker has ended, which the caller waits for without holding a lock.
    fn reset(&mut self, link: &Link) -> Option<Arc<Ended>> {
        self.resetting = true;
        link.set_driver_ok(false);
        let ended = self.worker.as_mut().map(Worker::tell_to_stop);
        self.settle(link);
        ended
    }

    /// Completes a reset if its worker has ended.
    fn settle(&mut self, link: &Link) {
        if self.resetting && self.worker.as_ref().is_none_or(Worker::has_ended) {
            self.worker = None;
            self.common.reset();
            link.reset();
            self.resetting = false;
        }
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn config_is_memory(&self) -> bool {
        // Its data register shows another register.
        self.window.access(&self.config.lock()).is_none()
    }

    fn config_reading(&self, offset: u16, length: usize) {
        if !self.window.is_data(offset, length) {
            return;
        }
        let config = self.config.lock();
        let Some(access) = self.window.access(&config) else { return };
        drop(config);
        let mut data = [0; 4];
        self.read_bar(access.bar, access.offset, &mut data[..access.length]);
        let mut config = self.config.lock();
        self.window.set_data(&mut config, data);
    }

    fn config_written(&self, offset: u16, length: usize) -> bool {
        if self.window.is_data(offset, length) {
            let config = self.config.lock();
            let (access, data) = (self.window.access(&config), self.window.data(&config));
            drop(config);
            if let Some(access) = access {
                self.write_bar(access.bar, access.offset, &data[..access.length]);
            }
            return false;
        }
        // The lock serializes writers: the last write is applied last.
        let mut transport = self.transport();
        let (reset, may_request, control, placements) = {
            let config = self.config.lock();
            let reset = self.express.reset_initiated(&config);
            (reset, config.may_request(), self.msix.control(&config), config.bar_placements())
        };
        if reset {
            self.reset_function(transport);
            return true;
        }
        self.link.msix.set_control(control);
        self.link.set_bus_master(may_request);
        self.move_doorbells(&mut transport, &placements);
        false
    }

    fn reset(&self) {
        self.reset_function(self.transport());
    }

    fn read_bar(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match Structure::at(offset) {
            Some((Structure::Common, offset)) => {
                match self.transport().common.read(offset, data.len(), &self.link) {
                    Ok(value) => {
                        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
                    }
                    Err(mistake) => self.link.mistake(&mistake),
                }
            }
            Some((Structure::Isr, 0)) => {
                if let Some(first) = data.first_mut() {
                    *first = self.link.take_isr();
                }
            }
            Some((Structure::Device, offset)) => {
                // An offset within a page.
                let config = self.model.config.get(offset as usize..).unwrap_or_default();
                data.iter_mut().zip(config).for_each(|(to, from)| *to = *from);
            }
            Some((Structure::MsixTable, offset)) => self.link.msix.read_table(offset, data),
            Some((Structure::MsixPending, offset)) => self.link.msix.read_pending(offset, data),
            Some((Structure::Isr | Structure::Notify, _)) | None => {}
        }
    }

    fn write_bar(&self, _bar: usize, offset: u64, data: &[u8]) {
        match Structure::at(offset) {
            Some((Structure::Common, offset)) => self.write_common(offset, data),
            // The address selects the queue; the value written is the same.
            Some((Structure::Notify, offset)) => {
                self.link.notify((offset / u64::from(NOTIFY_MULTIPLIER)) as usize);
            }
            Some((Structure::MsixTable, offset)) => self.link.msix.write_table(offset, data),
            // No configuration here has driver-writable fields.
            Some((Structure::Device | Structure::Isr | Structure::MsixPending, _)) | None => {}
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut transport = self.transport.lock();
        self.detach_doorbells(&mut transport);
        transport.worker = None;
    }
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci").field("link", &self.link).finish_non_exhaustive()
    }
}

/// Turns guest writes to an address into events.
pub trait Doorbells: Send + Sync {
    /// From now on a guest write to `address` only signals `event`. Returns whether that works; if
    /// not, writes are dispatched as usual.
    fn attach(&self, address: u64, event: &EventFd) -> bool;

    /// Ends that.
    fn detach(&self, address: u64, event: &EventFd);
}

/// Doorbells of a KVM: ioeventfd.
#[derive(Debug)]
pub struct KvmDoorbells(pub Arc<VmFd>);

impl Doorbells for KvmDoorbells {
    fn attach(&self, address: u64, event: &EventFd) -> bool {
        let result = self.0.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
        if let Err(error) = &result {
            warn_limited!("notifications at {address:#x} go through user space: {error}");
        }
        result.is_ok()
    }

    fn detach(&self, address: u64, event: &EventFd) {
        if let Err(error) =
            self.0.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
        {
            warn_limited!("notifications stay at {address:#x}: {error}");
        }
    }
}

/// No doorbells: every notification is an exit.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct NoDoorbells;

#[cfg(test)]
impl Doorbells for NoDoorbells {
    fn attach(&self, _: u64, _: &EventFd) -> bool {
        false
    }

    fn detach(&self, _: u64, _: &EventFd) {}
}

/// A little-endian number of at most eight bytes.
fn number(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
