// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtual IOMMU of a machine, whatever its model, and the devices behind it.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Weak};

use super::nesting::Nesting;
use super::smmuv3::SmmuV3;
use super::vtd::Vtd;
use super::{AssignedFunction, Surroundings};
use crate::arch::EdgeLine;
use crate::bus::BusDevice;
use crate::config::{IommuConfig, IommuModel};
use crate::devices::{DmaError, DmaMaster};
use crate::report::{IommuReport, ModelReport};
use crate::vfio::{VfioError, VfioProblem};
use crate::{Error, Result};
use twostage::iommufd::{Errno, HostIommu, ObjectId};
use twostage::nesting::NestingError;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink};
use twostage_emulated::{DeviceConfig, DmaAttributes, DmaPort, UnitId};

/// A device behind a virtual IOMMU, as the guest and as the host knows it.
pub(super) type BoundDevice = (Bdf, ObjectId);

/// What a virtual IOMMU is built from.
pub(super) struct Plan<'a> {
    pub id: String,
    /// Where its own interrupts go.
    pub interrupts: Arc<dyn InterruptSink>,
    /// Where messages of a function go once they are remapped.
    pub messages: &'a dyn Fn(Bdf) -> Arc<dyn InterruptSink>,
    pub config: &'a IommuConfig,
    pub interrupt_remapping: bool,
    /// The emulated unit walks second-stage tables of the guest's, whether they are offered or not.
    pub guest_second_stage: bool,
    pub functions: Vec<AssignedFunction>,
}

impl Plan<'_> {
    /// What errors call the function at `rid`: a device of this machine by its path, too.
    pub fn device_name(&self, rid: Bdf) -> String {
        let of_rid = |function: &&AssignedFunction| function.bdf == rid;
        let path = self.functions.iter().find(of_rid).and_then(|function| function.vfio.as_ref());
        path.map_or_else(|| rid.to_string(), |path| format!("{} ({rid})", path.display()))
    }
}

/// What a model of a virtual IOMMU does in a machine.
pub(super) trait VirtualIommu: fmt::Debug + Send + Sync {
    /// Its registers.
    fn registers(&self) -> Arc<dyn BusDevice>;

    /// The machine stops: threads that work for the guest in here leave off soon.
    fn halt(&self);

    /// Who remaps the interrupts of what is behind the IOMMU, if anybody does.
    fn interrupt_remapper(&self) -> Option<Weak<dyn InterruptRemapper>>;

    /// From now on `listener` is told when interrupts are remapped otherwise than before.
    fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>);

    /// Its own interrupts have these wires, in the order that its model says.
    fn connect(&self, _wires: Vec<EdgeLine>) {}

    /// Where memory requests of the function at `bdf`, which is in this process, enter the IOMMU;
    /// `None` where the unit is of this machine.
    fn dma_port(&self, bdf: Bdf) -> Option<DmaPort>;

    /// The same, with what of it is interrupt messages: those that are none by the tables go to
    /// `messages`, which remaps them.
    fn dma_master(&self, bdf: Bdf, messages: Arc<dyn InterruptSink>) -> Option<Box<dyn DmaMaster>>;

    /// What was done so far.
    fn report(&self) -> ModelReport;

    /// The host side of another one of its model, which shares its memory.
    ///
    /// # Errors
    /// It is shut down.
    fn beside(&self) -> std::result::Result<Nesting, NestingError>;

    /// Gives every host object back.
    ///
    /// # Errors
    /// The host does not let go of something.
    fn shutdown(&self) -> std::result::Result<(), NestingError>;

    /// What the guest is offered, by a VT-d.
    #[cfg(test)]
    fn vtd_capabilities(&self) -> Option<twostage::viommu::vtd::Capabilities> {
        None
    }
}

/// One virtual IOMMU.
pub(crate) struct Iommu {
    id: String,
    model: Box<dyn VirtualIommu>,
    host: Arc<dyn HostIommu>,
    devices: Vec<BoundDevice>,
}

impl Iommu {
    /// The virtual IOMMU of `plan`, whose host side is `nesting`, which has no devices yet.
    pub(super) fn new(plan: Plan<'_>, nesting: Nesting, around: &Surroundings<'_>) -> Result<Self> {
        let (model, devices): (Box<dyn VirtualIommu>, _) = match (&plan.config.model, nesting) {
            (IommuModel::Vtd(options), Nesting::Vtd(nesting)) => {
                let (vtd, devices) = Vtd::new(&plan, options, nesting, around)?;
                (Box::new(vtd), devices)
            }
            (IommuModel::SmmuV3(options), Nesting::SmmuV3(nesting)) => {
                let (smmu, devices) = SmmuV3::new(&plan, options, nesting, around)?;
                (Box::new(smmu), devices)
            }
            _ => return Err(Error::Iommu("a machine has virtual IOMMUs of one model".into())),
        };
        Ok(Self { id: plan.id, model, host: around.host.verbs.clone(), devices })
    }

    /// What it does as the model it is.
    pub(super) fn model(&self) -> &dyn VirtualIommu {
        &*self.model
    }

    /// What devices call it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its registers.
    pub fn registers(&self) -> Arc<dyn BusDevice> {
        self.model.registers()
    }

    /// The machine stops: threads that work for the guest in here leave off soon.
    pub fn halt(&self) {
        self.model.halt();
    }

    /// Who remaps the interrupts of what is behind the IOMMU, if anybody does.
    pub fn interrupt_remapper(&self) -> Option<Weak<dyn InterruptRemapper>> {
        self.model.interrupt_remapper()
    }

    /// From now on `listener` is told when interrupts are remapped otherwise than before.
    pub fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>) {
        self.model.add_interrupt_listener(listener);
    }

    /// Its own interrupts have these wires.
    pub fn connect(&self, wires: Vec<EdgeLine>) {
        self.model.connect(wires);
    }

    /// The devices behind it, as the guest and as the host knows them.
    pub fn devices(&self) -> &[(Bdf, ObjectId)] {
        &self.devices
    }

    /// How the function at `bdf`, which is in this process, makes its memory requests, interrupt
    /// messages among them; `messages` is where it sends messages.
    ///
    /// # Errors
    /// The unit is of this machine, and knows only its devices.
    pub fn dma_master(
        &self,
        bdf: Bdf,
        messages: Arc<dyn InterruptSink>,
    ) -> Result<Box<dyn DmaMaster>> {
        let dma = self.model.dma_master(bdf, messages);
        dma.ok_or_else(|| not_of_this_machine(&self.id, bdf))
    }

    /// Where memory requests of the function at `bdf` enter the IOMMU.
    ///
    /// # Errors
    /// As [`Iommu::dma_master`].
    pub fn dma_port(&self, bdf: Bdf) -> Result<DmaPort> {
        self.model.dma_port(bdf).ok_or_else(|| not_of_this_machine(&self.id, bdf))
    }

    /// What was done so far.
    pub(super) fn report(&self) -> IommuReport {
        IommuReport { id: self.id.clone(), of: self.model.report() }
    }
}

impl Drop for Iommu {
    /// Gives every host object back, in order.
    fn drop(&mut self) {
        if let Err(error) = self.model.shutdown() {
            log::error!("{}: host objects are left behind: {error}", self.id);
        }
        for (bdf, dev) in self.devices.drain(..) {
            if let Err(error) = self.host.device_unbind(dev) {
                log::error!("{bdf} stays bound: {error}");
            }
        }
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

pub(super) fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Iommu(format!("{what}: {error}"))
}

/// Binds the functions of `plan` to the host and tells its nesting of each by `add`: those of this
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

/// Why `function` of `plan` is not behind its virtual IOMMU, and what to say instead.
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
fn bind(host: &dyn HostIommu, path: &Path) -> Result<ObjectId> {
    let name = path.display().to_string();
    let refused = |error| VfioError::new(&name, VfioProblem::Bind(error));
    Ok(host.device_bind(&name).map_err(refused)?)
}

fn not_of_this_machine(id: &str, bdf: Bdf) -> Error {
    Error::Iommu(format!("{bdf} is not a device of this machine, and {id} knows only those"))
}

impl DmaMaster for DmaPort {
    fn read(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &mut [u8],
    ) -> std::result::Result<(), DmaError> {
        DmaPort::read(self, attributes(pasid), iova, data).map_err(|_| DmaError { address: iova })
    }

    fn write(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &[u8],
    ) -> std::result::Result<(), DmaError> {
        DmaPort::write(self, attributes(pasid), iova, data).map_err(|_| DmaError { address: iova })
    }
}

/// What a request with `pasid` says of itself.
pub(super) fn attributes(pasid: Option<Pasid>) -> DmaAttributes {
    DmaAttributes { pasid: pasid.map(Pasid::raw), ..DmaAttributes::default() }
}
