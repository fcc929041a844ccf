// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt lines asserted by an assigned device's eventfd: entirely in the kernel, if the
//! interrupt controllers are there.

use std::fmt;
use std::sync::Arc;

use event_manager::MutEventSubscriber;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::pci::EventLine;
use crate::{Error, Result};
use twostage::warn_limited;

/// A line, and its event loop subscriber, if it needs one.
pub(crate) struct DeviceLine {
    pub line: Box<dyn EventLine>,
    pub subscriber: Option<Box<dyn MutEventSubscriber>>,
}

/// The two eventfds of a line.
pub(crate) struct LineEvents {
    /// Asserts the line.
    pub assert: EventFd,
    /// Written when an interrupt ends.
    pub end: EventFd,
}

impl LineEvents {
    /// New ones.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new() -> Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"));
        Ok(Self { assert: event()?, end: event()? })
    }
}

/// The input `gsi` of an in-kernel interrupt controller: KVM asserts it when one eventfd is
/// written, and deasserts it and writes the other at the end of the interrupt.
pub(crate) struct ResampledLine {
    vm: Arc<VmFd>,
    gsi: u32,
    events: LineEvents,
}

impl ResampledLine {
    /// The input `gsi` of `vm`.
    ///
    /// # Errors
    /// KVM cannot wire it.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Result<Self> {
        let line = Self { vm, gsi, events: LineEvents::new()? };
        line.tie().map_err(Error::kvm("wiring an interrupt line"))?;
        Ok(line)
    }

    fn tie(&self) -> std::result::Result<(), kvm_ioctls::Error> {
        let LineEvents { assert, end } = &self.events;
        self.vm.register_irqfd_with_resample(assert, end, self.gsi)
    }

    fn untie(&self) -> std::result::Result<(), kvm_ioctls::Error> {
        self.vm.unregister_irqfd(&self.events.assert, self.gsi)
    }
}

impl EventLine for ResampledLine {
    fn assert_event(&self) -> &EventFd {
        &self.events.assert
    }

    fn end_event(&self) -> &EventFd {
        &self.events.end
    }

    /// KVM deasserts it when it is removed.
    fn release(&self) {
        if let Err(error) = self.untie().and_then(|()| self.tie()) {
            warn_limited!("interrupt line {}: {error}", self.gsi);
        }
    }
}

impl Drop for ResampledLine {
    fn drop(&mut self) {
        if let Err(error) = self.untie() {
            log::error!("interrupt line {}: {error}", self.gsi);
        }
    }
}

impl fmt::Debug for ResampledLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResampledLine").field("gsi", &self.gsi).finish_non_exhaustive()
    }
}
