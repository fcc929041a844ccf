// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC's interrupt controllers and their inputs.
//!
//! Either PIC, IOAPIC and LAPICs are in the kernel; or only the LAPICs are, and the IOAPIC is here,
//! where a virtual IOMMU can remap its interrupts. Devices' MSIs are remapped in both cases.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Weak};

use kvm_bindings::{
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_pic_state, kvm_pit_config,
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_IRQCHIP, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
};
use kvm_ioctls::{Cap, VmFd};
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::ioapic::{EndListener, Ioapic, OwnedPinLine, PinLine, PinOutput, WatchedPinLine};
use crate::arch::layout::{IOAPIC_BDF, IOAPIC_ID, PINS, TIMER_ISA_IRQ, TIMER_PIN};
use crate::config::MachineConfig;
use crate::interrupts::device_line::LineEvents;
use crate::interrupts::{set_routing, DeviceLine, InterruptSource, ResampledLine, Ways};
use crate::pci::IntxPin;
use crate::{Error, Result};
use twostage::viommu::routes::{RouteId, RouteTable};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};
use twostage::warn_limited;

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
enum Wanted {
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

    fn create(vm: &VmFd, wanted: Wanted) -> Result<Self> {
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
    set_routing(vm, &IrqChip::InKernel.pin_routes(), &BTreeMap::new())
        .map_err(Error::os("KVM_SET_GSI_ROUTING"))?;
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
        table: &Arc<RouteTable>,
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
    table: Arc<RouteTable>,
    source: InterruptSource,
    messages: Arc<dyn InterruptSink>,
}

impl PinOutput for IoapicOutput {
    /// KVM exits at the end of an interrupt whose vector is that of a level-triggered message among
    /// the first GSIs.
    fn watch(&self, messages: &[Option<MsiMessage>]) {
        let source = self.source.untraced();
        let routes = messages.iter().map(|message| message.and_then(|it| source.route(it)));
        if let Err(error) = self.table.update((0..).map(RouteId).zip(routes)) {
            warn_limited!("ends of interrupts will be missed: {error}");
        }
    }

    fn send(&self, message: MsiMessage) -> bool {
        self.source.send(message, &*self.messages)
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::interrupts::{Interrupts, Messages};
    use crate::pci::InterruptVector;
    use crate::report::InterruptReport;
    use twostage::skips::not_tested;
    use twostage::spec::pci::Bdf;

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

    #[test]
    fn either_kind_takes_messages_routes_and_lines() {
        let Ok(kvm) = Kvm::new() else {
            not_tested("no /dev/kvm");
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
