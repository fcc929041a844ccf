// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine: its parts, put together and run.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm};

use super::acpi::{self, IoApic, IommuPlatform, IommuUnit, Platform};
use super::boot;
use super::bus::BusDevice;
use super::config::{MachineConfig, SerialConfig};
use super::cpuid::VcpuIdentity;
use super::debug_exit::{self, DebugExit};
use super::devices::virtio::KvmDoorbells;
use super::event_loop::{EventLoop, Wake};
use super::exits::{ExitKind, Exits};
use super::interrupts::{
    Interrupts, IrqChip, KvmMessages, Wanted, IOAPIC_ADDRESS, IOAPIC_BDF, IOAPIC_ID, IOAPIC_SIZE,
};
use super::iommu::{Iommu, Iommus};
use super::memory::{MachineMemory, ECAM_SIZE, ECAM_START, KVM_TSS, PCI_MMIO_LAST, PCI_MMIO_START};
use super::pci::{ConfigPorts, Ecam, PciMemory};
use super::power::{self, PortsWithReset, SleepRegisters};
use super::report::Report;
use super::reset::{self, KeyboardController};
use super::serial::{self, Console, SerialPort};
use super::stop::{StopReason, Stopper};
use super::topology::{assigned_functions, scopes, PciTopology, Wiring};
use super::trace::{Trace, TracedInterrupts};
use super::vcpu::{Vcpu, VcpuThread};
use super::{Error, Result};
use crate::emulated::ObjectGraph;
use crate::viommu::vtd::MMIO_SIZE;
use crate::viommu::InterruptSink;

/// A machine that has not run yet.
pub struct Machine {
    // Dropped in this order: whoever uses a part goes before it, and the memory goes last.
    vcpus: Vec<Vcpu>,
    exits: Arc<Exits>,
    pci: PciTopology,
    iommus: Option<Iommus>,
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
        config.validate()?;
        let memory = MachineMemory::new(config.memory)?;
        let start = boot::load(&memory, &config.payload)?;

        let kvm = open_kvm()?;
        if usize::from(config.vcpus) > kvm.get_max_vcpus() {
            return Err(Error::KvmLacks(format!(
                "--cpus boot={}: it runs {} at the most",
                config.vcpus,
                kvm.get_max_vcpus()
            )));
        }
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("making a virtual machine"))?);
        // Ignored by processors that need no such segment; KVM wants it before any vCPU.
        vm.set_tss_address(KVM_TSS as usize).map_err(Error::kvm("placing its TSS"))?;
        memory.register(&vm)?;
        let chip = IrqChip::create(&vm, wanted_chip(config))?;
        // Without a virtual IOMMU there is nobody to do it.
        let remapping = config.interrupt_remapping().unwrap_or(chip == IrqChip::Split);
        // Not before most of what can go wrong: a machine that cannot be leaves no files behind.
        let trace = match earlier {
            Some(trace) => {
                trace.next_life();
                Some(trace)
            }
            None => config.trace.as_deref().map(Trace::create).transpose()?.map(Arc::new),
        };
        let messages = Arc::new(KvmMessages(vm.clone()));
        let messages: Arc<dyn InterruptSink> = match trace.clone() {
            Some(trace) => Arc::new(TracedInterrupts { inner: messages, trace }),
            None => messages,
        };

        let functions = assigned_functions(config)?;
        let iommus = {
            let (messages, trace) = (messages.clone(), trace.clone());
            Iommus::new(config, remapping, &memory, &functions, messages, trace)?
        };
        let all_iommus = iommus.as_ref().map_or(&[][..], Iommus::all);
        // The IOAPIC is behind the first.
        let remapper = all_iommus.first().and_then(Iommu::interrupt_remapper);
        let interrupts = Arc::new({
            let trace = trace.clone();
            Interrupts::new(vm.clone(), chip, messages, remapper, trace)
        });
        for iommu in all_iommus {
            for listener in interrupts.listeners() {
                iommu.add_interrupt_listener(listener);
            }
        }
        let doorbells = Arc::new(KvmDoorbells(vm.clone()));
        let wiring = Wiring { interrupts: interrupts.clone(), doorbells, trace: trace.clone() };
        let pci = PciTopology::new(config, &memory, all_iommus, wiring)?;
        let stopper = Stopper::new()?;
        let serial = SerialPort::new(&config.serial, &interrupts, stopper.clone())?;

        let mut exits = Exits { ioapic: interrupts.ioapic(), ..Exits::default() };
        let config_ports =
            PortsWithReset { config: ConfigPorts::new(pci.bus.clone()), stopper: stopper.clone() };
        let ports: [(_, Arc<dyn BusDevice>); 5] = [
            (serial::FIRST_PORT..=serial::LAST_PORT, serial.clone()),
            (
                debug_exit::FIRST_PORT..=debug_exit::LAST_PORT,
                Arc::new(DebugExit::new(stopper.clone())),
            ),
            (
                reset::FIRST_PORT..=reset::LAST_PORT,
                Arc::new(KeyboardController::new(stopper.clone())),
            ),
            (ConfigPorts::FIRST_PORT..=ConfigPorts::LAST_PORT, Arc::new(config_ports)),
            (
                u64::from(power::SLEEP_CONTROL_PORT)..=power::SLEEP_STATUS_PORT.into(),
                Arc::new(SleepRegisters(stopper.clone())),
            ),
        ];
        for (range, device) in ports {
            exits.ports.insert(range, device)?;
        }
        let mmio = &mut exits.mmio;
        mmio.insert(PCI_MMIO_START..=PCI_MMIO_LAST, Arc::new(PciMemory(pci.bus.clone())))?;
        mmio.insert(ECAM_START..=ECAM_START + (ECAM_SIZE - 1), Arc::new(Ecam(pci.bus.clone())))?;
        if let Some(ioapic) = interrupts.ioapic() {
            let first = u64::from(IOAPIC_ADDRESS);
            mmio.insert(first..=first + (IOAPIC_SIZE - 1), ioapic)?;
        }
        for (number, iommu) in all_iommus.iter().enumerate() {
            let first = config.iommu_address(number);
            mmio.insert(first..=first + (MMIO_SIZE - 1), iommu.registers())?;
        }

        power::write_reset_vector(&memory)
            .map_err(|error| Error::Acpi(format!("the reset vector: {error}")))?;
        acpi::write_tables(&memory, &platform(config, chip, remapping)?)?;
        let vcpus = (0..config.vcpus)
            .map(|id| VcpuIdentity { id, count: config.vcpus })
            .map(|identity| Vcpu::new(&kvm, &vm, identity, &start))
            .collect::<Result<Vec<_>>>()?;
        let console = config.serial == SerialConfig::Tty;
        Ok(Self {
            vcpus,
            exits: Arc::new(exits),
            pci,
            iommus,
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
            events.add(Box::new(Console::new(self.serial.clone())?));
        }
        let mut threads = Vec::new();
        let vcpus = std::mem::take(&mut self.vcpus);
        let result = self.serve(vcpus, &mut threads, &mut events, on_report);
        if let Err(error) = &result {
            self.stopper.stop(StopReason::Software(error.to_string()));
        }
        // A vCPU may be in the invalidation queue, however long its guest has made that.
        for iommu in self.iommus() {
            iommu.halt();
        }
        // Waits for the vCPUs: none of them does anything after the last report.
        drop(threads);
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
        let Self { exits, pci, iommus, .. } = self;
        drop((exits, pci));
        iommus.map(Iommus::close)
    }

    /// Starts `vcpus`, which become `threads`, and serves `events` until the machine is stopped.
    fn serve(
        &self,
        vcpus: Vec<Vcpu>,
        threads: &mut Vec<VcpuThread>,
        events: &mut EventLoop,
        on_report: &mut dyn FnMut(&Report),
    ) -> Result<StopReason> {
        for vcpu in vcpus {
            let (exits, memory) = (self.exits.clone(), self.memory.clone());
            threads.push(vcpu.spawn(exits, memory, self.stopper.clone())?);
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
            host: self.iommus.as_ref().map(Iommus::host_report),
        }
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
            .field("exits", &self.exits)
            .field("iommus", &self.iommus)
            .finish_non_exhaustive()
    }
}

/// Which interrupt controllers the machine of `config` needs: interrupts can be remapped only on their
/// way out of an IOAPIC that is not in the kernel.
fn wanted_chip(config: &MachineConfig) -> Wanted {
    match config.interrupt_remapping() {
        Some(true) => Wanted::OnlySplit,
        None if !config.iommus.is_empty() => Wanted::Split,
        _ => Wanted::InKernel,
    }
}

/// What ACPI tells the guest of the machine that `config` describes.
fn platform(config: &MachineConfig, chip: IrqChip, interrupt_remapping: bool) -> Result<Platform> {
    let scopes = scopes(config, interrupt_remapping)?;
    let in_scope = scopes.iter().map(Vec::len).sum::<usize>();
    let unit = |(number, functions)| {
        let address = config.iommu_address(number);
        IommuUnit { address, functions }
    };
    let iommu = (!config.iommus.is_empty()).then(|| IommuPlatform {
        units: scopes.into_iter().enumerate().map(unit).collect(),
        all_functions: in_scope == config.devices.len(),
        interrupt_remapping,
        ats: config.iommus.iter().any(|iommu| iommu.ats),
    });
    let ioapic = IoApic { id: IOAPIC_ID, address: IOAPIC_ADDRESS, bdf: IOAPIC_BDF };
    let pic = chip == IrqChip::InKernel;
    Ok(Platform { vcpus: config.vcpus, ioapic: Some(ioapic), pic, iommu })
}

/// Opens `/dev/kvm` and checks what the machine cannot do without.
pub(super) fn open_kvm() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| Error::KvmOpen { source: error.into() })?;
    const API_VERSION: i32 = 12;
    if kvm.get_api_version() != API_VERSION {
        return Err(Error::KvmLacks(format!(
            "API version {}; this program speaks {API_VERSION}",
            kvm.get_api_version()
        )));
    }
    for (capability, name) in [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(Error::KvmLacks(format!("it lacks {name}")));
        }
    }
    Ok(kvm)
}
