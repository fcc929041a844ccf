// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who serves the verbs behind the virtual IOMMUs of a machine: a host in this process, for devices
//! in this process, or the kernel, for devices of this machine.

use std::sync::Arc;

use crate::trace::Trace;
use twostage::iommufd::{CountedHost, HostIommu, KernelHost, VerbCounters};
use twostage_emulated::{EmulatedHost, ObjectGraph};

/// The host, its calls counted and traced.
#[derive(Clone)]
pub(crate) struct Host {
    /// For calls.
    pub verbs: Arc<dyn HostIommu>,
    /// Of those.
    pub counters: Arc<VerbCounters>,
    /// The host itself, when it is in this process.
    pub emulated: Option<Arc<EmulatedHost>>,
}

impl Host {
    /// A new one in this process.
    pub fn emulated(trace: Option<&Arc<Trace>>) -> Self {
        let emulated = EmulatedHost::new();
        Self { emulated: Some(emulated.clone()), ..Self::counted(emulated, trace) }
    }

    /// That of the kernel.
    pub fn kernel(kernel: Arc<KernelHost>, trace: Option<&Arc<Trace>>) -> Self {
        Self::counted(kernel, trace)
    }

    fn counted(host: Arc<dyn HostIommu>, trace: Option<&Arc<Trace>>) -> Self {
        let counted = CountedHost::new(host, trace.cloned().map(|trace| trace as Arc<_>));
        Self { counters: counted.counters(), verbs: Arc::new(counted), emulated: None }
    }

    /// Its objects. The kernel does not tell.
    pub fn graph(&self) -> Option<ObjectGraph> {
        self.emulated.as_ref().map(|emulated| emulated.graph())
    }
}
