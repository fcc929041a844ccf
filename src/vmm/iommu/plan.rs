// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual IOMMU of any model is built from, and the trait that each model implements.

use std::fmt;
use std::sync::{Arc, Weak};

use super::host::{bind, failed, BoundDevice};
use super::{AssignedFunction, Surroundings};
use crate::arch::EdgeLine;
use crate::bus::BusDevice;
use crate::config::IommuConfig;
use crate::devices::{
    DmaError, DmaMaster, HostServices, ServiceControl, ServiceListener, Services,
};
use crate::report::ModelReport;
use crate::{Error, Result};
use twostage::iommufd::Errno;
use twostage::nesting::NestingError;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::unit::{AddError, BuildError};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink, PagedRegisters};
use twostage_emulated::{DeviceConfig, DmaAttributes, DmaPort, DmaServices, EmulatedHost, UnitId};

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

    /// The emulated host in `around`, if an emulated unit is needed there: that host is the only
    /// one, or a function of this process is behind the virtual IOMMU.
    pub fn emulated<'a>(&self, around: &'a Surroundings<'_>) -> Option<&'a Arc<EmulatedHost>> {
        let needed = around.host.emulated.is_some()
            || self.functions.iter().any(|function| function.vfio.is_none());
        around.emulated().filter(|_| needed)?.emulated.as_ref()
    }

    /// Whether the function called `name` is a physical device.
    fn is_physical(&self, name: &str) -> bool {
        let of_name = |function: &AssignedFunction| self.device_name(function.bdf) == name;
        self.functions.iter().any(|function| function.vfio.is_some() && of_name(function))
    }
}

/// What a model of a virtual IOMMU does in a machine.
pub(crate) trait VirtualIommu: fmt::Debug + Send + Sync {
    /// Its registers.
    fn registers(&self) -> Arc<dyn BusDevice>;

    /// The same as memory of the guest.
    fn paged_registers(&self) -> Arc<dyn PagedRegisters>;

    /// The machine stops: threads that are in here on behalf of the guest return soon.
    fn halt(&self);

    /// Who remaps the interrupts of what is behind the IOMMU, if anybody does.
    fn interrupt_remapper(&self) -> Option<Weak<dyn InterruptRemapper>>;

    /// From now on `listener` is told when the remapping of interrupts changes.
    fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>);

    /// Gives it the wires of its own interrupts, in the order that its model defines.
    fn connect(&self, _wires: Vec<EdgeLine>) {}

    /// Where memory requests of the function at `bdf`, which is in this process, enter the IOMMU;
    /// `None` if it has no function of this process.
    fn dma_port(&self, bdf: Bdf) -> Option<DmaPort>;

    /// The same, with interrupt messages taken out of the writes. Where the address of a message is
    /// not translated, as on VT-d, they go to `messages`, which remaps them.
    fn dma_master(&self, bdf: Bdf, messages: Arc<dyn InterruptSink>) -> Option<Box<dyn DmaMaster>>;

    /// What the guest may be offered of the function at `bdf`, which is assigned.
    fn services(&self, bdf: Bdf) -> HostServices;

    /// What to tell the services that software has enabled of that.
    fn service_listener(&self, _bdf: Bdf) -> ServiceListener {
        Arc::new(|_| ())
    }

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

/// Binds the functions of `plan`, each to its host. Functions in this process are put behind
/// `unit`; `ats` says whether those can have ATS.
pub(super) fn bind_devices(
    plan: &Plan<'_>,
    unit: Option<UnitId>,
    ats: bool,
    around: &Surroundings<'_>,
) -> Result<Vec<BoundDevice>> {
    let mut devices = Vec::with_capacity(plan.functions.len());
    for function in &plan.functions {
        let bdf = function.bdf;
        if let Some(path) = &function.vfio {
            let host = around.host.clone();
            devices.push(BoundDevice { bdf, dev: bind(&*host.verbs, path)?, host });
            continue;
        }
        let none = || no_function_here(&plan.id, bdf);
        let (host, unit) = around.emulated().zip(unit).ok_or_else(none)?;
        let emulated = host.emulated.as_ref().ok_or_else(none)?;
        let name = format!("{}/{bdf}", plan.id);
        let pasid_bits = if function.pasid { Pasid::BITS as u8 } else { 0 };
        let device = DeviceConfig::default()
            .with_pasid_bits(pasid_bits)
            .with_ats(ats && !function.stall)
            .with_pri(function.pri)
            .with_stalls(function.stall);
        emulated.add_device(&name, unit, bdf, device).map_err(failed("adding a device"))?;
        let dev = host.verbs.device_bind(&name).map_err(failed("binding a device"))?;
        devices.push(BoundDevice { bdf, dev, host: host.clone() });
    }
    Ok(devices)
}

/// What to do about a physical device that cannot be behind a virtual IOMMU.
const WITHOUT: &str = "iommu=off in its --vfio assigns the device without the virtual IOMMU";

/// The error for `plan`, whose virtual IOMMU could not be built. It says what to configure instead.
pub(super) fn not_built(plan: &Plan<'_>, error: BuildError) -> Error {
    match error {
        BuildError::Add(AddError::Lacks(conflict)) => conflict.into(),
        BuildError::Add(AddError::WrongIommu { device, a_model }) => Error::HostLacks(format!(
            "{device} is not behind {a_model}, which a virtual one needs; {WITHOUT}"
        )),
        BuildError::Add(error) => match refused_by(&error) {
            Some((_, NestingError::OtherSmmu { rid, first })) => Error::HostLacks(format!(
                "{} is behind another SMMU than {}, and one virtual SMMU cannot serve both: add \
                 one more --iommu smmuv3,id=ID,host=/dev/iommu, and iommu=ID to its --vfio",
                plan.device_name(*rid),
                plan.device_name(*first)
            )),
            Some((device, NestingError::Host { source, .. }))
                if source.errno == Errno::EOPNOTSUPP && plan.is_physical(device) =>
            {
                Error::HostLacks(format!("{source}; {WITHOUT}"))
            }
            _ => failed("adding a device")(error),
        },
        error => failed("--iommu")(error),
    }
}

/// What nesting refused, as a device was added or was first to pass, and the name of the device.
fn refused_by(error: &AddError) -> Option<(&str, &NestingError)> {
    match error {
        AddError::Nesting { device, source } => Some((device, source)),
        AddError::Refused { device, source } => Some((device, source.source.downcast_ref()?)),
        _ => None,
    }
}

/// The error for a function that is not in this process.
pub(super) fn no_function_here(id: &str, bdf: Bdf) -> Error {
    Error::Iommu(format!("{bdf} is no emulated device behind {id}"))
}

/// A port of the emulated host, as a device uses it to reach memory.
impl DmaMaster for DmaPort {
    fn read(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &mut [u8],
    ) -> std::result::Result<(), DmaError> {
        DmaPort::read(self, attributes(pasid), iova, data).map_err(|error| refusal(iova, &error))
    }

    fn write(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &[u8],
    ) -> std::result::Result<(), DmaError> {
        DmaPort::write(self, attributes(pasid), iova, data).map_err(|error| refusal(iova, &error))
    }

    fn set_services(&mut self, services: Services) {
        // The device waits where nobody has to wait for it.
        DmaPort::set_services(
            self,
            DmaServices { page_requests: services.pri, wait_for_pages: false },
        );
    }

    fn service_control(&self) -> Option<Arc<dyn ServiceControl>> {
        Some(Arc::new(self.control()))
    }
}

/// `error` of a request to `iova`, as its device sees it.
pub(super) fn refusal(iova: u64, error: &twostage_emulated::DmaError) -> DmaError {
    let group = match error {
        twostage_emulated::DmaError::PageRequested { group, .. } => Some(*group),
        _ => None,
    };
    DmaError { address: iova, group }
}

/// The attributes of a request with `pasid`.
pub(super) fn attributes(pasid: Option<Pasid>) -> DmaAttributes {
    DmaAttributes { pasid: pasid.map(Pasid::raw), ..DmaAttributes::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::tests::FUNCTION;
    use twostage::iommufd::{HostError, Verb};

    struct NoInterrupts;

    impl InterruptSink for NoInterrupts {
        fn send_msi(&self, _: u64, _: u32) {}
    }

    #[test]
    fn only_a_physical_device_can_be_without_the_virtual_iommu() {
        let physical = AssignedFunction {
            bdf: Bdf::from_raw(16),
            vfio: Some("/dev/vfio/devices/vfio0".into()),
            ..FUNCTION
        };
        let names = ["00:01.0", "/dev/vfio/devices/vfio0 (00:02.0)"];
        let plan = Plan {
            id: "vtd0".into(),
            interrupts: Arc::new(NoInterrupts),
            messages: &|_| Arc::new(NoInterrupts),
            config: &IommuConfig::default(),
            interrupt_remapping: false,
            guest_second_stage: false,
            functions: vec![FUNCTION, physical],
        };
        let refused = |device: &str| {
            let source = HostError::new(Verb::HwptAlloc, None, Errno::EOPNOTSUPP, "no nesting");
            let source = NestingError::Host { what: "a parent".into(), source };
            let error = AddError::Nesting { device: device.into(), source };
            not_built(&plan, error.into())
        };
        assert_eq!([FUNCTION.bdf, Bdf::from_raw(16)].map(|bdf| plan.device_name(bdf)), names);
        let without = "iommu=off in its --vfio assigns the device without the virtual IOMMU";
        let [emulated, physical] = names.map(refused);
        assert!(matches!(&emulated, Error::Iommu(text) if !text.contains(without)), "{emulated}");
        assert_eq!(
            physical.to_string(),
            format!("--iommu: HWPT_ALLOC: EOPNOTSUPP: no nesting; {without}")
        );
        let wrong = AddError::WrongIommu { device: names[1].into(), a_model: "a VT-d" };
        assert_eq!(
            not_built(&plan, wrong.into()).to_string(),
            format!(
                "--iommu: {} is not behind a VT-d, which a virtual one needs; {without}",
                names[1]
            )
        );
    }
}
