// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine: its parts, put together and run.

pub(crate) mod topology;
mod vcpu;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm};

use crate::arch::exits::{ExitCounters, ExitKind, Exits};
use crate::arch::layout::{iommu_interrupts, ECAM_SIZE, ECAM_START, PCI_MMIO_LAST, PCI_MMIO_START};
use crate::arch::{self, Board, Processor, Processors};
use crate::boot;
use crate::bus::Bus;
use crate::config::{MachineConfig, SerialConfig};
use crate::console::deadline;
use crate::console::serial::SerialPort;
use crate::console::Console;
use crate::devices::virtio::KvmDoorbells;
use crate::interrupts::{Interrupts, Messages, Ways};
use crate::iommu::{DirectDevices, Host, Iommu, Iommus};
use crate::machine::topology::{assigned_functions, direct_functions, PciTopology, Wiring};
use crate::memory::MachineMemory;
use crate::pci::{Ecam, PciMemory};
use crate::process::event_loop::{EventLoop, Wake};
use crate::process::stop::{StopReason, Stopper};
use crate::report::Report;
use crate::trace::Trace;
use crate::vfio::KvmSlots;
use crate::{Error, Result};
use twostage::iommufd::{self, KernelHost, ObjectId};
use twostage::spec::pci::Bdf;
use twostage_emulated::ObjectGraph;
use vcpu::VcpuThread;

/// A machine that has not run yet.
pub struct Machine {
    // Dropped in this order: whoever uses a part goes before it, and the memory goes last.
    processors: Vec<Processor>,
    exits: Arc<Exits>,
    pci: PciTopology,
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
    /// What is traced of it, if anything is.
    pub fn trace(&self) -> Option<Arc<Trace>> {
        self.trace.clone()
    }

    /// Builds the machine that `config` describes, its kernel loaded. If it lived before, `earlier`
    /// is its trace of then, which goes on.
    ///
    /// # Errors
    /// What is wrong with the configuration, the files, or this host.
    pub fn new(config: &MachineConfig, earlier: Option<Arc<Trace>>) -> Result<Self> {
        deadline::clear();
        config.validate()?;
        let memory = match config.kernel_host() {
            Some(_) => MachineMemory::in_files(config.memory)?,
            None => MachineMemory::new(config.memory)?,
        };
        let start = boot::load(&memory, &config.payload)?;

        let kvm = open_kvm()?;
        if usize::from(config.vcpus) > kvm.get_max_vcpus() {
            return Err(Error::KvmLacks(format!(
                "--cpus boot={}: it runs {} at the most",
                config.vcpus,
                kvm.get_max_vcpus()
            )));
        }
        let vm = Arc::new(arch::create_vm(&kvm)?);
        memory.register(&vm)?;
        let Processors { chip, all: processors } = Processors::new(&kvm, &vm, config, &start)?;
        let remapping = chip.remaps_interrupts(config);
        // Not before most of what can go wrong: a machine that cannot be leaves no files behind.
        let trace = match earlier {
            Some(trace) => {
                trace.next_life();
                Some(trace)
            }
            None => config.trace.as_deref().map(Trace::create).transpose()?.map(Arc::new),
        };
        let messages = Messages::new(vm.clone(), trace.clone());

        let kernel = match config.kernel_host() {
            Some(path) => Some(Arc::new(KernelHost::open(&path).map_err(Error::KernelHost)?)),
            None => None,
        };
        let host = match &kernel {
            Some(kernel) => Some(Host::kernel(kernel.clone(), &memory, trace.as_ref())?),
            None => None,
        };
        let functions = assigned_functions(config)?;
        let iommus = {
            let (messages, host) = (|source| messages.of(source), host.as_ref());
            Iommus::new(config, remapping, &memory, host, &functions, &messages, trace.clone())?
        };
        let direct = match (direct_functions(config)?, host) {
            (functions, Some(host)) if !functions.is_empty() => {
                Some(DirectDevices::new(host, &functions)?)
            }
            _ => None,
        };
        let all_iommus = iommus.as_ref().map_or(&[][..], Iommus::all);
        // The interrupt controllers are behind the first.
        let remapper = all_iommus.first().and_then(Iommu::interrupt_remapper);
        let ways = Ways { vm: vm.clone(), chip, messages, trace: trace.clone() };
        let interrupts = Arc::new(Interrupts::new(ways, remapper));
        for iommu in all_iommus {
            for listener in interrupts.listeners() {
                iommu.add_interrupt_listener(listener);
            }
        }
        for (number, iommu) in all_iommus.iter().enumerate() {
            let wires = iommu_interrupts(number).into_iter().flatten();
            iommu.connect(wires.map(|gsi| interrupts.edge_line(gsi)).collect::<Result<_>>()?);
        }
        let doorbells = Arc::new(KvmDoorbells(vm.clone()));
        let bound = all_iommus.iter().map(Iommu::devices);
        let bound = bound.chain(direct.as_ref().map(DirectDevices::devices));
        let wiring = Wiring {
            interrupts: interrupts.clone(),
            doorbells,
            lender: Arc::new(KvmSlots::new(vm.clone(), memory.slots())),
            files: match &kernel {
                Some(kernel) => device_files(kernel, bound.flatten())?,
                None => BTreeMap::new(),
            },
            trace: trace.clone(),
        };
        let pci = PciTopology::new(config, &memory, all_iommus, wiring)?;
        let stopper = Stopper::new()?;
        let serial = SerialPort::new(&config.serial, &interrupts)?;

        let mut mmio = Bus::default();
        mmio.insert(PCI_MMIO_START..=PCI_MMIO_LAST, Arc::new(PciMemory(pci.bus.clone())))?;
        mmio.insert(ECAM_START..=ECAM_START + (ECAM_SIZE - 1), Arc::new(Ecam(pci.bus.clone())))?;
        for (number, (iommu, of)) in all_iommus.iter().zip(&config.iommus).enumerate() {
            let first = config.iommu_address(number);
            mmio.insert(first..=first + (of.model.registers() - 1), iommu.registers())?;
        }

        let board = Board::new(&mut mmio, serial.clone(), &pci.bus, interrupts.lines(), &stopper)?;
        arch::firmware::write(&memory, config, chip, &start)?;
        let exits = Exits { mmio, board, counters: ExitCounters::default() };
        let console = config.serial == SerialConfig::Tty;
        Ok(Self {
            processors,
            exits: Arc::new(exits),
            pci,
            iommus,
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
        let mut threads = Vec::new();
        let processors = std::mem::take(&mut self.processors);
        let result = self.serve(processors, &mut threads, &mut events, on_report);
        if let Err(error) = &result {
            self.stopper.stop(StopReason::Software(error.to_string()));
        }
        deadline::begin(matches!(result, Ok(StopReason::Signal(_) | StopReason::Escape)));
        // A vCPU may be in the invalidation queue, however long its guest has made that.
        for iommu in self.iommus() {
            iommu.halt();
        }
        // Nor is a vCPU that resets a device to wait for what that does.
        self.pci.halt();
        // Waits for the vCPUs: none of them does anything after the last report.
        drop(threads);
        // The terminal is its user's again before anything is said of the end.
        drop(events);
        self.serial.flush();
        let mut report = self.report();
        let left = self.close();
        if let Some(host) = &mut report.host {
            host.left.clone_from(&left);
        }
        on_report(&report);
        Ok(match left {
            Some(left) => result?.unless_left_behind(left.objects.len()),
            None => result?,
        })
    }

    /// Takes the machine apart; what is left of the host's objects.
    fn close(self) -> Option<ObjectGraph> {
        // Whoever uses the IOMMUs goes before them, and the memory goes last.
        let Self { exits, pci, iommus, direct, .. } = self;
        drop((exits, pci));
        drop(direct);
        iommus.and_then(Iommus::close)
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
            threads.push(vcpu::spawn(processor, exits, memory, self.stopper.clone())?);
        }
        loop {
            match events.wait()? {
                Wake::Report => on_report(&self.report()),
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
            devices: self.pci.report(),
            iommus: self.iommus.as_ref().map(Iommus::reports).unwrap_or_default(),
            host: self.iommus.as_ref().map(Iommus::host_report).or_else(|| {
                // All that is asked for those is asked of the kernel.
                self.direct.as_ref().map(DirectDevices::host_report)
            }),
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

/// The files of the devices of `kernel` that are `bound`: as the guest and as the host knows them.
fn device_files<'a>(
    kernel: &KernelHost,
    bound: impl Iterator<Item = &'a (Bdf, ObjectId)>,
) -> Result<BTreeMap<Bdf, Arc<File>>> {
    let file = |(bdf, dev): &(Bdf, ObjectId)| Ok((*bdf, kernel.device_file(*dev)?));
    let files = bound.map(file).collect::<iommufd::Result<_>>();
    files.map_err(|error| Error::Iommu(error.to_string()))
}

/// Opens `/dev/kvm` and checks what the machine cannot do without.
pub(crate) fn open_kvm() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| Error::KvmOpen { source: error.into() })?;
    const API_VERSION: i32 = 12;
    if kvm.get_api_version() != API_VERSION {
        return Err(Error::KvmLacks(format!(
            "API version {}; this program speaks {API_VERSION}",
            kvm.get_api_version()
        )));
    }
    const CAPABILITIES: [(Cap, &str); 4] = [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    ];
    for (capability, name) in CAPABILITIES.iter().chain(arch::KVM_CAPABILITIES) {
        if !kvm.check_extension(*capability) {
            return Err(Error::KvmLacks(format!("it lacks {name}")));
        }
    }
    Ok(kvm)
}
