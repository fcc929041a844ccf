// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The side core: a thread that serves the queues of virtual IOMMUs, so that a guest invalidates
//! without exits to this process, and in its steady state without any.
//!
//! 1. The registers are a read-only slot of KVM, which their model keeps: reads are free. The tail
//!    is a coalesced zone: KVM puts writes to it into a ring, which the thread polls. Every other
//!    write exits.
//! 2. After hundreds of operations with nothing else between them, the page is lent: the guest has
//!    it as memory, and the thread looks at that. The model recalls it before the guest could see
//!    something that memory cannot express ([`twostage::viommu::RegisterPage`]).
//!
//! While nothing is to do, or there is no processor for it, the thread is parked: pages are taken
//! back, there are no zones, and every write exits. One thread serves all virtual IOMMUs.
//!
//! # Order
//! The ring is emptied, in order, before any other access to registers is handled: with its lock,
//! which is taken before all locks of virtual IOMMUs. A queue is worked through without it.

mod kvm;
mod pace;
mod processors;
mod report;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
mod thread;

use std::fmt;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_ioctls::{IoEventAddress, VmFd};

use super::Iommu;
use crate::bus::BusDevice;
use crate::config::{MachineConfig, SideCoreChoice};
use crate::process::jail::{self, Kind};
use crate::process::stop::{PanicGuard, Stopper};
use crate::{Error, Result};
use kvm::{Abilities, Mapped, PageSlot, Ring};
use pace::{Arrivals, Parked, Patience, Rest};
use processors::Processors;
pub use report::SideCoreReport;
use twostage::sync::{Condvar, Mutex};
use twostage::viommu::{PagedRegisters, Recall, RegisterPage};

/// The side core of a machine.
pub(crate) struct SideCore {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and the vCPUs share.
struct Shared {
    vm: Arc<VmFd>,
    stopper: Stopper,
    ring: Ring,
    abilities: Abilities,
    auto: bool,
    cpu: Option<usize>,
    vcpus: usize,
    units: Vec<Unit>,
    state: Mutex<State>,
    changed: Condvar,
    /// Tail writes do not exit at the moment.
    polling: AtomicBool,
    polls: AtomicU64,
    polled_ms: AtomicU64,
    parked: [AtomicU64; Parked::ALL.len()],
}

/// What vCPUs ask of the thread.
#[derive(Default)]
struct State {
    arrivals: Arrivals,
    rest: Rest,
    wanted: bool,
    ended: bool,
}

/// A virtual IOMMU that is served.
struct Unit {
    registers: Arc<dyn PagedRegisters>,
    page: Arc<RegisterPage>,
    slot: Arc<PageSlot>,
    /// Address and length of the registers, and of the tail.
    start: u64,
    length: u64,
    tail: (u64, u64),
    /// The ring had writes that its queue has not been worked through for.
    written: AtomicBool,
    /// KVM puts tail writes into the ring; only the thread changes this.
    coalesces: AtomicBool,
    /// Something other than a tail write exited.
    disturbed: AtomicBool,
    /// Tail writes in the ring, and in memory.
    coalesced: AtomicU64,
    in_memory: AtomicU64,
    loan: Mutex<Loan>,
}

/// The page of a unit, as the thread knows it.
#[derive(Default)]
struct Loan {
    patience: Patience,
    /// Tail writes seen so far while it was not lent.
    seen: u64,
    /// While it is lent: the tail writes before that.
    lent_after: Option<u64>,
}

impl Unit {
    fn tails(&self) -> u64 {
        self.coalesced.load(Ordering::Relaxed) + self.in_memory.load(Ordering::Relaxed)
    }

    fn zone(&self) -> (IoEventAddress, u32) {
        let (offset, length) = self.tail;
        // A register of a few bytes.
        (IoEventAddress::Mmio(self.start + offset), length as u32)
    }
}

impl SideCore {
    /// The side core that `config` asks for, for its `iommus`; `None` if it asks for none, or
    /// leaves it to what KVM has. `vcpu` is one of `vm`, whose slots from `first_slot` on are
    /// unused: it takes one for each of the `iommus`. `stopper` stops the machine if the thread
    /// panics, or KVM does not take back what the guest was given.
    ///
    /// # Errors
    /// There is no such processor, or KVM lacks what is asked for.
    pub fn new(
        vm: &Arc<VmFd>,
        config: &MachineConfig,
        iommus: &[Iommu],
        vcpu: RawFd,
        first_slot: u32,
        stopper: &Stopper,
    ) -> Result<Option<Self>> {
        let served = || config.iommus.iter().map(|iommu| iommu.side_core.choice);
        if served().all(|choice| choice == SideCoreChoice::Off) {
            return Ok(None);
        }
        let auto = served().all(|choice| choice != SideCoreChoice::On);
        let cpu = config.iommus.iter().find_map(|iommu| iommu.side_core.cpu);
        if let Some(cpu) = cpu {
            processors::check(cpu).map_err(|there| {
                Error::HostLacks(format!("side-cpu={cpu}: this process may use {there}"))
            })?;
        }
        let abilities = match Abilities::of(vm) {
            Ok(abilities) => abilities,
            Err(lacking) => return cannot(auto, lacking).map(|()| None),
        };
        if let Some(warning) = warning(auto, Processors::open().usable()) {
            log::warn!("{warning}");
        }
        let ring = Ring::new(vcpu).map_err(Error::os("the ring of coalesced writes"))?;
        let mut units = Vec::new();
        for (number, iommu) in iommus.iter().enumerate() {
            let configured = config.iommus.get(number);
            let Some(of) = configured.filter(|of| of.side_core.choice != SideCoreChoice::Off)
            else {
                continue;
            };
            // A machine has few virtual IOMMUs.
            let slot = first_slot + number as u32;
            let start = config.iommu_address(number);
            let page = RegisterPage::new()
                .map_err(|error| Error::Iommu(format!("a register page: {error}")))?;
            let slot = PageSlot::new(vm.clone(), slot, start, page.clone(), stopper.clone());
            let registers = iommu.model.paged_registers();
            let unit = Unit::new(registers, page, slot, (start, of.model.registers()));
            if abilities.read_only {
                let mapped = unit.slot.map(Some(Mapped::ReadOnly));
                mapped.map_err(Error::kvm("mapping registers into the guest"))?;
            }
            units.push(unit);
        }
        let shared = Shared {
            vm: vm.clone(),
            stopper: stopper.clone(),
            ring,
            abilities,
            auto,
            cpu,
            vcpus: config.vcpus.into(),
            units,
            state: Mutex::default(),
            changed: Condvar::new(),
            polling: AtomicBool::new(false),
            polls: AtomicU64::new(0),
            polled_ms: AtomicU64::new(0),
            parked: Default::default(),
        };
        Ok(Some(Self { shared: Arc::new(shared), thread: None }))
    }

    /// `registers` of the virtual IOMMU at `address`, as vCPUs that exit reach them.
    pub fn registers(&self, address: u64, registers: Arc<dyn BusDevice>) -> Arc<dyn BusDevice> {
        let of = |unit: &Unit| unit.start == address;
        match self.shared.units.iter().position(of) {
            Some(unit) => Arc::new(Exits { shared: self.shared.clone(), unit, registers }),
            None => registers,
        }
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// There is no thread.
    pub fn start(&mut self) -> Result<()> {
        let shared = self.shared.clone();
        // It opens files first.
        let run = move |place| {
            // A guest would wait for it in vain.
            let _guard = PanicGuard(&shared.stopper, "the side core");
            shared.run(place);
        };
        let thread = jail::start_with_place("side-core", Kind::SideCore, run);
        self.thread = Some(thread.map_err(Error::os("the side core's thread"))?);
        Ok(())
    }

    /// Ends the thread: the pages are taken back, and nothing is left in the ring. Models have been
    /// halted before, so that it does not go on with a queue.
    pub fn stop(&mut self) {
        self.shared.state.lock().ended = true;
        self.shared.changed.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the side core panicked");
        }
    }

    /// What it has done so far.
    pub fn report(&self) -> SideCoreReport {
        self.shared.report()
    }
}

/// KVM lacks `lacking`, without which there is no side core.
///
/// # Errors
/// Not if it is left to what KVM has.
fn cannot(auto: bool, lacking: &str) -> Result<()> {
    if auto {
        log::info!("KVM lacks {lacking}: there is no side core");
        return Ok(());
    }
    Err(Error::KvmLacks(format!(
        "it lacks {lacking}, which side-core=on needs; say side-core=auto or off"
    )))
}

/// What a user is told who wants a side core on `processors`.
fn warning(auto: bool, processors: usize) -> Option<&'static str> {
    (!auto && processors < 2).then_some(
        "--iommu: side-core=on, but this process has one processor: an invalidation takes as long \
         as the scheduler lets its vCPU run, tens to hundreds of times as long as an exit; \
         side-core=auto does not poll then",
    )
}

impl Drop for SideCore {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for SideCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SideCore").field("auto", &self.shared.auto).finish_non_exhaustive()
    }
}

impl Unit {
    /// `registers` at `start`, of `length` bytes, of which `page` is the first page, in `slot`.
    fn new(
        registers: Arc<dyn PagedRegisters>,
        page: Arc<RegisterPage>,
        slot: PageSlot,
        (start, length): (u64, u64),
    ) -> Self {
        registers.keep_page(page.clone());
        Self {
            slot: Arc::new(slot),
            tail: registers.tail_register(),
            registers,
            page,
            start,
            length,
            written: AtomicBool::new(false),
            coalesces: AtomicBool::new(false),
            disturbed: AtomicBool::new(false),
            coalesced: AtomicU64::new(0),
            in_memory: AtomicU64::new(0),
            loan: Mutex::default(),
        }
    }
}

impl Shared {
    /// Takes what is in the ring, and works through the queues concerned. Returns whether there was
    /// anything.
    fn empty_ring(&self) -> bool {
        if self.ring.is_empty() {
            return false;
        }
        self.ring.take(|write| {
            let unit = self.units.iter().find(|unit| {
                let offset = write.address.checked_sub(unit.start);
                offset.is_some_and(|offset| offset < unit.length)
            });
            let Some(unit) = unit else { return };
            let data = write.data.get(..write.length).unwrap_or(&[]);
            unit.registers.write_tail(write.address - unit.start, data);
            unit.coalesced.fetch_add(1, Ordering::Relaxed);
            unit.written.store(true, Ordering::Release);
        });
        for unit in &self.units {
            if unit.written.swap(false, Ordering::AcqRel) {
                unit.registers.work_through_queue();
            }
        }
        true
    }

    /// A vCPU has written `offset` of the registers of `unit`, with an exit.
    fn exited(&self, unit: usize, offset: u64) {
        let Some(unit) = self.units.get(unit) else { return };
        let (tail, length) = unit.tail;
        if !(tail..tail + length).contains(&offset) {
            unit.disturbed.store(true, Ordering::Relaxed);
            return;
        }
        if self.polling.load(Ordering::Relaxed) {
            return;
        }
        let now = Instant::now();
        let mut state = self.state.lock();
        if !state.wanted && state.rest.is_over(now) && (state.arrivals.add(now) || !self.auto) {
            state.wanted = true;
            self.changed.notify_all();
        }
    }

    fn report(&self) -> SideCoreReport {
        let sum = |of: fn(&Unit) -> u64| self.units.iter().map(of).sum();
        let parked = Parked::ALL.iter().zip(&self.parked);
        let counted = |why: &Recall| {
            let times = self.units.iter().map(|unit| u64::from(unit.page.recalls(*why))).sum();
            (why.name(), times)
        };
        SideCoreReport {
            mode: if self.auto { "auto" } else { "on" },
            reads_exit: !self.abilities.read_only,
            lends: self.abilities.lending,
            polling: self.polling.load(Ordering::Relaxed),
            polls: self.polls.load(Ordering::Relaxed),
            polled_ms: self.polled_ms.load(Ordering::Relaxed),
            parked: parked
                .map(|(why, count)| (why.name(), count.load(Ordering::Relaxed)))
                .collect(),
            tails_coalesced: sum(|unit| unit.coalesced.load(Ordering::Relaxed)),
            tails_in_memory: sum(|unit| unit.in_memory.load(Ordering::Relaxed)),
            lent: sum(|unit| unit.page.lends().into()),
            taken_back: Recall::ALL.iter().map(counted).collect(),
        }
    }
}

/// The registers of a virtual IOMMU, as vCPUs that exit reach them.
struct Exits {
    shared: Arc<Shared>,
    unit: usize,
    registers: Arc<dyn BusDevice>,
}

impl BusDevice for Exits {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.shared.empty_ring();
        self.registers.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.shared.empty_ring();
        self.registers.write(offset, data);
        self.shared.exited(self.unit, offset);
    }
}

#[cfg(test)]
mod refusals {
    use super::*;

    #[test]
    fn what_is_lacking_is_an_error_if_it_was_asked_for() {
        assert!(cannot(true, "KVM_CAP_COALESCED_MMIO").is_ok());
        let error = cannot(false, "KVM_CAP_COALESCED_MMIO").unwrap_err().to_string();
        assert!(error.contains("it lacks KVM_CAP_COALESCED_MMIO, which side-core=on needs"));
        assert_eq!(error.lines().count(), 1, "{error}");
    }

    #[test]
    fn one_processor_is_warned_of_if_the_thread_polls_anyway() {
        let warned = |auto, processors| warning(auto, processors).is_some();
        assert!(warned(false, 1) && !warned(false, 2) && !warned(true, 1));
    }
}
