// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts: which interrupt controllers the machine has, and how devices reach them.
//!
//! Either PIC, IOAPIC and LAPICs are in the kernel; or only the LAPICs are, and the IOAPIC is here,
//! where a virtual IOMMU can remap its interrupts. Messages of devices are remapped in both cases.
#![forbid(unsafe_code)]

mod chip;
mod gsi;
mod ioapic;
mod redirection;
mod routes;
mod source;

use std::fmt;
use std::io;
use std::sync::{Arc, Weak};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

pub use chip::{IrqChip, Wanted};
pub use ioapic::Ioapic;
pub use routes::{MsiRoutes, VectorRoute};
pub use source::{FunctionInterrupts, InterruptSource};

use self::gsi::GsiTable;
use self::ioapic::PinOutput;
use super::report::InterruptReport;
use super::trace::Trace;
use super::{Error, Result};
use crate::spec::pci::Bdf;
use crate::viommu::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};

/// Where the IOAPIC's registers are.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Length of the IOAPIC's registers, in bytes.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// The IOAPIC's identifier after reset, as the MADT tells it.
pub const IOAPIC_ID: u8 = 0;
/// Who the IOAPIC is to a virtual IOMMU, as the DMAR table tells it: no function on the bus is.
pub const IOAPIC_BDF: Bdf = Bdf::from_raw(0xfff8);

/// Messages to the LAPICs in the kernel.
#[derive(Debug)]
pub(super) struct KvmMessages(pub Arc<VmFd>);

impl InterruptSink for KvmMessages {
    fn send_msi(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        // A message to no LAPIC is lost, as it is on a real bus: 0 is no error.
        if let Err(error) = self.0.signal_msi(msi) {
            log::debug!("message-signalled interrupt {address:#x}/{data:#x}: {error}");
        }
    }
}

/// The interrupts of one machine.
pub(super) struct Interrupts {
    vm: Arc<VmFd>,
    chip: IrqChip,
    table: Arc<GsiTable>,
    ioapic: Option<Arc<Ioapic>>,
    routes: Arc<MsiRoutes>,
    /// Where messages go once they are remapped.
    messages: Arc<dyn InterruptSink>,
    trace: Option<Arc<Trace>>,
}

impl Interrupts {
    /// Interrupts of `vm`, which has `chip`. What is sent goes to `messages` in the end; `remapper`
    /// remaps those of an IOAPIC that is here.
    pub fn new(
        vm: Arc<VmFd>,
        chip: IrqChip,
        messages: Arc<dyn InterruptSink>,
        remapper: Option<Weak<dyn InterruptRemapper>>,
        trace: Option<Arc<Trace>>,
    ) -> Self {
        let table = Arc::new(GsiTable::new(vm.clone(), chip));
        let routes = MsiRoutes::new(table.clone(), vm.clone(), messages.clone());
        let ioapic = (chip == IrqChip::Split).then(|| {
            let source = InterruptSource::new(IOAPIC_BDF, remapper, trace.clone());
            let table = table.clone();
            let output = IoapicOutput { table, source, messages: messages.clone() };
            Ioapic::new(IOAPIC_ID, Box::new(output))
        });
        Self { vm, chip, table, ioapic, routes, messages, trace }
    }

    /// Where the interrupt controllers are.
    pub fn chip(&self) -> IrqChip {
        self.chip
    }

    /// What was done so far.
    pub fn report(&self) -> InterruptReport {
        InterruptReport { routed: self.routes.triggered(), route_updates: self.table.updates() }
    }

    /// The IOAPIC, if it is not in the kernel.
    pub fn ioapic(&self) -> Option<Arc<Ioapic>> {
        self.ioapic.clone()
    }

    /// Who is to be told when interrupts are remapped otherwise than before.
    pub fn listeners(&self) -> Vec<Weak<dyn InterruptListener>> {
        let routes: Arc<dyn InterruptListener> = self.routes.clone();
        let ioapic = self.ioapic.iter().map(|ioapic| ioapic.clone() as Arc<dyn InterruptListener>);
        ioapic.chain([routes]).map(|listener| Arc::downgrade(&listener)).collect()
    }

    /// The interrupts of the function at `bdf`, which `remapper` remaps, or nobody.
    pub fn of_function(
        &self,
        bdf: Bdf,
        remapper: Option<Weak<dyn InterruptRemapper>>,
    ) -> FunctionInterrupts {
        let source = InterruptSource::new(bdf, remapper, self.trace.clone());
        FunctionInterrupts::new(source, self.messages.clone(), self.routes.clone())
    }

    /// The edge-triggered interrupt line `gsi`.
    ///
    /// # Errors
    /// KVM cannot wire it.
    pub fn edge_line(&self, gsi: u32) -> Result<EdgeLine> {
        if let Some(ioapic) = &self.ioapic {
            return Ok(EdgeLine::Pin(ioapic.clone(), gsi));
        }
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        self.vm.register_irqfd(&event, gsi).map_err(Error::kvm("wiring an interrupt"))?;
        Ok(EdgeLine::Irqfd(event))
    }

    /// Drives the level-triggered interrupt line `gsi`.
    pub fn set_line(&self, gsi: u32, level: bool) {
        match &self.ioapic {
            Some(ioapic) => ioapic.set_line(gsi, level),
            None => {
                if let Err(error) = self.vm.set_irq_line(gsi, level) {
                    log::error!("interrupt line {gsi}: {error}");
                }
            }
        }
    }
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupts")
            .field("chip", &self.chip)
            .field("ioapic", &self.ioapic)
            .field("routes", &self.routes)
            .finish_non_exhaustive()
    }
}

/// An edge-triggered interrupt line.
#[derive(Debug)]
pub(super) enum EdgeLine {
    /// Of the interrupt controllers in the kernel.
    Irqfd(EventFd),
    /// Of the IOAPIC here: a pin.
    Pin(Arc<Ioapic>, u32),
}

impl Trigger for EdgeLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self {
            Self::Irqfd(event) => event.write(1),
            Self::Pin(ioapic, pin) => {
                ioapic.pulse(*pin);
                Ok(())
            }
        }
    }
}

/// The way from the IOAPIC here to the LAPICs in the kernel.
struct IoapicOutput {
    table: Arc<GsiTable>,
    source: InterruptSource,
    messages: Arc<dyn InterruptSink>,
}

impl PinOutput for IoapicOutput {
    /// KVM leaves the guest at the end of an interrupt whose vector is that of a level-triggered
    /// message among the first GSIs.
    fn watch(&self, messages: &[Option<MsiMessage>]) {
        let translate = |message: &Option<MsiMessage>| {
            message.and_then(|message| self.source.translate(message))
        };
        if let Err(error) = self.table.update((0..).zip(messages.iter().map(translate))) {
            log::error!("ends of interrupts will be missed: {error}");
        }
    }

    fn send(&self, message: MsiMessage) -> bool {
        self.source.send(message, &*self.messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::pci::InterruptVector;
    use kvm_ioctls::Kvm;

    #[test]
    fn either_kind_takes_messages_routes_and_lines() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("no /dev/kvm: not tested");
            return;
        };
        for wanted in [Wanted::InKernel, Wanted::Split, Wanted::OnlySplit] {
            let vm = Arc::new(kvm.create_vm().unwrap());
            let chip = IrqChip::create(&vm, wanted).unwrap();
            let split = chip == IrqChip::Split;
            assert_eq!(split, wanted != Wanted::InKernel);
            let _vcpu = vm.create_vcpu(0).unwrap();
            let messages = Arc::new(KvmMessages(vm.clone()));
            let interrupts = Interrupts::new(vm, chip, messages, None, None);
            assert_eq!(interrupts.ioapic().is_some(), split);
            assert_eq!(interrupts.listeners().len(), 1 + usize::from(split));
            interrupts.edge_line(4).unwrap().trigger().unwrap();
            interrupts.set_line(10, true);
            interrupts.set_line(10, false);
            let function = interrupts.of_function(Bdf::from_raw(8), None);
            function.send_msi(0xfee0_0000, 0x41);
            // Nobody answers to this address; it is lost.
            function.send_msi(0xfee0_7000, 0x41);
            let vector = function.vector().unwrap();
            vector.update(Some(MsiMessage { address: 0xfee0_0000, data: 0x42 }));
            vector.trigger();
            assert_eq!(interrupts.report(), InterruptReport { routed: 1, route_updates: 1 });
        }
    }
}
