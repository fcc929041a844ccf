// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The educational device ([`twostage_emulated::edu`]) as a PCI function.
//!
//! It has INTx, MSI and MSI-X, with the table and the pending bits in a BAR of their own, a BAR of
//! memory, and a PCI Express capability with function-level reset, as vfio-pci needs to hand it on.
//! DMA is done by a worker thread, with no artificial delay. With `pasid=` the function has a PASID
//! capability; only while software has that enabled is there a register for the PASID of DMA, and
//! do requests carry one. With `ats=on` and `pri=on` it has those capabilities, and requests pages
//! that are not present while both are enabled.

mod services;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use twostage::sync::Mutex;

use self::services::{offered, GatedMemory, Rights};
use super::{DmaMaster, ServiceCapabilities};
use crate::config::EduConfig;
use crate::pci::{
    ConfigSpace, ExpressCapability, Identity, InterruptVector, IntxPin, Location, MsiCapability,
    Msix, MsixCapability, MsixPlace, PciFunction,
};
use crate::process::jail::{self, Kind};
use crate::{Error, Result};
use twostage::viommu::InterruptSink;
use twostage::warn_limited;
use twostage_emulated::edu::registers::{DMA_PASID, PASID_VALID};
use twostage_emulated::edu::{
    vectors, Effect, Engine, Registers, Transfer, BAR_SIZE, MEMORY_SIZE, VECTORS,
};

const IDENTITY: Identity =
    Identity { vendor: 0x1234, device: 0x11e8, class: 0x00_ff00, revision: 0x10 };

/// The BAR with the structures of MSI-X, a page for each: the table, then the pending bits.
const MESSAGES_BAR: u8 = 1;
const PENDING_BITS: u32 = 0x1000;
/// The BAR with memory.
const MEMORY_BAR: u8 = 2;
/// Lengths of the BARs, in bytes.
pub const BAR_SIZES: [u32; 3] = [BAR_SIZE, 0x2000, MEMORY_SIZE as u32];

/// DMA statistics of a device. Each counter is read on its own; together they are not a snapshot.
#[derive(Debug, Default)]
pub struct DmaCounters {
    done: AtomicU64,
    failed: AtomicU64,
}

impl DmaCounters {
    /// Completed transfers.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Transfers that the IOMMU refused, or that lie outside memory or the buffer.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }
}

/// The device. Dropping it stops its worker.
pub struct Edu {
    shared: Arc<Shared>,
    /// Each with the life it belongs to. Taken when the device is dropped, which ends the worker.
    transfers: Option<Mutex<Sender<(u64, Transfer)>>>,
    worker: Option<JoinHandle<()>>,
    /// What does transfers, if no thread does.
    #[cfg(feature = "test-support")]
    here: Option<Mutex<Dma>>,
}

/// What does transfers.
struct Dma {
    shared: Arc<Shared>,
    engine: Engine,
    memory: GatedMemory,
    mask: u64,
}

impl Dma {
    /// Performs one transfer, which software requested in `life`.
    fn run(&mut self, life: u64, transfer: Transfer) {
        if self.memory.life != life {
            // Its buffer must not tell of an earlier life (§6.6.2).
            self.engine = Engine::new(self.mask);
            self.memory.life = life;
        }
        self.shared.transfer(&mut self.engine, &mut self.memory, transfer);
    }
}

/// Shared by vCPU threads and the worker. Lock order: registers, then configuration space.
struct Shared {
    registers: Mutex<Registers>,
    config: Mutex<ConfigSpace>,
    msi: MsiCapability,
    express: ExpressCapability,
    msix_capability: MsixCapability,
    msix: Msix,
    memory: Mutex<Box<[u8; MEMORY_SIZE]>>,
    services: ServiceCapabilities,
    /// What register 0xA0 can hold.
    pasid_mask: u64,
    intx: IntxPin,
    messages: Arc<dyn InterruptSink>,
    rights: Arc<Rights>,
    counters: DmaCounters,
}

impl Edu {
    /// A device at `location`, with its other BARs at `more_bars`, which interrupts through `intx`,
    /// `messages` or vectors that `vector` creates, and makes DMA requests through `memory`.
    ///
    /// # Errors
    /// No thread can be started, or `vector` fails.
    pub fn new(
        config: &EduConfig,
        location: Location,
        more_bars: [u32; 2],
        intx: IntxPin,
        messages: Arc<dyn InterruptSink>,
        vector: &dyn Fn() -> Result<Arc<dyn InterruptVector>>,
        memory: Box<dyn DmaMaster>,
    ) -> Result<Self> {
        let mut space = ConfigSpace::new(IDENTITY);
        space.behind(location.way);
        let [messages_bar, memory_bar] = more_bars;
        let addresses = [location.bar, messages_bar, memory_bar];
        for (bar, (size, address)) in BAR_SIZES.into_iter().zip(addresses).enumerate() {
            space.add_bar(bar, size, address);
        }
        space.set_intx(intx.line());
        let msi = MsiCapability::add(&mut space);
        let express = ExpressCapability::add(&mut space);
        let place = |offset| MsixPlace { bar: MESSAGES_BAR, offset };
        let msix_capability =
            MsixCapability::add(&mut space, VECTORS as u16, place(0), place(PENDING_BITS));
        let msix = Msix::new((0..VECTORS).map(|_| vector()).collect::<Result<_>>()?);
        msix.set_bus_master(false);
        let control = memory.service_control();
        let services = ServiceCapabilities::add(&mut space, offered(config), control.clone());
        let rights = Arc::<Rights>::default();
        rights.gate.start();
        let shared = Arc::new(Shared {
            registers: Mutex::default(),
            config: Mutex::new(space),
            msi,
            express,
            msix_capability,
            msix,
            memory: Mutex::new(Box::new([0; MEMORY_SIZE])),
            services,
            pasid_mask: u64::from(PASID_VALID) | ((1 << config.pasid_bits) - 1),
            intx,
            messages,
            rights: rights.clone(),
            counters: DmaCounters::default(),
        });
        let mask = config.dma_mask;
        let memory = GatedMemory { memory, rights, control, life: 0 };
        let mut dma = Dma { shared: shared.clone(), engine: Engine::new(mask), memory, mask };
        #[cfg(feature = "test-support")]
        if super::threadless::is_wanted() {
            let here = Some(Mutex::new(dma));
            return Ok(Self { shared, transfers: None, worker: None, here });
        }
        let (transfers, work) = channel();
        let work = move || {
            for (life, transfer) in work {
                dma.run(life, transfer);
            }
        };
        let worker =
            jail::start("edu-dma", Kind::Device, work).map_err(Error::os("device thread"))?;
        Ok(Self {
            shared,
            transfers: Some(Mutex::new(transfers)),
            worker: Some(worker),
            #[cfg(feature = "test-support")]
            here: None,
        })
    }

    /// DMA statistics.
    pub fn counters(&self) -> &DmaCounters {
        &self.shared.counters
    }

    /// Starts `transfer`, which software requested in `life`.
    fn start(&self, life: u64, transfer: Transfer) {
        #[cfg(feature = "test-support")]
        if let Some(dma) = &self.here {
            return dma.lock().run(life, transfer);
        }
        let Some(transfers) = &self.transfers else { return };
        let sent = transfers.lock().send((life, transfer));
        if sent.is_err() {
            // The worker panicked. The device continues without DMA.
            warn_limited!("edu: the DMA worker is gone");
            self.shared.registers().transfer_ended();
        }
    }
}

impl Shared {
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock()
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock()
    }

    /// Performs one transfer, on the worker's thread.
    fn transfer(&self, engine: &mut Engine, memory: &mut GatedMemory, mut transfer: Transfer) {
        let result = engine.run(&mut transfer, memory);
        // Locked by resets, too.
        let mut registers = self.registers();
        if memory.life != self.rights.life() {
            // The registers know nothing of it any more.
            return;
        }
        match result {
            Ok(()) => self.counters.done.fetch_add(1, Ordering::Relaxed),
            Err(failure) => {
                log::debug!("edu: {failure}");
                self.counters.failed.fetch_add(1, Ordering::Relaxed)
            }
        };
        if let Effect::Interrupt { raised, causes } = registers.transfer_ended() {
            self.interrupt(&registers, raised.then_some(causes));
        }
    }

    /// Updates the interrupt outputs from `registers`; `raised`: the causes that were just added.
    fn interrupt(&self, registers: &Registers, raised: Option<u32>) {
        let pending = registers.interrupt_pending();
        let mut config = self.config();
        let message = self.msi.message(&config);
        let msix = self.msix_capability.control(&config).enable();
        config.set_interrupt_status(pending);
        let (command, may_request) = (config.command(), config.may_request());
        drop(config);
        let by_pin = message.is_none() && !msix && !command.interrupt_disable();
        self.intx.set(pending && by_pin);
        match (raised, message) {
            // Its numbers are at most four; whether it may make requests is known there.
            (Some(causes), _) if msix => {
                vectors(causes).for_each(|vector| self.msix.trigger(vector as u16));
            }
            (Some(_), Some(message)) if may_request => {
                self.messages.send_msi(message.address, message.data);
            }
            _ => {}
        }
    }

    /// Function-level reset: no request or message is outstanding when this returns, and none of
    /// what was requested before is made later.
    fn reset(&self, registers: &mut Registers) {
        {
            let mut config = self.config();
            self.services.unlock(&mut config);
            config.reset();
        }
        self.rights.reset();
        self.services.reset();
        self.services.update(&mut self.config());
        self.msix.set_bus_master(false);
        self.msix.reset();
        self.memory.lock().fill(0);
        *registers = Registers::default();
        self.interrupt(registers, None);
    }
}

impl PciFunction for Edu {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.shared.config
    }

    fn config_is_memory(&self) -> bool {
        // The page request interface stops when its last request is answered.
        !self.shared.services.has_page_requests()
    }

    fn config_reading(&self, _offset: u16, _length: usize) {
        self.shared.services.update(&mut self.shared.config());
    }

    fn config_written(&self, _offset: u16, _length: usize) -> bool {
        // MSI may have been switched, INTx disabled, or the permission to make requests revoked:
        // when this returns, no request or message under the old settings is outstanding. The lock
        // serializes writers.
        let shared = &self.shared;
        let mut registers = shared.registers();
        let (reset, may_request, enabled, control) = {
            let mut config = shared.config();
            shared.services.written(&mut config);
            let enabled = shared.services.enabled(&config);
            let reset = shared.express.reset_initiated(&config);
            (reset, config.may_request(), enabled, shared.msix_capability.control(&config))
        };
        if reset {
            shared.reset(&mut registers);
        } else {
            if shared.rights.set(may_request, enabled) {
                shared.services.changed(enabled);
            }
            shared.msix.set_control(control);
            shared.msix.set_bus_master(may_request);
            shared.interrupt(&registers, None);
        }
        reset
    }

    fn reset(&self) {
        self.shared.reset(&mut self.shared.registers());
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if bar == usize::from(MESSAGES_BAR) {
            let msix = &self.shared.msix;
            return match offset.checked_sub(PENDING_BITS.into()) {
                None => msix.read_table(offset, data),
                Some(offset) => msix.read_pending(offset, data),
            };
        }
        if bar == usize::from(MEMORY_BAR) {
            let memory = self.shared.memory.lock();
            let bytes = memory.iter().skip(offset as usize);
            return data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        }
        // Register 0xA0 exists only while software has the PASID capability enabled.
        let pasid = self.shared.rights.services().pasid;
        let value = self.shared.registers().read(offset, data.len(), pasid);
        let bytes = value.to_le_bytes();
        // A register access is at most eight bytes.
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar == usize::from(MESSAGES_BAR) {
            // Beyond the table there are no vectors.
            return self.shared.msix.write_table(offset, data);
        }
        if bar == usize::from(MEMORY_BAR) {
            let mut memory = self.shared.memory.lock();
            let bytes = memory.iter_mut().skip(offset as usize);
            return bytes.zip(data).for_each(|(to, from)| *to = *from);
        }
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let mut value = u64::from_le_bytes(bytes);
        if offset == DMA_PASID {
            value &= self.shared.pasid_mask;
        }
        let mut registers = self.shared.registers();
        let pasid = self.shared.rights.services().pasid;
        match registers.write(offset, data.len(), value, pasid) {
            Effect::None => {}
            Effect::Interrupt { raised, causes } => {
                self.shared.interrupt(&registers, raised.then_some(causes));
            }
            Effect::Transfer(transfer) => {
                let life = self.shared.rights.life();
                drop(registers);
                self.start(life, transfer);
            }
        }
    }
}

impl Drop for Edu {
    fn drop(&mut self) {
        self.shared.rights.gate.stop();
        self.shared.services.reset();
        self.transfers = None;
        if let Some(worker) = self.worker.take() {
            if worker.join().is_err() {
                log::error!("edu: the DMA worker panicked");
            }
        }
    }
}

impl fmt::Debug for Edu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Edu")
            .field("registers", &self.shared.registers)
            .field("counters", &self.shared.counters)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
