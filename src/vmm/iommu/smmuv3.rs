// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual SMMUv3 of a machine, and the unit behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock, Weak};
use twostage::sync::Mutex;

use vm_superio::Trigger;

use super::host::BoundDevice;
use super::messages::{DeviceMessages, SmmuDma};
use super::plan::{bind_devices, not_built, Plan, VirtualIommu};
use super::services::{AssignedServices, Offered};
use super::{AssignedFunction, Surroundings};
use crate::arch::layout::MESSAGE_RANGE;
use crate::arch::EdgeLine;
use crate::bus::BusDevice;
use crate::config::SmmuV3Options;
use crate::devices::{DmaMaster, HostServices};
use crate::process::jail::JailedThreads;
use crate::report::{ModelReport, SmmuV3Report};
use crate::vfio::{message_window, DoorbellWatch};
use crate::Result;
use twostage::nesting::smmuv3::{SmmuNesting, SmmuObjects};
use twostage::nesting::NestingError;
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::translation::Granule;
use twostage::spec::smmuv3::StreamId;
use twostage::unit::{Smmuv3, Smmuv3Builder};
use twostage::viommu::smmuv3::{Smmu, SmmuConfig, SmmuInterrupt, SmmuInterrupts};
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink, PagedRegisters};
use twostage::warn_limited;
use twostage_emulated::{DmaPort, SmmuV3Unit, SmmuV3UnitConfig};

/// A virtual SMMUv3.
pub(super) struct SmmuV3 {
    smmu: Smmuv3,
    interrupts: Arc<OwnInterrupts>,
    messages: Arc<dyn InterruptRemapper>,
    /// Where the translated messages of each device go.
    translated: BTreeMap<Bdf, Arc<dyn InterruptSink>>,
    /// The host objects in use when a guest last switched translation off.
    objects_in_use: Arc<Mutex<Option<SmmuObjects>>>,
    /// The functions that can be stalled.
    stalled: BTreeSet<Bdf>,
    /// The emulated unit; `None` if there are only devices of the kernel.
    unit: Option<Arc<SmmuV3Unit>>,
    services: AssignedServices,
}

impl SmmuV3 {
    /// The virtual SMMUv3 of `plan` with `options`, and the devices behind it.
    pub fn new(
        plan: &Plan<'_>,
        options: &SmmuV3Options,
        around: &Surroundings<'_>,
    ) -> Result<(Self, Vec<BoundDevice>)> {
        let windows = message_windows(&plan.functions, around)?;
        let emulated = plan.emulated(around).map(|emulated| {
            let unit = SmmuV3Unit::new(unit_config(options));
            let id = emulated.add_unit(unit.clone());
            (unit, id)
        });
        let unit_id = emulated.as_ref().map(|(_, id)| *id);
        let devices = bind_devices(plan, unit_id, options.ats, around)?;
        // Linux's vIOMMUs bring no page requests of devices.
        let services = AssignedServices::of(&devices, false)?;
        let tables = Arc::new(around.memory.map().clone());
        let interrupts =
            Arc::new(OwnInterrupts { messages: plan.interrupts.clone(), wires: OnceLock::new() });
        // There is none before the virtual SMMU is built.
        let nesting = Arc::<OnceLock<Weak<SmmuNesting>>>::default();
        let objects_in_use = Arc::<Mutex<_>>::default();
        let observer = {
            let note = around.noting_objects();
            let (nesting, objects_in_use) = (nesting.clone(), objects_in_use.clone());
            around.observer(&plan.id, move || {
                note();
                let nesting = nesting.get().and_then(Weak::upgrade);
                *objects_in_use.lock() = nesting.map(|nesting| nesting.objects());
            })
        };
        let builder = Smmuv3Builder::new(around.host.ioas.clone(), tables, interrupts.clone())
            .config(&smmu_config(options))
            .threads(Arc::new(JailedThreads))
            .observer(observer)
            .without_devices()
            .fault_target(|smmu| Arc::new(DoorbellWatch::new(smmu, windows)));
        let builder = devices.iter().fold(builder, |builder, BoundDevice { bdf, dev, host }| {
            builder.device_on(&host.ioas, *bdf, *dev, plan.device_name(*bdf))
        });
        let smmu = builder.build().map_err(|error| not_built(plan, error))?;
        let _ = nesting.set(Arc::downgrade(smmu.nesting()));
        let unit = emulated.map(|(unit, _)| unit);
        let port = |device: &BoundDevice| {
            let unit = unit.as_ref().filter(|_| !device.host.is_kernel());
            (device.bdf, unit.map(|unit| unit.port(device.bdf.raw())))
        };
        let messages = Arc::new(DeviceMessages::new(devices.iter().map(port)));
        let sink = |device: &BoundDevice| (device.bdf, (plan.messages)(device.bdf));
        let translated = devices.iter().map(sink).collect();
        let stalled = plan.functions.iter().filter(|it| it.stall).map(|it| it.bdf).collect();
        let smmu = Self {
            smmu,
            interrupts,
            messages,
            translated,
            objects_in_use,
            stalled,
            unit,
            services,
        };
        Ok((smmu, devices))
    }
}

impl VirtualIommu for SmmuV3 {
    fn registers(&self) -> Arc<dyn BusDevice> {
        self.smmu.model().clone()
    }

    fn paged_registers(&self) -> Arc<dyn PagedRegisters> {
        self.smmu.paged_registers()
    }

    fn halt(&self) {
        self.smmu.halt();
    }

    fn interrupt_remapper(&self) -> Option<Weak<dyn InterruptRemapper>> {
        Some(Arc::downgrade(&self.messages))
    }

    /// What can be kept of a message never changes, see [`super::messages`].
    fn add_interrupt_listener(&self, listener: Weak<dyn InterruptListener>) {
        self.smmu.add_interrupt_listener(listener);
    }

    fn connect(&self, wires: Vec<EdgeLine>) {
        // Once only, when the machine is built.
        let _ = self.interrupts.wires.set(wires);
    }

    fn dma_port(&self, bdf: Bdf) -> Option<DmaPort> {
        self.unit.as_ref().map(|unit| unit.port(bdf.raw()))
    }

    fn dma_master(&self, bdf: Bdf, _: Arc<dyn InterruptSink>) -> Option<Box<dyn DmaMaster>> {
        let (port, messages) = (self.dma_port(bdf)?, self.translated.get(&bdf)?.clone());
        let stalls = self.stalled.contains(&bdf);
        Some(Box::new(SmmuDma { port, messages, asks: false, stalls }))
    }

    fn services(&self, bdf: Bdf) -> HostServices {
        let offered = self.smmu.model().capabilities();
        let (pasid_bits, ats) = (offered.idr1.ssidsize(), offered.idr0.ats());
        self.services.behind(bdf, Offered { pasid_bits, ats, pri: false })
    }

    fn report(&self) -> ModelReport {
        ModelReport::SmmuV3(SmmuV3Report {
            registers: self.smmu.model().capabilities().registers(),
            viommu: self.smmu.model().counters(),
            nesting: self.smmu.nesting().counters(),
            nesting_beside: self.smmu.nestings().get(1).map(|beside| beside.counters()),
            objects: self.smmu.nesting().objects(),
            objects_in_use: self.objects_in_use.lock().clone(),
            hardware: self.unit.as_ref().map(|unit| unit.counters()),
            sanitizer: self.unit.as_ref().and_then(|unit| unit.sanitizer_report()),
        })
    }

    fn shutdown(&self) -> std::result::Result<(), NestingError> {
        self.smmu.shutdown()
    }
}

impl fmt::Debug for SmmuV3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SmmuV3").field("smmu", &self.smmu).finish_non_exhaustive()
    }
}

/// The register pages.
impl BusDevice for Smmu {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.mmio_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.mmio_write(offset, data);
    }
}

/// The interrupts of the SMMU itself.
struct OwnInterrupts {
    messages: Arc<dyn InterruptSink>,
    /// Those of events, global errors, CMD_SYNC and page requests, in this order.
    wires: OnceLock<Vec<EdgeLine>>,
}

impl SmmuInterrupts for OwnInterrupts {
    fn message(&self, address: u64, data: u32) -> bool {
        let taken = MESSAGE_RANGE.contains(&address);
        if taken {
            self.messages.send_msi(address, data);
        }
        taken
    }

    fn wire(&self, interrupt: SmmuInterrupt) {
        let number = match interrupt {
            SmmuInterrupt::EventQueue => 0,
            SmmuInterrupt::GlobalError => 1,
            SmmuInterrupt::CommandSync => 2,
            SmmuInterrupt::PageQueue => 3,
        };
        let wire = self.wires.get().and_then(|wires| wires.get(number));
        if let Some(Err(error)) = wire.map(Trigger::trigger) {
            warn_limited!("the SMMU's interrupt {interrupt:?}: {error}");
        }
    }
}

impl fmt::Debug for OwnInterrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnInterrupts").field("wires", &self.wires).finish_non_exhaustive()
    }
}

/// The ranges to which the host directs the messages of the physical devices among `functions`.
fn message_windows(
    functions: &[AssignedFunction],
    around: &Surroundings<'_>,
) -> Result<BTreeMap<StreamId, RangeInclusive<u64>>> {
    let window = |function: &AssignedFunction| {
        let (stream, path) = (function.bdf.into(), function.vfio.as_ref()?);
        let window = message_window(&path.display().to_string(), path, around.memory.ranges());
        Some(window.map(|window| (stream, window)).map_err(Into::into))
    };
    functions.iter().filter_map(window).collect()
}

/// Width of output addresses in bits: no less than that of the processors. The one capability that
/// is not reduced to those of the host's SMMUs: user space may not read IDR5.OAS there (`struct
/// iommu_hw_info_arm_smmuv3`), and a guest loses nothing. An SMMU caps CD.IPS to its own OAS
/// (§3.4): addresses beyond that are faults, like all others that the host has no memory at.
const OUTPUT_BITS: u8 = 52;

/// The emulated unit that can serve `options`.
fn unit_config(options: &SmmuV3Options) -> SmmuV3UnitConfig {
    let unit = SmmuV3UnitConfig::default();
    let httu = options.httu.unwrap_or(unit.httu);
    let ssid_bits = unit.ssid_bits.max(options.substream_bits.unwrap_or_default());
    unit.with_address_width(OUTPUT_BITS)
        .with_va_52(options.address_width == 52)
        .with_ssid_bits(ssid_bits)
        .with_ats(options.ats)
        .with_page_requests(options.pri)
        .with_stalls(options.stall)
        .with_msi_doorbell(Some(MESSAGE_RANGE))
        .with_sanitize(options.sanitize)
        // It serves this virtual SMMU alone: what its guest is not told of is illegal to it.
        .with_httu(httu)
}

/// What the guest is to be offered.
fn smmu_config(options: &SmmuV3Options) -> SmmuConfig {
    let offered =
        |granule| options.granules.as_ref().is_none_or(|granules| granules.contains(&granule));
    SmmuConfig::default()
        .with_input_bits(options.address_width)
        .with_output_bits(OUTPUT_BITS)
        .with_granule_4k(offered(Granule::K4))
        .with_granule_16k(offered(Granule::K16))
        .with_granule_64k(offered(Granule::K64))
        .with_require_granules(options.granules.is_some())
        .with_range_invalidation(options.range_invalidation.unwrap_or(true))
        .with_require_range_invalidation(options.range_invalidation == Some(true))
        .with_substream_bits(options.substream_bits)
        .with_httu(options.httu)
        .with_ats(options.ats)
        .with_page_requests(options.pri)
        .with_stalls(options.stall)
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::spec::smmuv3::regs::Httu;

    #[test]
    fn the_unit_updates_no_flags_that_the_guest_is_not_told_of() {
        for (asked, has) in [
            (None, Httu::Dirty),
            (Some(Httu::None), Httu::None),
            (Some(Httu::Access), Httu::Access),
            (Some(Httu::Dirty), Httu::Dirty),
        ] {
            let options = SmmuV3Options { httu: asked, ..SmmuV3Options::default() };
            assert_eq!(unit_config(&options).httu, has, "{asked:?}");
        }
    }
}
