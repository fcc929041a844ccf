// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host that serves the verbs for a machine, with the guest's memory mapped: an emulated one in
//! this process, for devices in this process, or the kernel, for physical devices.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::sync::Arc;
use twostage::sync::Mutex;

use crate::config::MachineConfig;
use crate::memory::MachineMemory;
use crate::report::{CallReport, HostReport};
use crate::trace::Trace;
use crate::{Error, Result};
use twostage::iommufd::{
    CountedHost, HostIommu, KernelHost, ObjectId, Protection, UserMemory, Verb, VerbCounters,
};
use twostage::nesting::GuestIoas;
use twostage_emulated::{EmulatedHost, ObjectGraph};

/// With more objects than this none are noted, because collecting them takes too long.
const MAX_NOTED: usize = 1000;

/// The host, its calls counted and traced.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// What calls go through.
    pub verbs: Arc<dyn HostIommu>,
    /// The counters of these calls.
    counters: Arc<VerbCounters>,
    /// The host itself, when it is in this process.
    pub emulated: Option<Arc<EmulatedHost>>,
    /// The host itself, when it is the kernel.
    kernel: Option<Arc<KernelHost>>,
    /// The guest's memory, for all devices of this host.
    pub ioas: Arc<GuestIoas>,
    /// The most objects that there were when a guest switched translation off.
    in_use: Arc<Mutex<Option<ObjectGraph>>>,
}

impl Host {
    /// A new host in this process, with `memory` mapped.
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub fn emulated(memory: &MachineMemory, trace: Option<&Arc<Trace>>) -> Result<Self> {
        let emulated = EmulatedHost::new();
        Ok(Self { emulated: Some(emulated.clone()), ..Self::counted(emulated, memory, trace)? })
    }

    /// The kernel's host, with `memory` mapped, if `config` needs it.
    ///
    /// # Errors
    /// As [`Host::emulated`], or the kernel's cannot be opened.
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

    /// The file of `dev`, a device of the kernel's host.
    ///
    /// # Errors
    /// This host is not the kernel's, or has no such device.
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

    /// The calls so far.
    fn calls(&self) -> BTreeMap<&'static str, CallReport> {
        let of = |verb: &Verb| CallReport {
            calls: self.counters.calls(*verb),
            failures: self.counters.failures(*verb),
        };
        let calls = Verb::ALL.iter().map(|verb| (verb.name(), of(verb)));
        calls.filter(|(_, report)| report.calls != 0).collect()
    }

    /// The host's objects; `None` for the kernel, which does not tell.
    pub fn graph(&self) -> Option<ObjectGraph> {
        self.emulated.as_ref().map(|emulated| emulated.graph())
    }

    /// Returns what to call when a guest disables translation, as guests do before they end:
    /// afterwards the objects that they used are gone. The call happens with the IOMMU's registers
    /// locked, so nothing is noted when there are very many objects.
    pub fn noting_objects(&self) -> impl Fn() + Send + Sync {
        let (emulated, in_use) = (self.emulated.clone(), self.in_use.clone());
        move || {
            let few = |emulated: &&Arc<EmulatedHost>| emulated.live_objects() <= MAX_NOTED;
            let Some(emulated) = emulated.as_ref().filter(few) else { return };
            let graph = emulated.graph();
            let mut most = in_use.lock();
            // With several units, the first to be disabled shows the objects of all.
            if most.as_ref().is_none_or(|most| most.objects.len() <= graph.objects.len()) {
                *most = Some(graph);
            }
        }
    }

    /// The calls so far, and the objects, in use and now.
    pub fn report(&self) -> HostReport {
        HostReport {
            calls: self.calls(),
            at_start: None,
            in_use: self.in_use.lock().clone(),
            graph: self.graph(),
            left: None,
            release_unfinished: false,
        }
    }

    /// Lets go of the guest's memory. Returns the objects that are left; `None` for the kernel,
    /// which does not tell.
    pub fn close(self) -> Option<ObjectGraph> {
        let Self { emulated, ioas, .. } = self;
        drop(ioas);
        emulated.map(|emulated| emulated.graph())
    }
}

pub(super) fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Iommu(format!("{what}: {error}"))
}
