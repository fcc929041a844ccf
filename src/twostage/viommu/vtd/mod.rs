// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual Intel VT-d: registers, queued invalidation, tables and faults, as driven by a guest.
//!
//! A register write is complete when [`VtdIommu::mmio_write`] returns: its request has been given
//! to the host, and only then does a status register, a status word in memory or the queue head say
//! so. From the moment translation is enabled, every function is blocked until its tables say
//! otherwise.
//!
//! If the host cannot even block what the guest revokes, nothing is acknowledged: the queue stops
//! with an error, TES stays as it was and RTPS clear, and the next command retries.
//!
//! Not offered: advanced fault logging, protected memory regions. Their registers
//! read as after reset.
//!
//! # Locks
//! The registers have one lock, held across calls to the host and to the interrupt sink, neither of
//! which may call the unit except to report faults and to halt it. A thread that works through the
//! queue unlocks the registers at each ordering point, and one that reads tables again for many
//! PASIDs after some of them; both queue behind those that wait for them. Work in progress has a
//! lock that is taken only with the registers locked. The fault log has a lock of its own, and so
//! have the published policies: both are taken after the registers, for a moment, and are the only
//! locks that [`FaultTarget::dma_fault`] takes. A fault may therefore come from any thread, even
//! while another thread waits in the host for DMA to end. Without caching mode, a blocked request
//! may also take the registers before it becomes a fault ([`FaultTarget::served_late`]). Interrupt
//! remapping has a lock of its own, between the registers and the fault log, and so have page
//! requests: these and interrupts may come from any thread, too. Where the registers are memory
//! of the guest, each of these shows its state there before it is unlocked, and the loan of that
//! memory has the last lock.

mod apply;
mod config;
mod control;
mod evaluation;
mod fault_log;
mod faults;
pub(super) mod host_side;
mod host_unit;
mod page;
mod page_requests;
mod policy;
mod queue;
mod registers;
mod remapping;
mod requesters;
mod restore;
mod state;
pub(crate) mod walk;

use crate::sync::Mutex;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use config::{Capabilities, VtdConfig, VtdConfigError, MMIO_SIZE};
pub use fault_log::{EventRegisters, FaultLog};
pub use host_side::{
    DmaFault, DomainTag, FaultTarget, Invalidation, PageTicket, Policy, Progress, RequesterConfig,
    Stage, Stage1, VtdFirstStage, VtdHostSide, VtdNested, VtdSecondStage,
};
pub use host_unit::HostVtd;
pub use page_requests::PageQueue;
pub use state::{
    DecisionState, FunctionState, InterruptEntryState, PasidState, Registers, Translating,
    VtdCounters, VtdState,
};

use super::ledger::Applied;
use super::register_page::{RegisterPage, Shown};
use super::registers::FairMutex;
use super::{HostSideError, InterruptSink, MsiMessage, Observer, Requester, TableMemory};
use crate::ratelimit::RateLimit;
use crate::spec::pci::Bdf;
use crate::spec::vtd::fault::FaultReason;
use control::UnderWay;
use evaluation::{Budget, By, Evaluation};
use page_requests::PageRequests;
use policy::{blocked_config, Blocked};
use queue::Slice;
use remapping::Remapping;
use requesters::Requesters;
use state::Counters;

/// PASIDs of a removed function that are blocked before the registers are unlocked.
const REMOVED_AT_ONCE: u32 = 32;

/// How long a thread waits for page requests before it looks at the queue again: the unit may be
/// halted or the queue disabled.
const DRAINED_AT_ONCE: Duration = Duration::from_millis(10);

/// Locked state of a unit.
type Locked<'a, T> = Shown<'a, T, VtdIommu>;

/// A virtual VT-d unit.
///
/// With [`unit`](crate::unit), its host side is there already. With one of your own:
///
/// ```
/// use std::sync::Arc;
/// use twostage::spec::pci::Bdf;
/// use twostage::spec::vtd::regs;
/// use twostage::viommu::vtd::{Invalidation, RequesterConfig, VtdConfig, VtdHostSide, VtdIommu};
/// use twostage::viommu::{HostSideError, InterruptSink, Requester};
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// #[derive(Debug)]
/// struct Host;
/// impl VtdHostSide for Host {
///     fn configure(&self, who: Requester, config: &RequesterConfig) -> Result<(), HostSideError> {
///         println!("{who}: {:?}", config.policy);
///         Ok(())
///     }
///     fn invalidate(&self, _batch: &[Invalidation]) -> Result<(), HostSideError> {
///         Ok(())
///     }
/// }
/// impl InterruptSink for Host {
///     fn send_msi(&self, _address: u64, _data: u32) {}
/// }
///
/// let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
/// let (memory, host) = (Arc::new(memory), Arc::new(Host));
/// let unit = VtdIommu::new(&VtdConfig::default(), memory, host.clone(), host, None)?;
/// unit.add_device(Bdf::new(0, 4, 0).ok_or("no such slot")?)?; // prints: 00:04.0: Bypass
/// let mut version = [0; 4];
/// unit.mmio_read(regs::VER, &mut version);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct VtdIommu {
    config: VtdConfig,
    caps: Capabilities,
    memory: Arc<dyn TableMemory>,
    host: Arc<dyn VtdHostSide>,
    interrupts: Arc<dyn InterruptSink>,
    observer: Option<Arc<dyn Observer>>,
    registers: FairMutex<Registers>,
    page: OnceLock<Arc<RegisterPage>>,
    under_way: Mutex<UnderWay>,
    halted: AtomicBool,
    faults: Mutex<FaultLog>,
    pages: Mutex<PageRequests>,
    requesters: Requesters,
    remapping: Remapping,
    counters: Counters,
    log: RateLimit,
}

impl VtdIommu {
    /// A unit after reset, with no device behind it.
    ///
    /// # Errors
    /// The configuration is impossible ([`VtdConfig::check`]).
    pub fn new(
        config: &VtdConfig,
        memory: Arc<dyn TableMemory>,
        host: Arc<dyn VtdHostSide>,
        interrupts: Arc<dyn InterruptSink>,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Arc<Self>, VtdConfigError> {
        Self::build(config, memory, host, interrupts, observer).map(Arc::new)
    }

    /// See [`VtdIommu::new`].
    fn build(
        config: &VtdConfig,
        memory: Arc<dyn TableMemory>,
        host: Arc<dyn VtdHostSide>,
        interrupts: Arc<dyn InterruptSink>,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Self, VtdConfigError> {
        let caps = config.capabilities()?;
        host.offers(config);
        Ok(Self {
            config: config.clone(),
            caps,
            memory,
            host,
            interrupts,
            observer,
            registers: FairMutex::default(),
            page: OnceLock::new(),
            under_way: Mutex::default(),
            halted: AtomicBool::new(false),
            faults: Mutex::new(FaultLog::new(config.fault_records)),
            pages: Mutex::default(),
            requesters: Requesters::default(),
            remapping: Remapping::default(),
            counters: Counters::default(),
            log: RateLimit::default(),
        })
    }

    /// The capability registers.
    pub fn capabilities(&self) -> Capabilities {
        self.caps
    }

    /// Adds a function. It passes while translation is disabled, and follows its tables while it is
    /// enabled. Does nothing for a function that exists already. Only what the host refuses of the
    /// function's PASIDs is logged, and they are blocked.
    ///
    /// # Errors
    /// The host refuses to serve its requests without PASID. It is not added, and blocked.
    pub fn add_device(&self, rid: Bdf) -> Result<(), HostSideError> {
        let (registers, config, refused) = loop {
            let registers = self.lock_idle();
            if self.requesters.function_from(rid) == Some(rid) {
                return Ok(());
            }
            let (config, refused) = self.config_of(rid, by(&registers), registers.root);
            // In slices: the registers are unlocked in between.
            if self.host.prepare(Requester::rid(rid), &config) {
                break (registers, config, refused);
            }
        };
        self.requesters.add(rid);
        if let Err(error) = self.try_give(Requester::rid(rid), config, refused) {
            // Counted and logged: the caller may have nothing to say to anybody.
            let _ = self.host_failed(&error);
            self.requesters.remove(rid);
            let _ = self.take_away(Requester::rid(rid));
            return Err(error);
        }
        self.evaluate_new(rid, registers);
        Ok(())
    }

    /// Gives the host all requesters of a function that has just been added.
    fn evaluate_new<'a>(&'a self, rid: Bdf, mut registers: Locked<'a, Registers>) {
        let mut evaluation = Evaluation::of_function(rid, by(&registers));
        // If translation was enabled or disabled meanwhile, that covered this function, too.
        while by(&registers) == evaluation.by() {
            // The host blocks it until it is configured, so a refusal leaves it blocked.
            let mut budget = Budget::default();
            if self.evaluate(&mut evaluation, registers.root, &mut budget).is_some() {
                return;
            }
            drop(registers);
            registers = self.lock_idle();
        }
    }

    /// Removes a function: it is blocked. Does nothing for an unknown function. If the host fails
    /// to block it, that is logged, and left to the owner of the device.
    pub fn remove_device(&self, rid: Bdf) {
        let mut registers = self.lock();
        // It gets no policy from now on.
        let Some(pasids) = self.requesters.remove(rid) else { return };
        self.end_page_requests(Some(rid));
        let mut next = pasids.from(0);
        let mut slice = 0;
        while let Some(requester) = next {
            let _ = self.take_away(requester);
            next = requester.pasid.and_then(|pasid| pasids.from(pasid.raw() + 1));
            slice += 1;
            if slice % REMOVED_AT_ONCE == 0 {
                drop(registers);
                registers = self.lock();
            }
        }
        let _ = self.take_away(Requester::rid(rid));
    }

    /// Blocks a requester of a removed function. A failure is logged, and left to the owner of the
    /// device: the guest is not involved.
    fn take_away(&self, requester: Requester) -> Applied {
        let gone = Blocked { reason: FaultReason::ContextNotPresent, fault_disabled: true };
        let config = blocked_config(requester, gone);
        self.host.configure(requester, &config).or_else(|error| self.host_failed(&error))
    }

    /// Works through the invalidation queue up to its tail or its first error. Register writes do
    /// so themselves; any other thread may, too, and several at once share the work.
    ///
    /// The registers are unlocked at each ordering point of the queue, and after some of the
    /// requesters that one invalidation names, however many there are.
    pub fn drain_queue(&self) {
        while !self.is_halted() {
            let slice = self.run_slice(&mut self.lock());
            match slice {
                Slice::More => {}
                Slice::Done => return,
                Slice::Draining(mut progress) => {
                    self.host.drain_page_requests(&mut progress, DRAINED_AT_ONCE);
                }
            }
        }
    }

    /// The machine is stopping: threads working through the queue, or the PASIDs of a function,
    /// return at the next descriptor or PASID, and none starts again. Work in progress is not
    /// acknowledged to the guest.
    ///
    /// Page requests that wait for the guest are answered, now and from then on, as invalid ones.
    /// Does not block. Registers can be read and written as before. There is no snapshot from then
    /// on, until [`VtdIommu::reset`].
    pub fn halt(&self) {
        self.halted.store(true, Ordering::Relaxed);
        self.end_page_requests(None);
    }

    fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Relaxed)
    }

    /// The policy for `requester` by the guest's tables at this moment, regardless of the applied
    /// one; `None` while translation is disabled, and for an unknown function. For finding missing
    /// invalidations of the guest: DMA follows the applied policy.
    ///
    /// May be called from anywhere: it never waits for a thread that waits for the host.
    pub fn policy_by_tables(&self, requester: Requester) -> Option<Policy> {
        let standing = self.requesters.standing(requester)?;
        let tables = self.tables(standing.root);
        standing.translating.then(|| tables.config(requester).policy)
    }

    /// Statistics.
    pub fn counters(&self) -> VtdCounters {
        self.counters.snapshot()
    }

    fn lock(&self) -> Locked<'_, Registers> {
        Shown::new(self, self.registers.lock())
    }

    fn fault_log(&self) -> Locked<'_, FaultLog> {
        Shown::new(self, self.faults.lock())
    }

    fn send(&self, msi: Option<MsiMessage>) {
        if let Some(MsiMessage { address, data }) = msi {
            self.interrupts.send_msi(address, data);
        }
    }

    /// Counts and logs a mistake of the guest that the architecture has no error for.
    fn guest_error(&self, what: fmt::Arguments<'_>) {
        self.counters.guest_errors.count();
        self.log.warn(format_args!("VT-d: guest mistake: {what}"));
    }
}

/// What new functions follow.
fn by(registers: &Registers) -> By {
    match registers.gsts.tes() {
        true => By::Tables,
        false => By::Nothing,
    }
}

impl fmt::Debug for VtdIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VtdIommu")
            .field("caps", &self.caps)
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
