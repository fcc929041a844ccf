// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host behind a machine's virtual IOMMUs, and the guest memory it has mapped: a host in this
//! process, for emulated devices, or the kernel, for devices of this machine.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::sync::Arc;
use twostage::sync::Mutex;

use crate::config::MachineConfig;
use crate::memory::MachineMemory;
use crate::report::CallReport;
use crate::trace::Trace;
use crate::{Error, Result};
use twostage::iommufd::{
    CountedHost, HostIommu, KernelHost, ObjectId, Protection, UserMemory, Verb, VerbCounters,
};
use twostage::nesting::GuestIoas;
use twostage_emulated::{EmulatedHost, ObjectGraph};

/// Larger graphs are not recorded: that takes too long.
const MAX_NOTED: usize = 1000;

/// The host; its calls are counted and traced.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// Host calls.
    pub verbs: Arc<dyn HostIommu>,
    /// Their counters.
    counters: Arc<VerbCounters>,
    /// The host itself, if it is in this process.
    pub emulated: Option<Arc<EmulatedHost>>,
    /// The host itself, if it is the kernel.
    kernel: Option<Arc<KernelHost>>,
    /// The guest's memory, shared by all devices of the host.
    pub ioas: Arc<GuestIoas>,
    /// The most objects seen at the time a guest disabled translation.
    in_use: Arc<Mutex<Option<ObjectGraph>>>,
}

impl Host {
    /// A new host in this process, with `memory`.
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub fn emulated(memory: &MachineMemory, trace: Option<&Arc<Trace>>) -> Result<Self> {
        let emulated = EmulatedHost::new();
        Ok(Self { emulated: Some(emulated.clone()), ..Self::counted(emulated, memory, trace)? })
    }

    /// The kernel's host, with `memory`, if `config` needs one.
    ///
    /// # Errors
    /// As for [`Host::emulated`]; or the kernel has no IOMMUFD.
    pub fn of_kernel(
        config: &MachineConfig,
        memory: &MachineMemory,
        trace: Option<&Arc<Trace>>,
    ) -> Result<Option<Self>> {
        let Some(path) = config.kernel_host() else { return Ok(None) };
        let kernel = Arc::new(KernelHost::open(&path).map_err(Error::KernelHost)?);
        let host = Self::counted(kernel.clone(), memory, trace)?;
        Ok(Some(Self { kernel: Some(kernel), ..host }))
    }

    /// The file of `dev`, a device of the kernel.
    ///
    /// # Errors
    /// It is not one.
    pub fn device_file(&self, dev: ObjectId) -> Result<Arc<File>> {
        let kernel = self.kernel.as_ref();
        let kernel = kernel.ok_or_else(|| Error::Iommu("the host is not the kernel".into()))?;
        kernel.device_file(dev).map_err(|error| Error::Iommu(error.to_string()))
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
        Ok(Self { verbs, counters, emulated: None, kernel: None, ioas, in_use: Arc::default() })
    }

    /// Host calls so far.
    pub fn calls(&self) -> BTreeMap<&'static str, CallReport> {
        let of = |verb: &Verb| CallReport {
            calls: self.counters.calls(*verb),
            failures: self.counters.failures(*verb),
        };
        let calls = Verb::ALL.iter().map(|verb| (verb.name(), of(verb)));
        calls.filter(|(_, report)| report.calls != 0).collect()
    }

    /// Its objects. Unknown for the kernel.
    pub fn graph(&self) -> Option<ObjectGraph> {
        self.emulated.as_ref().map(|emulated| emulated.graph())
    }

    /// To be called when a guest disables translation, as guests do before they end: afterwards the
    /// objects that they used are gone. The caller holds the IOMMU's registers, so that guests with
    /// very many objects are passed over.
    pub fn noting_objects(&self) -> impl Fn() + Send + Sync {
        let (emulated, in_use) = (self.emulated.clone(), self.in_use.clone());
        move || {
            let few = |emulated: &&Arc<EmulatedHost>| emulated.live_objects() <= MAX_NOTED;
            let Some(emulated) = emulated.as_ref().filter(few) else { return };
            let graph = emulated.graph();
            let mut most = in_use.lock();
            // With several units, the first call sees the objects of all.
            if most.as_ref().is_none_or(|most| most.objects.len() <= graph.objects.len()) {
                *most = Some(graph);
            }
        }
    }

    /// The objects recorded by it, once a guest has disabled translation.
    pub fn objects_in_use(&self) -> Option<ObjectGraph> {
        self.in_use.lock().clone()
    }

    /// Releases the guest's memory; returns the objects that are left. Unknown for the kernel.
    pub fn close(self) -> Option<ObjectGraph> {
        let Self { emulated, ioas, .. } = self;
        drop(ioas);
        emulated.map(|emulated| emulated.graph())
    }
}

pub(super) fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Iommu(format!("{what}: {error}"))
}
