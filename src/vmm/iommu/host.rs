// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who serves the verbs for a machine, and the guest's memory there: a host in this process, for
//! devices in this process, or the kernel, for devices of this machine.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::memory::MachineMemory;
use crate::report::CallReport;
use crate::trace::Trace;
use crate::{Error, Result};
use twostage::iommufd::{
    CountedHost, HostIommu, KernelHost, Protection, UserMemory, Verb, VerbCounters,
};
use twostage::nesting::GuestIoas;
use twostage_emulated::{EmulatedHost, ObjectGraph};

/// The host, its calls counted and traced.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// For calls.
    pub verbs: Arc<dyn HostIommu>,
    /// Of those.
    counters: Arc<VerbCounters>,
    /// The host itself, when it is in this process.
    pub emulated: Option<Arc<EmulatedHost>>,
    /// The guest's memory, for all devices that are the host's.
    pub ioas: Arc<GuestIoas>,
}

impl Host {
    /// A new one in this process, with `memory`.
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub fn emulated(memory: &MachineMemory, trace: Option<&Arc<Trace>>) -> Result<Self> {
        let emulated = EmulatedHost::new();
        Ok(Self { emulated: Some(emulated.clone()), ..Self::counted(emulated, memory, trace)? })
    }

    /// That of the kernel, with `memory`.
    ///
    /// # Errors
    /// As [`Host::emulated`].
    pub fn kernel(
        kernel: Arc<KernelHost>,
        memory: &MachineMemory,
        trace: Option<&Arc<Trace>>,
    ) -> Result<Self> {
        Self::counted(kernel, memory, trace)
    }

    fn counted(
        host: Arc<dyn HostIommu>,
        memory: &MachineMemory,
        trace: Option<&Arc<Trace>>,
    ) -> Result<Self> {
        let counted = CountedHost::new(host, trace.cloned().map(|trace| trace as Arc<_>));
        let counters = counted.counters();
        let verbs: Arc<dyn HostIommu> = Arc::new(counted);
        let ioas = GuestIoas::new(verbs.clone()).map_err(failed("guest memory"))?;
        for region in memory.regions() {
            let whole = UserMemory::whole(region.clone());
            ioas.map(memory.start_of(region), &whole, Protection::READ_WRITE)
                .map_err(failed("guest memory"))?;
        }
        Ok(Self { verbs, counters, emulated: None, ioas })
    }

    /// What was asked of it so far.
    pub fn calls(&self) -> BTreeMap<&'static str, CallReport> {
        let of = |verb: &Verb| CallReport {
            calls: self.counters.calls(*verb),
            failures: self.counters.failures(*verb),
        };
        let calls = Verb::ALL.iter().map(|verb| (verb.name(), of(verb)));
        calls.filter(|(_, report)| report.calls != 0).collect()
    }

    /// Its objects. The kernel does not tell.
    pub fn graph(&self) -> Option<ObjectGraph> {
        self.emulated.as_ref().map(|emulated| emulated.graph())
    }

    /// Lets go of the guest's memory; the objects that are left. The kernel does not tell.
    pub fn close(self) -> Option<ObjectGraph> {
        let Self { emulated, ioas, .. } = self;
        drop(ioas);
        emulated.map(|emulated| emulated.graph())
    }
}

pub(super) fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Iommu(format!("{what}: {error}"))
}
