// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The inputs of the GIC: its shared peripheral interrupts.

use std::io;
use std::sync::{Arc, Weak};

use kvm_bindings::{KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI};
use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::arch::layout::FIRST_SPI;
use crate::interrupts::{DeviceLine, GsiTable, ResampledLine, Ways};
use crate::pci::IntxPin;
use crate::{Error, Result};
use twostage::viommu::{InterruptListener, InterruptRemapper};
use twostage::warn_limited;

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
        _table: &Arc<GsiTable>,
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
