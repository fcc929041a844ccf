// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtual IOMMUs of a machine and all that is behind them: nesting, the counted verbs of the
//! hosts, and the hosts that serve them.
//!
//! A machine has one host for all its virtual IOMMUs, and in it one IOAS, which maps the guest's
//! memory; devices of the kernel that are behind no virtual IOMMU use it, too. If that host is the
//! kernel and devices of this process are behind a virtual IOMMU as well, those have an emulated
//! host beside it. Each virtual IOMMU has host sides of its own, and an emulated unit of its own if
//! it has such devices; those of the kernel are behind the physical units.

mod host;
mod messages;
mod plan;
mod services;
mod side_core;
mod smmuv3;
mod vtd;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::{HostChoice, IommuConfig, IommuModel, MachineConfig, VtdOptions};
use crate::devices::{DmaMaster, HostServices, ServiceListener};
use crate::memory::MachineMemory;
use crate::report::{HostReport, IommuReport};
use crate::trace::{IommuObserver, Trace};
use crate::{Error, Result};
use host::unbind;
pub(super) use host::{BoundDevice, DirectDevices, Host};
use plan::{no_function_here, Plan, VirtualIommu};
pub(super) use side_core::SideCore;
pub use side_core::SideCoreReport;
use smmuv3::SmmuV3;
use twostage::spec::pci::Bdf;
use twostage::viommu::{InterruptSink, Observer};
use twostage_emulated::{DmaPort, ObjectGraph};
use vtd::Vtd;

/// A function that is to be behind a virtual IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AssignedFunction {
    pub bdf: Bdf,
    /// It has the PASID capability.
    pub pasid: bool,
    /// It makes page requests.
    pub pri: bool,
    /// An SMMU can stall it.
    pub stall: bool,
    /// The number of the virtual IOMMU.
    pub iommu: usize,
    /// The path of the physical device that it is, if it is one.
    pub vfio: Option<PathBuf>,
}

/// The source of the messages of virtual IOMMU `number`; no function on the bus has this BDF.
pub(super) fn interrupt_source(number: usize) -> Bdf {
    const LAST_BUS: u16 = 0xff00;
    // No machine has room for the registers of more than 256.
    Bdf::from_raw(LAST_BUS | number as u16 & 0xff)
}

/// What the virtual IOMMUs of a machine have in common.
pub(super) struct Surroundings<'a> {
    /// That of the configuration.
    pub host: Host,
    /// An emulated one beside it, if it is the kernel's and there are devices for both.
    pub beside: Option<Host>,
    pub memory: &'a MachineMemory,
    pub trace: Option<Arc<Trace>>,
}

impl Surroundings<'_> {
    /// The emulated host, if there is one.
    fn emulated(&self) -> Option<&Host> {
        [Some(&self.host), self.beside.as_ref()]
            .into_iter()
            .flatten()
            .find(|host| host.emulated.is_some())
    }

    /// See [`Host::noting_objects`]: those of the emulated host, as the kernel does not tell.
    fn noting_objects(&self) -> impl Fn() + Send + Sync + use<> {
        self.emulated().unwrap_or(&self.host).noting_objects()
    }

    /// An observer of what the virtual IOMMU `id` does; `disabling` is called when a guest switches
    /// translation off.
    fn observer(
        &self,
        id: &str,
        disabling: impl Fn() + Send + Sync + 'static,
    ) -> Arc<dyn Observer> {
        let (id, trace, disabling) = (id.to_owned(), self.trace.clone(), Box::new(disabling));
        Arc::new(IommuObserver { id, trace, disabling })
    }
}

/// The virtual IOMMUs of a machine; at least one.
pub(super) struct Iommus {
    all: Vec<Iommu>,
    host: Host,
    /// The emulated host beside that, if there is one.
    beside: Option<Host>,
    /// The emulated host's objects before the guest runs.
    at_start: Option<ObjectGraph>,
}

impl Iommus {
    /// The virtual IOMMUs of `config`, in front of `functions`; `None` when there are none. Their
    /// host has `memory` as stage 2: it is `kernel` if the configuration says so, or else an
    /// emulated one; functions of this process have that in any case. `messages` gives the sink for
    /// the messages of a source (a virtual IOMMU or a function) that need no remapping or have been
    /// remapped. With `interrupt_remapping` the virtual IOMMUs remap the messages of functions.
    pub fn new(
        config: &MachineConfig,
        interrupt_remapping: bool,
        memory: &MachineMemory,
        kernel: Option<&Host>,
        functions: &[AssignedFunction],
        messages: &dyn Fn(Bdf) -> Arc<dyn InterruptSink>,
        trace: Option<Arc<Trace>>,
    ) -> Result<Option<Self>> {
        let Some(first) = config.iommus.first() else { return Ok(None) };
        let model = |iommu: &IommuConfig| std::mem::discriminant(&iommu.model);
        if config.iommus.iter().any(|other| model(other) != model(first)) {
            return Err(Error::Iommu("a machine has virtual IOMMUs of one model".into()));
        }
        let host = match (&first.host, kernel) {
            (HostChoice::Kernel(_), Some(kernel)) => kernel.clone(),
            _ => Host::emulated(memory, trace.as_ref())?,
        };
        let beside = match &host.emulated {
            None if functions.iter().any(|function| function.vfio.is_none()) => {
                Some(Host::beside(memory, trace.as_ref())?)
            }
            _ => None,
        };
        let around = Surroundings { host: host.clone(), beside: beside.clone(), memory, trace };
        let mut all = Vec::new();
        // The host has this extension only if all its units have it.
        let second_stage = |vtd: &VtdOptions| vtd.second_stage != Some(false);
        let guest_second_stage =
            config.iommus.iter().any(|iommu| iommu.model.vtd().is_some_and(second_stage));
        for (number, iommu) in config.iommus.iter().enumerate() {
            let functions = functions.iter().filter(|function| function.iommu == number);
            let plan = Plan {
                id: config.iommu_id(number),
                interrupts: messages(interrupt_source(number)),
                messages,
                config: iommu,
                interrupt_remapping,
                guest_second_stage,
                functions: functions.cloned().collect(),
            };
            all.push(Iommu::new(plan, &around)?);
        }
        let at_start = around.emulated().and_then(Host::graph);
        Ok(Some(Self { all, host, beside, at_start }))
    }

    /// Each of them, in the order of the configuration.
    pub fn all(&self) -> &[Iommu] {
        &self.all
    }

    /// What each has done so far.
    pub fn reports(&self) -> Vec<IommuReport> {
        self.all.iter().map(Iommu::report).collect()
    }

    /// The calls of the host so far, and its objects.
    pub fn host_report(&self) -> HostReport {
        let at_start = self.at_start.clone().filter(|_| self.beside.is_none());
        HostReport { at_start, ..self.host.report() }
    }

    /// The same of the emulated host beside it, if there is one.
    pub fn beside_report(&self) -> Option<HostReport> {
        let report = self.beside.as_ref()?.report();
        Some(HostReport { at_start: self.at_start.clone(), ..report })
    }

    /// Gives every host object back. Returns the objects that are left, if a host tells: only the
    /// emulated one does. There should be none.
    pub fn close(self) -> Option<ObjectGraph> {
        let Self { all, host, beside, .. } = self;
        drop(all);
        let left = beside.and_then(Host::close);
        host.close().or(left)
    }
}

impl fmt::Debug for Iommus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.all).finish()
    }
}

/// One virtual IOMMU of a machine, whatever its model, and the devices behind it.
pub(super) struct Iommu {
    /// The name by which devices refer to it.
    pub id: String,
    pub model: Box<dyn VirtualIommu>,
    /// The devices behind it.
    pub devices: Vec<BoundDevice>,
}

impl Iommu {
    /// The virtual IOMMU of `plan`.
    fn new(plan: Plan<'_>, around: &Surroundings<'_>) -> Result<Self> {
        let (model, devices): (Box<dyn VirtualIommu>, _) = match &plan.config.model {
            IommuModel::Vtd(options) => {
                let (vtd, devices) = Vtd::new(&plan, options, around)?;
                (Box::new(vtd), devices)
            }
            IommuModel::SmmuV3(options) => {
                let (smmu, devices) = SmmuV3::new(&plan, options, around)?;
                (Box::new(smmu), devices)
            }
        };
        Ok(Self { id: plan.id, model, devices })
    }

    /// How the function at `bdf`, which is in this process, makes its memory requests, including
    /// interrupt messages, which go to `messages`.
    ///
    /// # Errors
    /// It has no function of this process.
    pub fn dma_master(
        &self,
        bdf: Bdf,
        messages: Arc<dyn InterruptSink>,
    ) -> Result<Box<dyn DmaMaster>> {
        let dma = self.model.dma_master(bdf, messages);
        dma.ok_or_else(|| no_function_here(&self.id, bdf))
    }

    /// What the guest may be offered of the function at `bdf`, which is assigned, and what to tell
    /// what it has enabled.
    pub fn services(&self, bdf: Bdf) -> (HostServices, ServiceListener) {
        (self.model.services(bdf), self.model.service_listener(bdf))
    }

    /// Where memory requests of the function at `bdf` enter the IOMMU.
    ///
    /// # Errors
    /// As [`Iommu::dma_master`].
    pub fn dma_port(&self, bdf: Bdf) -> Result<DmaPort> {
        self.model.dma_port(bdf).ok_or_else(|| no_function_here(&self.id, bdf))
    }

    /// What was done so far.
    fn report(&self) -> IommuReport {
        IommuReport { id: self.id.clone(), of: self.model.report() }
    }
}

impl Drop for Iommu {
    /// Gives every host object back, in order.
    fn drop(&mut self) {
        if let Err(error) = self.model.shutdown() {
            log::error!("{}: host objects are left behind: {error}", self.id);
        }
        unbind(self.devices.drain(..));
    }
}

impl fmt::Debug for Iommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommu")
            .field("id", &self.id)
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
