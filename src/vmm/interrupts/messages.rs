// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupt messages: who sends one, who remaps it on its way, and how it gets to the in-kernel
//! interrupt controllers.

use std::fmt;
use std::sync::{Arc, Weak};

use kvm_bindings::{kvm_msi, KVM_MSI_VALID_DEVID};
use kvm_ioctls::VmFd;

use crate::trace::{decoded, Trace, TracedInterrupts};
use twostage::spec::pci::Bdf;
use twostage::viommu::routes::MsiSource;
use twostage::viommu::{InterruptRemapper, InterruptSink, MsiMessage};

/// A function as its interrupts show it, traced.
#[derive(Clone)]
pub struct InterruptSource {
    source: MsiSource,
    /// What it is called in a trace.
    name: Arc<str>,
    trace: Option<Arc<Trace>>,
}

impl InterruptSource {
    /// The function `bdf`, called `name`, whose interrupts `remapper` remaps, or nobody.
    pub fn new(
        bdf: Bdf,
        name: &str,
        remapper: Option<Weak<dyn InterruptRemapper>>,
        trace: Option<Arc<Trace>>,
    ) -> Self {
        Self { source: MsiSource::new(bdf, remapper), name: name.into(), trace }
    }

    /// The function, for routes.
    pub fn untraced(&self) -> &MsiSource {
        &self.source
    }

    /// Traces what a route became: it is sent past everybody here.
    pub fn trace_route(&self, gsi: u32, message: MsiMessage) {
        if let Some(trace) = &self.trace {
            let mut args = decoded(message);
            args["gsi"] = gsi.into();
            args["source"] = self.name.to_string().into();
            trace.instant("interrupt", "route", args);
        }
    }

    /// Sends `message` to `sink`. `false` when it is blocked, and the guest is told.
    pub fn send(&self, message: MsiMessage, sink: &dyn InterruptSink) -> bool {
        if let Some(trace) = &self.trace {
            trace.instant("interrupt", &self.name, decoded(message));
        }
        self.source.send(message, sink)
    }
}

impl fmt::Debug for InterruptSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

/// The destination of a machine's remapped messages.
#[derive(Clone)]
pub(crate) struct Messages {
    vm: Arc<VmFd>,
    trace: Option<Arc<Trace>>,
}

impl Messages {
    /// The way to the interrupt controllers of `vm`.
    pub fn new(vm: Arc<VmFd>, trace: Option<Arc<Trace>>) -> Self {
        Self { vm, trace }
    }

    /// The sink for the messages of `source`, which an interrupt controller may need to know.
    pub fn of(&self, source: Bdf) -> Arc<dyn InterruptSink> {
        let messages = Arc::new(KvmMessages { vm: self.vm.clone(), source });
        match self.trace.clone() {
            Some(trace) => Arc::new(TracedInterrupts { inner: messages, trace }),
            None => messages,
        }
    }
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages").finish_non_exhaustive()
    }
}

/// Messages of one function.
struct KvmMessages {
    vm: Arc<VmFd>,
    source: Bdf,
}

impl InterruptSink for KvmMessages {
    fn send_msi(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            flags: KVM_MSI_VALID_DEVID,
            devid: self.source.raw().into(),
            ..kvm_msi::default()
        };
        // A message without a destination is lost, as on a real bus: 0 is no error.
        if let Err(error) = self.vm.signal_msi(msi) {
            log::debug!("message-signalled interrupt {address:#x}/{data:#x}: {error}");
        }
    }
}
