// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtual IOMMUs of a machine and everything behind them: nesting, host calls with their
//! counters, and the host itself.
//!
//! There is one host with one IOAS, the guest's memory, which is also used by devices without a
//! virtual IOMMU. Each virtual IOMMU has its own vIOMMU object on it. If the host is in this
//! process, an emulated unit serves it; if it is the kernel, a physical unit does.

mod direct;
mod dma;
mod host;
mod messages;
mod plan;
mod smmuv3;
mod unit;
mod vtd;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::{HostChoice, IommuConfig, MachineConfig};
use crate::memory::MachineMemory;
use crate::report::{HostReport, IommuReport};
use crate::trace::{IommuObserver, Trace};
use crate::{Error, Result};
pub(super) use direct::DirectDevices;
pub(super) use host::Host;
use plan::Plan;
use twostage::spec::pci::Bdf;
use twostage::viommu::{InterruptSink, Observer};
use twostage_emulated::ObjectGraph;
pub(super) use unit::Iommu;

/// A function to be placed behind a virtual IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AssignedFunction {
    pub bdf: Bdf,
    /// It has the PASID capability.
    pub pasid: bool,
    /// The index of the virtual IOMMU.
    pub iommu: usize,
    /// The device of this machine behind it, if it is one.
    pub vfio: Option<PathBuf>,
}

/// The source ID of messages from virtual IOMMU `number`: not that of any function on the bus.
pub(super) fn interrupt_source(number: usize) -> Bdf {
    const LAST_BUS: u16 = 0xff00;
    // No machine has space for the registers of more.
    Bdf::from_raw(LAST_BUS | number as u16 & 0xff)
}

/// What all virtual IOMMUs of a machine share.
pub(super) struct Surroundings<'a> {
    pub host: Host,
    pub memory: &'a MachineMemory,
    pub trace: Option<Arc<Trace>>,
}

impl Surroundings<'_> {
    /// The observer of virtual IOMMU `id`; `disabling` is called when a guest disables translation.
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
    /// The host's objects before the guest runs.
    at_start: Option<ObjectGraph>,
}

impl Iommus {
    /// The virtual IOMMUs of `config`, in front of `functions`, on a host that maps `memory` as
    /// stage 2: `kernel` if the configuration says so, otherwise an emulated one; `None` when there
    /// are none. `messages` returns the sink for messages of a source, an IOMMU or a function, that
    /// need no (further) remapping; messages of functions are remapped if `interrupt_remapping`.
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
        let around = Surroundings { host: host.clone(), memory, trace };
        let mut all = Vec::new();
        // The host reports the features of one emulated unit for all.
        let guest_second_stage =
            config.iommus.iter().any(|iommu| iommu.model.vtd().is_some_and(|vtd| vtd.second_stage));
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
        let at_start = host.graph();
        Ok(Some(Self { all, host, at_start }))
    }

    /// All of them, in configuration order.
    pub fn all(&self) -> &[Iommu] {
        &self.all
    }

    /// Reports of what each has done so far.
    pub fn reports(&self) -> Vec<IommuReport> {
        self.all.iter().map(Iommu::report).collect()
    }

    /// Host calls so far, and the host's objects.
    pub fn host_report(&self) -> HostReport {
        HostReport {
            calls: self.host.calls(),
            at_start: self.at_start.clone(),
            in_use: self.host.objects_in_use(),
            graph: self.host.graph(),
            left: None,
            release_unfinished: false,
        }
    }

    /// Releases all host objects; returns those that are left, which should be none, if the host
    /// can tell.
    pub fn close(self) -> Option<ObjectGraph> {
        let Self { all, host, .. } = self;
        drop(all);
        host.close()
    }
}

impl fmt::Debug for Iommus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.all).finish()
    }
}

#[cfg(test)]
mod tests;
