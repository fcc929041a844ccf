// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Selection of KVM's interrupt controllers.

use std::collections::BTreeMap;
use std::fmt;

use kvm_bindings::{
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_pic_state, kvm_pit_config,
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_IRQCHIP, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
};
use kvm_ioctls::{Cap, VmFd};

use crate::arch::layout::{PINS, TIMER_ISA_IRQ, TIMER_PIN};
use crate::config::MachineConfig;
use crate::interrupts::Routing;
use crate::{Error, Result};

/// Inputs of the two PICs; those of the first come first.
const PIC_INPUTS: u32 = 16;
/// The input of the first PIC that is connected to the second one's output.
const PIC_CASCADE: u32 = 2;

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
    /// Those in the kernel; split ones if KVM has no others.
    InKernel,
    /// Split ones; those in the kernel if KVM has no others.
    Split,
    /// Split ones only.
    OnlySplit,
}

/// The pair of 8259s, and the writable bits of each one's ELCR (edge or level).
const PICS: [(u32, u8); 2] = [(KVM_IRQCHIP_PIC_MASTER, 0xf8), (KVM_IRQCHIP_PIC_SLAVE, 0xde)];

impl Wanted {
    /// What the machine of `config` needs: interrupts can be remapped only when the IOAPIC is not
    /// in the kernel.
    fn by(config: &MachineConfig) -> Self {
        match config.interrupt_remapping() {
            Some(true) => Self::OnlySplit,
            None if !config.iommus.is_empty() => Self::Split,
            _ => Self::InKernel,
        }
    }
}

impl IrqChip {
    /// Creates the interrupt controllers that the machine of `config` needs in `vm`, before any
    /// vCPU.
    ///
    /// # Errors
    /// This KVM has none of the required kind.
    pub fn new(vm: &VmFd, config: &MachineConfig) -> Result<Self> {
        Self::create(vm, Wanted::by(config))
    }

    /// Whether virtual IOMMUs remap interrupts in the machine of `config`.
    pub fn remaps_interrupts(self, config: &MachineConfig) -> bool {
        // Without a virtual IOMMU there is no remapping.
        config.interrupt_remapping().unwrap_or(self == Self::Split)
    }

    /// KVM's default routes: the pins of its PICs and IOAPIC.
    pub fn pin_routes(self) -> Vec<kvm_irq_routing_entry> {
        if self == Self::Split {
            return Vec::new();
        }
        let route = |(gsi, irqchip, pin)| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip, pin },
            },
            ..kvm_irq_routing_entry::default()
        };
        pins_in_the_kernel().map(route).collect()
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

/// Each pin of the in-kernel PICs and IOAPIC: (GSI, controller, pin). The GSI is the pin's number,
/// except for the interval timer: ISA interrupt 0 is the PIC's input 0 and the IOAPIC's pin 2, as
/// in the MADT. KVM's initial table has the IOAPIC's pin 0.
fn pins_in_the_kernel() -> impl Iterator<Item = (u32, u32, u32)> {
    let pics = (0..PIC_INPUTS).filter(|gsi| *gsi != PIC_CASCADE).map(|gsi| match gsi {
        0..8 => (gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => (gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    let ioapic = (0..PINS).filter(|gsi| *gsi != TIMER_PIN).map(|gsi| match gsi {
        TIMER_ISA_IRQ => (gsi, KVM_IRQCHIP_IOAPIC, TIMER_PIN),
        _ => (gsi, KVM_IRQCHIP_IOAPIC, gsi),
    });
    pics.chain(ioapic)
}

fn create_in_kernel(vm: &VmFd) -> Result<IrqChip> {
    vm.create_irq_chip().map_err(Error::kvm("creating interrupt controllers"))?;
    // Masked, as firmware leaves them: a guest that ignores them must not get interrupts at their
    // initial vectors, which are exceptions of the processor.
    for (chip_id, elcr_mask) in PICS {
        let pic = kvm_pic_state { imr: 0xff, elcr_mask, ..kvm_pic_state::default() };
        let chip = kvm_irqchip__bindgen_ty_1 { pic };
        vm.set_irqchip(&kvm_irqchip { chip_id, chip, ..kvm_irqchip::default() })
            .map_err(Error::kvm("masking interrupt controllers"))?;
    }
    // Port 0x61 is emulated, too, so that guests that use it to measure time do not hang.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(pit).map_err(Error::kvm("creating the interval timer"))?;
    Routing::set(vm, &IrqChip::InKernel.pin_routes(), &BTreeMap::new())
        .map_err(Error::kvm("routing interrupts"))?;
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
        // KVM reports the end of interrupts for the routes of so many GSIs.
        args: [PINS.into(), 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    vm.enable_cap(&split).map_err(Error::kvm("splitting interrupt controllers"))?;
    // Destinations have 32 bits, and one with the lower eight all ones is not a broadcast.
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
        assert_eq!(routes.len(), 15 + 23);
        let inputs = |of| {
            let pins = pins_in_the_kernel().filter(|(gsi, ..)| *gsi == of);
            pins.map(|(_, chip, pin)| (chip, pin)).collect::<Vec<_>>()
        };
        assert_eq!(inputs(4), [(KVM_IRQCHIP_PIC_MASTER, 4), (KVM_IRQCHIP_IOAPIC, 4)]);
        assert_eq!(inputs(8), [(KVM_IRQCHIP_PIC_SLAVE, 0), (KVM_IRQCHIP_IOAPIC, 8)]);
        // As in the MADT: the interval timer is the IOAPIC's pin 2.
        assert_eq!(inputs(0), [(KVM_IRQCHIP_PIC_MASTER, 0), (KVM_IRQCHIP_IOAPIC, 2)]);
        assert_eq!(inputs(2), []);
        assert!(IrqChip::Split.pin_routes().is_empty());
    }
}
