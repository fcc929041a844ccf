// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine: its parts, put together and run.

use std::fmt;
use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm};

use super::boot;
use super::bus::BusDevice;
use super::config::{MachineConfig, SerialConfig};
use super::debug_exit::{self, DebugExit};
use super::event_loop::EventLoop;
use super::exits::Exits;
use super::interrupts::Interrupts;
use super::machine_pci::PciTopology;
use super::memory::{MachineMemory, ECAM_SIZE, ECAM_START, KVM_TSS, PCI_MMIO_LAST, PCI_MMIO_START};
use super::pci::{ConfigPorts, Ecam, PciMemory};
use super::reset::{self, KeyboardController};
use super::serial::{self, Console, SerialPort};
use super::stop::{StopReason, Stopper};
use super::vcpu::Vcpu;
use super::{Error, Result};

/// A machine that has not run yet.
pub struct Machine {
    // Dropped in this order: vCPUs and devices before the memory they use.
    vcpus: Vec<Vcpu>,
    exits: Arc<Exits>,
    serial: Arc<SerialPort>,
    interrupts: Arc<Interrupts>,
    memory: MachineMemory,
    stopper: Stopper,
    console: bool,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
            .field("exits", &self.exits)
            .field("interrupts", &self.interrupts)
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Builds the machine that `config` describes, its kernel loaded.
    ///
    /// # Errors
    /// What is wrong with the configuration, the files, or this host.
    pub fn new(config: &MachineConfig) -> Result<Self> {
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
        let interrupts = Arc::new(Interrupts::new(vm.clone())?);

        let stopper = Stopper::new()?;
        let serial = SerialPort::new(&config.serial, &interrupts)?;
        let mut exits = Exits::default();
        let pci = PciTopology::new(&config.devices, &memory, interrupts.clone())?;
        let ports: [(_, Arc<dyn BusDevice>); 4] = [
            (serial::FIRST_PORT..=serial::LAST_PORT, serial.clone()),
            (debug_exit::PORT..=debug_exit::PORT, Arc::new(DebugExit::new(stopper.clone()))),
            (
                reset::FIRST_PORT..=reset::LAST_PORT,
                Arc::new(KeyboardController::new(stopper.clone())),
            ),
            (
                ConfigPorts::FIRST_PORT..=ConfigPorts::LAST_PORT,
                Arc::new(ConfigPorts::new(pci.bus.clone())),
            ),
        ];
        for (range, device) in ports {
            exits.ports.insert(range, device)?;
        }
        exits.mmio.insert(PCI_MMIO_START..=PCI_MMIO_LAST, Arc::new(PciMemory(pci.bus.clone())))?;
        exits
            .mmio
            .insert(ECAM_START..=ECAM_START + (ECAM_SIZE - 1), Arc::new(Ecam(pci.bus.clone())))?;

        let vcpus = (0..config.vcpus)
            .map(|id| Vcpu::new(&kvm, &vm, id, &start))
            .collect::<Result<Vec<_>>>()?;
        let console = config.serial == SerialConfig::Tty;
        Ok(Self { vcpus, exits: Arc::new(exits), serial, interrupts, memory, stopper, console })
    }

    /// Runs the machine until the guest, a signal or an error ends it.
    ///
    /// # Errors
    /// When its threads or the event loop cannot be started.
    pub fn run(mut self) -> Result<StopReason> {
        log::info!("interrupt controllers: {}", self.interrupts.chip());
        let mut events = EventLoop::new(self.stopper.clone(), Box::new(|| {}))?;
        if self.console {
            events.add(Box::new(Console::new(self.serial.clone())?));
        }
        let mut threads = Vec::with_capacity(self.vcpus.len());
        for vcpu in self.vcpus.drain(..) {
            threads.push(vcpu.spawn(
                self.exits.clone(),
                self.memory.clone(),
                self.stopper.clone(),
            )?);
        }
        let reason = events.run();
        if let Err(error) = &reason {
            self.stopper.stop(StopReason::Software(error.to_string()));
        }
        drop(threads);
        reason
    }
}

/// Opens `/dev/kvm` and checks what the machine cannot do without.
fn open_kvm() -> Result<Kvm> {
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
    ] {
        if !kvm.check_extension(capability) {
            return Err(Error::KvmLacks(format!("it lacks {name}")));
        }
    }
    Ok(kvm)
}
