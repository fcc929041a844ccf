// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts: which interrupt controller the machine has, and how devices reach it.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{
    kvm_enable_cap, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_msi, kvm_pic_state, kvm_pit_config,
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::{Error, Result};
use crate::viommu::InterruptSink;

/// Where the interrupt controllers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IrqChip {
    /// PIC, IOAPIC and LAPICs in the kernel.
    InKernel,
    /// Only LAPICs in the kernel, and no IOAPIC: message-signalled interrupts alone.
    Split,
}

impl fmt::Display for IrqChip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InKernel => "in-kernel (PIC, IOAPIC, LAPIC)",
            Self::Split => "split (LAPIC in the kernel, no IOAPIC: INTx is not wired)",
        })
    }
}

/// The pair of 8259s, and those bits of ELCR (edge or level) that can be set in each.
const PICS: [(u32, u8); 2] = [(KVM_IRQCHIP_PIC_MASTER, 0xf8), (KVM_IRQCHIP_PIC_SLAVE, 0xde)];

/// The interrupt controllers of one machine.
#[derive(Debug)]
pub(super) struct Interrupts {
    vm: Arc<VmFd>,
    chip: IrqChip,
}

impl Interrupts {
    /// Gives `vm` the interrupt controllers that this KVM has, in the kernel if it can be. Before
    /// any vCPU.
    pub fn new(vm: Arc<VmFd>) -> Result<Self> {
        Self::in_kernel(vm.clone()).or_else(|error| {
            log::warn!("{error}; trying split ones, where INTx is not wired");
            Self::split(vm)
        })
    }

    fn in_kernel(vm: Arc<VmFd>) -> Result<Self> {
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
        Ok(Self { vm, chip: IrqChip::InKernel })
    }

    fn split(vm: Arc<VmFd>) -> Result<Self> {
        let split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            // There is no IOAPIC whose pins would need routes.
            args: [0; 4],
            ..kvm_enable_cap::default()
        };
        vm.enable_cap(&split).map_err(Error::kvm("splitting interrupt controllers"))?;
        Ok(Self { vm, chip: IrqChip::Split })
    }

    /// Where the interrupt controllers are.
    pub fn chip(&self) -> IrqChip {
        self.chip
    }

    /// Raises the edge-triggered interrupt `gsi` whenever `event` is written.
    pub fn wire_edge(&self, event: &EventFd, gsi: u32) -> Result<()> {
        match self.chip {
            IrqChip::InKernel => {
                self.vm.register_irqfd(event, gsi).map_err(Error::kvm("wiring an interrupt"))
            }
            IrqChip::Split => Ok(()),
        }
    }

    /// Drives the level-triggered interrupt line `gsi`.
    pub fn set_line(&self, gsi: u32, level: bool) {
        if self.chip == IrqChip::InKernel {
            if let Err(error) = self.vm.set_irq_line(gsi, level) {
                log::error!("interrupt line {gsi}: {error}");
            }
        }
    }
}

impl InterruptSink for Interrupts {
    fn send_msi(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        // A message to no LAPIC is lost, as it is on a real bus: 0 is no error.
        if let Err(error) = self.vm.signal_msi(msi) {
            log::debug!("message-signalled interrupt {address:#x}/{data:#x}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;

    #[test]
    fn either_kind_takes_messages_and_lines() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("no /dev/kvm: not tested");
            return;
        };
        let vm = || Arc::new(kvm.create_vm().unwrap());
        let event = EventFd::new(0).unwrap();
        for interrupts in [Interrupts::in_kernel(vm()), Interrupts::split(vm())] {
            let interrupts = interrupts.unwrap();
            let _vcpu = interrupts.vm.create_vcpu(0).unwrap();
            interrupts.wire_edge(&event, 4).unwrap();
            interrupts.set_line(10, true);
            interrupts.set_line(10, false);
            interrupts.send_msi(0xfee0_0000, 0x41);
            // Nobody answers to this address; it is lost.
            interrupts.send_msi(0xfee0_7000, 0x41);
        }
        assert_eq!(Interrupts::new(vm()).unwrap().chip(), IrqChip::InKernel);
    }
}
