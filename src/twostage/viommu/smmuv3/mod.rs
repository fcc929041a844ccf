// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual Arm SMMUv3: registers, command queue, stream table and events, as driven by a guest.
//!
//! A register write is complete when [`Smmu::mmio_write`] returns: its request has been given to
//! the host, and only then do CR0ACK, GBPA.Update or CMDQ_CONS say so. While CR0ACK.SMMUEN is set,
//! every stream follows its entry, and is blocked if that is missing or wrong.
//!
//! If the host cannot even block what the guest revokes, nothing is acknowledged: the command queue
//! stops with CERROR_ILL, CR0ACK and GBPA.Update stay as they were, and the next write retries. No
//! CMD_SYNC completes before that.
//!
//! Not offered: a stage 2 of the guest's own, EL2, address translation operations, the Secure
//! state. Their registers read as zero, their commands are CERROR_ILL; and so do those of page
//! requests and stalls, unless they were asked for.
//!
//! # Locks
//! The registers have one lock, held across calls to the host and to [`SmmuInterrupts`], neither of
//! which may call the SMMU except to report events and to halt it. A thread that works through the
//! command queue unlocks the registers after each CMD_SYNC and each change of configuration, and
//! queues behind those that wait for them. Queues for the guest and global errors have a lock of
//! their own, and so have the published policies, and page requests and stalled transactions that
//! wait for the guest: all are taken after the registers, for a moment, and are the only locks that
//! [`EventTarget`] takes. An event may therefore come from any thread, even while another thread
//! waits in the host for DMA to end. Where the registers are memory of the guest, each of these
//! shows its state there before it is unlocked, and the loan of that memory has the last lock.

mod apply;
mod config;
mod control;
mod fault_log;
mod faults;
pub(super) mod host_side;
mod host_unit;
mod output_queue;
mod page;
mod page_requests;
mod policy;
mod queue;
mod registers;
mod requesters;
mod restore;
mod stalls;
mod state;

use crate::sync::Mutex;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

pub use config::{Capabilities, SmmuConfig, SmmuConfigError};
pub use fault_log::{FaultLog, GlobalErrors, InterruptConfig, SmmuInterrupt, SmmuInterrupts};
pub use host_side::{
    EventRecordWords, EventTarget, SmmuHostSide, SmmuInvalidateError, StalledTransaction,
    StreamPolicy,
};
pub use host_unit::HostSmmu;
pub use output_queue::OutputQueue;
pub use policy::ConfigFault;
pub use state::{DecisionState, Registers, SmmuCounters, SmmuState, StreamState, TableRegisters};

use super::ledger::Applied;
use super::register_page::{RegisterPage, Shown};
use super::registers::FairMutex;
use super::{HostSideError, Observer, TableMemory};
use crate::ratelimit::RateLimit;
use crate::spec::smmuv3::regs::Gerror;
use crate::spec::smmuv3::StreamId;
use fault_log::{Offered, Signal};
use page_requests::PageRequests;
use policy::{policy_while_disabled, StreamTable};
use queue::{Batch, Slice};
use requesters::{Decision, Streams};
use stalls::Stalls;
use state::Counters;

/// Locked state of an SMMU.
type Locked<'a, T> = Shown<'a, T, Smmu>;

/// A virtual SMMUv3.
///
/// With [`unit`](crate::unit), its host side is there already. With one of your own:
///
/// ```
/// use std::sync::Arc;
/// use twostage::spec::smmuv3::command::Command;
/// use twostage::spec::smmuv3::{regs, StreamId};
/// use twostage::viommu::smmuv3::{
///     Smmu, SmmuConfig, SmmuHostSide, SmmuInterrupt, SmmuInterrupts, SmmuInvalidateError,
///     StreamPolicy,
/// };
/// use twostage::viommu::HostSideError;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// #[derive(Debug)]
/// struct Host;
/// impl SmmuHostSide for Host {
///     fn configure(&self, who: StreamId, policy: &StreamPolicy) -> Result<(), HostSideError> {
///         println!("{who}: {policy:?}");
///         Ok(())
///     }
///     fn invalidate(&self, _commands: &[Command]) -> Result<(), SmmuInvalidateError> {
///         Ok(())
///     }
/// }
/// impl SmmuInterrupts for Host {
///     fn message(&self, _address: u64, _data: u32) -> bool {
///         true
///     }
///     fn wire(&self, _interrupt: SmmuInterrupt) {}
/// }
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
/// let (memory, host) = (Arc::new(memory), Arc::new(Host));
/// let smmu = Smmu::new(&SmmuConfig::default(), memory, host.clone(), host, None)?;
/// smmu.add_device(StreamId(0x20))?; // prints: 0x20: GlobalBypass
/// let mut idr0 = [0; 4];
/// smmu.mmio_read(regs::IDR0, &mut idr0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Smmu {
    config: SmmuConfig,
    caps: Capabilities,
    offered: Offered,
    memory: Arc<dyn TableMemory>,
    host: Arc<dyn SmmuHostSide>,
    interrupts: Arc<dyn SmmuInterrupts>,
    observer: Option<Arc<dyn Observer>>,
    registers: FairMutex<Registers>,
    page: OnceLock<Arc<RegisterPage>>,
    halted: AtomicBool,
    faults: Mutex<FaultLog>,
    pages: Mutex<PageRequests>,
    stalls: Mutex<Stalls>,
    /// Empty between slices of the queue.
    batch: Mutex<Batch>,
    streams: Streams,
    counters: Counters,
    log: RateLimit,
}

impl Smmu {
    /// An SMMU after reset, with no stream behind it.
    ///
    /// # Errors
    /// The configuration is impossible ([`SmmuConfig::check`]).
    pub fn new(
        config: &SmmuConfig,
        memory: Arc<dyn TableMemory>,
        host: Arc<dyn SmmuHostSide>,
        interrupts: Arc<dyn SmmuInterrupts>,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Arc<Self>, SmmuConfigError> {
        Self::build(config, memory, host, interrupts, observer).map(Arc::new)
    }

    /// See [`Smmu::new`].
    fn build(
        config: &SmmuConfig,
        memory: Arc<dyn TableMemory>,
        host: Arc<dyn SmmuHostSide>,
        interrupts: Arc<dyn SmmuInterrupts>,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Self, SmmuConfigError> {
        let caps = config.capabilities()?;
        Ok(Self {
            config: config.clone(),
            caps,
            offered: Offered::new(caps.idr0, caps.idr1),
            memory,
            host,
            interrupts,
            observer,
            registers: FairMutex::default(),
            page: OnceLock::new(),
            halted: AtomicBool::new(false),
            faults: Mutex::default(),
            pages: Mutex::default(),
            stalls: Mutex::default(),
            batch: Mutex::default(),
            streams: Streams::default(),
            counters: Counters::default(),
            log: RateLimit::default(),
        })
    }

    /// The identification registers.
    pub fn capabilities(&self) -> Capabilities {
        self.caps
    }

    /// Adds the stream of a device: its Requester ID, or any other StreamID. It follows GBPA while
    /// translation is disabled, and its stream table entry while it is enabled. Does nothing for a
    /// stream that exists already.
    ///
    /// # Errors
    /// The host refuses to serve it. It is not added, and blocked.
    pub fn add_device(&self, device: impl Into<StreamId>) -> Result<(), HostSideError> {
        let stream = device.into();
        let registers = self.lock();
        if !self.streams.add(stream) {
            return Ok(());
        }
        self.try_give(stream, self.decision_of(stream, &registers)).inspect_err(|error| {
            // Counted and logged: the caller may have nothing to say to anybody.
            let _ = self.host_failed(error);
            self.streams.remove(stream);
            let _ = self.take_away(stream);
        })
    }

    /// What a new stream follows.
    fn decision_of(&self, stream: StreamId, registers: &Registers) -> Decision {
        if self.streams.is_translating() {
            self.stream_table(registers.table_registers()).policy(stream)
        } else {
            Ok(policy_while_disabled(registers.gbpa))
        }
    }

    /// Removes a stream: it is blocked. Does nothing for an unknown stream. If the host fails to
    /// block it, that is logged, and left to the owner of the device.
    pub fn remove_device(&self, device: impl Into<StreamId>) {
        let stream = device.into();
        // Held so that nobody gives the stream a policy meanwhile.
        let _registers = self.lock();
        if self.streams.remove(stream) {
            let _ = self.take_away(stream);
            self.end_page_requests(Some(stream));
            self.end_stalls(Some(stream));
        }
    }

    /// Blocks a stream that is not one of this SMMU any more. A failure is logged, and left to the
    /// owner of the device: the guest is not involved.
    fn take_away(&self, stream: StreamId) -> Applied {
        let blocked = self.host.configure(stream, &StreamPolicy::Abort);
        blocked.or_else(|error| self.host_failed(&error))
    }

    /// Works through the command queue up to its end or its first error. Register writes do so
    /// themselves; any other thread may, too, and several at once share the work.
    ///
    /// The registers are unlocked after each slice of the queue, however long it is.
    pub fn drain_queue(&self) {
        while !self.is_halted() && self.run_slice(&mut self.lock()) == Slice::More {}
    }

    /// The machine is stopping: threads working through the queue return at the next command, and
    /// none starts again. Work in progress is not acknowledged to the guest.
    ///
    /// Does not block. Registers can be read and written as before. There is no snapshot from then
    /// on, until [`Smmu::reset`].
    pub fn halt(&self) {
        self.halted.store(true, Ordering::Relaxed);
        // Nobody will respond to them.
        self.end_page_requests(None);
        self.end_stalls(None);
    }

    fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Relaxed)
    }

    /// The policy for `stream` by the guest's tables at this moment, regardless of the applied one;
    /// `None` while translation is disabled, and for an unknown stream. For finding missing
    /// invalidations of the guest: DMA follows the applied policy.
    ///
    /// May be called from anywhere: it never waits for a thread that waits for the host.
    pub fn policy_by_tables(&self, stream: StreamId) -> Option<StreamPolicy> {
        let table = self.streams.standing(stream)?.table?;
        Some(self.stream_table(table).policy(stream).unwrap_or(StreamPolicy::Abort))
    }

    /// Statistics.
    pub fn counters(&self) -> SmmuCounters {
        self.counters.snapshot()
    }

    fn lock(&self) -> Locked<'_, Registers> {
        Shown::new(self, self.registers.lock())
    }

    fn fault_log(&self) -> Locked<'_, FaultLog> {
        Shown::new(self, self.faults.lock())
    }

    /// The stream table at `registers`.
    fn stream_table(&self, registers: TableRegisters) -> StreamTable<'_> {
        let TableRegisters { base, cfg } = registers;
        StreamTable { memory: &*self.memory, caps: &self.caps, base, cfg }
    }

    /// Makes global errors active.
    fn raise(&self, errors: Gerror) {
        let signal = self.fault_log().raise(self.offered, errors);
        self.send(signal);
    }

    /// Sends an interrupt. A message is a write: to guest memory if its address is there. One that
    /// nothing accepts is a global error, reported once.
    fn send(&self, signal: Option<Signal>) {
        let Some(signal) = signal else { return };
        let Some((address, data)) = signal.message else {
            self.interrupts.wire(signal.interrupt);
            return;
        };
        if self.memory.store_u32(address, data).is_err() && !self.interrupts.message(address, data)
        {
            self.guest_error(format_args!("a message to {address:#x}, which nothing accepts"));
            self.raise(signal.abort_error());
        }
    }

    /// Counts and logs a mistake of the guest that the architecture has no error for.
    fn guest_error(&self, what: fmt::Arguments<'_>) {
        self.counters.guest_errors.count();
        self.log.warn(format_args!("SMMUv3: guest mistake: {what}"));
    }
}

impl fmt::Debug for Smmu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Smmu")
            .field("caps", &self.caps)
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
