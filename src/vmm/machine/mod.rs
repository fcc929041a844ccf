// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine: its parts, put together and run, each vCPU in a thread of its own.

mod build;
mod release;
mod slots;
pub(crate) mod topology;

use std::fmt;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::Killable;

use crate::arch::exits::{ExitKind, ExitObserver, Exits};
use crate::arch::{self, Board, Processor, Processors};
use crate::boot;
use crate::config::{MachineConfig, SerialConfig};
use crate::console::deadline::{self, Turn};
use crate::console::serial::SerialPort;
use crate::console::Console;
use crate::devices::virtio::KvmDoorbells;
use crate::interrupts::{Interrupts, Messages, Ways};
use crate::iommu::{DirectDevices, Host, Iommu, Iommus, SideCore};
use crate::machine::topology::{PciTopology, Wiring};
use crate::memory::MachineMemory;
use crate::process::event_loop::{EventLoop, Wake};
use crate::process::jail::{self, Kind};
use crate::process::overdue::{self, Step};
use crate::process::signals::{self, kick_signal};
use crate::process::stop::{PanicGuard, StopReason, Stopper};
use crate::report::Report;
use crate::trace::Trace;
use crate::vfio::KvmSlots;
use crate::{Error, Result};
pub(crate) use build::open_kvm;
use release::{release, Released};
use twostage_emulated::ObjectGraph;

/// A machine that has not run yet.
pub struct Machine {
    // Dropped in this order: whoever uses a part goes before it, and the memory goes last.
    processors: Vec<Processor>,
    exits: Arc<Exits>,
    pci: PciTopology,
    side_core: Option<SideCore>,
    iommus: Option<Iommus>,
    direct: Option<DirectDevices>,
    serial: Arc<SerialPort>,
    interrupts: Arc<Interrupts>,
    memory: MachineMemory,
    stopper: Stopper,
    console: bool,
    trace: Option<Arc<Trace>>,
}

impl Machine {
    /// Its trace, if there is one.
    pub fn trace(&self) -> Option<Arc<Trace>> {
        self.trace.clone()
    }

    /// Builds the machine that `config` describes and loads its kernel. After a reset, `earlier` is
    /// the trace so far, which is continued.
    ///
    /// # Errors
    /// What is wrong with the configuration, the files, or the host.
    pub fn new(config: &MachineConfig, earlier: Option<Arc<Trace>>) -> Result<Self> {
        deadline::clear();
        config.validate()?;
        let memory = build::memory(config)?;
        let start = boot::load(&memory, &config.payload)?;
        let kvm = open_kvm()?;
        let vm = build::vm(&kvm, config, &memory)?;
        let Processors { chip, all: processors } = Processors::new(&kvm, &vm, config, &start)?;
        // After most of what can go wrong: a machine that cannot be built leaves no files behind.
        let trace = build::trace(config, earlier)?;
        let messages = Messages::new(vm.clone(), trace.clone());
        let host = Host::of_kernel(config, &memory, trace.as_ref())?;
        let iommus = build::iommus(config, chip, &memory, host.as_ref(), &messages, &trace)?;
        let direct = build::direct_devices(config, host.as_ref())?;
        let ways = Ways { vm: vm.clone(), chip, messages, trace: trace.clone() };
        let iommus_or_none = iommus.as_ref().map_or(&[][..], Iommus::all);
        let interrupts = build::interrupts(ways, iommus_or_none)?;
        let slots = memory.slots();
        let stopper = Stopper::new()?;
        let side_core =
            build::side_core(&vm, config, iommus_or_none, &processors, slots, &stopper)?;
        let free_slots = KvmSlots::new(vm.clone(), slots + iommus_or_none.len() as u32);
        let wiring = Wiring {
            interrupts: interrupts.clone(),
            doorbells: Arc::new(KvmDoorbells(vm.clone())),
            lender: Arc::new(free_slots.clone()),
            files: build::device_files(host.as_ref(), iommus_or_none, direct.as_ref())?,
            trace: trace.clone(),
        };
        let pci = PciTopology::new(config, &memory, iommus_or_none, wiring)?;
        build::lend_config(&vm, &pci.bus, &free_slots);
        let serial = SerialPort::new(&config.serial, &interrupts)?;
        let mut mmio = build::mmio(config, &pci, iommus_or_none, side_core.as_ref())?;
        let ports = config.pci_ports.then_some(&pci.bus);
        let board = Board::new(&mut mmio, serial.clone(), ports, interrupts.lines(), &stopper)?;
        arch::firmware::write(&memory, config, chip, &start)?;
        let observer = trace.clone().map(|trace| trace as Arc<dyn ExitObserver>);
        let exits = Arc::new(Exits { mmio, board, observer, ..Exits::default() });
        let console = config.serial == SerialConfig::Tty;
        Ok(Self {
            processors,
            exits,
            pci,
            iommus,
            side_core,
            direct,
            serial,
            interrupts,
            memory,
            stopper,
            console,
            trace,
        })
    }

    /// Runs the machine until the guest, a signal or an error ends it. `on_report` is given a
    /// report on every SIGUSR1, and at the end.
    ///
    /// # Errors
    /// When its threads or the event loop cannot be started.
    pub fn run(mut self, on_report: &mut dyn FnMut(&Report)) -> Result<StopReason> {
        let mut events = EventLoop::new(self.stopper.clone())?;
        if self.console {
            events.add(Box::new(Console::new(self.serial.clone(), self.stopper.clone())?));
        }
        events.add(Box::new(self.interrupts.unrouted()?));
        let board = self.exits.board.subscribers();
        for subscriber in board.into_iter().chain(self.pci.take_subscribers()) {
            events.add(subscriber);
        }
        if let Some(side_core) = &mut self.side_core {
            side_core.start()?;
        }
        // Everything is open.
        jail::lock()?;
        let mut threads = Vec::new();
        let processors = std::mem::take(&mut self.processors);
        let result = self.serve(processors, &mut threads, &mut events, on_report);
        if let Err(error) = &result {
            self.stopper.stop(StopReason::Software(error.to_string()));
        }
        let asked = matches!(result, Ok(StopReason::Signal(_) | StopReason::Escape));
        deadline::begin(asked);
        // A vCPU may be processing the invalidation queue; it must not go on to the end of it.
        for iommu in self.iommus() {
            iommu.model.halt();
        }
        if let Some(side_core) = &mut self.side_core {
            overdue::during(Step::SideCore, || side_core.stop());
        }
        // Nor may a vCPU that resets a device wait until the device is done with its requests.
        self.pci.halt();
        // Waits for the vCPUs: none of them does anything after the last report.
        overdue::during(Step::Vcpus, || drop(threads));
        // The user has the terminal back before anything is printed about the end.
        drop(events);
        overdue::during(Step::Output, || self.serial.flush());
        let mut report = self.report();
        let limit = deadline::of(Turn::Release).filter(|_| asked);
        let released = overdue::during(Step::Release, || self.close(limit));
        report.released(released.all().map(Option::as_ref));
        overdue::during(Step::Report, || on_report(&report));
        let left = released.all().and_then(Option::as_ref).map_or(0, |left| left.objects.len());
        Ok(released.reason(result?).unless_left_behind(left))
    }

    /// Takes the machine apart, for which it waits until `limit`. Returns the remaining objects of
    /// the host.
    fn close(self, limit: Option<Instant>) -> Released<Option<ObjectGraph>> {
        // Whoever uses the IOMMUs goes before them, and the memory goes last.
        let Self { exits, pci, side_core, iommus, direct, memory, .. } = self;
        drop((exits, pci, side_core));
        let work = move || {
            drop(direct);
            let left = iommus.and_then(Iommus::close);
            drop(memory);
            left
        };
        // A requested stop has its limit already.
        let signal = || limit.is_none().then(signals::take_end).flatten();
        release(work, limit, signal)
    }

    /// Starts `processors`, which become `threads`, and serves `events` until the machine is
    /// stopped.
    fn serve(
        &self,
        processors: Vec<Processor>,
        threads: &mut Vec<VcpuThread>,
        events: &mut EventLoop,
        on_report: &mut dyn FnMut(&Report),
    ) -> Result<StopReason> {
        for processor in processors {
            let (exits, memory) = (self.exits.clone(), self.memory.clone());
            threads.push(spawn_vcpu(processor, exits, memory, self.stopper.clone())?);
        }
        loop {
            match events.wait()? {
                Wake::Report => overdue::during(Step::Report, || on_report(&self.report())),
                Wake::Stopped(reason) => return Ok(reason),
            }
        }
    }

    fn iommus(&self) -> &[Iommu] {
        self.iommus.as_ref().map_or(&[], Iommus::all)
    }

    fn report(&self) -> Report {
        let count = |kind: &ExitKind| (kind.name(), self.exits.counters.get(*kind));
        Report {
            interrupt_controllers: self.interrupts.chip().to_string(),
            interrupts: self.interrupts.report(),
            exits: ExitKind::ALL.iter().map(count).collect(),
            console_lost: self.serial.lost(),
            devices: self.pci.report(),
            iommus: self.iommus.as_ref().map(Iommus::reports).unwrap_or_default(),
            side_core: self.side_core.as_ref().map(SideCore::report),
            host: self.iommus.as_ref().map(Iommus::host_report).or_else(|| {
                // Without virtual IOMMUs only direct devices use the host.
                self.direct.as_ref().map(DirectDevices::host_report)
            }),
            emulated_host: self.iommus.as_ref().and_then(Iommus::beside_report),
        }
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("processors", &self.processors.len())
            .field("exits", &self.exits)
            .field("iommus", &self.iommus)
            .finish_non_exhaustive()
    }
}

/// Runs `processor` in a thread of its own until the machine stops.
///
/// # Errors
/// The thread cannot be started.
fn spawn_vcpu(
    processor: Processor,
    exits: Arc<Exits>,
    memory: MachineMemory,
    stopper: Stopper,
) -> Result<VcpuThread> {
    let name = format!("vcpu{}", processor.id());
    let handle = jail::start(&name, Kind::Vcpu, move || {
        let _guard = PanicGuard(&stopper, "a vCPU thread");
        run_vcpu(processor, &exits, &memory, &stopper);
    })
    .map_err(Error::os("vCPU thread"))?;
    Ok(VcpuThread(Some(handle)))
}

fn run_vcpu(mut processor: Processor, exits: &Exits, memory: &MachineMemory, stopper: &Stopper) {
    let mut vain = Vain::default();
    while stopper.reason().is_none() {
        match processor.enter(exits, memory) {
            Ok(ControlFlow::Continue(())) => {
                vain = Vain::default();
                // Not stored again: others read it.
                if !exits.ran.load(Ordering::Relaxed) {
                    exits.ran.store(true, Ordering::Relaxed);
                }
            }
            Ok(ControlFlow::Break(reason)) => {
                stopper.stop(reason);
            }
            // A signal came.
            Err(error) if error.errno() == libc::EINTR => {
                exits.counters.count(ExitKind::Interrupted);
            }
            // A vCPU without a startup message was woken. Or KVM has no resources.
            Err(error)
                if error.errno() == libc::EAGAIN
                    && (vain.again() || exits.ran.load(Ordering::Relaxed)) =>
            {
                exits.counters.count(ExitKind::Interrupted);
            }
            Err(error) => {
                let stuck = format!("vCPU {}: KVM_RUN: {error}", processor.id());
                // KVM starts a thread of its own when it runs a machine first: before any vCPU ran.
                let stuck = match error.errno() {
                    libc::EAGAIN => stuck + ", again and again, perhaps for want of a thread",
                    _ => stuck,
                };
                stopper.stop(StopReason::Stuck(stuck));
            }
        }
    }
}

/// How often KVM has said in a row that a vCPU may be run again, without running it.
#[derive(Debug, Default)]
struct Vain(u32);

impl Vain {
    /// Whether to try it again: at first at once, then every 10 ms, for two seconds.
    fn again(&mut self) -> bool {
        self.0 = self.0.saturating_add(1);
        if self.0 > 100 {
            thread::sleep(Duration::from_millis(10));
        }
        self.0 < 300
    }
}

/// A running vCPU. Dropping it waits for the thread; the machine must have been stopped before.
#[derive(Debug)]
struct VcpuThread(Option<JoinHandle<()>>);

impl Drop for VcpuThread {
    fn drop(&mut self) {
        let Some(handle) = self.0.take() else { return };
        // A signal that comes just before the thread enters KVM is lost, so it is sent until the
        // thread is gone.
        while !handle.is_finished() {
            if let Err(error) = handle.kill(kick_signal()) {
                log::debug!("kicking a vCPU: {error}");
            }
            thread::sleep(Duration::from_millis(1));
        }
        if handle.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }
}
