// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual IOMMU on the kernel's `/dev/iommu`, in front of assigned devices.
//!
//!     cargo run -p twostage --features kernel --example kernel_host [DEVICE]...
//!
//! Devices are VFIO's character devices, or sysfs paths as in `/sys/bus/pci/devices/0000:01:00.0`,
//! by default `/dev/vfio/devices/vfio0`. Without hardware, run it under `libtwostage_iommufd.so`,
//! which shows programs an emulated kernel.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use twostage::iommufd::{HostIommu, HwInfoData, KernelHost, ObjectId, OpenError};
use twostage::nesting::survey::{survey, NestingReport};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::regs::IDR0;
use twostage::spec::vtd::regs::CAP;
use twostage::unit::{Smmuv3Builder, VtdBuilder};
use twostage::viommu::smmuv3::{SmmuInterrupt, SmmuInterrupts};
use twostage::viommu::InterruptSink;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Receives the unit's own interrupts, to inject them with KVM.
struct Interrupts;

impl InterruptSink for Interrupts {
    fn send_msi(&self, address: u64, data: u32) {
        println!("KVM_SIGNAL_MSI: {data:#x} to {address:#x}");
    }
}

impl SmmuInterrupts for Interrupts {
    fn message(&self, address: u64, data: u32) -> bool {
        println!("KVM_SIGNAL_MSI: {data:#x} to {address:#x}");
        true
    }

    fn wire(&self, interrupt: SmmuInterrupt) {
        println!("an irqfd of {interrupt:?}");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // A VMM that has a descriptor of it already uses `KernelHost::from_fd`.
    let host = match KernelHost::open(Path::new("/dev/iommu")) {
        Err(OpenError::Absent(_)) => {
            println!("no /dev/iommu");
            return Ok(());
        }
        opened => Arc::new(opened?),
    };
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    if names.is_empty() {
        names.push("/dev/vfio/devices/vfio0".to_owned());
    }

    // What the devices' IOMMUs offer to a virtual one. Nothing of this stays on the host.
    println!("{}", NestingReport::new(&survey(&*host, &names)?));

    // Guest memory, mapped once for all devices. From now on its pages are pinned.
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?);
    let ioas = GuestIoas::new(host.clone())?;
    ioas.map_all(&memory)?;

    // The devices, and their places on the guest's bus.
    let mut devices = Vec::new();
    for (slot, name) in (1..).zip(&names) {
        let rid = Bdf::new(0, slot, 0).ok_or("more devices than slots")?;
        devices.push((rid, host.device_bind(name)?, name));
    }
    let (_, first, _) = devices.first().ok_or("no device")?;
    match host.get_hw_info(*first)?.data {
        HwInfoData::Vtd(_) => with_vtd(ioas, memory, &devices)?,
        HwInfoData::ArmSmmuV3(_) => with_smmuv3(ioas, memory, &devices)?,
        other => println!("nothing to nest on: {other:?}"),
    }
    for (_, dev, _) in devices {
        host.device_unbind(dev)?;
    }
    Ok(())
}

/// Devices: the guest's identity of each, the object that it is bound to, and its name.
type Devices<'a> = [(Bdf, ObjectId, &'a String)];

fn with_vtd(
    ioas: Arc<GuestIoas>,
    memory: Arc<GuestMemoryMmap>,
    devices: &Devices,
) -> Result<(), Box<dyn Error>> {
    let mut builder = VtdBuilder::new(ioas, memory, Arc::new(Interrupts));
    for (rid, dev, name) in devices {
        builder = builder.device(*rid, *dev, *name);
    }
    let vtd = builder.build()?;
    // A vCPU's access to the registers. Those of the guest's driver do the rest: `vtd` of the
    // package `twostage-emulated`.
    let mut capabilities = [0; 8];
    vtd.mmio_read(CAP, &mut capabilities);
    println!("virtual VT-d: CAP {:#x}", u64::from_le_bytes(capabilities));
    // Hot-plug: a device goes, and comes back.
    if let [.., (rid, dev, name)] = devices {
        vtd.remove_device(*rid)?;
        vtd.add_device(*rid, *dev, name)?;
    }
    println!("{:?}", vtd.nesting().counters());
    assert_eq!(vtd.snapshot()?.functions.len(), devices.len());
    Ok(vtd.shutdown()?)
}

fn with_smmuv3(
    ioas: Arc<GuestIoas>,
    memory: Arc<GuestMemoryMmap>,
    devices: &Devices,
) -> Result<(), Box<dyn Error>> {
    let mut builder = Smmuv3Builder::new(ioas, memory, Arc::new(Interrupts));
    for (rid, dev, name) in devices {
        builder = builder.device(*rid, *dev, *name);
    }
    let smmu = builder.build()?;
    let mut features = [0; 4];
    smmu.mmio_read(IDR0, &mut features);
    println!("virtual SMMUv3: IDR0 {:#x}", u32::from_le_bytes(features));
    if let [.., (rid, dev, name)] = devices {
        smmu.remove_device(*rid)?;
        smmu.add_device(*rid, *dev, name)?;
    }
    println!("{:?}", smmu.nesting().counters());
    assert_eq!(smmu.snapshot()?.streams.len(), devices.len());
    Ok(smmu.shutdown()?)
}
