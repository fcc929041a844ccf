// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who sends an interrupt, and who remaps it on its way.

use std::fmt;
use std::sync::{Arc, Weak};

use super::SentMessage;
use crate::trace::{decoded, Trace};
use twostage::spec::pci::Bdf;
use twostage::viommu::{InterruptRemapper, InterruptSink, MsiMessage};

/// A function as its interrupts show it.
#[derive(Clone)]
pub struct InterruptSource {
    bdf: Bdf,
    /// What it is called in a trace.
    name: Arc<str>,
    /// The virtual IOMMU it is behind, if that remaps interrupts. Its registers keep it alive; when
    /// they are gone, so is the guest.
    remapper: Option<Weak<dyn InterruptRemapper>>,
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
        Self { bdf, name: name.into(), remapper, trace }
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

    /// What `message` becomes, for whoever keeps it until the next change; `None` when it would be
    /// blocked, or must not be kept.
    pub fn translate(&self, message: MsiMessage) -> Option<MsiMessage> {
        match &self.remapper {
            None => Some(message),
            Some(remapper) => remapper.upgrade()?.translate(self.bdf, message),
        }
    }

    /// As [`Self::translate`], with who sends it.
    pub(crate) fn sent(&self, message: MsiMessage) -> Option<SentMessage> {
        self.translate(message).map(|message| SentMessage { source: self.bdf, message })
    }

    /// Sends `message` to `sink`. `false` when it is blocked, and the guest is told.
    pub fn send(&self, message: MsiMessage, sink: &dyn InterruptSink) -> bool {
        if let Some(trace) = &self.trace {
            trace.instant("interrupt", &self.name, decoded(message));
        }
        match &self.remapper {
            None => {
                sink.send_msi(message.address, message.data);
                true
            }
            Some(remapper) => remapper
                .upgrade()
                .is_some_and(|remapper| remapper.send_remapped(self.bdf, message, sink)),
        }
    }
}

impl fmt::Debug for InterruptSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.bdf, if self.remapper.is_some() { "remapped" } else { "direct" })
    }
}
