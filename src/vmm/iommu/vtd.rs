// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual VT-d of a machine, and the unit behind it.

use std::sync::{Arc, Weak};

use super::host::BoundDevice;
use super::plan::{bind_devices, not_built, Plan, VirtualIommu};
use super::services::{AssignedServices, Offered};
use super::Surroundings;
use crate::bus::BusDevice;
use crate::config::VtdOptions;
use crate::devices::{DmaMaster, HostServices, MessageWrites, ServiceListener};
use crate::process::jail::JailedThreads;
use crate::report::{ModelReport, VtdReport};
use crate::Result;
use twostage::nesting::vtd::Serving;
use twostage::nesting::NestingError;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::unit::{self, VtdBuilder};
use twostage::viommu::vtd::{Policy, Stage1, VtdConfig, VtdIommu, VtdNested};
use twostage::viommu::{
    InterruptListener, InterruptRemapper, InterruptSink, PagedRegisters, Requester,
};
use twostage_emulated::{AddressWidth, ContextTables, DmaPort, DmaWay, VtdUnit, VtdUnitConfig};

/// A virtual VT-d.
#[derive(Debug)]
pub(super) struct Vtd {
    vtd: unit::Vtd,
    /// The emulated unit; `None` if there are only devices of the kernel.
    unit: Option<Arc<VtdUnit>>,
    services: AssignedServices,
    /// Kept alive for the unit's sanitizer, which has a weak reference.
    _contexts: Arc<GuestContexts>,
}

impl Vtd {
    /// The virtual VT-d of `plan` with `options`, and the devices behind it.
    pub fn new(
        plan: &Plan<'_>,
        options: &VtdOptions,
        around: &Surroundings<'_>,
    ) -> Result<(Self, Vec<BoundDevice>)> {
        let emulated = plan.emulated(around).map(|emulated| {
            let unit = VtdUnit::new(unit_config(options, plan.guest_second_stage));
            let id = emulated.add_unit(unit.clone());
            (unit, id)
        });
        let unit_id = emulated.as_ref().map(|(_, id)| *id);
        let devices = bind_devices(plan, unit_id, options.ats, around)?;
        let services = AssignedServices::of(&devices, options.pri)?;
        let tables = Arc::new(around.memory.map().clone());
        let config = vtd_config(options, plan.interrupt_remapping);
        // Kernels do not nest second-stage tables of the guest, but any host takes their mirrors.
        let serving = Serving::new(options.nesting, tables.clone(), config.clone());
        let of_kernel = || devices.iter().filter(|device| device.host.emulated.is_none());
        let nests = |device: &BoundDevice| serving.nests_for(&*device.host.verbs, device.dev);
        let second_stage = options.second_stage;
        let second_stage =
            second_stage.unwrap_or_else(|| of_kernel().next().is_none() || !of_kernel().all(nests));
        let builder = VtdBuilder::new(around.host.ioas.clone(), tables, plan.interrupts.clone())
            .config(&config.with_second_stage(second_stage))
            .nesting(options.nesting)
            .threads(Arc::new(JailedThreads))
            .observer(around.observer(&plan.id, around.noting_objects()))
            .without_devices();
        let builder = devices.iter().fold(builder, |builder, BoundDevice { bdf, dev, host }| {
            builder.device_on(&host.ioas, *bdf, *dev, plan.device_name(*bdf))
        });
        let vtd = builder.build().map_err(|error| not_built(plan, error))?;
        let contexts = Arc::new(GuestContexts(vtd.model().clone()));
        let weak: Weak<GuestContexts> = Arc::downgrade(&contexts);
        let unit = emulated.map(|(unit, _)| unit);
        if let Some(unit) = &unit {
            unit.set_context_tables(weak);
        }
        Ok((Self { vtd, unit, services, _contexts: contexts }, devices))
    }
}

impl VirtualIommu for Vtd {
    fn registers(&self) -> Arc<dyn BusDevice> {
        self.vtd.model().clone()
    }

    fn paged_registers(&self) -> Arc<dyn PagedRegisters> {
        self.vtd.paged_registers()
    }

    fn halt(&self) {
        self.vtd.halt();
    }

    fn interrupt_remapper(&self) -> Option<Weak<dyn InterruptRemapper>> {
        self.vtd.interrupt_remapper().map(|remapper| Arc::downgrade(&remapper))
    }

    fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>) {
        self.vtd.add_interrupt_listener(listener);
    }

    fn dma_port(&self, bdf: Bdf) -> Option<DmaPort> {
        self.unit.as_ref().map(|unit| unit.port(bdf.raw()))
    }

    fn dma_master(&self, bdf: Bdf, messages: Arc<dyn InterruptSink>) -> Option<Box<dyn DmaMaster>> {
        Some(Box::new(MessageWrites::new(Box::new(self.dma_port(bdf)?), messages)))
    }

    fn services(&self, bdf: Bdf) -> HostServices {
        let ecap = self.vtd.model().capabilities().ecap;
        let (pasid_bits, ats, pri) = (ecap.pasid_bits(), ecap.dt(), ecap.prs());
        self.services.behind(bdf, Offered { pasid_bits, ats, pri })
    }

    fn service_listener(&self, bdf: Bdf) -> ServiceListener {
        let model = self.vtd.model().clone();
        Arc::new(move |services| model.set_page_requests(bdf, services.pri))
    }

    fn report(&self) -> ModelReport {
        ModelReport::Vtd(VtdReport {
            registers: self.vtd.model().capabilities().registers(),
            mirrored: self.vtd.nestings().iter().find_map(|side| side.mirrors_because()),
            viommu: self.vtd.model().counters(),
            nesting: self.vtd.nesting().counters(),
            nesting_beside: self.vtd.nestings().get(1).map(|beside| beside.counters()),
            hardware: self.unit.as_ref().map(|unit| unit.counters()),
            sanitizer: self.unit.as_ref().and_then(|unit| unit.sanitizer_report()),
        })
    }

    fn shutdown(&self) -> std::result::Result<(), NestingError> {
        self.vtd.shutdown()
    }

    #[cfg(test)]
    fn vtd_capabilities(&self) -> Option<twostage::viommu::vtd::Capabilities> {
        Some(self.vtd.model().capabilities())
    }
}

/// The register page.
impl BusDevice for VtdIommu {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.mmio_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.mmio_write(offset, data);
    }
}

/// The emulated unit that can serve `config`.
fn unit_config(config: &VtdOptions, guest_second_stage: bool) -> VtdUnitConfig {
    VtdUnitConfig::default()
        .with_address_width(match config.address_width {
            57 => AddressWidth::Bits57,
            _ => AddressWidth::Bits48,
        })
        .with_guest_second_stage(guest_second_stage)
        .with_device_tlb(config.ats)
        .with_page_requests(config.pri)
        .with_sanitize(config.sanitize)
}

/// What the guest is to be offered.
fn vtd_config(config: &VtdOptions, interrupt_remapping: bool) -> VtdConfig {
    VtdConfig::default()
        .with_address_width(config.address_width)
        .with_pasid_bits(config.pasid_bits)
        .with_first_stage(config.first_stage)
        .with_second_stage(config.second_stage == Some(true))
        .with_nest(config.nest)
        .with_caching_mode(config.caching_mode)
        .with_device_iotlb(config.ats)
        .with_page_requests(config.pri)
        .with_interrupt_remapping(interrupt_remapping)
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
            Policy::Blocked(_) => DmaWay::Blocked,
            Policy::Bypass => DmaWay::Bypass,
            Policy::Stage1(Stage1::VtdFirstStage(tables)) => DmaWay::FirstStage(tables.table),
            Policy::Stage1(Stage1::VtdSecondStage(tables)) => DmaWay::SecondStage(tables.table),
            Policy::Stage1(Stage1::VtdNested(VtdNested { first, second })) => {
                DmaWay::Nested { first: first.table, second: second.table }
            }
        })
    }
}
