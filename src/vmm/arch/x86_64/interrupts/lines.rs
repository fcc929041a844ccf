// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The inputs of a PC's interrupt controllers.

use std::io;
use std::sync::{Arc, Weak};

use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::ioapic::{EndListener, Ioapic, PinOutput};
use super::pin_line::{OwnedPinLine, PinLine, WatchedPinLine};
use super::IrqChip;
use crate::arch::layout::{IOAPIC_BDF, IOAPIC_ID};
use crate::interrupts::device_line::LineEvents;
use crate::interrupts::{DeviceLine, GsiTable, InterruptSource, ResampledLine, Ways};
use crate::pci::IntxPin;
use crate::{Error, Result};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};
use twostage::warn_limited;

/// The inputs: of the in-kernel interrupt controllers, or of the IOAPIC here.
#[derive(Debug)]
pub(crate) struct Lines {
    vm: Arc<VmFd>,
    ioapic: Option<Arc<Ioapic>>,
}

impl Lines {
    /// The inputs of the controllers in `ways`; `table` is KVM's routing. `remapper` remaps the
    /// messages of an IOAPIC here.
    pub fn new(
        ways: &Ways,
        table: &Arc<GsiTable>,
        remapper: Option<Weak<dyn InterruptRemapper>>,
    ) -> Self {
        let ioapic = (ways.chip == IrqChip::Split).then(|| {
            let source = InterruptSource::new(IOAPIC_BDF, "IOAPIC", remapper, ways.trace.clone());
            let messages = ways.messages.of(IOAPIC_BDF);
            Ioapic::new(
                IOAPIC_ID,
                Box::new(IoapicOutput { table: table.clone(), source, messages }),
            )
        });
        Self { vm: ways.vm.clone(), ioapic }
    }

    /// The IOAPIC, if it is not in the kernel.
    pub fn ioapic(&self) -> Option<Arc<Ioapic>> {
        self.ioapic.clone()
    }

    /// The listener for changes of interrupt remapping.
    pub fn listener(&self) -> Option<Weak<dyn InterruptListener>> {
        let listener = |ioapic: &Arc<Ioapic>| {
            let listener: Arc<dyn InterruptListener> = ioapic.clone();
            Arc::downgrade(&listener)
        };
        self.ioapic.as_ref().map(listener)
    }

    /// The edge-triggered input `gsi`.
    ///
    /// # Errors
    /// KVM cannot wire it.
    pub fn edge(&self, gsi: u32) -> Result<EdgeLine> {
        if let Some(ioapic) = &self.ioapic {
            return Ok(EdgeLine::Pin(ioapic.clone(), gsi));
        }
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        self.vm.register_irqfd(&event, gsi).map_err(Error::kvm("wiring an interrupt"))?;
        Ok(EdgeLine::Irqfd(event))
    }

    /// The line of `pin`, asserted by an assigned device. With in-kernel interrupt controllers, it
    /// is only the IOAPIC's input: a guest that uses the PIC gets no INTx of such a device.
    ///
    /// # Errors
    /// KVM cannot wire it.
    pub fn device_line(&self, pin: IntxPin) -> Result<DeviceLine> {
        let gsi = pin.gsis().last().copied();
        let gsi = gsi.ok_or_else(|| Error::Interrupts("a pin leads nowhere".into()))?;
        let Some(ioapic) = &self.ioapic else {
            let line = Box::new(ResampledLine::new(self.vm.clone(), gsi)?);
            return Ok(DeviceLine { line, subscriber: None });
        };
        let line = PinLine::new(pin, LineEvents::new()?);
        let listener: Arc<dyn EndListener> = line.clone();
        ioapic.add_end_listener(gsi, Arc::downgrade(&listener));
        let watched = Box::new(WatchedPinLine(line.clone()));
        Ok(DeviceLine { line: Box::new(OwnedPinLine(line)), subscriber: Some(watched) })
    }

    /// Drives the level-triggered input `gsi`.
    pub fn set(&self, gsi: u32, level: bool) {
        match &self.ioapic {
            Some(ioapic) => ioapic.set_line(gsi, level),
            None => {
                if let Err(error) = self.vm.set_irq_line(gsi, level) {
                    warn_limited!("interrupt line {gsi}: {error}");
                }
            }
        }
    }
}

/// An edge-triggered interrupt line.
#[derive(Debug)]
pub(crate) enum EdgeLine {
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

/// Connects the IOAPIC here to the LAPICs in the kernel.
struct IoapicOutput {
    table: Arc<GsiTable>,
    source: InterruptSource,
    messages: Arc<dyn InterruptSink>,
}

impl PinOutput for IoapicOutput {
    /// KVM exits at the end of an interrupt whose vector is that of a level-triggered message among
    /// the first GSIs.
    fn watch(&self, messages: &[Option<MsiMessage>]) {
        let sent =
            |message: &Option<MsiMessage>| message.and_then(|message| self.source.sent(message));
        if let Err(error) = self.table.update((0..).zip(messages.iter().map(sent))) {
            warn_limited!("ends of interrupts will be missed: {error}");
        }
    }

    fn send(&self, message: MsiMessage) -> bool {
        self.source.send(message, &*self.messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::interrupts::chip::Wanted;
    use crate::interrupts::{Interrupts, Messages, Ways};
    use crate::pci::InterruptVector;
    use crate::report::InterruptReport;
    use kvm_ioctls::Kvm;
    use twostage::spec::pci::Bdf;
    use twostage::viommu::{InterruptSink, MsiMessage};

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
            let messages = Messages::new(vm.clone(), None);
            let interrupts = Interrupts::new(Ways { vm, chip, messages, trace: None }, None);
            assert_eq!(interrupts.lines().ioapic().is_some(), split);
            assert_eq!(interrupts.listeners().len(), 1 + usize::from(split));
            interrupts.edge_line(4).unwrap().trigger().unwrap();
            interrupts.set_line(10, true);
            interrupts.set_line(10, false);
            let function = interrupts.of_function(Bdf::from_raw(8), None);
            function.send_msi(0xfee0_0000, 0x41);
            // No LAPIC has this destination; the message is lost.
            function.send_msi(0xfee0_7000, 0x41);
            let vector = function.vector().unwrap();
            vector.update(Some(MsiMessage { address: 0xfee0_0000, data: 0x42 }));
            vector.trigger();
            assert_eq!(interrupts.report(), InterruptReport { routed: 1, route_updates: 1 });
        }
    }
}
