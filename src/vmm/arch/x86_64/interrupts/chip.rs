// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which interrupt controllers KVM gives a machine.

use std::fmt;

use kvm_bindings::{
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_pic_state, kvm_pit_config,
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_IRQCHIP, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
};
use kvm_ioctls::{Cap, VmFd};

use crate::vmm::arch::layout::PINS;
use crate::vmm::config::MachineConfig;
use crate::vmm::{Error, Result};

/// Inputs of the two PICs; those of the first come first.
const PIC_INPUTS: u32 = 16;

/// Where the interrupt controllers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqChip {
    /// PIC, IOAPIC and LAPICs in the kernel.
    InKernel,
    /// LAPICs in the kernel, the IOAPIC in this process; no PIC.
    Split,
}

impl fmt::Display for IrqChip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InKernel => "in-kernel (PIC, IOAPIC, LAPIC)",
            Self::Split => "split (LAPIC in the kernel, IOAPIC here, no PIC)",
        })
    }
}

/// Which interrupt controllers a machine is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Those in the kernel; split ones where there are no others.
    InKernel,
    /// Split ones; those in the kernel where there are no others.
    Split,
    /// Split ones, no others.
    OnlySplit,
}

/// The pair of 8259s, and those bits of ELCR (edge or level) that can be set in each.
const PICS: [(u32, u8); 2] = [(KVM_IRQCHIP_PIC_MASTER, 0xf8), (KVM_IRQCHIP_PIC_SLAVE, 0xde)];

impl Wanted {
    /// What the machine of `config` needs: interrupts can be remapped only on their way out of an
    /// IOAPIC that is not in the kernel.
    fn by(config: &MachineConfig) -> Self {
        match config.interrupt_remapping() {
            Some(true) => Self::OnlySplit,
            None if !config.iommus.is_empty() => Self::Split,
            _ => Self::InKernel,
        }
    }
}

impl IrqChip {
    /// Gives `vm` the interrupt controllers that the machine of `config` needs, before any vCPU.
    ///
    /// # Errors
    /// This KVM has none of the kind.
    pub fn new(vm: &VmFd, config: &MachineConfig) -> Result<Self> {
        Self::create(vm, Wanted::by(config))
    }

    /// Whether virtual IOMMUs remap interrupts in the machine of `config`.
    pub fn remaps_interrupts(self, config: &MachineConfig) -> bool {
        // Without a virtual IOMMU there is nobody to do it.
        config.interrupt_remapping().unwrap_or(self == Self::Split)
    }

    /// What KVM routes by itself: each pin of its own PICs and IOAPIC to the GSI of its number.
    pub fn pin_routes(self) -> Vec<kvm_irq_routing_entry> {
        let route = |gsi, irqchip, pin| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip, pin },
            },
            ..kvm_irq_routing_entry::default()
        };
        if self == Self::Split {
            return Vec::new();
        }
        let pics = (0..PIC_INPUTS).map(|gsi| match gsi {
            0..8 => route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
            _ => route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
        });
        let ioapic = (0..PINS).map(|gsi| route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        pics.chain(ioapic).collect()
    }

    pub(super) fn create(vm: &VmFd, wanted: Wanted) -> Result<Self> {
        match wanted {
            Wanted::OnlySplit => create_split(vm),
            Wanted::Split => create_split(vm).or_else(|error| {
                log::warn!("{error}; interrupts are not remapped");
                create_in_kernel(vm)
            }),
            Wanted::InKernel => create_in_kernel(vm).or_else(|error| {
                log::warn!("{error}; trying split ones");
                create_split(vm)
            }),
        }
    }
}

fn create_in_kernel(vm: &VmFd) -> Result<IrqChip> {
    vm.create_irq_chip().map_err(Error::kvm("making interrupt controllers"))?;
    // Masked, as firmware leaves them: a guest that never looks at them must not be interrupted
    // at the vectors they start out with, which are the processor's exceptions.
    for (chip_id, elcr_mask) in PICS {
        let pic = kvm_pic_state { imr: 0xff, elcr_mask, ..kvm_pic_state::default() };
        let chip = kvm_irqchip__bindgen_ty_1 { pic };
        vm.set_irqchip(&kvm_irqchip { chip_id, chip, ..kvm_irqchip::default() })
            .map_err(Error::kvm("masking interrupt controllers"))?;
    }
    // Port 0x61 is answered too, so that guests that measure time by it do not hang.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(pit).map_err(Error::kvm("making the interval timer"))?;
    Ok(IrqChip::InKernel)
}

fn create_split(vm: &VmFd) -> Result<IrqChip> {
    for (capability, name) in
        [(Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"), (Cap::X2ApicApi, "KVM_CAP_X2APIC_API")]
    {
        if !vm.check_extension(capability) {
            let need = "remapping interrupts (--iommu vtd, no intremap=off) needs it";
            return Err(Error::KvmLacks(format!("it lacks {name}; {need}")));
        }
    }
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        // KVM tells of ends of interrupts by the routes of so many GSIs.
        args: [PINS.into(), 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    vm.enable_cap(&split).map_err(Error::kvm("splitting interrupt controllers"))?;
    // Destinations have 32 bits, and one of all ones in the lower eight is no broadcast.
    let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    let wide = kvm_enable_cap {
        cap: KVM_CAP_X2APIC_API,
        args: [flags.into(), 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    vm.enable_cap(&wide).map_err(Error::kvm("widening interrupt destinations"))?;
    Ok(IrqChip::Split)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_in_the_kernel_have_their_routes() {
        let routes = IrqChip::InKernel.pin_routes();
        assert_eq!(routes.len(), 16 + 24);
        assert_eq!(routes.iter().filter(|route| route.gsi == 4).count(), 2);
        assert!(IrqChip::Split.pin_routes().is_empty());
    }
}
