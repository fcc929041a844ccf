// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The steps of building a machine, in order. A step that fails says what is wrong with the
//! configuration or the host.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm, VmFd};

use super::topology::{assigned_functions, direct_functions, BoundFile, PciTopology};
use crate::arch::layout::{iommu_interrupts, ECAM_START, PCI_MMIO_LAST, PCI_MMIO_START};
use crate::arch::{self, IrqChip, Processor};
use crate::bus::Bus;
use crate::config::MachineConfig;
use crate::interrupts::{Interrupts, Messages, Ways};
use crate::iommu::{BoundDevice, DirectDevices, Host, Iommu, Iommus, SideCore};
use crate::memory::MachineMemory;
use crate::pci::layout::CONFIG_SIZE;
use crate::pci::{ConfigLender, Ecam, PciBus, PciMemory};
use crate::process::stop::Stopper;
use crate::trace::Trace;
use crate::vfio::page_size;
use crate::{Error, Result};
use twostage::spec::pci::Bdf;

/// Guest memory, in files if the host is the kernel, which then maps them.
pub(super) fn memory(config: &MachineConfig) -> Result<MachineMemory> {
    Ok(match config.kernel_host() {
        Some(_) => MachineMemory::in_files(config.memory)?,
        None => MachineMemory::new(config.memory)?,
    })
}

/// Opens `/dev/kvm` and checks for what the machine cannot do without.
pub(crate) fn open_kvm() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| Error::KvmOpen { source: error.into() })?;
    const API_VERSION: i32 = 12;
    if kvm.get_api_version() != API_VERSION {
        return Err(Error::KvmLacks(format!(
            "API version {}; this program needs {API_VERSION}",
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

/// A VM of `kvm` with `memory`; it can run the vCPUs of `config`.
pub(super) fn vm(kvm: &Kvm, config: &MachineConfig, memory: &MachineMemory) -> Result<Arc<VmFd>> {
    if usize::from(config.vcpus) > kvm.get_max_vcpus() {
        return Err(Error::KvmLacks(format!(
            "--cpus boot={}: it supports at most {}",
            config.vcpus,
            kvm.get_max_vcpus()
        )));
    }
    let vm = Arc::new(arch::create_vm(kvm)?);
    memory.register(&vm)?;
    Ok(vm)
}

/// The trace, if there is one; `earlier` is continued.
pub(super) fn trace(
    config: &MachineConfig,
    earlier: Option<Arc<Trace>>,
) -> Result<Option<Arc<Trace>>> {
    if let Some(trace) = earlier {
        trace.next_life();
        return Ok(Some(trace));
    }
    Ok(config.trace.as_deref().map(Trace::create).transpose()?.map(Arc::new))
}

/// The virtual IOMMUs, over `kernel` if `config` says so; `messages` go to `chip`.
pub(super) fn iommus(
    config: &MachineConfig,
    chip: IrqChip,
    memory: &MachineMemory,
    kernel: Option<&Host>,
    messages: &Messages,
    trace: &Option<Arc<Trace>>,
) -> Result<Option<Iommus>> {
    let (remapping, functions) = (chip.remaps_interrupts(config), assigned_functions(config)?);
    let messages = |source| messages.of(source);
    Iommus::new(config, remapping, memory, kernel, &functions, &messages, trace.clone())
}

/// The devices of `kernel` that are behind no virtual IOMMU, if there are any.
pub(super) fn direct_devices(
    config: &MachineConfig,
    kernel: Option<&Host>,
) -> Result<Option<DirectDevices>> {
    match (direct_functions(config)?, kernel) {
        (functions, Some(host)) if !functions.is_empty() => {
            DirectDevices::new(host.clone(), &functions).map(Some)
        }
        _ => Ok(None),
    }
}

/// Interrupts that go through `ways` and are remapped by `iommus`. Connects the wires of the
/// virtual IOMMUs' own interrupts.
pub(super) fn interrupts(ways: Ways, iommus: &[Iommu]) -> Result<Arc<Interrupts>> {
    // The interrupt controllers are behind the first virtual IOMMU.
    let remapper = iommus.first().and_then(|iommu| iommu.model.interrupt_remapper());
    let interrupts = Arc::new(Interrupts::new(ways, remapper));
    for (number, iommu) in iommus.iter().enumerate() {
        for listener in interrupts.listeners() {
            iommu.model.add_interrupt_listener(listener);
        }
        let wires = iommu_interrupts(number).into_iter().flatten();
        iommu.model.connect(wires.map(|gsi| interrupts.edge_line(gsi)).collect::<Result<_>>()?);
    }
    Ok(interrupts)
}

/// The side core of `iommus`, if the configuration asks for one. `slots` of `vm` are used.
pub(super) fn side_core(
    vm: &Arc<VmFd>,
    config: &MachineConfig,
    iommus: &[Iommu],
    processors: &[Processor],
    slots: u32,
    stopper: &Stopper,
) -> Result<Option<SideCore>> {
    // A machine has at least one.
    let Some(first) = processors.first() else { return Ok(None) };
    SideCore::new(vm, config, iommus, first.raw_fd(), slots, stopper)
}

/// The files of the devices of `kernel`, and what `vfio-ioctls` takes besides: the iommufd, with an
/// IOAS that nothing uses.
pub(super) fn device_files(
    kernel: Option<&Host>,
    iommus: &[Iommu],
    direct: Option<&DirectDevices>,
) -> Result<BTreeMap<Bdf, BoundFile>> {
    let of_iommus = iommus.iter().map(|iommu| &iommu.devices);
    let bound = of_iommus.chain(direct.map(|direct| &direct.devices)).flatten();
    let Some(kernel) = kernel else { return Ok(BTreeMap::new()) };
    let iommufd = kernel.vfio_iommufd()?;
    let file = |BoundDevice { bdf, dev, host }: &BoundDevice| {
        Ok((*bdf, (host.device_file(*dev)?, iommufd.clone())))
    };
    bound.filter(|device| device.host.is_kernel()).map(file).collect()
}

/// Gives the guest configuration space as memory for reading. Where that cannot be, reads exit.
pub(super) fn lend_config(vm: &VmFd, bus: &PciBus, lender: &dyn ConfigLender) {
    let possible = vm.check_extension(Cap::ReadonlyMem) && arch::memory_is_coherent(vm);
    if !possible || page_size() != CONFIG_SIZE as u64 {
        return;
    }
    if let Err(error) = bus.lend_config(ECAM_START, lender) {
        log::warn!("reads of configuration space exit: {error}");
    }
}

/// Everything that answers in the memory space, except the board.
pub(super) fn mmio(
    config: &MachineConfig,
    pci: &PciTopology,
    iommus: &[Iommu],
    side_core: Option<&SideCore>,
) -> Result<Bus> {
    let mut mmio = Bus::default();
    mmio.insert(PCI_MMIO_START..=PCI_MMIO_LAST, Arc::new(PciMemory(pci.bus.clone())))?;
    let ecam = ECAM_START..=ECAM_START + ((config.buses() << 20) - 1);
    mmio.insert(ecam, Arc::new(Ecam(pci.bus.clone())))?;
    for (number, (iommu, of)) in iommus.iter().zip(&config.iommus).enumerate() {
        let first = config.iommu_address(number);
        let registers = iommu.model.registers();
        let registers = match side_core {
            Some(side_core) => side_core.registers(first, registers),
            None => registers,
        };
        mmio.insert(first..=first + (of.model.registers() - 1), registers)?;
    }
    Ok(mmio)
}
