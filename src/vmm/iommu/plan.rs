// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual IOMMU of any model is built from, and the interface of the models.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Weak};

use super::host::failed;
use super::{AssignedFunction, Surroundings};
use crate::arch::EdgeLine;
use crate::bus::BusDevice;
use crate::config::IommuConfig;
use crate::devices::DmaMaster;
use crate::report::ModelReport;
use crate::vfio::{VfioError, VfioProblem};
use crate::{Error, Result};
use twostage::iommufd::{Errno, HostIommu, ObjectId};
use twostage::nesting::NestingError;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink};
use twostage_emulated::{DeviceConfig, DmaPort, UnitId};

/// A device behind a virtual IOMMU, by its guest and host identities.
pub(crate) type BoundDevice = (Bdf, ObjectId);

/// What a virtual IOMMU is built from.
pub(super) struct Plan<'a> {
    pub id: String,
    /// Sink of its own interrupts.
    pub interrupts: Arc<dyn InterruptSink>,
    /// Returns the sink for remapped messages of a function.
    pub messages: &'a dyn Fn(Bdf) -> Arc<dyn InterruptSink>,
    pub config: &'a IommuConfig,
    pub interrupt_remapping: bool,
    /// The emulated unit walks the guest's second-stage tables, whether or not that is offered.
    pub guest_second_stage: bool,
    pub functions: Vec<AssignedFunction>,
}

impl Plan<'_> {
    /// How error messages name the function at `rid`: a device of this machine with its path.
    pub fn device_name(&self, rid: Bdf) -> String {
        let of_rid = |function: &&AssignedFunction| function.bdf == rid;
        let path = self.functions.iter().find(of_rid).and_then(|function| function.vfio.as_ref());
        path.map_or_else(|| rid.to_string(), |path| format!("{} ({rid})", path.display()))
    }
}

/// A model of a virtual IOMMU, as the machine uses it.
pub(crate) trait VirtualIommu: fmt::Debug + Send + Sync {
    /// Its registers.
    fn registers(&self) -> Arc<dyn BusDevice>;

    /// The machine is stopping: threads working for the guest return soon.
    fn halt(&self);

    /// The remapper of interrupts from behind the IOMMU, if it remaps.
    fn interrupt_remapper(&self) -> Option<Weak<dyn InterruptRemapper>>;

    /// From now on `listener` is notified when interrupt remapping changes.
    fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>);

    /// Connects its own interrupts to these wires, in the order that its model defines.
    fn connect(&self, _wires: Vec<EdgeLine>) {}

    /// The DMA port of the function at `bdf`, in this process; `None` where the unit is a physical
    /// one.
    fn dma_port(&self, bdf: Bdf) -> Option<DmaPort>;

    /// The same with interrupt messages handled: writes that are not translated as memory go to
    /// `messages`, which remaps them.
    fn dma_master(&self, bdf: Bdf, messages: Arc<dyn InterruptSink>) -> Option<Box<dyn DmaMaster>>;

    /// A report of what was done so far.
    fn report(&self) -> ModelReport;

    /// Releases all host objects.
    ///
    /// # Errors
    /// The host refuses to release something.
    fn shutdown(&self) -> std::result::Result<(), NestingError>;

    /// What a VT-d offers to the guest.
    #[cfg(test)]
    fn vtd_capabilities(&self) -> Option<twostage::viommu::vtd::Capabilities> {
        None
    }
}

/// Binds the functions of `plan` to the host and adds each to its nesting with `add`: those of this
/// process behind `unit`, with ATS or without.
pub(super) fn bind_devices(
    plan: &Plan<'_>,
    unit: Option<UnitId>,
    ats: bool,
    around: &Surroundings<'_>,
    add: impl Fn(Bdf, ObjectId) -> std::result::Result<(), NestingError>,
) -> Result<Vec<BoundDevice>> {
    let host = &around.host.verbs;
    let mut devices = Vec::with_capacity(plan.functions.len());
    for function in &plan.functions {
        let bdf = function.bdf;
        let dev = match (&function.vfio, &around.host.emulated, unit) {
            (Some(path), ..) => bind(&**host, path)?,
            (None, Some(emulated), Some(unit)) => {
                let name = format!("{}/{bdf}", plan.id);
                let pasid_bits = if function.pasid { Pasid::BITS as u8 } else { 0 };
                let device = DeviceConfig { pasid_bits, ats, ..DeviceConfig::default() };
                emulated.add_device(&name, unit, bdf, device).map_err(failed("adding a device"))?;
                host.device_bind(&name).map_err(failed("binding a device"))?
            }
            _ => return Err(not_of_this_machine(&plan.id, bdf)),
        };
        devices.push((bdf, dev));
        add(bdf, dev).map_err(|error| not_added(plan, function, error))?;
    }
    Ok(devices)
}

/// Error: why `function` of `plan` cannot be placed behind its virtual IOMMU, and what to do
/// instead.
fn not_added(plan: &Plan<'_>, function: &AssignedFunction, error: NestingError) -> Error {
    match error {
        NestingError::OtherSmmu { rid, first } => Error::HostLacks(format!(
            "{} is behind another SMMU than {}, and one virtual SMMU cannot serve both: add one more \
             --iommu smmuv3,id=ID,host=/dev/iommu, and iommu=ID to its --vfio",
            plan.device_name(rid),
            plan.device_name(first)
        )),
        NestingError::Host { source, .. }
            if function.vfio.is_some() && source.errno == Errno::EOPNOTSUPP =>
        {
            Error::HostLacks(format!(
                "{source}; iommu=off in its --vfio gives the guest the device past the virtual IOMMU"
            ))
        }
        error => failed("adding a device")(error),
    }
}

/// Binds the device of this machine at `path`.
pub(super) fn bind(host: &dyn HostIommu, path: &Path) -> Result<ObjectId> {
    let name = path.display().to_string();
    let refused = |error| VfioError::new(&name, VfioProblem::Bind(error));
    Ok(host.device_bind(&name).map_err(refused)?)
}

pub(super) fn not_of_this_machine(id: &str, bdf: Bdf) -> Error {
    Error::Iommu(format!("{bdf} is not a device of this machine, and {id} knows only those"))
}
