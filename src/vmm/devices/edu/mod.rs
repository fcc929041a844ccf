// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The educational device ([`twostage_emulated::edu`]) as a PCI function.
//!
//! It has INTx and MSI. DMA is done by a worker thread, with no artificial delay. With `pasid=on`
//! the function has a PASID capability; while software has that enabled, the register for the PASID
//! of DMA is available.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, MutexGuard};
use std::thread::{self, JoinHandle};
use twostage::sync::Mutex;

use super::{DmaError, DmaMaster, NotNow, RequestGate};
use crate::config::EduConfig;
use crate::pci::{
    add_express_capability, ConfigSpace, Identity, IntxPin, MsiCapability, PasidCapability,
    PciFunction,
};
use crate::{Error, Result};
use twostage::spec::pci::Pasid;
use twostage::viommu::InterruptSink;
use twostage::warn_limited;
pub use twostage_emulated::edu::BAR_SIZE;
use twostage_emulated::edu::{Effect, Engine, Registers, Requests, Transfer};

const IDENTITY: Identity =
    Identity { vendor: 0x1234, device: 0x11e8, class: 0x00_ff00, revision: 0x10 };

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
    /// Taken when the device is dropped, which ends the worker.
    transfers: Option<Mutex<Sender<Transfer>>>,
    worker: Option<JoinHandle<()>>,
}

/// Shared by vCPU threads and the worker. Lock order: registers, then configuration space.
struct Shared {
    registers: Mutex<Registers>,
    config: Mutex<ConfigSpace>,
    msi: MsiCapability,
    pasid: Option<PasidCapability>,
    intx: IntxPin,
    messages: Arc<dyn InterruptSink>,
    gate: Arc<RequestGate>,
    counters: DmaCounters,
}

impl Edu {
    /// A device with its BAR at `address`, which interrupts through `intx` or `messages` and makes
    /// DMA requests through `memory`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn new(
        config: &EduConfig,
        address: u32,
        intx: IntxPin,
        messages: Arc<dyn InterruptSink>,
        memory: Box<dyn DmaMaster>,
    ) -> Result<Self> {
        let mut space = ConfigSpace::new(IDENTITY);
        space.add_bar(0, BAR_SIZE, address);
        space.set_intx(intx.line());
        let msi = MsiCapability::add(&mut space);
        let pasid = config.pasid.then(|| {
            add_express_capability(&mut space);
            PasidCapability::add(&mut space)
        });
        let gate = Arc::<RequestGate>::default();
        gate.start();
        let shared = Arc::new(Shared {
            registers: Mutex::default(),
            config: Mutex::new(space),
            msi,
            pasid,
            intx,
            messages,
            gate: gate.clone(),
            counters: DmaCounters::default(),
        });
        let (transfers, work) = channel::<Transfer>();
        let mut engine = Engine::new(config.dma_mask);
        let mut memory = GatedMemory { memory, gate };
        let worker = thread::Builder::new()
            .name("edu-dma".to_owned())
            .spawn({
                let shared = shared.clone();
                move || {
                    for transfer in work {
                        shared.transfer(&mut engine, &mut memory, transfer);
                    }
                }
            })
            .map_err(Error::os("device thread"))?;
        Ok(Self { shared, transfers: Some(Mutex::new(transfers)), worker: Some(worker) })
    }

    /// DMA statistics.
    pub fn counters(&self) -> &DmaCounters {
        &self.shared.counters
    }

    fn start(&self, transfer: Transfer) {
        let Some(transfers) = &self.transfers else { return };
        let sent = transfers.lock().send(transfer);
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

    /// Register 0xA0 exists only while software has the PASID capability enabled.
    fn pasid_enabled(&self) -> bool {
        self.pasid.is_some_and(|capability| capability.enabled(&self.config()))
    }

    /// Performs one transfer, on the worker's thread.
    fn transfer(&self, engine: &mut Engine, memory: &mut GatedMemory, mut transfer: Transfer) {
        match engine.run(&mut transfer, memory) {
            Ok(()) => self.counters.done.fetch_add(1, Ordering::Relaxed),
            Err(failure) => {
                log::debug!("edu: {failure}");
                self.counters.failed.fetch_add(1, Ordering::Relaxed)
            }
        };
        let mut registers = self.registers();
        if let Effect::Interrupt { raised } = registers.transfer_ended() {
            self.interrupt(&registers, raised);
        }
    }

    /// Updates the interrupt outputs from `registers`; `raised`: a cause was just raised.
    fn interrupt(&self, registers: &Registers, raised: bool) {
        let pending = registers.interrupt_pending();
        let mut config = self.config();
        let message = self.msi.message(&config);
        config.set_interrupt_status(pending);
        let command = config.command();
        drop(config);
        self.intx.set(pending && message.is_none() && !command.interrupt_disable());
        if let (true, true, Some(message)) = (raised, command.bus_master(), message) {
            self.messages.send_msi(message.address, message.data);
        }
    }
}

impl PciFunction for Edu {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.shared.config
    }

    fn config_written(&self, _offset: u16, _length: usize) {
        // MSI may have been switched, INTx disabled, or the permission to make requests revoked:
        // when this returns, no request or message under the old settings is outstanding. The lock
        // serializes writers.
        let registers = self.shared.registers();
        let command = self.shared.config().command();
        self.shared.gate.set_bus_master(command.bus_master());
        self.shared.interrupt(&registers, false);
    }

    fn read_bar(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        let pasid = self.shared.pasid_enabled();
        let value = self.shared.registers().read(offset, data.len(), pasid);
        let bytes = value.to_le_bytes();
        // A register access is at most eight bytes.
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    fn write_bar(&self, _bar: usize, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let value = u64::from_le_bytes(bytes);
        let pasid = self.shared.pasid_enabled();
        let mut registers = self.shared.registers();
        match registers.write(offset, data.len(), value, pasid) {
            Effect::None => {}
            Effect::Interrupt { raised } => self.shared.interrupt(&registers, raised),
            Effect::Transfer(transfer) => {
                drop(registers);
                self.start(transfer);
            }
        }
    }
}

impl Drop for Edu {
    fn drop(&mut self) {
        self.shared.gate.stop();
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

/// Memory behind a gate: each request needs its permission.
struct GatedMemory {
    memory: Box<dyn DmaMaster>,
    gate: Arc<RequestGate>,
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Stop {
    /// The function may not make requests.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// The IOMMU blocked it, or there is no memory.
    #[error(transparent)]
    Refused(#[from] DmaError),
}

impl Requests for GatedMemory {
    type Stop = Stop;

    fn read(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &mut [u8],
    ) -> std::result::Result<usize, Stop> {
        let _permit = self.gate.enter()?;
        self.memory.read(pasid, iova, data)?;
        Ok(data.len())
    }

    fn write(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &[u8],
    ) -> std::result::Result<usize, Stop> {
        let _permit = self.gate.enter()?;
        self.memory.write(pasid, iova, data)?;
        Ok(data.len())
    }
}

#[cfg(test)]
mod tests;
