// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An arm64 machine's interrupt controllers, all in the kernel, and their inputs: the GIC's shared
//! peripheral interrupts.
//!
//! Source: Linux, `Documentation/virt/kvm/devices/arm-vgic-v3.rst` and `arm-vgic-its.rst`.

use std::fmt;
use std::io;
use std::sync::{Arc, Weak};

use kvm_bindings::{
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, KVM_ARM_IRQ_TYPE_SHIFT,
    KVM_ARM_IRQ_TYPE_SPI, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_IRQ_ROUTING_IRQCHIP,
    KVM_VGIC_ITS_ADDR_TYPE, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST,
};
use kvm_ioctls::{DeviceFd, VmFd};
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::arch::layout::{
    DISTRIBUTOR_ADDRESS, FIRST_SPI, ITS_ADDRESS, PINS, REDISTRIBUTORS_ADDRESS,
};
use crate::config::MachineConfig;
use crate::interrupts::{DeviceLine, ResampledLine, Ways};
use crate::pci::IntxPin;
use crate::{Error, Result};
use twostage::viommu::routes::RouteTable;
use twostage::viommu::{InterruptListener, InterruptRemapper};
use twostage::warn_limited;

/// KVM's devices that a machine needs.
const KINDS: [(u32, &str); 2] = [
    (kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, "a GICv3"),
    (kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, "an interrupt translation service (ITS)"),
];

/// The interrupt controllers: a GICv3 with one interrupt translation service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IrqChip(());

impl fmt::Display for IrqChip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("in-kernel (GICv3, ITS)")
    }
}

impl IrqChip {
    /// What this KVM lacks for them, if anything. `vm` has them afterwards, and cannot be used for
    /// anything else.
    pub fn lacking(vm: &VmFd) -> Option<&'static str> {
        KINDS.iter().find(|kind| create(vm, kind).is_err()).map(|(_, name)| *name)
    }

    /// Creates the interrupt controllers of `vm`, after all its vCPUs.
    ///
    /// # Errors
    /// This KVM cannot create one.
    pub fn new(vm: &VmFd) -> Result<Self> {
        let [gic, its] = &KINDS;
        let gic = create(vm, gic)?;
        set(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &(FIRST_SPI + PINS))?;
        let address = KVM_DEV_ARM_VGIC_GRP_ADDR;
        set(&gic, address, KVM_VGIC_V3_ADDR_TYPE_DIST, &DISTRIBUTOR_ADDRESS)?;
        set(&gic, address, KVM_VGIC_V3_ADDR_TYPE_REDIST, &REDISTRIBUTORS_ADDRESS)?;
        init(&gic)?;
        let its = create(vm, its)?;
        set(&its, address, KVM_VGIC_ITS_ADDR_TYPE, &ITS_ADDRESS)?;
        init(&its)?;
        // The devices belong to the machine and outlive their files.
        Ok(Self(()))
    }

    /// Whether virtual IOMMUs remap interrupts in the machine of `_config`: the interrupt
    /// translation service translates messages, whatever an IOMMU does to their address.
    pub fn remaps_interrupts(self, _config: &MachineConfig) -> bool {
        false
    }

    /// KVM's default routes: each shared peripheral interrupt to the GSI of its number.
    pub fn pin_routes(self) -> Vec<kvm_irq_routing_entry> {
        let route = |pin| kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip: 0, pin },
            },
            ..kvm_irq_routing_entry::default()
        };
        (0..PINS).map(route).collect()
    }
}

fn create(vm: &VmFd, (kind, name): &(u32, &str)) -> Result<DeviceFd> {
    vm.create_device(&mut kvm_create_device { type_: *kind, fd: 0, flags: 0 }).map_err(|error| {
        match error.errno() {
            libc::ENODEV => Error::KvmLacks(format!("it cannot create {name}, which guests need")),
            _ => Error::kvm("creating an interrupt controller")(error),
        }
    })
}

/// Sets an attribute to `value`, which KVM reads during the call.
fn set<T>(device: &DeviceFd, group: u32, attribute: u32, value: &T) -> Result<()> {
    let addr = std::ptr::from_ref(value) as u64;
    device
        .set_device_attr(&kvm_device_attr { flags: 0, group, attr: attribute.into(), addr })
        .map_err(Error::kvm("setting up an interrupt controller"))
}

fn init(device: &DeviceFd) -> Result<()> {
    set(device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, &())
}

/// The inputs; their GSIs are the numbers of the shared peripheral interrupts.
#[derive(Debug)]
pub(crate) struct Lines {
    vm: Arc<VmFd>,
}

impl Lines {
    /// The inputs of the controllers in `ways`. They are in `_table`, KVM's routing, from the
    /// start, and are no messages that `_remapper` could remap.
    pub fn new(
        ways: &Ways,
        _table: &Arc<RouteTable>,
        _remapper: Option<Weak<dyn InterruptRemapper>>,
    ) -> Self {
        Self { vm: ways.vm.clone() }
    }

    /// The listener for changes of interrupt remapping: none, as these are never remapped.
    pub fn listener(&self) -> Option<Weak<dyn InterruptListener>> {
        None
    }

    /// The edge-triggered input `gsi`.
    ///
    /// # Errors
    /// KVM cannot wire it.
    pub fn edge(&self, gsi: u32) -> Result<EdgeLine> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        self.vm.register_irqfd(&event, gsi).map_err(Error::kvm("wiring an interrupt"))?;
        Ok(EdgeLine(event))
    }

    /// The line of `pin`, which an assigned device asserts.
    ///
    /// # Errors
    /// KVM cannot wire it.
    pub fn device_line(&self, pin: IntxPin) -> Result<DeviceLine> {
        let gsi = pin.gsis().last().copied();
        let gsi = gsi.ok_or_else(|| Error::Interrupts("a pin leads nowhere".into()))?;
        let line = Box::new(ResampledLine::new(self.vm.clone(), gsi)?);
        Ok(DeviceLine { line, subscriber: None })
    }

    /// Drives the level-triggered input `gsi`.
    pub fn set(&self, gsi: u32, level: bool) {
        // Independent of routing: the interrupt's type, and its number at the GIC.
        let interrupt = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (FIRST_SPI + gsi);
        if let Err(error) = self.vm.set_irq_line(interrupt, level) {
            warn_limited!("interrupt line {gsi}: {error}");
        }
    }
}

/// An edge-triggered interrupt line.
#[derive(Debug)]
pub(crate) struct EdgeLine(EventFd);

impl Trigger for EdgeLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
