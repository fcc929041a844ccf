// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The interrupts of one function: sent directly, or by routes.

use std::fmt;
use std::sync::Arc;

use super::routes::{MsiRoutes, VectorRoute, Writer};
use super::source::InterruptSource;
use crate::Result;
use twostage::viommu::{InterruptSink, MsiMessage};

/// The interrupts of one function. A message sent through its [`InterruptSink`] is remapped each
/// time; frequent ones have a [`VectorRoute`].
#[derive(Clone)]
pub struct FunctionInterrupts {
    source: InterruptSource,
    messages: Arc<dyn InterruptSink>,
    routes: Arc<MsiRoutes>,
}

impl FunctionInterrupts {
    pub(super) fn new(
        source: InterruptSource,
        messages: Arc<dyn InterruptSink>,
        routes: Arc<MsiRoutes>,
    ) -> Self {
        Self { source, messages, routes }
    }

    /// A route for one vector of the function.
    ///
    /// # Errors
    /// KVM has no more GSIs, or the process no more file descriptors.
    pub fn vector(&self) -> Result<Arc<VectorRoute>> {
        self.routes.allocate(self.source.clone(), self.messages.clone(), Writer::Here)
    }

    /// The same for a vector that the device triggers itself, by writing the route's eventfd.
    ///
    /// # Errors
    /// As [`FunctionInterrupts::vector`].
    pub fn device_vector(&self) -> Result<Arc<VectorRoute>> {
        self.routes.allocate(self.source.clone(), self.messages.clone(), Writer::Device)
    }
}

impl InterruptSink for FunctionInterrupts {
    fn send_msi(&self, address: u64, data: u32) {
        self.source.send(MsiMessage { address, data }, &*self.messages);
    }
}

impl fmt::Debug for FunctionInterrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FunctionInterrupts").field(&self.source).finish()
    }
}
