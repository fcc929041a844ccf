// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtual IOMMU of a machine and all that is behind it: nesting, the host's verbs, counted,
//! and the emulated host that serves them.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use super::bus::BusDevice;
use super::config::IommuConfig;
use super::devices::{DmaError, DmaMaster};
use super::memory::MachineMemory;
use super::report::{CallReport, IommuReport};
use super::trace::Trace;
use super::{Error, Result};
use crate::emulated::{
    AddressWidth, DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, VtdUnit, VtdUnitConfig,
};
use crate::iommufd::{
    CountedHost, Extensions, HostIommu, HwInfoData, ObjectId, Protection, UserMemory, Verb,
    VerbCounters,
};
use crate::nesting::{DeviceInfo, Nesting};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::regs::{Cap, Ecap};
use crate::viommu::vtd::{HostUnit, VtdConfig, VtdIommu};
use crate::viommu::{FaultTarget, InterruptListener, InterruptRemapper, InterruptSink, Observer};

/// A function that is to be behind the virtual IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AssignedFunction {
    pub bdf: Bdf,
    /// It has the PASID capability.
    pub pasid: bool,
}

/// The virtual IOMMU of a machine.
pub(super) struct Iommu {
    vtd: Arc<VtdIommu>,
    nesting: Arc<Nesting>,
    host: Arc<dyn HostIommu>,
    verbs: Arc<VerbCounters>,
    devices: Vec<ObjectId>,
    interrupt_remapping: bool,
    emulated: Arc<EmulatedHost>,
    unit: Arc<VtdUnit>,
}

impl Iommu {
    /// A virtual IOMMU in front of `functions`, over an emulated host that has `memory` as stage 2.
    /// Its own interrupts go to `interrupts`; it remaps those of others if `interrupt_remapping`.
    pub fn new(
        config: &IommuConfig,
        interrupt_remapping: bool,
        memory: &MachineMemory,
        functions: &[AssignedFunction],
        interrupts: Arc<dyn InterruptSink>,
        trace: Option<Arc<Trace>>,
    ) -> Result<Self> {
        let unit = VtdUnit::new(unit_config(config));
        let emulated = EmulatedHost::new();
        let unit_id = emulated.add_unit(unit.clone());
        let counted =
            CountedHost::new(emulated.clone(), trace.clone().map(|trace| trace as Arc<_>));
        let verbs = counted.counters();
        let host: Arc<dyn HostIommu> = Arc::new(counted);

        let nesting = Arc::new(Nesting::new(host.clone()).map_err(failed("nesting"))?);
        for region in memory.regions() {
            let (start, whole) = (memory.start_of(region), UserMemory::whole(region.clone()));
            nesting
                .map_memory(start, &whole, Protection::READ_WRITE)
                .map_err(failed("mapping guest memory"))?;
        }
        let mut devices = Vec::with_capacity(functions.len());
        for function in functions {
            let name = function.bdf.to_string();
            let pasid_bits = if function.pasid { Pasid::BITS as u8 } else { 0 };
            let device = DeviceConfig { pasid_bits, ats: config.ats, ..DeviceConfig::default() };
            emulated
                .add_device(&name, unit_id, function.bdf, device)
                .map_err(failed("adding a device"))?;
            let dev = host.device_bind(&name).map_err(failed("binding a device"))?;
            devices.push(dev);
            nesting.add_device(function.bdf, dev).map_err(failed("adding a device"))?;
        }

        let hosts: Vec<_> = nesting
            .hw_infos()
            .iter()
            .filter_map(|device| host_unit(device, host.extensions()))
            .collect();
        let offered = vtd_config(config, interrupt_remapping).intersect(&hosts)?;
        let observer = trace.map(|trace| trace as Arc<dyn Observer>);
        let tables = Arc::new(memory.map().clone());
        let vtd = VtdIommu::new(offered, tables, nesting.clone(), interrupts, observer)
            .map_err(failed("--iommu"))?;
        let target: Arc<dyn FaultTarget> = vtd.clone();
        nesting.set_fault_target(Arc::downgrade(&target));
        for function in functions {
            vtd.add_device(function.bdf);
        }
        Ok(Self { vtd, nesting, host, verbs, devices, interrupt_remapping, emulated, unit })
    }

    /// The register page.
    pub fn registers(&self) -> Arc<dyn BusDevice> {
        Arc::new(RegisterPage(self.vtd.clone()))
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

    /// How the function at `bdf` makes its memory requests.
    pub fn dma_master(&self, bdf: Bdf) -> Box<dyn DmaMaster> {
        Box::new(self.dma_port(bdf))
    }

    /// Where memory requests of the function at `bdf` enter the IOMMU.
    pub fn dma_port(&self, bdf: Bdf) -> DmaPort {
        self.unit.port(bdf.raw())
    }

    /// What was done so far, and the host's objects.
    pub fn report(&self) -> IommuReport {
        let host_calls = Verb::ALL
            .iter()
            .map(|verb| {
                let (calls, failures) = (self.verbs.calls(*verb), self.verbs.failures(*verb));
                (verb.name(), CallReport { calls, failures })
            })
            .filter(|(_, report)| report.calls != 0)
            .collect::<BTreeMap<_, _>>();
        IommuReport {
            viommu: self.vtd.counters(),
            nesting: self.nesting.counters(),
            host_calls,
            hardware: self.unit.counters(),
            graph: self.emulated.graph(),
        }
    }
}

impl Drop for Iommu {
    /// Gives every host object back, in order, and says what is left.
    fn drop(&mut self) {
        if let Err(error) = self.nesting.shutdown() {
            log::error!("host objects are left behind: {error}");
        }
        for dev in self.devices.drain(..) {
            if let Err(error) = self.host.device_unbind(dev) {
                log::error!("a device stays bound: {error}");
            }
        }
        match self.emulated.live_objects() {
            0 => {}
            count => log::error!("{count} host objects are left behind"),
        }
    }
}

impl fmt::Debug for Iommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommu").field("vtd", &self.vtd).finish_non_exhaustive()
    }
}

fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Iommu(format!("{what}: {error}"))
}

/// The emulated IOMMU that can serve `config`.
fn unit_config(config: &IommuConfig) -> VtdUnitConfig {
    VtdUnitConfig {
        address_width: match config.address_width {
            57 => AddressWidth::Bits57,
            _ => AddressWidth::Bits48,
        },
        guest_second_stage: config.second_stage,
        device_tlb: config.ats,
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
        HwInfoData::None => None,
    }
}

/// The register page as a bus device.
struct RegisterPage(Arc<VtdIommu>);

impl BusDevice for RegisterPage {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.mmio_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.mmio_write(offset, data);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulated::ObjectKind;
    use vm_memory::{Bytes, GuestAddress};

    struct NoInterrupts;

    impl InterruptSink for NoInterrupts {
        fn send_msi(&self, _: u64, _: u32) {}
    }

    const FUNCTION: AssignedFunction = AssignedFunction { bdf: Bdf::from_raw(8), pasid: true };

    fn iommu(config: &IommuConfig, memory: &MachineMemory) -> Result<Iommu> {
        Iommu::new(config, false, memory, &[FUNCTION], Arc::new(NoInterrupts), None)
    }

    /// Writes a 32-bit register of the page.
    fn write(iommu: &Iommu, offset: u64, value: u32) {
        iommu.registers().write(offset, &value.to_le_bytes());
    }

    #[test]
    fn a_function_passes_until_translation_is_enabled_and_is_blocked_then() {
        let memory = MachineMemory::new(1 << 20).unwrap();
        let iommu = iommu(&IommuConfig::default(), &memory).unwrap();
        let mut dma = iommu.dma_master(FUNCTION.bdf);
        dma.write(None, 0x4000, b"passes").unwrap();
        let mut bytes = [0; 6];
        memory.map().read_slice(&mut bytes, GuestAddress(0x4000)).unwrap();
        assert_eq!(&bytes, b"passes");
        assert!(dma.write(None, 1 << 20, b"no memory").is_err());
        assert!(dma.write(Pasid::new(1), 0x4000, b"no PASIDs yet").is_err());

        // An empty root table at 0, scalable mode (RTADDR.TTM 01b); SRTP, then TE.
        write(&iommu, 0x20, 1 << 10);
        write(&iommu, 0x18, 1 << 30);
        write(&iommu, 0x18, 1 << 31);
        assert!(dma.read(None, 0x4000, &mut bytes).is_err());
        let report = iommu.report();
        assert_eq!(report.viommu.faults_recorded, 1);
        // One when it was added, one when it was blocked.
        assert_eq!(report.host_calls["DEVICE_DETACH"].calls, 2);
    }

    #[test]
    fn nothing_is_left_on_the_host() {
        let memory = MachineMemory::new(1 << 20).unwrap();
        let iommu = iommu(&IommuConfig::default(), &memory).unwrap();
        let host = iommu.emulated.clone();
        let parents = host.graph().of_kind(ObjectKind::HwptPaging).count();
        assert_eq!(parents, 1);
        assert_eq!(host.pinned_bytes(), 1 << 20);
        drop(iommu);
        assert_eq!((host.live_objects(), host.pinned_bytes()), (0, 0));
    }

    #[test]
    fn the_emulated_host_serves_what_is_asked_for() {
        let memory = MachineMemory::new(1 << 20).unwrap();
        for asked in [false, true] {
            let (address_width, pasid_bits) = if asked { (57, 20) } else { (48, 6) };
            let config = IommuConfig {
                address_width,
                pasid_bits,
                ats: asked,
                second_stage: asked,
                ..IommuConfig::default()
            };
            let offered = iommu(&config, &memory).unwrap().vtd.capabilities();
            assert_eq!(offered.cap.mgaw() + 1, address_width);
            assert_eq!(offered.ecap.pasid_bits(), pasid_bits);
            assert_eq!((offered.ecap.dt(), offered.ecap.ssts()), (asked, asked));
        }
    }
}
