// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtual IOMMU of a machine: its registers, its nesting, and the unit behind it.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Weak};

use super::in_use::{ObjectsInUse, RegisterPage};
use super::{AssignedFunction, Surroundings};
use crate::emulated::{
    AddressWidth, ContextTables, DeviceConfig, DmaAttributes, DmaPort, DmaWay, VtdUnit,
    VtdUnitConfig,
};
use crate::iommufd::{Extensions, HostIommu, HwInfoData, ObjectId};
use crate::nesting::{vtd::VtdNesting, DeviceInfo};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::regs::{Cap, Ecap};
use crate::viommu::vtd::{HostUnit, VtdConfig, VtdIommu};
use crate::viommu::{
    FaultTarget, InterruptListener, InterruptRemapper, InterruptSink, Observer, Policy, Requester,
    Stage1,
};
use crate::vmm::bus::BusDevice;
use crate::vmm::config::IommuConfig;
use crate::vmm::devices::{DmaError, DmaMaster};
use crate::vmm::report::IommuReport;
use crate::vmm::trace::TracedIommu;
use crate::vmm::vfio::{VfioError, VfioProblem};
use crate::vmm::{Error, Result};

/// What a virtual IOMMU is built from.
pub(super) struct Plan<'a> {
    pub id: String,
    /// Where its own interrupts go.
    pub interrupts: Arc<dyn InterruptSink>,
    pub config: &'a IommuConfig,
    pub interrupt_remapping: bool,
    /// The emulated unit walks second-stage tables of the guest's, whether they are offered or not.
    pub guest_second_stage: bool,
    pub functions: Vec<AssignedFunction>,
}

/// One virtual IOMMU.
pub(in crate::vmm) struct Iommu {
    id: String,
    vtd: Arc<VtdIommu>,
    nesting: Arc<VtdNesting>,
    host: Arc<dyn HostIommu>,
    /// As the guest and as the host knows them.
    devices: Vec<(Bdf, ObjectId)>,
    interrupt_remapping: bool,
    /// Unless the kernel has it.
    unit: Option<Arc<VtdUnit>>,
    in_use: Arc<ObjectsInUse>,
    /// Lent to the unit's sanitizer.
    _contexts: Arc<GuestContexts>,
}

impl Iommu {
    /// The virtual IOMMU of `plan`, whose host side is `nesting`, which has no devices yet.
    pub(super) fn new(
        plan: Plan<'_>,
        nesting: VtdNesting,
        around: &Surroundings<'_>,
    ) -> Result<Self> {
        let Plan { id, interrupts, config, interrupt_remapping, guest_second_stage, functions } =
            plan;
        let nesting = Arc::new(nesting);
        let host = &around.host.verbs;
        let emulated = around.host.emulated.as_ref().map(|emulated| {
            let unit = VtdUnit::new(unit_config(config, guest_second_stage));
            let id = emulated.add_unit(unit.clone());
            (emulated, unit, id)
        });
        let mut devices = Vec::with_capacity(functions.len());
        for function in &functions {
            let bdf = function.bdf;
            let dev = match (&function.vfio, &emulated) {
                (Some(path), _) => bind(&**host, path)?,
                (None, Some((emulated, _, unit))) => {
                    let name = format!("{id}/{bdf}");
                    let pasid_bits = if function.pasid { Pasid::BITS as u8 } else { 0 };
                    let device =
                        DeviceConfig { pasid_bits, ats: config.ats, ..DeviceConfig::default() };
                    emulated
                        .add_device(&name, *unit, bdf, device)
                        .map_err(failed("adding a device"))?;
                    host.device_bind(&name).map_err(failed("binding a device"))?
                }
                (None, None) => return Err(not_of_this_machine(&id, bdf)),
            };
            devices.push((bdf, dev));
            nesting.add_device(bdf, dev).map_err(failed("adding a device"))?;
        }

        let hosts: Vec<_> = nesting
            .hw_infos()
            .iter()
            .filter_map(|device| host_unit(device, host.extensions()))
            .collect();
        let offered = vtd_config(config, interrupt_remapping).intersect(&hosts)?;
        let observer = around.trace.clone().map(|trace| {
            let observer: Arc<dyn Observer> = Arc::new(TracedIommu { trace, id: id.clone() });
            observer
        });
        let tables = Arc::new(around.memory.map().clone());
        let vtd = VtdIommu::new(offered, tables, nesting.clone(), interrupts, observer)
            .map_err(failed("--iommu"))?;
        let target: Arc<dyn FaultTarget> = vtd.clone();
        nesting.set_fault_target(Arc::downgrade(&target));
        let contexts = Arc::new(GuestContexts(vtd.clone()));
        let weak: Weak<GuestContexts> = Arc::downgrade(&contexts);
        let unit = emulated.map(|(_, unit, _)| unit);
        if let Some(unit) = &unit {
            unit.set_context_tables(weak);
        }
        for function in functions {
            vtd.add_device(function.bdf);
        }
        let (host, in_use) = (host.clone(), around.in_use.clone());
        Ok(Self {
            id,
            vtd,
            nesting,
            host,
            devices,
            interrupt_remapping,
            unit,
            in_use,
            _contexts: contexts,
        })
    }

    /// The host side.
    pub(super) fn nesting(&self) -> &VtdNesting {
        &self.nesting
    }

    /// What devices call it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the guest is offered.
    #[cfg(test)]
    pub(super) fn capabilities(&self) -> crate::viommu::vtd::Capabilities {
        self.vtd.capabilities()
    }

    /// The register page.
    pub fn registers(&self) -> Arc<dyn BusDevice> {
        Arc::new(RegisterPage { vtd: self.vtd.clone(), in_use: self.in_use.clone() })
    }

    /// The machine stops: threads that work for the guest in here leave off soon.
    pub fn halt(&self) {
        self.vtd.halt();
    }

    /// Who remaps the interrupts of what is behind the IOMMU, if it does.
    pub fn interrupt_remapper(&self) -> Option<Weak<dyn InterruptRemapper>> {
        let vtd: Arc<dyn InterruptRemapper> = self.vtd.clone();
        self.interrupt_remapping.then(|| Arc::downgrade(&vtd))
    }

    /// From now on `listener` is told when interrupts are remapped otherwise than before.
    pub fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>) {
        self.vtd.add_interrupt_listener(listener);
    }

    /// The devices behind it, as the guest and as the host knows them.
    pub fn devices(&self) -> &[(Bdf, ObjectId)] {
        &self.devices
    }

    /// How the function at `bdf`, which is in this process, makes its memory requests.
    ///
    /// # Errors
    /// The unit is of this machine, and knows only its devices.
    pub fn dma_master(&self, bdf: Bdf) -> Result<Box<dyn DmaMaster>> {
        Ok(Box::new(self.dma_port(bdf)?))
    }

    /// Where memory requests of the function at `bdf` enter the IOMMU.
    ///
    /// # Errors
    /// As [`Iommu::dma_master`].
    pub fn dma_port(&self, bdf: Bdf) -> Result<DmaPort> {
        let unit = self.unit.as_ref().ok_or_else(|| not_of_this_machine(&self.id, bdf))?;
        Ok(unit.port(bdf.raw()))
    }

    /// What was done so far.
    pub(super) fn report(&self) -> IommuReport {
        IommuReport {
            id: self.id.clone(),
            viommu: self.vtd.counters(),
            nesting: self.nesting.counters(),
            hardware: self.unit.as_ref().map(|unit| unit.counters()),
            sanitizer: self.unit.as_ref().and_then(|unit| unit.sanitizer_report()),
        }
    }
}

impl Drop for Iommu {
    /// Gives every host object back, in order.
    fn drop(&mut self) {
        if let Err(error) = self.nesting.shutdown() {
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
            .field("vtd", &self.vtd)
            .finish_non_exhaustive()
    }
}

pub(super) fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Iommu(format!("{what}: {error}"))
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

/// The emulated unit that can serve `config`.
fn unit_config(config: &IommuConfig, guest_second_stage: bool) -> VtdUnitConfig {
    VtdUnitConfig {
        address_width: match config.address_width {
            57 => AddressWidth::Bits57,
            _ => AddressWidth::Bits48,
        },
        guest_second_stage,
        device_tlb: config.ats,
        sanitize: config.sanitize,
        ..VtdUnitConfig::default()
    }
}

/// What the guest is to be offered.
fn vtd_config(config: &IommuConfig, interrupt_remapping: bool) -> VtdConfig {
    VtdConfig {
        address_width: config.address_width,
        pasid_bits: config.pasid_bits,
        second_stage: config.second_stage,
        caching_mode: config.caching_mode,
        device_iotlb: config.ats,
        interrupt_remapping,
        ..VtdConfig::default()
    }
}

/// The IOMMU of a device, when it is a VT-d.
fn host_unit(device: &DeviceInfo, extensions: Extensions) -> Option<HostUnit> {
    match device.info.data {
        HwInfoData::Vtd(registers) => Some(HostUnit {
            device: device.rid.to_string(),
            cap: Cap::from_bits(registers.cap_reg),
            ecap: Ecap::from_bits(registers.ecap_reg),
            guest_second_stage: extensions.guest_second_stage,
        }),
        HwInfoData::None | HwInfoData::ArmSmmuV3(_) | HwInfoData::Other(_) => None,
    }
}

/// The guest's context and PASID tables, for the sanitizer.
#[derive(Debug)]
struct GuestContexts(Arc<VtdIommu>);

impl ContextTables for GuestContexts {
    fn way(&self, rid: Bdf, pasid: Option<u32>) -> Option<DmaWay> {
        let pasid = match pasid {
            Some(pasid) => Some(Pasid::new(pasid)?),
            None => None,
        };
        Some(match self.0.policy_by_tables(Requester { rid, pasid })? {
            Policy::Blocked { .. } => DmaWay::Blocked,
            Policy::Bypass => DmaWay::Bypass,
            Policy::Stage1(Stage1::VtdFirstStage(tables)) => DmaWay::FirstStage(tables.table),
            Policy::Stage1(Stage1::VtdSecondStage(tables)) => DmaWay::SecondStage(tables.table),
        })
    }
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

fn attributes(pasid: Option<Pasid>) -> DmaAttributes {
    DmaAttributes { pasid: pasid.map(Pasid::raw), ..DmaAttributes::default() }
}
