// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hosts that serve the verbs for a machine, each with the guest's memory mapped: an emulated
//! one in this process, for devices in this process, and the kernel, for physical devices. Some of
//! these are behind no virtual IOMMU.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use twostage::sync::Mutex;

use crate::config::MachineConfig;
use crate::memory::MachineMemory;
use crate::process::jail::JailedThreads;
use crate::report::{CallReport, HostReport};
use crate::trace::{EmulatedCalls, Trace};
use crate::vfio::{VfioError, VfioProblem};
use crate::{Error, Result};
use twostage::iommufd::{
    CountedHost, HostIommu, KernelHost, ObjectId, Protection, UserMemory, Verb, VerbCounters,
    VerbObserver,
};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage_emulated::{EmulatedHost, ObjectGraph};
use vfio_ioctls::VfioIommufd;

/// With more objects than this none are noted, because collecting them takes too long.
const MAX_NOTED: usize = 1000;

/// A bound device.
#[derive(Debug, Clone)]
pub(crate) struct BoundDevice {
    /// Its BDF in the guest.
    pub bdf: Bdf,
    /// Its object in its host.
    pub dev: ObjectId,
    pub host: Host,
}

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
        Self::in_this_process(memory, trace.cloned().map(|trace| trace as Arc<_>))
    }

    /// The same, for a machine that has the kernel's as well.
    ///
    /// # Errors
    /// As [`Host::emulated`].
    pub fn beside(memory: &MachineMemory, trace: Option<&Arc<Trace>>) -> Result<Self> {
        let calls = |trace| Arc::new(EmulatedCalls(trace)) as Arc<_>;
        Self::in_this_process(memory, trace.cloned().map(calls))
    }

    fn in_this_process(
        memory: &MachineMemory,
        calls: Option<Arc<dyn VerbObserver>>,
    ) -> Result<Self> {
        let emulated = EmulatedHost::new();
        Ok(Self { emulated: Some(emulated.clone()), ..Self::counted(emulated, memory, calls)? })
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
        let kernel = KernelHost::open(&path).map_err(Error::KernelHost)?;
        let kernel = Arc::new(kernel.with_threads(Arc::new(JailedThreads)));
        let calls = trace.cloned().map(|trace| trace as Arc<_>);
        let host = Self::counted(kernel.clone(), memory, calls)?;
        Ok(Some(Self { kernel: Some(kernel), ..host }))
    }

    /// Whether it is the kernel's.
    pub fn is_kernel(&self) -> bool {
        self.emulated.is_none()
    }

    /// The file of `dev`, a device of the kernel's host.
    ///
    /// # Errors
    /// This host is not the kernel's, or has no such device.
    pub fn device_file(&self, dev: ObjectId) -> Result<Arc<File>> {
        self.kernel()?.device_file(dev).map_err(|error| Error::Iommu(error.to_string()))
    }

    /// What `vfio-ioctls` needs for the devices of the kernel's host: its iommufd, and an IOAS that
    /// nothing is attached to.
    ///
    /// # Errors
    /// This host is not the kernel's, or the kernel gives no IOAS.
    pub fn vfio_iommufd(&self) -> Result<Arc<VfioIommufd>> {
        let iommufd = VfioIommufd::new(self.kernel()?.iommufd().clone(), None, None);
        iommufd.map(Arc::new).map_err(failed("the iommufd of assigned devices"))
    }

    fn kernel(&self) -> Result<&Arc<KernelHost>> {
        self.kernel.as_ref().ok_or_else(|| Error::Iommu("the host is not the kernel".into()))
    }

    fn counted(
        host: Arc<dyn HostIommu>,
        memory: &MachineMemory,
        calls: Option<Arc<dyn VerbObserver>>,
    ) -> Result<Self> {
        let counted = CountedHost::new(host, calls);
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

/// Physical devices that the guest has without a virtual IOMMU: each reaches all of the guest's
/// memory, by guest-physical addresses, and nothing else. Dropping it detaches and unbinds them.
pub(crate) struct DirectDevices {
    host: Host,
    pub devices: Vec<BoundDevice>,
}

impl DirectDevices {
    /// Binds `devices`, named by their paths, and attaches them to the guest's memory in `host`.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(host: Host, devices: &[(Bdf, PathBuf)]) -> Result<Self> {
        let mut direct = Self { host, devices: Vec::new() };
        for (bdf, path) in devices {
            let host = direct.host.clone();
            let dev = bind(&*host.verbs, path)?;
            direct.devices.push(BoundDevice { bdf: *bdf, dev, host: host.clone() });
            let name = path.display().to_string();
            let refused = |error| VfioError::new(&name, VfioProblem::Bind(error));
            host.verbs.device_attach(dev, None, host.ioas.id()).map_err(refused)?;
        }
        Ok(direct)
    }

    /// The calls of the host so far, and its objects.
    pub fn host_report(&self) -> HostReport {
        self.host.report()
    }
}

impl Drop for DirectDevices {
    fn drop(&mut self) {
        unbind(self.devices.drain(..));
    }
}

impl fmt::Debug for DirectDevices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.devices).finish()
    }
}

/// Binds the physical device at `path`.
pub(super) fn bind(host: &dyn HostIommu, path: &Path) -> Result<ObjectId> {
    let name = path.display().to_string();
    let refused = |error| VfioError::new(&name, VfioProblem::Bind(error));
    Ok(host.device_bind(&name).map_err(refused)?)
}

/// Unbinds `devices` from their hosts.
pub(super) fn unbind(devices: impl Iterator<Item = BoundDevice>) {
    for BoundDevice { bdf, dev, host } in devices {
        if let Err(error) = host.verbs.device_unbind(dev) {
            log::error!("{bdf} stays bound: {error}");
        }
    }
}

pub(super) fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Iommu(format!("{what}: {error}"))
}
