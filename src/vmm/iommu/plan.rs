// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual IOMMU of any model is built from, and the trait that each model implements.

use std::fmt;
use std::sync::{Arc, Weak};

use super::host::{bind, failed, BoundDevice};
use super::{AssignedFunction, Surroundings};
use crate::arch::EdgeLine;
use crate::bus::BusDevice;
use crate::config::IommuConfig;
use crate::devices::{DmaError, DmaMaster};
use crate::report::ModelReport;
use crate::{Error, Result};
use twostage::iommufd::Errno;
use twostage::nesting::NestingError;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::unit::{AddError, BuildError};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink};
use twostage_emulated::{DeviceConfig, DmaAttributes, DmaPort, UnitId};

/// What a virtual IOMMU is built from.
pub(super) struct Plan<'a> {
    pub id: String,
    /// Where its own interrupts go.
    pub interrupts: Arc<dyn InterruptSink>,
    /// Where messages of a function go once they are remapped.
    pub messages: &'a dyn Fn(Bdf) -> Arc<dyn InterruptSink>,
    pub config: &'a IommuConfig,
    pub interrupt_remapping: bool,
    /// The emulated unit walks second-stage tables of the guest, even if this virtual IOMMU does
    /// not offer them.
    pub guest_second_stage: bool,
    pub functions: Vec<AssignedFunction>,
}

impl Plan<'_> {
    /// The name of the function at `rid` in errors; that of a physical device includes its path.
    pub fn device_name(&self, rid: Bdf) -> String {
        let of_rid = |function: &&AssignedFunction| function.bdf == rid;
        let path = self.functions.iter().find(of_rid).and_then(|function| function.vfio.as_ref());
        path.map_or_else(|| rid.to_string(), |path| format!("{} ({rid})", path.display()))
    }

    fn has_physical(&self) -> bool {
        self.functions.iter().any(|function| function.vfio.is_some())
    }
}

/// What a model of a virtual IOMMU does in a machine.
pub(crate) trait VirtualIommu: fmt::Debug + Send + Sync {
    /// Its registers.
    fn registers(&self) -> Arc<dyn BusDevice>;

    /// The machine stops: threads that are in here on behalf of the guest return soon.
    fn halt(&self);

    /// Who remaps the interrupts of what is behind the IOMMU, if anybody does.
    fn interrupt_remapper(&self) -> Option<Weak<dyn InterruptRemapper>>;

    /// From now on `listener` is told when the remapping of interrupts changes.
    fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>);

    /// Gives it the wires of its own interrupts, in the order that its model defines.
    fn connect(&self, _wires: Vec<EdgeLine>) {}

    /// Where memory requests of the function at `bdf`, which is in this process, enter the IOMMU;
    /// `None` if the host is the kernel.
    fn dma_port(&self, bdf: Bdf) -> Option<DmaPort>;

    /// The same, with interrupt messages taken out of the writes. Where the address of a message is
    /// not translated, as on VT-d, they go to `messages`, which remaps them.
    fn dma_master(&self, bdf: Bdf, messages: Arc<dyn InterruptSink>) -> Option<Box<dyn DmaMaster>>;

    /// What it has done so far.
    fn report(&self) -> ModelReport;

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

/// Binds the functions of `plan` to the host. Functions in this process are put behind `unit`;
/// `ats` says whether they have ATS.
pub(super) fn bind_devices(
    plan: &Plan<'_>,
    unit: Option<UnitId>,
    ats: bool,
    around: &Surroundings<'_>,
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
                let device = DeviceConfig::default().with_pasid_bits(pasid_bits).with_ats(ats);
                emulated.add_device(&name, unit, bdf, device).map_err(failed("adding a device"))?;
                host.device_bind(&name).map_err(failed("binding a device"))?
            }
            _ => return Err(not_of_this_machine(&plan.id, bdf)),
        };
        devices.push((bdf, dev));
    }
    Ok(devices)
}

/// The error for `plan`, whose virtual IOMMU could not be built. It says what to configure instead.
pub(super) fn not_built(plan: &Plan<'_>, error: BuildError) -> Error {
    match error {
        BuildError::Add(AddError::Lacks(conflict)) => conflict.into(),
        BuildError::Add(error @ AddError::WrongIommu { .. }) => Error::HostLacks(error.to_string()),
        BuildError::Add(error) => match refused_by(&error) {
            Some(NestingError::OtherSmmu { rid, first }) => Error::HostLacks(format!(
                "{} is behind another SMMU than {}, and one virtual SMMU cannot serve both: add \
                 one more --iommu smmuv3,id=ID,host=/dev/iommu, and iommu=ID to its --vfio",
                plan.device_name(*rid),
                plan.device_name(*first)
            )),
            Some(NestingError::Host { source, .. })
                if source.errno == Errno::EOPNOTSUPP && plan.has_physical() =>
            {
                Error::HostLacks(format!(
                    "{source}; iommu=off in its --vfio assigns the device without the virtual IOMMU"
                ))
            }
            _ => failed("adding a device")(error),
        },
        error => failed("--iommu")(error),
    }
}

/// What nesting refused, as a device was added or was first to pass.
fn refused_by(error: &AddError) -> Option<&NestingError> {
    match error {
        AddError::Nesting { source, .. } => Some(source),
        AddError::Refused { source, .. } => source.source.downcast_ref(),
        _ => None,
    }
}

pub(super) fn not_of_this_machine(id: &str, bdf: Bdf) -> Error {
    Error::Iommu(format!("{bdf} is not a device of this machine, and {id} takes only those"))
}

/// A port of the emulated host, as a device uses it to reach memory.
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

/// The attributes of a request with `pasid`.
pub(super) fn attributes(pasid: Option<Pasid>) -> DmaAttributes {
    DmaAttributes { pasid: pasid.map(Pasid::raw), ..DmaAttributes::default() }
}
